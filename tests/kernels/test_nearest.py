"""The nearest centroid on every instruction set, against all distances in float64."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.kernels.nearest import Nearest


@pytest.mark.parametrize(
    ("points", "centroids", "size"), [(1, 1, 1), (7, 3, 2), (100, 17, 5), (33, 256, 8), (9, 40, 16)]
)
def test_nearest(points: int, centroids: int, size: int, isa: str, threads: int) -> None:
    random = np.random.default_rng(size)
    x = random.standard_normal((points, size)).astype(np.float32)
    c = random.standard_normal((centroids, size)).astype(np.float32)
    labels, scores = Nearest(c).search(x)
    distances = np.square(x[:, None].astype(np.float64) - c).sum(axis=2)
    least = distances.min(axis=1)
    np.testing.assert_allclose(distances[np.arange(points), labels], least, atol=1e-5)
    np.testing.assert_allclose(2 * scores + np.square(x.astype(np.float64)).sum(axis=1), least, atol=1e-4)


def test_of_several_as_near_the_first(isa: str) -> None:
    c = np.zeros((40, 3), np.float32)
    c[25:] = 1
    assert Nearest(c).labels(np.zeros((5, 3), np.float32)).tolist() == [0] * 5
    assert Nearest(c).labels(np.ones((6, 3), np.float32)).tolist() == [25] * 6


def test_no_points() -> None:
    assert Nearest(np.ones((3, 2), np.float32)).labels(np.empty((0, 2), np.float32)).shape == (0,)
