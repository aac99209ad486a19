"""Copies that run beside the steps: one thread for each direction, in the order in which they were handed over.

A task is the copies of one request. Whoever needs its result waits for that task alone; a task may come after one of
the other direction (what is read must have been written). The same calls run on a virtual clock, where a copy takes
what the link says.

Rates of a slower link can be emulated: a task then lasts at least count * seconds_per_copy + bytes / bytes_per_s;
figures measured so must say that the link is emulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from memwall.engine.swap import Copies
from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way between two memories. seconds_per_copy: until a copy begins to move bytes."""

    bytes_per_s: float
    seconds_per_copy: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or self.seconds_per_copy < 0:
            raise InputError(f"{self}: bytes a second must be above zero, seconds per copy not below")

    def seconds(self, copies: Copies) -> float:
        """n * t_l + bytes / BW."""
        return copies.count * self.seconds_per_copy + copies.nbytes / self.bytes_per_s


class Task(Protocol):
    """Copies under way. seconds: how long they took, once they are done; error: what went wrong with them."""

    copies: Copies
    seconds: float
    error: OSError | None

    @property
    def done(self) -> bool:
        """Whether they are over, well or not."""

    def wait(self) -> None:
        """Returns when they are."""


class Stream(Protocol):
    """Does tasks one after the other."""

    def submit(self, copies: Copies, after: Sequence[Task] = ()) -> Task:
        """Returns at once. after: of another stream, which must be done before."""

    def stop(self) -> None:
        """No more come."""


class ThreadTask:
    """See `Task`."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.seconds = 0.0
        self.error: OSError | None = None
        self.future: Future[None] | None = None

    @property
    def done(self) -> bool:
        """See `Task`."""
        return self.future is not None and self.future.done()

    def wait(self) -> None:
        """See `Task`."""
        assert self.future is not None
        self.future.result()

    def run(self, link: Link | None, after: Sequence[Task]) -> None:
        """In the copying thread; copies hold no lock of the interpreter."""
        for task in after:
            task.wait()
        began = time.perf_counter()
        try:
            self.copies.run()
        except OSError as error:
            self.error = error
        if link is not None:
            time.sleep(max(link.seconds(self.copies) - (time.perf_counter() - began), 0.0))
        self.seconds = time.perf_counter() - began


class ThreadStream:
    """See `Stream`. The thread begins with the first task."""

    def __init__(self, name: str, link: Link | None = None) -> None:
        self.link = link
        self._name = name
        self._worker: ThreadPoolExecutor | None = None

    def submit(self, copies: Copies, after: Sequence[Task] = ()) -> ThreadTask:
        """See `Stream`."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, self._name)
        task = ThreadTask(copies)
        task.future = self._worker.submit(task.run, self.link, after)
        return task

    def stop(self) -> None:
        """See `Stream`."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None


class Clock(Protocol):
    """A virtual clock."""

    now: float


@dataclass(slots=True, eq=False)
class VirtualTask:
    """See `Task`."""

    copies: Copies
    seconds: float
    end: float
    clock: Clock
    error: OSError | None = None

    @property
    def done(self) -> bool:
        """See `Task`."""
        return self.clock.now >= self.end

    def wait(self) -> None:
        """See `Task`: time passes."""
        self.clock.now = max(self.clock.now, self.end)


class VirtualStream:
    """See `Stream`: bytes move at once, time passes on a virtual clock."""

    def __init__(self, clock: Clock, seconds: Callable[[Copies], float]) -> None:
        self.clock = clock
        self._seconds = seconds
        self._free_at = 0.0

    def submit(self, copies: Copies, after: Sequence[Task] = ()) -> VirtualTask:
        """See `Stream`."""
        error = None
        try:
            copies.run()
        except OSError as failure:
            error = failure
        ends = [task.end for task in after if isinstance(task, VirtualTask)]
        began = max(self.clock.now, self._free_at, *ends)
        seconds = self._seconds(copies)
        self._free_at = began + seconds
        return VirtualTask(copies, seconds, self._free_at, self.clock, error)

    def stop(self) -> None:
        """See `Stream`."""
