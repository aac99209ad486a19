"""AdamW over NumPy arrays, with moments in memory or in a file that is paged through memory one tensor at a time.

Source: Decoupled Weight Decay Regularization (Ilya Loshchilov, 2017, arXiv 1711.05101), algorithm 2; paging of moments:
QLoRA (Tim Dettmers, 2023, arXiv 2305.14314), section 3.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall.memory import Arena
from memwall.memory.arena import allocated_bytes
from memwall.memory.pages import round_up

_PIECE_VALUES = 1 << 16
OWNER = "optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """eps and beta1 are those of every source used here."""

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class Moments(ABC):
    """First and second moment of every tensor, float32 [2, size] each."""

    @abstractmethod
    def get(self, index: int) -> np.ndarray:
        """Those of one tensor, to be read and written."""

    @abstractmethod
    def done(self, index: int) -> None:
        """They are not needed again in this step."""


class HeldMoments(Moments):
    """In memory."""

    def __init__(self, sizes: Sequence[int], arena: Arena) -> None:
        self._held = [arena.allocate(OWNER, (2, size), np.float32) for size in sizes]
        for held in self._held:
            held[...] = 0

    def get(self, index: int) -> np.ndarray:
        return self._held[index]

    def done(self, index: int) -> None:
        """They stay."""


class PagedMoments(Moments):
    """In a file. Of the map only the tensor at work is resident; what was changed the system writes back."""

    def __init__(self, sizes: Sequence[int], path: Path, arena: Arena) -> None:
        counts = np.array([0, *(2 * size * 4 for size in sizes)], np.int64)
        # a tensor begins with a page, or dropping one would take in another
        starts = np.cumsum(-(-counts // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._charge = arena.charge(OWNER, int(np.diff(starts).max(initial=mmap.PAGESIZE)))
        self._starts, self._sizes = [int(start) for start in starts], list(sizes)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.truncate(descriptor, max(self._starts[-1], mmap.PAGESIZE))
            self._map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)

    def get(self, index: int) -> np.ndarray:
        size = self._sizes[index]
        return np.frombuffer(self._map, np.float32, 2 * size, self._starts[index]).reshape(2, size)

    def done(self, index: int) -> None:
        start = self._starts[index]
        if self._sizes[index]:
            self._map.madvise(mmap.MADV_DONTNEED, start, self._starts[index + 1] - start)


def moment_bytes(sizes: Sequence[int], *, paged: bool) -> int:
    """Bytes that moments hold in memory."""
    if paged:
        return max((round_up(8 * size) for size in sizes), default=0)
    return sum(allocated_bytes(8 * size) for size in sizes)


class AdamW:
    """One step at a time over tensors that are changed in place."""

    def __init__(self, settings: AdamSettings, moments: Moments) -> None:
        self.settings = settings
        self.moments = moments
        self.steps = 0

    def step(
        self,
        values: Sequence[np.ndarray],
        gradients: Sequence[np.ndarray],
        scale: float = 1.0,
        rates: Sequence[float] | None = None,
    ) -> None:
        """values, gradients: float32 of equal shapes, C-contiguous; gradients are multiplied by `scale` on the way.
        rates: what each tensor's learning rate is multiplied by.
        """
        self.steps += 1
        for index, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            flat, slope, moments = value.reshape(-1), gradient.reshape(-1), self.moments.get(index)
            rate = self.settings.learning_rate * (1.0 if rates is None else rates[index])
            for start in range(0, len(flat), _PIECE_VALUES):
                piece = slice(start, start + _PIECE_VALUES)
                slopes = slope[piece] * np.float32(scale)
                self._update(flat[piece], slopes, moments[0, piece], moments[1, piece], rate)
            del moments
            self.moments.done(index)

    def _update(self, value: np.ndarray, slope: np.ndarray, first: np.ndarray, second: np.ndarray, rate: float) -> None:
        chosen = self.settings
        value *= np.float32(1 - rate * chosen.weight_decay)
        first *= np.float32(chosen.beta1)
        first += np.float32(1 - chosen.beta1) * slope
        second *= np.float32(chosen.beta2)
        second += np.float32(1 - chosen.beta2) * slope * slope
        length = np.sqrt(second / np.float32(1 - chosen.beta2**self.steps)) + np.float32(chosen.eps)
        value -= np.float32(rate / (1 - chosen.beta1**self.steps)) * first / length
