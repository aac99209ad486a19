"""Plain cache: keys and values as they come, in float32, float16 or bfloat16, or each head's row in int8 with a scale.

Source: none; the baseline that every other policy is compared with.
Idea: one growing range per layer for keys, one for values, rows in token order; nothing is ever moved or dropped.
Units and shapes: rows [tokens, Hkv, D] of the stored type.
int8: codes to nearest of a token's key or value of one head, and behind them their scale, max |x| / 127 in float16:
8 + 16 / D bits a number. Tokens stay apart, so that it grows, forks, is cut and lies in pages as floats do. 8-bit
floats (e4m3) take as much and lose 28 times more in KL divergence (measured, demo model, 2026-11).
Differs from the paper: nothing known.
Cost: resident 2 * layers * tokens * Hkv * D * itemsize bytes, rounded up to pages; a decode step reads all of it once.
Holds when: always; with a sliding window older tokens stay resident although they are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from memwall.errors import InputError
from memwall.kernels import Program
from memwall.kernels.attention import attend_float, record_attend_next
from memwall.kernels.elementwise import int8_rows, store_int8
from memwall.kernels.parts import CachePart, float_part
from memwall.kv.base import CacheModel, CacheShape, Facts, KVCache, Reader
from memwall.kv.decoding import JOBS, Decoding, PartsDecoding
from memwall.kv.policy import Policy
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

OWNER = "kv/full"
INT8 = "int8"
NOTHING_CODED = (0,) * JOBS


def float_dtype(name: str) -> np.dtype:
    """NumPy's type of `float32`, `float16` or `bfloat16`."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if name not in ("float32", "float16"):
        raise InputError(f"unknown float type {name!r}: must be float32, float16 or bfloat16")
    return np.dtype(name)


def row_form(name: str, head_dim: int) -> tuple[np.dtype, int]:
    """NumPy's type of rows that are stored as `name` says, and how many of it a head takes."""
    return (np.dtype(np.int8), head_dim + 2) if name == INT8 else (float_dtype(name), head_dim)


def row_bytes(name: str, shape: CacheShape) -> int:
    """Bytes of one token's keys, or values, of a layer."""
    dtype, width = row_form(name, shape.head_dim)
    return shape.num_kv_heads * width * dtype.itemsize


def put_rows(into: np.ndarray, x: np.ndarray, places: np.ndarray | None = None) -> None:
    """Rows of x [n, Hkv, D] float32 go to rows `places` [n] (int64), or all, of `into`, floats or `store_int8`'s."""
    if into.dtype == np.int8:
        store_int8(np.ascontiguousarray(x, np.float32), np.arange(len(x)) if places is None else places, into)
    else:
        into[slice(None) if places is None else places] = x


