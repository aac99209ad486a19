"""The engine in a thread of its own: others hand requests in and are handed events, and nobody waits for anybody.

Requests and calls go through one queue that is emptied between two steps. Events of a step go out in one call of
`deliver`, which must return at once: a reader that is slow keeps its events in a queue of its own.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from memwall.engine.sequence import Event, Request
from memwall.engine.serving import Serving

IDLE_SECONDS = 0.25
STALLED_SECONDS = 0.02
log = logging.getLogger("memwall.engine")
Answer = TypeVar("Answer")


class EngineThread:
    """Runs a `Serving` until `stop`."""

    def __init__(self, serving: Serving, deliver: Callable[[list[Event]], None]) -> None:
        self.serving = serving
        self.engine = serving.engine
        self._deliver = deliver
        self._numbers = itertools.count()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._draining = False
        self.faults = 0
        self._thread = threading.Thread(target=self._run, name="memwall engine", daemon=True)

    def start(self) -> None:
        """The thread begins to wait for requests."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still takes steps."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> int:
        """Hands a request in; its number. InputError when it could never run."""
        self.engine.check(request)
        number, arrival = next(self._numbers), self.engine.clock()
        self._post(lambda: self._enter(request, arrival, number))
        return number

    def cancel(self, number: int) -> None:
        """Ends a request, if it is not over, and frees its pages; its last event says `cancelled`."""
        self._post(lambda: self._cancel(number))

    def call(self, function: Callable[[], Answer]) -> Future[Answer]:
        """The answer of a function that is called between two steps, when nothing else touches the engine."""
        future: Future[Answer] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        return future

    def stop(self, *, drain_seconds: float = 0.0) -> bool:
        """Ends the thread; requests have so long to end by themselves, then they are cancelled. False if it hangs."""
        self._draining = True
        self._post(lambda: None)
        self._thread.join(drain_seconds)
        self._stopping = True
        self._post(lambda: None)
        self._thread.join(30.0)
        return not self._thread.is_alive()

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._calls.append(call)
            self._wake.notify()
        self.engine.wake()

    def _enter(self, request: Request, arrival: float, number: int) -> None:
        try:
            self.engine.submit(request, arrival, number)
        except Exception:
            log.exception("request %d could not enter", number)
            self._deliver([Event(id=number, finish="error")])

    def _cancel(self, number: int) -> None:
        event = self.engine.cancel(number)
        if event is not None:
            self._deliver([event])

    def _run(self) -> None:
        while not (self._stopping or (self._draining and not self.engine.busy and not self._calls)):
            with self._wake:
                if not self._calls and not self.engine.busy:
                    self._wake.wait(IDLE_SECONDS)
                calls, self._calls = self._calls, deque()
            try:
                while calls:
                    calls.popleft()()
                self._step()
            except Exception:  # a fault of ours: its requests end, the next ones may go well
                self.faults += 1
                log.exception("a step failed; all requests in the engine end")
                self._deliver(self.engine.abandon())
                with self._wake:
                    self._calls.extendleft(reversed(calls))
        try:
            self._deliver(self.engine.drain())
        except Exception:
            log.exception("the last step failed; all requests in the engine end")
            self._deliver(self.engine.abandon())
        self._deliver([event for number in self._left() if (event := self.engine.cancel(number)) is not None])

    def _left(self) -> list[int]:
        return [one.id for one in self.engine.everyone()]

    def _step(self) -> None:
        if not self.engine.busy:
            self.serving.settle()
            return
        self.serving.govern()
        before = self.engine.totals.steps
        events = self.engine.step()
        if events:
            self._deliver(events)
        if self.engine.totals.steps == before and not self.engine.in_flight:  # the budget has no room for anyone now
            with self._wake:
                if not self._calls:
                    self._wake.wait(STALLED_SECONDS)
