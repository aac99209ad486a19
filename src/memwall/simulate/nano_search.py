"""NanoFlow's search: a static pipeline for a model on a node, in two stages, and what it gains.

Stage I (`nano_structure`) finds number, size and order of nano-operations without interference. Stage II, here, keeps
the order and gives each a share R of the device, from a grid, so that shares in use never sum to more than 1; a
nano-operation takes its time alone divided by P(R). Both are mixed-integer programs.

Stage II's program knows which nano-operations may run beside each other: those that did when the structure was carried
out on the virtual device with shares per class. Others keep their order. Its shares are carried out again, and what met
then is tried too, until nothing is gained. There each nano-operation has one share from begin to end. On a device the
products take what the others leave at each moment; so at last the shares of these others are moved one by one while
the virtual device, shared that way, gets faster. Parts are added next to the largest bubble of the products, starting
from two of each, while the period shrinks.

Source: NanoFlow, Zhu 2024, arXiv 2408.12757, sections 4.1 and 4.2.
Differs from the paper: which pairs overlap is not a variable of stage II but comes from the simulator; seconds, not ten
minutes. Units: seconds, tokens, shares 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, product

from memwall.engine.nano_schedule import RESOURCES, Interference, Placed, Resource, Schedule
from memwall.errors import DoesNotFit
from memwall.simulate.nano_costs import LayerOperation
from memwall.simulate.nano_pipeline import Pipeline, Run, carry_out, check_order, meetings, starts_of
from memwall.simulate.nano_program import Program, sum_of
from memwall.simulate.nano_structure import QUANTUM, UNITS, Structure, find_structure, sequential

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MOST_PARTS = 4
WARM_LAYERS, LAYERS = 4, 9
LEAST_GAIN = 2e-3
FINE = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
BEGINNINGS = 3
ROUNDS = 2
Tick = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search found for a layer, in seconds. sequential: whole operations one after another; parts_only: the
    schedule's nano-operations one after another; ideal: stage I's period, without interference; lower: of products.
    placement: which collectives. tried: structures looked at.
    """

    schedule: Schedule
    placement: str
    sequential: float
    parts_only: float
    ideal: float
    lower: float
    simulated: float
    tried: int

    @property
    def gain(self) -> float:
        """How many times as fast as the sequential one, carried out on the virtual device."""
        return self.sequential / self.simulated


def nano_only(schedule: Schedule, operations: Sequence[LayerOperation]) -> float:
    """Seconds of a layer whose parts run one after another, each with the whole device."""
    known = {one.name: one for one in operations}
    return sum(known[one.operation.name].seconds(one.operation.tokens) for one in schedule.placed)