class GrowingRows:
    """Rows [tokens, Hkv, D] in a reserved range that is committed as they come."""

    def __init__(
        self,
        arena: Arena,
        owner: str,
        capacity_tokens: int,
        shape: CacheShape,
        dtype: np.dtype,
        width: int | None = None,
    ) -> None:
        """width: numbers that a head takes, if not its dimension."""
        self.row_shape = (shape.num_kv_heads, width or shape.head_dim)
        self.dtype = dtype
        self.row_bytes = math.prod(self.row_shape) * dtype.itemsize
        self.region = arena.reserve(owner, capacity_tokens * self.row_bytes)
        self._whole = self._view()

    @property
    def nbytes(self) -> int:
        """Bytes committed."""
        return self.region.committed_bytes

    def reserve(self, num_tokens: int) -> None:
        """Makes room for the first `num_tokens` rows; BudgetExceeded before anything is touched."""
        if num_tokens > len(self._whole):
            self.region.commit(num_tokens * self.row_bytes)
            self._whole = self._view()

    def has(self, num_tokens: int) -> bool:
        """Whether there is room for the first `num_tokens` rows."""
        return num_tokens <= len(self._whole)

    def rows(self, begin: int, end: int) -> np.ndarray:
        """A view of rows [begin, end), which must have been reserved."""
        return self._whole[begin:end]

    def shrink(self, num_tokens: int) -> None:
        """Gives back the pages behind the first `num_tokens` rows."""
        self._whole = self._whole[:0]
        self.region.shrink(num_tokens * self.row_bytes)
        self._whole = self._view()

    def release(self) -> None:
        """Gives everything back."""
        self._whole = self._whole[:0]
        self.region.release()

    def capacity(self) -> np.ndarray:
        """A view of all rows that may ever come, of which those reserved may be touched; it stays where it is."""
        return self.region.whole((self.region.capacity_bytes // self.row_bytes, *self.row_shape), self.dtype)

    def _view(self) -> np.ndarray:
        num_tokens = min(self.region.committed_bytes, self.region.capacity_bytes) // self.row_bytes
        return self.region.array((num_tokens, *self.row_shape), self.dtype)


class FloatCache(KVCache):
    """See the module's text."""

    saves = True
    plain_rows = True
    records = True

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
        self._dtype, self._width = row_form(policy.name, shape.head_dim)
        self._keys: list[GrowingRows] = []
        self._values: list[GrowingRows] = []
        self._lengths = [0] * shape.num_layers
        self._place = np.zeros(1, np.int64)
        self._parts: list[CachePart] = []
        for _ in range(shape.num_layers):
            self._keys.append(GrowingRows(arena, OWNER, capacity_tokens, shape, self._dtype, self._width))
            self._values.append(GrowingRows(arena, OWNER, capacity_tokens, shape, self._dtype, self._width))

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held."""
        return {OWNER: 2 * shape.num_layers * round_up(num_tokens * row_bytes(policy.name, shape))}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` held."""
        row = row_bytes(policy.name, shape)
        return sum(2 * row * min(num_tokens, shape.window(layer) or num_tokens) for layer in range(shape.num_layers))

    @property
    def policy(self) -> str:
        return str(self._policy)

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (*self._keys, *self._values))

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held = self._lengths[layer]
        self._check_append(held, len(k), positions)
        end = held + len(k)
        # the first layer takes room for all: a refusal must come before any layer has changed
        for rows in (*self._keys, *self._values) if layer == 0 else (self._keys[layer], self._values[layer]):
            rows.reserve(end)
        put_rows(self._keys[layer].rows(held, end), k)
        put_rows(self._values[layer].rows(held, end), v)
        self._lengths[layer] = end

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        end = self._lengths[layer]
        return attend_float(
            q,
            self._keys[layer].rows(0, end),
            self._values[layer].rows(0, end),
            scale=self.shape.logit_scale,
            first_position=int(positions[0]),
            window=self.shape.window(layer),
            out=out,
            stats=stats,
        )

    def settle(self, layer: int) -> None:
        """Nothing: the rows are their own final form."""

    def record(
        self, program: Program, layer: int, k: np.ndarray, v: np.ndarray, q: np.ndarray, out: np.ndarray
    ) -> None:
        """See `models.base.RecordedCache`."""
        scale, window = self.shape.logit_scale, self.shape.window(layer)
        keys, values = self._keys[layer].capacity(), self._values[layer].capacity()
        record_attend_next(program, q, k, v, keys, values, self._place, scale=scale, window=window, out=out)

    def begin_recorded(self, positions: np.ndarray) -> None:
        self._check_append(self.length, 1, positions)
        self.begin_decode()

    def end_recorded(self) -> None:
        self.end_decode()

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        return PartsDecoding(caches, cast("Sequence[FloatCache]", caches))

    def parts(self) -> list[CachePart]:
        """See `decoding.PartedCache`."""
        if not self._parts:
            pairs = zip(self._keys, self._values)
            self._parts = [float_part(keys.capacity(), values.capacity()) for keys, values in pairs]
        return self._parts

    def begin_decode(self) -> tuple[int, ...]:
        """See `decoding.PartedCache`."""
        held = self.length
        self._check_room(held, 1)
        if not self._values[-1].has(held + 1):  # the last one to be reserved: where it has room, all have
            for rows in (*self._keys, *self._values):
                rows.reserve(held + 1)
        self._place[0] = held
        return (held, held, 0, 0, 0, 0, 0, held + 1, held, 0, *NOTHING_CODED)

    def end_decode(self) -> None:
        """See `decoding.PartedCache`."""
        self._lengths = [int(self._place[0]) + 1] * self.shape.num_layers

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        for layer in range(self.shape.num_layers):
            self._lengths[layer] = length
            self._keys[layer].shrink(length)
            self._values[layer].shrink(length)

    def fork(self) -> FloatCache:
        other = FloatCache(self._policy, self.shape, self.arena, self.capacity_tokens)
        try:
            for mine, theirs in zip((*self._keys, *self._values), (*other._keys, *other._values)):
                theirs.reserve(self.length)
                theirs.rows(0, self.length)[:] = mine.rows(0, self.length)
        except BaseException:
            other.release()
            raise
        other._lengths = [self.length] * self.shape.num_layers
        return other

    def dump(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        arrays = {}
        for layer, (keys, values) in enumerate(zip(self._keys, self._values)):
            arrays[f"keys.{layer}"] = keys.rows(0, self.length)
            arrays[f"values.{layer}"] = values.rows(0, self.length)
        return arrays, {"tokens": self.length}

    def layout(self, facts: Facts) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        shape = (facts["tokens"], self.shape.num_kv_heads, self._width)
        names = (f"{which}.{layer}" for layer in range(self.shape.num_layers) for which in ("keys", "values"))
        return dict.fromkeys(names, (shape, self._dtype))

    def restore(self, facts: Facts, keep: int, reader: Reader) -> None:
        self._check_restore(keep, facts["tokens"])
        try:
            for rows in (*self._keys, *self._values):
                rows.reserve(keep)
            for layer, (keys, values) in enumerate(zip(self._keys, self._values)):
                reader(f"keys.{layer}", keys.rows(0, keep))
                reader(f"values.{layer}", values.rows(0, keep))
        except BaseException:
            self.truncate(0)
            raise
        self._lengths = [keep] * self.shape.num_layers

    def rows(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self._keys[layer].rows(begin, end), self._values[layer].rows(begin, end)
        if self._dtype == np.int8:
            return int8_rows(keys), int8_rows(values)
        return keys.astype(np.float32), values.astype(np.float32)

    def release(self) -> None:
        self._parts = []
        for rows in (*self._keys, *self._values):
            rows.release()
