"""Orders of channels by hand, and that ranges are runs whatever the sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress.sort_cluster import contiguous_kmeans, sort_and_cluster, ward


def test_by_hand() -> None:
    # two groups of two heads of three channels; in the first group the second head is the smaller one
    sizes = np.array([9, 1, 1, 0.1, 0.3, 0.2, 5, 5, 5, 1, 2, 3], np.float32)
    order = sort_and_cluster(sizes, 4, 2, 2, 2)
    assert order.heads.tolist() == [1, 0, 3, 2]
    assert order.channels.tolist() == [3, 5, 4, 1, 2, 0, 9, 10, 11, 6, 7, 8]
    assert order.head_sizes.tolist() == [[1, 1], [1, 1]]
    assert order.channel_sizes[0, 1].tolist() == [2, 1]  # 1, 1 and 9
    assert order.channel_sizes.sum(axis=2).tolist() == [[3, 3], [3, 3]]


def test_ward_puts_likes_together() -> None:
    points = np.array([[0, 0], [10, 10], [0.1, 0], [10, 10.2], [5, 5]])
    labels = ward(points, 3)
    assert labels[0] == labels[2]
    assert labels[1] == labels[3]
    assert len(set(labels)) == 3
    assert ward(points, 9).tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_clusters_of_points_in_order_are_runs(seed: int, count: int, width: int, clusters: int) -> None:
    points = np.sort(np.random.default_rng(seed).exponential(size=(count, width)).round(1), axis=0)
    sizes = contiguous_kmeans(points, clusters)  # asserts monotone labels
    assert sizes.sum() == count
    assert len(sizes) == clusters


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 30), st.sampled_from([(4, 2, 5), (6, 1, 8), (3, 3, 2)]))
def test_heads_stay_in_their_group_and_channels_in_their_head(seed: int, shape: tuple[int, int, int]) -> None:
    heads, groups, width = shape
    sizes = np.random.default_rng(seed).exponential(size=heads * width)
    order = sort_and_cluster(sizes, heads, groups, 4, 4)
    per = heads // groups
    assert (order.heads // per == np.repeat(np.arange(groups), per)).all()
    assert (order.channels // width == np.repeat(order.heads, width)).all()
    assert sorted(order.channels) == list(range(heads * width))
    assert order.head_sizes.sum(axis=1).tolist() == [per] * groups
    assert (order.channel_sizes.sum(axis=2) == width).all()
    assert (np.diff(sizes[order.channels].reshape(heads, width), axis=1) >= 0).all()
