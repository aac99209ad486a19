"""A fixed tree of clusters, learned from sample vectors by k-means from the root down.

Nodes lie level by level, the children of one side by side, so that a tree is three arrays. A node is a leaf where too
few samples are left for its children.

Units and shapes: samples [n, d] float32; of nodes their centroids [nodes, d] float32, their spreads [nodes] float32
(mean squared distance of their samples) and their parents [nodes] int32, -1 of the root.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memwall.compress.kmeans import kmeans, sample
from memwall.errors import InputError
from memwall.kernels.nearest import Nearest

MOST_LEVELS, MOST_BRANCHES = 60, 4096
_POINTS_PER_CENTROID = 256
"""More of them move a centroid no further: the rest of a node's samples are only assigned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """branching: children of the root; divisor and least_branching: a child has max(branching of its parent / divisor,
    least_branching) children. points_per_centroid: a node with fewer samples for each child it would have is a leaf;
    most_level: so is one at this level, the root's being 0.
    """

    branching: int = 32
    divisor: int = 2
    least_branching: int = 4
    points_per_centroid: int = 8
    most_level: int = 8
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "branching": (2, MOST_BRANCHES), "divisor": (1, MOST_BRANCHES), "least_branching": (2, MOST_BRANCHES),
            "points_per_centroid": (1, 1 << 20), "most_level": (0, MOST_LEVELS), "iterations": (1, 1000),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")

    def below(self, branching: int) -> int:
        """Branching of the children of a node with so many."""
        return max(branching // self.divisor, self.least_branching)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTree:
    """Arrays of nodes, see above."""

    centroids: np.ndarray
    spreads: np.ndarray
    parents: np.ndarray


def train_tree(x: np.ndarray, shape: TreeShape, progress: Callable[[int, int], None] | None = None) -> ClusterTree:
    """Learned from x, float32 [n, d] with n of 1 at least; progress: (samples done, all)."""
    if not len(x):
        raise InputError("a tree of clusters is learned from one vector at least")
    centroids, spreads, parents, levels = [x.mean(axis=0)], [], [-1], [0]
    waiting = [(0, np.arange(len(x)), shape.branching)]
    done = 0
    for number, held, branching in waiting:  # which grows
        spreads.append(float(np.square(x[held] - centroids[number]).sum(axis=1).mean()))
        groups = _groups(x[held], branching, shape, number) if _divides(held, branching, levels[number], shape) else []
        if len(groups) < 2:  # too few, or all of them the same
            done += len(held)
            if progress is not None:
                progress(done, len(x))
            continue
        for centroid, members in groups:
            waiting.append((len(centroids), held[members], shape.below(branching)))
            centroids.append(centroid)
            parents.append(number)
            levels.append(levels[number] + 1)
    return ClusterTree(
        centroids=np.stack(centroids).astype(np.float32),
        spreads=np.array(spreads, np.float32),
        parents=np.array(parents, np.int32),
    )


def _divides(held: np.ndarray, branching: int, level: int, shape: TreeShape) -> bool:
    return len(held) >= shape.points_per_centroid * branching and level < shape.most_level


def _groups(points: np.ndarray, branching: int, shape: TreeShape, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Centroids and members of the clusters that have any."""
    few = points[sample(len(points), _POINTS_PER_CENTROID * branching, shape.seed)]
    found = kmeans(few, branching, iterations=shape.iterations, tolerance=1e-3, seed=shape.seed + number)
    labels = Nearest(found.centroids).labels(points)
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=branching))
    starts = np.concatenate([[0], ends[:-1]])
    return [
        (found.centroids[label], order[start:end])
        for label, (start, end) in enumerate(zip(starts, ends, strict=True))
        if end > start
    ]
