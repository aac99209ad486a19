"""Weights for products of integers alone: 8 bits with a scale per row, or 4 bits that become 8 by a second scale.

    static8        value = channel * (code - 128)                                channel = largest |row| / 127
    static4-g128   value = channel * integer(code, group)                        channel = largest |row| / 127
                   integer = ((code - 8) * 16 * f + 2^14) >> 15, f = round(2048 * group)

The scale of a group (float16, at most 15.9 in size, signed so that the extreme takes the code of full magnitude) is a
share of its row's, so that all columns of a row are integers on one grid and a product with 8-bit inputs is one sum of
integers: what W4A8 needs (two-level scales of QQQ, Zhang 2024, arXiv 2406.09904, section 3.2; Quamba2, Chiang 2025,
arXiv 2503.22879). The integer arithmetic is exact, so that what is decoded here is what the kernel multiplies with.

Units and shapes: [rows, cols] -> codes in tiles (`bitpack`), channels [rows] float32, groups [tiles, groups, 16].
Cost: 8 or 4 + 16 / group bits per weight, and 32 per row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32
from memwall.formats.bitpack import LANE_BYTES, TILE_ROWS, UNIT_COLUMNS, matrix_shape, pack_tiles, unpack_tiles

GROUPS = (32, 64, 128)
MOST_COLUMNS = 1 << 16
"""Of a matrix: a sum of so many products of a code (255 at most) and an input (127) still is an integer of 32 bits."""
_SPEC = re.compile(r"static(?:8|4(?:-g(?P<group>[0-9]+))?)")
_FIXED = 2048  # of a group's scale: eleven bits behind the point
_LARGEST = 127.0
_HALF = 8  # the code of zero, of 4 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCodec(Codec):
    """See the module's text."""

    examples: ClassVar[tuple[str, ...]] = ("static8", "static4-g128", "static4-g32")
    method: ClassVar[str | None] = "quamba2"
    """Its products need inputs on a scale that calibration has found."""
    rows_apart: ClassVar[bool] = False
    """No kernel decodes single rows: products take integers alone."""

    bits: int
    group: int = UNIT_COLUMNS

    @classmethod
    def parse(cls, spec: str) -> StaticCodec:
        """`static8`, `static4` (groups of 128) or `static4-g64`."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(f"unknown static format {spec!r}; known are static8, static4-g128")
        if spec == "static8":
            return cls(bits=8)
        group = int(match["group"] or 128)
        if group not in GROUPS:
            raise InputError(f"{spec}: the group is one of 32, 64, 128")
        return cls(bits=4, group=group)

    @property
    def spec(self) -> str:
        return "static8" if self.bits == 8 else f"static4-g{self.group}"

    @property
    def timed(self) -> str:
        return f"int{self.bits}-g64"

    @property
    def zero_code(self) -> int:
        """Code of padding and of rows that are all zero."""
        return 128 if self.bits == 8 else _HALF

    # -- arithmetic, shared with the compensated sweep ----------------------------------------------------------------

    def fit_rows(self, weight: np.ndarray) -> np.ndarray:
        """weight [rows, cols] -> channels [rows] float32."""
        peak = np.abs(weight).max(axis=1, initial=0).astype(np.float32)
        if not np.isfinite(peak).all():
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        return np.asarray(peak / np.float32(_LARGEST), np.float32)

    def fit_groups(self, values: np.ndarray, channels: np.ndarray) -> np.ndarray:
        """values [rows, at most group], channels [rows] -> scales [rows] float16 as shares of the channels'."""
        high, low = values.max(axis=1), values.min(axis=1)
        extreme = np.where(high > -low, high, low)
        share = extreme / (-_HALF * np.where(channels > 0, channels, 1))
        limit = _LARGEST / _HALF
        return (np.clip(share, -limit, limit) * (channels > 0)).astype(np.float16)

    def quantize(self, values: np.ndarray, channels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
        """values [rows, n] of one group -> uint8 codes."""
        step = channels if groups is None else channels * (_fixed(groups) / np.float32(_FIXED))
        divisor = np.where(step == 0, np.float32(1), step)[:, None]
        limit = _LARGEST if groups is None else float(_HALF - 1)
        lowest = -limit if groups is None else -float(_HALF)
        codes = np.clip(np.rint(values / divisor), lowest, limit) * (step != 0)[:, None]
        return (codes + self.zero_code).astype(np.uint8)

    def integers(self, codes: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
        """uint8 codes [rows, n] of one group -> int8, what products multiply with."""
        if groups is None:
            return (codes.astype(np.int16) - 128).astype(np.int8)
        spread = (codes.astype(np.int32) - _HALF) * 16 * _fixed(groups)[:, None].astype(np.int32)
        return ((spread + (1 << 14)) >> 15).astype(np.int8)

    def _checked(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, cols = matrix_shape(self.spec, shape)
        if cols > MOST_COLUMNS:
            raise InputError(
                f"{self.spec}: rows have {cols:,} columns; sums of 32 bits hold {MOST_COLUMNS:,}: use int{self.bits}"
            )
        return rows, cols

    # -- whole matrices -----------------------------------------------------------------------------------------------

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        rows, cols = self._checked(shape)
        tiles, groups = -(-rows // TILE_ROWS), -(-cols // self.group)
        codes = (tiles, groups, self.group // UNIT_COLUMNS, self.bits * LANE_BYTES)
        found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "codes": (codes, np.dtype(np.uint8)),
            "channels": ((rows,), np.dtype(np.float32)),
        }
        if self.bits == 4:
            found["groups"] = ((tiles, groups, TILE_ROWS), np.dtype(np.float16))
        return found

    def encode(self, x: Any) -> Packed:
        values = real_float32(self.spec, x)
        rows, cols = self._checked(values.shape)
        channels = self.fit_rows(values)
        codes = np.full((rows, cols), self.zero_code, np.uint8)
        groups = np.zeros((-(-cols // self.group), rows), np.float16) if self.bits == 4 else None
        for index, start in enumerate(range(0, cols, self.group)):
            part = slice(start, start + self.group)
            if groups is not None:
                groups[index] = self.fit_groups(values[:, part], channels)
            codes[:, part] = self.quantize(values[:, part], channels, None if groups is None else groups[index])
        return self.pack(codes, channels, groups)

    def pack(self, codes: np.ndarray, channels: np.ndarray, groups: np.ndarray | None) -> Packed:
        """uint8 codes [rows, cols], channels [rows], groups [groups, rows] float16 (4 bits only) -> Packed."""
        rows, cols = codes.shape
        tiles, num_groups = -(-rows // TILE_ROWS), -(-cols // self.group)
        padded = np.full((tiles * TILE_ROWS, num_groups * self.group), self.zero_code, np.uint8)
        padded[:rows, :cols] = codes
        buffers = {"codes": pack_tiles(padded, self.bits, self.group), "channels": channels.astype(np.float32)}
        if groups is not None:
            full = np.zeros((num_groups, tiles * TILE_ROWS), np.float16)
            full[:, :rows] = groups
            tiled = full.reshape(num_groups, tiles, TILE_ROWS).transpose(1, 0, 2)
            buffers["groups"] = np.ascontiguousarray(tiled)
        return Packed(spec=self.spec, shape=(rows, cols), buffers=buffers)

    def decode(self, packed: Packed) -> np.ndarray:
        rows, cols = matrix_shape(self.spec, packed.shape)
        codes = unpack_tiles(packed.buffers["codes"], self.bits, self.group)[:rows, :cols]
        channels = packed.buffers["channels"]
        groups = packed.buffers.get("groups")
        flat = None
        if groups is not None:
            flat = groups.transpose(1, 0, 2).reshape(groups.shape[1], len(groups) * TILE_ROWS)[:, :rows]
        values = np.empty((rows, cols), np.float32)
        for index, start in enumerate(range(0, cols, self.group)):
            part = slice(start, start + self.group)
            values[:, part] = self.integers(codes[:, part], None if flat is None else flat[index])
        values *= channels[:, None]
        return values


def _fixed(groups: np.ndarray) -> np.ndarray:
    """float16 scales as multiples of 1 / 2048, whole numbers in float32."""
    return np.rint(groups.astype(np.float32) * np.float32(_FIXED))
