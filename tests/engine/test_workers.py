"""Worker processes over one memory: the same tokens as one process, hand-over without a copy, switches, losses."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.engine.base import PHASES, Costs, Phase, Scheduler, Shares, State, Step
from memwall.engine.executor import Entry, Output
from memwall.engine.nexus import Nexus
from memwall.engine.pacing import Board, Pacer, cores_beside
from memwall.engine.phase_costs import Costs as PhaseCosts
from memwall.engine.phase_costs import Operator
from memwall.engine.phase_device import VirtualWorkers
from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.phased import Done, PhasedEngine
from memwall.engine.sampling import Sampling
from memwall.engine.semi_pd import SemiPD
from memwall.engine.sequence import Event, Request, Sequence
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.simulated import VirtualClock, replay
from memwall.engine.thread import EngineThread
from memwall.errors import BudgetExceeded
from memwall.memory import Budget
from memwall.models import DEMO_DIRECTORY
from tests.engine.phased_loads import DEVICE, HALVES, LIMITS, SIZE, load
from tests.engine.phased_loads import engine as virtual

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")


def start(phases: PhaseSettings | None, **told: Any) -> Serving:
    budget, clock = told.pop("budget", None), told.pop("clock", None)
    chosen = {"weights": "int8", "context_tokens": 400, "token_budget": 64, "max_sequences": 8, "threads": 2, **told}
    return load_engine(DEMO_DIRECTORY, ServingSettings(phases=phases, **chosen), budget=budget, clock=clock)


def requests(count: int = 10) -> list[Request]:
    draw, found = random.Random(5), []
    for number in range(count):
        prompt = tuple(draw.randrange(3, 4000) for _ in range(draw.randint(4, 150)))
        sampling = Sampling(
            max_new_tokens=draw.randint(8, 40), temperature=0.9 * (number % 2), top_p=0.9, seed=number, ignore_eos=True
        )
        found.append(Request(prompt=prompt, sampling=sampling, logprobs=2 if number % 3 == 0 else None))
    return found


def tokens_of(serving: Serving, watch: Any = None, count: int = 10) -> list[tuple[int, ...]]:
    engine = serving.engine
    sequences = [engine.submit(request) for request in requests(count)]
    steps = 0
    while engine.busy:
        serving.govern()
        engine.step()
        steps += 1
        if watch is not None:
            watch(steps)
    assert all(one.finish == "length" for one in sequences)
    return [tuple(one.made) for one in sequences]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    alone = start(None)
    found = tokens_of(alone)
    alone.release()
    return found


@pytest.fixture
def serving() -> Iterator[Serving]:
    made = start(PhaseSettings(shares=HALVES))
    yield made
    made.release()


def phased(serving: Serving) -> PhasedEngine:
    assert isinstance(serving.engine, PhasedEngine)
    assert serving.workers is not None
    return serving.engine


def test_tokens_are_those_of_one_process_and_a_hand_over_copies_nothing(
    serving: Serving, expected: list[tuple[int, ...]]
) -> None:
    engine, pages, seen = phased(serving), {}, []  # type: ignore[var-annotated]

    def watch(done: Done) -> None:
        seen.append(done)
        for entry in done.batch:
            before = pages.setdefault(entry.sequence.id, [])
            if entry.sequence.status == "running":
                assert entry.sequence.pages[: len(before)] == before
                pages[entry.sequence.id] = list(entry.sequence.pages)

    engine.on_done = watch
    assert tokens_of(serving) == expected
    assert {done.phase for done in seen} == set(PHASES)
    assert all(done.cpu_seconds > 0 and done.ended > done.began for done in seen)
    overlaps = sum(a.began < b.ended and b.began < a.ended for a in seen for b in seen if a.phase < b.phase)
    assert overlaps > 0
    assert serving.engine.swap is not None
    assert serving.engine.swap.written_bytes == 0


@pytest.mark.parametrize("phases", [PhaseSettings(shares=HALVES), PhaseSettings.apart(2)], ids=["one", "two"])
def test_blocks_of_codes_are_handed_over(phases: PhaseSettings) -> None:
    """In one memory or from one to another; prompts come in other chunks than in one process, and are coded so."""
    made = start(phases, kv="int4", token_budget=256)
    assert len(tokens_of(made)) == 10
    made.release()


@pytest.mark.parametrize("fresh", [True, False])
def test_tokens_stay_the_same_across_switches(fresh: bool, expected: list[tuple[int, ...]]) -> None:
    made = start(PhaseSettings(shares=Shares(prefill=80, decode=100) if fresh else HALVES, fresh=fresh))
    engine, others = phased(made), iter([Shares(prefill=30, decode=70), Shares(prefill=70, decode=30)])
    first = set(made.workers.pids)  # type: ignore[union-attr]

    def watch(steps: int) -> None:
        if steps % 12 == 0 and engine.workers.preparing is None and (shares := next(others, None)) is not None:
            engine.workers.switch(shares)

    assert tokens_of(made, watch) == expected
    for shares in (None, *others):  # the requests may be over before the second
        if shares is not None:
            engine.workers.switch(shares)
        while engine.workers.preparing is not None:
            engine.workers.collect(wait=False)
    assert engine.workers.shares == Shares(prefill=70, decode=30)
    new = set(made.workers.pids)  # type: ignore[union-attr]
    assert len(new) == 3
    assert len(first & new) == (1 if fresh else 3)  # the resident process stays
    made.release()


def own_pages(pid: int, address: int, nbytes: int) -> tuple[int, int]:
    """Pages that no other process maps, and resident ones, of `nbytes` at an address: see proc_pid_pagemap(5)."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        entries = np.frombuffer(file.read(nbytes // mmap.PAGESIZE * 8), np.uint64)
    present = (entries >> 63) & 1
    return int((present & (entries >> 56)).sum()), int(present.sum())


