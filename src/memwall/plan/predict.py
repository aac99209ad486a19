"""Bytes per owner and tier before anything is loaded: what the loader, the cache and the decoder will put on the
ledger.

Reads the configuration and the headers only. Each row is computed by the room that will allocate it (weights by
`models.precision`, cache by `kv`, activations by `models.decoder`), so plan and ledger differ only where memory is
not an arena's: the interpreter and its libraries (`runtime`, measured) and what loading needs for a moment
(`loading`, counted only as far as it rises above the resident state); likewise what making an empty cache needs
(`kv/building`).
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from memwall import __version__, kv
from memwall.engine.llm_in_a_flash import DEFAULT_WINDOW, STAGE, stage_bytes, store_bytes
from memwall.engine.llm_in_a_flash import OWNER as NEURONS
from memwall.engine.loading import RUNTIME_HEADROOM_BYTES, cache_shape
from memwall.engine.sampling import Sampler
from memwall.engine.session import SAMPLING
from memwall.errors import InputError
from memwall.memory.arena import allocated_bytes
from memwall.memory.pages import round_up
from memwall.models import model_directory
from memwall.models.config import ModelConfig
from memwall.models.decoder import OWNER as ACTIVATIONS
from memwall.models.decoder import SCRATCH, activation_shapes, scratch_bytes
from memwall.models.precision import (
    LADDER,
    bits_of,
    level_formats,
    parse_ladder,
    resolve,
    source_spec,
    weight_bytes,
)
from memwall.models.ssm_decoder import buffer_shapes, ssm_scratch_bytes
from memwall.models.ssm_tables import OWNER as TABLES
from memwall.models.ssm_tables import table_bytes
from memwall.models.stack_index import CHOICE as STACK_CHOICE
from memwall.models.stack_index import StackIndex
from memwall.models.weights import LOADING, loading_bytes
from memwall.plan import store
from memwall.plan.base import Choice, PlanRow
from memwall.plan.search import Space

RUNTIME = "runtime"
HEADROOM = "headroom"
BUILDING = "kv/building"
#: runs of the same command differ by this much in what the interpreter holds; on top of what the session keeps free
RUNTIME_SPREAD_BYTES = 768 * 1024
#: resident bytes of the interpreter with everything `run` imports where it cannot be measured (measured on Linux
#: x86-64, Python 3.11)
DEFAULT_RUNTIME_BYTES = 64_000_000
#: what level formats add to it: pages of code, tables and working arrays of the encoder (measured on the same)
LEVEL_FORMAT_BYTES = 1280 * 1024
#: what the libraries of streamed neurons add to it (0.8 to 0.93 MB, measured on the same)
NEURON_LIBRARY_BYTES = 1 << 20
PROCESSES, PROCESS_TIER = "runtime/storage process", "storage"
#: what the interpreter and libraries of a storage process take (measured on Linux x86-64, Python 3.11)
PROCESS_RUNTIME_BYTES = 43_000_000
#: cache policies tried when none is asked, the least lossy first; of heads whose size suits none of KIVI's, the others
POLICIES = ("float16", "kivi(4bit)", "kivi(2bit)")
OF_ANY_HEAD = ("float16", "int8")


class ModelSpace(Space):
    """One model on one machine, as the search sees it. saved: spec per tensor of a compressed folder, which is then
    the only choice, unless it holds a stack of blocks, of which any number is one.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        saved: Mapping[str, str] | None = None,
        stack: StackIndex | None = None,
        runtime_bytes: int = DEFAULT_RUNTIME_BYTES,
        headroom_bytes: int = RUNTIME_HEADROOM_BYTES + RUNTIME_SPREAD_BYTES,
        device_tier: str = "ram",
        host_tier: str = "ram",
        extra_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """device_tier holds weights, cache and activations; host_tier the interpreter and what loading needs.

        extra_bytes: by owner, what the caller will hold besides.
        """
        self.config = config
        self.device_tier = device_tier
        self.host_tier = host_tier
        self.saved = saved
        self.stack = stack
        self.extra_bytes = dict(extra_bytes or {})
        self.runtime_bytes = runtime_bytes + self.extra_bytes.pop(RUNTIME, 0)
        self.window_bytes = self.extra_bytes.pop(NEURONS, 0)
        if config.neurons is not None and not self.window_bytes:
            self.window_bytes = store_bytes(config, DEFAULT_WINDOW)
        self.headroom_bytes = headroom_bytes
        self.shape = cache_shape(config)
        self.max_context = config.max_position
        self.policies = _policies(self.shape) if config.ssm is None else (kv.STATE,)
        self.ceiling = source_spec(config) if saved is None else "saved"
        self.specs = lru_cache(maxsize=512)(self._specs)
        self._bits = lru_cache(maxsize=512)(self._weight_bits)
        self.weight_rows = lru_cache(maxsize=512)(self._weight_rows)
        self.cache_rows = lru_cache(maxsize=512)(self._cache_rows)
        self.loading_bytes = lru_cache(maxsize=512)(self._loading_bytes)
        self.ceiling_bits = self.weight_bits(self.ceiling)
        self.mix(None)

    def ladder(self) -> tuple[int, int]:
        return super().ladder() if self.stack is None else (0, self.stack.num_blocks)

    def rung(self, number: int) -> str:
        return super().rung(number) if self.stack is None else f"{STACK_CHOICE}{number}"

    def mix(self, formats: str | None) -> None:
        """Let the search mix these formats, such as (e2m1,posit8); None for integers."""
        if self.saved is not None:
            if formats is not None:
                raise InputError(f"auto{formats}: this model is compressed already; its formats are fixed")
            self.uniform = ("saved",)
            self.lowest_bits = self.ceiling_bits if self.stack is None else self.weight_bits(self.rung(0))
            return
        self.uniform = LADDER if formats is None else parse_ladder(formats)
        self.mixes = f"mixed{formats or ''}"
        self.lowest_bits = self.weight_bits(self.uniform[0])

    def _specs(self, weights: str) -> dict[str, str]:
        if weights == "saved" and self.saved is not None:
            return dict(self.saved)
        if weights.startswith(STACK_CHOICE) and self.stack is not None and self.saved is not None:
            return {**self.saved, **self.stack.specs(self.stack.chosen(weights))}
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

    def _loading_bytes(self, weights: str) -> int:
        itemsize = np.dtype(np.float32 if source_spec(self.config) == "float32" else np.float16).itemsize
        return loading_bytes(self.config, self.specs(weights), itemsize)

    def cache_bits(self, choice: Choice) -> float:
        """Bits per cached number at the end of the context, exact tail and staging included."""
        numbers = 2 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_dim * choice.context
        return 8 * sum(self.cache_rows(choice.kv, choice.context, choice.segment_tokens).values()) / numbers

    def cache_savings(self, choice: Choice) -> kv.Savings:
        """What each part of the cache policy saves at the end of the context."""
        prompt = min(choice.segment_tokens, choice.context)
        return kv.savings(choice.kv, self.shape, choice.context, prompt, choice.context)

    def stored_bits(self, policy: str) -> float:
        """From the growth of the cache between two long contexts, where the exact tail no longer changes."""
        shape, short, long = self.shape, 1 << 14, 1 << 15
        sizes = [sum(kv.predict(policy, shape, length).values()) for length in (short, long)]
        numbers = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * (long - short)
        return 8 * (sizes[1] - sizes[0]) / numbers

    def rows(self, choice: Choice) -> tuple[PlanRow, ...]:
        """Predicted rows; per tier they add up to the peak."""
        device, host = self.device_tier, self.host_tier
        weights = self.weight_rows(choice.weights)
        cache = self.cache_rows(choice.kv, choice.context, choice.segment_tokens)
        work = activations(self.config, choice.segment_tokens) * choice.batch
        rows = [PlanRow(owner=owner, tier=device, nbytes=size) for owner, size in sorted(weights.items())]
        elsewhere = kv.tiers(choice.kv)
        rows += [
            PlanRow(owner=owner, tier=elsewhere.get(owner, device), nbytes=size * choice.batch)
            for owner, size in sorted(cache.items())
        ]
        if processes := kv.processes(choice.kv, self.shape):
            rows.append(PlanRow(owner=PROCESSES, tier=PROCESS_TIER, nbytes=processes * PROCESS_RUNTIME_BYTES))
        rows.append(PlanRow(owner=ACTIVATIONS, tier=device, nbytes=work))
        if self.config.neurons is not None:
            staged = stage_bytes(self.config.neurons, choice.segment_tokens)
            rows += [PlanRow(owner=owner, tier=device, nbytes=size)
                     for owner, size in ((NEURONS, self.window_bytes), (STAGE, staged))]  # fmt: skip
        sizes = (self.config, self.specs(choice.weights), choice.segment_tokens)
        if self.config.ssm is None:
            scratch = scratch_bytes(*sizes, threads=choice.threads)
        else:
            scratch = ssm_scratch_bytes(*sizes, threads=choice.threads)
            rows.append(PlanRow(owner=TABLES, tier=device, nbytes=table_bytes(self.config)))
        rows.append(PlanRow(owner=SCRATCH, tier=device, nbytes=scratch))
        runtime = self.runtime_bytes + (LEVEL_FORMAT_BYTES if level_formats(self.specs(choice.weights)) else 0)
        runtime += 0 if self.config.neurons is None else NEURON_LIBRARY_BYTES
        rows.append(PlanRow(owner=RUNTIME, tier=host, nbytes=runtime))
        rows.append(PlanRow(owner=HEADROOM, tier=host, nbytes=self.headroom_bytes))
        rows += [PlanRow(owner=owner, tier=host, nbytes=size) for owner, size in self.extra_bytes.items()]
        # weights come first: while they load, cache and activations do not exist yet and their room is free for it
        own = sum(size for owner, size in cache.items() if owner not in elsewhere)
        room = own * choice.batch + work if device == host else 0
        above = max(self.loading_bytes(choice.weights) - room, 0)
        if above:
            rows.append(PlanRow(owner=LOADING, tier=host, nbytes=above))
        # an empty cache is made before tokens take their room
        grown = own - sum(self.cache_rows(choice.kv, 1, 1).values()) if own else 0
        building = max(kv.building_bytes(choice.kv, self.shape) - max(grown, 0) * choice.batch, 0)
        if building:
            rows.append(PlanRow(owner=BUILDING, tier=device, nbytes=building))
        return tuple(row for row in rows if row.nbytes)

    def peak_bytes(self, choice: Choice) -> dict[str, int]:
        """Sum of the rows per tier."""
        totals: dict[str, int] = {}
        for row in self.rows(choice):
            totals[row.tier] = totals.get(row.tier, 0) + row.nbytes
        return totals


