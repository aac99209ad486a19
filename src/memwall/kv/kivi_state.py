"""What KIVI holds of one layer: coded blocks in ranges that grow, and the newest rows, exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

CODED = "kv/coded"
"""Ledger owner of the coded blocks."""


class Blocks:
    """Coded blocks of one layer in a range that grows."""

    def __init__(self, arena: Arena, capacity_bytes: int) -> None:
        self.region = arena.reserve(CODED, round_up(max(capacity_bytes, 1)))
        self.bytes = self.region.array(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        if nbytes > len(self.bytes):
            self.region.commit(nbytes)
            self.bytes = self.region.array(self.region.committed_bytes, np.uint8)

    def copy_from(self, other: Blocks) -> None:
        self.reserve(len(other.bytes))
        self.bytes[:] = other.bytes

    def shrink(self, nbytes: int) -> None:
        self.bytes = self.bytes[:0]
        self.region.shrink(nbytes)
        self.bytes = self.region.array(self.region.committed_bytes, np.uint8)


class Recent:
    """Exact rows of one layer: `count` rows of `buffer` from `first` on."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer
        self.first = 0
        self.count = 0

    @property
    def rows(self) -> np.ndarray:
        return self.buffer[self.first : self.first + self.count]

    def push(self, rows: np.ndarray) -> None:
        if self.first + self.count + len(rows) > len(self.buffer):
            self.buffer[: self.count] = self.rows.copy()
            self.first = 0
        self.buffer[self.first + self.count : self.first + self.count + len(rows)] = rows
        self.count += len(rows)

    def set(self, rows: np.ndarray) -> None:
        self.first, self.count = 0, len(rows)
        self.buffer[: len(rows)] = rows

    def drop(self, count: int) -> None:
        self.count -= count
        self.first = self.first + count if self.count else 0


class LayerState:
    """One layer's state; `coded_keys + keys.count == coded_values + values.count == length` between steps."""

    def __init__(self, arena: Arena, key_bytes: int, value_bytes: int, keys: np.ndarray, values: np.ndarray) -> None:
        self.key_blocks = Blocks(arena, key_bytes)
        self.value_blocks = Blocks(arena, value_bytes)
        self.keys = Recent(keys)
        self.values = Recent(values)
        self.coded_keys = self.coded_values = 0
        self.length = 0

    def copy_from(self, other: LayerState) -> None:
        self.key_blocks.copy_from(other.key_blocks)
        self.value_blocks.copy_from(other.value_blocks)
        self.keys.set(other.keys.rows)
        self.values.set(other.values.rows)
        self.coded_keys, self.coded_values, self.length = other.coded_keys, other.coded_values, other.length

    def restored(self, length: int, coded_keys: int, coded_values: int) -> None:
        """Takes what was read into blocks and buffers as its state."""
        self.coded_keys, self.coded_values, self.length = coded_keys, coded_values, length
        self.keys.first, self.keys.count = 0, length - coded_keys
        self.values.first, self.values.count = 0, length - coded_values
