"""Weighted k-means: the loss never rises, weights count, empty clusters are filled, starts are what they say."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress.kmeans import kmeans, on_a_line, on_lines, quick_kmeans, sample
from memwall.errors import InputError


def loss_of(points: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    distances = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=2)
    return float((weights * distances.min(axis=1)).sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 60), st.integers(1, 12), st.integers(1, 6), st.sampled_from(["sampled", "spread"]), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_the_loss_never_rises_and_is_that_of_the_result(
    count: int, clusters: int, size: int, init: str, doubles: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    points = random.standard_normal((count, size)).astype(np.float32)
    if doubles:
        points = np.round(points)
    weights = random.random(count) * (random.random(count) < 0.8)
    found = kmeans(points, clusters, weights=weights, init=init, seed=seed)
    assert found.centroids.shape == (clusters, size)
    assert found.labels.shape == (count,)
    assert all(later <= earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    if weights.any():
        assert found.losses[-1] == pytest.approx(loss_of(points, weights, found.centroids), rel=1e-4, abs=1e-5)
    again = kmeans(points, clusters, weights=weights, init=init, seed=seed)
    np.testing.assert_array_equal(again.centroids, found.centroids)


def test_centroids_are_weighted_means() -> None:
    points = np.float32([[0], [1], [10], [13]])
    found = kmeans(points, 2, weights=np.array([1, 3, 2, 1]), init=np.float32([[0], [12]]))
    np.testing.assert_allclose(found.centroids, [[0.75], [11]])
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.losses[-1] == pytest.approx(0.5625 + 3 * 0.0625 + 2 + 4)


def test_empty_clusters_move_to_what_costs_most() -> None:
    points = np.float32([[0, 0], [0, 1], [5, 5], [9, 9]])
    start = np.float32([[0, 0], [100, 100], [100, 100]])
    found = kmeans(points, 3, init=start)
    assert found.losses[0] > 200
    assert found.losses[-1] == pytest.approx(0.5)
    assert len(set(found.labels.tolist())) == 3


def test_points_without_weight_do_not_count() -> None:
    points = np.float32([[1], [2], [50], [51]])
    found = kmeans(points, 2, weights=np.array([1, 1, 0, 0]), init="spread")
    assert found.losses[-1] == 0
    assert sorted(found.centroids[:, 0].tolist()) == [1, 2]


def test_no_more_points_than_clusters_lose_nothing() -> None:
    points = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    for clusters in (5, 9):
        found = kmeans(points, clusters)
        assert found.losses[-1] == 0
        np.testing.assert_allclose(found.centroids[found.labels], points, atol=1e-6)


def test_well_apart_clusters_are_found_from_a_spread_start() -> None:
    random = np.random.default_rng(1)
    centres = np.array([[0, 0], [20, 0], [0, 20], [20, 20]])
    points = (centres[random.integers(0, 4, 400)] + random.standard_normal((400, 2))).astype(np.float32)
    found = kmeans(points, 4, init="spread")
    order = np.lexsort(np.round(found.centroids / 20).T)
    np.testing.assert_allclose(found.centroids[order], centres[np.lexsort(centres.T)], atol=0.5)


def test_samples() -> None:
    assert sample(5, 5) == slice(None)
    taken = sample(100, 10, 3)
    assert isinstance(taken, np.ndarray)
    assert len(set(taken.tolist())) == 10
    assert taken.max() < 100


@pytest.mark.parametrize(
    ("points", "clusters", "weights"),
    [
        (np.empty((0, 2)), 3, None),
        (np.ones((4, 2)), 0, None),
        (np.full((4, 2), np.nan), 2, None),
        (np.ones((4, 2)), 2, np.array([1, 1, 1, -1])),
        (np.ones((4, 2)), 2, np.array([1, 1, 1, np.inf])),
    ],
)
def test_what_cannot_be_clustered(points: np.ndarray, clusters: int, weights: np.ndarray | None) -> None:
    with pytest.raises(InputError, match="k-means needs"):
        kmeans(points, clusters, weights=weights)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 999))
def test_on_a_line_no_clustering_is_better(count: int, clusters: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.sort(random.standard_normal(count)) + 100
    weights = random.integers(1, 5, count).astype(np.float64)
    found = on_a_line(values, weights, clusters)
    assert found.shape == (clusters,)
    assert bool((np.diff(found) >= 0).all())
    best = np.inf
    for cuts in combinations(range(1, count), min(clusters, count) - 1):
        pieces = [slice(*ends) for ends in pairwise((0, *cuts, count))]
        means = [np.average(values[piece], weights=weights[piece]) for piece in pieces]
        best = min(best, loss_of(values[:, None], weights, np.array(means)[:, None]))
    assert loss_of(values[:, None], weights, found.astype(np.float64)[:, None]) == pytest.approx(
        best, rel=1e-3, abs=1e-6
    )


def test_many_numbers_on_a_line_start_where_little_is_left_to_gain() -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(20_000))
    weights = np.ones(len(values))
    start = on_a_line(values, weights, 8)
    points = values[:, None].astype(np.float32)
    ended = kmeans(points, 8, init=start[:, None], iterations=300, tolerance=1e-9)
    spread = min(kmeans(points, 8, init="spread", seed=seed).losses[-1] for seed in range(3))
    assert loss_of(values[:, None], weights, start[:, None]) < 1.01 * ended.losses[-1]
    assert ended.losses[-1] <= 1.0001 * spread


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 999))
def test_many_lines_at_once_are_as_good_as_each_alone(
    lines: int, size: int, clusters: int, doubles: bool, seed: int
) -> None:
    """Up to 64 numbers a line the start is the best there is already."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((lines, size)) * random.random((lines, 1)) * 10 + random.standard_normal((lines, 1))
    values = np.round(values) if doubles else values
    found = on_lines(values, clusters)
    assert (np.diff(found, axis=1) >= 0).all()
    for line, centres in zip(values, found, strict=True):
        best = on_a_line(np.sort(line), np.ones(size), clusters)
        ours, wanted = (loss_of(line[:, None], np.ones(size), each[:, None]) for each in (centres, best))
        assert ours <= wanted * (1 + 1e-5) + 1e-5


