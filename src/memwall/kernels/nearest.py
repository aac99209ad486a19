"""The nearest of many centroids: what clustering and coding with codebooks spend their time on."""

from __future__ import annotations

import numpy as np

from memwall import _native

__all__ = ["Nearest"]

_PAD = 16


class Nearest:
    """Centroids [k, size] float32, laid out for the search. Holds a copy of them by coordinate."""

    def __init__(self, centroids: np.ndarray) -> None:
        count, size = centroids.shape
        padded = max(_PAD, -(-count // _PAD) * _PAD)
        self._table = np.zeros((size, padded), np.float32)
        self._table[:, :count] = centroids.T
        self._half_norms = np.full(padded, np.inf, np.float32)
        np.einsum("dk,dk->k", self._table[:, :count], self._table[:, :count], out=self._half_norms[:count])
        self._half_norms[:count] *= 0.5

    def labels(self, points: np.ndarray) -> np.ndarray:
        """int32 [n]: the nearest centroid of each of `points` [n, size] float32, of several as near the first."""
        return self.search(points)[0]

    def search(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels, and half the squared distances less half the points' own squared lengths, float32 [n]."""
        points = np.ascontiguousarray(points, np.float32)
        labels, scores = np.empty(len(points), np.int32), np.empty(len(points), np.float32)
        _native.nearest(points, self._table, self._half_norms, labels, scores)
        return labels, scores
