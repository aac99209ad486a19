"""The engine's thread: requests in, events out, faults contained, nothing left behind."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from memwall.engine.base import Limits
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Event, Request
from memwall.engine.simulated import SimulatedExecutor, simulated_engine
from memwall.engine.thread import EngineThread
from memwall.errors import InputError


class Held:
    """What the thread asks of a `Serving`, over a simulated engine whose steps take real time where wanted."""

    def __init__(self, pages: int = 100) -> None:
        self.engine: Engine = simulated_engine(
            FirstComeFirstServed(), num_pages=pages, limits=Limits(token_budget=64), context_tokens=1000
        )
        self.before: Callable[[list[Entry]], None] = lambda batch: None
        executor, held = self.engine.executor, self
        assert isinstance(executor, SimulatedExecutor)
        run = executor.run

        class Watched:
            def run(self, batch: list[Entry]) -> list[Output | None]:
                held.before(batch)
                return run(batch)

            def forget(self, sequence: Any) -> None:
                """Nothing is kept."""

        self.engine.executor = Watched()

    def govern(self) -> None:
        """No budget here."""

    def settle(self) -> None:
        """Nor here."""


class Events:
    """Collects what is delivered."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, events: list[Event]) -> None:
        with self._changed:
            self.all += events
            self._changed.notify_all()

    def end_of(self, number: int) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: any(e.id == number and e.finish for e in self.all), 20)
            return next((event.finish for event in self.all if event.id == number and event.finish), None)


def request(tokens: int, made: int) -> Request:
    return Request(prompt=(7,) * tokens, sampling=Sampling(max_new_tokens=made, ignore_eos=True))


def start(held: Held) -> tuple[EngineThread, Events]:
    events = Events()
    thread = EngineThread(held, events)  # type: ignore[arg-type]
    thread.start()
    return thread, events


def test_requests_run_to_their_end_and_the_thread_ends_with_them() -> None:
    thread, events = start(Held())
    numbers = [thread.submit(request(10 + i, 5)) for i in range(20)]
    assert thread.stop(drain_seconds=20)
    assert [events.end_of(number) for number in numbers] == ["length"] * 20
    assert sum(event.token is not None for event in events.all) == 100
    assert not thread.alive


def test_what_could_never_run_is_refused_at_once() -> None:
    thread, _ = start(Held())
    with pytest.raises(InputError, match="shorten it"):
        thread.submit(request(1000, 1))
    assert thread.stop()


def test_cancelling_frees_pages_and_the_others_go_on() -> None:
    held = Held()
    held.before = lambda batch: time.sleep(0.001)
    thread, events = start(held)
    long, short = thread.submit(request(10, 900)), thread.submit(request(10, 30))
    thread.cancel(long)
    thread.cancel(long)
    assert events.end_of(long) == "cancelled"
    assert events.end_of(short) == "length"
    pages = held.engine.pages
    assert thread.call(lambda: pages.pool.used_pages - pages.idle_pages).result(10) == 0
    assert thread.stop()


def test_a_fault_ends_its_requests_and_the_next_ones_go_well(caplog: pytest.LogCaptureFixture) -> None:
    held = Held()
    thread, events = start(held)

    def break_down(batch: list[Entry]) -> None:
        held.before = lambda batch: None
        raise RuntimeError("a fault")

    held.before = break_down
    broken = thread.submit(request(10, 5))
    assert events.end_of(broken) == "error"
    assert events.end_of(thread.submit(request(10, 5))) == "length"
    assert thread.faults == 1
    assert "a step failed" in caplog.text
    assert thread.stop()
    assert held.engine.pages.pool.used_pages == held.engine.pages.idle_pages


def test_what_a_step_had_told_before_it_failed_is_told() -> None:
    held = Held()
    late = dataclasses.replace(request(10, 50), until=held.engine.clock() - 1.0)
    other = held.engine.submit(request(10, 5))
    ended = held.engine.submit(late)

    def break_down(batch: list[Entry]) -> None:
        raise RuntimeError("a fault")

    held.before = break_down
    with pytest.raises(RuntimeError):
        held.engine.step()
    told = {event.id: event.finish for event in held.engine.abandon()}
    assert told == {ended.id: "cancelled", other.id: "error"}
    assert held.engine.abandon() == []
    assert not held.engine.busy


def test_the_end_cancels_what_has_not_ended() -> None:
    held = Held()
    held.before = lambda batch: time.sleep(0.01)
    thread, events = start(held)
    number = thread.submit(request(10, 900))
    assert thread.stop(drain_seconds=0.1)
    assert events.end_of(number) == "cancelled"


def test_a_call_hands_its_fault_to_the_caller() -> None:
    thread, _ = start(Held())
    future = thread.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        future.result(10)
    assert thread.stop()
