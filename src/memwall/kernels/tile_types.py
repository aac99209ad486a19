"""Number types of tiles: integers of 1 to 8 bits, floats of 2 to 8, and the wide types they are computed in.

Integers are two's complement (`i4`) or without sign (`u4`). Floats `f6e3m2` have a sign, bias 2^(e-1) - 1 and
subnormals; all codes are numbers, but that 5-bit exponents keep infinity and NaN, and `f8e4m3` its one NaN. Values
agree with `formats.levels.minifloat` wherever both know the type (that one has no 5-bit exponents outside e5m2).

Storage is bit-contiguous, little endian: element j of a slice occupies bits [j b, (j + 1) b) of its bytes.

Source: Tilus (2025, arXiv 2504.12984), type system.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import ml_dtypes
import numpy as np

from memwall.errors import InputError
from memwall.formats.bitpack import pack_rows, unpack_rows
from memwall.formats.levels import minifloat

Kind = Literal["int", "uint", "float"]

_WIDE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
PUBLISHED = (
    *(f"u{bits}" for bits in range(1, 9)),
    *(f"i{bits}" for bits in range(1, 9)),
    *("f3e1m1", "f4e2m1", "f4e1m2", "f5e3m1", "f5e2m2", "f5e1m3", "f6e4m1", "f6e3m2", "f6e2m3"),
    *("f7e5m1", "f7e4m2", "f7e3m3", "f7e2m4", "f8e4m3", "f8e5m2"),
)
"""The weight types of the paper's list."""


@dataclass(frozen=True, slots=True)
class TileType:
    """One number type; exponent_bits and mantissa_bits of floats only."""

    name: str
    kind: Kind
    bits: int
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def narrow(self) -> bool:
        """Whether codes of it are packed bit by bit."""
        return self.name not in _WIDE

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of one code; of the values themselves for wide types."""
        return _WIDE.get(self.name, np.dtype(np.uint8))

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def values(self) -> np.ndarray:
        """float32 value of each of the 2^bits codes; narrow types only."""
        return _values(self)

    @property
    def largest(self) -> float:
        """Largest value: scales bring the largest weight of a group to it."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite.max()) if finite.max() > 0 else 1.0

    def encode(self, x: np.ndarray) -> np.ndarray:
        """float -> uint8 codes of the nearest value, ties to the even code; what is beyond saturates."""
        codes, levels = _sorted_levels(self)
        x = np.asarray(x, np.float32)
        if not np.isfinite(x).all():
            raise InputError(f"{self.name} cannot hold NaN or infinite values")
        above = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1) if len(levels) > 1 else np.zeros(x.shape, int)
        below = np.maximum(above - 1, 0)
        wide = x.astype(np.float64)
        up, down = levels[above] - wide, wide - levels[below]
        take = (up < down) | ((up == down) & (codes[above] % 2 == 0))
        found: np.ndarray = np.where(take, codes[above], codes[below])
        return found

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> float32."""
        found: np.ndarray = self.values[codes]
        return found


@lru_cache(maxsize=256)
def tile_type(name: str) -> TileType:
    """The type of that name; InputError that names what would work."""
    if name in _WIDE:
        return TileType(name, "float", 8 * _WIDE[name].itemsize)
    if match := re.fullmatch(r"([ui])([1-8])", name):
        return TileType(name, "uint" if match[1] == "u" else "int", int(match[2]))
    if match := re.fullmatch(r"f([2-8])e([1-5])m([0-6])", name):
        bits, exponent, mantissa = (int(part) for part in match.groups())
        if bits == 1 + exponent + mantissa:
            return TileType(name, "float", bits, exponent, mantissa)
    raise InputError(
        f"unknown tile type {name!r}: u1 to u8, i1 to i8, fNeXmY of N = 1 + X + Y up to 8 bits with X up to 5 such as "
        f"f6e3m2, and {', '.join(_WIDE)}"
    )


@lru_cache(maxsize=256)
def _values(type_: TileType) -> np.ndarray:
    if not type_.narrow:
        raise InputError(f"{type_.name} has no table of values")
    codes = np.arange(1 << type_.bits)
    if type_.kind == "uint":
        return codes.astype(np.float32)
    if type_.kind == "int":
        return np.where(codes >> (type_.bits - 1), codes - (1 << type_.bits), codes).astype(np.float32)
    if type_.exponent_bits != 5:
        return minifloat(type_.exponent_bits, type_.mantissa_bits).values
    steps = 1 << type_.mantissa_bits
    found = []
    for code in range(1 << (type_.bits - 1)):
        exponent, mantissa = divmod(code, steps)
        value = math.ldexp(mantissa / steps + (exponent > 0), max(exponent, 1) - type_.bias)
        found.append(value if exponent < 31 else math.nan if mantissa else math.inf)
    return np.asarray([*found, *(-value for value in found)], np.float32)


@lru_cache(maxsize=256)
def _sorted_levels(type_: TileType) -> tuple[np.ndarray, np.ndarray]:
    """(codes, float64 values) in ascending order, one code for each value, the smaller where two mean zero."""
    values = type_.values.astype(np.float64)
    codes = [code for code in range(len(values)) if math.isfinite(values[code])]
    kept: dict[float, int] = {}
    for code in codes:
        kept.setdefault(values[code] + 0.0, code)
    levels = sorted(kept)
    return np.asarray([kept[level] for level in levels], np.uint8), np.asarray(levels)


# -- storage ---------------------------------------------------------------------------------------------------------


def slice_bytes(type_: TileType, num_slots: int) -> int:
    """Bytes of one thread's slots; InputError where they are no whole number."""
    if type_.bits * num_slots % 8:
        raise InputError(f"{num_slots} slots of {type_.name} are {type_.bits * num_slots} bits, no whole bytes")
    return type_.bits * num_slots // 8


def pack(type_: TileType, values: np.ndarray) -> np.ndarray:
    """Codes (narrow) or values (wide) [..., slots] -> uint8 [..., bytes]; the last byte is filled with zero bits."""
    if type_.narrow:
        packed: np.ndarray = np.ascontiguousarray(pack_rows(np.ascontiguousarray(values, np.uint8), type_.bits))
        return packed
    return np.ascontiguousarray(values, type_.dtype).view(np.uint8).reshape(*values.shape[:-1], -1)


def unpack(type_: TileType, data: np.ndarray, num_slots: int) -> np.ndarray:
    """The inverse of `pack`."""
    if type_.narrow:
        codes: np.ndarray = unpack_rows(data, num_slots, type_.bits)
        return codes
    return np.ascontiguousarray(data).view(type_.dtype).reshape(*data.shape[:-1], num_slots)


def to_numbers(type_: TileType, held: np.ndarray) -> np.ndarray:
    """What `unpack` gave -> numbers to compute with (narrow types: float32)."""
    return type_.decode(held) if type_.narrow else held


def from_numbers(type_: TileType, numbers: np.ndarray) -> np.ndarray:
    """Numbers -> what `pack` takes: rounded to nearest even; narrow types saturate."""
    if type_.narrow:
        return type_.encode(numbers)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(numbers).astype(type_.dtype)
