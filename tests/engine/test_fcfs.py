"""First come, first served: decisions on states written out by hand, and a random walk of the whole engine."""

from __future__ import annotations

import random

import pytest

from memwall.engine.base import Costs, Limits, Preempt, RequestView, State, Step, Work
from memwall.engine.core import Engine
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.engine.simulated import Arrival, StepCost, VirtualClock, replay, simulated_engine

LIMITS = Limits(token_budget=32, max_sequences=4, page_tokens=16)


def view(number: int, prompt: int, computed: int = 0, made: int = 0, **changes: object) -> RequestView:
    pages = -(-computed // 16)
    values: dict[str, object] = {
        "id": number, "arrival": float(number), "prompt": prompt, "known": prompt + made, "computed": computed,
        "most_tokens": prompt + 50, "pages": pages, "freeable": pages, **changes,
    }  # fmt: skip
    return RequestView(**values)  # type: ignore[arg-type]


def plan(**state: object) -> Step:
    return FirstComeFirstServed().plan_step(
        State(**{"free_pages": 100, "total_pages": 100, "limits": LIMITS, **state}),  # type: ignore[arg-type]
        0.0,
    )


def test_decoding_comes_first_and_the_oldest_prompt_gets_the_rest() -> None:
    step = plan(running=(view(1, 100, 16), view(2, 10, 10, 1), view(3, 100, 0)), waiting=(view(4, 5),))
    assert step.work == (Work(id=1, tokens=31), Work(id=2, tokens=1))
    assert not step.admit


def test_what_waits_is_admitted_in_order_with_what_the_step_has_left() -> None:
    step = plan(waiting=(view(2, 40), view(1, 20), view(3, 5)))
    assert step.admit == (1, 2)
    assert step.work == (Work(id=1, tokens=20), Work(id=2, tokens=12))


def test_priority_goes_before_arrival() -> None:
    step = plan(waiting=(view(1, 20), view(2, 20, priority=-1)))
    assert step.admit == (2, 1)


def test_a_prompt_waits_until_all_of_it_has_room_and_nobody_passes_it() -> None:
    assert plan(waiting=(view(1, 100), view(2, 5)), free_pages=6).admit == ()
    assert plan(waiting=(view(1, 100), view(2, 5)), free_pages=7).admit == (1,)


def test_room_promised_to_a_prompt_that_has_begun_is_not_given_away() -> None:
    assert plan(running=(view(1, 96, 16),), waiting=(view(2, 5),), free_pages=6).admit == ()


def test_a_kept_beginning_is_neither_computed_nor_paid_for() -> None:
    step = plan(waiting=(view(1, 100, hit=96, hit_idle=0),), free_pages=1)
    assert step.work == (Work(id=1, tokens=4),)
    assert plan(waiting=(view(1, 100, hit=96, hit_idle=1),), free_pages=1).admit == ()


def test_the_last_that_came_gives_way() -> None:
    step = plan(running=(view(1, 16, 16, 1), view(2, 16, 16, 1), view(3, 20, 20, 1)), free_pages=0)
    assert step.preempt == (Preempt(id=3, by="recompute"),)
    assert step.work == (Work(id=1, tokens=1), Work(id=2, tokens=1))


@pytest.mark.parametrize(
    ("seconds_per_page", "room", "by"), [(1.0, 9, "swap"), (10.0, 9, "recompute"), (1.0, 1, "recompute")]
)
def test_cost_and_room_choose_how(seconds_per_page: float, room: int, by: str) -> None:
    costs = Costs(seconds_per_token=1.0, seconds_per_page=seconds_per_page)
    step = plan(running=(view(1, 16, 16, 1), view(2, 32, 32, 1)), free_pages=0, swap_free_pages=room, costs=costs)
    assert step.preempt == (Preempt(id=2, by=by),)


def test_a_shrunken_budget_sets_aside_from_the_last() -> None:
    step = plan(running=(view(1, 32, 32, 1), view(2, 32, 32, 1), view(3, 32, 32, 1)), free_pages=-3)
    assert [one.id for one in step.preempt] == [3, 2]
    assert step.work == (Work(id=1, tokens=1),)


def walk(seed: int) -> None:
    """Random requests, cancellations and limits; after every step nothing is counted twice or lost."""
    draw = random.Random(seed)
    engine = simulated_engine(
        FirstComeFirstServed(), num_pages=40, limits=LIMITS, context_tokens=400, swap_pages=draw.choice([0, 30])
    )
    clock = engine.clock
    assert isinstance(clock, VirtualClock)
    ends: dict[int, str] = {}
    made: dict[int, int] = {}
    wanted: dict[int, int] = {}
    for _ in range(400):
        if draw.random() < 0.25 and engine.num_requests < 12:
            prompt = (*range(draw.choice([0, 100]), draw.randint(101, 180)), draw.randint(0, 99))
            most = draw.randint(1, 60)
            request = Request(
                prompt=prompt, priority=draw.choice([0, 0, 1]), sampling=Sampling(max_new_tokens=most, ignore_eos=True)
            )
            wanted[engine.submit(request).id] = most
        if draw.random() < 0.02 and engine.num_requests:
            number = draw.choice([*engine.running, *engine.waiting, *engine.swapped])
            event = engine.cancel(number)
            assert event is not None
            ends[number] = "cancelled"
        if draw.random() < 0.05:
            engine.wanted_pages = draw.choice([26, 30, 40])
        follow(engine, made, ends)
    engine.wanted_pages = 40
    steps = 0
    while engine.busy:
        follow(engine, made, ends)
        steps += 1
        assert steps < 20000, "requests starve"
    for number, most in wanted.items():
        assert ends[number] == "cancelled" or (ends[number] == "length" and made[number] == most)
    assert engine.pages.pool.used_pages == engine.pages.idle_pages
    assert engine.swap is None or engine.swap.free_pages == engine.swap.capacity_pages


def follow(engine: Engine, made: dict[int, int], ends: dict[int, str]) -> None:
    for event in engine.step():
        assert event.id not in ends
        made[event.id] = made.get(event.id, 0) + (event.token is not None)
        if event.finish is not None:
            ends[event.id] = event.finish
    pool = engine.pages.pool
    held: dict[int, int] = {}
    for one in engine.running.values():
        assert len(one.pages) * 16 >= one.computed
        for page in one.pages:
            held[page] = held.get(page, 0) + 1
    for page, holders in held.items():
        assert pool.uses(page) == holders
    assert pool.used_pages == len(held) + engine.pages.idle_pages
    assert pool.used_pages <= pool.limit_pages
    assert len(engine.running) <= LIMITS.max_sequences


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_loses_nothing_and_everyone_ends(seed: int) -> None:
    walk(seed)


def test_a_deadline_ends_a_request_that_waits() -> None:
    engine = simulated_engine(FirstComeFirstServed(), num_pages=10, limits=LIMITS, cost=StepCost(seconds=1.0))
    clock = engine.clock
    assert isinstance(clock, VirtualClock)
    sampling = Sampling(max_new_tokens=50, ignore_eos=True)
    arrivals = [
        Arrival(at=0.0, request=Request(prompt=(1,) * 100, sampling=sampling)),
        Arrival(at=0.0, request=Request(prompt=(1,) * 90, sampling=sampling, until=3.0)),
    ]
    events = replay(engine, clock, arrivals)
    assert [(event.id, event.finish) for event in events if event.finish] == [(1, "cancelled"), (0, "length")]
