"""A background sampler around a stretch of work: memory, processor use, power, at a fixed interval, then their means.

*Source*: EfficientLLM (2025), arXiv 2505.13840: sampler and the metrics AMU, PCU, AEC.
*Idea*: one reading is a peak or an accident. A thread takes a sample every dt; the first and the last are taken by the
caller's own thread at the very start and stop, so that the series spans the work and nothing else. What rises and falls
between samples (processor time, joules) is read as counters, so its means are exact at any dt; memory is integrated by
trapezoids.
*Units*: seconds since the start; bytes; utilisation 1.0 = all processors busy; watts.
*Cost*: some 0.1 ms of one processor a sample; `Series.sampler_share` says what it was.
*Holds when*: the interpreter lets the thread run: work that holds its lock longer than dt makes samples late, which the
times in the series show. `busy` counts the whole machine: where it is far above `utilisation`, others were at work.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from memwall.errors import InputError
from memwall.hardware.power import PowerSource
from memwall.hardware.system import usable_processors

SHORTEST_DT_S, LONGEST_DT_S = 0.001, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Samples of one stretch. Sample i of utilisation, busy and watts is the mean since sample i - 1; sample 0 is 0."""

    dt_s: float
    times_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]
    utilisation: tuple[float, ...]
    """This process's processor time over that of all processors it may use."""
    busy: tuple[tuple[float, ...], ...]
    """Of each processor of the machine, by /proc/stat, whoever used it; empty where the system does not tell."""
    watts: tuple[float, ...]
    power_source: str
    """`rapl` or `modelled`; empty where no source was given (watts are then 0)."""
    sampler_share: float
    """Processor time of the sampling thread over the length of the stretch."""

    @property
    def seconds(self) -> float:
        """Length of the stretch."""
        return self.times_s[-1]

    @property
    def mean_memory_bytes(self) -> float:
        """AMU: (1/T) times the integral of memory over time."""
        area = sum(
            (after - before) * (high + low) / 2
            for before, after, low, high in zip(
                self.times_s, self.times_s[1:], self.memory_bytes, self.memory_bytes[1:], strict=False
            )
        )
        return area / self.seconds

    @property
    def mean_utilisation(self) -> float:
        """PCU: (1/T) times the integral of utilisation over its peak, which is 1."""
        return self._mean(self.utilisation)

    @property
    def mean_watts(self) -> float:
        """AEC: (1/T) times the integral of power."""
        return self._mean(self.watts)

    @property
    def mean_others(self) -> float:
        """Share of the machine that other processes took meanwhile; 0 where the system does not tell."""
        if not self.busy:
            return 0.0
        whole = self._mean([sum(cores) / len(cores) for cores in self.busy])
        return max(whole - self.mean_utilisation * usable_processors() / len(self.busy[0]), 0.0)

    def _mean(self, rates: Sequence[float]) -> float:
        """Of what is a mean over each interval."""
        return sum(
            rate * (after - before)
            for rate, before, after in zip(rates[1:], self.times_s, self.times_s[1:], strict=False)
        ) / self.seconds  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def from_dict(told: dict[str, Any]) -> Series:
        """What `to_dict` gave, lists for tuples."""
        held: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list | tuple) else value for name, value in told.items()
        }
        return Series(**{**held, "busy": tuple(tuple(cores) for cores in held["busy"])})


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    memory_bytes: int
    own_s: float
    cores: tuple[tuple[int, int], ...]
    joules: float


