"""Level sets: which numbers a code of a few bits can mean, and which code a number rounds to.

A `LevelSet` is a table of values by code and the sorted levels among them. Between two neighbouring levels stands a
threshold, the least float32 that takes the upper one: whatever a format says about ties (to the even code, downwards)
or about where two levels part (halfway, or for posits where the bit string is cut) is in the thresholds, so encoding
is one search and every format goes the same way, here and in the compiled encoder.

Values outside the levels saturate; a zero that the format can write twice gets the smaller code; codes that mean no
number (NaN, infinity, NaR) are never written and decode to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import array_namespace

MAX_MINIFLOAT_BITS = 8
MIN_POSIT_BITS, MAX_POSIT_BITS, MAX_POSIT_EXPONENT = 4, 16, 3

#: 4-bit levels of the QLoRA paper: means of equal shares of a normal distribution on either side of an exact zero
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: the 4-bit float of the bitsandbytes library by code: sign, two bits of exponent and one of fraction in its own order
FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LevelSet:
    """The numbers of one format.

    values: float32 by code, NaN where a code means no number. codes: of the levels, in the order of their size.
    thresholds: float32 [levels - 1], the least number that rounds to the level above.
    """

    name: str
    bits: int
    values: np.ndarray
    codes: np.ndarray
    thresholds: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """The finite levels in ascending order, float32."""
        levels: np.ndarray = self.values[self.codes]
        return levels

    @property
    def largest(self) -> float:
        """Largest magnitude of a level."""
        return float(np.abs(self.levels).max())

    @property
    def zero_code(self) -> int:
        """Code of zero, or of the level nearest to it."""
        return int(self.encode(np.zeros(1, np.float32))[0])

    def encode(self, x: Any) -> Any:
        """float32 numbers of any shape -> codes (uint8, or uint16 where a format has more than 8 bits)."""
        xp = array_namespace(x)
        thresholds, codes = self._as(xp, x, self.thresholds), self._as(xp, x, self.codes)
        index = xp.searchsorted(thresholds, xp.reshape(x, (-1,)), side="right")
        return xp.reshape(codes[index], x.shape)

    def decode(self, codes: Any) -> Any:
        """Codes -> float32 values; NaN for codes that mean no number."""
        xp = array_namespace(codes)
        return self._as(xp, codes, self.values)[codes if xp is np else xp.astype(codes, xp.int64)]

    @staticmethod
    def _as(xp: Any, like: Any, table: np.ndarray) -> Any:
        return table if xp is np else xp.asarray(table, device=like.device)

    def within(self, limit: float, factor: float = 1.0) -> LevelSet:
        """The levels of magnitude up to `limit`, all numbers multiplied by `factor`, a power of two (exact)."""
        kept = np.abs(self.levels) <= limit
        thresholds = self.thresholds[kept[1:] & kept[:-1]]
        # the least number above zero stays that: it has no half
        normal = np.abs(thresholds) >= np.finfo(np.float32).tiny
        return LevelSet(
            name=self.name,
            bits=self.bits,
            values=self.values * np.float32(factor),
            codes=self.codes[kept],
            thresholds=np.where(normal, thresholds * np.float32(factor), thresholds),
        )


def _level_set(
    name: str,
    values: Iterable[float],
    *,
    boundaries: dict[int, float] | None = None,
    ties_down: bool = False,
) -> LevelSet:
    """boundaries: between a code and the next level above, where that is not halfway; ties go to the even code, or all
    of them down."""
    table = np.asarray(list(values), np.float32)
    bits = (len(table) - 1).bit_length()
    kind = np.uint8 if bits <= 8 else np.uint16
    written: dict[float, int] = {}
    for code, value in enumerate(table.tolist()):
        if math.isfinite(value):
            written.setdefault(value + 0.0, code)
    levels = sorted(written)
    codes = [written[level] for level in levels]
    thresholds = []
    for below, above, code, next_code in zip(levels, levels[1:], codes, codes[1:], strict=False):
        boundary = (boundaries or {}).get(code, (below + above) / 2)
        up = not ties_down and next_code % 2 == 0 and code % 2 == 1
        thresholds.append(_least(boundary, included=up))
    return LevelSet(
        name=name,
        bits=bits,
        values=table,
        codes=np.asarray(codes, kind),
        thresholds=np.asarray(thresholds, np.float32),
    )


def _least(boundary: float, *, included: bool) -> float:
    """The least float32 above the boundary, or at it."""
    nearest = np.float32(boundary)
    if float(nearest) > boundary or (included and float(nearest) == boundary):
        return float(nearest)
    return float(np.nextafter(nearest, np.float32(np.inf)))


# -- floats ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def minifloat(exponent_bits: int, mantissa_bits: int) -> LevelSet:
    """Sign, exponent (bias 2^(e-1) - 1), mantissa, with subnormals.

    All codes are numbers, but in the two 8-bit formats of the Open Compute Project: e5m2 keeps the largest exponent for
    infinities and NaN, e4m3 only the largest magnitude for NaN.
    """
    bits = 1 + exponent_bits + mantissa_bits
    if exponent_bits < 1 or not 2 <= bits <= MAX_MINIFLOAT_BITS:
        raise InputError(
            f"e{exponent_bits}m{mantissa_bits}: a sign, at least one bit of exponent and the mantissa take {bits} "
            f"bits; formats have up to {MAX_MINIFLOAT_BITS}, such as e2m1, e4m3"
        )
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    magnitudes = []
    for code in range(1 << (bits - 1)):
        exponent, mantissa = divmod(code, steps)
        significand = mantissa / steps + (exponent > 0)
        magnitudes.append(math.ldexp(significand, max(exponent, 1) - bias))
    if (exponent_bits, mantissa_bits) == (4, 3):
        magnitudes[-1] = math.nan
    if (exponent_bits, mantissa_bits) == (5, 2):
        magnitudes[-steps:] = [math.nan] * steps
    return _level_set(f"e{exponent_bits}m{mantissa_bits}", [*magnitudes, *(-one for one in magnitudes)])


@lru_cache(maxsize=64)
def posit(bits: int, exponent_bits: int) -> LevelSet:
    """Posits: sign, a run of equal bits that counts in powers of 2^(2^es), es bits of exponent, the rest fraction.

    Rounding is that of the posit standard: to the nearest bit string, ties to the even one, where the string of one
    more bit lies between two neighbours; nothing but zero becomes zero, and what is too large the largest posit.
    """
    if not (MIN_POSIT_BITS <= bits <= MAX_POSIT_BITS and 0 <= exponent_bits <= MAX_POSIT_EXPONENT):
        raise InputError(
            f"posit{bits}es{exponent_bits}: posits have {MIN_POSIT_BITS} to {MAX_POSIT_BITS} bits and es of 0 to "
            f"{MAX_POSIT_EXPONENT}, such as posit8es0"
        )
    values = [posit_value(code, bits, exponent_bits) for code in range(1 << bits)]
    not_real = 1 << (bits - 1)
    boundaries = {}
    for code in range(1 << bits):
        if (code + 1) % (1 << bits) != not_real and code != not_real:
            boundaries[code] = posit_value(2 * code + 1, bits + 1, exponent_bits)
    boundaries[0] = boundaries[(1 << bits) - 1] = 0.0
    return _level_set(f"posit{bits}es{exponent_bits}", values, boundaries=boundaries)


def posit_value(code: int, bits: int, exponent_bits: int) -> float:
    """The number that a posit's bit string means; NaN for "not a real"."""
    if code == 0:
        return 0.0
    if code == 1 << (bits - 1):
        return math.nan
    negative = code >> (bits - 1)
    magnitude = (1 << bits) - code if negative else code
    rest = bits - 1  # bits not read yet
    first = (magnitude >> (rest - 1)) & 1
    run = 0
    while run < rest and (magnitude >> (rest - 1 - run)) & 1 == first:
        run += 1
    regime = run - 1 if first else -run
    rest = max(rest - run - 1, 0)
    taken = min(exponent_bits, rest)
    exponent = ((magnitude >> (rest - taken)) & ((1 << taken) - 1)) << (exponent_bits - taken)
    rest -= taken
    significand = 1 + (magnitude & ((1 << rest) - 1)) / (1 << rest)
    value = math.ldexp(significand, regime * (1 << exponent_bits) + exponent)
    return -value if negative else value


