"""Balanced trees: structure, the choice of heads against a slow one, the penalty; and graphs against exact search."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import _native
from memwall.errors import InputError
from memwall.kernels.vector_search import VectorGraph, balanced_tree, pick_heads
from memwall.retrieve.head_tree import HeadSettings, graph_over, select_heads, starts


def drawn(count: int, d: int = 24, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Vectors in clusters of very different size and width."""
    draw = np.random.default_rng(seed)
    centers = draw.standard_normal((12, d))
    which = np.minimum(draw.zipf(1.6, count) - 1, 11)
    x = centers[which] + draw.standard_normal((count, d)) * np.linspace(0.1, 0.5, 12)[which][:, None]
    if dtype in ("int8", "uint8"):
        return np.clip(
            np.round(x * 20 + (128 if dtype == "uint8" else 0)), *((0, 255), (-128, 127))[dtype == "int8"]
        ).astype(dtype)
    return x.astype(dtype)


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.float64(a), np.float64(b)
    return ((a[:, None] - b[None]) ** 2).sum(axis=2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
@pytest.mark.parametrize(("count", "d"), [(1, 3), (9, 5), (700, 17), (3000, 24)])
def test_a_tree_holds_every_vector_once(dtype: str, count: int, d: int) -> None:
    x = drawn(count, d, dtype=dtype)
    tree = balanced_tree(x, children=8, leaf=4, samples=100, value_range=1.0 if x.dtype.kind == "f" else 255.0)
    assert sorted(tree.points.tolist()) == [-1, *range(count)]
    assert tree.points[0] == -1
    seen = [0]
    for node in range(len(tree.points)):
        children = range(int(tree.begins[node]), int(tree.ends[node]))
        assert all(child > node for child in children)
        seen += children
    assert sorted(seen) == list(range(count + 1))


def test_a_tree_is_the_same_on_every_number_of_threads_and_instruction_set() -> None:
    x, before, isa = drawn(2000), _native.num_threads(), _native.isa()
    found = []
    try:
        for threads in (1, 3):
            _native.set_num_threads(threads)
            tree = balanced_tree(x, seed=5)
            found.append((tree.points.tolist(), graph_over(x[:300], HeadSettings(), 8).edges.tolist()))
        assert found[0] == found[1]
        _native.force_isa("portable")
        assert len(set(balanced_tree(x).points.tolist())) == 2001
    finally:
        _native.set_num_threads(before)
        _native.force_isa(isa)


def test_equal_vectors_end() -> None:
    x = np.ones((500, 8), np.float32)
    tree = balanced_tree(x, children=4, leaf=2, samples=50)
    assert sorted(tree.points.tolist()) == [-1, *range(500)]
    heads = select_heads(x, HeadSettings(share=0.1)).ids
    assert 0 < len(heads) < 500


def test_a_child_lies_under_the_nearest_medoid() -> None:
    """Labels after the last step carry no penalty: what a query finds nearest is where a vector lies."""
    x = drawn(400)
    tree = balanced_tree(x, children=6, leaf=400 // 6, samples=400)
    top = range(int(tree.begins[0]), int(tree.ends[0]))
    medoids = tree.points[top.start : top.stop]
    nearest = squared(x, x[medoids]).argmin(axis=1)
    for place, node in enumerate(top):
        stack = [node]
        while stack:
            one = stack.pop()
            assert nearest[tree.points[one]] == place
            stack += range(int(tree.begins[one]), int(tree.ends[one]))


def test_the_penalty_evens_sizes_out() -> None:
    x = drawn(4000, seed=3)

    def unevenness(factor: float) -> float:
        tree = balanced_tree(x, children=16, leaf=1000, samples=4000, factor=factor)
        sizes = np.zeros(len(tree.points))
        for node in range(len(tree.points) - 1, -1, -1):
            sizes[node] = 1 + sizes[tree.begins[node] : tree.ends[node]].sum()
        top = sizes[tree.begins[0] : tree.ends[0]]
        return float(top.std() / top.mean())

    assert unevenness(-1) < unevenness(math.inf)


def slow_heads(tree: object, count: int, select: int, split: int, factor: int) -> np.ndarray:
    """The rule as it is written: from the leaves up, by recursion."""
    heads = np.zeros(count, bool)

    def walk(node: int) -> int:
        children = [(walk(child), child) for child in range(int(tree.begins[node]), int(tree.ends[node]))]
        size = 1 + sum(one for one, _ in children)
        if size < select:
            return size
        if tree.points[node] >= 0:
            heads[tree.points[node]] = True
        if size > split:
            left = sorted(((-one, child) for one, child in children if one), key=lambda pair: pair)
            for _, child in left[: math.ceil(size / factor)]:
                heads[tree.points[child]] = True
        return 0

    walk(0)
    return heads


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(2, 30), st.integers(1, 60), st.integers(1, 9), st.integers(0, 99))
def test_heads_are_those_of_a_slow_walk(count: int, select: int, split: int, factor: int, seed: int) -> None:
    tree = balanced_tree(drawn(count, 4, seed), children=5, leaf=3, samples=40)
    found = pick_heads(tree, count, select=select, split=split, split_factor=factor)
    np.testing.assert_array_equal(found, slow_heads(tree, count, select, split, factor))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.16, 0.25])