def test_one_copy_of_the_weights(serving: Serving) -> None:
    tokens_of(serving)
    assert serving.workers is not None
    for region in serving._loaded.weights.regions:
        assert region._pages is not None
        for pid in serving.workers.pids:
            own, held = own_pages(pid, region._pages._address, region.committed_bytes)
            assert own == 0
            assert held == region.committed_bytes // mmap.PAGESIZE
    serving.workers.measure()
    row = next(row for row in serving.ledger.rows() if row.owner == "workers")
    assert row.nbytes == serving.workers.unseen_bytes > 0


def test_a_lost_worker_is_replaced_and_its_batch_done_again(serving: Serving, expected: list[tuple[int, ...]]) -> None:
    workers = serving.workers
    assert workers is not None

    def watch(steps: int) -> None:
        if steps in (5, 20):
            os.kill(workers.pids[1 + (steps == 20)], signal.SIGKILL)

    assert tokens_of(serving, watch) == expected
    assert workers.lost == 2


def test_cancelled_while_it_is_computed(serving: Serving) -> None:
    engine = phased(serving)
    sequences = [engine.submit(request) for request in requests(6)]
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
        for one in sequences[::2]:
            if one.status == "running" and one.num_made >= 3:
                event = engine.cancel(one.id)
                events += [event] if event is not None else []
    ends = {event.id: event.finish for event in events if event.finish is not None}
    assert [ends[one.id] for one in sequences] == ["cancelled", "length"] * 3
    assert serving.pool.used_pages == engine.pages.idle_pages


def test_the_pool_shrinks_and_grows_while_both_work(serving: Serving, expected: list[tuple[int, ...]]) -> None:
    engine = phased(serving)
    govern, wanted = serving.govern, [26, 400, 30, 400]
    serving.govern = lambda: None  # type: ignore[method-assign]

    def watch(steps: int) -> None:
        if steps % 15 == 0 and wanted:
            engine.wanted_pages = wanted.pop(0)

    assert [len(made) for made in tokens_of(serving, watch)] == [len(made) for made in expected]
    serving.govern = govern  # type: ignore[method-assign]


def test_a_thread_wakes_the_wait(serving: Serving) -> None:
    ended, events = threading.Event(), []  # type: ignore[var-annotated]

    def deliver(some: list[Event]) -> None:
        events.extend(some)
        if sum(event.finish is not None for event in events) == 6:
            ended.set()

    thread = EngineThread(serving, deliver)
    thread.start()
    for request in requests(6):
        thread.submit(request)
        time.sleep(0.01)
    assert ended.wait(60)
    assert thread.stop(drain_seconds=5)
    assert not serving.engine.in_flight


class Both:
    """Time as the virtual workers say, arithmetic by real ones."""

    def __init__(self, time: VirtualWorkers, real: Any) -> None:
        self._time, self._real = time, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._time, name)

    def start(self, phase: Phase, batch: list[Entry], pulls: Any = ()) -> None:
        self._real.run_as(phase, batch, pulls)
        self._time.start(phase, batch)

    def forget(self, sequence: Sequence) -> None:
        self._real.forget(sequence)


def decisions(engine: PhasedEngine) -> list[tuple[State, Step]]:
    seen: list[tuple[State, Step]] = []
    engine.observer = lambda state, step: seen.append((state, step))
    assert isinstance(engine.clock, VirtualClock)
    replay(engine, engine.clock, load(24, 60.0, prompt=40, output=60))
    return seen


PREDICTED = Operator(seconds_per_flop=5e-14, seconds_per_byte=2.5e-12, saturation=0.7, decay=0.3, reach=0.35)
COSTS = PhaseCosts(
    size=SIZE, prefill_dense=PREDICTED, prefill_attention=PREDICTED, decode_dense=PREDICTED, decode_attention=PREDICTED
)


