"""Collectives by formula, and groups of devices over nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware import load_machine
from memwall.simulate.base import Device, Operation
from memwall.simulate.cluster import (
    BASE_SECONDS,
    NETWORK_STEP_SECONDS,
    STEP_SECONDS,
    Cluster,
    LinkModel,
)

DEVICE = Device(name="x", flop_per_s={"float16": 1e12}, bytes_per_s=1e11, capacity_bytes=10**9, watts=100.0)
CLUSTER = Cluster(device=DEVICE, nodes=4, per_node=8, link_bytes_per_s=1e11, network_bytes_per_s=1e10)
LINKS = LinkModel(cluster=CLUSTER, efficiency=1.0)


def test_a_ring_inside_a_node_by_hand() -> None:
    # 4 devices, 8 MB: each of 2 x 3 steps moves 2 MB over 100 GB/s
    assert LINKS.seconds("all_reduce", 1, 4, 8e6) == pytest.approx(BASE_SECONDS + 6 * (STEP_SECONDS + 2e6 / 1e11))
    assert LINKS.seconds("all_gather", 1, 4, 8e6) == pytest.approx(BASE_SECONDS + 3 * (STEP_SECONDS + 2e6 / 1e11))
    assert LINKS.seconds("alltoall", 1, 4, 8e6) == pytest.approx(BASE_SECONDS + 3 * (STEP_SECONDS + 2e6 / 1e11))
    assert LINKS.seconds("sendrecv", 1, 2, 8e6) == pytest.approx(BASE_SECONDS + STEP_SECONDS + 8e6 / 1e11)


def test_over_nodes_each_device_sends_its_part_only() -> None:
    # 2 nodes of 8: 1/8 of 8 MB goes round a ring of two nodes over 10 GB/s
    inside = 7 * (STEP_SECONDS + 1e6 / 1e11)
    outside = NETWORK_STEP_SECONDS + 1e6 / 2 / 1e10
    assert LINKS.seconds("reduce_scatter", 2, 8, 8e6) == pytest.approx(BASE_SECONDS + inside + outside)


@given(
    kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "alltoall"]),
    nodes=st.integers(1, 8),
    per_node=st.integers(1, 8),
    nbytes=st.floats(0, 1e9),
)
def test_collectives_grow_with_bytes_and_devices(kind: str, nodes: int, per_node: int, nbytes: float) -> None:
    seconds = LINKS.seconds(kind, nodes, per_node, nbytes)
    if nodes * per_node == 1:
        assert seconds == 0
        return
    assert seconds >= BASE_SECONDS
    assert LINKS.seconds(kind, nodes, per_node, 2 * nbytes) >= seconds
    assert LINKS.seconds(kind, nodes + 1, per_node, nbytes) >= seconds
    halves = LINKS.seconds("reduce_scatter", nodes, per_node, nbytes) + LINKS.seconds(
        "all_gather", nodes, per_node, nbytes
    )
    assert LINKS.seconds("all_reduce", nodes, per_node, nbytes) == pytest.approx(halves - BASE_SECONDS)


def test_groups_stay_inside_a_node_as_long_as_they_can() -> None:
    assert [CLUSTER.group(n) for n in (1, 4, 8, 16, 32)] == [(1, 1), (1, 4), (1, 8), (2, 8), (4, 8)]


def test_other_operations_are_not_its_matter() -> None:
    gemm = Operation(name="x", kind="gemm", dtype="float16", shape=(1, 1, 1))
    assert LINKS.cost(gemm) is None
    reduce = Operation(name="x", kind="all_reduce", dtype="float16", shape=(1, 2), link_bytes=1e6, repeat=3)
    cost = LINKS.cost(reduce)
    assert cost is not None
    assert cost.seconds == pytest.approx(3 * LINKS.seconds("all_reduce", 1, 2, 1e6))
    assert 0 < cost.joules < cost.seconds * 100


def test_a_cluster_from_a_preset_and_what_it_lacks() -> None:
    cluster = Cluster.of(load_machine("h100-sxm"), per_node=8)
    assert cluster.devices == 8
    assert cluster.link_bytes_per_s == 450e9
    assert Cluster.of(load_machine("v100-pcie-16gb"), nodes=2, per_node=4).network_bytes_per_s == 1.25e9 / 4
    with pytest.raises(InputError, match="--network"):
        Cluster.of(load_machine("h100-sxm"), nodes=2, per_node=8)
    with pytest.raises(InputError, match="--link"):
        Cluster.of(load_machine("cloud-2core"), per_node=2)
    with pytest.raises(InputError, match="at least 1"):
        Cluster(device=DEVICE, nodes=0)