def search(
    layers: Mapping[str, Sequence[LayerOperation]],
    interference: Interference,
    *,
    quantum: int = QUANTUM,
    seconds: float = 20.0,
    progress: Tick | None = None,
) -> Found:
    """The best pipeline. layers: operations of a layer by placement of its collectives; seconds: of each program."""
    tick, tried = progress or (lambda text: None), 0
    best: Found | None = None
    for placement, operations in layers.items():
        counts: dict[str, int] | None = {one.name: 2 for one in operations}
        last: float | None = None
        while counts is not None:
            tick(f"{placement}, {sum(counts.values())} parts")
            limits = Limits(quantum=quantum, seconds=seconds)
            pairs = list(_structures(operations, counts, interference, limits))
            tried += len(pairs)
            found = [_judged(plan, one, operations, placement, interference) for one, plan in pairs]
            chosen = min(found, key=lambda one: one.simulated)
            if best is None or chosen.simulated < best.simulated:
                best = chosen
            if last is not None and chosen.simulated > last * (1 - LEAST_GAIN):
                break
            last, counts = chosen.simulated, near_bubble(pairs[0][0], counts, followed(operations))
    assert best is not None
    return replace(best, tried=tried)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of the programs. quantum: tokens; seconds: for each."""

    quantum: int
    seconds: float


def _structures(
    operations: Sequence[LayerOperation], counts: dict[str, int], interference: Interference, limits: Limits
) -> Iterable[tuple[Structure, Schedule]]:
    """Structures with so many parts and their schedules: first as stage I has it, then with each class as slow as the
    schedule before made it, which is what the parts must be balanced for.
    """
    slower: dict[Resource, float] = dict.fromkeys(RESOURCES, 1.0)
    for _ in range(ROUNDS):
        taken = [
            replace(one, fixed=one.fixed * slower[one.resource], per_token=one.per_token * slower[one.resource])
            for one in operations
        ]
        found = find_structure(
            taken, counts, follow=followed(operations), quantum=limits.quantum, seconds=limits.seconds
        )
        known = {one.name: one for one in operations}
        alone = tuple(known[part.name].seconds(part.tokens) for part in found.operations)
        structure = replace(found, seconds=alone)
        schedule = assign_shares(structure, interference, seconds=limits.seconds)
        yield structure, schedule
        for name in RESOURCES:
            placed = [one for one in schedule.placed if one.operation.resource == name]
            lengths = sum(one.seconds for one in placed)
            ideal = sum(one.seconds * interference.speed(name, one.share) for one in placed)
            slower[name] = lengths / ideal if ideal else 1.0


def followed(operations: Sequence[LayerOperation]) -> dict[str, str]:
    """Whose boundaries each operation shares: products and collectives after the first one go by its parts, attention
    has its own.
    """
    whole = [one for one in operations if one.name not in ("decode", "prefill")]
    return {one.name: whole[0].name for one in whole[1:]}


def near_bubble(structure: Structure, counts: dict[str, int], follow: dict[str, str]) -> dict[str, int] | None:
    """Counts with one part more where products wait longest: of what they wait for, or of what waits."""
    for _, part in structure.compute_bubbles():
        parent = structure.waited_for(part)
        for place in (parent, part):
            if place is None:
                continue
            name = structure.operations[place].name
            name = follow.get(name, name)
            if counts[name] < MOST_PARTS:
                return {**counts, name: counts[name] + 1}
    return None


def _judged(
    schedule: Schedule,
    structure: Structure,
    operations: Sequence[LayerOperation],
    placement: str,
    interference: Interference,
) -> Found:
    run = carry_out(Pipeline.of(schedule, interference), interference, layers=LAYERS)
    return Found(
        schedule=schedule,
        placement=placement,
        sequential=sequential(operations),
        parts_only=nano_only(schedule, operations),
        ideal=structure.period,
        lower=sum(one.whole for one in operations if one.resource == "compute"),
        simulated=run.period,
        tried=1,
    )


def _shares(structure: Structure, schedule: Schedule) -> list[float]:
    shares = {one.operation: one.share for one in schedule.placed}
    return [shares[operation] for operation in structure.operations]


# ---- stage II ------------------------------------------------------------------------------------------------------


def assign_shares(
    structure: Structure, interference: Interference, *, grid: Sequence[float] = GRID, seconds: float = 20.0
) -> Schedule:
    """The best shares for a structure: a schedule of which shares in use never sum to more than 1."""
    check_order(structure.operations, structure.order)
    begins: list[tuple[float, int, list[float]]] = []
    for number, guess in enumerate(_guesses(structure)):
        begins.append((_period(structure, guess, interference), number, guess))
    begins.sort()
    found = [guess for _, _, guess in begins[:BEGINNINGS]]
    for _, _, guess in begins[:BEGINNINGS]:
        last: float | None = None
        while True:
            run = carry_out(structure.pipeline(guess), interference, layers=LAYERS)
            try:
                schedule = _StageTwo(structure, interference, run, grid).solve(seconds)
            except DoesNotFit:  # no time, or what met cannot share the device: the guess stands
                break
            if last is not None and schedule.period > last * (1 - LEAST_GAIN):
                break
            last, guess = schedule.period, _shares(structure, schedule)
            found.append(guess)
    best = min((polished(structure, guess, interference) for guess in found), key=lambda one: one[0])
    return as_schedule(structure, best[1], interference)


def _period(structure: Structure, shares: Sequence[float], interference: Interference) -> float:
    return carry_out(structure.pipeline(shares), interference, layers=LAYERS).period


def polished(structure: Structure, shares: Sequence[float], interference: Interference) -> tuple[float, list[float]]:
    """Shares of memory and network moved one by one, as long as the device gets faster: its period, and they."""
    now = list(shares)
    best, moved = _period(structure, now, interference), True
    movable = [place for place, one in enumerate(structure.operations) if one.resource != "compute"]
    while moved:
        moved = False
        for place in movable:
            for share in FINE:
                before, now[place] = now[place], share
                period = _period(structure, now, interference)
                if period < best * (1 - 1e-4):
                    best, moved = period, True
                else:
                    now[place] = before
    return best, now


def as_schedule(structure: Structure, shares: Sequence[float], interference: Interference) -> Schedule:
    """What the device did in a layer in the middle, as a schedule; a product's share is what it had on average."""
    run = carry_out(structure.pipeline(shares), interference, layers=LAYERS)
    placed = []
    for place, span in sorted(starts_of(run, WARM_LAYERS).items()):
        operation, took = structure.operations[place], span.end - span.start
        share = structure.seconds[place] / took if operation.resource == "compute" else shares[place]
        placed.append(Placed(operation=operation, share=min(share, 1.0), start=span.start, seconds=took))
    tokens = max(operation.end for operation in structure.operations)
    return Schedule(
        placed=tuple(placed), edges=structure.edges, turns=structure.order, period=run.period, tokens=tokens
    ).trimmed()


