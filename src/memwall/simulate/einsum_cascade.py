"""A cascade of extended Einsums: checked when it is made, with its inputs, outputs, and an order to carry it out in.

Checked is that each tensor is written once (or its first value and its steps), before it is read and with as many
indices; that ranks on the left run on the right; and that what an iteration reads of itself are earlier steps.

Source: as `einsum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from memwall.errors import InputError
from memwall.simulate.einsum import (
    FUNCTIONS,
    OPERATORS,
    REDUCTIONS,
    Call,
    Einsum,
    Index,
    Read,
    Split,
    Stop,
    ranks_of,
    reads_of,
    walk,
)


@dataclass(frozen=True)
class Cascade:
    """A checked list of Einsums. InputError, which names the statement, for what has no meaning."""

    einsums: tuple[Einsum, ...]
    splits: tuple[Split, ...] = ()
    stops: tuple[Stop, ...] = ()

    def __post_init__(self) -> None:
        _check_names(self)
        for einsum in self.einsums:
            _check_ranks(self, einsum)
        _check_writers(self)
        _check_reads(self)
        assert self.order is not None  # raises where Einsums wait for each other

    @cached_property
    def writers(self) -> dict[str, tuple[Einsum, ...]]:
        """Of each tensor that is written: its Einsum, or those of its first value and its steps."""
        found: dict[str, tuple[Einsum, ...]] = {}
        for einsum in self.einsums:
            found[einsum.name] = (*found.get(einsum.name, ()), einsum)
        return found

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """All reads of all statements."""
        stops = (read for stop in self.stops for side in (stop.left, stop.right) for read in reads_of(side))
        return (*(read for einsum in self.einsums for read in einsum.reads), *stops)

    @cached_property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """Tensors that nothing writes, with the ranks of their axes (a split rank whole)."""
        found: dict[str, tuple[str, ...]] = {}
        for read in self.reads:
            if read.tensor not in self.writers:
                found.setdefault(read.tensor, tuple(self.whole(index) for index in read.indices))
        return found

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Tensors that are written and no other Einsum reads, in order."""
        read = {each.tensor for einsum in self.einsums for each in einsum.reads if each.tensor != einsum.name}
        return tuple(name for name in self.writers if name not in read)

    @cached_property
    def ranks(self) -> tuple[str, ...]:
        """All ranks that Einsums run over, in the order of the text."""
        return tuple(dict.fromkeys(rank for einsum in self.einsums for rank in einsum.space))

    @cached_property
    def iterative(self) -> dict[str, int]:
        """Tensors that are written step by step, and which of their axes counts the steps."""
        return {
            einsum.name: next(axis for axis, index in enumerate(einsum.out.indices) if index.ahead)
            for einsum in self.einsums
            if einsum.step is not None
        }

    @cached_property
    def order(self) -> tuple[tuple[Einsum, ...], ...]:
        """Einsums in the order in which they can be carried out; those of an iteration that depend on each other are
        one group, in the order of the text.
        """
        return _carried_out(self)

    def axes(self, einsum: Einsum) -> tuple[str, ...]:
        """Ranks of the axes of what an Einsum writes; a first value has the axis of the steps too."""
        for one in self.writers[einsum.name]:
            if not one.starts:
                return one.out.ranks
        return einsum.out.ranks

    def split_of(self, rank: str) -> Split | None:
        """The split that a rank is part of, whole, outer or inner."""
        return next((each for each in self.splits if rank in (each.whole, each.outer, each.inner)), None)

    def whole(self, index: Index) -> str:
        """The rank of the axis that an index is for."""
        if index.split is None:
            return index.rank
        found = self.split_of(index.split[0])
        assert found is not None
        return found.whole

    def to_text(self) -> str:
        """As `parse_cascade` reads it."""
        return "".join(f"{line}\n" for line in (*self.splits, *self.stops, *self.einsums))


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_names(cascade: Cascade) -> None:
    if not cascade.einsums:
        raise InputError("a cascade has one Einsum at least")
    split = [rank for each in cascade.splits for rank in (each.whole, each.outer, each.inner)]
    if len(set(split)) < len(split):
        raise InputError("a rank is split once, into ranks that have other names")
    sides = [side for stop in cascade.stops for side in (stop.left, stop.right)]
    for value in (*(einsum.value for einsum in cascade.einsums), *sides):
        for each in walk(value):
            if not isinstance(each, Call):
                continue
            wanted = 2 if each.name in OPERATORS else FUNCTIONS.get(each.name)
            if wanted is None:
                raise InputError(f"no function {each.name!r}; there are {', '.join(FUNCTIONS)}")
            if len(each.arguments) != wanted:
                raise InputError(f"{each}: {each.name} takes {wanted} arguments, not {len(each.arguments)}")
    for read in (*cascade.reads, *(einsum.out for einsum in cascade.einsums)):
        if len(set(read.ranks)) < len(read.ranks):
            raise InputError(f"{read}: a rank stands twice; give one index another name")
        for index in read.indices:
            if index.split is not None and index.split not in {(each.outer, each.inner) for each in cascade.splits}:
                raise InputError(f"{read}: write `split RANK = {index.split[0]} * {index.split[1]}` before")