def test_longer_lines_come_near_the_best() -> None:
    values = np.random.default_rng(0).standard_normal((7, 900))
    for line, centres in zip(values, on_lines(values, 8), strict=True):
        best = on_a_line(np.sort(line), np.ones(900), 8)
        ours, wanted = (loss_of(line[:, None], np.ones(900), each[:, None]) for each in (centres, best))
        assert ours <= 1.01 * wanted
    with pytest.raises(InputError, match="finite"):
        on_lines(np.full((2, 5), np.nan), 2)


@pytest.mark.parametrize("relax", [0.5, 0.9])
def test_steps_beyond_the_means_end_at_means_and_never_raise_the_loss(relax: float) -> None:
    random = np.random.default_rng(3)
    points = random.standard_normal((2000, 3)).astype(np.float32)
    found = kmeans(points, 20, relax=relax, iterations=60)
    assert all(later <= earlier for earlier, later in pairwise(found.losses))
    means = np.stack([points[found.labels == each].mean(axis=0) for each in range(20)])
    assert np.abs(found.centroids - means).max() < 0.1
    assert found.losses[-1] <= 1.05 * kmeans(points, 20).losses[-1]


def test_quickly_and_as_well() -> None:
    random = np.random.default_rng(0)
    points, weights = random.standard_t(5, (8192, 4)).astype(np.float32), np.exp(random.standard_normal(8192))
    found = quick_kmeans(points, 64, weights=weights)
    assert found.labels.shape == (8192,)
    assert found.losses[-1] <= 1.02 * kmeans(points, 64, weights=weights).losses[-1]
