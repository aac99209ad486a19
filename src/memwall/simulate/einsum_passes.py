"""How often a cascade must go over the elements of a rank: worked out from what depends on what.

Within a pass every element of a fiber (all m of one p) is visited once. An Einsum that reads element i of something
made from an input, together with a value that took all elements of that input (through a reduction over the rank, or
the last step of an iteration over it), can do so only in a later pass. Elementwise dependence keeps the pass, and so
does a running quantity, of which step i + 1 needs no more than the elements up to i.

    pass of an Einsum      = max(passes of what it reads elementwise, 1 + passes completed by what it reads whole)
    completed by a value   = the pass of the reduction that made it, or of the iteration that it is the end of

It is worked out for each input that has the rank, as passes over one input do not bind another; a cascade has the most
of them. Where an iteration over another rank makes each step wait for a whole pass, passes grow with its steps.

A rank that is split has passes over its tiles (outer) and within one (inner); *sweeps* are passes in which single
elements, not only what was kept of each tile, are touched.

What is made in one pass and read in a later one is held whole, or fetched and computed again: `held`.

Source: FuseMax, Nayak 2024, arXiv 2406.10491, section 3 (pass analysis and its two ways out). Passes for each input
apart, sweeps, and passes that grow are this file's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memwall.errors import InputError
from memwall.simulate.einsum import Einsum, Read
from memwall.simulate.einsum_cascade import Cascade


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Passes over a rank: `count`, and `growth` more for each further step of the iterative rank `grows_with`.

    by_input: for each input with that rank. by_einsum: of each Einsum that touches elements, its pass. sweeps: see the
    module. worst: the input with the most.
    """

    rank: str
    count: int
    sweeps: int
    growth: int = 0
    grows_with: str | None = None
    by_input: Mapping[str, int]
    by_einsum: Mapping[str, int]
    worst: str | None

    def __str__(self) -> str:
        more = f" + {self.growth} ({self.grows_with.upper()} - 1)" if self.grows_with else ""
        return f"{self.count}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor that is made in pass `made` and read last in pass `used`."""

    tensor: str
    made: int
    used: int
    words: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FiberCost:
    """The two ways to have more than one pass: words held at once between passes, or words of the input fetched anew
    (its first fetch not counted).
    """

    held: tuple[Held, ...]
    held_words: int
    fetched_words: int


def passes(cascade: Cascade, rank: str) -> Passes:
    """Passes over a rank; of a split rank those over its tiles. InputError for a rank that no Einsum runs over."""
    split = cascade.split_of(rank)
    known = (*cascade.ranks, *(each.whole for each in cascade.splits))
    if rank not in known:
        raise InputError(f"no rank {rank!r} here; there are {', '.join(dict.fromkeys(known))}")
    over = split.outer if split is not None and rank == split.whole else rank
    full = {split.outer, split.inner} if split is not None and rank != split.inner else {over}
    found = {name: _Lineage(cascade, over, name) for name in _roots(cascade, over)}
    worst = max(found, key=lambda name: (found[name].growth, found[name].most), default=None)
    by_einsum: dict[str, int] = {}
    for lineage in found.values():
        for name, number in lineage.touched.items():
            by_einsum[name] = max(by_einsum.get(name, 0), number)
    return Passes(
        rank=rank,
        count=max((each.most for each in found.values()), default=1),
        sweeps=max((each.sweeps(full) for each in found.values()), default=1),
        growth=0 if worst is None else found[worst].growth,
        grows_with=None if worst is None else found[worst].grows_with,
        by_input={name: each.most for name, each in found.items()},
        by_einsum=by_einsum,
        worst=worst,
    )


def fiber_cost(cascade: Cascade, rank: str, sizes: Mapping[str, int]) -> FiberCost:
    """Words held or fetched anew, for all passes over a rank. sizes: of every rank, split ranks' parts too."""
    found = passes(cascade, rank)
    if found.worst is None:
        return FiberCost(held=(), held_words=0, fetched_words=0)
    if found.growth:
        raise InputError(f"passes over {rank} grow with {found.grows_with}; hold the input whole, of {found.worst}")
    split = cascade.split_of(rank)
    over = split.outer if split is not None and rank == split.whole else rank
    lineage = _Lineage(cascade, over, found.worst)
    held = []
    for tensor, made in lineage.elements.items():
        used = max(
            (lineage.touched[einsum.name] for einsum in cascade.einsums if _touches(einsum, tensor, over)
             and einsum.name in lineage.touched), default=made,
        )  # fmt: skip
        if used > made:
            axes = cascade.axes(cascade.writers[tensor][0]) if tensor in cascade.writers else cascade.inputs[tensor]
            held.append(Held(tensor=tensor, made=made, used=used, words=_words(axes, sizes)))
    between = [sum(each.words for each in held if each.made <= end < each.used) for end in range(1, found.count)]
    again = (found.sweeps - 1) * _words(cascade.inputs[found.worst], sizes)
    return FiberCost(held=tuple(held), held_words=max(between, default=0), fetched_words=again)


