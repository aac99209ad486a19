"""The codec seam: how numbers become bytes.

A `Codec` turns an array into a `Packed` and back. A `Packed` owns plain NumPy buffers and nothing else, so its size is what its
buffers weigh, and it can be written to a safetensors file and rebuilt from those bytes alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Numbers in a low-bit form.

    spec: the codec's spec string, enough to rebuild the codec (`formats.codec(spec)`).
    shape: the logical shape of the numbers.
    buffers: name -> C-contiguous array; every byte of the form is in here.
    """

    spec: str
    shape: tuple[int, ...]
    buffers: Mapping[str, np.ndarray]

    @property
    def size(self) -> int:
        """Count of logical numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes really held, padding and scales included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def bits_per_value(self) -> float:
        """Bits really spent per logical number (scales and padding counted)."""
        return 8 * self.nbytes / max(self.size, 1)


class Codec(ABC):
    """Encodes arrays to `Packed` and back. Instances are frozen dataclasses: settings and technique are one object."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """Canonical string such as `int4-g64`; `formats.codec(spec)` gives an equal codec."""

    @abstractmethod
    def encode(self, x: Any) -> Packed:
        """Array of any float dtype -> Packed."""

    @abstractmethod
    def decode(self, packed: Packed) -> Any:
        """Packed -> float32 array of `packed.shape`."""

    @abstractmethod
    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of each buffer that `encode` will make for an array of `shape`, known without the array."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of the packed form of an array of `shape`."""
        return sum(math.prod(s) * d.itemsize for s, d in self.buffers(shape).values())
