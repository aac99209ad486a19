"""Context switches: nothing is lost or counted twice, and whoever was moved makes what it makes alone."""

from __future__ import annotations

import errno
import os
import random
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine import Sampling
from memwall.engine.base import Costs, Limits
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.fastswitch import FastSwitch
from memwall.engine.priorities import PriorityTrace
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.simulated import Arrival, StepCost, VirtualClock, replay, simulated_engine
from memwall.engine.stream import Link, VirtualStream
from memwall.engine.swap import Copies
from memwall.engine.switching import SwitchSettings
from memwall.memory import PagePool
from memwall.models import DEMO_DIRECTORY

PAGE = 16
LIMITS = Limits(token_budget=64, max_sequences=6, page_tokens=PAGE)
COSTS = Costs(seconds_per_token=1.0, seconds_per_page=1e-6)
SWITCH = SwitchSettings(group_pages=4, keep_turns=True, reuse=True)


def prompts(count: int, seed: int = 3) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(8, 4000) for _ in range(draw.randint(5, 45))) for _ in range(count)]


def asked(prompt: tuple[int, ...], made: int, **changes: object) -> Request:
    return Request(prompt=prompt, sampling=Sampling(max_new_tokens=made, ignore_eos=True), **changes)  # type: ignore[arg-type]


def serving(switch: SwitchSettings = SWITCH, **changes: object) -> Serving:
    chosen = {
        "weights": "int4", "context_tokens": 160, "token_budget": 48, "threads": 1, "max_sequences": 4,
        "keep_prefixes": False, "switch": switch, **changes,
    }  # fmt: skip
    held = load_engine(
        DEMO_DIRECTORY,
        ServingSettings(**chosen),  # type: ignore[arg-type]
        scheduler=FastSwitch(short=0.0, busy=0.0),
        priorities=PriorityTrace("random", frequency=0.25),
    )
    held.engine.costs, held.engine._measures = COSTS, False
    held.engine.wanted_pages = 16
    held.engine.fit_limit()
    return held


