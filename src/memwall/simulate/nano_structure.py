"""Stage I of NanoFlow's search: how many nano-operations, of which size, in which order; interference left aside.

Source: NanoFlow, Zhu 2024, arXiv 2408.12757, section 4.1. The paper does not tell its variables; these are:

- boundaries of an operation's parts, whole numbers of `quantum` tokens, the same for operations that `follow` another;
- starts of all parts in a layer, and the period T after which the next layer begins, which is minimised;
- for two parts of one class, which runs first, or whether that of the next layer even runs before the other of this
  one: then it ends before the other begins, and the other ends before it begins again a layer later;
- for a child and a parent with boundaries of their own, whether their tokens meet: only then the child waits.

So tails of a layer may run beside heads of the next. Sum of a class' parts is a bound of T from below.
Units: tokens, seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

from memwall.engine.nano_schedule import RESOURCES, Edge, NanoOperation, Resource, Turns, edges_of, turns_of
from memwall.errors import DoesNotFit, InputError
from memwall.simulate.nano_costs import LayerOperation
from memwall.simulate.nano_pipeline import Pipeline
from memwall.simulate.nano_program import Program, sum_of

QUANTUM = 128
UNITS = 100.0
Bound = tuple[int, float] | float
"""A boundary: a variable and its factor, or a known number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What stage I found. starts, seconds: of each part; period: of a layer."""

    operations: tuple[NanoOperation, ...]
    seconds: tuple[float, ...]
    starts: tuple[float, ...]
    order: dict[Resource, Turns]
    edges: tuple[Edge, ...]
    period: float

    def pipeline(self, shares: Sequence[float]) -> Pipeline:
        """To be carried out with these shares."""
        return Pipeline(
            operations=self.operations, seconds=self.seconds, shares=tuple(shares), order=self.order, edges=self.edges
        )

    def compute_bubbles(self) -> list[tuple[float, int]]:
        """Idle stretches of the compute stream, longest first: seconds, and the part that begins after it."""
        turns = self.order["compute"]
        within = [self.starts[place] - shift * self.period for place, shift in turns]
        found = []
        for at, (place, _) in enumerate(turns):
            before = within[at - 1] - (self.period if at == 0 else 0.0) + self.seconds[turns[at - 1][0]]
            if within[at] - before > 1e-3 * self.period:
                found.append((within[at] - before, place))
        return sorted(found, reverse=True)

    def waited_for(self, part: int) -> int | None:
        """The parent whose end lets a part begin: the last one to end."""
        parents = [edge for edge in self.edges if edge.child == part]
        ends = {
            edge.parent: self.starts[edge.parent] + self.seconds[edge.parent] - edge.layers * self.period
            for edge in parents
        }
        return max(ends, key=lambda place: ends[place], default=None)


def sequential(operations: Sequence[LayerOperation]) -> float:
    """Seconds of a layer whose operations run whole, one after another."""
    return sum(one.whole for one in operations)


def even_cuts(operation: LayerOperation, count: int, quantum: int = QUANTUM) -> list[int]:
    """Boundaries that cut a range in `count` parts of about one size, multiples of `quantum` from its beginning on."""
    tokens = operation.end - operation.first
    count = max(min(count, tokens // quantum), 1)
    inner = [operation.first + round(tokens * k / count / quantum) * quantum for k in range(1, count)]
    return [operation.first, *inner, operation.end]


def structured(
    operations: Sequence[LayerOperation],
    cuts: Mapping[str, Sequence[int]],
    starts: Mapping[tuple[str, int], float],
    period: float,
) -> Structure:
    """A structure from boundaries, starts and a period, whatever found them. Streams go by starts."""
    parts, seconds, begins = [], [], []
    for one in operations:
        for index, (first, end) in enumerate(zip(cuts[one.name], cuts[one.name][1:])):
            parts.append(one.part(first, end, index))
            seconds.append(one.seconds(end - first))
            begins.append(starts[one.name, index])
    parents = {one.name: one.parents for one in operations}
    before = {one.name: one.before for one in operations}
    order = {
        name: turns_of({at: begins[at] for at, part in enumerate(parts) if part.resource == name}, period)
        for name in RESOURCES
    }
    edges = tuple(edges_of(parts, parents, before))
    return Structure(
        operations=tuple(parts), seconds=tuple(seconds), starts=tuple(begins), order=order, edges=edges, period=period
    )


def find_structure(
    operations: Sequence[LayerOperation],
    counts: Mapping[str, int],
    *,
    follow: Mapping[str, str] | None = None,
    quantum: int = QUANTUM,
    seconds: float = 20.0,
) -> Structure:
    """The best structure with so many parts of each operation that is found within `seconds`; where none is, even
    parts in turn. follow: whose boundaries an operation shares.
    """
    names = {one.name for one in operations}
    unknown = {name for one in operations for name in (*one.parents, *one.before)} - names
    if unknown:
        raise InputError(f"operations wait for {', '.join(sorted(unknown))}, which the layer does not have")
    # the solver's tolerances are absolute: a layer takes about a hundred units
    unit = sequential(operations) / UNITS
    scaled = [replace(one, fixed=one.fixed / unit, per_token=one.per_token / unit) for one in operations]
    try:
        found = _StageOne(scaled, counts, follow or {}, quantum).solve(seconds)
    except DoesNotFit:
        found = in_turns(scaled, counts, quantum)
    return replace(
        found,
        seconds=tuple(unit * one for one in found.seconds),
        starts=tuple(unit * one for one in found.starts),
        period=unit * found.period,
    )


def in_turns(operations: Sequence[LayerOperation], counts: Mapping[str, int], quantum: int = QUANTUM) -> Structure:
    """Even parts that take turns at every operation, one after another: a structure without a search."""
    cuts = {one.name: even_cuts(one, counts.get(one.name, 1), quantum) for one in operations}
    starts, now = {}, 0.0
    for one in operations:
        for index, (first, end) in enumerate(pairwise(cuts[one.name])):
            starts[one.name, index] = now
            now += one.seconds(end - first)
    return structured(operations, cuts, starts, now)


@dataclass(slots=True)
class _StageOne:
    operations: Sequence[LayerOperation]
    counts: Mapping[str, int]
    follow: Mapping[str, str]
    quantum: int
    program: Program = field(default_factory=Program)
    cuts: dict[str, list[Bound]] = field(default_factory=dict)
    starts: dict[tuple[str, int], int] = field(default_factory=dict)
    horizon: float = 0.0
    period: int = 0

    def __post_init__(self) -> None:
        self.horizon = 3 * sum(one.whole + self._count(one) * one.fixed for one in self.operations)
        least = dict.fromkeys(RESOURCES, 0.0)
        for one in self.operations:
            least[one.resource] += one.whole + (self._count(one) - 1) * one.fixed
        self.period = self.program.add(lower=max(least.values()), upper=self.horizon, cost=1.0)
        for one in self.operations:
            self._cut(one)
            for index in range(self._count(one)):
                # the earlier the better where the period does not care; the first begins the layer
                first = not self.starts
                self.starts[one.name, index] = self.program.add(upper=0.0 if first else self.horizon, cost=1e-5)
        self._wait_for_parents()
        self._take_turns()

    def _count(self, one: LayerOperation) -> int:
        wanted = self.counts.get(self.follow.get(one.name, one.name), 1)
        return max(min(wanted, (one.end - one.first) // self.quantum), 1)

    def _cut(self, one: LayerOperation) -> None:
        leader = self.follow.get(one.name)
        if leader in self.cuts:
            self.cuts[one.name] = self.cuts[leader]
            return
        count, quantum = self._count(one), self.quantum
        cuts: list[Bound] = [float(one.first)]
        for index in range(1, count):
            low, high = one.first // quantum + index, -(-one.end // quantum) - (count - index)
            cuts.append((self.program.add(lower=low, upper=high, whole=True), float(quantum)))
        cuts.append(float(one.end))
        self.cuts[one.name] = cuts
        for before, after in pairwise(cuts):
            self._at_least(_minus(after, before), min(quantum, one.end - one.first))

    def _at_least(self, bound: tuple[dict[int, float], float], least: float) -> None:
        terms, constant = bound
        if terms:
            self.program.at_least(terms, least - constant)

    def _seconds(self, one: LayerOperation, index: int) -> tuple[dict[int, float], float]:
        """Of a part: factors of variables, and a constant."""
        terms, constant = _minus(self.cuts[one.name][index + 1], self.cuts[one.name][index])
        return {column: one.per_token * value for column, value in terms.items()}, one.fixed + one.per_token * constant

    def _after(
        self, child: tuple[str, int], parent: LayerOperation, index: int, *, layers: int = 0, unless: dict[int, float]
    ) -> None:
        """child begins once the part is over; unless: terms whose sum counts horizons by which it need not."""
        terms, constant = self._seconds(parent, index)
        sums = sum_of(
            {self.starts[child]: 1.0},
            {self.starts[parent.name, index]: -1.0},
            {column: -value for column, value in terms.items()},
            {self.period: float(layers)},
            {column: self.horizon * value for column, value in unless.items() if column >= 0},
        )
        self.program.at_least(sums, constant - self.horizon * unless.get(-1, 0.0))

    def _wait_for_parents(self) -> None:
        known = {one.name: one for one in self.operations}
        for child in self.operations:
            for layers, names in ((0, child.parents), (1, child.before)):
                for parent in (known[name] for name in names):
                    for i in range(self._count(child)):
                        for j in range(self._count(parent)):
                            self._wait(child, i, parent, j, layers)

    def _wait(self, child: LayerOperation, i: int, parent: LayerOperation, j: int, layers: int) -> None:
        mine, theirs = self.cuts[child.name], self.cuts[parent.name]
        if mine is theirs:
            if i == j:
                self._after((child.name, i), parent, j, layers=layers, unless={})
            return
        unless: dict[int, float] = {}
        for low, high in ((mine[i], theirs[j + 1]), (theirs[j], mine[i + 1])):
            terms, constant = _minus(high, low)  # they meet where both are above 0
            if not terms:
                if constant <= 0:
                    return
                continue
            meets = self.program.binary()
            most = 2.0 * max(one.end for one in self.operations)
            self.program.at_least(sum_of({meets: most}, {column: -value for column, value in terms.items()}), constant)
            unless[meets] = -1.0
            unless[-1] = unless.get(-1, 0.0) + 1.0
        self._after((child.name, i), parent, j, layers=layers, unless=unless)

    def _take_turns(self) -> None:
        for name in RESOURCES:
            mine = [
                (one, index) for one in self.operations if one.resource == name for index in range(self._count(one))
            ]
            for (one, i), (other, j) in combinations(mine, 2):
                if one is other or (i == j and self.cuts[one.name] is self.cuts[other.name]):
                    # parts of one operation by their tokens; operations of the same tokens as they wait for each other
                    self._in_turn(one, i, other, j, 0, {})
                    continue
                ways = [(one, i, other, j, 0), (other, j, one, i, 0), (one, i, other, j, 1), (other, j, one, i, 1)]
                chosen = [self.program.binary() for _ in ways]
                self.program.equal(dict.fromkeys(chosen, 1.0), 1.0)
                for column, way in zip(chosen, ways):
                    self._in_turn(*way, {column: -1.0, -1: 1.0})

    def _in_turn(
        self, one: LayerOperation, i: int, other: LayerOperation, j: int, later: int, unless: dict[int, float]
    ) -> None:
        """`one`, of so many layers later, runs right before `other`: and then `other` before the next `one`."""
        self._after((other.name, j), one, i, layers=-later, unless=unless)
        self._after((one.name, i), other, j, layers=1 + later, unless=unless)

    def solve(self, seconds: float) -> Structure:
        values = self.program.solve(seconds=seconds, gap=5e-3)
        cuts = {
            name: [round(cut[1] * round(values[cut[0]])) if isinstance(cut, tuple) else round(cut) for cut in found]
            for name, found in self.cuts.items()
        }
        starts = {key: float(values[column]) for key, column in self.starts.items()}
        return structured(self.operations, cuts, starts, float(values[self.period]))


def _minus(high: Bound, low: Bound) -> tuple[dict[int, float], float]:
    """high - low: factors of variables, and a constant."""
    terms: dict[int, float] = {}
    constant = 0.0
    for bound, sign in ((high, 1.0), (low, -1.0)):
        if isinstance(bound, tuple):
            terms = sum_of(terms, (bound[0], sign * bound[1]))
        else:
            constant += sign * bound
    return {column: value for column, value in terms.items() if value}, constant
