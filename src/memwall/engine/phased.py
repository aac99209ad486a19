"""The step loop over two workers: prompts and tokens are computed at the same time, on one pool of pages.

A step hands work to whichever worker is idle and then waits for the first one that is done; neither ever waits for the
other. What is under way keeps its pages: such a request is set aside, cancelled or moved only once its batch is back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Batch
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from memwall.engine.base import PHASES, Lanes, Limits, Phase, Scheduler, Shares, State, Window, Work
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Executor, Output
from memwall.engine.hand_over import Pull
from memwall.engine.kv_pages import KVPages
from memwall.engine.phases import phase_of
from memwall.engine.sequence import Event, FinishReason, Request, Sequence
from memwall.errors import BudgetExceeded, InputError

KEPT_WINDOWS = 12
WINDOW_ITERATIONS = 64
"""Iterations of both workers together after which a window closes. Neither paper tells its own."""


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that is over. outputs: None where its worker was lost; all of it is then done again. began, ended: when
    the worker computed; cpu_seconds: of its processor time. pulled_bytes, pulled_seconds: of what it copied before.
    emptied: its memory is lost with it.
    """

    phase: Phase
    batch: list[Entry]
    outputs: list[Output | None] | None
    seconds: float
    began: float = 0.0
    ended: float = 0.0
    cpu_seconds: float = 0.0
    pulled_bytes: int = 0
    pulled_seconds: float = 0.0
    emptied: bool = False


class Workers(Executor, Protocol):
    """Two workers that compute beside each other."""

    @property
    def busy(self) -> bool:
        """Whether one of them computes."""

    @property
    def shares(self) -> Shares:
        """Those in force."""

    @property
    def preparing(self) -> Shares | None:
        """Those of workers that are being made."""

    def switch(self, shares: Shares) -> None:
        """New shares, which each phase takes up at the end of its own iteration."""

    def start(self, phase: Phase, batch: list[Entry], pulls: Batch[Pull] = ()) -> None:
        """Hands a batch to an idle worker. pulls: pages that it copies from the other one's memory before."""

    def collect(self, until: float | None = None, *, wait: bool = True) -> list[Done]:
        """Batches that are over; wait: for the first one, until a time of the clock, or until `wake`."""

    def wake(self) -> None:
        """Ends a wait; any thread may."""


@dataclass(slots=True)
class Observed:
    """What the window that is open has seen."""

    began: float
    iterations: int = 0
    arrived: int = 0
    prompts: int = 0
    prefill_seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: dict[int, list[float]] = field(default_factory=dict)

    def close(self, shares: Shares, now: float) -> Window:
        token = tuple(seconds / count for count, seconds in self.gaps.values())
        return Window(
            shares=shares, seconds=now - self.began, arrived=self.arrived, prompts=self.prompts,
            prefill_seconds=self.prefill_seconds, first=tuple(self.first), token=token,
        )  # fmt: skip


