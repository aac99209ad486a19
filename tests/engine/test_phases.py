"""Plans for two workers: what is under way is left alone, who has room goes on, those that came last give way."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.base import Shares, State, Step
from memwall.engine.phases import Split, phase_of, plan_phases
from tests.engine.phased_loads import HALVES, LIMITS, decoding, lanes, state, view


def work(step: Step) -> dict[int, int]:
    return {one.id: one.tokens for one in step.work}


def test_both_workers_get_their_own_requests() -> None:
    made = state(running=(decoding(0, 20), view(1, known=100, computed=64)), waiting=(view(2, known=200),))
    assert work(plan_phases(made, 1)) == {0: 1, 1: 36, 2: 28}
    assert plan_phases(made, 1).admit == (2,)
    assert [phase_of(one) for one in made.running] == ["decode", "prefill"]


def test_a_worker_that_is_busy_gets_nothing() -> None:
    running = (decoding(0, 20), view(1, known=100, computed=64))
    busy = state(running=running, lanes=lanes(idle=("decode",), flying=(1,)))
    assert work(plan_phases(busy, 1)) == {0: 1}
    other = state(running=running, waiting=(view(2, known=10),), lanes=lanes(idle=("prefill",), flying=(0,)))
    assert work(plan_phases(other, 1)) == {1: 36, 2: 10}


def test_decoding_does_not_shorten_chunks() -> None:
    running = tuple(decoding(number, 20) for number in range(7))
    assert work(plan_phases(state(running=running, waiting=(view(9, known=500),)), 1))[9] == LIMITS.token_budget


def test_an_order_of_whole_prompts_stops_at_the_first_that_does_not_fit() -> None:
    waiting = (view(0, known=50), view(1, known=10), view(2, known=4), view(3, known=400))
    step = plan_phases(state(waiting=waiting), 1, lambda one: (one.remaining,), whole=True)
    assert work(step) == {2: 4, 1: 10, 0: 50}
    only = plan_phases(state(waiting=(waiting[3], view(4, known=401))), 1, lambda one: (one.remaining,), whole=True)
    assert work(only) == {3: 64}


def test_the_last_that_is_not_under_way_gives_way() -> None:
    running = (decoding(0, 17), decoding(1, 33), decoding(2, 33))  # each needs a page
    tight = state(running=running, free_pages=0)
    step = plan_phases(tight, 1)
    assert [one.id for one in step.preempt] == [2]
    assert work(step) == {0: 1, 1: 1}
    flying = replace(tight, lanes=lanes(idle=("decode",), flying=(2,)))
    assert [one.id for one in plan_phases(flying, 1).preempt] == [1]
    alone = state(running=(decoding(0, 17),), free_pages=0)
    assert [one.id for one in plan_phases(alone, 1).preempt] == [0]


def test_a_budget_that_shrank_sets_those_aside_that_came_last() -> None:
    running = (decoding(0, 20), decoding(1, 40), decoding(2, 40))
    assert [one.id for one in plan_phases(state(running=running, free_pages=-4), 1).preempt] == [2, 1]


def test_a_prompt_enters_only_if_all_of_it_has_room_beside_what_is_promised() -> None:
    begun = view(0, known=160, computed=64)  # six more pages are promised to it
    waiting = (view(1, known=64),)
    assert plan_phases(state(running=(begun,), waiting=waiting, free_pages=12), 1).admit == ()
    limits = replace(LIMITS, token_budget=256)
    assert plan_phases(state(running=(begun,), waiting=waiting, free_pages=12, limits=limits), 1).admit == (1,)
    assert plan_phases(state(running=(begun,), waiting=waiting, free_pages=11, limits=limits), 1).admit == ()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_no_plan_takes_more_than_there_is_or_touches_what_is_under_way(seed: int) -> None:
    draw = random.Random(seed)
    running = tuple(
        decoding(number, draw.randint(2, 120))
        if draw.random() < 0.6
        else view(number, known=(known := draw.randint(2, 300)), computed=draw.randrange(known))
        for number in range(draw.randint(0, 8))
    )
    waiting = tuple(view(20 + number, known=draw.randint(1, 300)) for number in range(draw.randint(0, 5)))
    phase = draw.choice(["prefill", "decode", None])
    flying = tuple(one.id for one in running if phase is not None and phase_of(one) == phase and draw.random() < 0.8)
    idle = tuple(each for each in ("prefill", "decode") if each != phase or not flying)
    made: State = state(
        running=running, waiting=waiting, free_pages=draw.randint(-6, 40), lanes=lanes(idle=idle, flying=flying)
    )
    step = Split(shares=HALVES).plan_step(made, 0.0)
    assert step == Split(shares=HALVES).plan_step(made, 0.0)
    touched = {one.id for one in (*step.work, *step.preempt)} | set(step.admit)
    assert not touched & set(flying)
    gone = {one.id for one in step.preempt}
    assert not gone & {one.id for one in step.work}
    views = {one.id: one for one in (*running, *waiting)}
    free = made.free_pages + sum(views[number].freeable for number in gone)
    for one in step.work:
        told = views[one.id]
        assert 1 <= one.tokens <= told.remaining
        assert phase_of(told) in idle
        free -= max(LIMITS.pages(told.computed + one.tokens) - told.pages, 0)
    assert free >= min(made.free_pages, 0)
    assert len(running) - len(gone) + len(step.admit) <= max(LIMITS.max_sequences, len(running))
    chunks = sum(one.tokens for one in step.work if phase_of(views[one.id]) == "prefill")
    assert chunks <= LIMITS.token_budget


def test_shares_that_compete_are_scaled_to_the_whole() -> None:
    both = Shares(prefill=80, decode=100)
    assert both.effective("prefill") + both.effective("decode") == 100
    assert HALVES.effective("prefill") == 50
