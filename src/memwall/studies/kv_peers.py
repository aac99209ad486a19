"""Other libraries as subjects of the cache study: transformers' quantized cache (quanto) and presses of kvpress.

They run the same checkpoint in PyTorch on the same tasks, in float32; beside caches of the model in another format
they would be told apart by weights too, and are left out. Plain numbers of their caches are counted as float16, packed
ones as they are. A library that is absent, does not go with the installed versions of others, or cannot load the
checkpoint gives rows that say so.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.models import ModelConfig
from memwall.studies.subjects import StudyModel, Subject

FLOAT = "float32"
HALF_BYTES = 2
SNAP_WINDOW = 32
SMALL_HIDDEN = 1024
QUANTO_BITS = (4, 2)
THINK_SHARES = (0.4, 0.6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer's cache at one setting; `make` gives a fresh subject. skipped: why it cannot be had."""

    method: str
    policy: str
    library: str
    budget: float | None = None
    make: Callable[[], Subject]
    skipped: str = ""
    note: str = ""


class PeerSubject(Subject):
    """A transformers model with a cache made by `make_cache`, its prompt read inside `press`."""

    def __init__(
        self, model: Any, study: StudyModel, make_cache: Callable[[], Any], press: Callable[[], Any] | None
    ) -> None:
        self.model, self.study, self.make_cache, self.press = model, study, make_cache, press
        self.begin()

    def begin(self) -> None:
        self.cache, self.length = self.make_cache(), 0

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        # a press works on a prompt; later turns are kept as they are
        pressing = self.press()(self.model) if self.press is not None and not self.length else nullcontext()
        positions = torch.arange(self.length, self.length + len(tokens))[None]
        with torch.inference_mode(), pressing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that will change; the study is not where to read of them
            found = self.model(
                input_ids=torch.tensor([list(tokens)]),
                past_key_values=self.cache,
                position_ids=positions,  # of the tokens in the sequence, whatever the cache has dropped
                use_cache=True,
                logits_to_keep=1,
            )
        self.length += len(tokens)
        return np.asarray(found.logits[0, -1].float().numpy())

    def step(self, token: int) -> np.ndarray:
        return self.read([token])

    @contextmanager
    def branch(self) -> Iterator[None]:
        kept = self.cache, self.length
        # layers replace their tensors and never write into them, so that a copy of the layers is a branch of its own
        self.cache = copy.copy(self.cache)
        self.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        try:
            yield
        finally:
            self.cache, self.length = kept

    @property
    def nbytes(self) -> int:
        held = 0
        for layer in self.cache.layers:
            for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
                held += tensor_bytes(getattr(layer, name, None))
        return held

    def encode(self, text: str) -> list[int]:
        return self.study.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self.study.tokenizer.decode(tokens)


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor or of the parts of a packed one, floats counted as float16."""
    if tensor is None:
        return 0
    if isinstance(tensor, tuple | list):
        return sum(map(tensor_bytes, tensor))
    if isinstance(tensor, dict):
        return sum(map(tensor_bytes, tensor.values()))
    if not hasattr(tensor, "numel"):
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    size = HALF_BYTES if tensor.is_floating_point() else tensor.element_size()
    return int(tensor.numel() * size)


@lru_cache(maxsize=1)
def _loaded(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the study shows its own
    # the products of a small model are over before a second thread has woken
    small = ModelConfig.from_directory(directory).hidden_size <= SMALL_HIDDEN
    torch.set_num_threads(1 if small else kernels.num_threads())
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"transformers does not load {directory}: {str(error).splitlines()[0]}") from error


def peers(
    directory: Path, budgets: Sequence[float], study: StudyModel, *, weights: str = FLOAT, quick: bool = False
) -> list[Peer]:
    """All peers at all settings, those that are not there included. weights: format that the study's own model is in;
    quick: fewer settings.
    """
    count = 1 if quick else None

    def subject(make_cache: Callable[[], Any], press: Callable[[], Any] | None = None) -> Callable[[], Subject]:
        return lambda: PeerSubject(_loaded(directory), study, make_cache, press)

    found = [
        *_quanto(directory, QUANTO_BITS[:count], subject),
        *_kvpress(budgets, THINK_SHARES[:count], subject),
    ]
    if weights == FLOAT:
        return found
    others = f"runs the model in {FLOAT}, and the study has --weights {weights}: leave that out to compare them"
    return [replace(peer, skipped=peer.skipped or others) for peer in found]


def _quanto(directory: Path, widths: Sequence[int], subject: Callable[..., Callable[[], Subject]]) -> Iterator[Peer]:
    library, missing = _library("optimum.quanto", "transformers", "optimum-quanto")
    missing = missing or _stopped_build()
    for bits in widths:

        def make_cache(bits: int = bits) -> Any:
            from transformers import QuantizedCache

            return QuantizedCache("quanto", _loaded(directory).config, nbits=bits)

        yield Peer(
            method="quanto", policy=f"QuantizedCache(quanto, nbits={bits})", library=library, skipped=missing,
            make=subject(make_cache),
        )  # fmt: skip


def _kvpress(
    budgets: Sequence[float], shares: Sequence[float], subject: Callable[..., Callable[[], Subject]]
) -> Iterator[Peer]:
    library, missing = _library("kvpress", "kvpress")
    missing = missing or _kvpress_misfit()

    def plain() -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    for budget in budgets:

        def snap(budget: float = budget) -> Any:
            from kvpress import SnapKVPress

            return SnapKVPress(compression_ratio=1 - budget, window_size=SNAP_WINDOW)

        yield Peer(
            method="kvpress-snapkv", policy=f"SnapKVPress({1 - budget:g})", library=library, budget=budget,
            skipped=missing, make=subject(plain, snap),
        )  # fmt: skip
    for share in shares:

        def think(share: float = share) -> Any:
            from kvpress import ThinKPress

            return ThinKPress(key_channel_compression_ratio=share)

        yield Peer(
            method="kvpress-think", policy=f"ThinKPress({share})", library=library, skipped=missing,
            make=subject(plain, think), note="sets channels to zero: no byte is freed",
        )  # fmt: skip


def _library(module: str, *packages: str) -> tuple[str, str]:
    """(names and versions, why it cannot be had)."""
    for needed in ("torch", "transformers"):
        if importlib.util.find_spec(needed) is None:
            return packages[0], f"{needed} is not installed: pip install 'memwall[torch]'"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        return packages[0], f"not installed: pip install {packages[-1]}"
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages), ""


def _stopped_build() -> str:
    """optimum-quanto builds native code at its first use, and waits for ever for a build that was killed."""
    found = importlib.util.find_spec("optimum.quanto")
    folder = Path((found and found.origin) or "").parent / "library" / "extensions"
    lock = next(folder.glob("*/build/lock"), None)
    if lock is None:
        return ""
    return f"its native code is being built, or was when its process was stopped: if none builds, remove {lock}"


@lru_cache(maxsize=1)
def _kvpress_misfit() -> str:
    """Why an installed kvpress cannot be used: it goes with some versions of transformers only."""
    from packaging.requirements import Requirement

    for text in metadata.requires("kvpress") or []:
        needed = Requirement(text)
        if needed.name == "transformers" and metadata.version("transformers") not in needed.specifier:
            return f"needs transformers {needed.specifier}; {metadata.version('transformers')} is installed"
    try:
        import kvpress  # noqa: F401
    except ImportError as error:
        return f"cannot be imported: {error}"
    return ""
