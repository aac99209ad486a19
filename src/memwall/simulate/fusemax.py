"""Attention on an accelerator with a matrix array and a vector array: cycles, traffic and use of five designs.

Source: FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design, Nayak 2024, arXiv 2406.10491
(MICRO 2024); code: github.com/FPSG-UIUC/micro24-fusemax-artifact. FLAT: Kao 2023, arXiv 2107.06419.

Idea: softmax on a small vector unit leaves the matrix array idle, and a row of scores does not fit the buffer once
sequences are long. Attention in one pass (`attention_cascades`, `one-pass`) needs of a row of queries only its running
maximum, denominator and numerator, so the buffer does not grow with keys; most of it is work for a matrix array whose
elements can take a maximum and evaluate an exponential by multiply-adds; and with two tiles in flight both arrays work
at once. Cycles are counted from the cascade: points of each Einsum times the cycles of its operations, over the array's
width; which array does what, and beside what, is data (`DESIGNS`).

    design         what                                                        time
    unfused        products and softmax one after the other, through DRAM      each the longer of arithmetic and DRAM
    flat           fused row by row, three-pass softmax on the vector array    the longest of both arrays and DRAM
    cascade        the one-pass cascade on the same hardware                   the same
    architecture   matrix array takes maxima and exponentials; tiles in turn   phases added, and a drain of each maximum
    binding        two tiles interleaved: FuseMax                              phases added, no drain

Units: cycles, bytes; values have `word_bytes`. P rows of queries and M keys a problem, E and F numbers of a head of
keys and of values; query heads that share keys are rows of one problem. Parts of tiles take the time of whole ones.

Differs from the paper: a last tile may be short, heads may share keys, layers of any model are priced. FLAT's rules are
what its published bytes leave: four row tiles share a pass over keys and values as long as their scores fit; where
those of one do not, scores and weights go to DRAM and back, whole, and four share a pass again. A product outside
attention takes as long as its DRAM traffic where that is longer, which the published means have in them.

Cost: microseconds a point.

Holds when: all keys are seen (no causal mask), as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import GIB, MB, MIB, format_bytes
from memwall.simulate.attention_cascades import cascade
from memwall.simulate.einsum import Einsum
from memwall.simulate.einsum_work import operations, points

FLAT_ROW_TILES = 4
"""Tiles of query rows that share a pass over keys and values in FLAT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """Hardware that designs have in common. buffer_bytes: None for the design's own."""

    array: int = 256
    clock_hz: float = 940.0 * MB
    dram_bytes_per_s: float = 400.0 * GIB
    buffer_bytes: int | None = None
    word_bytes: int = 2

    def __post_init__(self) -> None:
        for name, least, most in (("array", 1, 1 << 16), ("word_bytes", 1, 8)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} {getattr(self, name)}: from {least} to {most:,}")
        for name in ("clock_hz", "dram_bytes_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)}: a positive number")
        if self.buffer_bytes is not None and self.buffer_bytes < 1:
            raise InputError(f"buffer_bytes {self.buffer_bytes}: a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Attention's problems, which share nothing: P rows, M keys, E and F numbers a head."""

    problems: int
    rows: int
    keys: int
    key_size: int
    value_size: int

    def __post_init__(self) -> None:
        for name in ("problems", "rows", "keys", "key_size", "value_size"):
            if not 1 <= getattr(self, name) <= 1 << 28:
                raise InputError(f"{name} {getattr(self, name)}: from 1 to {1 << 28:,}")

    def sizes(self, array: int) -> dict[str, int]:
        """Sizes of the cascades' ranks, in whole tiles of the array."""
        tiles = -(-self.keys // array)
        return {"p": -(-self.rows // array) * array, "m1": tiles, "m0": array, "m": tiles * array,
                "e": self.key_size, "f": self.value_size}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Einsums that run beside each other on the matrix and on the vector array; one after the other on each."""

    matrix: tuple[str, ...] = ()
    vector: tuple[str, ...] = ()
    drains: str | None = None
    """An Einsum of the matrix array whose results must leave it, a row at a time, before the phase begins."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Who computes what, in which order. exp_cycles: of an exponential on either array; None: every Einsum takes one
    cycle a point, whatever it computes. row_values: what the buffer holds for a row of queries, in terms of E, F and R.
    """

    name: str
    what: str
    cascade: str
    phases: tuple[Phase, ...]
    buffer_bytes: int
    exp_cycles: int | None
    streams: str
    """How it meets DRAM: `once` (one pass), `rows` (FLAT's), `all` (unfused)."""
    scores_held: bool = False
    """Whether tiles of scores and weights lie in the buffer."""

    @cached_property
    def matrix(self) -> frozenset[str]:
        """Einsums of the matrix array."""
        return frozenset(name for phase in self.phases for name in phase.matrix)


def _fused(*, interleaved: bool) -> tuple[Phase, ...]:
    """FuseMax's phases of a tile: interleaved, the vector array catches up with the tile before in the first one."""
    late = ("RNV",) if interleaved else ()
    return (
        Phase(matrix=("BQK", "LM"), vector=("RD", *late, "AV")),
        Phase(vector=("RM",), drains=None if interleaved else "LM"),
        Phase(matrix=("SLN", "SLD"), vector=("PRM", "SPD")),
        Phase(matrix=("SLNV",), vector=("SPNV", *(() if interleaved else ("RNV",)))),
    )


_SOFTMAX = ("GM", "SN", "SD", "A")
_BESIDE = ("LM", "RM", "SLN", "SLD", "PRM", "SPD", "RD", "SPNV", "RNV", "AV")
DESIGNS: dict[str, Design] = {
    each.name: each
    for each in (
        Design(
            name="unfused", what="products and softmax in turn, through DRAM", cascade="three-pass", exp_cycles=None,
            phases=(Phase(matrix=("QK",)), Phase(vector=_SOFTMAX), Phase(matrix=("AV",))),
            buffer_bytes=32 * MIB, streams="all",
        ),
        Design(
            name="flat", what="FLAT: fused, softmax of whole rows on the vector array", cascade="three-pass",
            phases=(Phase(matrix=("QK", "AV"), vector=_SOFTMAX),),
            buffer_bytes=32 * MIB, exp_cycles=None, streams="rows",
        ),
        Design(
            name="cascade", what="the one-pass cascade on FLAT's hardware", cascade="one-pass",
            phases=(Phase(matrix=("BQK", "SLNV"), vector=_BESIDE),),
            buffer_bytes=32 * MIB, exp_cycles=1, streams="once", scores_held=True,
        ),
        Design(
            name="architecture", what="and softmax's tiles on the matrix array", cascade="one-pass",
            phases=_fused(interleaved=False), buffer_bytes=16 * MIB, exp_cycles=6, streams="once",
        ),
        Design(
            name="binding", what="and two tiles interleaved: FuseMax", cascade="one-pass",
            phases=_fused(interleaved=True), buffer_bytes=16 * MIB, exp_cycles=6, streams="once",
        ),
    )
}  # fmt: skip
BASELINE = "flat"


# ---- cycles --------------------------------------------------------------------------------------------------------


def point_cycles(design: Design, einsum: Einsum) -> int:
    """Cycles of one point: an operation each, an exponential more (six multiply-adds after its subtraction)."""
    if design.exp_cycles is None:
        return 1
    return sum(count * (design.exp_cycles if kind == "exp" else 1) for kind, count in operations(einsum).items())


def einsum_cycles(design: Design, shape: Shape, machine: Accelerator) -> dict[str, int]:
    """Cycles of every Einsum on the array that it is bound to: R x R lanes, or R."""
    sizes, found = shape.sizes(machine.array), {}
    for einsum in cascade(design.cascade).einsums:
        if not einsum.starts:
            lanes = machine.array ** (2 if einsum.name in design.matrix else 1)
            work = shape.problems * points(einsum, sizes) * point_cycles(design, einsum)
            found[einsum.name] = -(-work // lanes)
    return found


# ---- traffic -------------------------------------------------------------------------------------------------------


def query_tiles(design: Design, shape: Shape, machine: Accelerator) -> int:
    """P1: tiles of R query rows that stay in the buffer while all keys and values pass.

    As many as fit beside one tile of keys and values, then lowered to a divisor of all tiles. DoesNotFit with the
    buffer that one would need.
    """
    array, size = machine.array, machine.word_bytes
    tiles = -(-shape.rows // array)
    row = shape.key_size + shape.value_size + 2 + (2 * array if design.scores_held else 0)
    other = size * array * (shape.key_size + shape.value_size)
    most = min((_buffer(design, machine) - other) // (size * array * row), tiles)
    if most < 1:
        raise DoesNotFit(
            f"{design.name}: a buffer of {format_bytes(_buffer(design, machine))} holds no tile of {array} query rows "
            f"beside one of keys and values; {other + size * array * row:,} bytes would"
        )
    return _divisor(tiles, most)


def flat_tiles(design: Design, shape: Shape, machine: Accelerator) -> tuple[int, bool]:
    """(tiles of query rows that share a pass over keys and values, whether scores go to DRAM) of FLAT."""
    tiles = -(-shape.rows // machine.array)
    tile_bytes = machine.array * shape.keys * machine.word_bytes
    fit = _buffer(design, machine) // tile_bytes
    return _divisor(tiles, min(FLAT_ROW_TILES, fit or FLAT_ROW_TILES, tiles)), fit < 1


def _divisor(whole: int, most: int) -> int:
    """The largest divisor that is no more than that."""
    return next(part for part in range(most, 0, -1) if whole % part == 0)


def _buffer(design: Design, machine: Accelerator) -> int:
    return design.buffer_bytes if machine.buffer_bytes is None else machine.buffer_bytes


def stage_values(design: Design, shape: Shape, machine: Accelerator) -> tuple[int, ...]:
    """Values that move between DRAM and the buffer, of all problems: one figure, of `unfused` one for each phase."""
    rows, keys, e, f = shape.rows, shape.keys, shape.key_size, shape.value_size
    tiles, scores = -(-rows // machine.array), rows * keys
    if design.streams == "rows":
        shared, spilled = flat_tiles(design, shape, machine)
        moved: tuple[int, ...] = (
            rows * (e + f) + tiles // shared * keys * (e + f) + (4 * scores if spilled else 0),
        )  # fmt: skip
    elif design.streams == "once":
        moved = (rows * (e + f) + tiles // query_tiles(design, shape, machine) * keys * (e + f),)
    else:
        # a product keeps as many rows of what comes out, or goes in, as fit beside a tile of keys
        held = [
            max(1, _buffer(design, machine) // (machine.word_bytes * (size + machine.array)) // machine.array)
            for size in (e, f)
        ]
        again = [-(-tiles // each) for each in held]
        moved = (rows * e + again[0] * keys * e + scores, 2 * scores, scores + again[1] * keys * f + rows * f)
    return tuple(shape.problems * each for each in moved)


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """Attention of a shape by a design on a machine."""

    design: Design
    shape: Shape
    machine: Accelerator

    @cached_property
    def einsums(self) -> Mapping[str, int]:
        """Cycles of each Einsum."""
        return einsum_cycles(self.design, self.shape, self.machine)

    @cached_property
    def phases(self) -> tuple[tuple[int, int, int], ...]:
        """Cycles of each phase: of the matrix array, of the vector array, and of the drain before it."""
        return tuple(
            (
                sum(self.einsums[name] for name in phase.matrix),
                sum(self.einsums[name] for name in phase.vector),
                self.machine.array * self.einsums[phase.drains] if phase.drains else 0,
            )
            for phase in self.design.phases
        )

    @cached_property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(cycles, DRAM bytes) of what follows one another: all phases together, or of `unfused` each by itself."""
        cycles = [max(matrix, vector) + drain for matrix, vector, drain in self.phases]
        moved = [self.machine.word_bytes * each for each in stage_values(self.design, self.shape, self.machine)]
        return tuple(zip(cycles, moved, strict=True)) if len(moved) > 1 else ((sum(cycles), moved[0]),)

    @property
    def compute_cycles(self) -> int:
        """Cycles of arithmetic, both arrays as they overlap."""
        return sum(cycles for cycles, _ in self.stages)

    @property
    def traffic_bytes(self) -> int:
        """Bytes from and to DRAM."""
        return sum(moved for _, moved in self.stages)

    @property
    def seconds(self) -> float:
        """Each stage takes the longer of arithmetic and DRAM."""
        return sum(
            max(cycles / self.machine.clock_hz, moved / self.machine.dram_bytes_per_s) for cycles, moved in self.stages
        )

    @property
    def memory_bound(self) -> bool:
        """Whether DRAM is what most of the time goes to."""
        return self.seconds > self.compute_cycles / self.machine.clock_hz * (1 + 1e-12)

    @property
    def shares(self) -> Mapping[str, float]:
        """Share of the time that the matrix array spends on each of its Einsums."""
        whole = self.seconds * self.machine.clock_hz
        return {name: cycles / whole for name, cycles in self.einsums.items() if name in self.design.matrix}

    @property
    def utilisation(self) -> float:
        """Share of the time that the matrix array works."""
        return sum(self.shares.values())

    @property
    def vector_utilisation(self) -> float:
        """The same of the vector array."""
        busy = sum(cycles for name, cycles in self.einsums.items() if name not in self.design.matrix)
        return busy / (self.seconds * self.machine.clock_hz)


def price(name: str, shape: Shape, machine: Accelerator | None = None) -> Run:
    """A design's run; InputError for an unknown design, DoesNotFit where its buffer is too small."""
    if name not in DESIGNS:
        raise InputError(f"no design {name!r}; there are {', '.join(DESIGNS)}")
    run = Run(design=DESIGNS[name], shape=shape, machine=machine or Accelerator())
    assert run.stages is not None  # refuses what does not fit now, not when it is asked
    return run
