"""What a cache of coded past and exact recent tokens holds of one layer, and how many bytes that is.

`CodedForm` says how a technique cuts tokens into coded units; `kv.coded_cache` is the cache built on it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memwall.kv.base import CacheShape
from memwall.kv.float_store import float_dtype
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

CODED = "kv/coded"
RECENT, STAGING = "kv/recent", "kv/staging"
SLACK_TOKENS = 16
"""Rows beyond a sliding window: they slide by moving an index, and go back to the front once in so many tokens."""


class CodedForm(Protocol):
    """How keys and values are coded. Units are tokens that are coded together: inside one, forgetting must decode."""

    @property
    def exact(self) -> str:
        """Float type of the exact tokens."""
        ...

    @property
    def units(self) -> tuple[int, int]:
        """Tokens of a unit of keys and of values."""
        ...

    @property
    def bits_per_value(self) -> tuple[float, float]:
        """Bits of a coded number of keys and of values, scales and exponents included."""
        ...

    def key_bytes(self, shape: CacheShape, tokens: int, key_dim: int | None = None) -> int:
        """Bytes of a layer's coded keys, whole units; key_dim: channels, where some were dropped."""
        ...

    def value_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Bytes of a layer's coded values."""
        ...

    def recent_rows(self, capacity_tokens: int) -> tuple[int, int]:
        """Rows kept for exact keys and for exact values of one layer."""
        ...

    def to_code(self, num_keys: int, num_values: int) -> tuple[int, int]:
        """How many of so many exact keys and values are to be coded, oldest first; whole units."""
        ...


def split(form: CodedForm, length: int) -> tuple[int, int]:
    """Coded keys and coded values among `length` tokens that came one by one."""
    return form.to_code(length, length)


def predict_coded(
    form: CodedForm, shape: CacheShape, sizes: tuple[int, int, int], key_dim: int | None = None
) -> dict[str, int]:
    """As `KVCache.predict`; sizes: tokens held, tokens at once, capacity; key_dim: channels that coded keys have."""
    num_tokens, prefill_tokens, capacity_tokens = sizes
    row_bytes = shape.row_values * float_dtype(form.exact).itemsize
    coded_keys, coded_values = split(form, num_tokens)
    keys, values = form.key_bytes(shape, coded_keys, key_dim), form.value_bytes(shape, coded_values)
    recent = shape.num_layers * sum(form.recent_rows(capacity_tokens)) * row_bytes
    return {
        CODED: shape.num_layers * (round_up(keys) + round_up(values)),
        RECENT: round_up(recent, ALIGNMENT_BYTES) if recent < SMALL_BYTES else round_up(recent),
        STAGING: 2 * round_up(prefill_tokens * row_bytes) if prefill_tokens > 1 else 0,
    }


def read_bytes_coded(form: CodedForm, shape: CacheShape, num_tokens: int, key_dim: int | None = None) -> int:
    """As `KVCache.read_bytes`; key_dim: channels that coded keys have."""
    row_bytes = shape.row_values * float_dtype(form.exact).itemsize
    widths = (key_dim or shape.head_dim, shape.head_dim)
    total = 0.0
    for layer in range(shape.num_layers):
        seen = min(num_tokens, shape.window(layer) or num_tokens)
        for coded, dim, bits in zip(split(form, num_tokens), widths, form.bits_per_value):
            exact = min(num_tokens - coded, seen)
            total += exact * row_bytes + (seen - exact) * shape.num_kv_heads * dim * bits / 8
    return math.ceil(total)


class Blocks:
    """Coded blocks of one layer in a range that grows."""

    def __init__(self, arena: Arena, capacity_bytes: int) -> None:
        self.region = arena.reserve(CODED, round_up(max(capacity_bytes, 1)))
        self.bytes = self.region.array(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        if nbytes > len(self.bytes):
            self.region.commit(nbytes)
            self.bytes = self.region.array(self.region.committed_bytes, np.uint8)

    def capacity(self) -> np.ndarray:
        """All bytes that may ever come, of which those reserved may be touched; they stay where they are."""
        return self.region.whole((self.region.capacity_bytes,), np.uint8)

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

    @property
    def end(self) -> int:
        """The row behind the last one."""
        return self.first + self.count

    def make_room(self, count: int) -> None:
        """So many rows may follow: the others go to the front where they would not fit."""
        if self.end + count > len(self.buffer):
            self.buffer[: self.count] = self.rows.copy()
            self.first = 0

    def push(self, rows: np.ndarray) -> None:
        self.make_room(len(rows))
        self.buffer[self.end : self.end + len(rows)] = rows
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

    def took(self, num_keys: int, num_values: int) -> None:
        """Another token came, and then so many exact keys and values were coded."""
        self.length += 1
        self.keys.count += 1
        self.values.count += 1
        if num_keys:
            self.keys.drop(num_keys)
            self.coded_keys += num_keys
        if num_values:
            self.values.drop(num_values)
            self.coded_values += num_values

    def restored(self, length: int, coded_keys: int, coded_values: int) -> None:
        """Takes what was read into blocks and buffers as its state."""
        self.coded_keys, self.coded_values, self.length = coded_keys, coded_values, length
        self.keys.first, self.keys.count = 0, length - coded_keys
        self.values.first, self.values.count = 0, length - coded_values
