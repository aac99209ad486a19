"""The step loop one batch ahead: while a batch is computed, the next one is formed; nothing waits for what it says.

The next batch is handed over before the one under way is over: who computes puts the tokens of that to their places and
goes on at once, and only then is it looked at what they mean. So the end of a text is noticed when the next batch is
already under way: that computes one token too many for it, which is thrown away. An end by length is known in advance
and costs nothing. Where a request must be set aside, or the pool must move, the batch under way is waited for, and the
decision taken anew.

Source: NanoFlow, Zhu 2024, arXiv 2408.12757, section 4.4 (asynchronous scheduling).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from memwall.engine.base import Limits, RequestView, Scheduler, State, Step, Work
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Executor, Output
from memwall.engine.kv_pages import KVPages
from memwall.engine.sequence import Event, FinishReason, Request, Sequence
from memwall.errors import BudgetExceeded, InputError

PLACE = 0
"""Stands where a token of the batch under way will be."""
LEAST_ANSWERS = 8
"""So many must have ended before their mean length is what others are expected to make."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A batch that is over, and when it was computed."""

    outputs: list[Output | None]
    began: float
    ended: float


class Runner(Protocol):
    """Computes a batch while others do something else."""

    def start(self, batch: list[Entry]) -> None:
        """Hands a batch over, which is computed after those before it: it may begin with their tokens."""

    def collect(self) -> Computed:
        """Waits for the oldest one. What it raised is raised here, and those after it are not computed."""

    def stop(self) -> None:
        """No more batches."""


class InlineRunner:
    """Computes when it is waited for: on a virtual clock that is when time passes."""

    def __init__(self, executor: Executor, clock: Any) -> None:
        self.executor = executor
        self.clock = clock
        self._todo: deque[list[Entry]] = deque()

    def start(self, batch: list[Entry]) -> None:
        """See `Runner`."""
        self._todo.append(batch)

    def collect(self) -> Computed:
        """See `Runner`."""
        batch, began = self._todo.popleft(), self.clock()
        try:
            outputs = self.executor.run(batch)
        except BaseException:
            self._todo.clear()
            raise
        _place(batch, outputs)
        return Computed(outputs, began, self.clock())

    def stop(self) -> None:
        """See `Runner`."""


class ThreadRunner:
    """Computes in a thread of its own."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._todo: queue.SimpleQueue[list[Entry] | Literal["stop", "again"]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Computed | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, batch: list[Entry]) -> None:
        """See `Runner`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="memwall batch", daemon=True)
            self._thread.start()
        self._todo.put(batch)

    def collect(self) -> Computed:
        """See `Runner`."""
        done = self._done.get()
        if isinstance(done, BaseException):
            self._todo.put("again")
            raise done
        return done

    def stop(self) -> None:
        """See `Runner`."""
        if self._thread is not None:
            self._todo.put("stop")
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        failed = False
        while (batch := self._todo.get()) != "stop":
            if batch == "again":
                failed = False
            if failed or isinstance(batch, str):  # what follows a batch that failed has no tokens to begin with
                continue
            began = time.perf_counter()
            try:
                outputs = self.executor.run(batch)
                _place(batch, outputs)
            except BaseException as error:
                failed = True
                self._done.put(error)
                continue
            self._done.put(Computed(outputs, began, time.perf_counter()))


def _place(batch: list[Entry], outputs: list[Output | None]) -> None:
    for entry, output in zip(batch, outputs, strict=True):
        if output is not None:
            entry.sequence.tokens[entry.first + entry.count] = output.token


@dataclass(slots=True)
class AheadCounts:
    """Since the start. wasted: tokens computed after the end of a text; redone: decisions taken anew because a request
    had to be set aside. gaps: between a batch and the next one that was ready by then, and their seconds.
    """

    wasted: int = 0
    redone: int = 0
    gaps: int = 0
    gap_seconds: float = 0.0
    busy_seconds: float = 0.0


