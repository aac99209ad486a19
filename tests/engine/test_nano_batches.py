"""Nano-batches give the bits of one batch: by any schedule, on any lanes, with the other half behind a slow wire."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from memwall import _native, kernels
from memwall.engine import Sampling, nano_batches
from memwall.engine.nano_batches import Plan, alternating, in_blocks, nano_decoder, two_phases
from memwall.engine.nano_schedule import Edge, NanoOperation, Placed, Schedule, edges_of, in_turn, turns_of
from memwall.engine.nano_wire import Link, wire_pair
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY

PROMPTS = [tuple(range(10 + n, 10 + n + 5 + 9 * n)) for n in range(8)]


def serving(**changes: Any) -> Serving:
    told = {"weights": "int8", "context_tokens": 256, "max_sequences": 8, "token_budget": 40, **changes}
    return load_engine(DEMO_DIRECTORY, ServingSettings(**told))


def texts(held: Serving) -> list[list[int]]:
    made = [
        held.engine.submit(Request(prompt=p, sampling=Sampling(temperature=0.0, max_new_tokens=12, ignore_eos=True)))
        for p in PROMPTS
    ]
    while held.engine.busy:
        held.engine.step()
    return [list(one.made) for one in made]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    held = serving()
    try:
        return texts(held)
    finally:
        held.release()


def searched() -> Schedule:
    """As the search gives it: decoding tokens first, an own split of attention."""
    ranges = {
        "kqv": [(0, 640), (640, 2048)], "decode": [(0, 640), (640, 1408)], "prefill": [(1408, 2048)],
        "o": [(0, 640), (640, 2048)], "up_gate": [(0, 640), (640, 2048)], "down": [(0, 640), (640, 2048)],
    }  # fmt: skip
    placed = [
        Placed(
            operation=NanoOperation(
                name=name, resource="memory" if name == "decode" else "compute", first=a, end=b, index=i
            ),
            share=0.5, start=step + 0.3 * i, seconds=0.3,
        )
        for step, (name, spans) in enumerate(ranges.items()) for i, (a, b) in enumerate(spans)
    ]  # fmt: skip
    return Schedule.by_starts(placed, (), 6.0, 2048)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (alternating(2), {}),
        (alternating(3), {"lanes": {"compute": 1, "memory": 1}}),
        (two_phases(), {"lanes": {"compute": 1, "memory": 1}}),
        (two_phases(), {"overlap": False}),
        (in_blocks(2), {"lanes": {"compute": 1, "memory": 1}}),
        (searched(), {"lanes": {"compute": 2, "memory": 1}}),
    ],
    ids=["alternating", "thirds on lanes", "phases on lanes", "without overlap", "blocks", "searched"],
)
def test_the_same_tokens_as_one_batch(schedule: Schedule, told: dict[str, Any], plain: list[list[int]]) -> None:
    held = serving()
    decoder = nano_decoder(held, schedule, **told)
    decoder.trace = []
    assert texts(held) == plain
    assert {one.operation.name for one in decoder.trace} == {"kqv", "decode", "prefill", "o", "up_gate", "down"}
    held.release()


def test_plans_are_kept_for_some_shapes_and_not_for_all(
    monkeypatch: pytest.MonkeyPatch, plain: list[list[int]]
) -> None:
    monkeypatch.setattr(nano_batches, "MOST_PLANS", 2)
    held = serving()
    decoder = nano_decoder(held, alternating(2))
    assert texts(held) == plain
    assert 0 < len(decoder._plans) <= 2
    held.release()


def test_more_rows_than_a_block_have_a_place_each(plain: list[list[int]]) -> None:
    held = serving(token_budget=200)
    nano_decoder(held, alternating(2))
    assert texts(held) == plain
    held.release()


def test_classes_run_beside_each_other_and_a_fault_ends_the_step() -> None:
    held = serving()
    decoder = nano_decoder(held, two_phases(), lanes={"compute": 1, "memory": 1})
    texts(held)
    whole = decoder._do_attend

    def failing(index: int, *others: Any) -> None:
        if index == 1:
            raise RuntimeError("a fault")
        whole(index, *others)

    decoder._do_attend = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a fault"):
        texts(held)
    held.engine.abandon()
    del decoder._do_attend
    held.release()


def test_scratch_of_the_lanes_is_on_the_ledger() -> None:
    def scratch() -> int:
        return sum(row.nbytes for row in held.ledger.rows() if row.owner == "kernels/scratch")

    held = serving()
    shared = scratch()
    decoder = nano_decoder(held, two_phases(), lanes={"compute": 1, "memory": 1})
    one_each = scratch()
    assert one_each > shared
    decoder.pipeline(two_phases(), lanes={"compute": 2, "memory": 1})
    assert scratch() > one_each
    decoder.pipeline(two_phases(), overlap=False, lanes={"compute": 1, "memory": 1})
    assert shared < scratch() < one_each
    held.release()
    assert scratch() == 0


def test_blocks_that_fill_in_order_are_refused() -> None:
    held = serving(kv="int4")
    with pytest.raises(InputError, match="--kv int4"):
        nano_decoder(held, two_phases())
    held.release()


def test_a_plan_keeps_what_waits_for_what() -> None:
    plan = Plan.of(searched(), 5, 40, network=False)
    spans = {(one.name, one.index): (one.first, one.end) for one in plan.operations}
    assert spans["decode", 0] == (0, 2)
    assert spans["o", 0] == (0, 2)
    assert spans["prefill", 0] == (5, 40)
    only_prompts = Plan.of(two_phases(), 0, 40, network=False)
    assert "decode" not in {one.name for one in only_prompts.operations}


def test_turns_of_a_stream_by_hand() -> None:
    turns = turns_of({0: 0.0, 1: 2.5, 2: 1.0}, 2.0)
    assert turns == ((0, 0), (1, 1), (2, 0))  # 1 runs half a unit into the next layer's round
    assert in_turn(turns, 2) == [(0, 0), (2, 0), (0, 1), (1, 0), (2, 1), (1, 1)]
    one = NanoOperation(name="a", resource="compute", first=0, end=4)
    two = NanoOperation(name="b", resource="compute", first=3, end=9)
    three = NanoOperation(name="b", resource="compute", first=4, end=9)
    assert edges_of([one, two, three], {"b": ("a",)}, {}) == [Edge(parent=0, child=1)]


def test_a_wire_sums_both_ways_after_its_delay_and_tells_who_is_gone() -> None:
    one, two = wire_pair(8, Link(delay_seconds=1e-3, bytes_per_s=1e6))
    told: list[np.ndarray] = []
    other = threading.Thread(
        target=lambda: [told.append(two.exchange(np.full(4, k, np.float32)).copy()) for k in range(5)]
    )
    other.start()
    mine = [one.exchange(np.full(4, 10 + k, np.float32)).copy() for k in range(5)]
    other.join()
    assert [int(x[0]) for x in mine] == [0, 1, 2, 3, 4]
    assert [int(x[0]) for x in told] == [10, 11, 12, 13, 14]
    assert one.waited_seconds > 0
    with pytest.raises(ValueError, match="9 numbers"):
        one.exchange(np.zeros(9, np.float32))
    two.close()
    with pytest.raises(OSError):
        one.exchange(np.zeros(4, np.float32))
    with pytest.raises(InputError, match="neither may be below 0"):
        Link(delay_seconds=-1)


def test_lanes_belong_to_the_thread_and_change_no_bit() -> None:
    _native.set_lane_threads(1)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(_native.lane_threads()))
    thread.start(), thread.join()
    assert _native.lane_threads() == 1
    assert seen == [0]
    _native.set_lane_threads(99)
    assert _native.lane_threads() == kernels.num_threads()
    _native.set_lane_threads(0)


def test_models_with_experts_and_no_parts_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        alternating(0)


def test_blocks_leave_no_sum_to_be_waited_for_at_once() -> None:
    turns = in_blocks(2, network=True)
    order = [(turns.placed[at].operation.name, turns.placed[at].operation.index) for at, _ in turns.stream("compute")]
    names = [(name, part) for name, part in order if name != "prefill"]
    assert names == [
        ("kqv", 0), ("o", 0), ("kqv", 1), ("o", 1), ("up_gate", 0), ("down", 0), ("up_gate", 1), ("down", 1),
    ]  # fmt: skip
    sums = [(turns.placed[at].operation.name, turns.placed[at].operation.index) for at, _ in turns.stream("network")]
    assert sums == [("reduce1", 0), ("reduce1", 1), ("reduce2", 0), ("reduce2", 1)]
    assert not any(shift for name in turns.turns for _, shift in turns.stream(name))
