"""Cache of floats: keys and values as they come, in float32, float16, bfloat16 or e4m3.

Source: none; the baseline that every other policy is compared with.
Idea: one growing range per layer for keys, one for values, rows in token order; nothing is ever moved or dropped.
Units and shapes: rows [tokens, Hkv, D] of the stored type.
e4m3: 8-bit floats with 3 bits of fraction and no scale, whose relative error is at most 1/16; their smallest step is
2^-9, their largest number 448, and what lies beyond is kept there. Keys of outlying channels stay far below that.
Differs from the paper: nothing known.
Cost: resident 2 * layers * tokens * Hkv * D * itemsize bytes, rounded up to pages; a decode step reads all of it once.
Holds when: always; with a sliding window older tokens stay resident although they are not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kernels.attention import attend_float
from memwall.kernels.elementwise import store_float8
from memwall.kv.base import CacheModel, CacheShape, Facts, KVCache, Reader
from memwall.kv.policy import Policy
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

OWNER = "kv/full"
E4M3 = "e4m3"


def float_dtype(name: str) -> np.dtype:
    """NumPy's type of `float32`, `float16`, `bfloat16` or `e4m3`."""
    if name in ("bfloat16", E4M3):
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else ml_dtypes.float8_e4m3fn)
    if name not in ("float32", "float16"):
        raise InputError(f"unknown float type {name!r}: must be float32, float16, bfloat16 or {E4M3}")
    return np.dtype(name)


def put_rows(into: np.ndarray, places: np.ndarray, x: np.ndarray) -> None:
    """Rows of x [n, Hkv, D] float32 go to rows `places` [n] (int64) of `into` [N, Hkv, D]."""
    if into.dtype.itemsize == 1:
        store_float8(np.ascontiguousarray(x, np.float32), places, into)
    else:
        into[places] = x


class GrowingRows:
    """Rows [tokens, Hkv, D] in a reserved range that is committed as they come."""

    def __init__(self, arena: Arena, owner: str, capacity_tokens: int, shape: CacheShape, dtype: np.dtype) -> None:
        self.row_shape = (shape.num_kv_heads, shape.head_dim)
        self.dtype = dtype
        self.row_bytes = shape.row_values * dtype.itemsize
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

    def _view(self) -> np.ndarray:
        num_tokens = min(self.region.committed_bytes, self.region.capacity_bytes) // self.row_bytes
        return self.region.array((num_tokens, *self.row_shape), self.dtype)


class FloatCache(KVCache):
    """See the module's text."""

    saves = True
    plain_rows = True

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
        self._dtype = dtype = float_dtype(policy.name)
        self._keys: list[GrowingRows] = []
        self._values: list[GrowingRows] = []
        self._lengths = [0] * shape.num_layers
        for _ in range(shape.num_layers):
            self._keys.append(GrowingRows(arena, OWNER, capacity_tokens, shape, dtype))
            self._values.append(GrowingRows(arena, OWNER, capacity_tokens, shape, dtype))

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held."""
        row_bytes = shape.row_values * float_dtype(policy.name).itemsize
        return {OWNER: 2 * shape.num_layers * round_up(num_tokens * row_bytes)}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` held."""
        row_bytes = shape.row_values * float_dtype(policy.name).itemsize
        return sum(
            2 * row_bytes * min(num_tokens, shape.window(layer) or num_tokens) for layer in range(shape.num_layers)
        )

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
        for rows, x in ((self._keys[layer], k), (self._values[layer], v)):
            if self._dtype.itemsize == 1:
                put_rows(rows.rows(held, end), np.arange(len(x)), x)
            else:
                rows.rows(held, end)[:] = x
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
        shape = (facts["tokens"], self.shape.num_kv_heads, self.shape.head_dim)
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
        return keys.astype(np.float32), values.astype(np.float32)

    def release(self) -> None:
        for rows in (*self._keys, *self._values):
            rows.release()