def _policies(shape: kv.CacheShape) -> tuple[str, ...]:
    """Of POLICIES those that this model can have."""
    try:
        for policy in POLICIES:
            kv.predict(policy, shape, 1, 1)
    except InputError:
        return OF_ANY_HEAD
    return POLICIES


def activations(config: ModelConfig, segment_tokens: int) -> int:
    """Resident bytes of the decoder's buffers, each in whole pages as the arena gives them out."""
    single = np.dtype(np.float32)
    if config.ssm is None:
        buffers = [(shape, single) for shape in activation_shapes(config, segment_tokens).values()]
    else:
        buffers = list(buffer_shapes(config, segment_tokens).values())
    return sum(allocated_bytes(rows * cols * dtype.itemsize) for (rows, cols), dtype in buffers)


def sampling_bytes(config: ModelConfig) -> dict[str, int]:
    """What drawing tokens (not greedily) holds, by owner."""
    rows, cols = Sampler.scratch_shape(config.vocab_size)
    return {SAMPLING: allocated_bytes(rows * cols * np.dtype(np.float32).itemsize)}


def measured_runtime_bytes(model: Path) -> int:
    """The runtime row of a process that runs this model: what the arena does not hold.

    Measured in processes of their own, and kept: the row of a real `memwall run demo`, and what the model's tokenizer
    takes beyond the demo's. Once per version and start of the system: how much of a library a touch brings in depends
    on how it came to lie in the file cache.
    """
    tokenizer = model / "tokenizer.json"
    size = tokenizer.stat().st_size if tokenizer.is_file() else 0
    key = f"{__version__} {platform.platform()} {platform.python_version()}"
    stored = store.read("runtime")
    known = stored if stored.get("boot") == _boot() else {}
    base = known.get(key, 0)
    extra = known.get(f"{key} tokenizer of {size}", 0 if _is_demo(model) or not size else None)
    fresh = {}
    if not isinstance(base, int) or base <= 0:
        base = fresh[key] = _measured(_RUN_SCRIPT)
    if not isinstance(extra, int):
        extra = fresh[f"{key} tokenizer of {size}"] = _measured(_TOKENIZER_SCRIPT, str(model))
    if fresh:
        store.update("runtime", {"boot": _boot(), **{name: v for name, v in fresh.items() if v is not None}})
    return (DEFAULT_RUNTIME_BYTES if base is None else base) + (extra or 0)


