"""What rules for reading lists cost at equal recall: every query's lists in order, and when its neighbours come up.

A rule is a number of lists, or a ratio of distances with the best of a few bounds on lists and of two limits below
which nothing is pruned; it is told with the setting that meets a recall of these queries with fewest pages. Two lists
that share a page count it twice.

Units and shapes: q queries, n lists of each, k true neighbours; distances squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memwall.retrieve.closure import Lists
from memwall.retrieve.spann import surviving

BOUNDS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384)
"""On lists, of which `by_ratio` takes the best."""
UNPRUNED = (0.1, 0.0)
"""Limits so low that nothing is pruned: the released code's, and none."""
RATIOS = tuple(1.05**step for step in range(66))
"""To 24."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """What queries could read. apart [q, n]: squared distances of heads, nearest first; pages [q, n + 1]: of the first
    0, 1, ... of their lists together; rank [q, k]: how many lists must be read until a neighbour is seen, 0 where it is
    a head, n + 1 where no list has it.
    """

    apart: np.ndarray
    pages: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, apart: np.ndarray, pages: np.ndarray, rank: np.ndarray) -> Ranked:
        """pages [q, n]: of each list."""
        total = np.zeros((len(pages), pages.shape[1] + 1), np.int64)
        np.cumsum(pages, axis=1, out=total[:, 1:])
        return cls(apart=apart, pages=total, rank=rank)

    def read(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pages and recall of each query that reads so many lists."""
        return self.pages[np.arange(len(cuts)), cuts], (self.rank <= cuts[:, None]).mean(axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A rule's setting that meets a recall with fewest pages. lists, pages, recall: of each query."""

    lists: np.ndarray
    pages: np.ndarray
    recall: np.ndarray
    most: int
    ratio: float
    unpruned: float = 0.0

    @property
    def mean(self) -> float:
        return float(self.pages.mean())

    @property
    def tail(self) -> float:
        """p99 over p50 of pages."""
        return float(np.percentile(self.pages, 99) / max(np.percentile(self.pages, 50), 1))


def ranked(
    truth: np.ndarray, heads: np.ndarray, apart: np.ndarray, head_ids: np.ndarray, lists: Lists, pages: np.ndarray,
    num_vectors: int,
) -> Ranked:  # fmt: skip
    """truth: the true neighbours [q, k]; heads, apart [q, n]: lists of each query, nearest head first, -1 behind the
    last; head_ids: vectors that are heads themselves, of as many lists (empty where heads are no vectors).
    """
    never = heads.shape[1] + 1
    holders = replicas(lists, num_vectors)
    head_of = np.full(num_vectors, -1)
    head_of[head_ids] = np.arange(len(head_ids))
    rank = np.full(truth.shape, never)
    place = np.full(len(lists.ends) + 1, never)  # the last one stands for no list
    for at, row in enumerate(heads):
        real = row[row >= 0]
        place[real] = np.arange(1, len(real) + 1)
        own = head_of[truth[at]]
        in_lists = place[holders[truth[at]]].min(axis=1)
        rank[at] = np.where(own >= 0, np.where(place[own] < never, 0, never), in_lists)
        place[real] = never
    return Ranked.of(apart, np.where(heads >= 0, pages[heads], 0), rank)


def replicas(lists: Lists, count: int) -> np.ndarray:
    """int [n, most]: the lists that hold each vector, -1 behind the last."""
    owner = np.repeat(np.arange(len(lists.ends)), lists.lengths)
    order = np.argsort(lists.members, kind="stable")
    members, owner = lists.members[order], owner[order]
    counts = np.bincount(members, minlength=count)
    starts = np.cumsum(counts) - counts
    found = np.full((count, max(int(counts.max(initial=0)), 1)), -1)
    found[members, np.arange(len(members)) - starts[members]] = owner
    return found


def _bounds(one: Ranked) -> list[int]:
    count = one.apart.shape[1]
    return [most for most in BOUNDS if most < count] + [count]


def by_count(one: Ranked, recall: float) -> Point:
    """The same number of lists for every query, or one less for some that are drawn, so that the recall is just met."""
    count = len(one.apart)
    order = np.random.default_rng(0).permutation(count)
    for most in range(1, one.apart.shape[1] + 1):
        if one.read(np.full(count, most))[1].mean() < recall:
            continue
        fewer = 0 if most == 1 else _fewer(one, most, order, recall)
        cuts = np.full(count, most)
        cuts[order[:fewer]] -= 1
        pages, found = one.read(cuts)
        return Point(lists=cuts, pages=pages, recall=found, most=most, ratio=math.inf)
    return missed(one)


def _fewer(one: Ranked, most: int, order: np.ndarray, recall: float) -> int:
    """The most queries, in this order, that can do with one list less."""
    full, less = (one.read(np.full(len(order), count))[1][order] for count in (most, most - 1))
    means = (full.sum() - np.concatenate([[0], np.cumsum(full - less)])) / len(order)
    return int(np.flatnonzero(means >= recall - 1e-12)[-1])


def by_ratio(one: Ranked, recall: float) -> Point:
    """As many as the nearest head's distance says, with fewest pages."""
    fitting = [point for point in _by_ratios(one) if point.recall.mean() >= recall]
    return min(fitting, key=lambda point: point.mean) if fitting else missed(one)


def at_pages(one: Ranked, pages: float) -> Point:
    """The best recall with so many pages on average; the fewest where even those are more."""
    points = list(_by_ratios(one))
    fitting = [point for point in points if point.mean <= pages] or [min(points, key=lambda point: point.mean)]
    return max(fitting, key=lambda point: float(point.recall.mean()))


def _by_ratios(one: Ranked) -> Iterator[Point]:
    """Under every ratio, bound and limit."""
    for unpruned in UNPRUNED:
        for ratio in RATIOS:
            lists = surviving(one.apart, ratio, unpruned).sum(axis=1)
            for most in _bounds(one):
                cuts = np.minimum(lists, most)
                pages, found = one.read(cuts)
                yield Point(lists=cuts, pages=pages, recall=found, most=most, ratio=ratio, unpruned=unpruned)


def missed(one: Ranked) -> Point:
    """The recall is out of reach: no pages would do."""
    cuts = np.full(len(one.apart), one.apart.shape[1])
    pages, found = one.read(cuts)
    return Point(lists=cuts, pages=np.full(len(pages), np.inf), recall=found, most=len(pages), ratio=math.inf)


def gain(worse: Point, better: Point) -> tuple[float, float]:
    """How many times the pages, and a standard error by paired queries (of the ratio of means)."""
    ratio = worse.mean / better.mean
    if not math.isfinite(ratio):
        return math.inf, 0.0
    rest = worse.pages - ratio * better.pages
    return ratio, float(rest.std(ddof=1) / math.sqrt(len(rest)) / better.mean)


def told_gain(worse: Point, better: Point) -> str:
    ratio, error = gain(worse, better)
    return f"{worse.mean:.1f} pages against {better.mean:.1f}: {ratio:.2f} ± {error:.2f} times"