def test_heads_come_near_the_share(share: float) -> None:
    heads = select_heads(drawn(6000), HeadSettings(share=share))
    assert abs(len(heads.ids) / 6000 - share) < 0.02
    assert (np.diff(heads.ids) > 0).all()
    bounded = select_heads(drawn(6000), HeadSettings(share=share, most=200))
    assert 1 <= len(bounded.ids) <= 200
    random = select_heads(drawn(6000), HeadSettings(share=share, random=True))
    assert len(random.ids) == round(6000 * share)


def test_few_vectors_have_a_head() -> None:
    for count in (1, 2, 8, 9, 20):
        assert len(select_heads(drawn(count), HeadSettings(share=0.16)).ids) >= 1
    assert len(select_heads(drawn(30), HeadSettings(share=1)).ids) == 30


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"share": 0}, "share above 0"),
        ({"children": 1}, "at least 2"),
        ({"factor": 0}, "-1 for the best"),
        ({"split_most": 6}, "thresholds"),
        ({"most": 0}, "too few"),
    ],
)
def test_bad_settings(wrong: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        HeadSettings(**wrong)


# ---- graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
def test_a_graph_finds_the_nearest(dtype: str) -> None:
    x = np.unique(drawn(1500, 19, dtype=dtype), axis=0)
    asked = drawn(60, 19, seed=7).astype(np.float32) * (20 if x.dtype.kind != "f" else 1)
    asked += 128 if dtype == "uint8" else 0
    graph = graph_over(x, HeadSettings(), 24)
    ids, distances, _ = graph.search(asked, 10, 600)
    exact = squared(asked, x)
    np.testing.assert_allclose(distances, np.take_along_axis(exact, ids.astype(np.int64), axis=1), rtol=1e-4)
    assert (np.diff(distances, axis=1) >= 0).all()
    recall = np.mean([len({*row} & {*best}) / 10 for row, best in zip(ids, exact.argsort(axis=1)[:, :10], strict=True)])
    assert recall > 0.9
    everything, _, _ = graph.search(asked[:5], len(x), 10 * len(x))
    assert all(sorted(row) == list(range(len(x))) for row in everything.tolist())  # every vector can be reached


def test_edges_keep_the_rule_of_relative_neighbourhoods() -> None:
    """The first edges are those that no edge before them shadows; the nearest neighbour is always the first."""
    x = drawn(600, 8)
    graph = graph_over(x, HeadSettings(), 12)
    exact = squared(x, x)
    for at, row in enumerate(graph.edges):
        edges = row[row >= 0]
        assert len(set(edges.tolist())) == len(edges)
        assert at not in edges
    hit = np.mean([exact[at].argsort()[1] in row for at, row in enumerate(graph.edges)])
    assert hit > 0.98


@pytest.mark.parametrize("count", [1, 2, 7, 9, 33])
def test_small_graphs(count: int) -> None:
    x = drawn(count, 5)
    graph = graph_over(x, HeadSettings(), 4)
    ids, distances, _ = graph.search(x, count + 2, 1000)
    assert all(sorted(row[row >= 0].tolist()) == list(range(count)) for row in ids)
    assert np.isinf(distances[:, count:]).all()


def test_pivots_alone_are_an_exact_search() -> None:
    x = drawn(200, 7)
    pivots, ends, seeds = starts(x, HeadSettings())
    assert len(pivots) == len(ends)
    assert ends[-1] == len(seeds)
    none = np.zeros(0, np.int32)
    every = VectorGraph(
        x, np.full((200, 1), -1, np.int32), np.arange(200, dtype=np.int32), np.zeros(200, np.int32), none
    )
    ids, _, _ = every.search(x, 3, 200)
    np.testing.assert_array_equal(ids, squared(x, x).argsort(axis=1, kind="stable")[:, :3])
