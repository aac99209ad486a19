"""The shared index against brute force: searches, permissions, lists that split and merge, filters that are rebuilt."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kernels
from memwall.errors import InputError
from memwall.retrieve.base import unit
from memwall.retrieve.cluster_tree import ClusterTree, TreeShape
from memwall.retrieve.curator import Curator, CuratorSettings, Effort
from tests.retrieve.test_embedding_storage import vectors

SHAPE = TreeShape(branching=4, divisor=1, least_branching=4, points_per_centroid=3)
SMALL = CuratorSettings(shape=SHAPE, max_list=4, filter_capacity=40, rebuild_interval=7)
X = vectors(400, seed=1)


def grown(config: CuratorSettings = SMALL, *, count: int = 400, share: float = 0.3, tenants: int = 6) -> Curator:
    """Some tenants, each of which may read a share of the vectors by lot."""
    index = Curator.train(X, config)
    labels = index.add(X[:count])
    draw = np.random.default_rng(5)
    for number in range(tenants):
        index.grant(labels[draw.random(count) < share * (number + 1) / tenants], f"t{number}")
    return index


def lists_of(index: Curator, tenant: str) -> list[tuple[int, list[int]]]:
    """Nodes and labels of a tenant's short lists."""
    held, number = index.tree.state(), index.number(tenant)
    starts = np.concatenate([[0], held["list_ends"]])[:-1].astype(int)
    return [
        (int(node), sorted(held["labels"][held["list_ids"][start:end]].tolist()))
        for node, one, start, end in zip(
            held["list_nodes"], held["list_tenants"], starts, held["list_ends"], strict=True
        )
        if one == number
    ]


def nearest(index: Curator, query: np.ndarray, labels: np.ndarray, top: int) -> list[int]:
    """By brute force."""
    scores = index.vectors(labels) @ unit(query[None])[0]
    return labels[np.lexsort((labels, -scores))][:top].tolist()


# ---- searches ----


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("d", [1, 3, 16, 37, 64])
def test_distances_of_every_instruction_set(isa: str, d: int) -> None:
    before = kernels.isa()
    try:
        kernels.force_isa(isa)
    except ValueError:
        pytest.skip(f"no {isa} here")
    try:
        x, asked = vectors(90, d=d, seed=2), vectors(7, d=d, seed=3)
        index = Curator.train(x, SMALL, metric="l2")
        index.grant(index.add(x), "a")
        hits = index.search(asked, 90, "a")
        wanted = np.square(asked[:, None] - x).sum(axis=2)
        np.testing.assert_allclose(-hits.scores, np.take_along_axis(wanted, hits.ids, axis=1), rtol=1e-4, atol=1e-5)
        assert (np.diff(hits.scores, axis=1) <= 0).all()
        assert np.sort(hits.ids, axis=1).tolist() == [list(range(90))] * 7
    finally:
        kernels.force_isa(before)


def test_searches_find_what_brute_force_finds() -> None:
    index = grown()
    for tenant in index.tenants:
        labels = index.readable(tenant)
        hits, work = index.search_with_work(vectors(5, seed=9), 10, tenant)
        for query, row in zip(vectors(5, seed=9), hits.ids, strict=True):
            assert [label for label in row.tolist() if label >= 0] == nearest(index, query, labels, 10)
        # every vector that may be read is compared once, and no other
        assert work.vector_distances.tolist() == [len(labels)] * 5


def test_fewer_factors_compare_fewer_vectors() -> None:
    index = grown(dataclasses.replace(SMALL, bucket_factor=2, scan_factor=4), share=0.9)
    hits, work = index.search_with_work(X[:50], 5, "t5")
    assert (work.vector_distances <= 20).all()
    assert (work.vector_distances >= 5).all()
    assert (hits.ids >= 0).all()
    full = index.search(X[:50], 5, "t5", Effort(scan_factor=1000))
    found = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(hits.ids.tolist(), full.ids.tolist(), strict=True)])
    assert found > 0.5
    # the first bucket holds more than may be compared: it stays, for there would be nothing else
    _, work = index.search_with_work(X[:3], 1, "t5", Effort(scan_factor=1, bucket_factor=1))
    assert (work.vector_distances >= 1).all()


