"""A share of the processor for one process, kept while it computes: a quota of processor time, layer by layer.

A share of the machine is so many cores' worth of time: on 2 cores, 60 percent are 1.2 cores. The process rests, between
two parts of a layer, whenever it has used more processor time than its share of the time that passed; what it did not
use is kept for some milliseconds only. This is what the kernel's own quotas do (`cpu.max` of control groups), which
need rights that a user's program has not.
"""

from __future__ import annotations

import math
import os
import time

from memwall import kernels
from memwall.engine.base import Shares

SAVED_SECONDS = 4e-3
"""Of unused time that may be caught up with."""
NICE_STEP = 1.25
"""Of the kernel's scheduler: one level of niceness is so much less weight."""


class Pacer:
    """Holds this process to `percent` of `cores`.

    whole_threads: always a thread per core, so that sums run in the same order at every share; else as many as the
    share takes, which wastes less time on waiting for each other.
    """

    def __init__(self, percent: int, cores: int, *, whole_threads: bool = True) -> None:
        self.cores = cores
        self.whole_threads = whole_threads
        self.rested = 0.0
        """Seconds that the quota made it wait."""
        self.set(percent)

    def set(self, percent: int) -> None:
        """A new share from now on."""
        self.percent = percent
        self.rate = percent / 100 * self.cores
        kernels.set_num_threads(self.cores if self.whole_threads else max(math.ceil(self.rate - 1e-9), 1))
        self._credit = 0.0
        self._wall, self._used = time.monotonic(), time.process_time()

    def pace(self) -> None:
        """Rests if more was used than is due. Call it often while computing."""
        if self.percent >= 100:
            return
        wall, used = time.monotonic(), time.process_time()
        self._credit += (wall - self._wall) * self.rate - (used - self._used)
        self._credit = min(self._credit, SAVED_SECONDS * self.rate)
        self._wall, self._used = wall, used
        if self._credit < 0:
            seconds = -self._credit / self.rate
            time.sleep(seconds)
            self.rested += seconds


def niceness(shares: Shares) -> tuple[int, int]:
    """Levels of niceness of prefill and decode, so that they compete in proportion to their shares."""
    if shares.prefill + shares.decode <= 100:
        return 0, 0
    level = round(math.log(shares.prefill / shares.decode) / math.log(NICE_STEP))
    return (0, min(level, 19)) if level > 0 else (min(-level, 19), 0)


def be_nice(level: int) -> None:
    """Lowers this process's weight. Without rights it cannot be raised again: that takes a new process."""
    if level:
        os.nice(level)
