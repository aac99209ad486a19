"""Two processes with a memory each: the same tokens as one, also under pressure and when a process is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from memwall.engine.apart import ApartEngine
from memwall.engine.base import Costs, Phase, State, Step
from memwall.engine.executor import Entry
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.hand_over import Pull
from memwall.engine.phase_device import VirtualWorkers
from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.phased import Done
from memwall.engine.sequence import Event
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.simulated import VirtualClock, replay
from memwall.engine.workers import ForkedWorkers
from memwall.errors import BudgetExceeded, InputError, MemwallError
from memwall.memory import Budget
from memwall.models import DEMO_DIRECTORY
from tests.engine.phased_loads import DEVICE, HALVES, SIZE, load
from tests.engine.test_distserve import apart as virtual_apart
from tests.engine.test_workers import Both, requests, start, tokens_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
APART = PhaseSettings.apart(2)


def apart(serving: Serving) -> ApartEngine:
    assert isinstance(serving.engine, ApartEngine)
    assert serving.workers is not None
    return serving.engine


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    alone = start(None)
    found = tokens_of(alone)
    alone.release()
    return found


@pytest.fixture
def serving() -> Iterator[Serving]:
    made = start(APART)
    yield made
    made.release()


def nothing_is_held(engine: ApartEngine) -> bool:
    own = engine.front.pages
    return engine.pages.pool.used_pages == 0 and own.pool.used_pages == own.idle_pages


def test_tokens_are_those_of_one_process_and_each_prompt_is_moved_once(
    serving: Serving, expected: list[tuple[int, ...]]
) -> None:
    engine, seen = apart(serving), []  # type: ignore[var-annotated]
    engine.on_done = seen.append
    engine.front.on_done = seen.append
    assert tokens_of(serving) == expected
    overlaps = sum(a.began < b.ended and b.began < a.ended for a in seen for b in seen if a.phase < b.phase)
    assert overlaps > 0
    assert engine.moves.requests == 10
    pages = sum(engine.limits.pages(len(request.prompt)) for request in requests())
    assert engine.moves.nbytes == pages * serving.pool.page_bytes
    assert nothing_is_held(engine)


def test_a_beginning_that_the_prefill_side_kept_is_not_computed_again(serving: Serving) -> None:
    engine, prompt = apart(serving), requests()[1]
    for _ in range(2):
        engine.submit(prompt)
        while engine.busy:
            engine.step()
    assert engine.totals.prefix_hits >= len(prompt.prompt) // 16 * 16 - 16


@pytest.mark.parametrize("swap_bytes", [0, 1 << 26])
def test_tokens_stay_the_same_when_the_decode_side_is_short_of_memory(
    swap_bytes: int, expected: list[tuple[int, ...]]
) -> None:
    made = start(APART, swap_bytes=swap_bytes, max_sequences=16)
    engine = apart(made)
    made.govern = lambda: None  # type: ignore[method-assign]
    engine.wanted_pages = 26  # a request of the whole context takes 25
    engine.fit_limit()
    assert tokens_of(made) == expected
    assert made.pool.peak_pages <= 26
    assert nothing_is_held(engine)
    made.release()


def kill(workers: ForkedWorkers, phase: Phase, times: int) -> list[int]:
    """The phase's process never comes to answer, so often: the decode side's in the midst of a pull at first."""
    start_batch, killed = workers.start, []  # type: ignore[var-annotated]

    def doomed(which: Phase, batch: list[Entry], pulls: Sequence[Pull] = ()) -> None:
        if len(killed) == times or which != phase or not (pulls or which == "prefill" or killed):
            start_batch(which, batch, pulls)
            return
        killed.append(workers._process[which].pid)
        os.kill(killed[-1], signal.SIGSTOP)
        start_batch(which, batch, pulls)
        os.kill(killed[-1], signal.SIGKILL)

    workers.start = doomed  # type: ignore[assignment, method-assign]
    return killed


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_process_that_is_killed_costs_no_request(
    serving: Serving, phase: Phase, expected: list[tuple[int, ...]]
) -> None:
    engine, workers = apart(serving), serving.workers
    assert workers is not None
    killed = kill(workers, phase, 2)  # three in a row would end the requests
    assert tokens_of(serving) == expected
    assert len(killed) == workers.lost == 2
    assert nothing_is_held(engine)


def test_a_process_that_dies_again_and_again_ends_its_requests_with_an_error(serving: Serving) -> None:
    engine, workers = apart(serving), serving.workers
    assert workers is not None
    for request in requests(4):
        engine.submit(request)
    kill(workers, "decode", 3)

    def go() -> None:
        while engine.busy:
            engine.step()

    with pytest.raises(MemwallError, match="decode worker failed 3 times in a row"):
        go()
    events = engine.abandon()
    assert {event.finish for event in events if event.finish not in (None, "length")} == {"error"}
    assert not engine.busy
    assert nothing_is_held(engine)
    [one] = [engine.submit(request) for request in requests(1)]  # the next ones go well
    while engine.busy:
        engine.step()
    assert one.finish == "length"


def test_cancelling_frees_both_sides(serving: Serving) -> None:
    engine = apart(serving)
    sequences = [engine.submit(request) for request in requests(8)]
    events: list[Event] = []
    steps = 0
    while engine.busy:
        events += engine.step()
        steps += 1
        if steps % 2 == 0 and (open_ := [one for one in sequences[::2] if one.finish is None]):
            event = engine.cancel(open_[steps % len(open_)].id)
            events += [event] if event is not None else []
    ends = {event.id: event.finish for event in events if event.finish is not None}
    assert set(ends) == {one.id for one in sequences}
    assert all(ends[one.id] == "length" for one in sequences[1::2])
    assert nothing_is_held(engine)


def test_memories_are_on_the_ledger_and_a_budget_holds_both() -> None:
    made = start(APART)
    rows = {row.owner: row.nbytes for row in made.ledger.rows()}
    assert made.prefill_pool is not None
    assert rows["kv/prefill"] >= made.prefill_pool.limit_pages * made.pool.page_bytes > 0
    least = made.least_budget_bytes()
    made.release()
    with pytest.raises(BudgetExceeded):
        start(APART, budget=Budget(tiers={"ram": least - 6 * 1000 * 1000}))
    fitting = start(APART, budget=Budget(tiers={"ram": least + 12 * 1000 * 1000}))
    tokens_of(fitting, lambda steps: fitting.govern())
    assert fitting.budget_bytes is not None
    fitting.release()


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="prefill_room is 1"):
        PhaseSettings.apart(2, prefill_room=1)
    settings = ServingSettings(weights="int8", context_tokens=256, phases=APART)
    with pytest.raises(InputError, match="FirstComeFirstServed plans for one memory"):
        load_engine(DEMO_DIRECTORY, settings, scheduler=FirstComeFirstServed())
    one, three = PhaseSettings.apart(1).shares, PhaseSettings.apart(3).shares
    assert (one.prefill, one.decode) == (100, 100)
    assert (three.prefill, three.decode) == (33, 66)


def test_what_is_pulled_is_told(serving: Serving) -> None:
    seen: list[Done] = []
    engine: Any = apart(serving)
    take_in = engine._take_in

    def watched(finished: list[Done]) -> list[Event]:
        seen.extend(finished)
        return list(take_in(finished))

    engine._take_in = watched
    tokens_of(serving, count=2)
    assert sum(done.pulled_bytes for done in seen) == engine.moves.nbytes > 0
    assert engine.moves.seconds > 0


def decisions(engine: ApartEngine) -> list[tuple[str, State, Step]]:
    seen: list[tuple[str, State, Step]] = []
    engine.observer = lambda state, step: seen.append(("decode", state, step))
    engine.front.observer = lambda state, step: seen.append(("prefill", state, step))
    assert isinstance(engine.clock, VirtualClock)
    replay(engine, engine.clock, load(24, 60.0, prompt=40, output=60))
    return seen


def test_engine_and_simulator_decide_alike() -> None:
    clock = VirtualClock()
    made = start(APART, weights="int4", token_budget=64, threads=1, swap_bytes=1, clock=clock)
    real = apart(made)
    both: Any = Both(VirtualWorkers(clock, DEVICE, SIZE, HALVES), made.workers)
    costs = Costs(seconds_per_token=1e-4, seconds_per_page=1e-4)
    for side in (real, real.front):
        side.executor = side.workers = both
        side.costs, side._measures = costs, False
    real.wanted_pages = 26
    real.fit_limit()
    pages = made.prefill_pool.limit_pages  # type: ignore[union-attr]
    told = virtual_apart(front=pages, back=26, swap=0, context_tokens=400, costs=costs)
    assert real.limits == told.limits
    seen, predicted = decisions(real), decisions(told)
    assert [(side, step) for side, _, step in seen] == [(side, step) for side, _, step in predicted]
    assert [state for _, state, _ in seen] == [state for _, state, _ in predicted]
    assert sum(len(step.preempt) for _, _, step in seen) > 0
    assert real.totals == told.totals
    assert real.moves.requests == told.moves.requests
    made.release()