def test_one_query_on_several_threads_and_many_at_once_agree() -> None:
    x = vectors(3000, seed=4)
    index = Curator.train(x[:500])
    index.grant(index.add(x), "a")
    index.grant(np.arange(0, 3000, 3), "b")
    names = ["a", "b"] * 10
    together = index.search(x[:20], 7, names)
    before = kernels.num_threads()
    try:
        for threads in (1, 2, 3):
            kernels.set_num_threads(threads)
            for place in range(20):
                alone = index.search(x[place : place + 1], 7, names[place])
                np.testing.assert_array_equal(alone.ids[0], together.ids[place])
                np.testing.assert_array_equal(alone.scores[0], together.scores[place])
    finally:
        kernels.set_num_threads(before)


def test_a_tenant_is_an_index_of_its_own() -> None:
    index = grown()
    mine = index.of("t3")
    assert mine.count == len(index.readable("t3")) < index.count == 400
    np.testing.assert_array_equal(mine.search(X[:4], 3).ids, index.search(X[:4], 3, "t3").ids)
    assert mine.dimensions == 32
    assert mine.nbytes == mine.count * 128 + index.clusters.centroids.nbytes


def test_no_vector_of_others_is_compared_where_tenants_lie_mixed_in_leaves() -> None:
    """Of leaves without short lists all members are looked at, though only so many are a tenant's."""
    one = CuratorSettings(shape=TreeShape(most_level=0), max_list=2)  # the root is a leaf
    index = Curator.train(X, one)
    labels = index.add(X)
    index.grant(labels[1::2], "odd")  # the last of them lies behind as many slots as the tenant has vectors
    index.grant(labels[::2], "even")
    assert lists_of(index, "odd") == []
    for name, mine in (("odd", labels[1::2]), ("even", labels[::2])):
        hits, work = index.search_with_work(X[:40], 3, name)
        assert set(hits.ids.ravel().tolist()) <= set(mine.tolist())
        assert (work.vector_distances == 200).all()
        assert index.search(X[mine], 1, name).ids[:, 0].tolist() == mine.tolist()


# ---- the second design ----


def test_any_filter_is_searched() -> None:
    index = grown()
    index.delete([7])
    both = np.intersect1d(index.readable("t5"), index.readable("t4"))
    some = np.setdiff1d(np.arange(50, 300), [7])
    for labels, tenant in ((both, None), (some, None), ([*range(50, 300), 999], "t5"), ([3], None), ([], None)):
        wanted = np.array(labels, np.int64)
        if tenant is not None:
            wanted = np.intersect1d(wanted, index.readable(tenant))
        hits, work = index.search_among(X[:6], 5, labels, tenant=tenant)
        for query, row in zip(X[:6], hits.ids.tolist(), strict=True):
            assert [label for label in row if label >= 0] == (nearest(index, query, wanted, 5) if len(wanted) else [])
        assert work.vector_distances.tolist() == [len(wanted)] * 6
    few, work = index.search_among(X[:20], 2, np.arange(400), effort=Effort(scan_factor=20, bucket_factor=2))
    assert (work.vector_distances <= 40).all()
    assert np.mean(few.ids[:, 0] == np.arange(20)) > 0.8


@pytest.mark.parametrize(
    ("effort", "less"),
    [({"prune": 1.2}, True), ({"most_buckets": 3}, True), ({"beam": 2}, True), ({"spread_weight": 0.3}, False)],
)
def test_searches_go_less_far(effort: dict[str, Any], less: bool) -> None:
    index = grown(share=0.9)
    whole, all_work = index.search_with_work(X[:60], 3, "t5")
    hits, work = index.search_with_work(X[:60], 3, "t5", Effort(**effort))
    assert (hits.ids >= 0).all()
    assert np.isin(hits.ids, index.readable("t5")).all()
    if less:
        assert work.vector_distances.mean() < all_work.vector_distances.mean()
        assert (work.vector_distances >= 3).all()
        assert np.mean(hits.ids[:, 0] == whole.ids[:, 0]) > 0.5
    else:  # only the order changes
        np.testing.assert_array_equal(hits.ids, whole.ids)
    if "most_buckets" in effort:
        assert (work.buckets <= 3).all()


# ---- changes ----

operation = st.tuples(
    st.sampled_from(["add", "grant", "grant", "grant", "revoke", "revoke", "delete"]),
    st.integers(0, 399),
    st.integers(1, 40),
    st.integers(0, 4),
)


