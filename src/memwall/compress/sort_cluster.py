"""Sort and cluster: an order of channels and heads in which neighbours are of like size, so that few scales fit them.

Source: "Quamba2" (Hung-Yueh Chiang, 2025, arXiv 2503.22879), section 4.2.
Idea: inside each head channels are sorted by size; heads whose sorted profiles look alike are put together (Ward's
agglomerative clustering, in each SSD group, as B and C are shared there); and in each such cluster of heads the sorted
places are cut into ranges by k-means. What is sorted stays sorted, so a range is a run of neighbours and its scale one
number.

Units and shapes: sizes [E] of channels, E = H * P; H heads of P channels in G groups.
Differs from the paper: the official code cuts channels before it puts heads in order, which looks like a slip; here
ranges are those of the heads as they lie. Where a group has fewer heads than clusters, the last ones are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """channels [E], heads [H]: which old one comes to each place. head_sizes [G, n_h]: heads in each cluster;
    channel_sizes [G, n_h, n_d]: channels of a head in each range.
    """

    channels: np.ndarray
    heads: np.ndarray
    head_sizes: np.ndarray
    channel_sizes: np.ndarray


def sort_and_cluster(
    sizes: np.ndarray, num_heads: int, num_groups: int, head_ranges: int, channel_ranges: int
) -> Order:
    """The order for channels of these sizes; heads stay in their group."""
    per_group, width = num_heads // num_groups, len(sizes) // num_heads
    by_head = sizes.reshape(num_heads, width)
    inside = np.argsort(by_head, axis=1, kind="stable")
    ordered = np.take_along_axis(by_head, inside, axis=1)
    lengths = np.linalg.norm(ordered, axis=1, keepdims=True)
    profiles = ordered / np.where(lengths > 0, lengths, 1)
    heads: list[int] = []
    head_sizes = np.zeros((num_groups, head_ranges), np.int64)
    channel_sizes = np.zeros((num_groups, head_ranges, channel_ranges), np.int64)
    channel_sizes[:, :, 0] = width  # of empty clusters too, so that sizes always add up
    for group in range(num_groups):
        first = group * per_group
        labels = ward(profiles[first : first + per_group], head_ranges)
        clusters = [first + np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
        clusters.sort(key=lambda members: float(ordered[members].max()))
        for place, members in enumerate(clusters):
            heads += members.tolist()
            head_sizes[group, place] = len(members)
            channel_sizes[group, place] = contiguous_kmeans(ordered[members].T, channel_ranges)
    order = np.array(heads)
    channels = (order[:, None] * width + inside[order]).reshape(-1)
    return Order(channels=channels, heads=order, head_sizes=head_sizes, channel_sizes=channel_sizes)


def ward(points: np.ndarray, num_clusters: int) -> np.ndarray:
    """Labels [n] from 0 of points [n, d]: of all pairs the one is merged that adds least to the squared distances to
    their means, until `num_clusters` (or n) are left (J. H. Ward, 1963).
    """
    centres = points.astype(np.float64)
    counts = np.ones(len(points))
    labels = np.arange(len(points))
    alive = np.ones(len(points), bool)
    while alive.sum() > num_clusters:
        at = np.flatnonzero(alive)
        squares = ((centres[at, None] - centres[None, at]) ** 2).sum(-1)
        weight = counts[at, None] * counts[None, at] / (counts[at, None] + counts[None, at])
        cost = squares * weight
        np.fill_diagonal(cost, np.inf)
        one, other = at[np.array(np.unravel_index(int(cost.argmin()), cost.shape))]
        total = counts[one] + counts[other]
        centres[one] = (counts[one] * centres[one] + counts[other] * centres[other]) / total
        counts[one], alive[other] = total, False
        labels[labels == other] = one
    return np.unique(labels, return_inverse=True)[1]


def contiguous_kmeans(points: np.ndarray, num_clusters: int) -> np.ndarray:
    """Sizes [num_clusters] of the runs into which k-means cuts points [n, d] that do not fall along any coordinate.

    Centres begin at evenly spaced points. Of such points and centres in order, a later point is never nearer to an
    earlier centre, so every cluster is a run.
    """
    starts = np.linspace(0, len(points) - 1, num_clusters).round().astype(int)
    centres = points[starts].astype(np.float64)
    labels = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        distances = ((points[:, None] - centres[None]) ** 2).sum(-1)
        nearest = distances.argmin(axis=1)
        if (nearest == labels).all():
            break
        labels = nearest
        for label in np.unique(labels):
            centres[label] = points[labels == label].mean(axis=0)
    assert (np.diff(labels) >= 0).all(), "points were not in order"
    return np.bincount(labels, minlength=num_clusters)
