"""Bytes per owner and tier before anything is loaded: what the loader, the cache and the decoder will put on the
ledger.

Reads the configuration and the headers only. Each row is computed by the room that will allocate it (weights by
`models.precision`, cache by `kv`, activations by `models.decoder`), so plan and ledger differ only where memory is
not an arena's: the interpreter and its libraries (`runtime`, measured) and what loading needs for a moment
(`loading`, counted only as far as it rises above the resident state).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from memwall import __version__, kv
from memwall.engine.session import RUNTIME_HEADROOM_BYTES, cache_shape
from memwall.errors import InputError
from memwall.formats import codec
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up
from memwall.models.config import ModelConfig
from memwall.models.decoder import OWNER as ACTIVATIONS
from memwall.models.decoder import activation_shapes
from memwall.models.precision import LADDER, bits_of, is_matrix, resolve, source_spec, weight_bytes
from memwall.models.weights import PIECE_BYTES
from memwall.plan import store
from memwall.plan.base import Choice, PlanRow
from memwall.plan.search import Space

RUNTIME = "runtime"
LOADING = "loading"
HEADROOM = "headroom"
#: resident bytes of the interpreter with everything `run` imports where it cannot be measured (measured on Linux
#: x86-64, Python 3.11)
DEFAULT_RUNTIME_BYTES = 64_000_000
#: cache policies tried when none is asked, the least lossy first
POLICIES = ("float16", "kivi(4bit)", "kivi(2bit)")


class ModelSpace(Space):
    """One model on one machine, as the search sees it. saved: spec per tensor of a compressed folder, which is then
    the only choice.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        saved: Mapping[str, str] | None = None,
        runtime_bytes: int = DEFAULT_RUNTIME_BYTES,
        headroom_bytes: int = RUNTIME_HEADROOM_BYTES,
        device_tier: str = "ram",
        host_tier: str = "ram",
    ) -> None:
        """device_tier holds weights, cache and activations; host_tier the interpreter and what loading needs."""
        self.config = config
        self.device_tier = device_tier
        self.host_tier = host_tier
        self.saved = saved
        self.runtime_bytes = runtime_bytes
        self.headroom_bytes = headroom_bytes
        self.shape = cache_shape(config)
        self.max_context = config.max_position
        self.policies = POLICIES
        self.ceiling = source_spec(config) if saved is None else "saved"
        self.uniform = LADDER if saved is None else ("saved",)
        self.specs = lru_cache(maxsize=512)(self._specs)
        self._bits = lru_cache(maxsize=512)(self._weight_bits)
        self.weight_rows = lru_cache(maxsize=512)(self._weight_rows)
        self.cache_rows = lru_cache(maxsize=512)(self._cache_rows)
        self.ceiling_bits = self.weight_bits(self.ceiling)
        self.lowest_bits = self.weight_bits(LADDER[0]) if saved is None else self.ceiling_bits

    def _specs(self, weights: str) -> dict[str, str]:
        if weights == "saved" and self.saved is not None:
            return dict(self.saved)
        return resolve(self.config, weights)

    def weight_bits(self, weights: str) -> float:
        """True bits per weight over the matrices."""
        return self._bits(weights)

    def _weight_bits(self, weights: str) -> float:
        return bits_of(self.config, self.specs(weights))

    def _weight_rows(self, weights: str) -> dict[str, int]:
        return {owner: round_up(size) for owner, size in weight_bytes(self.config, self.specs(weights)).items() if size}

    def _cache_rows(self, policy: str, context: int, segment: int) -> dict[str, int]:
        return dict(kv.predict(policy, self.shape, context, min(segment, context)))

    def cache_bits(self, choice: Choice) -> float:
        """Bits per cached number at the end of the context, exact tail and staging included."""
        numbers = 2 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_dim * choice.context
        return 8 * sum(self.cache_rows(choice.kv, choice.context, choice.segment_tokens).values()) / numbers

    def rows(self, choice: Choice) -> tuple[PlanRow, ...]:
        """Predicted rows; per tier they add up to the peak."""
        device, host = self.device_tier, self.host_tier
        weights = self.weight_rows(choice.weights)
        cache = self.cache_rows(choice.kv, choice.context, choice.segment_tokens)
        work = activations(self.config, choice.segment_tokens) * choice.batch
        rows = [PlanRow(owner=owner, tier=device, nbytes=size) for owner, size in sorted(weights.items())]
        rows += [PlanRow(owner=owner, tier=device, nbytes=size * choice.batch) for owner, size in sorted(cache.items())]
        rows.append(PlanRow(owner=ACTIVATIONS, tier=device, nbytes=work))
        rows.append(PlanRow(owner=RUNTIME, tier=host, nbytes=self.runtime_bytes))
        rows.append(PlanRow(owner=HEADROOM, tier=host, nbytes=self.headroom_bytes))
        # weights come first: while they load, cache and activations do not exist yet and their room is free for it
        room = sum(cache.values()) * choice.batch + work if device == host else 0
        above = max(loading_bytes(self.config, self.specs(choice.weights)) - room, 0)
        if above:
            rows.append(PlanRow(owner=LOADING, tier=host, nbytes=above))
        return tuple(row for row in rows if row.nbytes)

    def peak_bytes(self, choice: Choice) -> dict[str, int]:
        """Sum of the rows per tier."""
        totals: dict[str, int] = {}
        for row in self.rows(choice):
            totals[row.tier] = totals.get(row.tier, 0) + row.nbytes
        return totals