@settings(max_examples=35, deadline=None, derandomize=True)
@given(
    operations=st.lists(operation, max_size=40),
    max_list=st.integers(1, 9),
    # filters of 64 bits that often know tenants wrongly, and some that do so seldom
    capacity=st.sampled_from([2, 100]),
    interval=st.sampled_from([1, 5, 1000]),
)
def test_any_mix_of_changes(operations: list[Any], max_list: int, capacity: int, interval: int) -> None:
    config = CuratorSettings(
        shape=SHAPE, max_list=max_list, filter_capacity=capacity, filter_error=0.3 if capacity == 2 else 0.01,
        rebuild_interval=interval,
    )  # fmt: skip
    index = Curator.train(X, config)
    may: dict[str, set[int]] = {f"t{number}": set() for number in range(5)}
    for name in may:
        index.add_tenant(name)
    there: set[int] = set(index.add(X[:100]).tolist())
    for kind, first, count, number in operations:
        name = f"t{number}"
        labels = np.array([label for label in range(first, first + 3 * count, 3) if label in there], np.int64)
        if kind == "add":
            new = set(index.add(X[first : first + count], owner=name).tolist())
            assert not new & there
            there |= new
            may[name] |= new
        elif kind == "grant":
            assert index.grant(labels, name) == len(set(labels.tolist()) - may[name])
            may[name] |= set(labels.tolist())
        elif kind == "revoke":
            assert index.revoke(labels, name) == len(set(labels.tolist()) & may[name])
            may[name] -= set(labels.tolist())
        else:
            assert index.delete(labels) == len(labels)
            there -= set(labels.tolist())
            may = {one: held - set(labels.tolist()) for one, held in may.items()}
        assert index.tree.check() == ""
        for one, held in may.items():
            # the walk gives a label as often as it is reached: once
            assert index.readable(one).tolist() == sorted(held)
            assert index.of(one).count == len(held)
    assert index.count == len(there)
    for one, held in may.items():
        assert all(len(labels) <= max_list for _, labels in lists_of(index, one))  # filters are made anew here
        assert index.readable(one).tolist() == sorted(held)
        hits = index.search(X[:2], 4, one)
        labels = np.array(sorted(held), np.int64)
        for query, row in zip(X[:2], hits.ids.tolist(), strict=True):
            assert [label for label in row if label >= 0] == nearest(index, query, labels, 4)
    assert index.tree.check() == ""


def test_lists_split_where_they_grow_and_merge_where_they_shrink() -> None:
    index = Curator.train(X, SMALL)
    labels = index.add(X)
    index.grant(labels[:4], "a")
    assert lists_of(index, "a") == [(0, [0, 1, 2, 3])]  # all at the root
    index.grant(labels[4:5], "a")  # one too many
    nodes = [node for node, _ in lists_of(index, "a")]
    assert nodes
    assert 0 not in nodes
    index.grant(labels, "a")
    assert max(node for node, _ in lists_of(index, "a")) > 4  # below the root's children
    index.revoke(labels[4:], "a")
    assert lists_of(index, "a") == [(0, [0, 1, 2, 3])]
    index.revoke(labels[:4], "a")
    assert lists_of(index, "a") == []
    assert index.search(X[:1], 3, "a").ids.tolist() == [[-1, -1, -1]]


def test_rebuilt_filters_bring_searches_back_to_few_nodes() -> None:
    kept = {}
    for interval in (100, 1 << 30):
        index = grown(dataclasses.replace(SMALL, rebuild_interval=interval), share=1.0)
        before = int(index.search_with_work(X[:20], 3, "t5", Effort(scan_factor=1000))[1].nodes.sum())
        index.delete(index.readable("t5")[8:])
        kept[interval] = int(index.search_with_work(X[:20], 3, "t5", Effort(scan_factor=1000))[1].nodes.sum())
        assert kept[interval] <= before
    assert kept[100] < kept[1 << 30] * 2 / 3
    index.tree.rebuild_filters()
    assert int(index.search_with_work(X[:20], 3, "t5", Effort(scan_factor=1000))[1].nodes.sum()) <= kept[100]


def test_memory_follows_permissions_not_copies() -> None:
    index = grown(CuratorSettings())
    held = index.bytes()
    labels = np.arange(400)
    for number in range(20):
        index.grant(labels, f"all{number}")
    grown_by = sum(index.bytes().values()) - sum(held.values())
    assert index.bytes()["vectors"] == held["vectors"] >= X.nbytes
    assert grown_by < 20 * 400 * 32 * 4 / 4  # a quarter of what copies of the vectors would take
    index.delete(labels)
    assert index.count == 0
    index.add(X[:200])
    assert index.bytes()["vectors"] == held["vectors"]  # slots are used again


