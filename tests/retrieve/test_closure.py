"""Replicas against both inequalities and a slow walk, and lists that are cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.retrieve.closure import ClosureSettings, assign, gather, nearest_heads
from memwall.retrieve.head_tree import HeadSettings, graph_over
from tests.retrieve.test_head_tree import drawn, squared


def near(x: np.ndarray, heads: np.ndarray, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    distances = squared(x, heads)
    order = distances.argsort(axis=1, kind="stable")[:, :candidates]
    return order.astype(np.int32), np.take_along_axis(distances, order, axis=1).astype(np.float32)


def slow(
    row: np.ndarray, apart: np.ndarray, between: np.ndarray, closure: float, rng: float, replicas: int
) -> list[int]:
    taken: list[int] = []
    for head, distance in zip(row.tolist(), apart.tolist(), strict=True):
        if len(taken) == replicas:
            break
        if taken and not math.isinf(closure) and distance > closure * apart[0]:
            break
        if all(rng * between[head, one] >= distance for one in taken):
            taken.append(head)
    return taken


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 40), st.sampled_from([1.0, 1.3, 2.0, 11.0, math.inf]),
    st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 8), st.integers(0, 50),
)  # fmt: skip
def test_replicas_keep_both_rules(
    count: int, num_heads: int, closure: float, rng: float, replicas: int, seed: int
) -> None:
    x = np.round(drawn(count + num_heads, 6, seed) * 8)  # whole numbers: no rounding of distances on the way
    x, heads = x[:count], x[count:]
    candidates = min(16, num_heads)
    replicas = min(replicas, candidates)
    found, apart = near(x, heads, candidates)
    taken, distances = assign(
        heads, found, apart, ClosureSettings(candidates=candidates, replicas=replicas, closure=closure, rng_factor=rng)
    )
    between, own = squared(heads, heads), squared(x, heads)
    for at, row in enumerate(taken):
        real = row[row >= 0].tolist()
        assert real == slow(found[at], apart[at], between, closure, rng, replicas)
        assert real[0] == found[at, 0]
        for place, head in enumerate(real):
            assert own[at, head] == distances[at, place]
            assert place == 0 or math.isinf(closure) or own[at, head] <= closure * own[at, real[0]]
            assert all(rng * between[head, one] >= own[at, head] for one in real[:place])
        assert (row[len(real) :] == -1).all()


def test_a_case_by_hand() -> None:
    """x at 0, heads at 1, 1.5 and -2 on a line: the second lies behind the first, the third on the other side."""
    heads, x = np.array([[1], [1.5], [-2]], np.float32), np.zeros((1, 1), np.float32)
    found, apart = near(x, heads, 3)
    assert apart.tolist() == [[1, 2.25, 4]]

    def taken(**settings: float) -> list[int]:
        rows, _ = assign(heads, found, apart, ClosureSettings(candidates=3, replicas=3, **settings))
        return rows[rows >= 0].tolist()

    assert taken(closure=math.inf) == [0, 2]  # d(1.5, 1) = 0.25 < 2.25; d(-2, 1) = 9 >= 4
    assert taken(closure=3.9) == [0]  # squared distances: 4 > 3.9 * 1; of plain ones, 2 <= 3.9
    assert taken(closure=4) == [0, 2]
    assert taken(closure=math.inf, rng_factor=9) == [0, 1, 2]


def test_nearest_alone_meets_its_mean() -> None:
    x = drawn(1000)
    heads = x[:100]
    found, apart = near(x, heads, 16)
    for mean in (1, 2.5, 3, 4.25):
        taken, _ = assign(heads, found, apart, ClosureSettings(candidates=16, nearest=mean))
        assert (taken >= 0).sum() == pytest.approx(1000 * mean, abs=1)
        assert (taken[:, 0] == found[:, 0]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 6)), st.integers(0, 20))
def test_lists_are_sorted_and_cut(count: int, num_lists: int, longest: int | None, seed: int) -> None:
    draw = np.random.default_rng(seed)
    ids = np.sort(draw.choice(1000, count, replace=False)).astype(np.int32)
    taken = np.stack([draw.permutation(np.r_[np.arange(num_lists), -1])[: min(3, num_lists)] for _ in ids]).astype(
        np.int32
    )
    apart = np.where(taken >= 0, draw.random(taken.shape), np.inf).astype(np.float32)
    lists = gather(ids, taken, apart, num_lists, longest)
    held = set()
    for at in range(num_lists):
        rows, places = np.nonzero(taken == at)
        whole = sorted(zip(apart[rows, places].tolist(), ids[rows].tolist(), strict=True))
        assert lists[at].tolist() == [one for _, one in whole][:longest]
        held |= set(lists[at].tolist())
    assert lists.cut == (taken >= 0).sum() - len(lists.members)
    assert lists.orphans == count - len(held)
    assert lists.lengths.sum() == len(lists.members)


def test_near_heads_by_the_graph() -> None:
    x = drawn(900, 10)
    graph = graph_over(x[:120], HeadSettings(), 16)
    ids = np.arange(120, 900, dtype=np.int32)
    found, apart = nearest_heads(x, ids, graph, 8, 120)
    exact = squared(x[ids], x[:120])
    np.testing.assert_allclose(apart, np.take_along_axis(exact, found.astype(np.int64), axis=1), rtol=1e-4)
    assert (found[:, 0] == exact.argmin(axis=1)).mean() > 0.97


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"replicas": 0}, "at least 1"),
        ({"replicas": 9, "candidates": 8}, "of 8 candidates"),
        ({"closure": 0.9}, "closure"),
        ({"rng_factor": 0}, "rng_factor"),
        ({"rng_factor": math.nan}, "rng_factor"),
        ({"nearest": 65}, "nearest"),
    ],
)
def test_bad_settings(wrong: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ClosureSettings(**wrong)
