"""What codes of level formats mean, in the two forms products read: floats, and integers of one or two bytes.

Exact products decode codes to the format's own float32 levels. Products with 8-bit activations are sums of integers, so
there a level is an integer number of units: exactly, where some unit makes integers of at most 16 bits of all levels
(fp4 of the Open Compute Project, e2m3, e3m2, posit4es1, posit8es0, bipolar, ternary...), else the nearest of 65,535
steps between the largest levels of either sign (nf4, e4m3, e5m2...): an error of 2^-16 of the largest level, beside
activations that are rounded to 2^-8 of theirs. Codes that mean no number count as nothing there, and levels
that are never written may count as the largest that is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from memwall import _native
from memwall.formats.leveled import LevelCodec, ResidualBinaryCodec
from memwall.formats.levels import dynamic8

_LARGEST = 32767
_MOST_COMMON = 1024
_HALF_EXPONENT_BITS = 5
# the ranges that products of one byte are made for: see LevelDotOf in cpp/tiles.h
_ONE_BYTE_NARROW, _ONE_BYTE = 32, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerLevels:
    """counts: how many units a code is worth, by code; bytes: 0 where the code itself less an offset is the count."""

    counts: np.ndarray
    unit: float
    bytes: int


@lru_cache(maxsize=128)
def integer_levels(form: LevelCodec) -> IntegerLevels:
    """The levels of a format as integers."""
    values = form.levels.values.astype(np.float64)
    used = form.levels.levels.astype(np.float64)
    finite = values[np.isfinite(values)]
    unit = _exact_unit(finite) or _exact_unit(used) or _common_unit(used) or float(np.abs(used).max()) / _LARGEST
    counts = np.clip(np.rint(np.nan_to_num(values, nan=0.0) / unit), -_LARGEST, _LARGEST).astype(np.int32)
    codes = np.arange(len(values))
    if (np.diff(counts[form.levels.codes] - codes[form.levels.codes]) == 0).all():
        return IntegerLevels(counts=counts, unit=unit, bytes=0)
    span = int(counts.max() - counts.min())
    narrow = _ONE_BYTE_NARROW if form.bits <= 4 else _ONE_BYTE
    return IntegerLevels(counts=counts, unit=unit, bytes=1 if span <= narrow else 2)


def _exact_unit(values: np.ndarray) -> float | None:
    """The power of two of which all values are multiples, at most 32,767 times; None if there is none."""
    nonzero = np.abs(values[values != 0])
    mantissas, exponents = np.frexp(nonzero)
    trailing = []
    for mantissa, exponent in zip((mantissas * 2.0**30).astype(np.int64), exponents, strict=True):
        trailing.append(int(exponent) - 30 + (int(mantissa & -mantissa).bit_length() - 1))
    unit = math.ldexp(1.0, min(trailing))
    return unit if nonzero.max() <= _LARGEST * unit else None


def _common_unit(values: np.ndarray) -> float | None:
    """A unit of which all values are multiples but for their rounding to float32, as the 192nds of fp4."""
    largest = float(np.abs(values).max())
    for count in range(1, _MOST_COMMON):
        multiples = values * (count / largest)
        if np.abs(multiples - np.rint(multiples)).max() < 1e-5:
            return largest / count
    return None


def _linear_blocks(counts: np.ndarray, form: LevelCodec) -> tuple[np.ndarray, np.ndarray] | None:
    """(base, step) of each block of 16 codes whose used levels are base + step * (code % 16); None if some are not."""
    bases, steps = np.zeros(16, np.int16), np.zeros(16, np.int8)
    for block in range(16):
        used = np.sort(form.levels.codes[form.levels.codes >> 4 == block]).astype(int)
        if not len(used):
            continue
        step = int(counts[used[1]] - counts[used[0]]) if len(used) > 1 else 0
        base = int(counts[used[0]]) - step * (int(used[0]) & 15)
        if abs(step) > 127 or abs(base) > _LARGEST or (counts[used] != base + step * (used & 15)).any():
            return None
        bases[block], steps[block] = base, step
    return bases, steps


def _magnitudes(counts: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, str, float, bool] | None:
    """(low, high, kind, units of the upper half, whether codes are two's complement) of levels whose highest bit is a
    sign; None where there is no such.

    `Magnitudes` in cpp/linear.h says what the kinds are and how large bytes may be: as large as what 16 bits hold the
    sum of, of as many products with activations as are added before they are widened.
    """
    if not 5 <= bits <= 7:
        return None
    positive, negative = np.split(counts, 2)
    # the first negative code means no number there, and counts as nothing
    twos = not negative[0] and bool((negative[1:] == -positive[:0:-1]).all())
    if not twos and (negative != -positive).any():
        return None
    most = int(positive.max())
    if positive.min() < 0 or most >= 33 * 128:
        return None
    none = np.zeros(len(positive), np.uint8)
    if most <= 63:
        return positive.astype(np.uint8), none, "bytes", 1.0, twos
    lower, upper = np.split(positive, 2)
    units = max(1, int(np.gcd.reduce(upper)))
    if (
        bits > 5
        and not twos
        and lower.max() <= (31 if bits == 6 else 63)
        and upper.max() <= units * (63 if bits == 6 else 127)
    ):
        return lower.astype(np.uint8), (upper // units).astype(np.uint8), "ranges", float(units), False
    base, kind = (32, "digits") if most < 33 * 32 else (128, "far digits")
    return (positive % base).astype(np.uint8), (positive // base).astype(np.uint8), kind, 1.0, twos


def _digits(found: IntegerLevels, form: LevelCodec) -> tuple[np.ndarray, np.ndarray, str, int, int] | None:
    """(low, high, kind, step, offset) of levels that are cheaper than a look-up of their bytes, as `Digits` in
    cpp/linear.h says; None where they are not.
    """
    used = form.levels.codes.astype(int)
    counts = found.counts.clip(found.counts[used].min(), found.counts[used].max())
    least = int(counts.min())
    none = np.zeros(16, np.uint8)
    steps = np.diff(counts[used]) / np.maximum(np.diff(used), 1)
    if form.bits < 8 and (steps == steps[0]).all() and 0 < steps[0] <= 127 and (np.diff(used) > 0).all():
        step = int(steps[0])
        return none, none, "affine", step, step * int(used[0]) - int(counts[used[0]])
    shifted = counts - least
    if form.bits != 4 or shifted.max() >= 32 * 32 or (found.bytes == 1 and shifted.max() <= _ONE_BYTE_NARROW):
        return None
    if shifted.max() <= _ONE_BYTE:
        return shifted.astype(np.uint8), none, "one", 1, -least
    return (shifted % 32).astype(np.uint8), (shifted // 32).astype(np.uint8), "two", 1, -least


@lru_cache(maxsize=128)
def native_levels(form: LevelCodec) -> _native.Levels:
    """The tables of a format as the compiled code wants them; made once per format."""
    _native.set_dynamic_levels(dynamic8().values)
    if isinstance(form, ResidualBinaryCodec):
        low, high, offset = form.pair_counts()
        return _native.Levels(
            values=low.astype(np.float32) - offset,
            second=high.astype(np.float32) - offset,
            low=low,
            high=high,
            unit=1.0,
            low_offset=offset,
            high_offset=offset,
            bytes=2,
            pairs=True,
        )
    found, values = integer_levels(form), form.levels.values
    counts, code = found.counts, int(form.levels.codes[0])
    offset = {0: code - int(counts[code]), 1: -int(counts.min()), 2: _LARGEST + 1}[found.bytes]
    shifted = counts + offset
    levels = _native.Levels(
        values=values,
        second=np.zeros(len(values), np.float32),
        low=(shifted & 255).astype(np.uint8),
        high=(shifted >> 8 & 255).astype(np.uint8),
        unit=found.unit,
        low_offset=0 if found.bytes == 2 else offset,
        high_offset=offset >> 8 if found.bytes == 2 else 0,
        bytes=found.bytes,
        pairs=False,
    )
    blocks = _linear_blocks(counts, form) if found.bytes == 2 and form.bits > 4 else None
    if blocks is not None:
        levels.set_linear(*blocks)
    # codes of levels that are never written would take room that those in use need: they count as the largest of these
    used = counts[form.levels.codes]
    magnitudes = _magnitudes(counts.clip(used.min(), used.max()), form.bits) if found.bytes else None
    if magnitudes is not None:
        levels.set_signed(*magnitudes)
    digits = _digits(found, form) if found.bytes and magnitudes is None else None
    if digits is not None:
        levels.set_digits(*digits)
    match = re.search(r"e(\d)m(\d)$", form.name)
    if match and int(match[1]) <= _HALF_EXPONENT_BITS:
        # sign, exponent and mantissa of a code stand in a float16 as they are, but that its exponent is wider
        shift = _HALF_EXPONENT_BITS - int(match[1])
        mask = 0x8000 | ((1 << (form.bits - 1)) - 1) << (16 - form.bits - shift)
        one = int(np.flatnonzero(values == values[form.levels.codes].max())[0])  # any code but zero tells the ratio
        half = np.uint16(one << (16 - form.bits) >> shift).view(np.float16)
        levels.set_half(shift, mask, float(values[one]) / float(half))
    return levels
