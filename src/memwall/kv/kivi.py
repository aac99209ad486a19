"""KIVI: the past in 2 to 8 bits a number, keys grouped per channel, values per token, the newest tokens exact.

Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache; Liu et al., 2024 (ICML), arXiv 2402.02750;
official code github.com/jy-yuan/KIVI.
Idea: keys have a few channels of large, stable magnitude, so a group of keys runs along tokens inside one channel and
an outlier channel spoils nothing but itself; attention sums few values, so an error in a value must stay in its own
token, and its groups run along channels. Groups of keys need many tokens: until R have come they wait, exact, and are
coded together.
Units and shapes: rows [tokens, Hkv, D]; G numbers share a float16 scale and minimum; lengths and R in tokens.
Differs from the paper: words hold other neighbours than in the official code, so that vectors load them whole; codes
are computed from the rounded scale and minimum; a constant group is coded as zeros of scale zero; 3 bits are offered;
R = 0 keeps keys exact until a group is full, the least that grouping along tokens allows. After `truncate` inside a
coded group its remaining keys go back to the exact part as they were decoded, and are coded anew with those to come.
Cost: resident 2 * layers * tokens * Hkv * D * (b + 32 / G) / 8 bytes plus the exact part, R to 2 R tokens; a prompt
stages one layer's exact keys and values besides. A decode step reads all of it once, and multiplies with the codes.
Holds when: G divides D, R is a multiple of G, and numbers stay below 65,504.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kernels import attention
from memwall.kv.base import CacheModel, CacheShape, KVCache
from memwall.kv.float_store import GrowingRows, float_dtype
from memwall.kv.policy import Policy
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

CODED, RECENT, STAGING = "kv/coded", "kv/recent", "kv/staging"
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


class _Blocks:
    """Coded blocks of one layer in a range that grows."""

    def __init__(self, arena: Arena, capacity_bytes: int) -> None:
        self.region = arena.reserve(CODED, round_up(max(capacity_bytes, 1)))
        self.bytes = self.region.array(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        if nbytes > len(self.bytes):
            self.region.commit(nbytes)
            self.bytes = self.region.array(self.region.committed_bytes, np.uint8)

    def copy_from(self, other: _Blocks) -> None:
        self.reserve(len(other.bytes))
        self.bytes[:] = other.bytes

    def shrink(self, nbytes: int) -> None:
        self.bytes = self.bytes[:0]
        self.region.shrink(nbytes)
        self.bytes = self.region.array(self.region.committed_bytes, np.uint8)


class _Recent:
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


class _Layer:
    """One layer's state; `coded_keys + keys.count == coded_values + values.count == length` between steps."""

    def __init__(self, arena: Arena, key_bytes: int, value_bytes: int, keys: np.ndarray, values: np.ndarray) -> None:
        self.key_blocks = _Blocks(arena, key_bytes)
        self.value_blocks = _Blocks(arena, value_bytes)
        self.keys = _Recent(keys)
        self.values = _Recent(values)
        self.coded_keys = self.coded_values = 0
        self.length = 0

    def copy_from(self, other: _Layer) -> None:
        self.key_blocks.copy_from(other.key_blocks)
        self.value_blocks.copy_from(other.value_blocks)
        self.keys.set(other.keys.rows)
        self.values.set(other.values.rows)
        self.coded_keys, self.coded_values, self.length = other.coded_keys, other.coded_values, other.length


