"""Trees of clusters: their shape, and that samples lie where their centroids are nearest."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.retrieve.cluster_tree import TreeShape, train_tree
from tests.retrieve.test_embedding_storage import vectors

SMALL = TreeShape(branching=8, divisor=2, least_branching=2, points_per_centroid=8)


def levels_of(parents: np.ndarray) -> list[int]:
    levels = [0]
    for parent in parents[1:].tolist():
        levels.append(levels[parent] + 1)
    return levels


def test_branching_shrinks_and_stops_where_samples_run_out() -> None:
    x = vectors(600, seed=1)
    told: list[tuple[int, int]] = []
    tree = train_tree(x, SMALL, lambda done, whole: told.append((done, whole)))
    centroids, parents = tree.centroids, tree.parents
    assert centroids.shape == (len(parents), 32)
    assert (np.diff(parents) >= 0).all()  # level by level, children side by side
    levels, children = levels_of(parents), np.bincount(parents[1:], minlength=len(parents))
    most = {0: 8, 1: 4, 2: 2}  # halved, and 2 at least
    assert all(count <= most.get(level, 2) for level, count in zip(levels, children, strict=True))
    assert children[0] == 8
    np.testing.assert_allclose(centroids[0], x.mean(axis=0), rtol=1e-5)
    assert told[-1] == (600, 600)
    assert tree.spreads[0] == pytest.approx(np.square(x - x.mean(axis=0)).sum(axis=1).mean(), rel=1e-4)
    # a node with children had 8 samples for each that it was to have
    held = {0: np.arange(600)}
    for node in range(len(parents)):
        below = np.flatnonzero(parents == node)
        if len(below):
            assert len(held[node]) >= 8 * most.get(levels[node], 2)
            nearest = np.linalg.norm(x[held[node]][:, None] - centroids[below], axis=2).argmin(axis=1)
            held |= {int(one): held[node][nearest == at] for at, one in enumerate(below)}
        else:
            assert len(held[node]) < 8 * most.get(levels[node], 2)


def test_levels_are_bounded() -> None:
    deep = TreeShape(branching=2, least_branching=2, most_level=3, points_per_centroid=1)
    assert max(levels_of(train_tree(vectors(600), deep).parents)) == 3
    assert train_tree(vectors(600), TreeShape(most_level=0)).parents.tolist() == [-1]


def test_equal_samples_are_not_divided() -> None:
    tree = train_tree(np.ones((300, 4), np.float32), SMALL)
    assert (tree.parents.tolist(), tree.spreads.tolist()) == ([-1], [0])
    np.testing.assert_array_equal(tree.centroids, np.ones((1, 4)))
    assert train_tree(np.ones((1, 4), np.float32), SMALL).parents.tolist() == [-1]


def test_bad_input() -> None:
    with pytest.raises(InputError, match="one vector at least"):
        train_tree(np.zeros((0, 4), np.float32), SMALL)
    for name, value in (("branching", 1), ("divisor", 0), ("most_level", 99), ("iterations", 0)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            TreeShape(**{name: value})
