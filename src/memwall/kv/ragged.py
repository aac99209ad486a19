"""Rows of heads that hold different tokens: flat, head by head, with no padding; and a tail of new tokens beside them.

What was folded of a layer lies in one range of keys, one of values and one of scores, [sum of lengths, D], with offsets
by head. New tokens come into the tail, whose rows all heads share, so that adding one moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memwall.kv.base import CacheShape
from memwall.kv.float_store import GrowingRows
from memwall.memory import Arena
from memwall.memory.pages import round_up

KEPT, TAIL, STAGING, SCORES = "kv/kept", "kv/tail", "kv/staging", "kv/scores"
SCORE_BYTES = 4
KEY_BYTES = 4
"""Of a number of a key that is handed out for scoring."""


class RaggedRows:
    """One layer's kept keys and values [sum of lengths, D], head by head, and their scores, in growing ranges."""

    def __init__(
        self, arena: Arena, shape: CacheShape, capacity_rows: int, dtype: np.dtype, *, has_scores: bool
    ) -> None:
        self.dim, self.dtype = shape.head_dim, dtype
        self.offsets = np.zeros(shape.num_kv_heads + 1, np.int64)
        self._held: list[np.ndarray] | None = None
        self._rows = [arena.reserve(KEPT, capacity_rows * self.row_bytes) for _ in range(2)]
        self._scores = arena.reserve(SCORES, capacity_rows * SCORE_BYTES) if has_scores else None

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        scores = self._scores.committed_bytes if self._scores is not None else 0
        return sum(region.committed_bytes for region in self._rows) + scores

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in np.diff(self.offsets)]

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    def rows(self, num_rows: int) -> list[np.ndarray]:
        """Keys and values, the first so many rows."""
        return [region.array((num_rows, self.dim), self.dtype) for region in self._rows]

    @property
    def held(self) -> list[np.ndarray]:
        """Keys and values, all rows; found once as long as these stay."""
        if self._held is None:
            self._held = self.rows(self.num_rows)
        return self._held

    def scores(self, num_rows: int) -> np.ndarray:
        """Scores of the first so many rows."""
        assert self._scores is not None
        return self._scores.array(num_rows, np.float32)

    def reserve(self, num_rows: int) -> None:
        """Room for so many rows; BudgetExceeded before anything is touched."""
        for region in self._rows:
            region.commit(num_rows * self.row_bytes)
        if self._scores is not None:
            self._scores.commit(num_rows * SCORE_BYTES)

    def shrink(self) -> None:
        """Gives back the pages behind the last row."""
        self._held = None
        for region in self._rows:
            region.shrink(self.num_rows * self.row_bytes)
        if self._scores is not None:
            self._scores.shrink(self.num_rows * SCORE_BYTES)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """The rows now belong to heads of these lengths; pages behind them go back."""
        np.cumsum(lengths, out=self.offsets[1:])
        self.shrink()

    def copy_from(self, other: RaggedRows) -> None:
        num_rows = other.num_rows
        self.reserve(num_rows)
        for mine, theirs in zip(self.rows(num_rows), other.rows(num_rows)):
            mine[:] = theirs
        if self._scores is not None:
            self.scores(num_rows)[:] = other.scores(num_rows)
        self.set_lengths(other.lengths)

    def release(self) -> None:
        self._held = None
        for region in (*self._rows, self._scores):
            if region is not None:
                region.release()


class LayerUnits:
    """One layer: what was folded, and the tail. `folded + num_tail` tokens were taken in."""

    def __init__(self, arena: Arena, shape: CacheShape, capacity: int, dtype: np.dtype, *, has_scores: bool) -> None:
        self.past = RaggedRows(arena, shape, capacity * shape.num_kv_heads, dtype, has_scores=has_scores)
        self.keys, self.values = (GrowingRows(arena, TAIL, capacity, shape, dtype) for _ in range(2))
        self._scores = arena.reserve(SCORES, capacity * shape.num_kv_heads * SCORE_BYTES) if has_scores else None
        self.heads = shape.num_kv_heads
        self.folded = self.num_tail = 0
        self.has_dropped = False
        self.fresh: tuple[np.ndarray, np.ndarray] | None = None
        """The decoder's own keys and values of a block that is folded at once: never copied."""

    @property
    def length(self) -> int:
        return self.folded + self.num_tail

    @property
    def nbytes(self) -> int:
        scores = self._scores.committed_bytes if self._scores is not None else 0
        return self.past.nbytes + self.keys.nbytes + self.values.nbytes + scores

    def tail(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [n, Hkv, D] of the tail."""
        return self.fresh or (self.keys.rows(0, self.num_tail), self.values.rows(0, self.num_tail))

    def tail_scores(self, begin: int, end: int) -> np.ndarray:
        assert self._scores is not None
        return self._scores.array((end, self.heads), np.float32)[begin:]

    def reserve_tail(self, num_tokens: int, *, rows: bool) -> None:
        if rows:
            self.keys.reserve(num_tokens)
            self.values.reserve(num_tokens)
        if self._scores is not None:
            self._scores.commit(num_tokens * self.heads * SCORE_BYTES)

    def set_tail(self, num_tokens: int) -> None:
        """Keeps the first tokens of the tail; pages behind them go back."""
        self.fresh, self.num_tail = None, num_tokens
        self.keys.shrink(num_tokens)
        self.values.shrink(num_tokens)
        if self._scores is not None:
            self._scores.shrink(num_tokens * self.heads * SCORE_BYTES)

    def copy_from(self, other: LayerUnits) -> None:
        self.past.copy_from(other.past)
        self.reserve_tail(other.num_tail, rows=True)
        for mine, theirs in zip((self.keys, self.values), (other.keys, other.values)):
            mine.rows(0, other.num_tail)[:] = theirs.rows(0, other.num_tail)
        if self._scores is not None:
            self.tail_scores(0, other.num_tail)[:] = other.tail_scores(0, other.num_tail)
        self.folded, self.num_tail, self.has_dropped = other.folded, other.num_tail, other.has_dropped

    def release(self) -> None:
        self.past.release()
        self.keys.release()
        self.values.release()
        if self._scores is not None:
            self._scores.release()


def block_bytes(
    shape: CacheShape, dtype: np.dtype, kept: int, tail: int, *, staged: bool, has_scores: bool, scored: int = 0
) -> dict[str, int]:
    """Bytes per owner of layers that hold `kept` folded units per head, and `tail` tokens.

    scored: units of a head whose keys are handed out in float32, where scores are made anew.
    """
    row_bytes, layers = shape.head_dim * dtype.itemsize, shape.num_layers
    kept_rows, tail_rows = kept * shape.num_kv_heads, tail * shape.num_kv_heads
    return {
        KEPT: 2 * layers * round_up(kept_rows * row_bytes),
        TAIL: 2 * layers * round_up(tail_rows * row_bytes),
        SCORES: layers * (round_up(kept_rows * SCORE_BYTES) + round_up(tail_rows * SCORE_BYTES)) if has_scores else 0,
        STAGING: round_up(max(kept_rows * row_bytes, scored * shape.head_dim * KEY_BYTES)) if staged else 0,
    }