def activations(config: ModelConfig, segment_tokens: int) -> int:
    """Resident bytes of the decoder's buffers, each in whole pages as the arena gives them out."""
    total = 0
    for rows, cols in activation_shapes(config, segment_tokens).values():
        nbytes = rows * cols * np.dtype(np.float32).itemsize
        total += round_up(nbytes) if nbytes >= SMALL_BYTES else max(round_up(nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES)
    return total


def loading_bytes(config: ModelConfig, specs: Mapping[str, str]) -> int:
    """The most that loading holds beside the finished weights: one piece of the source and its encoded form."""
    source_bytes = np.dtype(np.float32 if source_spec(config) == "float32" else np.float16).itemsize
    most = 0
    for tensor in config.tensors():
        piece = min(tensor.size * source_bytes, PIECE_BYTES)
        if is_matrix(tensor):
            values = piece // source_bytes
            rows = max(values // tensor.shape[-1], 1)
            piece += codec(specs[tensor.name]).nbytes((rows, tensor.shape[-1]))
        most = max(most, piece)
    return most


def measured_runtime_bytes(model: Path) -> int:
    """Resident bytes of a process that has imported what `memwall run` imports and read the model's tokenizer.

    Measured once per version and tokenizer in a process of its own, and kept.
    """
    tokenizer = model / "tokenizer.json"
    tokenizer_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
    key = f"{__version__} {platform.platform()} {platform.python_version()} tokenizer {tokenizer_bytes}"
    known = store.read("runtime").get(key)
    if isinstance(known, int) and known > 0:
        return known
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUNTIME_SCRIPT, str(model)], capture_output=True, text=True, timeout=60, check=True
        )
        measured = int(json.loads(done.stdout)["resident_bytes"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return DEFAULT_RUNTIME_BYTES
    store.update("runtime", {key: measured})
    return measured


_RUNTIME_SCRIPT = """
import json, sys
from pathlib import Path
import memwall.cli.run, memwall.engine
from memwall.memory import resident_bytes
from memwall.models.tokenizer import Tokenizer
if (Path(sys.argv[1]) / "tokenizer.json").is_file():
    tokenizer = Tokenizer.from_directory(sys.argv[1])
    tokenizer.encode("some words")
print(json.dumps({"resident_bytes": resident_bytes(exact=True)}))
"""


def check_weights(space: ModelSpace, weights: str) -> None:
    """InputError for an unknown or impossible choice of weights."""
    if weights != "auto":
        space.specs(weights)


def check_policy(space: ModelSpace, policy: str) -> None:
    """InputError for an unknown cache policy."""
    if policy == "auto":
        return
    try:
        space.cache_rows(policy, 1, 1)
    except ValueError as error:
        raise InputError(f"cache policy {policy!r}: {error}") from error