class PhasedEngine(Engine):
    """Requests over a pool of pages and two workers. window: iterations after which it is told what was observed."""

    phases: tuple[Phase, ...] = PHASES
    """Those whose requests lie in its pages."""

    def __init__(
        self,
        scheduler: Scheduler,
        workers: Workers,
        pages: KVPages,
        *,
        limits: Limits,
        context_tokens: int,
        window: int = WINDOW_ITERATIONS,
        **others: Any,
    ) -> None:
        """others: as for `Engine`; adapters: with workers that see the engine's pages."""
        super().__init__(scheduler, workers, pages, limits=limits, context_tokens=context_tokens, **others)
        self.workers = workers
        self.window = window
        self.windows: deque[Window] = deque(maxlen=KEPT_WINDOWS)
        self.on_done: Callable[[Done], None] | None = None
        self.switches = 0
        self._fresh = False
        self._flying: dict[Phase, list[Entry]] = {}
        self._doomed: dict[int, FinishReason] = {}
        self._open = Observed(began=self.clock())
        self._in_force, self._since = workers.shares, self._open.began

    @property
    def in_flight(self) -> bool:
        """Whether a worker computes."""
        return bool(self._flying)

    def wake(self) -> None:
        """See `Engine`."""
        self.workers.wake()

    def check(self, request: Request) -> None:
        """See `Engine`."""
        super().check(request)
        if request.members or request.prefix is not None:
            raise InputError("shared prefixes that are planned need one worker; choose the scheduler fcfs")
        if request.guide is not None and request.guide.spec is None:
            raise InputError("a form that workers draw by must be told as text: make the guide with its description")

    def submit(self, request: Request, arrival: float | None = None, number: int | None = None) -> Sequence:
        """See `Engine`."""
        self._open.arrived += 1
        return super().submit(request, arrival, number)

    def cancel(self, number: int) -> Event | None:
        """Ends a request; one that is being computed ends with its batch, and its event comes then."""
        if number in self._in_flight_ids():
            self._doomed[number] = "cancelled"
            return None
        return super().cancel(number)

    def drain(self) -> list[Event]:
        """Waits until no worker computes."""
        events: list[Event] = []
        while self._flying:
            events += self._take_in(self.workers.collect())
            if not self.workers.busy:  # after a fault: nobody will bring the rest
                self._flying.clear()
        return events

    def abandon(self) -> list[Event]:
        """See `Engine`."""
        told, self._untold = self._untold, []
        return [*told, *self.drain(), *super().abandon()]

    def _advance(self, events: list[Event]) -> None:
        """Takes in what is done, hands out work, and waits for the first worker to end."""
        events += self._take_in(self.workers.collect(wait=False))
        now = self.clock()
        events += self._expire(now)
        events += self._land()
        if self._must_move():
            events += self.drain()
        self.fit_limit()
        events += self._hand_out(now)
        if self.in_flight and not events:
            events += self._take_in(self.workers.collect(self.wakes_at))

    def snapshot(self) -> State:
        """See `Engine`."""
        flying = tuple(Work(id=e.sequence.id, tokens=e.count) for batch in self._flying.values() for e in batch)
        lanes = Lanes(
            idle=tuple(phase for phase in self.phases if phase not in self._flying),
            flying=flying,
            shares=self.workers.shares,
            preparing=self.workers.preparing,
            windows=tuple(self.windows),
            fresh=self._fresh,
        )
        return replace(super().snapshot(), lanes=lanes)

    def pages_of(self, phase: Phase) -> KVPages:
        """Where requests in this phase have theirs."""
        return self.pages

    def _hand_out(self, now: float) -> list[Event]:
        if len(self._flying) == len(self.phases):
            return []
        state = self.snapshot()
        assert state.lanes is not None
        step = self.scheduler.plan_step(state, now)
        self._fresh = False
        if self.observer is not None:
            self.observer(state, step)
        if step.shares is not None and step.shares != (self.workers.preparing or self.workers.shares):
            self.workers.switch(step.shares)
            self.switches += 1
        events = [self._finish(self.waiting[number], "aborted") for number in step.abort]
        try:
            events += self._rearrange(state, step, now)
            batch = self._entries(step)
        except BudgetExceeded:  # the process grew elsewhere
            self._keep_to_what_is_there()
            return events
        decoding = {view.id for view in (*state.running, *state.swapped) if phase_of(view) == "decode"}
        for phase in state.lanes.idle:
            mine = [entry for entry in batch if (entry.sequence.id in decoding) == (phase == "decode")]
            if mine:
                self._launch(phase, mine)
        return events

    def _launch(self, phase: Phase, batch: list[Entry]) -> None:
        self._flying[phase] = batch
        self.workers.start(phase, batch)

    def _take_in(self, finished: list[Done]) -> list[Event]:
        """Books of batches that are over."""
        events: list[Event] = []
        if self.workers.shares != self._in_force:
            self._in_force, self._since = self.workers.shares, self.clock()
        for done in finished:
            batch = self._flying.pop(done.phase)
            now = self.clock()
            if done.outputs is not None:
                self._learn(batch, done.seconds)
                self.totals.count(batch)
                for entry, output in zip(batch, done.outputs, strict=True):
                    event = self._took(entry, output, now)
                    if event is not None:
                        events.append(event)
            for entry in batch:
                why = self._doomed.pop(entry.sequence.id, None)
                if why is not None and entry.sequence.status == "running":
                    events.append(self._finish(entry.sequence, why))
            if self.on_done is not None:
                self.on_done(done)
            self._observe(done, now)
        return events

    def _took(self, entry: Entry, output: Output | None, now: float) -> Event | None:
        one = entry.sequence
        before, first = one.last_token, one.first_token
        event = self._computed(entry, output, now)
        if output is not None and first is None:
            self._open.prompts += 1
            if one.arrival >= self._since:  # a queue that was there before tells nothing about these shares
                self._open.first.append(now - one.arrival)
        elif output is not None and before is not None:
            gaps = self._open.gaps.setdefault(one.id, [0, 0.0])
            gaps[0] += 1
            gaps[1] += now - before
        return event

    def _observe(self, done: Done, now: float) -> None:
        self._open.iterations += 1
        if done.phase == "prefill":
            self._open.prefill_seconds += done.seconds
        if self._open.iterations >= self.window:
            self.windows.append(self._open.close(self.workers.shares, now))
            self._open, self._fresh = Observed(began=now), True

    def _must_move(self) -> bool:
        """Whether the pool has to shrink, which may move pages, so that nobody may be computing."""
        return bool(self._flying) and self.wanted_pages < self.pages.pool.limit_pages

    def _expire(self, now: float) -> list[Event]:
        flying = self._in_flight_ids()
        events = []
        for one in self._late(now):
            if one.id in flying:
                self._doomed[one.id] = "cancelled"
            else:
                events.append(self._finish(one, "cancelled"))
        return events

    def _in_flight_ids(self) -> set[int]:
        return {entry.sequence.id for batch in self._flying.values() for entry in batch}