def _words(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    missing = [rank for rank in axes if rank not in sizes]
    if missing:
        raise InputError(f"sizes of {', '.join(missing)} are wanted")
    return math.prod(sizes[rank] for rank in axes)


def _touches(einsum: Einsum, tensor: str, rank: str) -> bool:
    """Whether an Einsum reads elements of a tensor along a rank."""
    return any(read.tensor == tensor and rank in read.ranks for read in einsum.reads)


def _roots(cascade: Cascade, rank: str) -> list[str]:
    """Inputs that are read element by element along a rank."""
    return list(
        dict.fromkeys(read.tensor for read in cascade.reads if read.tensor in cascade.inputs and rank in read.ranks)
    )


class _Lineage:
    """What depends on one input along a rank. elements: of each tensor whose element i takes the input's element i, the
    pass in which it is there; whole: of each tensor, passes over the input that it takes to have it.
    """

    def __init__(self, cascade: Cascade, rank: str, root: str) -> None:
        self.cascade, self.rank, self.root = cascade, rank, root
        self.elements: dict[str, int] = {root: 1}
        self.whole: dict[str, int] = {}
        self.touched: dict[str, int] = {}
        self.growth = 0
        self.grows_with: str | None = None
        for group in cascade.order:
            self._settle(group)

    @property
    def most(self) -> int:
        """Passes over the input."""
        return max(self.touched.values(), default=1)

    def sweeps(self, full: set[str]) -> int:
        """Passes with an Einsum that runs over all these ranks."""
        einsums = [each for each in self.cascade.einsums if full <= set(each.space) and each.name in self.touched]
        return max(len({self.touched[each.name] for each in einsums}), 1)

    def _settle(self, group: tuple[Einsum, ...]) -> None:
        """An Einsum once. An iteration until nothing changes; where it is over another rank and each step takes as many
        passes more as the one before it, passes after the first step are kept, and how many each further one adds.
        """
        steps = next((einsum.step for einsum in group if einsum.step is not None), None)
        if steps is None:
            self._visit(group[0])
            return
        states = [self._state()]
        for _ in range(len(group) + 3):
            for einsum in group:
                self._visit(einsum)
            states.append(self._state())
            if states[-1] == states[-2]:
                return
        grown = {name: number - states[-2][2][name] for name, number in states[-1][2].items()}
        self.growth, self.grows_with = max(grown.values()), steps
        self.elements, self.whole, self.touched = states[1]

    def _state(self) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        return dict(self.elements), dict(self.whole), dict(self.touched)

    def _visit(self, einsum: Einsum) -> None:
        elementwise, complete = 0, 0
        for read in einsum.reads:
            if self.rank in read.ranks:
                elementwise = max(elementwise, self.elements.get(read.tensor, 0))
                complete = max(complete, self.whole.get(read.tensor, 0))
            else:
                complete = max(complete, self._taken(read))
        name = einsum.name
        if not elementwise:
            self.whole[name] = max(complete, self.whole.get(name, 0))
            return
        number = max(elementwise, complete + 1)
        self.touched[name] = max(number, self.touched.get(name, 0))
        if self.rank in einsum.out.ranks:
            self.elements[name] = max(number, self.elements.get(name, 0))
            self.whole[name] = max(complete, self.whole.get(name, 0))
        else:
            self.whole[name] = max(number, self.whole.get(name, 0))

    def _taken(self, read: Read) -> int:
        """Passes that a value without the rank takes: the end of an iteration over it takes all of its elements."""
        ends = any(index.last and index.rank == self.rank for index in read.indices)
        return max(self.whole.get(read.tensor, 0), self.elements.get(read.tensor, 0) if ends else 0)
