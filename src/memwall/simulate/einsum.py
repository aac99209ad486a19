"""Kernels as data: extended Einsums, of which `einsum_cascade` makes cascades and `einsum_text` reads the text form.

An extended Einsum says for each point of its ranks what is combined (maps and unary functions), and how ranks that are
missing on the left are reduced. A cascade is a list of them, each reading inputs and what was written before:

    split m = m1 * m0                                  rank m in tiles; the last one may be short
    BQK[m1, m0, p] = Q[e, p] * K[e, m1*M0+m0]          e is missing on the left: summed
    LM[m1, p] = max{m0} BQK[m1, m0, p]                 another reduction is named, with its ranks
    RM[0, p] = -inf                                    an iterative rank: a first value,
    RM[m1+1, p] = max(RM[m1, p], LM[m1, p])            and step i + 1 from step i; ends with the rank's last step,
    stop i when D[i+1] < 1e-6                          or, all over, where this holds first
    AV[f, p] = RNV[f, M1, p] / RD[M1, p]               capitals of a rank as an index: after its last step

Names: ranks are lower case, tensors begin with a capital. In a value a rank is its index, its capitals are its size,
any other name without brackets is a number that is given. A tensor that nothing writes is an input. `#` begins a
comment. Reductions: sum, max, min, prod. Functions: those of `FUNCTIONS`.

Source: FuseMax, Nayak 2024, arXiv 2406.10491, section 3 (extended Einsums and cascades; iterative ranks). The text form
is this file's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

REDUCTIONS = ("sum", "max", "min", "prod")
FUNCTIONS = {
    "max": 2, "min": 2, "exp": 1, "log": 1, "sqrt": 1, "rsqrt": 1, "square": 1, "abs": 1, "relu": 1, "elu": 1,
    "sigmoid": 1, "tanh": 1, "neg": 1,
}  # fmt: skip
"""By name, how many arguments. elu is exp(x) - 1 below zero; neg is what a minus sign in front means."""
OPERATORS = ("+", "-", "*", "/")
COMPARISONS = ("<", "<=", ">", ">=")


@dataclass(frozen=True, slots=True)
class Index:
    """One index of an access: a rank, a step on (`m1+1`), after the last step (`M1`), the first value (`0`), or a point
    of a split rank (`m1*M0+m0`, whose `rank` is then the whole one once the cascade is made).
    """

    rank: str = ""
    ahead: bool = False
    last: bool = False
    first: bool = False
    split: tuple[str, str] | None = None

    @property
    def open(self) -> tuple[str, ...]:
        """Ranks that this index runs over."""
        return self.split or (() if self.last or self.first else (self.rank,))

    def __str__(self) -> str:
        if self.split is not None:
            outer, inner = self.split
            return f"{outer}*{inner.upper()}+{inner}"
        if self.first:
            return "0"
        return self.rank.upper() if self.last else self.rank + "+1" * self.ahead


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor with its indices; a number that is given has none."""

    tensor: str
    indices: tuple[Index, ...] = ()

    @property
    def ranks(self) -> tuple[str, ...]:
        """Ranks that its indices run over."""
        return tuple(rank for index in self.indices for rank in index.open)

    def __str__(self) -> str:
        return self.tensor + (f"[{', '.join(map(str, self.indices))}]" if self.indices else "")


@dataclass(frozen=True, slots=True)
class Number:
    """A constant."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:g}" if float(f"{self.value:g}") == self.value else repr(self.value)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a rank."""

    rank: str

    def __str__(self) -> str:
        return self.rank.upper()


@dataclass(frozen=True, slots=True)
class Step:
    """The index of a rank, as a number."""

    rank: str

    def __str__(self) -> str:
        return self.rank


@dataclass(frozen=True, slots=True)
class Call:
    """A map or unary operation, of `OPERATORS` or `FUNCTIONS`, with its arguments."""

    name: str
    arguments: tuple[Expression, ...]

    def __str__(self) -> str:
        if self.name in OPERATORS:
            left, right = self.arguments
            low = ("+", "-")
            texts = [str(left), str(right)]
            if isinstance(left, Call) and self.name not in low and left.name in low:
                texts[0] = f"({left})"
            if isinstance(right, Call) and right.name in (OPERATORS if self.name in ("-", "/", "*") else low):
                texts[1] = f"({right})"
            return f"{texts[0]} {self.name} {texts[1]}"
        return f"{self.name}({', '.join(map(str, self.arguments))})"


Expression = Read | Number | Size | Step | Call


@dataclass(frozen=True, slots=True)
class Split:
    """Rank `whole` in tiles: `outer` of them, of `inner` points each."""

    whole: str
    outer: str
    inner: str

    def __str__(self) -> str:
        return f"split {self.whole} = {self.outer} * {self.inner}"


@dataclass(frozen=True, slots=True)
class Stop:
    """Where an iterative rank ends before its last step: once the comparison holds for all points."""

    rank: str
    left: Expression
    comparison: str
    right: Expression

    def __str__(self) -> str:
        return f"stop {self.rank} when {self.left} {self.comparison} {self.right}"


@dataclass(frozen=True)
class Einsum:
    """out = reduce over `over` of value. over: () for the ranks that are missing on the left, which are summed."""

    out: Read
    value: Expression
    reduction: str = "sum"
    over: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The tensor it writes."""
        return self.out.tensor

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """What it reads, in the order of the text."""
        return tuple(reads_of(self.value))

    @cached_property
    def space(self) -> tuple[str, ...]:
        """Ranks of its points: those on the left, then those reduced."""
        return tuple(dict.fromkeys((*self.out.ranks, *ranks_of(self.value))))

    @property
    def reduced(self) -> tuple[str, ...]:
        """Ranks that are missing on the left."""
        return self.space[len(self.out.ranks) :]

    @property
    def step(self) -> str | None:
        """The iterative rank whose next step it writes."""
        return next((index.rank for index in self.out.indices if index.ahead), None)

    @property
    def starts(self) -> bool:
        """Whether it writes the first value of an iterative rank."""
        return any(index.first for index in self.out.indices)

    def __str__(self) -> str:
        named = f"{self.reduction}{{{', '.join(self.over)}}} " if self.over else ""
        inner = f"({self.value})" if self.over and isinstance(self.value, Call) else str(self.value)
        return f"{self.out} = {named}{inner if named else self.value}"


def walk(value: Expression) -> Iterator[Expression]:
    """A value and all it is made of."""
    yield value
    if isinstance(value, Call):
        for argument in value.arguments:
            yield from walk(argument)


def reads_of(value: Expression) -> Iterator[Read]:
    """The tensors of a value, as often as they stand there."""
    return (each for each in walk(value) if isinstance(each, Read))


def ranks_of(value: Expression) -> Iterator[str]:
    """The ranks that a value runs over."""
    for each in walk(value):
        if isinstance(each, Read):
            yield from each.ranks
        elif isinstance(each, Step):
            yield each.rank