class AheadEngine(Engine):
    """Requests over a pool of pages, with one batch under way and one being formed. runner: None for a thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        pages: KVPages,
        *,
        limits: Limits,
        context_tokens: int,
        runner: Runner | None = None,
        **others: Any,
    ) -> None:
        """others: as for `Engine`; adapters are not served."""
        super().__init__(scheduler, executor, pages, limits=limits, context_tokens=context_tokens, **others)
        if self.adapters is not None:
            raise InputError("adapters are served step by step; leave them out, or choose the scheduler fcfs")
        self.runner = runner or ThreadRunner(executor)
        self.counts = AheadCounts()
        self._flying: deque[list[Entry]] = deque()
        """Batches under way, the oldest first: one, and while it is waited for the next one too."""
        self._over: dict[int, FinishReason] = {}
        """Those whose end was noticed while they were computed once more."""
        self._last_end: float | None = None
        self._answers = self._answered = 0

    @property
    def in_flight(self) -> bool:
        """Whether a batch is computed."""
        return bool(self._flying)

    def check(self, request: Request) -> None:
        """See `Engine`."""
        super().check(request)
        if request.members or request.prefix is not None:
            raise InputError("shared prefixes that are planned are served step by step; choose the scheduler fcfs")

    def cancel(self, number: int) -> Event | None:
        """Ends a request; one that is being computed ends with its batch, and its event comes then."""
        if self._is_flying(number):
            self._over.setdefault(number, "cancelled")
            return None
        return super().cancel(number)

    def drain(self) -> list[Event]:
        """Waits for the batch under way."""
        events: list[Event] = []
        while self._flying:
            events += self._book(*self._collect())
        return events

    def abandon(self) -> list[Event]:
        """See `Engine`; pages are free only once nobody computes on them."""
        while self._flying:
            with suppress(Exception):  # they all end with an error
                self._collect()
        self._over.clear()
        return super().abandon()

    def release(self) -> None:
        """The thread ends."""
        self.runner.stop()

    def _advance(self, events: list[Event]) -> None:
        """Forms the next batch, hands it over, waits for the one under way and reads what came of that."""
        now = self.clock()
        events += self._expire(now)
        events += self._land()
        if self._flying and self.wanted_pages != self.pages.pool.limit_pages:
            events += self.drain()
        if not self._flying:
            self.fit_limit()
        state = self.snapshot()
        step = self.scheduler.plan_step(state, now)
        if step.preempt and self._flying:
            self.counts.redone += 1
            events += self.drain()
            state = self.snapshot()
            step = self.scheduler.plan_step(state, now)
        under_way = bool(self._flying)
        batch = self._prepare(state, step, now, events)
        if batch:
            self._launch(batch)
        if under_way:
            events += self._book(*self._collect())

    def snapshot(self) -> State:
        """See `Engine`; those that the batch under way ends are not seen any more."""
        state = super().snapshot()
        gone = {one.id for one in self.running.values() if one.id in self._over or self._full(one)}
        return replace(state, running=tuple(view for view in state.running if view.id not in gone)) if gone else state

    def _view(self, one: Sequence) -> RequestView:
        view = super()._view(one)
        if view.expected_tokens or self._answers < LEAST_ANSWERS:
            return view
        return replace(view, expected_tokens=one.num_prompt + round(self._answered / self._answers))

    def _finish(self, one: Sequence, why: FinishReason) -> Event:
        if why in ("stop", "length") and one.request.pooling is None:
            self._answers, self._answered = self._answers + 1, self._answered + one.num_made
        return super()._finish(one, why)

    def _prepare(self, state: State, step: Step, now: float, events: list[Event]) -> list[Entry]:
        if self.observer is not None:
            self.observer(state, step)
        events += [self._finish(self.waiting[number], "aborted") for number in step.abort]
        try:
            events += self._rearrange(state, step, now)
            return self._entries(step)
        except BudgetExceeded:  # the process grew elsewhere
            self._keep_to_what_is_there()
            return []

    def _entry(self, work: Work) -> Entry:
        one = self.running[work.id]
        one.pages = list(one.pages)  # the batch under way reads the old list
        return super()._entry(work)

    def _full(self, one: Sequence) -> bool:
        """Whether the token under way is its last one by length."""
        return one.num_made >= one.request.sampling.max_new_tokens or len(one.tokens) >= self.context_tokens

    def _launch(self, batch: list[Entry]) -> None:
        for entry in batch:
            entry.sequence.computed += entry.count
            if entry.sample:
                entry.sequence.tokens.append(PLACE)
        self.switch.counts.steps_during += self.switch.active
        self._flying.append(batch)
        self.runner.start(batch)

    def _collect(self) -> tuple[list[Entry], Computed]:
        batch = self._flying.popleft()
        try:
            done = self.runner.collect()
        except BaseException:
            self._flying.clear()  # those after it are not computed
            raise
        if self._last_end is not None:
            self.counts.gaps += 1
            self.counts.gap_seconds += done.began - self._last_end
        self._last_end = done.ended
        self.counts.busy_seconds += done.ended - done.began
        return batch, done

    def _book(self, batch: list[Entry], done: Computed) -> list[Event]:
        """What a batch has brought; the next one may be under way."""
        self._learn(batch, done.ended - done.began)
        self.totals.steps += 1
        self.totals.computed_tokens += sum(entry.count for entry in batch)
        self.totals.computed_prompt_tokens += sum(
            max(min(entry.first + entry.count, entry.sequence.num_prompt) - entry.first, 0) for entry in batch
        )
        if not self._flying:
            self._last_end = None
        events = []
        for entry, output in zip(batch, done.outputs, strict=True):
            event = self._read(entry, output, done.ended)
            if event is not None:
                events.append(event)
        return events

    def _read(self, entry: Entry, output: Output | None, now: float) -> Event | None:
        one = entry.sequence
        why = self._over.get(one.id)
        if why is not None and not self._is_flying(one.id):
            self.counts.wasted += why == "stop" and output is not None
            return self._end(one, entry.first if why == "stop" else entry.first + entry.count, why)
        self.priorities.served(one, entry.first, output is not None)
        if why is None:
            self._register(one)
            # what the batch under way adds is not there yet
            self.switch.stream(one, entry.first + entry.count)
        if output is None or why is not None:
            return None
        if output.vector is not None:  # nothing follows: the place of a token after the text is not computed
            return replace(self._end(one, entry.first + entry.count, "stop"), vector=output.vector)
        one.first_token = one.first_token if one.first_token is not None else now
        one.last_token = now
        if output.token in one.eos and not one.request.sampling.ignore_eos:
            if not self._is_flying(one.id):
                return self._end(one, entry.first + entry.count, "stop")
            self._over[one.id] = "stop"
            return None
        self.totals.made_tokens += 1
        event = Event(id=one.id, token=output.token, logprobs=output.logprobs, cached_tokens=one.cached)
        if not self._is_flying(one.id) and self._full(one):
            self._finish(one, "length")
            event = replace(event, finish="length")
        return event

    def _end(self, one: Sequence, kept: int, why: FinishReason) -> Event:
        """A request ends with so many tokens; those after them are not its own."""
        del one.tokens[kept:]
        one.computed = min(one.computed, kept)
        self._over.pop(one.id, None)
        return self._finish(one, why)

    def _expire(self, now: float) -> list[Event]:
        events = []
        for one in self._late(now):
            if self._is_flying(one.id):
                self._over.setdefault(one.id, "cancelled")
            else:
                events.append(self._finish(one, "cancelled"))
        return events

    def _is_flying(self, number: int) -> bool:
        return any(entry.sequence.id == number for batch in self._flying for entry in batch)
