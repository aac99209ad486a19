"""Where the elements of a tile lie in global or shared memory: strides, and a swizzle against bank conflicts.

A swizzle is an exclusive or: bits of the row number are added without carry to the number of a 16-byte vector within
its line, so that the same vector of eight neighbouring rows lies in eight different groups of four banks.

Source: Tilus (2025, arXiv 2504.12984), shared layouts; the form (bits, base, shift) is the one CUTLASS describes.
Units: offsets in elements of the tensor's type; `vector_bytes` in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_layout import row_major

VECTOR_BYTES = 16
LINE_BYTES = 128
"""All 32 banks of four bytes."""
BANK_BYTES, NUM_BANKS = 4, 32
SECTOR_BYTES = 32


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """offset = index . strides, then bits [base, base + bits) get those at [base + shift, ...) added without carry."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: tuple[int, int, int] | None = None

    def offset(self, index: np.ndarray) -> np.ndarray:
        """int64 [..., dimensions] -> element offsets [...]."""
        linear: np.ndarray = np.asarray(index, np.int64) @ np.asarray(self.strides, np.int64)
        if self.swizzle is None:
            return linear
        bits, base, shift = self.swizzle
        return linear ^ (((linear >> (base + shift)) & ((1 << bits) - 1)) << base)

    @property
    def num_elements(self) -> int:
        """Elements from the first to behind the last."""
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


def row_major_memory(shape: tuple[int, ...]) -> MemoryLayout:
    """The last dimension is contiguous."""
    return MemoryLayout(tuple(shape), row_major(shape))


def column_major_memory(shape: tuple[int, ...]) -> MemoryLayout:
    """The first dimension is contiguous."""
    return MemoryLayout(tuple(shape), tuple(math.prod(shape[:d]) for d in range(len(shape))))


def swizzled_memory(shape: tuple[int, ...], element_bytes: int) -> MemoryLayout:
    """Row-major with 16-byte vectors moved so that a column of eight rows meets all banks once.

    Rows are a power of two of at least one vector; leading dimensions (stages) are kept apart.
    """
    row_bytes = shape[-1] * element_bytes
    vectors = row_bytes // VECTOR_BYTES
    if row_bytes % VECTOR_BYTES or vectors & (vectors - 1) or element_bytes & (element_bytes - 1):
        raise InputError(f"rows of {row_bytes} bytes: a swizzle needs a power of two of at least {VECTOR_BYTES}")
    base = int(math.log2(VECTOR_BYTES // element_bytes))
    per_line = LINE_BYTES // VECTOR_BYTES
    shift = int(math.log2(max(vectors, per_line)))
    bits = int(math.log2(per_line))
    rows = math.prod(shape[-2:-1])
    if rows * row_bytes % (max(row_bytes, LINE_BYTES) * per_line):
        # fewer rows than a pattern has: only the bits that stay within the tile
        lines = max(rows * row_bytes // max(row_bytes, LINE_BYTES), 1)
        bits = min(bits, int(math.log2(lines & -lines)))
    return MemoryLayout(tuple(shape), row_major(shape), (bits, base, shift) if bits else None)


def sectors(addresses: np.ndarray, width: int) -> int:
    """32-byte sectors that one request of a warp touches; addresses in bytes, `width` bytes each."""
    first, last = addresses // SECTOR_BYTES, (addresses + width - 1) // SECTOR_BYTES
    return len(np.unique(np.concatenate([first, last])))


def bank_conflicts(addresses: np.ndarray, width: int) -> int:
    """Extra cycles of one shared request of a warp: over all phases, the most words of one bank less one.

    A phase is as many threads as move 128 bytes (8 of 16 bytes, 16 of 8, else the whole warp); threads that read the
    same word share it.
    """
    per_phase = min(max(LINE_BYTES // max(width, BANK_BYTES), 1), len(addresses))
    extra = 0
    for start in range(0, len(addresses), per_phase):
        begin = addresses[start : start + per_phase] // BANK_BYTES
        end = (addresses[start : start + per_phase] + width - 1) // BANK_BYTES
        words = np.unique(np.concatenate([begin + k for k in range(int((end - begin).max()) + 1)]))
        extra += int(np.bincount(words % NUM_BANKS).max()) - 1
    return extra
