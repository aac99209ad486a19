"""Carries a pipeline of nano-operations out on a virtual device, layer after layer.

Two ways to share the device. `fluid`: products get what the others that run leave of it at each moment, which is what
a device does by itself. `fixed`: every nano-operation has its own share from begin to end, and one only begins when
there is that much; this is what a schedule's shares mean. Either way streams run their nano-operations in order and
wait for edges; nothing else is decided while it runs.

Source: NanoFlow, Zhu 2024, arXiv 2408.12757, section 4.3. Units: seconds, shares 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from memwall.engine.nano_schedule import (
    RESOURCES,
    Edge,
    Interference,
    NanoOperation,
    Resource,
    Schedule,
    Turns,
    in_turn,
)

Sharing = Literal["fluid", "fixed"]
TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What is carried out. seconds: of each alone; shares: R of each (with `fluid`, of those that are no products);
    order: of each class, what its stream runs in a round.
    """

    operations: tuple[NanoOperation, ...]
    seconds: tuple[float, ...]
    shares: tuple[float, ...]
    order: dict[Resource, Turns]
    edges: tuple[Edge, ...]

    @staticmethod
    def of(schedule: Schedule, interference: Interference) -> Pipeline:
        """From a schedule: what each would take alone follows from its share."""
        parts = tuple(one.operation for one in schedule.placed)
        alone = tuple(one.seconds * interference.speed(one.operation.resource, one.share) for one in schedule.placed)
        order = {name: schedule.stream(name) for name in RESOURCES}
        shares = tuple(one.share for one in schedule.placed)
        return Pipeline(operations=parts, seconds=alone, shares=shares, order=order, edges=schedule.edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When one nano-operation of one layer ran."""

    operation: int
    layer: int
    start: float
    end: float


@dataclass(slots=True)
class Run:
    """What came of it. spans: in the order of their ends."""

    spans: list[Span] = field(default_factory=list)
    layers: int = 0

    @property
    def seconds(self) -> float:
        """Of all layers."""
        return max(span.end for span in self.spans)

    def layer_ends(self) -> list[float]:
        """When the last nano-operation of each layer was over."""
        ends = [0.0] * self.layers
        for span in self.spans:
            ends[span.layer] = max(ends[span.layer], span.end)
        return ends

    @property
    def period(self) -> float:
        """Seconds from layer to layer, once all layers look alike: over the second half."""
        ends, half = self.layer_ends(), max(self.layers // 2, 1)
        if self.layers == 1:
            return ends[0]
        return (ends[-1] - ends[half - 1]) / (self.layers - half)

    def busy(self, pipeline: Pipeline, resource: Resource) -> float:
        """Share of the time in which a class' stream worked."""
        mine = [s for s in self.spans if pipeline.operations[s.operation].resource == resource]
        return sum(span.end - span.start for span in mine) / self.seconds

    def overlap(self, pipeline: Pipeline) -> float:
        """Seconds in which more than one class worked, as a share of all."""
        moments = sorted([(s.start, 1) for s in self.spans] + [(s.end, -1) for s in self.spans])
        both, running, before = 0.0, 0, 0.0
        for at, change in moments:
            both += (at - before) * (running > 1)
            running, before = running + change, at
        return both / self.seconds


def carry_out(
    pipeline: Pipeline, interference: Interference, *, layers: int = 8, sharing: Sharing = "fluid", overlap: bool = True
) -> Run:
    """Runs so many layers. overlap: whether classes run beside each other; else each runs with all of the device."""
    return _Device(pipeline, interference, layers, sharing, overlap).run()


@dataclass(slots=True)
class _Device:
    pipeline: Pipeline
    interference: Interference
    layers: int
    sharing: Sharing
    overlap: bool
    now: float = 0.0
    left: dict[Resource, float] = field(default_factory=dict)
    began: dict[Resource, float] = field(default_factory=dict)
    done: set[tuple[int, int]] = field(default_factory=set)
    at: dict[Resource, int] = field(default_factory=dict)
    found: Run = field(default_factory=Run)
    parents: list[list[tuple[int, int]]] = field(default_factory=list)
    queues: dict[Resource, list[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queues = {name: in_turn(self.pipeline.order.get(name, ()), self.layers) for name in RESOURCES}
        self.found.layers = self.layers
        self.at = dict.fromkeys(RESOURCES, 0)
        self.parents = [[] for _ in self.pipeline.operations]
        for edge in self.pipeline.edges:
            self.parents[edge.child].append((edge.parent, edge.layers))

    def run(self) -> Run:
        total = len(self.pipeline.operations) * self.layers
        while len(self.done) < total:
            self._begin()
            assert self.left, "a pipeline whose order contradicts its edges cannot go on"
            speeds = {name: self._speed(name) for name in self.left}
            step = min(self.left[name] / speed for name, speed in speeds.items() if speed > 0)
            self.now += step
            for name in list(self.left):
                self.left[name] -= step * speeds[name]
                if self.left[name] <= TINY * self.pipeline.seconds[self._next(name)[0]]:
                    self._end(name)
        return self.found

    def _next(self, name: Resource) -> tuple[int, int]:
        """(operation, layer) that a stream runs or will run."""
        return self.queues[name][self.at[name]]

    def _begin(self) -> None:
        # memory and network first: products take what is left
        for name in ("network", "memory", "compute"):
            if name in self.left or self.at[name] >= len(self.queues[name]):
                continue
            number, layer = self._next(name)
            if self._ready(number, layer) and self._room(number):
                self.left[name], self.began[name] = self.pipeline.seconds[number], self.now

    def _ready(self, number: int, layer: int) -> bool:
        return all(layer < lag or (parent, layer - lag) in self.done for parent, lag in self.parents[number])

    def _room(self, number: int) -> bool:
        if not self.overlap:
            return not self.left
        fluid, products = self.sharing == "fluid", "compute"
        if fluid and self.pipeline.operations[number].resource == products:
            return True
        running = [self._next(name)[0] for name in self.left if not (fluid and name == products)]
        used = sum(self.pipeline.shares[place] for place in running)
        return used + self.pipeline.shares[number] <= 1 + 1e-6

    def _speed(self, name: Resource) -> float:
        if not self.overlap:
            return 1.0
        shares = {other: self.pipeline.shares[self._next(other)[0]] for other in self.left}
        if self.sharing == "fluid" and name == "compute":
            return max(1.0 - sum(share for other, share in shares.items() if other != name), 0.0)
        return self.interference.speed(name, shares[name])

    def _end(self, name: Resource) -> None:
        number, layer = self._next(name)
        self.found.spans.append(Span(operation=number, layer=layer, start=self.began[name], end=self.now))
        self.done.add((number, layer))
        self.at[name] += 1
        del self.left[name]


def meetings(run: Run, layer: int, most_lag: int = 2) -> set[tuple[int, int, int]]:
    """(i, j, k): nano-operation i of `layer` ran beside j of the k-th layer after it."""
    mine = [span for span in run.spans if span.layer == layer]
    others = [span for span in run.spans if abs(span.layer - layer) <= most_lag]
    found = set()
    for a in mine:
        for b in others:
            shared = min(a.end, b.end) - max(a.start, b.start)
            if a.operation != b.operation and shared > 1e-6 * run.seconds / run.layers:
                found.add((a.operation, b.operation, b.layer - layer))
    return found


def starts_of(run: Run, layer: int) -> dict[int, Span]:
    """The spans of one layer, by operation."""
    return {span.operation: span for span in run.spans if span.layer == layer}


def check_order(operations: Sequence[NanoOperation], order: dict[Resource, Turns]) -> None:
    """Every nano-operation is in its class' stream, once."""
    listed = sorted(place for turns in order.values() for place, _ in turns)
    assert listed == list(range(len(operations)))
    assert all(operations[place].resource == name for name, turns in order.items() for place, _ in turns)