# -- tables ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def nf4() -> LevelSet:
    """NormalFloat of 4 bits; halfway goes down, and halfway is what float32 makes of it, as in bitsandbytes."""
    return _float32_halves(_level_set("nf4", NF4_LEVELS, ties_down=True))


@lru_cache(maxsize=1)
def fp4() -> LevelSet:
    """The 4-bit float of bitsandbytes; not the E2M1 of the Open Compute Project, which is `e2m1`."""
    magnitudes = FP4_MAGNITUDES
    return _float32_halves(_level_set("fp4", [*magnitudes, *(-one for one in magnitudes)], ties_down=True))


@lru_cache(maxsize=1)
def dynamic8() -> LevelSet:
    """The 256 levels of the published 8-bit optimizers, for scales of scales: seven decades, each with twice as many
    levels as the one below; the middles of equal parts of [0.1, 1], of either sign, and 0 and 1 (Dettmers, 2016 and
    2022, arXiv 1511.04561 and 2110.02861)."""
    levels = [0.0, 1.0]
    for decade in range(7):
        parts = _even_parts(2**decade)
        middles = (np.float32(10.0 ** (decade - 6)) * ((parts[:-1] + parts[1:]) / np.float32(2))).tolist()
        levels += [*middles, *(-one for one in middles)]
    return _float32_halves(_level_set("dynamic8", sorted(levels), ties_down=True))


