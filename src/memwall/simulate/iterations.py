"""Serving on a virtual clock, iteration by iteration, by a plan: the engine's own schedulers decide, operations are
timed instead of done.

Requests are dealt in turn to model replicas, in them to as many flights as there are stages, in those to the attention
replicas. Each of the last has an engine of its own (`engine.core`, with counted pages and the scheduler of the serving
engine). A flight's engines step together, since they share the cells after attention; flights follow one another
through the stages, so that a stage works on one while the next works on another: a flight that has nothing to do
leaves a bubble.

Source: APEX (Lin 2024, arXiv 2411.17651), sections 4 and 5. Differs from the paper: the paper simulates each of them
alone and joins iteration times afterwards (the largest of cell replicas; of stages the largest of each window of S);
here they share a clock, which gives the same times where all are busy and bubbles where they are not. Whole prompts
join an iteration while the token budget lasts (65,536 by default, the paper's), and are cut in chunks only there. A
request that was set aside is computed again.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from memwall.engine.arrivals import Load
from memwall.engine.base import Costs, Limits, Scheduler
from memwall.engine.batchllm import BatchLLM
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.kv_pages import KVPages
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Event, Request
from memwall.engine.sequence import Sequence as Running
from memwall.engine.simulated import VirtualClock, virtual_switcher
from memwall.errors import InputError
from memwall.memory import PagePool
from memwall.simulate.blocks import BatchShape, StageTimes, StepTimer

MOST_INPUT_TOKENS = 65536
NO_CAP = 1 << 20
IDLE_STEP_SECONDS = 1e-3
STUCK_STEPS = 10_000


SCHEDULERS: dict[str, type[Scheduler]] = {"fcfs": FirstComeFirstServed, "batchllm": BatchLLM}
"""The serving engine's schedulers that need no adapters, by the names that the command line knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How each engine schedules. scheduler: makes one (they keep nothing, so one for all would do as well)."""

    scheduler: Callable[[], Scheduler] = FirstComeFirstServed
    limits: Limits = field(default_factory=lambda: Limits(token_budget=MOST_INPUT_TOKENS, max_sequences=NO_CAP))
    costs: Costs = field(default_factory=Costs)
    swap_pages: int = 0


@dataclass(slots=True)
class Served:
    """What became of one request; seconds from the start. first and last: when its tokens were there. made: these,
    where they were really made.
    """

    arrival: float
    prompt: int
    output: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    preemptions: int = 0
    made: tuple[int, ...] = ()


@dataclass(slots=True)
class Run:
    """A whole simulation. gaps: seconds between tokens of a request, of all. batches: iterations by how many requests
    they worked on, per engine. finished_at: of the last token; given_up: the limit was passed before that.
    """

    requests: list[Served] = field(default_factory=list)
    gaps: array[float] = field(default_factory=lambda: array("d"))
    batches: Counter[int] = field(default_factory=Counter)
    preempted: Counter[str] = field(default_factory=Counter)
    by_operator: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0
    computed_tokens: int = 0
    busy_seconds: float = 0.0
    joules: float = 0.0
    flop: float = 0.0
    tier_bytes: float = 0.0
    finished_at: float = 0.0
    given_up: bool = False


class _Notes:
    """An executor that notes what it was asked for, lets no time pass, and makes token 0 wherever one is drawn."""

    def __init__(self) -> None:
        self.shape: BatchShape | None = None
        self.requests = 0

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """See `Executor`."""
        self.shape, self.requests = BatchShape.of(batch), len(batch)
        return [Output(0) if entry.sample else None for entry in batch]

    def forget(self, sequence: Running) -> None:
        """See `Executor`."""


@lru_cache(maxsize=4096)
def _prompt(tokens: int) -> tuple[int, ...]:
    return (0,) * tokens