def _check_ranks(cascade: Cascade, einsum: Einsum) -> None:
    """What one Einsum says by itself."""
    if einsum.reduction not in REDUCTIONS:
        raise InputError(f"{einsum}: no reduction {einsum.reduction!r}; there are {', '.join(REDUCTIONS)}")
    if any(index.last or index.split for index in einsum.out.indices):
        raise InputError(f"{einsum}: on the left stand ranks, the next step of one (i+1) or its first value (0)")
    if sum(index.ahead or index.first for index in einsum.out.indices) > 1:
        raise InputError(f"{einsum}: a tensor has one iterative rank")
    right = set(ranks_of(einsum.value))
    if einsum.over and set(einsum.over) != set(einsum.reduced):
        wrong = sorted(set(einsum.over) ^ set(einsum.reduced))
        raise InputError(
            f"{einsum}: {', '.join(wrong)}: what is reduced are the ranks of the right that are missing on the left "
            f"({', '.join(einsum.reduced) or 'none here'})"
        )
    if not einsum.starts and not set(einsum.out.ranks) <= right:
        missing = ", ".join(rank for rank in einsum.out.ranks if rank not in right)
        raise InputError(f"{einsum}: {missing} on the left is no rank of the right")


def _check_writers(cascade: Cascade) -> None:
    for name, written in cascade.writers.items():
        starts = [einsum for einsum in written if einsum.starts]
        steps = [einsum for einsum in written if einsum.step is not None]
        if (len(written), len(starts), len(steps)) not in ((1, 0, 0), (2, 1, 1)):
            what = "its first value (0) is missing" if steps and not starts else "it is written more than once"
            what = "its steps (i+1) are missing" if starts and not steps else what
            raise InputError(f"{name}: {what}; a tensor is written by one Einsum, or by a first value and its steps")
        if steps:
            first, step = starts[0].out.indices, steps[0].out.indices
            same = len(first) == len(step) and all(
                one.first == two.ahead and (one.first or one == two) for one, two in zip(first, step, strict=True)
            )
            if not same:
                raise InputError(f"{starts[0].out} and {steps[0].out}: a first value has the indices of the steps")


