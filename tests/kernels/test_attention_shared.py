"""Attention over a shared prefix and what each sequence has of its own: against attention over both in a line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memwall import kernels
from memwall.kernels.attention import attend_float, attend_shared, predict_attention_scratch_bytes

PAGE = 16


class Pool:
    """Pages of random keys and values, handed out in any order."""

    def __init__(self, seed: int, heads: int, dim: int, dtype: Any = np.float32, pages: int = 400) -> None:
        self.draw = np.random.default_rng(seed)
        self.k, self.v = (self.draw.standard_normal((pages * PAGE, heads, dim)).astype(dtype) for _ in range(2))
        self.free = self.draw.permutation(pages).tolist()
        self.tables: list[int] = []

    def hold(self, length: int) -> tuple[int, np.ndarray]:
        """A place in `tables`, and the rows of its tokens."""
        pages = [self.free.pop() for _ in range(-(-length // PAGE))]
        place = len(self.tables)
        self.tables += pages
        return place, np.array([pages[t // PAGE] * PAGE + t % PAGE for t in range(length)])


class Case:
    """Queries of groups over pages, and what attention over prefix and own keys in a line gives.

    groups: a prefix's length (0 for none) and, for each member, its own tokens and how many of these are queries.
    """

    def __init__(
        self, seed: int, groups: list[tuple[int, list[tuple[int, int]]]], *, heads: int = 6, kv_heads: int = 2,
        dim: int = 24, window: int | None = None, dtype: Any = np.float32,
    ) -> None:  # fmt: skip
        self.pool, self.window = Pool(seed, kv_heads, dim, dtype), window
        own, prefixes, wanted, row = [], [], [], 0
        rows = sum(count for _, members in groups for _, count in members)
        self.q = self.pool.draw.standard_normal((rows, heads, dim)).astype(np.float32)
        for length, members in groups:
            place, before = self.pool.hold(length)
            first = row
            for mine, count in members:
                at, after = self.pool.hold(mine)
                own.append((row, count, at, mine, mine - count))
                line, out = np.concatenate([before, after]).astype(int), np.empty((count, heads, dim), np.float32)
                attend_float(
                    self.q[row : row + count], self.pool.k[line], self.pool.v[line], scale=0.3,
                    first_position=length + mine - count, window=window, out=out,
                )  # fmt: skip
                wanted.append(out)
                if length and window is not None:
                    prefixes.append((row, count, place, length, length + mine - count))
                row += count
            if length and window is None:
                prefixes.append((first, row - first, place, length, length))
        self.tables, self.own = np.array(self.pool.tables, np.int32), np.array(own, np.int64)
        self.prefixes, self.wanted = np.array(prefixes, np.int64).reshape(-1, 5), np.concatenate(wanted)


def case(*args: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel gives, and what it should."""
    one = Case(*args, **options)
    out = np.empty_like(one.q)
    attend_shared(
        one.q, one.pool.k, one.pool.v, one.tables, one.own, one.prefixes, page_tokens=PAGE, scale=0.3,
        window=one.window, out=out,
    )  # fmt: skip
    return out, one.wanted


GROUPS = [
    [(100, [(1, 1), (17, 1), (40, 40), (5, 3)])],
    [(37, [(1, 1)] * 20), (300, [(30, 9)]), (0, [(50, 50), (3, 1)]), (1, [(1, 1)])],
    [(512, [(9, 1)])],
    [(0, [(20, 1)])],
    [(200, [(60, 1), (1, 1), (130, 100)])],
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("groups", GROUPS)
def test_prefix_and_own_joined_are_attention_over_both(groups: Any, threads: int) -> None:
    before = kernels.num_threads()
    kernels.set_num_threads(threads)
    try:
        for heads, kv_heads, dim in ((6, 2, 24), (4, 4, 16), (8, 1, 33)):
            out, wanted = case(1, groups, heads=heads, kv_heads=kv_heads, dim=dim)
            assert np.abs(out - wanted).max() < 1e-5
    finally:
        kernels.set_num_threads(before)


@pytest.mark.parametrize("groups", GROUPS[:3])
def test_a_window_that_ends_in_the_prefix(groups: Any) -> None:
    for window in (1, 8, 60, 1000):
        out, wanted = case(2, groups, window=window)
        assert np.abs(out - wanted).max() < 1e-5


def test_half_precision_rows() -> None:
    out, wanted = case(3, GROUPS[1], dtype=np.float16)
    assert np.abs(out - wanted).max() < 1e-5


def test_a_row_does_not_depend_on_how_large_its_group_is() -> None:
    many, _ = case(4, [(90, [(9, 9), *[(7, 1)] * 10])])
    few, _ = case(4, [(90, [(9, 9)])])
    assert np.abs(many[:9] - few).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": [(0, 1, 0, 3, 2)]}, "every row needs a piece"),
        ({"own": [(0, 2, 0, 3, 1), (1, 1, 0, 3, 2)]}, "follow each other"),
        ({"own": [(0, 2, 0, 40, 38)]}, "too short for its length"),
        ({"own": [(0, 2, 0, 0, 0)]}, "too short for its length"),
        ({"prefixes": [(1, 2, 1, 3, 3)]}, "follow each other"),
        ({"prefixes": [(0, 2, 2, 3, 3)]}, "too short for its length"),
        ({"tables": [0, 9]}, "names a page that is not there"),
        ({"page_tokens": 12}, "power of two"),
    ],
)
def test_pieces_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"own": [(0, 2, 0, 3, 1)], "prefixes": [(0, 2, 1, 3, 3)], "tables": [0, 1], **change}
    q, rows = np.zeros((2, 2, 16), np.float32), np.zeros((64, 1, 16), np.float32)
    arrays = [np.array(values["tables"], np.int32), *(np.array(values[n], np.int64) for n in ("own", "prefixes"))]
    page_tokens = values.get("page_tokens", 16)
    with pytest.raises(ValueError, match=message):
        attend_shared(q, rows, rows, *arrays, page_tokens=page_tokens, scale=1.0, out=np.empty_like(q))


def test_scratch_grows_with_the_rows_that_share() -> None:
    alone = predict_attention_scratch_bytes(8, 4, 32, 128, threads=2)
    shared = predict_attention_scratch_bytes(8, 4, 32, 128, threads=2, shared_rows=1024)
    assert shared >= alone + 1024 * 8 * 36 * 4 - 65536