def _guesses(structure: Structure) -> Iterable[list[float]]:
    """Shares by class to begin with."""
    tables = {"compute": (1.0,), "memory": (0.1, 0.2, 0.3, 0.4, 0.6), "network": (0.1, 0.2, 0.3)}
    present = [name for name in RESOURCES if structure.order[name]]
    for chosen in product(*(tables[name] for name in present)):
        by_class = dict(zip(present, chosen))
        yield [by_class[operation.resource] for operation in structure.operations]


@dataclass(slots=True)
class _StageTwo:
    structure: Structure
    interference: Interference
    run: Run
    grid: Sequence[float]
    program: Program = field(default_factory=Program)
    chosen: list[dict[float, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    period: int = 0

    def __post_init__(self) -> None:
        program, one = self.program, self.structure
        self.period = program.add(cost=1.0)
        for operation in one.operations:
            grid = {share: program.binary() for share in self.grid if self._speed(operation.resource, share) > 0}
            self.chosen.append(grid)
            program.equal(dict.fromkeys(grid.values(), 1.0), 1.0)
            self.starts.append(program.add(cost=1e-5))
        for edge in one.edges:
            self._after(edge.child, edge.parent, edge.layers)
        for turns in one.order.values():
            for (before, early), (after, late) in pairwise(turns):
                self._after(after, before, early - late)
            if turns:
                self._after(turns[0][0], turns[-1][0], 1 + turns[-1][1] - turns[0][1])
        self._share_out()

    def _speed(self, resource: Resource, share: float) -> float:
        return self.interference.speed(resource, share)

    @property
    def _unit(self) -> float:
        return sum(self.structure.seconds) / UNITS

    def _seconds(self, place: int) -> dict[int, float]:
        resource, alone = self.structure.operations[place].resource, self.structure.seconds[place] / self._unit
        return {column: alone / self._speed(resource, share) for share, column in self.chosen[place].items()}

    def _share(self, place: int) -> dict[int, float]:
        return {column: share for share, column in self.chosen[place].items()}

    def _after(self, child: int, parent: int, layers: int) -> None:
        """child of so many layers later begins once parent is over."""
        takes = {column: -value for column, value in self._seconds(parent).items()}
        terms = sum_of({self.starts[child]: 1.0}, {self.starts[parent]: -1.0}, takes, {self.period: float(layers)})
        self.program.at_least(terms, 0.0)

    def _share_out(self) -> None:
        """Those that met share the device, all that met at once; the others keep their order."""
        met = meetings(self.run, WARM_LAYERS)
        spans = {lag: starts_of(self.run, WARM_LAYERS + lag) for lag in (-2, -1, 0, 1, 2)}
        count = len(self.structure.operations)
        for i, j in combinations(range(count), 2):
            if self.structure.operations[i].resource == self.structure.operations[j].resource:
                continue
            for lag, others in spans.items():
                if i not in spans[0] or j not in others:
                    continue
                if (i, j, lag) in met:
                    self._together((i, j))
                elif spans[0][i].end <= others[j].start + 1e-12:
                    self._after(j, i, lag)
                else:
                    self._after(i, j, -lag)
        pairs = {(i, j, lag) for i, j, lag in met if self._class(i) == "compute"}
        for i, j, lag in pairs:
            for i2, k, lag2 in pairs:
                if i2 == i and self._class(j) == "memory" and self._class(k) == "network" and (j, k, lag2 - lag) in met:
                    self._together((i, j, k))

    def _class(self, place: int) -> Resource:
        return self.structure.operations[place].resource

    def _together(self, places: Sequence[int]) -> None:
        shares = sum_of(*(self._share(place) for place in places))
        self.program.at_least({column: -share for column, share in shares.items()}, -1.0)

    def solve(self, seconds: float) -> Schedule:
        values = self.program.solve(seconds=seconds, gap=2e-3)
        placed = []
        for place, operation in enumerate(self.structure.operations):
            share = max(self.chosen[place], key=lambda r: values[self.chosen[place][r]])
            alone = self.structure.seconds[place]
            placed.append(
                Placed(
                    operation=operation,
                    share=share,
                    start=max(float(values[self.starts[place]]) * self._unit, 0.0),
                    seconds=alone / self._speed(operation.resource, share),
                )
            )
        tokens = max(operation.end for operation in self.structure.operations)
        return Schedule(
            placed=tuple(placed),
            edges=self.structure.edges,
            turns=self.structure.order,
            period=float(values[self.period]) * self._unit,
            tokens=tokens,
        )