def _even_parts(num_parts: int) -> np.ndarray:
    """The ends of equal parts of [0.1, 1]: a float32 step counted from the nearer end and rounded once, on which the
    last digits of the published table depend."""
    low, high, count = np.float32(0.1), np.float32(1), np.arange(num_parts + 1, dtype=np.float64)
    step = np.float64((high - low) / np.float32(num_parts))
    from_low, from_high = np.float64(low) + step * count, 1 - step * (num_parts - count)
    ends: np.ndarray = np.where(count < (num_parts + 1) // 2, from_low, from_high).astype(np.float32)
    return ends


def _float32_halves(found: LevelSet) -> LevelSet:
    """The same levels, parted where float32 puts their half: bit for bit what float32 implementations do."""
    levels = found.levels
    halves = (levels[:-1] + levels[1:]) / np.float32(2)
    thresholds = np.nextafter(halves, np.float32(np.inf))
    return LevelSet(name=found.name, bits=found.bits, values=found.values, codes=found.codes, thresholds=thresholds)


# -- integers --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def integers(bits: int) -> LevelSet:
    """-2^(b-1) to 2^(b-1) - 1, coded from zero up; ties to the even integer."""
    half = 1 << (bits - 1)
    return _level_set(f"integers{bits}", [code - half for code in range(2 * half)])


@lru_cache(maxsize=16)
def bipolar(bits: int) -> LevelSet:
    """Every bit means -1 or +1: the odd numbers of magnitude below 2^b. Ties to the larger, as floor(w / 2) does."""
    top = (1 << bits) - 1
    found = _level_set(f"bipolar{bits}", [2 * code - top for code in range(1 << bits)])
    levels = found.levels
    thresholds = (levels[:-1] + levels[1:]) / np.float32(2)
    return LevelSet(name=found.name, bits=bits, values=found.values, codes=found.codes, thresholds=thresholds)


@lru_cache(maxsize=1)
def ternary() -> LevelSet:
    """-1, 0 and 1 in two bits; the fourth code means nothing."""
    return _level_set("ternary", [-1.0, 0.0, 1.0, math.nan])


@lru_cache(maxsize=1)
def residual_binary() -> LevelSet:
    """The codes of two signs, in units of the first scale: the second sign is that of what the first leaves, so codes
    part at -1, 0 and 1 whatever the second scale is; the levels stand for one of half the first."""
    return LevelSet(
        name="binary2",
        bits=2,
        values=np.asarray([-1.5, 0.5, -0.5, 1.5], np.float32),
        codes=np.asarray([0, 2, 1, 3], np.uint8),
        thresholds=np.asarray([-1, 0, 1], np.float32),
    )
