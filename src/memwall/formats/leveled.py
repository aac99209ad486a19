"""Formats made of a level set, a rule for scales, a block shape and a bit packing: one codec for all of them.

    value = scale of the group * level of the code

A spec is a name of `format_names`, then what differs from the name's defaults: `-g32` (numbers per scale), `-f16`,
`-f32`, `-e8m0`, `-dq` (how scales are stored, see `scales`) or `-raw` (no scales: the levels as published, what is
larger saturates), and `-rows` or `-flat` for another layout than tiles:

- tiles: matrices in the order products read them, groups of 32, 64 or 128 along the columns;
- rows: any shape, groups of any size along the last axis, the codes of a row as one stream of bits;
- flat: the array as one row of blocks, two codes per byte, the first in the high half: what bitsandbytes keeps.

Encoding rounds x * (1 / scale), one float32 product, to a level by the set's thresholds; the scale is the stored one,
but for twice quantized scales, where codes are made, as published, with the scale before. NaN and infinities are
refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32
from memwall.formats.bitpack import (
    LANE_BYTES,
    TILE_ROWS,
    UNIT_COLUMNS,
    matrix_shape,
    pack_rows,
    pack_tiles,
    row_bytes,
    unpack_rows,
    unpack_tiles,
)
from memwall.formats.format_names import Resolved, known_names, resolve_name
from memwall.formats.levels import LevelSet, residual_binary
from memwall.formats.scales import STORES, ScaleStore, inverse_scale, statistic_rows, statistic_tiles

TILE_GROUPS = (32, 64, 128)
# tiles are coded a slab of rows at a time, so that the float32 working copy stays in the cache and off the budget
_SLAB_VALUES = 1 << 16
_SPEC = re.compile(
    r"(?P<name>[a-z0-9]+?)(?:-g(?P<group>[0-9]{1,6}))?(?:-(?P<scale>f16|f32|e8m0|dq|raw))?(?:-(?P<layout>rows|flat))?"
)

Scales = tuple[np.ndarray, ...]
"""float32 [..., groups], one or (residual binary) two."""


@lru_cache(maxsize=64)
def _resolved(name: str, scale: str) -> Resolved:
    return resolve_name(name, scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelCodec(Codec):
    """Codec of one level format; see the module's text. group is 0 where there are no scales."""

    examples: ClassVar[tuple[str, ...]] = (
        *("nf4", "nf4-dq", "nf4-g128-f16", "nf4-flat", "fp4", "fp4-dq-flat", "nf4-g64-dq-rows"),
        *("e2m1", "e3m2-g32", "e2m3", "e4m3", "e5m2-g128", "e4m3-raw", "e2m1-g5-rows", "e1m0"),
        *("posit4", "posit6es2", "posit8", "posit8es0-raw", "posit16es1-raw", "posit11es1-g9-rows"),
        *("mxfp4", "mxfp6", "mxfp6e3m2", "mxfp8", "mxfp8e5m2-rows", "mxint8", "bfp4-g16-rows", "bfp8", "bfp3-g128"),
        *("bipolar1", "bipolar2", "bipolar3", "bipolar5-g32", "bipolar7", "bipolar8", "ternary"),
    )

    encodes_natively: ClassVar[bool] = True
    """Whether codes are given by the levels' thresholds alone, as compiled code wants it."""

    name: str
    group: int
    scale: str
    layout: Literal["tiles", "rows", "flat"]

    @classmethod
    def parse(cls, spec: str) -> LevelCodec:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(
                f"unknown number format {spec!r}; write a name and what differs, such as nf4, e2m1-g32, nf4-dq; "
                f"names are {known_names()}"
            )
        found = _resolved(match["name"], match["scale"] or "")
        named, scale = found.named, match["scale"] or found.named.scale
        raw = scale == "raw"
        if named.fixed and (match["group"] or match["scale"]):
            raise InputError(f"{spec}: {found.name} has scales in {named.scale} for groups of {named.group}, no others")
        if raw and (match["group"] or match["layout"] == "flat"):
            raise InputError(f"{spec}: -raw has no scales, so neither groups nor blocks")
        layout: Any = match["layout"] or ("rows" if raw else "tiles")
        return cls(name=found.name, group=0 if raw else int(match["group"] or named.group), scale=scale, layout=layout)

    def __post_init__(self) -> None:
        if self.layout == "tiles" and (self.group not in TILE_GROUPS or self.bits > 8):
            raise InputError(
                f"{self.spec}: a weight format has codes of up to 8 bits in groups of 32, 64 or 128; "
                f"{self.spec}-rows holds others"
            )
        if self.group < 1 and self.scale != "raw":
            raise InputError(f"{self.spec}: the group must be positive, got {self.group}")
        if self.layout == "flat" and self.bits != 4:
            raise InputError(f"{self.spec}: the flat layout has two codes of 4 bits per byte")

    @property
    def _resolved(self) -> Resolved:
        return _resolved(self.name, self.scale)

    @property
    def spec(self) -> str:
        named = self._resolved.named
        group = f"-g{self.group}" if self.group and not named.fixed else ""
        scale = "" if self.scale == named.scale else f"-{self.scale}"
        layout = "" if self.layout == ("rows" if self.scale == "raw" else "tiles") else f"-{self.layout}"
        return f"{self.name}{group}{scale}{layout}"

    @property
    def levels(self) -> LevelSet:
        """The levels that scales multiply."""
        return self._resolved.levels

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.levels.bits

    @property
    def zero_code(self) -> int:
        """Code of padding."""
        return self.levels.zero_code

    @property
    def store(self) -> ScaleStore:
        """How scales are kept."""
        return STORES[self.scale]

    # -- arithmetic of groups ---------------------------------------------------------------------------------------

    def fit(self, groups: np.ndarray) -> Scales:
        """float32 groups [..., group] -> their scales as codes are made with."""
        scales = self._resolved.rule(self.scale)(groups, self.levels)
        return (self.store.rounded(np.asarray(scales, np.float32), self.spec),)

    def quantize(self, groups: np.ndarray, scales: Scales) -> np.ndarray:
        """float32 groups [..., group] and scales [...] -> codes [..., group]."""
        codes: np.ndarray = self.levels.encode(groups * inverse_scale(scales[0])[..., None])
        return codes

    def dequantize(self, codes: np.ndarray, scales: Scales) -> np.ndarray:
        """Codes [..., group] and scales [...] -> float32 [..., group]."""
        values: np.ndarray = scales[0][..., None] * self.levels.decode(codes)
        return values

    def _row_scales(self, scales: Scales) -> dict[str, np.ndarray]:
        return self.store.to_rows(scales[0])

    def _scales_of_tiles(self, buffers: Mapping[str, np.ndarray], num_rows: int) -> Scales:
        return (self.store.from_tiles(buffers, num_rows),)

    def _scales_of_rows(self, buffers: Mapping[str, np.ndarray]) -> Scales:
        return (self.store.from_rows(buffers),)

    def _scale_buffers(self, leading: tuple[int, ...], groups: int) -> dict[str, Any]:
        """leading: the number of row tiles for tiles."""
        if self.scale == "raw":
            return {}
        if self.layout == "tiles":
            return self.store.tile_buffers(leading[0], groups)
        return self.store.row_buffers(leading, groups)

    # -- sizes ------------------------------------------------------------------------------------------------------

    def num_groups(self, num_columns: int) -> int:
        """Groups along the last axis."""
        return -(-num_columns // self.group) if self.group else 0

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        byte: np.dtype[Any] = np.dtype(np.uint8)
        if self.layout == "tiles":
            rows, columns = matrix_shape(self.spec, shape)
            tiles, groups = -(-rows // TILE_ROWS), self.num_groups(columns)
            codes = (tiles, groups, self.group // UNIT_COLUMNS, self.bits * LANE_BYTES)
            return {"codes": (codes, byte), **self._scale_buffers((tiles,), groups)}
        leading, columns = ((), math.prod(shape)) if self.layout == "flat" else (shape[:-1], shape[-1] if shape else 1)
        found = {"codes": ((*leading, row_bytes(columns, min(self.bits, 8))), byte)}
        if self.bits > 8:
            found["high"] = ((*leading, row_bytes(columns, self.bits - 8)), byte)
        return {**found, **self._scale_buffers(leading, self.num_groups(columns))}

    # -- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, x: Any) -> Packed:
        shape = tuple(x.shape)
        if self.layout == "tiles":
            return self._encode_tiles(x, shape)
        values = real_float32(self.spec, x)
        values = values.reshape(-1) if self.layout == "flat" or not shape else values
        if math.prod(shape) == 0:
            empty = {name: np.zeros(s, d) for name, (s, d) in self.buffers(shape).items()}
            return Packed(spec=self.spec, shape=shape, buffers=empty)
        scales = self.statistics(values)
        if not self.group:
            return Packed(spec=self.spec, shape=shape, buffers=self._row_codes(self.levels.encode(values)))
        codes = self._ungrouped(self.quantize(self._grouped(values), scales), values.shape[-1])
        buffers = {**self._row_codes(codes), **self._row_scales(scales)}
        return Packed(spec=self.spec, shape=shape, buffers=buffers)

    def decode(self, packed: Packed) -> np.ndarray:
        if self.layout == "tiles":
            return self._decode_tiles(packed)
        shape = packed.shape
        if packed.size == 0:
            return np.zeros(shape, np.float32)
        columns = packed.size if self.layout == "flat" else shape[-1] if shape else 1
        codes = self._codes_of_rows(packed.buffers, columns)
        if not self.group:
            plain: np.ndarray = self.levels.decode(codes)
            return plain.reshape(shape)
        values = self.dequantize(self._grouped(codes), self._scales_of_rows(packed.buffers))
        return self._ungrouped(values, columns).reshape(shape)

    def unpack(self, packed: Packed) -> tuple[np.ndarray, Scales]:
        """Codes of the logical shape and scales [..., groups] of what is not flat."""
        if self.layout == "tiles":
            return self._codes_of_tiles(packed.buffers, packed.shape), self._scales_of_tiles(
                packed.buffers, packed.shape[0]
            )
        codes = self._codes_of_rows(packed.buffers, packed.shape[-1] if packed.shape else 1)
        return codes, self._scales_of_rows(packed.buffers) if self.group else ()

    def statistics(self, values: np.ndarray) -> Scales:
        """float32 [..., n] -> scales [..., groups] as codes are made with; a short last group has its own."""
        if not np.isfinite(values).all():
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        if not self.group:
            return ()
        leading, whole = values.shape[:-1], values.shape[-1] // self.group * self.group
        parts = [self.fit(values[..., :whole].reshape(*leading, -1, self.group))] if whole else []
        if whole < values.shape[-1]:
            parts.append(self.fit(values[..., None, whole:]))
        return tuple(np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))

    def scale_tiles(self, scales: Scales) -> dict[str, np.ndarray]:
        """Scales [rows, groups] -> the buffers of a matrix beside its codes."""
        return self.store.to_tiles(scales[0])

    def _row_codes(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        if self.layout == "flat":  # the missing half of a last byte is the code of zero
            codes = np.append(codes, np.full(len(codes) % 2, self.zero_code, codes.dtype))
        low = np.ascontiguousarray(pack_rows((codes & 255).astype(np.uint8), min(self.bits, 8)))
        if self.layout == "flat":
            low = _swap_halves(low)
        if self.bits <= 8:
            return {"codes": low}
        return {"codes": low, "high": np.ascontiguousarray(pack_rows((codes >> 8).astype(np.uint8), self.bits - 8))}

    def _codes_of_rows(self, buffers: Mapping[str, np.ndarray], columns: int) -> np.ndarray:
        stream = _swap_halves(buffers["codes"]) if self.layout == "flat" else buffers["codes"]
        codes: np.ndarray = unpack_rows(stream, columns, min(self.bits, 8))
        if self.bits > 8:
            high = unpack_rows(buffers["high"], columns, self.bits - 8)
            return codes.astype(np.uint16) | (high.astype(np.uint16) << 8)
        return codes

    def _grouped(self, values: np.ndarray) -> np.ndarray:
        """[..., n] -> [..., groups, group]; a short last group is filled with zeros."""
        columns = values.shape[-1]
        groups = self.num_groups(columns)
        if groups * self.group != columns:
            fill = np.zeros((*values.shape[:-1], groups * self.group - columns), values.dtype)
            values = np.concatenate([values, fill], axis=-1)
        return values.reshape(*values.shape[:-1], groups, self.group)

    def _ungrouped(self, values: np.ndarray, columns: int) -> np.ndarray:
        return values.reshape(*values.shape[:-2], values.shape[-2] * self.group)[..., :columns]

    # -- tiles ------------------------------------------------------------------------------------------------------

    def slabs(self, rows: int, columns: int) -> Iterator[tuple[int, int]]:
        """Row ranges of whole tiles, to be worked one after another."""
        step = max(_SLAB_VALUES // max(columns, 1) // TILE_ROWS, 1) * TILE_ROWS
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def _encode_tiles(self, x: Any, shape: tuple[int, ...]) -> Packed:
        rows, columns = matrix_shape(self.spec, shape)
        buffers = {name: np.zeros(s, d) for name, (s, d) in self.buffers(shape).items()}
        for start, stop in self.slabs(rows, columns) if columns else ():
            values = real_float32(self.spec, x[start:stop])
            groups, scales = self._grouped(values), self.statistics(values)
            codes = self._ungrouped(self.quantize(groups, scales), columns)
            first, tiles = start // TILE_ROWS, -(-(stop - start) // TILE_ROWS)
            padded = np.full((tiles * TILE_ROWS, groups.shape[1] * self.group), self.zero_code, np.uint8)
            padded[: stop - start, :columns] = codes
            buffers["codes"][first : first + tiles] = pack_tiles(padded, self.bits, self.group)
            for name, held in self.scale_tiles(scales).items():
                buffers[name][first : first + tiles] = held
        return Packed(spec=self.spec, shape=shape, buffers=buffers)

    def _codes_of_tiles(self, buffers: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        return unpack_tiles(buffers["codes"], self.bits, self.group)[: shape[0], : shape[1]]

    def _decode_tiles(self, packed: Packed) -> np.ndarray:
        rows, columns = matrix_shape(self.spec, packed.shape)
        values = np.zeros((rows, columns), np.float32)
        for start, stop in self.slabs(rows, columns) if columns else ():
            tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
            slab = {name: buffer[tiles] for name, buffer in packed.buffers.items()}
            codes = self._codes_of_tiles(slab, (stop - start, columns))
            decoded = self.dequantize(self._grouped(codes), self._scales_of_tiles(slab, stop - start))
            values[start:stop] = self._ungrouped(decoded, columns)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualBinaryCodec(LevelCodec):
    """Two signs and two scales per group: value = scale * sign + second * sign of what that leaves.

    The scales are mean magnitudes, of the numbers and of what is left of them: each is the one of least squares for its
    signs. The low bit of a code is the first sign.
    """

    examples: ClassVar[tuple[str, ...]] = ("binary", "binary2", "binary2-g32", "binary2-g10-rows")

    @classmethod
    def parse(cls, spec: str) -> LevelCodec:
        match = re.fullmatch(r"binary2(?:-g(?P<group>[0-9]{1,6}))?(?P<rows>-rows)?", spec)
        if match is None:
            return LevelCodec.parse(spec)
        layout: Any = "rows" if match["rows"] else "tiles"
        return cls(name="binary2", group=int(match["group"] or 64), scale="f16", layout=layout)

    @property
    def spec(self) -> str:
        return f"binary2-g{self.group}{'-rows' if self.layout == 'rows' else ''}"

    @property
    def levels(self) -> LevelSet:
        return residual_binary()

    def fit(self, groups: np.ndarray) -> Scales:
        first = self.store.rounded(np.abs(groups).mean(axis=-1, dtype=np.float32), self.spec)
        rest = np.abs(groups - _signed(groups >= 0, first)).mean(axis=-1, dtype=np.float32)
        return first, self.store.rounded(rest, self.spec)

    def dequantize(self, codes: np.ndarray, scales: Scales) -> np.ndarray:
        return _signed(codes & 1 == 1, scales[0]) + _signed(codes >> 1 == 1, scales[1])

    def pair_counts(self) -> tuple[np.ndarray, np.ndarray, int]:
        """By code, less an offset that both share: how often each of the two scales counts."""
        return np.asarray([0, 2, 0, 2], np.uint8), np.asarray([0, 0, 2, 2], np.uint8), 1

    def scale_tiles(self, scales: Scales) -> dict[str, np.ndarray]:
        first, second = (statistic_tiles(one.astype(np.float16)) for one in scales)
        return {"scales": first, "second": second}

    def _row_scales(self, scales: Scales) -> dict[str, np.ndarray]:
        return {"scales": scales[0].astype(np.float16), "second": scales[1].astype(np.float16)}

    def _scales_of_tiles(self, buffers: Mapping[str, np.ndarray], num_rows: int) -> Scales:
        return tuple(statistic_rows(buffers[name], num_rows).astype(np.float32) for name in ("scales", "second"))

    def _scales_of_rows(self, buffers: Mapping[str, np.ndarray]) -> Scales:
        return tuple(buffers[name].astype(np.float32) for name in ("scales", "second"))

    def _scale_buffers(self, leading: tuple[int, ...], groups: int) -> dict[str, Any]:
        found = LevelCodec._scale_buffers(self, leading, groups)
        return {**found, "second": found["scales"]}


def _signed(positive: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.where(positive, scales[..., None], -scales[..., None])


def _swap_halves(stream: np.ndarray) -> np.ndarray:
    return (stream << np.uint8(4)) | (stream >> np.uint8(4))
