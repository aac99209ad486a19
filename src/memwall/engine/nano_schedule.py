"""Nano-operations, what they wait for, what they cost each other, and the static schedule that lists them.

An operation of a layer covers a range of the batch's tokens. Cut into nano-operations, each covers a part of it; a
nano-operation waits for those of its parents whose tokens meet its own, and for nothing else. One stream per class of
resource (compute, memory, network) runs its nano-operations in the schedule's order, in every layer the same; the last
ones of a layer run beside the first ones of the next (stitching).

Source: NanoFlow, Zhu 2024, arXiv 2408.12757: dependence by token ranges 4.1, interference 4.2, schedule 4.3.

Units: tokens [first, end) of the batch, seconds; a share R of the device is what products lose when another class of
work runs beside them with that share, 0 to 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memwall.errors import InputError

Resource = Literal["compute", "memory", "network"]
RESOURCES: tuple[Resource, ...] = ("compute", "memory", "network")
TINY = 1e-6
"""Of a period: what rounding may make of a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoOperation:
    """Tokens [first, end) of an operation, the index-th of its parts. layer: 0, or how many layers later."""

    name: str
    resource: Resource
    first: int
    end: int
    index: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end:
            raise InputError(f"{self.name}: tokens {self.first} to {self.end} are no range")

    @property
    def tokens(self) -> int:
        """How many."""
        return self.end - self.first

    @property
    def key(self) -> str:
        """Name and range."""
        return f"{self.name}[{self.first}:{self.end}]"

    def meets(self, other: NanoOperation) -> bool:
        """Whether both cover a token."""
        return self.first < other.end and other.first < self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """`child` waits for `parent`; layers: by how many its layer comes after the parent's (1: stitching)."""

    parent: int
    child: int
    layers: int = 0


def edges_of(
    operations: Sequence[NanoOperation], parents: Mapping[str, Sequence[str]], before: Mapping[str, Sequence[str]]
) -> list[Edge]:
    """What waits for what, by places in `operations`. parents: of each name in the same layer; before: in the last."""
    found = []
    for layers, graph in ((0, parents), (1, before)):
        for c, child in enumerate(operations):
            for p, parent in enumerate(operations):
                if parent.name in graph.get(child.name, ()) and child.meets(parent):
                    found.append(Edge(parent=p, child=c, layers=layers))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """P(R) of each class: its speed, of that alone, with a share R of the device. Products get R itself.

    shares: the R of the table, rising from 0 to 1; speeds: for memory and network at each of them.
    """

    shares: tuple[float, ...]
    memory: tuple[float, ...]
    network: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        for name, speeds in (("memory", self.memory), ("network", self.network)):
            if len(speeds) != len(self.shares) or len(speeds) < 2:
                raise InputError(f"{name}: {len(speeds)} speeds for {len(self.shares)} shares; give one for each")
            if list(speeds) != sorted(speeds) or speeds[0] < 0 or speeds[-1] > 1:
                raise InputError(f"{name}: speeds must rise from 0 to at most 1, got {list(speeds)}")
        if list(self.shares) != sorted(set(self.shares)) or self.shares[0] != 0 or self.shares[-1] != 1:
            raise InputError(f"shares must rise from 0 to 1, got {list(self.shares)}")

    def speed(self, resource: Resource, share: float) -> float:
        """P, between the table's points in a straight line."""
        if not 0 <= share <= 1:
            raise InputError(f"a share of {share:g} of the device; it must be 0 to 1")
        if resource == "compute":
            return share
        speeds = self.memory if resource == "memory" else self.network
        at = bisect_left(self.shares, share)
        if self.shares[at] == share:
            return speeds[at]
        below, above = self.shares[at - 1], self.shares[at]
        return speeds[at - 1] + (speeds[at] - speeds[at - 1]) * (share - below) / (above - below)


A100 = Interference(
    shares=(0.0, 0.1, 0.2, 0.8, 0.9, 1.0),
    memory=(0.0, 0.2, 0.3, 0.85, 0.95, 1.0),
    network=(0.0, 0.3, 0.5, 0.9, 1.0, 1.0),
    source="A100; P(0.2) = 0.3 of memory as published, the other points of that shape (model)",
)
"""Kernels that need little of a GPU saturate early: a tenth of it moves much more than a tenth of the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A nano-operation in a schedule. share: R; start, seconds: of the first layer, whose first one begins at 0."""

    operation: NanoOperation
    share: float
    start: float
    seconds: float

    @property
    def end(self) -> float:
        """When it is over."""
        return self.start + self.seconds


