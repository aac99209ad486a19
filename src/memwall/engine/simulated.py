"""The same engine on a virtual clock: counted pages, no model, costs in place of work.

`replay` feeds a list of arrivals to an engine, real or simulated. With the same clock and costs both take the same
decisions, since scheduler, pages and bookkeeping are the same objects; only the executor differs.
"""

from __future__ import annotations

from collections.abc import Sequence as Arrivals
from dataclasses import dataclass, field
from typing import Any

from memwall.engine.ahead import AheadEngine, InlineRunner
from memwall.engine.base import Costs, Limits, Scheduler
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.kv_pages import KVPages
from memwall.engine.priorities import Priorities
from memwall.engine.sequence import Event, Request, Sequence
from memwall.engine.stream import VirtualStream
from memwall.engine.swap import Copies, SwapArea
from memwall.engine.switching import Switcher, SwitchSettings
from memwall.memory import PagePool


@dataclass(slots=True)
class VirtualClock:
    """Time that passes when it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step: reading the weights once, arithmetic of each token, and its sequences' cached tokens."""

    seconds: float = 5e-3
    seconds_per_token: float = 2e-4
    seconds_per_cached_token: float = 1e-7

    def of(self, batch: list[Entry]) -> float:
        """Seconds of one step."""
        cached = sum((entry.first + entry.count) * entry.count for entry in batch)
        tokens = sum(entry.count for entry in batch)
        return self.seconds + tokens * self.seconds_per_token + cached * self.seconds_per_cached_token


@dataclass(slots=True)
class SimulatedExecutor:
    """Lets time pass and makes token `token` wherever one is drawn."""

    clock: VirtualClock
    cost: StepCost = field(default_factory=StepCost)
    token: int = 0

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """See `Executor`."""
        self.clock.now += self.cost.of(batch)
        return [Output(self.token) if entry.sample else None for entry in batch]

    def forget(self, sequence: Sequence) -> None:
        """See `Executor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request and when it comes, in seconds from the start."""

    at: float
    request: Request


def virtual_switcher(
    pages: KVPages, swap_pages: int, clock: VirtualClock, settings: SwitchSettings | None = None
) -> Switcher:
    """Swaps on a virtual clock: with room for so many pages, in the time that the settings' link takes (None: none)."""
    settings = settings or SwitchSettings()
    area = SwapArea(pages.pool, swap_pages, group_pages=settings.group_pages, merge=settings.merge)
    seconds = settings.link.seconds if settings.link is not None else _no_time
    out, into = (VirtualStream(clock, seconds) for _ in range(2))
    return Switcher(pages, area, settings, out=out, into=into, clock=clock)


def _no_time(copies: Copies) -> float:
    return 0.0


def simulated_engine(
    scheduler: Scheduler,
    *,
    num_pages: int,
    page_bytes: int = 1,
    limits: Limits | None = None,
    context_tokens: int = 1 << 20,
    switch: SwitchSettings | None = None,
    swap_pages: int = 0,
    cost: StepCost | None = None,
    costs: Costs | None = None,
    priorities: Priorities | None = None,
    keep_prefixes: bool = True,
    ahead: bool = False,
) -> Engine:
    """An engine whose clock is virtual. costs: what the scheduler believes; by default what the cost model says.
    ahead: one that forms batches while others are computed.

    swap_pages: room for what is swapped; switch: how it is, and over which link (None: in no time).
    """
    limits, clock, cost = limits or Limits(), VirtualClock(), cost or StepCost()
    switch = switch or SwitchSettings()
    pool = PagePool("kv/pages", page_bytes=page_bytes, most_pages=num_pages, group_pages=switch.group_pages)
    pages = KVPages(pool, limits.page_tokens, keep_prefixes=keep_prefixes)
    executor = SimulatedExecutor(clock, cost)
    told: dict[str, Any] = {
        "limits": limits,
        "context_tokens": context_tokens,
        "switch": virtual_switcher(pages, swap_pages, clock, switch),
        "priorities": priorities,
        "costs": costs or Costs(seconds_per_token=cost.seconds_per_token, seconds_per_page=cost.seconds_per_token),
        "clock": clock,
    }
    if ahead:
        return AheadEngine(scheduler, executor, pages, runner=InlineRunner(executor, clock), **told)
    return Engine(scheduler, executor, pages, **told)


def replay(engine: Engine, clock: VirtualClock, arrivals: Arrivals[Arrival], *, idle_step: float = 1e-3) -> list[Event]:
    """All events of a trace. The clock jumps to the next arrival where nothing runs.

    idle_step: seconds that a step passes in which nothing could be computed.
    """
    coming = sorted(arrivals, key=lambda arrival: arrival.at)
    events: list[Event] = []
    while coming or engine.busy:
        if not engine.busy:
            clock.now = max(clock.now, coming[0].at)
        while coming and coming[0].at <= clock.now:
            arrival = coming.pop(0)
            engine.submit(arrival.request, arrival.at)
        steps = engine.totals.steps
        engine.wakes_at = coming[0].at if coming else None
        events += engine.step()
        if engine.totals.steps == steps and not engine.in_flight:
            clock.now += idle_step
    return events