def _boot() -> str:
    """Names this start of the system; empty where it has no such name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_demo(model: Path) -> bool:
    return model.resolve() == model_directory("demo").resolve()


def _measured(script: str, *arguments: str) -> int | None:
    """The number that a script prints last; None when it fails, which leaves the default to be used."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=True
        )
        return max(int(done.stdout.splitlines()[-1]), 0)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


# The command itself, so that whatever it keeps is counted; it must not ask for the figure that it is here to give.
_RUN_SCRIPT = """
import contextlib, io, json, sys
import memwall.plan.choose as choose
choose.measured_runtime_bytes = lambda model: 1
from memwall.cli import main
from memwall.memory import Budget
from memwall.models import model_directory
# a budget that takes some searching: the run below has none and would plan at once
choose.make_plan(model_directory("demo"), budget=Budget(tiers={"ram": 11_000_000}), context=64, measure=False)
sys.argv = ["memwall", "run", "demo", "Some words", "--json", "--weights", "int4", "--kv", "float16"]
sys.argv += ["--max-new-tokens", "4", "--ignore-eos"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main()
print(sum(row["bytes"] for row in json.loads(out.getvalue())["ledger"] if row["owner"] == "runtime"))
"""
_TOKENIZER_SCRIPT = """
import sys
from memwall.memory import resident_bytes
from memwall.models import model_directory
from memwall.models.tokenizer import Tokenizer
kept, sizes = [], []
for folder in (model_directory("demo"), model_directory("demo"), sys.argv[1]):
    kept.append(Tokenizer.from_directory(folder))
    kept[-1].encode("some words to encode")
    sizes.append(resident_bytes(exact=True))
print((sizes[2] - sizes[1]) - (sizes[1] - sizes[0]))
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
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"cache policy {policy!r}: {error}") from error