def _check_reads(cascade: Cascade) -> None:
    """Indices of every read against those of what was written, or of the other reads of an input."""
    sizes: dict[str, int] = {}
    for read in cascade.reads:
        written = cascade.writers.get(read.tensor)
        known = len(written[0].out.indices) if written else sizes.setdefault(read.tensor, len(read.indices))
        if known != len(read.indices):
            raise InputError(f"{read}: {read.tensor} has {known} indices elsewhere")
        steps = cascade.iterative.get(read.tensor)
        for axis, index in enumerate(read.indices):
            if (index.ahead or index.last or index.first) and axis != steps:
                raise InputError(f"{read}: {index} is for the rank over which a tensor is written step by step")
            if axis == steps and index.split:
                raise InputError(f"{read}: {index} is an index of inputs")
            if index.split and written:
                raise InputError(f"{read}: only inputs are read in tiles; write {read.tensor} with both ranks")
    for stop in cascade.stops:
        if stop.rank not in {einsum.step for einsum in cascade.einsums}:
            raise InputError(f"{stop}: nothing is written step by step over {stop.rank}")


# ---- order ---------------------------------------------------------------------------------------------------------


def _needs(cascade: Cascade) -> list[set[int]]:
    """Of each Einsum the numbers of those that it reads from; steps that a stop ends wait for what the stop reads."""
    numbers: dict[str, list[int]] = {}
    for number, einsum in enumerate(cascade.einsums):
        numbers.setdefault(einsum.name, []).append(number)
    found = []
    for einsum in cascade.einsums:
        reads = list(einsum.reads)
        for stop in cascade.stops:
            if einsum.step == stop.rank:
                reads += [*reads_of(stop.left), *reads_of(stop.right)]
        needed = {number for read in reads for number in numbers.get(read.tensor, ())}
        if einsum.step is not None:
            needed |= set(numbers[einsum.name])
        found.append(needed)
    return found


def _reached(needs: list[set[int]]) -> list[set[int]]:
    """All that each Einsum waits for, through others too."""
    reached = [set(each) for each in needs]
    for middle in range(len(needs)):
        for each in reached:
            if middle in each:
                each |= reached[middle]
    return reached


def _carried_out(cascade: Cascade) -> tuple[tuple[Einsum, ...], ...]:
    reached = _reached(_needs(cascade))
    groups: list[tuple[int, ...]] = []
    for number, needed in enumerate(reached):
        mates = tuple(other for other in sorted(needed) if number in reached[other]) if number in needed else (number,)
        if mates not in groups:
            groups.append(mates)
            if number in needed:
                _check_iteration(cascade, tuple(cascade.einsums[each] for each in mates))
    done: set[int] = set()
    order: list[tuple[Einsum, ...]] = []
    while groups:
        for group in groups:
            if all(needed <= done | set(group) for needed in (reached[number] for number in group)):
                break
        groups.remove(group)
        done |= set(group)
        order.append(tuple(cascade.einsums[number] for number in group))
    return tuple(order)


def _check_iteration(cascade: Cascade, group: tuple[Einsum, ...]) -> None:
    """Einsums that depend on each other: over one rank, and on earlier steps only."""
    steps = {einsum.step for einsum in group if einsum.step is not None}
    names = ", ".join(dict.fromkeys(einsum.name for einsum in group))
    if len(steps) != 1:
        raise InputError(
            f"{names} depend on each other" + (" over more than one iterative rank" if steps else "")
            + "; write T[0] and T[i+1] for what is carried from step to step"
        )  # fmt: skip
    (rank,) = steps
    inside = {einsum.name for einsum in group}
    written: set[str] = set()
    for einsum in group:
        if rank not in einsum.out.ranks:
            raise InputError(f"{einsum}: what {names} carry over {rank} needs {rank} on the left")
        for read in einsum.reads:
            if read.tensor not in inside:
                continue
            for index in read.indices:
                if index.last or index.first:
                    raise InputError(f"{einsum}: {read} is not known inside the iteration over {rank}")
            carried = read.tensor in cascade.iterative and any(
                index.rank == rank and not index.ahead for index in read.indices
            )
            if not carried and read.tensor not in written:
                raise InputError(f"{einsum}: {read} is written later in the same step")
        written.add(einsum.name)
