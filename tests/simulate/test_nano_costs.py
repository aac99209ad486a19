"""NanoFlow's cost model against the paper's table, and against hand counts."""

from __future__ import annotations

import pytest

from memwall.errors import InputError
from memwall.hardware import load_machine
from memwall.simulate.nano_costs import (
    ESTIMATED_MS,
    PLACEMENTS,
    Batch,
    Node,
    bound_of,
    layer_of,
    operation_table,
    optimal,
)
from memwall.simulate.serving_model import Attention, Experts, FeedForward, ServedModel

LLAMA_70B = ServedModel(
    name="LLaMA-2-70B", hidden=8192, vocabulary=32000, blocks=80,
    cells=(Attention(hidden=8192, heads=64, kv_heads=8, head_size=128), FeedForward(hidden=8192, filters=28672)),
)  # fmt: skip
A100S = Node(
    name="8 A100", devices=8, flop_per_s=312e12, bytes_per_s=2e12, link_bytes_per_s=300e9, capacity_bytes=80 * 1000**3,
    profiled_flop_per_s=260e12,
)  # fmt: skip
BATCH = Batch(tokens=2048, prompt=512, output=1024)


def test_every_estimate_of_the_paper_s_table() -> None:
    rows = {row.name: row for row in operation_table(LLAMA_70B, A100S, BATCH)}
    told = {  # GFLOP, GB
        "kqv": (27487.8, 19.5), "o": (21990.2, 16.1), "up_gate": (153931.6, 96.6), "down": (76965.8, 49.7),
        "decode": (3665.9, 462.2), "prefill": (916.3, 2.1), "network": (0.0, 75.2),
    }  # fmt: skip
    assert set(rows) == set(told)
    for name, (gflop, gbytes) in told.items():
        row = rows[name]
        assert row.flop / 1000**3 == pytest.approx(gflop, rel=0.02)
        assert (row.nbytes or row.link_bytes) / 1000**3 == pytest.approx(gbytes, rel=0.02)
        assert 1e3 * row.estimate == pytest.approx(ESTIMATED_MS[name], rel=0.02)


def test_the_bound_by_hand() -> None:
    bound = bound_of(LLAMA_70B, A100S, 2048)
    assert bound.memory == pytest.approx(80 / 2000)
    assert bound.compute == pytest.approx(2 * 2048 * LLAMA_70B.active_parameters / (8 * 312e12))
    assert bound.network == pytest.approx(4 * 8 * 2048 * 8192 * 2 * 80 / (8 * 300e9))
    assert bound.limit == "compute"
    assert bound.ratio < 1
    assert bound.optimal_tokens_per_s == pytest.approx(1857, rel=0.02)
    assert optimal(260e12, 70e9) == pytest.approx(1857.1, rel=1e-4)


def test_a_short_batch_is_bound_by_memory_and_one_device_has_no_network() -> None:
    assert bound_of(LLAMA_70B, A100S, 256).limit == "memory"
    alone = Node.of(load_machine("a100-80gb"), 1)
    assert bound_of(LLAMA_70B, alone, 2048).network == 0
    assert "network" not in {row.name for row in operation_table(LLAMA_70B, alone, BATCH)}
    assert [one.name for one in layer_of(LLAMA_70B, alone, BATCH)] == [
        "kqv",
        "decode",
        "prefill",
        "o",
        "up_gate",
        "down",
    ]


def test_experts_read_all_and_multiply_with_the_chosen() -> None:
    dense, sparse = (
        ServedModel(
            name="x", hidden=4096, vocabulary=32000, blocks=2,
            cells=(Attention(hidden=4096, heads=32, kv_heads=8, head_size=128), network),
        )
        for network in (FeedForward(hidden=4096, filters=8192), Experts(hidden=4096, filters=8192, experts=8, chosen=2))
    )  # fmt: skip
    one, two = ({row.name: row for row in operation_table(model, A100S, BATCH)} for model in (dense, sparse))
    assert two["up_gate"].flop == 2 * one["up_gate"].flop
    assert two["up_gate"].weight_bytes == 8 * one["up_gate"].weight_bytes


def test_a_layer_sums_to_the_table_and_both_placements_move_as_much() -> None:
    whole = {}
    for placement in PLACEMENTS:
        layer = layer_of(LLAMA_70B, A100S, BATCH, placement, measured={"network": 0.04})
        whole[placement] = sum(one.whole for one in layer if one.resource == "network")
        names = {one.name for one in layer}
        assert all(set(one.parents) | set(one.before) <= names for one in layer)
    assert whole["gather"] == pytest.approx(whole["reduce"])
    assert whole["reduce"] == pytest.approx(0.04 / 80)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"prompt": 0.0}, {"output": -1.0}])
def test_bad_batches_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="above 0"):
        Batch(**{"tokens": 8, "prompt": 1.0, "output": 1.0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gather, reduce"):
        layer_of(LLAMA_70B, A100S, BATCH, "scatter")
    with pytest.raises(InputError, match="whose peak"):
        Node.of(load_machine("a100-80gb"), 1, profiled=400e12)