Turns = tuple[tuple[int, int], ...]
"""What a stream runs in a round: (place of a nano-operation, of how many layers before the round's)."""


def turns_of(starts: Mapping[int, float], period: float) -> Turns:
    """Rounds of a stream from the starts of a layer: what starts after a period runs in the next layer's round."""
    shifts = {at: math.floor(start / period + TINY) for at, start in starts.items()}
    return tuple(sorted(shifts.items(), key=lambda one: (starts[one[0]] - one[1] * period, one[0])))


def in_turn(turns: Turns, layers: int) -> list[tuple[int, int]]:
    """All that a stream runs for so many layers, in order: (place, layer)."""
    rounds = range(
        min((shift for _, shift in turns), default=0), layers + max((shift for _, shift in turns), default=0)
    )
    return [(place, at - shift) for at in rounds for place, shift in turns if 0 <= at - shift < layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The same for every layer. placed: in the order of their starts; edges and turns: by places in `placed`.

    turns: what each stream runs in a round. period: seconds from a layer's beginning to the next one's; tokens: of the
    whole batch.
    """

    placed: tuple[Placed, ...]
    edges: tuple[Edge, ...]
    turns: Mapping[Resource, Turns]
    period: float
    tokens: int

    @staticmethod
    def by_starts(placed: Sequence[Placed], edges: Sequence[Edge], period: float, tokens: int) -> Schedule:
        """A schedule whose streams go by the starts."""
        turns = {
            name: turns_of({at: one.start for at, one in enumerate(placed) if one.operation.resource == name}, period)
            for name in RESOURCES
        }
        return Schedule(placed=tuple(placed), edges=tuple(edges), turns=turns, period=period, tokens=tokens)

    def stream(self, resource: Resource) -> Turns:
        """A class's nano-operations in their order."""
        return self.turns.get(resource, ())

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """Token ranges of an operation."""
        return sorted((one.operation.first, one.operation.end) for one in self.placed if one.operation.name == name)

    def most_share(self) -> float:
        """The largest sum of shares that memory and network use at one moment, layers that overlap included: products
        have what is left, so that it must not be above 1.
        """
        beside = [one for one in self.placed if one.operation.resource != "compute"]
        spans = [(one.start + lag, one.end + lag, one.share) for one in beside for lag in self._lags()]
        near = TINY * self.period
        return max(
            (sum(r for start, end, r in spans if start <= at + near and end > at + 2 * near) for at in
             (one.start for one in beside)), default=0.0,
        )  # fmt: skip

    def _lags(self) -> list[float]:
        reach = int(max(one.end for one in self.placed) / self.period) + 1
        return [layer * self.period for layer in range(-reach, reach + 1)]

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "period_seconds": self.period,
            "tokens": self.tokens,
            "operations": [
                {
                    "operation": one.operation.name, "first": one.operation.first, "end": one.operation.end,
                    "stream": one.operation.resource, "share": one.share, "start": one.start, "seconds": one.seconds,
                }
                for one in self.placed
            ],
            "streams": {
                name: [{"operation": place, "layers_before": shift} for place, shift in turns]
                for name, turns in self.turns.items()
            },
            "edges": [{"parent": e.parent, "child": e.child, "layers": e.layers} for e in self.edges],
        }  # fmt: skip

    def trimmed(self) -> Schedule:
        """The same with the first start at 0 and operations in the order of their starts."""
        order = sorted(range(len(self.placed)), key=lambda at: (self.placed[at].start, self.placed[at].end, at))
        place = {old: new for new, old in enumerate(order)}
        first = min(one.start for one in self.placed)
        placed = tuple(
            Placed(operation=one.operation, share=one.share, start=one.start - first, seconds=one.seconds)
            for one in (self.placed[at] for at in order)
        )
        edges = tuple(Edge(parent=place[e.parent], child=place[e.child], layers=e.layers) for e in self.edges)
        turns = {name: tuple((place[at], shift) for at, shift in told) for name, told in self.turns.items()}
        return Schedule(placed=placed, edges=edges, turns=turns, period=self.period, tokens=self.tokens)