# ---- rights and bad input ----


def test_owners_delete_and_others_do_not() -> None:
    index = Curator.train(X, SMALL)
    mine = index.add(X[:3], owner="a")
    index.grant(mine, "b")
    shared = index.add(X[3:5], readers=[["b", "a"], []])
    assert (index.owner(0), index.owner(int(shared[0])), index.owner(int(shared[1]))) == ("a", "b", None)
    assert index.readers(0) == ["a", "b"]
    for labels, by in ((mine, "b"), (shared, "a"), (shared[1:], "b"), ([*mine, *shared], "a")):
        with pytest.raises(InputError, match="does not own vector"):
            index.delete(labels, by=by)
    assert index.count == 5
    index.revoke(mine, "a")  # reading and owning are two things
    assert index.delete(mine, by="a") == 3
    assert index.readable("b").tolist() == [3]
    assert index.add(X[:1]).tolist() == [5]  # labels are not used again
    with pytest.raises(InputError, match="no vector 0 in this index"):
        index.grant([0], "a")
    with pytest.raises(InputError, match="no vector 2"):
        index.vectors(np.array([3, 2]))


def test_bad_input() -> None:
    index = grown(tenants=2)
    ones = np.ones((3, 4), np.float32)
    wrong = ClusterTree(centroids=ones, spreads=ones[:, 0].copy(), parents=np.array([-1, 2, 0], np.int32))
    cases: list[tuple[Any, str]] = [
        (lambda: index.search(X[:1], 3, "t0x"), "no tenant 't0x' in this index; did you mean t0\\?"),
        (lambda: index.search(X[:1], 0, "t0"), "top is 0"),
        (lambda: index.search(X[:3], 1, ["t0"]), "1 tenants for 3 queries"),
        (lambda: index.search(X[:1, :4], 1, "t0"), "4 dimensions; expected 32"),
        (lambda: index.search(X[:1] * np.nan, 1, "t0"), "NaN"),
        (lambda: index.search(X[:1] * 0, 1, "t0"), "all zeros"),
        (lambda: index.add(X[:2], readers=[["t0"]]), "1 lines of readers for 2 vectors"),
        (lambda: index.add(X[:1], owner="a b"), "names no tenant"),
        (lambda: index.add(X[:1], readers=[["a", ""]]), "names no tenant"),
        (lambda: index.add(np.zeros((1, 32))), "vector 0 is all zeros"),
        (lambda: index.revoke([0], "nobody"), "no tenant 'nobody'"),
        (lambda: index.grant([0.5], "t0"), "whole numbers"),
        (lambda: index.grant([-1], "t0"), "no vector -1"),
        (lambda: Curator.train(X, metric="dot"), "no metric 'dot'"),  # type: ignore[arg-type]
        (lambda: Curator(wrong, SMALL), "no tree of clusters"),
        (lambda: index.search(X[:1], 1, "t0", Effort(scan_factor=0)), "scan_factor is 0"),
        (lambda: index.search(X[:1], 1, "t0", Effort(prune=0.5)), "prune 0.5"),
        (lambda: index.search_among(X[:1], 1, [0], tenant="t9"), "no tenant 't9'"),
        (lambda: CuratorSettings(max_list=0), "max_list is 0"),
        (lambda: CuratorSettings(filter_error=0.9), "filter_error is 0.9"),
    ]
    for call, says in cases:
        with pytest.raises(InputError, match=says):
            call()
    assert index.count == 400
    assert index.tree.check() == ""


def test_filters_have_the_size_that_is_told() -> None:
    config = CuratorSettings()
    assert config.filter_words == -(-9586 // 64)  # 1000 tenants, 1 %: 9.586 bits each
    assert config.filter_hashes == 7
    index = Curator.train(X, dataclasses.replace(SMALL, filter_capacity=1000))
    index.grant(index.add(X), "a")
    inner = len(set(index.clusters.parents.tolist()) - {-1})
    assert len(index.tree.state()["filters"]) == inner * config.filter_words
    assert index.bytes()["filters"] < (inner + 1) * config.filter_words * 8
