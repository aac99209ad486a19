"""XR-NPE's number formats and multiply-add unit in exact arithmetic: 4 x 4, 2 x 8 or 1 x 16 bits in a 16-bit word.

Source: "XR-NPE: High-Throughput Mixed-precision SIMD Neural Processing Engine for Extended Reality Perception
Workloads" (2025, arXiv 2508.13049): the formats FP4 (E2M1), Posit(4,1), Posit(8,0), Posit(16,1), lanes of a shared
mantissa multiplier (RMMEC), selective power gating.

Idea: every number of these formats is an integer times a power of two (its *unit*), so a product is an integer times
the unit squared, and a dot product is a sum of integers, kept in a fixed-point register (the *quire*) and rounded once.
The narrow formats share one 16-bit operand word and one grid of 2-bit multiplier blocks.

Units and shapes: codes are uint8 or uint16 arrays; words uint16, lane 0 in the lowest bits; quires Python integers in
units squared. `dot` and `matmul` give quires; `round_exactly` turns one into a code.
Differs from the paper: the width of its quire and the size of its multiplier blocks are not published: the first is a
parameter here, and blocks of 2 x 2 bits are ours.
Cost: 16 / lanes bits a number; blocks of the 49: FP4 4, Posit(4,1) 0, Posit(8,0) 18, Posit(16,1) 49.
Holds when: the quire is wide enough for the sum; where it is not, it saturates and says so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from memwall.errors import InputError
from memwall.formats.levels import LevelSet, minifloat, posit, posit_value

WORD_BITS = 16
GRID_DIGITS = 7
"""Digits of two bits along each side of the multiplier: the 13-bit significand of Posit(16,1) takes seven."""
GRID_BLOCKS = GRID_DIGITS**2
DEFAULT_QUIRE_BITS = 128
MIN_QUIRE_BITS, MAX_QUIRE_BITS = 16, 256
NARROW_QUIRE_BITS = 64
"""The part of the quire that works for formats of 4 and 8 bits; the rest is gated."""
# numbers below are integers times 2^-_SCALE: fine enough for the boundaries of every format
_SCALE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneFormat:
    """One format of the engine.

    spec: its name in `formats.codec`. mode: the number that selects it in hardware. unit: exponent of the power of two
    of which all its numbers are multiples. significand_bits: hidden bit included.
    """

    name: str
    spec: str
    mode: int
    bits: int
    exponent_bits: int
    unit: int
    significand_bits: int

    @property
    def is_posit(self) -> bool:
        """Whether it has the one special code NaR; FP4 has none."""
        return self.spec.startswith("posit")

    @property
    def lanes(self) -> int:
        """Numbers in a word."""
        return WORD_BITS // self.bits

    @property
    def blocks_per_lane(self) -> int:
        """Multiplier blocks that one product takes: none where numbers are powers of two."""
        return 0 if self.significand_bits == 1 else (-(-self.significand_bits // 2)) ** 2

    @property
    def blocks(self) -> int:
        """Multiplier blocks at work while a word is multiplied."""
        return self.lanes * self.blocks_per_lane

    @property
    def utilisation(self) -> float:
        """Share of the shared grid at work; the rest can be gated."""
        return self.blocks / GRID_BLOCKS

    @property
    def levels(self) -> LevelSet:
        """The numbers as published, without scales."""
        return posit(self.bits, self.exponent_bits) if self.is_posit else minifloat(2, 1)

    @property
    def nar(self) -> int | None:
        """The code that means "not a real"."""
        return 1 << (self.bits - 1) if self.is_posit else None

    @property
    def quire_bits(self) -> int:
        """Of the accumulator that its sums use, if it has as many: 2^15 products and more of the narrow formats fit."""
        return {4: 32, 8: NARROW_QUIRE_BITS, 16: MAX_QUIRE_BITS}[self.bits]

    @property
    def product_unit(self) -> int:
        """Exponent of the lowest bit of a quire."""
        return 2 * self.unit


FP4 = LaneFormat(name="fp4", spec="e2m1", mode=0, bits=4, exponent_bits=2, unit=-1, significand_bits=2)
POSIT4 = LaneFormat(name="posit4_1", spec="posit4es1", mode=1, bits=4, exponent_bits=1, unit=-4, significand_bits=1)
POSIT8 = LaneFormat(name="posit8_0", spec="posit8es0", mode=2, bits=8, exponent_bits=0, unit=-6, significand_bits=6)
POSIT16 = LaneFormat(
    name="posit16_1", spec="posit16es1", mode=3, bits=16, exponent_bits=1, unit=-28, significand_bits=13
)
FORMATS: tuple[LaneFormat, ...] = (FP4, POSIT4, POSIT8, POSIT16)
"""By mode."""


def lane_format(name: str) -> LaneFormat:
    """The format called `name`, as here (`posit8_0`) or in `formats.codec` (`posit8es0`, `posit8`, `posit8es0-g64`)."""
    stem = name.partition("-")[0]
    for found in FORMATS:
        if stem in (found.name, found.spec, f"posit{found.bits}" if found.is_posit else found.spec):
            return found
    known = ", ".join(found.name for found in FORMATS)
    raise InputError(f"{name!r} is no format of XR-NPE; it has {known} (e2m1, posit4, posit8, posit16 as weights)")


# -- numbers ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _integer_table(found: LaneFormat) -> np.ndarray:
    values = [0 if np.isnan(value) else int(np.ldexp(value, -found.unit)) for value in found.levels.values.tolist()]
    return np.asarray(values, np.int64)


def integers(found: LaneFormat, codes: np.ndarray) -> np.ndarray:
    """Codes -> int64 multiples of the unit; NaR counts as 0 (see `has_nar`)."""
    numbers: np.ndarray = _integer_table(found)[codes]
    return numbers


def has_nar(found: LaneFormat, codes: np.ndarray) -> bool:
    """Whether any code is "not a real", which no sum recovers from."""
    return found.nar is not None and bool((np.asarray(codes) == found.nar).any())


@lru_cache(maxsize=8)
def _boundaries(found: LaneFormat) -> list[int]:
    """Between the positive codes c and c + 1, in 2^-_SCALE: for posits the string of one more bit."""
    codes = range((1 << (found.bits - 1)) - 1)
    if found.is_posit:
        halves = [posit_value(2 * code + 1, found.bits + 1, found.exponent_bits) for code in codes]
        halves[0] = 0.0  # a number above nothing is never rounded to nothing
    else:
        values = found.levels.values
        halves = [(float(values[code]) + float(values[code + 1])) / 2 for code in codes]
    return [int(np.ldexp(half, _SCALE)) for half in halves]


def round_exactly(found: LaneFormat, number: int, exponent: int = 0) -> int:
    """number * 2^exponent -> its code: to the nearest, ties to the even code, saturating; no double rounding."""
    boundaries = _boundaries(found)
    shift = exponent + _SCALE
    magnitude = abs(number)
    # twice the scaled magnitude, with a sticky lowest bit: where it stands to a boundary is all that counts
    if shift >= 0:
        doubled = magnitude << (shift + 1)
    else:
        doubled = (magnitude >> -shift << 1) | int(bool(magnitude & ((1 << -shift) - 1)))
    code = bisect_left(boundaries, doubled, key=lambda boundary: 2 * boundary)
    if code < len(boundaries) and doubled == 2 * boundaries[code] and code % 2 == 1:
        code += 1
    if number >= 0 or code == 0:
        return code
    return (1 << found.bits) - code if found.is_posit else code | 1 << (found.bits - 1)


# -- words -----------------------------------------------------------------------------------------------------------


def pack_words(found: LaneFormat, codes: np.ndarray) -> np.ndarray:
    """Codes [..., n] -> uint16 words [..., ceil(n / lanes)]; missing lanes hold zero."""
    lanes = found.lanes
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // lanes) * lanes), np.uint16)
    padded[..., : codes.shape[-1]] = codes
    grouped = padded.reshape(*codes.shape[:-1], -1, lanes)
    shifts = np.arange(lanes, dtype=np.uint16) * np.uint16(found.bits)
    words: np.ndarray = np.bitwise_or.reduce(grouped << shifts, axis=-1)
    return words


def unpack_words(found: LaneFormat, words: np.ndarray, count: int) -> np.ndarray:
    """Inverse of `pack_words`: the first `count` codes of the last axis."""
    shifts = np.arange(found.lanes, dtype=np.uint16) * np.uint16(found.bits)
    codes = (words[..., None] >> shifts) & np.uint16((1 << found.bits) - 1)
    kind = np.uint8 if found.bits <= 8 else np.uint16
    numbers: np.ndarray = codes.reshape(*words.shape[:-1], -1)[..., :count].astype(kind)
    return numbers


# -- sums ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Quire:
    """The accumulator of one unit: a two's complement number of `bits` bits in units squared.

    Formats of 4 and 8 bits use 32 and 64 bits of it. A sum that leaves them saturates; `saturated` and `nar` stay set
    until `clear`.
    """

    bits: int = DEFAULT_QUIRE_BITS
    value: int = 0
    saturated: bool = False
    nar: bool = False

    def __post_init__(self) -> None:
        if not MIN_QUIRE_BITS <= self.bits <= MAX_QUIRE_BITS:
            raise InputError(f"a quire of {self.bits} bits: it may have {MIN_QUIRE_BITS} to {MAX_QUIRE_BITS}")

    def clear(self) -> None:
        """Start a new sum."""
        self.value, self.saturated, self.nar = 0, False, False

    def multiply_add(self, found: LaneFormat, a: int, b: int) -> None:
        """One word of each operand: all lanes' products are added at once, exactly, then the register saturates."""
        pair = unpack_words(found, np.asarray([[a], [b]], np.uint16), found.lanes)
        self.nar |= has_nar(found, pair)
        numbers = integers(found, pair).tolist()
        self.add(found, sum(x * y for x, y in zip(*numbers, strict=True)))

    def add(self, found: LaneFormat, number: int) -> None:
        """Add units squared of a format."""
        limit = 1 << (min(self.bits, found.quire_bits) - 1)
        total = self.value + number
        self.value = min(max(total, -limit), limit - 1)
        self.saturated |= self.value != total

    def code(self, operands: LaneFormat, out: LaneFormat) -> int:
        """The sum rounded once to a code of `out`; NaR where an operand was (0 in FP4, which cannot say it)."""
        if self.nar:
            return out.nar or 0
        return round_exactly(out, self.value, operands.product_unit)


