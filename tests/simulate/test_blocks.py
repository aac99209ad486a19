"""Operations of a block by hand, and the collectives between cells."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.engine.executor import Entry
from memwall.engine.sequence import Request
from memwall.engine.sequence import Sequence as Running
from memwall.simulate.base import Operation, Priced, Roofline
from memwall.simulate.blocks import BatchShape, StepTimer
from memwall.simulate.cluster import LinkModel
from memwall.simulate.plans import CellPlan, ServingPlan, enumerate_plans
from memwall.simulate.serving_model import Formats, ServedModel
from tests.simulate.cases import dense, h100, llama_70b, sparse


def timer(model: ServedModel, plan: ServingPlan, devices: int = 8) -> StepTimer:
    cluster = h100(per_node=devices)
    return StepTimer(
        model, plan, cluster, Priced([("a", Roofline(device=cluster.device)), ("b", LinkModel(cluster=cluster))])
    )


def plan_of(*cells: tuple[int, int, str], stages: int = 1) -> ServingPlan:
    return ServingPlan(
        replicas=1, stages=stages,
        cells=tuple(CellPlan(replicas=r, devices=d, template=t) for r, d, t in cells),  # type: ignore[arg-type]
    )  # fmt: skip


def collectives(plan: ServingPlan, model: ServedModel, shapes: list[BatchShape]) -> list[tuple[str, int, float]]:
    """(kind, devices, rows) of each."""
    row = model.hidden * model.formats.activation_bytes
    return [
        (one.kind, int(one.shape[0] * one.shape[1]), one.link_bytes / row)
        for one in timer(model, plan).block(shapes)
        if one.kind not in ("gemm", "attention", "pass")
    ]


DECODES = BatchShape(decodes=8, cached=800, sampled=8)


def test_equal_replicas_add_up() -> None:
    plan = plan_of((1, 4, "heads"), (1, 4, "filters"))
    assert collectives(plan, dense(), [DECODES]) == [("all_reduce", 4, 8), ("all_reduce", 4, 8)]
    assert collectives(plan_of((1, 1, "heads"), (1, 1, "filters")), dense(), [DECODES]) == []


def test_halves_of_the_logits_are_gathered() -> None:
    model = dense()
    for devices in (1, 4):
        plan = plan_of((1, devices, "heads"), (1, devices, "filters"))
        told = [one for one in timer(model, plan).head([DECODES]) if one.kind == "all_gather"]
        assert [(one.shape, one.link_bytes) for one in told] == (
            [((1.0, 4.0), 8 * 4 * model.vocabulary)] if devices > 1 else []
        )


def test_more_and_fewer_replicas() -> None:
    # attention in 2 replicas of 2, one feed-forward network over 4: up to it and back
    plan = plan_of((2, 2, "heads"), (1, 4, "filters"))
    assert collectives(plan, dense(), [DECODES, DECODES]) == [
        ("reduce_scatter", 2, 8), ("all_gather", 4, 16),
        ("reduce_scatter", 4, 16), ("all_gather", 2, 8),
    ]  # fmt: skip
    whole = plan_of((4, 1, "heads"), (1, 4, "filters"))
    assert collectives(whole, dense(), [DECODES] * 4) == [("all_gather", 4, 32), ("reduce_scatter", 4, 32)]


def test_experts_are_sent_to_and_come_back() -> None:
    plan = plan_of((1, 4, "heads"), (1, 4, "expert"))
    # 8 rows lie in 4 parts of 2; each goes to 2 experts
    assert collectives(plan, sparse(chosen=2), [DECODES]) == [
        ("reduce_scatter", 4, 8), ("alltoall", 4, 4), ("alltoall", 4, 4), ("all_gather", 4, 8)
    ]  # fmt: skip
    # no more copies than devices
    assert ("alltoall", 2, 8) in collectives(plan_of((1, 2, "heads"), (1, 2, "expert")), sparse(chosen=4), [DECODES])


def operations(model: ServedModel, plan: ServingPlan, shape: BatchShape) -> dict[str, Operation]:
    return {one.name: one for one in timer(model, plan).block([shape])}


def test_operations_of_a_decoding_batch_by_hand() -> None:
    found = operations(llama_70b(), plan_of((1, 8, "heads"), (1, 8, "filters")), DECODES)
    assert found["qkv"].shape == ((8 + 2) * 128, 8192, 8)
    assert found["out"].shape == (8192, 8 * 128, 8)
    assert found["up"].shape == (2 * 3584, 8192, 8)
    assert found["down"].shape == (8192, 3584, 8)
    attention = found["decode attention"]
    assert attention.shape == (128, 8, 1, 8, 1, 100)
    assert attention.flop == 4 * 800 * 8 * 128
    assert attention.tier_bytes == 800 * 2 * 1 * 128 * 2
    assert "prompt attention" not in found
    assert found["qkv"].tier_bytes == pytest.approx(1280 * 8192 * 2 + 8 * (1280 + 8192) * 2)


def test_operations_of_a_prompt_by_hand() -> None:
    one = Running(id=0, request=Request(prompt=(0,) * 10), arrival=0.0, eos=())
    shape = BatchShape.of([Entry(one, 0, 10, True), Entry(one, 20, 1, True)])
    assert shape == BatchShape(
        prompts=1, prompt_tokens=10, prompt_keys=55, last_keys=10, decodes=1, cached=21, sampled=2
    )
    found = operations(dense(), plan_of((1, 1, "heads"), (1, 1, "filters")), shape)
    assert found["prompt attention"].flop == 4 * 55 * 8 * 64
    assert found["prompt attention"].shape == (64, 8, 4, 1, 10, 10)
    assert found["qkv"].shape[2] == 11


def test_few_tokens_meet_few_experts() -> None:
    plan = plan_of((1, 1, "heads"), (1, 1, "tensor"))
    one = operations(sparse(experts=8), plan, BatchShape(decodes=1, cached=5, sampled=1))["expert up"]
    many = operations(sparse(experts=8), plan, BatchShape(decodes=400, cached=5, sampled=1))["expert up"]
    assert one.repeat == pytest.approx(2)
    assert one.shape[2] == pytest.approx(1)
    assert many.repeat == pytest.approx(8)
    assert many.shape[2] == pytest.approx(100)
    spread = operations(sparse(experts=8), plan_of((1, 4, "heads"), (1, 4, "expert")), DECODES)["expert up"]
    assert spread.repeat < 2.0001
    assert spread.shape[0] == 2 * 768


def test_the_widest_format_is_computed_with() -> None:
    assert Formats(weights="int4").compute == "float16"
    assert Formats(weights="float8", kv="float8", activations="float8").compute == "float8"
    assert Formats(weights="int8", kv="float16", activations="float32").compute == "float32"
    assert Formats(weights="int8", kv="int8", activations="int8").compute == "int8"
    assert Formats(weights="int4", kv="float8").attention == "float16"


@given(decodes=st.integers(0, 200), cached=st.integers(0, 1000), prompts=st.integers(0, 3), index=st.integers(0, 1000))
def test_times_are_positive_and_grow_with_work(decodes: int, cached: int, prompts: int, index: int) -> None:
    model = sparse()
    plans = list(enumerate_plans(model, 8))
    plan = plans[index % len(plans)]

    def shape(extra: int) -> BatchShape:
        count = decodes + extra
        return BatchShape(
            prompts=prompts, prompt_tokens=40 * prompts, prompt_keys=820.0 * prompts, last_keys=40 * prompts,
            decodes=count, cached=count * (1 + cached), sampled=count + prompts,
        )  # fmt: skip

    clock = timer(model, plan)
    less, more = (clock.step([shape(extra)] * plan.cells[0].replicas) for extra in (0, 128))
    assert len(less.stages) == plan.stages
    assert all(0 < a <= b * (1 + 1e-9) for a, b in zip(less.stages, more.stages))
    assert (less.send > 0) == (plan.stages > 1)
    assert less.joules <= more.joules * (1 + 1e-9)
    inside = sum(seconds for name, seconds in less.by_operator.items() if name != "send")
    assert inside == pytest.approx(sum(less.stages))
