"""Group-wise integers of 2 to 8 bits with half-precision scales.

A group of `group` neighbours along the last axis shares one scale (and, asymmetric, one minimum):

    symmetric    value = scale * (code - 2^(bits-1))    scale = (value of largest magnitude) / -2^(bits-1)
    asymmetric   value = scale * code + min             scale = (max - min) / (2^bits - 1)

The symmetric scale carries the sign of the extreme value, so that the extreme itself takes the code of full magnitude
and no code is wasted. Codes are found with the scale and minimum *after* their rounding to float16: what is decoded
is what was measured.

Every step is one float32 operation in a fixed order, so that the native encoder gives the same bytes: the extreme is
the maximum where max > -min, else the minimum; the scale is one division, rounded to float16 (never -0.0); a code is
round-half-even of value / scale + 2^(bits-1), or of (value - min) / scale, clipped. A scale of zero gives the code of
zero.

Two layouts: `tiles` (weights [rows, cols], what the kernels read; rows padded to 16, columns to the group) and `rows`
(any shape, a dense bit stream along the last axis; NumPy or torch through the array API). `bitpack` has both in
detail.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, array_namespace, real_float32, real_numbers
from memwall.formats.bitpack import (
    LANE_BYTES,
    TILE_ROWS,
    UNIT_COLUMNS,
    contiguous,
    matrix_shape,
    pack_rows,
    pack_tiles,
    row_bytes,
    unpack_rows,
    unpack_tiles,
)

DEFAULT_GROUP = 64
TILE_GROUPS = (32, 64, 128)
# tiles are coded a slab of rows at a time, so that the float32 working copy stays in the cache and off the budget
_SLAB_VALUES = 1 << 18

_SPEC = re.compile(r"int(?P<bits>[0-9]+)(?:-g(?P<group>[0-9]+)(?P<asym>-asym)?)?(?P<rows>-rows)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerCodec(Codec):
    """Group-wise integer codec; see the module's text for the arithmetic."""

    examples: ClassVar[tuple[str, ...]] = (
        *(f"int{bits}" for bits in range(2, 9)),
        "int4-g32-asym",
        "int3-g128",
        "int2-g32-asym-rows",
        "int5-g7-rows",
        "int8-g1-asym-rows",
    )

    bits: int
    group: int = DEFAULT_GROUP
    symmetric: bool = True
    layout: Literal["tiles", "rows"] = "tiles"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"int{self.bits}: bits must be 2 to 8")
        if self.layout == "tiles" and self.group not in TILE_GROUPS:
            raise InputError(f"{self.spec}: the group of a weight format is one of 32, 64, 128, got {self.group}")
        if self.group < 1:
            raise InputError(f"{self.spec}: the group must be positive, got {self.group}")

    @classmethod
    def parse(cls, spec: str) -> IntegerCodec:
        """`int4`, `int4-g64`, `int3-g32-asym`, each optionally with `-rows`."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(
                f"unknown integer format {spec!r}; known are int4, int4-g64, int3-g32-asym, int2-g32-rows..."
            )
        bits = int(match["bits"])
        # below four bits a shared zero point is worth more than its half byte per group
        symmetric = match["asym"] is None if match["group"] else bits >= 4
        group = int(match["group"] or DEFAULT_GROUP)
        return cls(bits=bits, group=group, symmetric=symmetric, layout="rows" if match["rows"] else "tiles")

    @property
    def spec(self) -> str:
        asym = "" if self.symmetric else "-asym"
        return f"int{self.bits}-g{self.group}{asym}{'-rows' if self.layout == 'rows' else ''}"

    @property
    def zero_code(self) -> int:
        """Code of padding and of groups whose scale is zero."""
        return 1 << (self.bits - 1) if self.symmetric else 0

    # -- arithmetic of one group, shared with the compensated sweep -------------------------------------------------

    def fit(self, values: Any) -> tuple[Any, Any | None]:
        """float32 groups [..., group] -> float16 scales [...] and minima [...] (None when symmetric)."""
        xp = array_namespace(values)
        high, low = xp.max(values, axis=-1), xp.min(values, axis=-1)
        if not bool(xp.all(xp.isfinite(high)) & xp.all(xp.isfinite(low))):
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        with np.errstate(over="ignore"):
            if self.symmetric:
                scales = xp.where(high > -low, high, low) / -float(1 << (self.bits - 1))
                mins = None
            else:
                scales = (high - low) / float((1 << self.bits) - 1)
                mins = self._half(xp, low, "minimum")
            return self._half(xp, scales, "scale"), mins

    def _half(self, xp: Any, values: Any, what: str) -> Any:
        half = xp.astype(values, xp.float16) + 0.0  # -0.0 becomes 0.0: one encoding per value
        if not bool(xp.all(xp.isfinite(half))):
            largest = float(xp.max(xp.abs(values)))
            raise InputError(
                f"{self.spec}: a group's {what} of {largest:g} overflows float16 (65504); use float32 or bfloat16"
            )
        return half

    def quantize(self, values: Any, scales: Any, mins: Any | None = None) -> Any:
        """float32 groups [..., group], float16 scales and minima [...] -> uint8 codes [..., group]."""
        xp = array_namespace(values)
        scale = xp.astype(scales, xp.float32)[..., None]
        zero = scale == 0
        divisor = xp.where(zero, xp.ones_like(scale), scale)
        if mins is None:
            codes = xp.round(values / divisor) + float(self.zero_code)
        else:
            codes = xp.round((values - xp.astype(mins, xp.float32)[..., None]) / divisor)
        codes = xp.clip(codes, 0.0, float((1 << self.bits) - 1))
        codes = xp.where(zero, xp.full_like(codes, float(self.zero_code)), codes)
        return xp.astype(codes, xp.uint8)

    def dequantize(self, codes: Any, scales: Any, mins: Any | None = None) -> Any:
        """uint8 codes [..., group], float16 scales and minima [...] -> float32 values [..., group]."""
        xp = array_namespace(codes)
        values = xp.astype(codes, xp.float32)
        scale = xp.astype(scales, xp.float32)[..., None]
        if mins is None:
            return scale * (values - float(self.zero_code))
        return scale * values + xp.astype(mins, xp.float32)[..., None]

    # -- sizes ------------------------------------------------------------------------------------------------------

    def num_groups(self, num_columns: int) -> int:
        """Groups along the last axis."""
        return -(-num_columns // self.group)

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        codes: tuple[int, ...]
        statistics: tuple[int, ...]
        if self.layout == "tiles":
            rows, columns = matrix_shape(self.spec, shape)
            tiles, groups = -(-rows // TILE_ROWS), self.num_groups(columns)
            codes = (tiles, groups, self.group // UNIT_COLUMNS, self.bits * LANE_BYTES)
            statistics = (tiles, groups, TILE_ROWS)
        else:
            leading, columns = shape[:-1], shape[-1] if shape else 1
            codes = (*leading, row_bytes(columns, self.bits))
            statistics = (*leading, self.num_groups(columns))
        half: np.dtype[Any] = np.dtype(np.float16)
        found = {"codes": (codes, np.dtype(np.uint8)), "scales": (statistics, half)}
        return found if self.symmetric else {**found, "mins": (statistics, half)}

    # -- whole arrays -----------------------------------------------------------------------------------------------

    def encode(self, x: Any) -> Packed:
        x = real_numbers(self.spec, x)
        return self._encode_tiles(x) if self.layout == "tiles" else self._encode_rows(x)

    def decode(self, packed: Packed) -> Any:
        if self.layout == "tiles":
            return self._decode_tiles(packed)
        codes, scales, mins = self.unpack(packed)
        xp = array_namespace(codes)
        shape = packed.shape or (1,)
        values = self.dequantize(self._grouped(xp, codes), scales, mins)
        return xp.reshape(self._ungrouped(xp, values, shape[-1]), packed.shape)

    def pack(self, codes: Any, scales: Any, mins: Any | None = None) -> Packed:
        """Codes of the logical shape and their statistics [..., groups] -> Packed; the sweep's way in."""
        shape = tuple(codes.shape)
        if (mins is None) != self.symmetric:
            raise InputError(f"{self.spec}: minima {'are missing' if mins is None else 'have no place'}")
        statistics = {"scales": scales} if mins is None else {"scales": scales, "mins": mins}
        if self.layout == "rows":
            return Packed(
                spec=self.spec, shape=shape, buffers={"codes": contiguous(pack_rows(codes, self.bits)), **statistics}
            )
        buffers = self._empty(shape)
        self._fill(buffers, 0, codes, statistics)
        return Packed(spec=self.spec, shape=shape, buffers=buffers)

    def unpack(self, packed: Packed) -> tuple[Any, Any, Any | None]:
        """Codes of the logical shape (uint8), scales and minima [..., groups] (float16; minima None when symmetric)."""
        buffers = packed.buffers
        if self.layout == "rows":
            columns = packed.shape[-1] if packed.shape else 1
            return unpack_rows(buffers["codes"], columns, self.bits), buffers["scales"], buffers.get("mins")
        return self._unpack_tiles(buffers, packed.shape)

    # -- row layout -------------------------------------------------------------------------------------------------

    def _encode_rows(self, x: Any) -> Packed:
        xp = array_namespace(x)
        shape = tuple(x.shape)
        values = xp.astype(x, xp.float32) if shape else xp.reshape(xp.astype(x, xp.float32), (1,))
        columns = values.shape[-1]
        if math.prod(shape) == 0:
            return Packed(spec=self.spec, shape=shape, buffers=self._empty(shape))
        groups = self._grouped(xp, values)
        scales, mins = self.fit(groups)
        codes = self._ungrouped(xp, self.quantize(groups, scales, mins), columns)
        buffers = {"codes": contiguous(pack_rows(codes, self.bits)), "scales": scales}
        if mins is not None:
            buffers["mins"] = mins
        return Packed(spec=self.spec, shape=shape, buffers=buffers)

    def _grouped(self, xp: Any, values: Any) -> Any:
        """[..., n] -> [..., groups, group]; a short last group repeats its last value, which moves no extreme."""
        columns = values.shape[-1]
        groups = self.num_groups(columns)
        if groups * self.group != columns:
            fill = xp.broadcast_to(values[..., -1:], (*values.shape[:-1], groups * self.group - columns))
            values = xp.concat([values, fill], axis=-1)
        return xp.reshape(values, (*values.shape[:-1], groups, self.group))

    def _ungrouped(self, xp: Any, values: Any, columns: int) -> Any:
        return xp.reshape(values, (*values.shape[:-2], values.shape[-2] * self.group))[..., :columns]

    # -- tile layout ------------------------------------------------------------------------------------------------

    def _empty(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {name: np.empty(s, d) for name, (s, d) in self.buffers(shape).items()}

    def _slabs(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        rows, columns = matrix_shape(self.spec, shape)
        step = max(_SLAB_VALUES // max(columns, 1) // TILE_ROWS, 1) * TILE_ROWS
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _encode_tiles(self, x: Any) -> Packed:
        shape = tuple(x.shape)
        buffers = self._empty(shape)
        for start, stop in self._slabs(shape):
            if shape[1] == 0:
                continue
            groups = self._grouped(np, real_float32(self.spec, x[start:stop]))
            scales, mins = self.fit(groups)
            codes = self._ungrouped(np, self.quantize(groups, scales, mins), shape[1])
            self._fill(buffers, start, codes, {"scales": scales} if mins is None else {"scales": scales, "mins": mins})
        return Packed(spec=self.spec, shape=shape, buffers=buffers)

    def _fill(
        self, buffers: dict[str, np.ndarray], first_row: int, codes: np.ndarray, statistics: Mapping[str, Any]
    ) -> None:
        """Write rows from `first_row` (a multiple of 16) on into the tile buffers, padded as the kernels expect."""
        rows, columns = codes.shape
        tiles, groups = -(-rows // TILE_ROWS), self.num_groups(columns)
        first = first_row // TILE_ROWS
        padded = np.full((tiles * TILE_ROWS, groups * self.group), self.zero_code, np.uint8)
        padded[:rows, :columns] = codes
        buffers["codes"][first : first + tiles] = pack_tiles(padded, self.bits, self.group)
        for name, values in statistics.items():
            full = np.zeros((tiles * TILE_ROWS, groups), np.float16)
            full[:rows] = values
            buffers[name][first : first + tiles] = full.reshape(tiles, TILE_ROWS, groups).transpose(0, 2, 1)

    def _unpack_tiles(
        self, buffers: Mapping[str, np.ndarray], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        rows, columns = matrix_shape(self.spec, shape)
        codes = unpack_tiles(buffers["codes"], self.bits, self.group)[:rows, :columns]
        scales, mins = (
            None if found is None else found.transpose(0, 2, 1).reshape(-1, found.shape[1])[:rows]
            for found in (buffers["scales"], buffers.get("mins"))
        )
        assert scales is not None
        return codes, scales, mins

    def _decode_tiles(self, packed: Packed) -> np.ndarray:
        rows, columns = matrix_shape(self.spec, packed.shape)
        values = np.zeros((rows, columns), np.float32)
        for start, stop in self._slabs(packed.shape):
            if columns == 0:
                continue
            tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
            slab = {name: buffer[tiles] for name, buffer in packed.buffers.items()}
            codes, scales, mins = self._unpack_tiles(slab, (stop - start, columns))
            decoded = self.dequantize(self._grouped(np, codes), scales, mins)
            values[start:stop] = self._ungrouped(np, decoded, columns)
        return values
