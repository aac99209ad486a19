"""Two workers on a virtual clock: a device whose compute is shared out and whose memory bandwidth is contended.

An iteration is a row of segments, in turn products with the weights (dense) and attention. At every moment each worker
is in one segment; its compute follows its share of the device (saturating), and when both together ask for more
bandwidth than there is, each gets in proportion to what it asks. Time goes from one end of a segment to the next, so
that how much one phase slows the other down comes out of what they do at the same time, and is put in nowhere.

Units: seconds, bytes, floating-point operations (flop), tokens; shares are percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from memwall.engine.base import Costs, Limits, Phase, Scheduler, Shares
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.hand_over import Pull
from memwall.engine.kv_pages import KVPages
from memwall.engine.phased import WINDOW_ITERATIONS, Done, PhasedEngine
from memwall.engine.sequence import Sequence as EngineSequence
from memwall.engine.simulated import VirtualClock
from memwall.errors import InputError
from memwall.hardware.units import GB, TB
from memwall.memory import PagePool

Kind = Literal["dense", "attention"]
Switching = Literal["delayed", "stop"]
GROUPS = 2
"""Pairs of segments of an iteration; layers are alike, so a few stand for all."""
EPSILON = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What an iteration reads and computes. parameters: of the products; kv_bytes: of one token, all layers;
    attention_flop: of one token attending to one token, all layers (4 x layers x heads x numbers a head).
    """

    parameters: int
    weight_bytes: int
    kv_bytes: int
    attention_flop: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Work that is one kind all through."""

    kind: Kind
    flop: float
    nbytes: float


def segments(size: ModelSize, batch: Sequence[tuple[int, int]]) -> list[Segment]:
    """One iteration over (first, count) of each sequence: `count` tokens after `first`."""
    tokens = sum(count for _, count in batch)
    # a chunk reads what is before it once, a token sees half of its own chunk on the average
    reads = sum(first + count for first, count in batch)
    pairs = sum(count * (first + (count + 1) / 2) for first, count in batch)
    dense = Segment("dense", 2.0 * size.parameters * tokens / GROUPS, size.weight_bytes / GROUPS)
    attention = Segment("attention", size.attention_flop * pairs / GROUPS, size.kv_bytes * reads / GROUPS)
    return [dense, attention] * GROUPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """compute_saturation, decay: of each kind; a share beyond the first counts only `decay` as much. memory_saturation:
    the share from which a worker can draw all the bandwidth. seconds: of an iteration, whatever is in it.
    """

    flop_per_s: float = 100.0 * TB
    bytes_per_s: float = 800.0 * GB
    compute_saturation: float = 0.7
    decay: float = 0.4
    memory_saturation: float = 0.35
    seconds: float = 1e-3

    def compute_seconds(self, segment: Segment, percent: float) -> float:
        """Of the arithmetic alone."""
        share = percent / 100
        over = max(share - self.compute_saturation, 0.0)
        return segment.flop / (self.flop_per_s * (share - over + self.decay * over))

    def bandwidth(self, percent: float) -> float:
        """The most that a worker draws, bytes per second."""
        return self.bytes_per_s * min(percent / 100 / self.memory_saturation, 1.0)

    def alone_seconds(self, parts: Sequence[Segment], percent: float) -> float:
        """An iteration by itself."""
        reach = self.bandwidth(percent)
        return self.seconds + sum(max(self.compute_seconds(part, percent), part.nbytes / reach) for part in parts)

    def together(self, parts: Sequence[tuple[Segment, float]]) -> list[float]:
        """Seconds that each of these segments would take if all went on beside each other at their percents."""
        alone = [max(self.compute_seconds(s, percent), s.nbytes / self.bandwidth(percent)) for s, percent in parts]
        asked = sum(segment.nbytes / max(seconds, EPSILON) for (segment, _), seconds in zip(parts, alone))
        if asked <= self.bytes_per_s:
            return alone
        slow = asked / self.bytes_per_s
        return [
            max(self.compute_seconds(segment, percent), segment.nbytes / (segment.nbytes / max(least, EPSILON) / slow))
            if segment.nbytes
            else least
            for (segment, percent), least in zip(parts, alone)
        ]


@dataclass(slots=True)
class Flight:
    """An iteration under way. left: segments, the present one first, of which `part` is still to be done; wait: fixed
    seconds before them.
    """

    batch: list[Entry]
    began: float
    wait: float
    left: list[Segment]
    part: float = 1.0


@dataclass(slots=True)
class VirtualWorkers:
    """Workers of `PhasedEngine` that let time pass. prepare_seconds: until workers with new shares are ready; switching
    `stop`: the naive way, in which both end first and nobody computes meanwhile.
    """

    clock: VirtualClock
    device: Device
    size: ModelSize
    shares: Shares
    prepare_seconds: float = 0.0
    switching: Switching = "delayed"
    token: int = 0
    preparing: Shares | None = None
    _ready: float = 0.0
    _own: dict[Phase, int] = field(default_factory=dict)
    _flights: dict[Phase, Flight] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """See `Workers`."""
        return bool(self._flights)

    def switch(self, shares: Shares) -> None:
        """See `Workers`."""
        self.preparing, self._ready = shares, self.clock.now + self.prepare_seconds
        if self.switching == "stop":
            self._ready = float("inf")  # counted from when both have ended
        if not self._flights:
            self._settle()

    def start(self, phase: Phase, batch: list[Entry], pulls: Sequence[Pull] = ()) -> None:
        """See `Workers`. Pages are copied in no time."""
        wait = self.device.seconds
        if self.switching == "stop" and self.preparing is not None:
            wait += max(self._ready - self.clock.now, 0.0)
        self._own[phase] = self.shares.of(phase)
        parts = segments(self.size, [(entry.first, entry.count) for entry in batch])
        self._flights[phase] = Flight(batch, self.clock.now, wait, parts)

    def collect(self, until: float | None = None, *, wait: bool = True) -> list[Done]:
        """See `Workers`."""
        self._settle()
        while wait and self._flights:
            steps = self._steps()
            step = min(steps.values())
            if until is not None and self.clock.now + step > until:
                self._advance(steps, max(until - self.clock.now, 0.0))
                self.clock.now = max(self.clock.now, until)
                return []
            self._advance(steps, step)
            self.clock.now += step
            over = [phase for phase, flight in self._flights.items() if not flight.left]
            if over:
                return [self._end(phase) for phase in over]
        return []

    def wake(self) -> None:
        """Nobody waits here."""

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """See `Executor`: one batch by itself, as the prefill worker."""
        self.start("prefill", batch)
        outputs = self.collect()[0].outputs
        assert outputs is not None
        return outputs

    def forget(self, sequence: EngineSequence) -> None:
        """See `Executor`."""

    def _percents(self) -> dict[Phase, float]:
        own = {phase: float(self._own[phase]) for phase in self._flights}
        total = max(sum(own.values()) / 100, 1.0)
        return {phase: share / total for phase, share in own.items()}

    def _steps(self) -> dict[Phase, float]:
        """Seconds until each worker ends what it is in, if nothing else changes."""
        percents = self._percents()
        active = [phase for phase, flight in self._flights.items() if flight.wait <= 0]
        whole = self.device.together([(self._flights[phase].left[0], percents[phase]) for phase in active])
        steps = {phase: flight.wait for phase, flight in self._flights.items() if flight.wait > 0}
        return steps | {phase: seconds * self._flights[phase].part for phase, seconds in zip(active, whole)}

    def _advance(self, steps: dict[Phase, float], seconds: float) -> None:
        for phase, flight in self._flights.items():
            left = steps[phase] - seconds
            if flight.wait > 0:
                flight.wait = left if left > EPSILON else 0.0
            elif left > EPSILON:
                flight.part *= left / steps[phase]
            else:
                del flight.left[0]
                flight.part = 1.0

    def _end(self, phase: Phase) -> Done:
        flight = self._flights.pop(phase)
        self._settle()
        outputs = [Output(self.token) if entry.sample else None for entry in flight.batch]
        return Done(phase, flight.batch, outputs, self.clock.now - flight.began, flight.began, self.clock.now)

    def _settle(self) -> None:
        """Puts new shares in force once they can be; a worker takes them up with its next iteration."""
        if self.preparing is None:
            return
        if self.switching == "stop" and self._ready == float("inf") and not self._flights:
            self._ready = self.clock.now + self.prepare_seconds
        if self.switching == "stop" and self._ready < float("inf"):
            self.shares = self.preparing  # whoever begins now waits until then
        if self.clock.now >= self._ready:
            self.shares, self.preparing = self.preparing, None


def virtual_engine(
    scheduler: Scheduler,
    *,
    device: Device,
    size: ModelSize,
    shares: Shares,
    num_pages: int,
    page_bytes: int = 1,
    limits: Limits | None = None,
    context_tokens: int = 1 << 20,
    prepare_seconds: float = 0.0,
    switching: Switching = "delayed",
    window: int = WINDOW_ITERATIONS,
    costs: Costs | None = None,
) -> PhasedEngine:
    """An engine with two workers whose clock is virtual."""
    if num_pages < 1:
        raise InputError(f"{num_pages} pages; there must be at least 1")
    limits, clock = limits or Limits(), VirtualClock()
    pool = PagePool("kv/pages", page_bytes=page_bytes, most_pages=num_pages)
    seconds = 2.0 * size.parameters / device.flop_per_s
    workers = VirtualWorkers(clock, device, size, shares, prepare_seconds=prepare_seconds, switching=switching)
    return PhasedEngine(
        scheduler,
        workers,
        KVPages(pool, limits.page_tokens),
        limits=limits,
        context_tokens=context_tokens,
        window=window,
        costs=costs or Costs(seconds_per_token=seconds, seconds_per_page=seconds),
        clock=clock,
    )


@dataclass(slots=True)
class OneWorker:
    """The same device with one worker that computes prompts and tokens together: what two are compared with."""

    clock: VirtualClock
    device: Device
    size: ModelSize
    token: int = 0

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """See `Executor`."""
        parts = segments(self.size, [(entry.first, entry.count) for entry in batch])
        self.clock.now += self.device.alone_seconds(parts, 100)
        return [Output(self.token) if entry.sample else None for entry in batch]

    def forget(self, sequence: EngineSequence) -> None:
        """See `Executor`."""


def colocated_engine(
    scheduler: Scheduler,
    *,
    device: Device,
    size: ModelSize,
    num_pages: int,
    limits: Limits,
    context_tokens: int = 1 << 20,
) -> Engine:
    """An engine with one worker on that device."""
    clock = VirtualClock()
    pool = PagePool("kv/pages", page_bytes=1, most_pages=num_pages)
    seconds = 2.0 * size.parameters / device.flop_per_s
    return Engine(
        scheduler,
        OneWorker(clock, device, size),
        KVPages(pool, limits.page_tokens),
        limits=limits,
        context_tokens=context_tokens,
        costs=Costs(seconds_per_token=seconds, seconds_per_page=seconds),
        clock=clock,
    )