def finish(held: Serving, requests: list[Request]) -> list[list[int]]:
    sequences = [held.engine.submit(request) for request in requests]
    while held.engine.busy:
        held.engine.step()
    return [list(one.made) for one in sequences]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pages that became free hold NaN from then on; how many there were."""
    dropped, count = PagePool.drop, [0]

    def drop(pool: PagePool, pages: list[int]) -> list[int]:
        freed = dropped(pool, pages)
        for page in freed:
            pool.page(page).view(np.float16)[:] = np.nan
        count[0] += len(freed)
        return freed

    monkeypatch.setattr(PagePool, "drop", drop)
    return count


def alone(requests: list[Request], **changes: object) -> list[list[int]]:
    held = serving(**changes)  # type: ignore[arg-type]
    made = [finish(held, [request])[0] for request in requests]
    assert not held.engine.totals.preempted
    held.release()
    return made


@pytest.mark.parametrize("link", [None, Link(bytes_per_s=2e7, seconds_per_copy=1e-4)])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("changes", [{}, {"kv": "int4", "token_budget": 512}], ids=["rows", "blocks"])
def test_swapped_requests_make_what_each_makes_alone(
    poisoned: list[int], link: Link | None, overlap: bool, changes: dict[str, object]
) -> None:
    requests = [asked(prompt, 30 - number) for number, prompt in enumerate(prompts(9))]
    held = serving(SwitchSettings(group_pages=4, keep_turns=True, reuse=True, link=link), **changes)
    held.engine.scheduler = FastSwitch(overlap=overlap, short=0.0, busy=0.0)
    assert finish(held, requests) == alone(requests, **changes)
    counts = held.engine.switch.counts
    assert counts.switched >= 3
    assert poisoned[0] > 0
    assert (counts.overlapped > 0) == overlap
    assert held.pool.used_pages == 0
    assert held.engine.swap.free_pages == held.engine.swap.capacity_pages
    assert held.pool.peak_pages <= 16
    held.release()


def test_steps_run_while_pages_are_copied_and_none_is_given_away_before(poisoned: list[int]) -> None:
    requests = [asked(prompt, 30) for prompt in prompts(8, 5)]
    held = serving(SwitchSettings(group_pages=4, link=Link(bytes_per_s=5e6)))
    assert finish(held, requests) == alone(requests)
    counts = held.engine.switch.counts
    assert poisoned[0] > 0
    assert counts.steps_during > 0
    held.release()


def test_the_next_turn_copies_out_what_is_new_and_reads_the_rest_back() -> None:
    held = serving(context_tokens=256)
    prompt = prompts(1)[0]
    (first,) = finish(held, [asked(prompt, 40, session="a")])
    counts = held.engine.switch.counts
    held.engine.switch.settle()
    kept = (len(prompt) + 39) // PAGE
    assert counts.out_bytes == kept * held.pool.page_bytes
    assert held.pool.used_pages == 0
    longer = (*prompt, *first, *prompts(1, 9)[0])
    (second,) = finish(held, [asked(longer, 40, session="a")])
    assert counts.restored_tokens == kept * PAGE
    new = (len(longer) + 39) // PAGE - kept
    assert counts.out_bytes == (kept + new) * held.pool.page_bytes
    assert counts.clean_bytes == kept * held.pool.page_bytes
    assert [second] == alone([asked(longer, 40)])
    assert held.engine.swap.free_pages == held.engine.swap.capacity_pages - kept - new
    held.release()


def test_copies_of_low_priority_go_first_and_are_sent_again() -> None:
    held = serving(swap_bytes=12 * serving_page_bytes())
    ones = prompts(3)
    first = finish(held, [asked(ones[0], 60, session="a", priority=1)])[0]
    finish(held, [asked(ones[1], 60, session="b")])
    held.engine.switch.settle()
    counts = held.engine.switch.counts
    assert counts.kept == 2
    assert counts.contaminated_pages == 0
    finish(held, [asked(ones[2], 60, session="c")])
    held.engine.switch.settle()
    assert counts.contaminated_pages > 0
    next_turn = (*ones[0], *first, 77)
    again = asked(next_turn, 20, session="a")
    (made,) = finish(held, [again])
    assert [made] == alone([asked(next_turn, 20)])
    assert counts.restored_tokens < (len(next_turn) - 1) // PAGE * PAGE  # only the clean beginning
    assert held.engine.swap.free_pages >= 0
    held.release()


def serving_page_bytes() -> int:
    held = serving()
    held.release()
    return held.pool.page_bytes


@pytest.mark.parametrize(("call", "after"), [("pwrite", 0), ("pwrite", 2), ("preadv", 0), ("preadv", 2)])
def test_a_disk_that_fails_beside_steps_costs_no_request(
    monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    working, calls, lock = getattr(os, call), [0], threading.Lock()

    def failing(*arguments: Any) -> int:
        with lock:
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(working(*arguments))

    requests = [asked(prompt, 30, session=f"s{number}") for number, prompt in enumerate(prompts(8))]
    wanted = alone(requests, exact=True)  # where a prompt is computed again, rounded activations differ
    held = serving(exact=True)
    monkeypatch.setattr(os, call, failing)
    assert finish(held, requests) == wanted
    assert calls[0] > after
    held.engine.switch.settle()
    assert held.pool.used_pages == 0
    held.release()


def test_a_disk_budget_below_the_area_costs_no_request() -> None:
    requests = [asked(prompt, 30) for prompt in prompts(8)]
    wanted = alone(requests, exact=True)  # where a prompt is computed again, rounded activations differ
    held = serving(exact=True)
    held.arena.beside("disk").set_cap(5 * held.pool.page_bytes)
    assert finish(held, requests) == wanted
    assert held.arena.beside("disk").used_bytes <= 5 * held.pool.page_bytes
    assert held.engine.totals.preempted["recompute"] > 0
    assert held.pool.used_pages == 0
    held.release()


class Timed:
    """A real executor whose steps take the time that the cost model says; see test_simulated."""

    def __init__(self, inner: object, clock: VirtualClock) -> None:
        self.inner, self.clock = inner, clock

    def run(self, batch: list[Entry]) -> list[Output | None]:
        outputs: list[Output | None] = self.inner.run(batch)  # type: ignore[attr-defined]
        self.clock.now += StepCost().of(batch)
        return [None if output is None else Output(0) for output in outputs]

    def forget(self, sequence: Sequence) -> None:
        self.inner.forget(sequence)  # type: ignore[attr-defined]


def test_engine_and_simulator_switch_alike() -> None:
    link, seen, counts = Link(bytes_per_s=1e7, seconds_per_copy=1e-3), [], []
    arrivals = [
        Arrival(at=0.02 * number, request=asked(prompt, 30, session=f"s{number % 7}"))
        for number, prompt in enumerate(prompts(14))
    ]
    for real in (True, False):
        clock, decisions = VirtualClock(), []
        if real:
            held = serving()
            engine, costs = held.engine, COSTS
            engine.clock = engine.switch.clock = clock
            engine.executor = Timed(engine.executor, clock)
            engine.switch._out, engine.switch._into = (VirtualStream(clock, link.seconds) for _ in range(2))
        else:
            engine = simulated_engine(
                held.engine.scheduler, num_pages=16, page_bytes=held.pool.page_bytes, limits=held.engine.limits,
                context_tokens=160, costs=costs, priorities=PriorityTrace("random", frequency=0.25),
                swap_pages=held.engine.swap.capacity_pages, switch=replace(SWITCH, link=link),
                keep_prefixes=False,
            )  # fmt: skip
            clock = engine.clock
        engine.observer = lambda state, step, into=decisions: into.append((state, step))
        replay(engine, clock, arrivals)
        seen.append(decisions)
        counts.append(engine.switch.counts)
    assert [step for _, step in seen[0]] == [step for _, step in seen[1]]
    assert [state for state, _ in seen[0]] == [state for state, _ in seen[1]]
    assert counts[0] == counts[1]
    assert counts[0].overlapped > 0
    held.release()


def check(engine: Engine) -> None:
    """Each page is free, kept for its beginning, a request's, or on its way out; each place free or a copy's."""
    switch, pool = engine.switch, engine.pages.pool
    held = {page for one in (*engine.running.values(), *engine.swapped.values()) for page in one.pages}
    assert pool.used_pages == len(held | set(switch._leaving_pages)) + engine.pages.idle_pages
    assert pool.used_pages <= pool.limit_pages
    places = [place for copy in switch._copies.values() for place in copy.places]
    assert len(places) == len(set(places))
    assert set(places) == switch.area._used
    assert 0 <= switch.area.free_pages <= switch.free_pages <= switch.area.capacity_pages
    for one in engine.running.values():
        assert len(one.pages) * PAGE >= one.computed
    for copy in switch._copies.values():
        assert copy.clean <= len(copy.places)
        assert not copy.needed or copy.owner is not None
    assert len(engine.running) <= engine.limits.max_sequences


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    group_pages=st.sampled_from([0, 1, 6]),
    reuse=st.booleans(),
    overlap=st.booleans(),
    swap_pages=st.sampled_from([0, 7, 40]),
    keep_prefixes=st.booleans(),
)
def test_a_random_walk_loses_nothing_and_everyone_ends(
    seed: int, group_pages: int, reuse: bool, overlap: bool, swap_pages: int, keep_prefixes: bool
) -> None:
    draw = random.Random(seed)
    engine = simulated_engine(
        FastSwitch(overlap=overlap, busy=draw.choice([0.0, 0.5])),
        num_pages=30, limits=LIMITS, context_tokens=400, keep_prefixes=keep_prefixes,
        swap_pages=swap_pages,
        switch=SwitchSettings(
            link=Link(bytes_per_s=1000.0, seconds_per_copy=2e-3), group_pages=group_pages, keep_turns=seed % 3 > 0,
            reuse=reuse,
        ),
        costs=Costs(seconds_per_token=1.0, seconds_per_page=1e-3, seconds_per_step=5e-3),
        priorities=PriorityTrace(draw.choice(["random", "markov"]), frequency=0.2, seed=seed),
    )  # fmt: skip
    ends: dict[int, str] = {}
    turns: dict[str, tuple[int, ...]] = {}
    submitted = steps = 0
    while submitted < 20 or engine.busy:
        if submitted < 20 and draw.random() < 0.3:
            name = draw.choice("abcdefgh")
            prompt = (*turns.get(name, ()), *(draw.randrange(100) for _ in range(draw.randint(1, 60))))[-200:]
            turns[name] = (*prompt, *([0] * 20))
            session = name if draw.random() < 0.7 else None
            engine.submit(asked(prompt, draw.randint(1, 40), session=session))
            submitted += 1
        if draw.random() < 0.02 and engine.num_requests:
            event = engine.cancel(draw.choice([*engine.running, *engine.waiting, *engine.swapped]))
            assert event is not None
            ends[event.id] = "cancelled"
        if draw.random() < 0.05:
            engine.wanted_pages = draw.choice([26, 30])
        before = engine.totals.steps
        for event in engine.step():
            if event.finish is not None:
                assert event.id not in ends
                ends[event.id] = event.finish
        if engine.totals.steps == before:
            engine.clock.now += 1e-3  # type: ignore[attr-defined]
        check(engine)
        steps += 1
        assert steps < 20_000, "requests starve"
    assert len(ends) == submitted
    engine.switch.settle()
    assert engine.pages.pool.used_pages == engine.pages.idle_pages
    if seed % 3 == 0:
        assert engine.swap.free_pages == engine.swap.capacity_pages


def test_a_step_waits_for_nothing_but_a_conflict_where_copies_run_beside_it() -> None:
    """On a virtual clock: with overlap the same trace stalls less, and steps run while copies are under way."""
    stalls = {}
    for overlap in (False, True):
        engine = simulated_engine(
            FastSwitch(overlap=overlap), num_pages=30, limits=LIMITS, context_tokens=400, keep_prefixes=False,
            swap_pages=200, switch=SwitchSettings(link=Link(bytes_per_s=2000.0)),
            costs=Costs(seconds_per_token=1.0, seconds_per_page=1e-3, seconds_per_step=5e-3),
            priorities=PriorityTrace("random", frequency=0.1),
        )  # fmt: skip
        arrivals = [Arrival(at=0.05 * number, request=asked(one, 60)) for number, one in enumerate(prompts(20))]
        replay(engine, engine.clock, arrivals)  # type: ignore[arg-type]
        stalls[overlap] = engine.switch.counts.stall_seconds
        assert (engine.switch.counts.steps_during > 0) == overlap
    assert stalls[True] < stalls[False] / 2


def test_whoever_needs_pages_that_are_being_copied_out_waits_for_the_oldest_copy_alone() -> None:
    engine = simulated_engine(
        FastSwitch(), num_pages=8, limits=LIMITS, keep_prefixes=False, swap_pages=20,
        switch=SwitchSettings(link=Link(bytes_per_s=1.0)),
    )  # fmt: skip
    ones = [engine.submit(asked((1,) * 40, 9)) for _ in range(2)]
    engine.step()
    clock, pages = engine.clock, engine.pages
    began = clock()
    for one in ones:
        assert engine.switch.out(engine.running.pop(one.id), wait=False)
    assert pages.available_pages == 8
    assert pages.pool.free_pages == 3
    assert len(pages.take(3)) == 3
    assert clock() == began  # there were free ones
    assert len(pages.take(1)) == 1
    assert clock() == began + 3  # the first one's three pages, not the second's
    assert engine.switch.counts.conflicts == 1
    assert engine.switch.active
    clock.now += 1  # type: ignore[attr-defined]
    fetched = ones[0]
    engine.switch.back(fetched, 3)  # takes what is still on its way out, and comes after that
    assert clock() == began + 4
    engine.switch.wait_for(fetched)
    assert clock() == began + 5 + 3


def test_a_virtual_task_takes_what_its_link_says() -> None:
    clock = VirtualClock()
    stream = VirtualStream(clock, Link(bytes_per_s=100.0, seconds_per_copy=0.5).seconds)
    copies = Copies(4, 2, 200, lambda: None)
    first, second = stream.submit(copies), stream.submit(copies)
    assert not first.done
    first.wait()
    assert clock.now == 4.0
    assert first.done
    assert not second.done
    second.wait()
    assert clock.now == 8.0