@pytest.mark.parametrize("name", ["semi-pd", "nexus"])
def test_engine_and_simulator_decide_alike(name: str) -> None:
    clock, shares = VirtualClock(), Shares(prefill=30, decode=70)
    scheduler: Scheduler = SemiPD(first_seconds=0.05, token_seconds=0.5, cap=100, start=shares)
    if name == "nexus":
        scheduler = Nexus(costs=COSTS)
    settings = ServingSettings(
        weights="int4", context_tokens=400, max_sequences=8, token_budget=64, threads=1, swap_bytes=1,
        phases=PhaseSettings(shares=shares, window=24),
    )  # fmt: skip
    made = load_engine(DEMO_DIRECTORY, settings, scheduler=scheduler, clock=clock)
    real = phased(made)
    costs = Costs(seconds_per_token=1e-4, seconds_per_page=1e-4)
    real.executor = real.workers = Both(VirtualWorkers(clock, DEVICE, SIZE, shares, prepare_seconds=0.02), made.workers)
    real.costs, real._measures = costs, False
    real.wanted_pages = 25
    real.fit_limit()
    told = virtual(
        scheduler, pages=25, shares=shares, window=24, prepare_seconds=0.02, costs=costs, context_tokens=400,
        page_bytes=made.pool.page_bytes,
    )  # fmt: skip
    assert real.limits == told.limits == LIMITS
    seen, predicted = decisions(real), decisions(told)
    assert [step for _, step in seen] == [step for _, step in predicted]
    assert [state for state, _ in seen] == [state for state, _ in predicted]
    assert sum(len(step.preempt) for _, step in seen) > 0
    assert sum(step.shares is not None for _, step in seen) > 0
    assert real.totals == told.totals
    made.release()


def test_bad_input_and_budgets_that_do_not_hold_two_workers() -> None:
    made = start(PhaseSettings(shares=HALVES))
    least, own = made.least_budget_bytes(), made.workers.reserve_bytes  # type: ignore[union-attr]
    made.release()
    with pytest.raises(BudgetExceeded, match="workers"):
        start(PhaseSettings(shares=HALVES), budget=Budget(tiers={"ram": least - own // 2}))


def test_a_quota_is_kept() -> None:
    pacer = Pacer(50, 1)
    wall, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.15:
        sum(range(1000))
        pacer.pace()
    assert pacer.rested > 0
    assert time.monotonic() - wall >= 0.2  # never sooner, however loaded the machine is


def test_both_together_never_have_more_threads_than_cores() -> None:
    for cores in (2, 3, 4, 8, 64):
        for prefill in (1, 20, 50, 80, 100):
            for decode in (1, 20, 50, 80, 100):
                (first, mine), (second, yours) = (
                    cores_beside("prefill", prefill, decode, cores), cores_beside("decode", decode, prefill, cores)
                )  # fmt: skip
                assert first >= 1
                assert second >= 1
                assert first + second == cores
                assert mine + yours <= cores + 1e-9
                assert mine / yours == pytest.approx(prefill / decode)
    assert cores_beside("prefill", 75, 25, 8) == (6, 6.0)
    assert cores_beside("decode", 100, 80, 2) == (1, pytest.approx(10 / 9))
    assert cores_beside("decode", 50, 50, 1) == (1, 0.5)


def test_a_worker_has_all_cores_while_the_other_one_waits_or_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memwall.engine.pacing.kernels.set_num_threads", lambda count: None)
    monkeypatch.setattr("memwall.engine.pacing.set_lane_threads", lambda count: None)
    board = Board()
    one = Pacer(80, 4, board=board, phase="prefill")
    other = Pacer(100, 4, board=board, phase="decode")
    one.begin()
    assert (one.threads, one.rate) == (4, 3.2)
    other.begin()
    one.pace()
    assert (one.threads, other.threads) == (2, 2)
    assert one.rate == pytest.approx(80 / 180 * 4)
    other.end()
    assert board.beside("prefill") == 100  # its next batch may follow at once
    time.sleep(0.01)
    one.pace()
    assert one.threads == 4
    one.end()
    board.show("prefill", 80)
    board.hide("prefill")  # the engine's word for one that was lost
    assert board.beside("decode") == 0


def test_forgets_what_is_over(serving: Serving) -> None:
    tokens_of(serving)
    assert serving.workers is not None
    assert not serving.workers.draws
    assert isinstance(Output(1), Output)


def test_threads_stay_or_follow_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("memwall.engine.pacing.kernels.set_num_threads", seen.append)
    Pacer(30, 4)
    Pacer(30, 4, whole_threads=False)
    Pacer(100, 4, whole_threads=False)
    assert seen == [4, 2, 4]