class Meter:
    """`with Meter(dt_s=0.1, memory=resident_bytes) as meter: work()`, then `meter.series`.

    memory: called for the bytes now. exact: the same, slower, where `memory` lags behind (as the system's quick count,
    by some pages per core and kind); asked before the first sample and after the last, and what the quick one is off by
    then is made good in all samples, on a straight line between the two. power: None for no watts. A meter can be used
    again; it keeps the last stretch.
    """

    def __init__(
        self,
        *,
        dt_s: float,
        memory: Callable[[], int],
        exact: Callable[[], int] | None = None,
        power: PowerSource | None = None,
    ) -> None:
        check_interval(dt_s)
        self.dt_s, self._memory, self._exact, self._power = dt_s, memory, exact, power
        self._lag = [0, 0]
        self._samples: list[_Sample] = []
        self._sampler_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._series: Series | None = None

    @property
    def series(self) -> Series:
        """Of the last stretch; InputError before there is one."""
        if self._series is None:
            raise InputError("the meter has not been stopped yet: it has no series")
        return self._series

    def start(self) -> None:
        """The stretch begins with this call's sample."""
        self._stop.clear()
        self._series = None
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._lag[0] = self._lagging()
        self._samples = [self._sample()]
        self._thread.start()

    def stop(self) -> Series:
        """The stretch ends with this call's sample."""
        last = self._sample()
        self._lag[1] = self._lagging()
        self._stop.set()
        if self._thread is None:
            raise InputError("the meter was not started")
        self._thread.join()
        self._thread = None
        kept = [sample for sample in self._samples if sample.at < last.at]  # the thread may have been the later one
        self._series = self._made([*kept, last])
        return self._series

    def __enter__(self) -> Meter:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        began = self._samples[0].at
        count, own = 1, time.thread_time()
        while not self._stop.wait(max(began + count * self.dt_s - time.perf_counter(), 0)):
            self._samples.append(self._sample())
            # a late sample does not bring a burst of others after it
            count = int((time.perf_counter() - began) / self.dt_s) + 1
        self._sampler_s = time.thread_time() - own

    def _lagging(self) -> int:
        """By how much the quick count is too low now."""
        return 0 if self._exact is None else self._exact() - self._memory()

    def _sample(self) -> _Sample:
        return _Sample(
            time.perf_counter(),
            self._memory(),
            time.process_time(),
            processor_ticks(),
            0.0 if self._power is None else self._power.joules(),
        )

    def _made(self, samples: list[_Sample]) -> Series:
        began, processors = samples[0].at, usable_processors()
        length = max(samples[-1].at - began, 1e-9)
        lags = (self._lag[0] + (self._lag[1] - self._lag[0]) * (sample.at - began) / length for sample in samples)
        utilisation, busy, watts = [0.0], [tuple(0.0 for _ in samples[0].cores)], [0.0]
        for before, after in itertools.pairwise(samples):
            step = max(after.at - before.at, 1e-9)
            utilisation.append((after.own_s - before.own_s) / step / processors)
            watts.append((after.joules - before.joules) / step)
            pairs = zip(before.cores, after.cores, strict=False)
            busy.append(tuple((now[0] - then[0]) / max(now[1] - then[1], 1) for then, now in pairs))
        return Series(
            dt_s=self.dt_s,
            times_s=tuple(sample.at - began for sample in samples),
            memory_bytes=tuple(sample.memory_bytes + round(lag) for sample, lag in zip(samples, lags, strict=True)),
            utilisation=tuple(utilisation),
            busy=tuple(busy) if samples[0].cores else (),
            watts=tuple(watts),
            power_source="" if self._power is None else self._power.name,
            sampler_share=self._sampler_s / max(samples[-1].at - began, 1e-9),
        )


def check_interval(dt_s: float) -> None:
    """InputError for an interval that a meter does not take."""
    if not SHORTEST_DT_S <= dt_s <= LONGEST_DT_S:
        raise InputError(f"dt {dt_s:g} s: must be from {SHORTEST_DT_S:g} to {LONGEST_DT_S:g} seconds")


def processor_ticks() -> tuple[tuple[int, int], ...]:
    """(busy, all) ticks of each processor since the machine started; empty where there is no /proc/stat."""
    try:
        file = os.open("/proc/stat", os.O_RDONLY)
    except OSError:
        return ()
    try:
        text = os.read(file, 1 << 16)
    finally:
        os.close(file)
    found = []
    for line in text.split(b"\n")[1:]:
        if not line.startswith(b"cpu"):
            break
        ticks = [int(word) for word in line.split()[1:9]]
        whole = sum(ticks)
        found.append((whole - ticks[3] - ticks[4], whole))
    return tuple(found)
