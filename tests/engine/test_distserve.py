"""DistServe's decisions: which prompts are pulled, who is swapped out, and that bursts never cross the memory."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.apart import ApartEngine
from memwall.engine.base import Costs, Limits, State
from memwall.engine.distserve import DistServe, Offer
from memwall.engine.kv_pages import KVPages
from memwall.engine.phase_device import VirtualWorkers
from memwall.engine.phased import Done
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Event, Request
from memwall.engine.simulated import Arrival, VirtualClock, replay, virtual_switcher
from memwall.errors import InputError
from memwall.memory import PagePool
from tests.engine.phased_loads import DEVICE, HALVES, LIMITS, SIZE, decoding, lanes, load, served, view

RULE = DistServe()


def apart(*, front: int = 60, back: int = 60, swap: int = 1000, rule: DistServe = RULE, **more: Any) -> ApartEngine:
    clock = VirtualClock()
    more = {"context_tokens": 16 * min(front, back), "costs": Costs(), **more}
    limits = more.pop("limits", LIMITS)
    pages = KVPages(PagePool("kv/pages", page_bytes=1, most_pages=back), limits.page_tokens, keep_prefixes=False)
    own = KVPages(PagePool("kv/prefill", page_bytes=1, most_pages=front), limits.page_tokens)
    workers = VirtualWorkers(clock, DEVICE, SIZE, HALVES)
    return ApartEngine(
        rule, workers, pages, limits=limits, front_pages=own, front_limits=limits,
        switch=virtual_switcher(pages, swap, clock), clock=clock, **more,
    )  # fmt: skip


def state(phase: str, **told: Any) -> State:
    return State(**{"free_pages": 100, "total_pages": 100, "limits": LIMITS, "lanes": lanes(idle=(phase,)), **told})


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({}, True),
        ({"waiting": 5}, False),  # 5 % of 100
        ({"waiting": 4}, True),
        ({"free": 9}, False),
        ({"free": 10}, True),
        ({"free": 12, "running": 2}, False),  # a page for each, and for itself
        ({"free": 13, "running": 2}, True),
        ({"set_aside": True}, False),
    ],
)
def test_the_rule_of_acceptance(told: dict[str, Any], taken: bool) -> None:
    assert RULE.accepts(Offer(**{"need": 10, "free": 50, "total": 100, **told})) is taken


def test_prompts_go_in_batches_near_what_fills_the_device() -> None:
    waiting = tuple(view(number, known=known) for number, known in enumerate((30, 30, 30, 10)))
    step = RULE.plan_step(state("prefill", waiting=waiting), 0.0)
    assert [(work.id, work.tokens) for work in step.work] == [(0, 30), (1, 30)]  # the third would be cut
    long = (view(0, known=200), view(1, known=10))
    step = RULE.plan_step(state("prefill", waiting=long), 0.0)
    assert [(work.id, work.tokens) for work in step.work] == [(0, 64)]  # longer than a batch: by itself


def test_prefill_takes_no_prompt_that_does_not_fit_beside_what_is_held() -> None:
    waiting = (view(0, known=60),)
    assert not RULE.plan_step(state("prefill", waiting=waiting, free_pages=3), 0.0).admit
    assert RULE.plan_step(state("prefill", waiting=waiting, free_pages=4), 0.0).admit == (0,)


def test_the_last_is_swapped_out_and_comes_back_first() -> None:
    running = (decoding(1, 33), decoding(2, 33))
    step = RULE.plan_step(state("decode", running=running, free_pages=0, swap_free_pages=10), 0.0)
    assert [(one.id, one.by) for one in step.preempt] == [(2, "swap")]
    assert [work.id for work in step.work] == [1]
    step = RULE.plan_step(state("decode", running=running, free_pages=0), 0.0)  # nowhere to put it
    assert [(one.id, one.by) for one in step.preempt] == [(2, "recompute")]
    back = RULE.plan_step(state("decode", running=running[:1], swapped=(decoding(2, 33),), free_pages=10), 0.0)
    assert back.resume == (2,)


def test_a_batch_holds_so_many_and_the_rest_waits_in_its_pages() -> None:
    running = tuple(decoding(number, 20) for number in range(LIMITS.max_sequences + 3))
    step = RULE.plan_step(state("decode", running=running), 0.0)
    assert [work.id for work in step.work] == list(range(LIMITS.max_sequences))


def check(engine: ApartEngine) -> None:
    """Every page is somebody's, once, and none is beyond the limit."""
    back, front = engine.pages, engine.front.pages
    held = [*engine.running.values(), *(one for one, _ in engine._pulling.values())]
    own = [*engine.front.running.values(), *engine.offered.values()]
    there = sum(len(one.pages) for one in held)
    assert there == back.pool.used_pages <= back.pool.limit_pages
    sources = sum(len(source) for _, source in engine._pulling.values())
    kept = {page for one in own for page in one.pages}
    kept |= {page for _, source in engine._pulling.values() for page in source}
    assert len(kept) <= sum(len(one.pages) for one in own) + sources
    assert len(kept) + front.idle_pages == front.pool.used_pages <= front.pool.limit_pages


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), front=st.integers(35, 90), back=st.integers(35, 90), swap=st.sampled_from([0, 20, 1000]),
    rate=st.sampled_from([5.0, 500.0]),
)  # fmt: skip
def test_bursts_never_cross_the_memory_and_nothing_is_lost(
    seed: int, front: int, back: int, swap: int, rate: float
) -> None:
    made = apart(front=front, back=back, swap=swap)
    draw = random.Random(seed)
    step, cancelled = made.step, []

    def watched() -> list[Event]:
        events = step()
        check(made)
        if draw.random() < 0.02 and made.everyone():
            one = draw.choice(made.everyone())
            cancelled.append(one.id)
            event = made.cancel(one.id)
            events += [event] if event is not None else []
            check(made)
        return events

    made.step = watched  # type: ignore[method-assign]
    sequences, events = served(made, load(24, rate, seed=seed))
    ends = {event.id: event.finish for event in events if event.finish is not None}
    assert set(ends) == {one.id for one in sequences}
    assert all(ends[one.id] == "length" or one.id in cancelled for one in sequences)
    for one in sequences:
        if ends[one.id] == "length":
            assert one.num_made == one.request.sampling.max_new_tokens
    assert made.pages.pool.used_pages == 0
    assert made.front.pages.pool.used_pages == made.front.pages.idle_pages
    assert not made.offered
    assert not made._doomed


