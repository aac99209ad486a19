"""KIVI's settings, its bytes, and what it holds of one layer: coded blocks that grow, and the newest rows, exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kernels import attention
from memwall.kv.base import CacheShape
from memwall.kv.float_store import float_dtype
from memwall.kv.policy import Policy
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

CODED = "kv/coded"
RECENT, STAGING = "kv/recent", "kv/staging"
BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128)
SLACK_TOKENS = 16
"""Rows beyond the window of values: they slide by moving an index, and go back to the front once in so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KiviSettings:
    """bits per code; numbers per group; tokens of the residual R; type of the exact tokens."""

    bits: int = 2
    group: int = 32
    residual: int = 128
    exact: str = "float16"

    @classmethod
    def from_policy(cls, policy: Policy, head_dim: int) -> KiviSettings:
        """Settings of a policy string, checked against the model's head dimension."""
        texts = dict(policy.settings)
        exact = texts.pop("exact", "float16")
        fitting = [group for group in GROUPS if head_dim % group == 0]
        if not fitting:
            raise InputError(f"kivi needs a head dimension that 16 divides, not {head_dim}; use float16")
        default = 32 if 32 in fitting else max(fitting)
        numbers = Policy(policy.name, texts).integers({"bits": 2, "group": default, "residual": 128})
        settings = cls(**numbers, exact=exact)
        float_dtype(exact)
        if settings.bits not in BITS:
            raise InputError(f"policy {policy}: {settings.bits} bits; must be one of {', '.join(map(str, BITS))}")
        if settings.group not in fitting:
            raise InputError(
                f"policy {policy}: group {settings.group} does not work for a head dimension of {head_dim}; "
                f"must be one of {', '.join(map(str, fitting))}"
            )
        if settings.residual % settings.group:
            near = round_up(settings.residual, settings.group)
            raise InputError(
                f"policy {policy}: residual {settings.residual} is not a multiple of the group {settings.group}; "
                f"try {near}"
            )
        return settings

    @property
    def cycle(self) -> int:
        """Keys that are coded together: R, or one group when R is 0."""
        return max(self.residual, self.group)

    def key_bytes(self, shape: CacheShape, tokens: int, key_dim: int | None = None) -> int:
        """Bytes of the coded keys of one layer (`tokens` whole groups), of fewer channels where `key_dim` says so."""
        block = attention.kivi_block_bytes(self.bits, self.group, shape.head_dim, key_dim)[0]
        return tokens // self.group * shape.num_kv_heads * block

    def value_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Bytes of the coded values of one layer: whole blocks."""
        block = attention.kivi_block_bytes(self.bits, self.group, shape.head_dim)[1]
        return -(-tokens // attention.VALUE_BLOCK_TOKENS) * shape.num_kv_heads * block

    def recent_rows(self, capacity_tokens: int) -> tuple[int, int]:
        """Rows kept for exact keys and for exact values of one layer."""
        return min(self.cycle, capacity_tokens), min(self.residual + SLACK_TOKENS, capacity_tokens)

    def split(self, length: int) -> tuple[int, int]:
        """Coded keys and coded values among `length` tokens."""
        return length - length % self.cycle, max(length - self.residual, 0)


def predict_kivi(
    policy: Policy, shape: CacheShape, sizes: tuple[int, int, int], key_dim: int | None = None
) -> dict[str, int]:
    """As `KiviCache.predict`; sizes: tokens held, tokens at once, capacity; key_dim: channels that coded keys have."""
    num_tokens, prefill_tokens, capacity_tokens = sizes
    settings = KiviSettings.from_policy(policy, shape.head_dim)
    row_bytes = shape.row_values * float_dtype(settings.exact).itemsize
    coded_keys, coded_values = settings.split(num_tokens)
    keys, values = settings.key_bytes(shape, coded_keys, key_dim), settings.value_bytes(shape, coded_values)
    recent = shape.num_layers * sum(settings.recent_rows(capacity_tokens)) * row_bytes
    return {
        CODED: shape.num_layers * (round_up(keys) + round_up(values)),
        RECENT: round_up(recent, ALIGNMENT_BYTES) if recent < SMALL_BYTES else round_up(recent),
        STAGING: 2 * round_up(prefill_tokens * row_bytes) if prefill_tokens > 1 else 0,
    }


def read_bytes_kivi(policy: Policy, shape: CacheShape, num_tokens: int, key_dim: int | None = None) -> int:
    """As `KiviCache.read_bytes`; key_dim: channels that coded keys have."""
    settings = KiviSettings.from_policy(policy, shape.head_dim)
    row_bytes = shape.row_values * float_dtype(settings.exact).itemsize
    channel_bytes = shape.num_kv_heads * (settings.bits + 32 / settings.group) / 8
    total = 0.0
    for layer in range(shape.num_layers):
        seen = min(num_tokens, shape.window(layer) or num_tokens)
        for coded, dim in zip(settings.split(num_tokens), (key_dim or shape.head_dim, shape.head_dim)):
            exact = min(num_tokens - coded, seen)
            total += exact * row_bytes + (seen - exact) * channel_bytes * dim
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
