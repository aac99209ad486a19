"""A share of the processor for one of two processes, kept while it computes: whole cores while the other one computes
too, a quota of processor time for the rest.

A share of the machine is so many cores' worth of time: on 2 cores, 60 percent are 1.2 cores. While both processes
compute, each has as many threads as whole cores come nearest to its share, and no more than there are together: threads
that wait for each other at every product must not wait for a core as well. What its share is below its cores it rests,
and meanwhile the other one has all of them. The one that computes alone has a thread per core, up to its share.

A process rests, between two parts of a layer, whenever it has used more processor time than its share of the time that
passed; what it did not use is kept for some milliseconds only. This is what the kernel's own quotas do (`cpu.max` of
control groups), which need rights that a user's program has not. How work is cut follows the number of cores and not of
threads, so every bit of a result is the same at every share.
"""

from __future__ import annotations

import math
import mmap
import time

from memwall import kernels
from memwall._native import set_lane_threads
from memwall.engine.base import PHASES, Phase

SAVED_SECONDS = 4e-3
"""Of unused time that may be caught up with."""
OWED_SECONDS = 2e-3
"""Of time used too early before it rests while the other one computes: that takes all cores meanwhile, which must be
worth it."""
LINGER_SECONDS = 4e-3
"""That a process counts as computing after a batch: one that decodes has its next one as soon as the engine has planned
it, and must not find all cores taken for a part of a layer."""


class Board:
    """What two processes see of each other, in memory that they share: until when each computes, and its percent."""

    def __init__(self) -> None:
        words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self._until, self._percent = words[:2], words[2:4]

    def show(self, phase: Phase, percent: int) -> None:
        """The process computes from now on."""
        at = PHASES.index(phase)
        self._percent[at], self._until[at] = percent, math.inf

    def hide(self, phase: Phase, *, linger: bool = False) -> None:
        """It rests, or is gone; linger: it waits for its next batch, which may follow at once."""
        self._until[PHASES.index(phase)] = time.monotonic() + LINGER_SECONDS if linger else 0.0

    def beside(self, phase: Phase) -> int:
        """Percent of the other one while it computes, else 0."""
        at = 1 - PHASES.index(phase)
        return int(self._percent[at]) if self._until[at] > time.monotonic() else 0


def cores_beside(phase: Phase, percent: int, other: int, cores: int) -> tuple[int, float]:
    """(threads, cores' worth of time) of a process while the other one computes. Above 100 percent together they
    compete, and each has its part of the whole; threads of both are never more than cores, if there are two.
    """
    whole = max(percent + other, 100)
    rate = percent / whole * cores
    if cores < 2:
        return 1, rate
    prefill = rate if phase == "prefill" else other / whole * cores
    decode = other / whole * cores if phase == "prefill" else rate
    first = min(max(round(prefill * cores / (prefill + decode)), 1), cores - 1)
    return (first if phase == "prefill" else cores - first), rate


class Pacer:
    """Holds this process to `percent` of `cores`.

    whole_threads: alone it has a thread per core at any share, so that its speed follows the share; else as many as the
    share takes, which wastes less time on waiting for each other, and work is cut for so many. board: where it sees the
    other process; None: there is none.
    """

    def __init__(
        self, percent: int, cores: int, *, whole_threads: bool = True, board: Board | None = None,
        phase: Phase = "prefill",
    ) -> None:  # fmt: skip
        self.cores = cores
        self.whole_threads = whole_threads
        self.board = board
        self.phase = phase
        self.rested = 0.0
        """Seconds that the quota made it wait."""
        self.set(percent)

    def set(self, percent: int) -> None:
        """A new share from now on."""
        self.percent = percent
        due = max(math.ceil(percent / 100 * self.cores - 1e-9), 1)
        self._alone = self.cores if self.whole_threads else due
        kernels.set_num_threads(self._alone)
        self._credit = 0.0
        self._wall, self._used = time.monotonic(), time.process_time()
        self._take_cores()

    def begin(self) -> None:
        """A batch begins."""
        if self.board is not None:
            self.board.show(self.phase, self.percent)
        self._take_cores()

    def end(self) -> None:
        """It is over: the other process may soon have all cores."""
        if self.board is not None:
            self.board.hide(self.phase, linger=True)

    def pace(self) -> None:
        """Rests if more was used than is due, and looks at what the other does. Call it often while computing."""
        wall, used = time.monotonic(), time.process_time()
        self._credit += (wall - self._wall) * self.rate - (used - self._used)
        self._credit = min(self._credit, SAVED_SECONDS * self.rate)
        self._wall, self._used = wall, used
        self._take_cores()
        if self.rate >= self.threads:
            self._credit = max(self._credit, 0.0)
        elif self._credit < -self._owed:
            self._rest(-self._credit / self.rate)

    def _rest(self, seconds: float) -> None:
        if self.board is not None:
            self.board.hide(self.phase)
        time.sleep(seconds)
        self.rested += seconds
        if self.board is not None:
            self.board.show(self.phase, self.percent)

    def _take_cores(self) -> None:
        """As many threads as are due now."""
        other = self.board.beside(self.phase) if self.board is not None else 0
        if other:
            self.threads, self.rate = cores_beside(self.phase, self.percent, other, self.cores)
            self.threads = min(self.threads, self._alone)
        else:
            self.threads, self.rate = self._alone, self.percent / 100 * self.cores
        self._owed = OWED_SECONDS * self.rate if other else 0.0
        set_lane_threads(0 if self.threads == self._alone else self.threads)