class Flight:
    """Engines that step together, one for each attention replica, and the requests that are still to come to them."""

    def __init__(self, engines: int, num_pages: int, batching: Batching) -> None:
        self.clock = VirtualClock()
        self.ready = 0.0
        self.coming: list[list[tuple[float, Load, Served]]] = [[] for _ in range(engines)]
        self.engines: list[Engine] = []
        self._notes = [_Notes() for _ in range(engines)]
        self._served: list[dict[int, Served]] = [{} for _ in range(engines)]
        self._sequences: list[dict[int, Running]] = [{} for _ in range(engines)]
        self._dealt = 0
        for notes in self._notes:
            pool = PagePool("kv/pages", page_bytes=1, most_pages=max(num_pages, 1))
            pages = KVPages(pool, batching.limits.page_tokens, keep_prefixes=False)
            self.engines.append(
                Engine(
                    batching.scheduler(),
                    notes,
                    pages,
                    limits=batching.limits,
                    context_tokens=NO_CAP,
                    switch=virtual_switcher(pages, batching.swap_pages, self.clock),
                    costs=batching.costs,
                    clock=self.clock,
                )
            )

    def deal(self, at: float, load: Load, served: Served) -> None:
        """One more request, to the next engine; they come in order of arrival."""
        self.coming[self._dealt % len(self.engines)].append((at, load, served))
        self._dealt += 1

    def arrange(self) -> None:
        """Once all are dealt: the earliest last, so that they can be taken from the end."""
        for queue in self.coming:
            queue.reverse()

    @property
    def next_time(self) -> float | None:
        """When it can next do something; None when it is done."""
        if any(engine.busy for engine in self.engines):
            return self.ready
        arrivals = [queue[-1][0] for queue in self.coming if queue]
        return max(self.ready, min(arrivals)) if arrivals else None

    def step(self, now: float) -> tuple[list[BatchShape], list[tuple[Served, Event]]]:
        """One iteration of all engines; the shapes of those that computed something."""
        self.clock.now = now
        shapes, told = [], []
        for place, engine in enumerate(self.engines):
            while self.coming[place] and self.coming[place][-1][0] <= now:
                self._submit(place, *self.coming[place].pop())
            notes, served = self._notes[place], self._served[place]
            notes.shape = None
            if engine.busy:
                for event in engine.step():
                    told.append((served[event.id], event))
                    if event.finish is not None:
                        served.pop(event.id).preemptions = self._sequences[place].pop(event.id).preemptions
            shapes.append(notes.shape or BatchShape())
        return shapes, told

    def batch_sizes(self) -> list[int]:
        """Requests of each engine's last iteration."""
        return [notes.requests for notes in self._notes if notes.shape is not None]

    def finish(self, run: Run) -> None:
        """Counts that the engines keep."""
        for engine in self.engines:
            run.preempted += engine.totals.preempted
            run.computed_tokens += engine.totals.computed_tokens

    def _submit(self, place: int, at: float, load: Load, served: Served) -> None:
        sampling = Sampling(max_new_tokens=load.output_tokens, ignore_eos=True)
        sequence = self.engines[place].submit(Request(prompt=_prompt(load.prompt_tokens), sampling=sampling), at)
        self._served[place][sequence.id] = served
        self._sequences[place][sequence.id] = sequence


def run_plan(
    timer: StepTimer, kv_tokens: int, loads: Sequence[Load], batching: Batching, *, give_up_after: float | None = None
) -> Run:
    """Serves all loads by the timer's plan. kv_tokens: cached tokens of an attention replica, all flights together.

    give_up_after: a time of the virtual clock at which it is of no more interest how the run would end.
    InputError for a request that could never run.
    """
    plan, run = timer.plan, Run()
    pages = kv_tokens // plan.stages // batching.limits.page_tokens
    replicas = [
        [Flight(plan.cells[0].replicas, pages, batching) for _ in range(plan.stages)] for _ in range(plan.replicas)
    ]
    ordered = sorted(loads, key=lambda load: load.at or 0.0)
    for number, load in enumerate(ordered):
        if batching.limits.pages(load.prompt_tokens + load.output_tokens) > pages:
            raise InputError(
                f"{plan.name}: a request of {load.prompt_tokens + load.output_tokens:,} tokens does not fit the "
                f"{pages * batching.limits.page_tokens:,} that a stage's requests may cache"
            )
        served = Served(arrival=load.at or 0.0, prompt=load.prompt_tokens, output=load.output_tokens)
        run.requests.append(served)
        replica, place = number % plan.replicas, number // plan.replicas
        replicas[replica][place % plan.stages].deal(load.at or 0.0, load, served)
    for flights in replicas:
        for flight in flights:
            flight.arrange()
        if not run.given_up:
            _run_replica(timer, flights, run, give_up_after)
        for flight in flights:
            flight.finish(run)
    return run


def _run_replica(timer: StepTimer, flights: Sequence[Flight], run: Run, give_up_after: float | None) -> None:
    """All iterations of one model replica, by the order in which flights can enter the first stage."""
    stage_free, stuck = [0.0] * len(flights), 0
    while True:
        waiting = [(time, place) for place, flight in enumerate(flights) if (time := flight.next_time) is not None]
        if not waiting:
            return
        earliest, place = min(waiting)
        flight, start = flights[place], max(earliest, stage_free[0])
        if give_up_after is not None and start > give_up_after:
            run.given_up = True
            return
        shapes, told = flight.step(start)
        if not any(shape.tokens for shape in shapes):
            flight.ready, stuck = start + IDLE_STEP_SECONDS, stuck + 1
            if stuck > STUCK_STEPS:
                raise InputError(f"{timer.plan.name}: the scheduler lets nothing run any more")
            continue
        stuck, times = 0, timer.step(shapes)
        flight.ready = _pass_stages(times, start, stage_free)
        _note(run, flight, times, told, flight.ready)


def _pass_stages(times: StageTimes, start: float, stage_free: list[float]) -> float:
    """When an iteration that enters at `start` leaves the last stage; a stage works on one at a time."""
    at = start
    for stage, seconds in enumerate(times.stages):
        at = max(at, stage_free[stage]) + seconds
        stage_free[stage] = at
        at += times.send if stage + 1 < len(times.stages) else 0.0
    return at


def _note(run: Run, flight: Flight, times: StageTimes, told: Sequence[tuple[Served, Event]], now: float) -> None:
    run.steps += 1
    run.batches.update(flight.batch_sizes())
    run.joules += times.joules
    run.flop += times.flop
    run.tier_bytes += times.tier_bytes
    run.busy_seconds += sum(times.stages)
    for name, seconds in times.by_operator.items():
        run.by_operator[name] += seconds
    for served, event in told:
        if event.token is None:
            continue
        if served.tokens:
            run.gaps.append(now - served.last)
        else:
            served.first = now
        served.last = now
        served.tokens += 1
        run.finished_at = max(run.finished_at, now)