def test_a_full_decode_side_holds_prompts_back() -> None:
    made = apart(front=40, back=40, limits=Limits(token_budget=64, max_sequences=8, page_tokens=16))
    arrivals = [
        Arrival(at=0.0, request=Request(prompt=(5,) * 150, sampling=Sampling(max_new_tokens=200, ignore_eos=True)))
        for _ in range(12)
    ]  # fmt: skip
    most = 0

    def watch(*told: Any) -> None:
        nonlocal most
        most = max(most, len(made.offered))

    made.front.observer = watch
    made.front.pages.keep_prefixes = False
    assert isinstance(made.clock, VirtualClock)
    replay(made, made.clock, arrivals)
    assert most >= 3  # 10 pages each: the prefill side is full of finished prompts
    assert made.pages.pool.peak_pages <= 40
    assert made.totals.preempted["swap"] > 0
    assert made.totals.finished == {"length": 12}
    assert made.moves.requests == 12 + made.totals.preempted["recompute"]


class Unsteady(VirtualWorkers):
    """Loses a worker with its memory now and then, beside what the other is doing."""

    draw = random.Random(0)

    def collect(self, until: float | None = None, *, wait: bool = True) -> list[Done]:
        found: list[Done] = []
        for done in super().collect(until, wait=wait):
            fate = self.draw.random()
            if fate < 0.1:
                found.append(replace(done, outputs=None, emptied=fate < 0.07))
            else:
                found.append(done)
            if 0.1 < fate < 0.13 and done.phase == "decode" and "prefill" not in self._flights:
                found.append(Done("prefill", [], None, 0.0, emptied=True))
        return found


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), back=st.integers(35, 90))
def test_memories_that_are_lost_cost_no_request(seed: int, back: int) -> None:
    made = apart(front=60, back=back, swap=0)
    assert isinstance(made.clock, VirtualClock)
    workers = Unsteady(made.clock, DEVICE, SIZE, HALVES)
    workers.draw = random.Random(seed)
    for side in (made, made.front):
        side.workers = side.executor = workers
    step = made.step

    def watched() -> list[Event]:
        events = step()
        check(made)
        return events

    made.step = watched  # type: ignore[method-assign]
    sequences, events = served(made, load(16, 50.0, seed=seed))
    assert {event.id for event in events if event.finish == "length"} == {one.id for one in sequences}
    assert all(one.num_made == one.request.sampling.max_new_tokens for one in sequences)
    assert made.pages.pool.used_pages == 0
    assert made.front.pages.pool.used_pages == made.front.pages.idle_pages


def test_a_pull_whose_source_is_gone_is_a_prompt_again() -> None:
    made = apart(swap=0)
    sampling = Sampling(max_new_tokens=9, ignore_eos=True)
    one = made.submit(Request(prompt=(5,) * 40, sampling=sampling), 0.0)
    while not made._pulling:
        made._take_in(made.workers.collect())
        made._hand_out(made.clock())
    [job] = made.workers.collect()
    made._take_in([Done("prefill", [], None, 0.0, emptied=True)])
    assert one.id in made._pulling  # its bytes may be on their way
    made._take_in([replace(job, outputs=None)])
    assert one.id in made.front.waiting
    assert one.computed == 0
    check(made)
    while made.busy:
        made.step()
    assert one.num_made == 9


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="a waiting share of 0"):
        DistServe(waiting_share=0)
    with pytest.raises(InputError, match="-1 spare pages"):
        DistServe(spare_pages=-1)