class KiviCache(KVCache):
    """See the module's text."""

    codes_prompt = True

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self._policy = policy
        self.settings = settings = KiviSettings.from_policy(policy, shape.head_dim)
        self.key_dim = shape.head_dim  # channels of coded keys
        dtype = float_dtype(settings.exact)
        key_rows, value_rows = settings.recent_rows(capacity_tokens)
        row_shape = (shape.num_kv_heads, shape.head_dim)
        self._recent = arena.allocate(RECENT, (shape.num_layers, key_rows + value_rows, *row_shape), dtype)
        most = round_up(capacity_tokens, settings.group)
        sizes = settings.key_bytes(shape, most), settings.value_bytes(shape, most)
        self._layers = [_Layer(arena, *sizes, rows[:key_rows], rows[key_rows:]) for rows in self._recent]
        self._staged_keys = GrowingRows(arena, STAGING, capacity_tokens, shape, dtype)
        self._staged_values = GrowingRows(arena, STAGING, capacity_tokens, shape, dtype)
        self._staged: tuple[int, np.ndarray, np.ndarray] | None = None

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held, and of the staging of `prefill_tokens` at once."""
        return predict_kivi(policy, shape, (num_tokens, prefill_tokens, capacity_tokens))

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` held."""
        return read_bytes_kivi(policy, shape, num_tokens)

    @property
    def policy(self) -> str:
        s = self.settings
        exact = "" if s.exact == "float16" else f",exact={s.exact}"
        return f"kivi(bits={s.bits},group={s.group},residual={s.residual}{exact})"

    @property
    def length(self) -> int:
        return min(layer.length for layer in self._layers)

    @property
    def nbytes(self) -> int:
        recent = self._recent.nbytes
        recent = round_up(recent, ALIGNMENT_BYTES) if recent < SMALL_BYTES else round_up(recent)
        coded = sum(b.region.committed_bytes for layer in self._layers for b in (layer.key_blocks, layer.value_blocks))
        return recent + coded + self._staged_keys.nbytes + self._staged_values.nbytes

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        state = self._layers[layer]
        self._check_append(state.length, len(k), positions)
        # the first layer takes room for all: a refusal must come before any layer has changed
        for each in self._layers if layer == 0 else [state]:
            self._reserve(each, len(k))
        if len(k) == 1:
            state.keys.push(k)
            state.values.push(v)
        else:
            keys = self._staged_keys.rows(0, state.keys.count + len(k))
            values = self._staged_values.rows(0, state.values.count + len(k))
            for rows, recent, new in ((keys, state.keys, k), (values, state.values, v)):
                rows[: recent.count] = recent.rows
                rows[recent.count :] = new
            self._staged = (layer, keys, values)
        state.length += len(k)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        state = self._layers[layer]
        keys, values = self._exact(layer)
        return attention.attend_kivi(
            q,
            state.key_blocks.bytes,
            state.value_blocks.bytes,
            keys,
            values,
            coded_keys=state.coded_keys,
            coded_values=state.coded_values,
            bits=self.settings.bits,
            group=self.settings.group,
            scale=self.shape.logit_scale,
            first_position=int(positions[0]),
            window=self.shape.window(layer),
            out=out,
            stats=stats,
        )

    def settle(self, layer: int) -> None:
        state, settings = self._layers[layer], self.settings
        keys, values = self._exact(layer)
        num_keys = len(keys) - len(keys) % settings.cycle
        num_values = max(len(values) - settings.residual, 0)
        if num_keys:
            start = settings.key_bytes(self.shape, state.coded_keys, self.key_dim)
            self._encode_keys(layer, keys[:num_keys], state.key_blocks.bytes[start:])
            state.coded_keys += num_keys
        if num_values:
            form = {"bits": settings.bits, "group": settings.group}
            attention.kivi_encode_values(values[:num_values], state.coded_values, state.value_blocks.bytes, **form)
            state.coded_values += num_values
        if self._staged is not None and self._staged[0] == layer:
            state.keys.set(keys[num_keys:])
            state.values.set(values[num_values:])
            self._unstage(release=layer == self.shape.num_layers - 1)
        else:
            state.keys.drop(num_keys)
            state.values.drop(num_values)

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        self._unstage(release=True)
        settings = self.settings
        for layer, state in enumerate(self._layers):
            if length < state.coded_keys:
                whole = length // settings.group * settings.group
                rest = np.empty((length - whole, *self._recent.shape[2:]), np.float32)
                self._decode_keys(layer, whole, rest)
                state.coded_keys = whole
                state.keys.set(rest)
            state.keys.count = length - state.coded_keys
            state.coded_values = min(state.coded_values, length)
            state.values.count = length - state.coded_values
            state.length = length
            state.key_blocks.shrink(settings.key_bytes(self.shape, state.coded_keys, self.key_dim))
            state.value_blocks.shrink(settings.value_bytes(self.shape, state.coded_values))

    def fork(self) -> KiviCache:
        other = self._empty()
        try:
            for mine, theirs in zip(self._layers, other._layers):
                theirs.copy_from(mine)
        except BaseException:
            other.release()
            raise
        return other

    def release(self) -> None:
        self._unstage(release=False)
        for layer in self._layers:
            layer.key_blocks.region.release()
            layer.value_blocks.region.release()
        self._layers = []
        self._staged_keys.release()
        self._staged_values.release()
        self.arena.free(self._recent)

    def _reserve(self, state: _Layer, num_new: int) -> None:
        """Room for new tokens' staging and for what settling will code."""
        num_keys, num_values = state.keys.count + num_new, state.values.count + num_new
        if num_new > 1:
            self._staged_keys.reserve(num_keys)
            self._staged_values.reserve(num_values)
        key_tokens = state.coded_keys + num_keys - num_keys % self.settings.cycle
        value_tokens = state.coded_values + max(num_values - self.settings.residual, 0)
        state.key_blocks.reserve(self.settings.key_bytes(self.shape, key_tokens, self.key_dim))
        state.value_blocks.reserve(self.settings.value_bytes(self.shape, value_tokens))

    def _empty(self) -> KiviCache:
        return KiviCache(self._policy, self.shape, self.arena, self.capacity_tokens)

    def _encode_keys(self, layer: int, keys: np.ndarray, blocks: np.ndarray) -> None:
        attention.kivi_encode_keys(keys, blocks, bits=self.settings.bits, group=self.settings.group)

    def _decode_keys(self, layer: int, first: int, out: np.ndarray) -> None:
        blocks = self._layers[layer].key_blocks.bytes
        attention.kivi_decode_keys(blocks, first, out, bits=self.settings.bits, group=self.settings.group)

    def _exact(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact keys and values of the layer: the staged ones of a prompt, else the recent ones."""
        if self._staged is not None and self._staged[0] == layer:
            return self._staged[1:]
        return self._layers[layer].keys.rows, self._layers[layer].values.rows

    def _unstage(self, *, release: bool) -> None:
        self._staged = None
        if release:
            self._staged_keys.shrink(0)
            self._staged_values.shrink(0)