def matmul(found: LaneFormat, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact sums in units squared: codes a [m, k], b [n, k] -> Python integers [m, n] (an object array).

    Sums of pieces of 19 bits in float64 stay below 2^53 for k up to 2^15, which is as much as may be asked for.
    """
    if a.shape[-1] != b.shape[-1] or a.shape[-1] > 1 << 15:
        raise InputError(f"products of {a.shape[-1]} and {b.shape[-1]} columns: give the same number, at most 32,768")
    if has_nar(found, a) or has_nar(found, b):
        raise InputError(f"{found.name}: operands hold NaR")
    total = np.zeros((len(a), len(b)), object)
    for i, left in enumerate(_pieces(integers(found, a))):
        for j, right in enumerate(_pieces(integers(found, b))):
            part = (left @ right.T).astype(np.int64).astype(object)
            total += part * (1 << (_PIECE_BITS * (i + j)))
    return total


_PIECE_BITS = 19


def _pieces(numbers: np.ndarray) -> list[np.ndarray]:
    """The digits of integers to the base 2^19, signed as they are, as float64; lowest first."""
    signs, rest = np.sign(numbers), np.abs(numbers)
    found: list[np.ndarray] = []
    while not found or rest.any():
        found.append((signs * (rest & ((1 << _PIECE_BITS) - 1))).astype(np.float64))
        rest = rest >> _PIECE_BITS
    return found


def exact_dot(found: LaneFormat, a: Sequence[int], b: Sequence[int]) -> Fraction:
    """The dot product as rational numbers: what everything else here must equal."""
    values = found.levels.values.tolist()
    return sum((Fraction(values[x]) * Fraction(values[y]) for x, y in zip(a, b, strict=True)), Fraction(0))
