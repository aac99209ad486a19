"""Rules for reading lists: ranks by hand, and the settings that meet a recall against trying all of them."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.retrieve.closure import Lists
from memwall.studies.list_reads import Ranked, at_pages, by_count, by_ratio, gain, ranked, replicas

LISTS = Lists(members=np.array([3, 4, 3, 5, 6], np.int32), ends=np.array([2, 4, 5]))
"""Of heads 0, 1 and 2: [3, 4], [3, 5], [6]."""


def test_ranks_by_hand() -> None:
    assert replicas(LISTS, 8).tolist() == [[-1, -1]] * 3 + [[0, 1], [0, -1], [1, -1], [2, -1], [-1, -1]]
    one = ranked(
        np.array([[1, 5, 6], [3, 0, 7]]), np.array([[1, 0], [2, 0]]), np.array([[1.0, 2.0], [1.0, 3.0]]),
        np.array([0, 1, 2]), LISTS, np.array([2, 3, 4]), 8,
    )  # fmt: skip
    assert one.rank.tolist() == [[0, 1, 3], [2, 0, 3]]  # a head; the first list; none that is looked at
    assert one.pages.tolist() == [[0, 3, 5], [0, 4, 6]]
    pages, recall = one.read(np.array([1, 2]))
    assert pages.tolist() == [3, 6]
    assert recall.tolist() == pytest.approx([2 / 3, 2 / 3])


def drawn_ranks(seed: int = 0) -> Ranked:
    draw = np.random.default_rng(seed)
    apart = np.sort(draw.random((200, 40)) + 0.05, axis=1).astype(np.float32)
    return Ranked.of(apart, draw.integers(0, 4, (200, 40)), draw.integers(0, 30, (200, 10)))


def test_a_fixed_number_is_the_least_that_does() -> None:
    one = drawn_ranks()
    point = by_count(one, 0.8)
    assert 0.8 <= point.recall.mean() < 0.8 + 2 / 200
    assert (one.rank <= point.most - 1).mean() < 0.8
    assert set(point.lists.tolist()) <= {point.most, point.most - 1}


def test_a_ratio_reads_what_it_says() -> None:
    one = drawn_ranks()
    point = by_ratio(one, 0.8)
    assert point.recall.mean() >= 0.8
    limit = np.float32(point.ratio) * one.apart[:, :1]
    within = (one.apart <= limit) | (limit <= point.unpruned)
    np.testing.assert_array_equal(point.lists, np.minimum(within.sum(axis=1), point.most))
    fewer = at_pages(one, point.mean)
    assert fewer.mean <= point.mean
    assert fewer.recall.mean() >= point.recall.mean() - 1e-9


def test_what_is_out_of_reach_costs_without_bound() -> None:
    one = Ranked.of(np.ones((3, 2)), np.ones((3, 2), int), np.full((3, 10), 3))
    for rule in (by_count, by_ratio):
        assert rule(one, 0.5).mean == np.inf
    assert gain(by_count(one, 0.5), by_count(one, 0.0))[0] == np.inf


def test_a_gain_has_an_error_of_pairs() -> None:
    one = drawn_ranks()
    better = by_count(one, 0.5)
    ratio, error = gain(better, better)
    assert ratio == 1
    assert error == 0
    worse = by_count(one, 0.9)
    assert gain(worse, better)[0] == pytest.approx(worse.pages.mean() / better.pages.mean())
    assert gain(worse, better)[1] > 0
