"""Plans: the enumeration against one that looks at everything, the published example, and what devices hold."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit
from memwall.hardware.units import GB, GIB
from memwall.simulate.plans import CellPlan, ServingPlan, enumerate_plans, fitting_plans, room_of
from memwall.simulate.serving_model import Attention, Experts, Formats, ServedModel
from tests.simulate.cases import dense, llama_70b, sparse


def brute_force(model: ServedModel, devices: int) -> set[ServingPlan]:
    """All numbers up to `devices` for everything, the rules checked afterwards, written out from the paper's text."""
    found = set()
    counts = range(1, devices + 1)
    for replicas, stages in itertools.product(counts, counts):
        if devices % (replicas * stages) or model.blocks % stages:
            continue
        n = devices // replicas // stages
        options = []
        for cell in model.cells:
            mine = []
            for copies, over in itertools.product(counts, counts):
                if copies * over != n:
                    continue
                if isinstance(cell, Attention):
                    mine += [("heads", copies, over)] if over <= cell.heads else []
                elif isinstance(cell, Experts):
                    mine += [("tensor", copies, over)] if over <= cell.filters else []
                    mine += [("expert", copies, over)] if 1 < over <= cell.experts else []
                else:
                    mine += [("filters", copies, over)] if over <= cell.filters else []
            options.append(mine)
        for chosen in itertools.product(*options):
            copies = [one[1] for one in chosen]
            divide = all(max(a, b) % min(a, b) == 0 for a, b in zip(copies, copies[1:] + copies[:1]))
            attention = {one[1] for one, cell in zip(chosen, model.cells) if isinstance(cell, Attention)}
            if math.gcd(*copies) == 1 and divide and len(attention) <= 1:
                cells = tuple(CellPlan(replicas=c, devices=d, template=t) for t, c, d in chosen)
                found.add(ServingPlan(replicas=replicas, stages=stages, cells=cells))
    return found


@settings(max_examples=40, deadline=None)
@given(
    devices=st.integers(1, 24),
    blocks=st.sampled_from([1, 6, 8, 12]),
    heads=st.sampled_from([4, 8, 16]),
    experts=st.sampled_from([None, 2, 6, 8]),
    attentions=st.integers(1, 2),
)
def test_the_enumeration_is_that_of_brute_force(
    devices: int, blocks: int, heads: int, experts: int | None, attentions: int
) -> None:
    base = dense(blocks=blocks, heads=heads, kv_heads=2)
    cells = list(base.cells[:1]) * attentions + [base.cells[1]]
    if experts is not None:
        cells[-1] = Experts(hidden=512, filters=64, experts=experts, chosen=2)
    model = ServedModel(name="x", hidden=512, vocabulary=100, blocks=blocks, cells=tuple(cells))
    plans = list(enumerate_plans(model, devices))
    assert len(plans) == len(set(plans))
    assert set(plans) == brute_force(model, devices)
    assert all(plan.devices == devices for plan in plans)
    assert len({plan.name for plan in plans}) == len(plans)


def test_the_published_example_has_its_three_plans() -> None:
    fit, _ = fitting_plans(llama_70b(), 2, 80 * GIB, 2176)
    assert {plan.name for plan in fit} == {"TP2", "attention DP2 ffn TP2", "PP2"}


def test_the_number_of_plans_does_not_grow_with_the_blocks() -> None:
    assert len({len(list(enumerate_plans(dense(blocks=blocks), 16))) for blocks in (16, 64, 1024)}) == 1


def test_more_devices_than_kv_heads_copy_them() -> None:
    attention = Attention(hidden=8192, heads=64, kv_heads=8, head_size=128)
    assert (attention.share(8).heads, attention.share(8).kv_heads) == (8, 1)
    assert (attention.share(16).heads, attention.share(16).kv_heads) == (4, 1)
    # by hand: 8192 x 128 x (4 query + 4 output + 1 key + 1 value)
    assert attention.parameters(16) == 8192 * 128 * 10
    assert attention.kv_values(16) == 2 * 128
    assert 16 * attention.parameters(16) > attention.parameters(1) == 8 * attention.parameters(8)


@given(kv=st.sampled_from([1, 2, 3, 8]), group=st.integers(1, 8), devices=st.integers(1, 64))
def test_every_head_has_a_place(kv: int, group: int, devices: int) -> None:
    attention = Attention(hidden=64, heads=kv * group, kv_heads=kv, head_size=8)
    if not attention.templates(devices):
        assert devices > attention.heads
        return
    share = attention.share(devices)
    assert share.heads * devices >= attention.heads
    assert share.heads <= attention.heads
    assert 1 <= share.kv_heads <= share.heads


def test_memory_by_hand() -> None:
    model, plan = dense(), ServingPlan(
        replicas=1, stages=2,
        cells=(CellPlan(replicas=1, devices=2, template="heads"), CellPlan(replicas=2, devices=1, template="filters")),
    )  # fmt: skip
    room = room_of(plan, model, 2 * GB)
    attention = 512 * 64 * (2 * 4 + 2 * 2)
    network = 3 * 512 * 1536
    held = 2 * (4 * (attention + network) + 1000 * 512 // 2)
    assert room.parameter_bytes == held
    assert room.kv_bytes_per_token == 4 * 2 * (2 * 2 * 64)
    assert room.kv_tokens == (2 * GB - 1 * GB - held) // room.kv_bytes_per_token


@settings(max_examples=30, deadline=None)
@given(devices=st.sampled_from([1, 2, 4, 8]), gigabytes=st.floats(1.01, 3.0), bits=st.sampled_from(["float16", "int4"]))
def test_plans_that_fit_hold_no_more_than_a_device_has(devices: int, gigabytes: float, bits: str) -> None:
    base = sparse()
    model = ServedModel(
        name="x", hidden=512, vocabulary=1000, blocks=64, cells=base.cells, formats=Formats(weights=bits)
    )
    capacity = int(gigabytes * GB)
    try:
        fit, misfit = fitting_plans(model, devices, capacity, 512)
    except DoesNotFit:
        for plan in enumerate_plans(model, devices):
            assert room_of(plan, model, capacity).kv_tokens // plan.stages < 512
        return
    assert len(fit) + len(misfit) == len(list(enumerate_plans(model, devices)))
    for plan in fit:
        room = room_of(plan, model, capacity)
        assert room.parameter_bytes + 512 * plan.stages * room.kv_bytes_per_token + GB <= capacity
    for plan in misfit:
        assert room_of(plan, model, capacity).kv_tokens // plan.stages < 512


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(DoesNotFit, match=r"1 devices.*fits 2 of them"):
        fitting_plans(llama_70b(), 1, 80 * GIB, 2176)
