"""SpQR's stored form: low-bit codes in groups of 16 whose scales and zeros are 3-bit codes too, and sparse outliers.

Source: "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression" (Tim Dettmers, 2023, arXiv
2306.03078), sections 3.3 and 4; official code: github.com/Vahe1994/SpQR. `compress.spqr` finds what is stored here.

Idea: groups of 16 columns need a scale and a zero each, which would cost two bits per weight; 16 rows' scales (zeros)
of one group are rounded to 3 bits under one step and one least value. What does not fit is kept beside the codes.

    scale = scale_step * scale_code + scale_least      zero = zero_step * zero_code + zero_least
    value = scale * (code - zero)                      plus, at outliers, what is missing to it as a float16

Units and shapes: weights [rows, cols]; columns may be stored in another `order`. Tiles of 16 rows:

    codes         uint8 [row tiles, units, 64 * bits]: units of 32 columns in bit planes, as `bitpack` has them
    statistics    uint8 [row tiles, 2 * units, 20]: per tile of 16 x 16, 16 scale codes as a stream of 3 bits (6 bytes),
                  16 zero codes (6 bytes), then scale_step, scale_least, zero_step, zero_least as float16
    order         uint16 or uint32 [cols]: the column that stands at each stored place (where `-ordered`)
    row_offsets   uint32 [rows + 1], outlier_columns uint16 or uint32 [n] (stored places), outlier_values float16 [n]
                  (where `-o{n}`): compressed sparse rows, places rising within a row

Differs from the paper: the second level keeps its least value instead of its zero point, the same bytes, because a zero
point overflows float16 where the 16 are nearly alike; a group of equal values, or one so far from zero that its zero
point would lose its digits, takes its range from zero on. The released kernel's 64-bit words hold 16 weights of 3 bits,
two unused bits and a byte of the second level: 4 bits per weight at 3, nothing at other widths. Planes hold the same
numbers in bits + 0.625 bits per weight at every width, in the order in which one vector multiplies 16 rows.
Cost: bits + 20 * 8 / 256 bits per weight (columns padded to 32, rows to 16), 32 (48 above 65,536 columns) per outlier,
32 per row where there are any, 16 (32) per column where ordered.
Holds when: scales and least values stay inside float16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
    unpack_rows,
    unpack_tiles,
)

GROUP = 16
SECOND_BITS = 3
STATISTIC_BYTES = 20
_CODE_BYTES = TILE_ROWS * SECOND_BITS // 8
_TOP = (1 << SECOND_BITS) - 1
_NARROW_COLUMNS = 1 << 16
_SLAB_VALUES = 1 << 18
_SPEC = re.compile(r"spqr(?P<bits>[0-9])(?P<ordered>-ordered)?(?:-o(?P<outliers>[0-9]{1,10}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """Values beside the codes. rows, places [n] int64, by row and then by place; values [n] float16."""

    rows: np.ndarray
    places: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything a matrix [rows, cols] in this form consists of, columns in stored order.

    codes [rows, cols], scale_codes and zero_codes [rows, groups] uint8; second [row tiles, groups, 4] float16.
    """

    codes: np.ndarray
    scale_codes: np.ndarray
    zero_codes: np.ndarray
    second: np.ndarray
    outliers: Outliers | None = None
    order: np.ndarray | None = None


# -- arithmetic of one group, shared with the compensated sweep --------------------------------------------------------


def fit(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 groups [..., n] -> scales and zeros [...] float32 of a minimum-to-maximum quantizer."""
    top = np.float32((1 << bits) - 1)
    low, high = values.min(axis=-1), values.max(axis=-1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise InputError(f"spqr{bits} cannot hold NaN or infinite values")
    far = np.minimum(np.abs(low), np.abs(high)) > 16 * (high - low)
    low, high = np.where(far, np.minimum(low, 0), low), np.where(far, np.maximum(high, 0), high)
    scales = (high - low) / top
    return scales, -low / np.where(scales == 0, np.float32(1), scales)


def second_level(values: np.ndarray, bits: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales or zeros [rows] float32 of one group -> codes [rows] uint8, (step, least) [row tiles, 2] float16."""
    short = -len(values) % TILE_ROWS
    runs = np.concatenate([values, np.broadcast_to(values[-1:], (short,))]).reshape(-1, TILE_ROWS)
    least = runs.min(axis=1)
    with np.errstate(over="ignore"):
        pair = np.stack([(runs.max(axis=1) - least) / np.float32(_TOP), least], axis=1).astype(np.float16) + 0
    if not np.isfinite(pair).all():
        raise InputError(f"spqr{bits}: a {what} of {np.abs(values).max():g} overflows float16 (65504); use float16")
    step, least = pair.astype(np.float32).T[:, :, None]
    codes = np.rint((runs - least) / np.where(step == 0, np.float32(1), step))
    codes = np.where(step == 0, np.float32(0), codes.clip(0, _TOP))
    return codes.astype(np.uint8).reshape(-1)[: len(values)], pair


def second_values(codes: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """What second-level codes [rows] stand for: float32 [rows]."""
    step, least = np.repeat(pair.astype(np.float32), TILE_ROWS, axis=0)[: len(codes)].T
    return step * codes.astype(np.float32) + least


def quantize(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    """float32 values, scales and zeros that broadcast with them -> codes as float32."""
    codes = np.rint(values / np.where(scales == 0, np.float32(1), scales) + zeros)
    return codes.clip(0, np.float32((1 << bits) - 1))


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """What codes stand for, float32. The order of operations is that of the kernels."""
    return scales * (codes.astype(np.float32) - zeros)


# -- the codec ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SpqrCodec(Codec):
    """See the module's text. `num_outliers` is part of the spec, so that sizes are known from spec and shape."""

    examples: ClassVar[tuple[str, ...]] = ("spqr3", "spqr4", "spqr2", "spqr8", "spqr3-ordered")
    method: ClassVar[str] = "spqr"

    bits: int
    ordered: bool = False
    num_outliers: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"spqr{self.bits}: bits must be 2 to 8")

    @classmethod
    def parse(cls, spec: str) -> SpqrCodec:
        """`spqr3`, `spqr4-ordered-o1234`."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(f"unknown format {spec!r}; known are spqr2 to spqr8, such as spqr3 or spqr3-ordered-o120")
        outliers = int(match["outliers"] or 0)
        return cls(bits=int(match["bits"]), ordered=match["ordered"] is not None, num_outliers=outliers)

    @property
    def spec(self) -> str:
        outliers = f"-o{self.num_outliers}" if self.num_outliers else ""
        return f"spqr{self.bits}{'-ordered' if self.ordered else ''}{outliers}"

    @property
    def label(self) -> str:
        return f"spqr{self.bits}"

    @property
    def timed(self) -> str:
        # outliers then count as bytes at the rate of codes
        return replace(self, num_outliers=0).spec

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        rows, columns = matrix_shape(self.spec, shape)
        tiles, units = -(-rows // TILE_ROWS), -(-columns // UNIT_COLUMNS)
        byte, index = np.dtype(np.uint8), np.dtype(np.uint16 if columns <= _NARROW_COLUMNS else np.uint32)
        found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "codes": ((tiles, units, self.bits * LANE_BYTES), byte),
            "statistics": ((tiles, 2 * units, STATISTIC_BYTES), byte),
        }
        if self.ordered:
            found["order"] = (columns,), index
        if self.num_outliers:
            found["row_offsets"] = (rows + 1,), np.dtype(np.uint32)
            found["outlier_columns"] = (self.num_outliers,), index
            found["outlier_values"] = (self.num_outliers,), np.dtype(np.float16)
        return found

    def encode(self, x: Any) -> Packed:
        """Each weight to its nearest code; `num_outliers` of the largest errors (at most one a weight) are stored too.

        Columns stay in order. What calibration adds is up to `compress.spqr`.
        """
        values = real_float32(self.spec, x)
        rows, columns = matrix_shape(self.spec, values.shape)
        if self.num_outliers > values.size:
            raise InputError(f"{self.spec}: a matrix of shape {list(values.shape)} has fewer weights than outliers")
        groups = -(-columns // GROUP)
        codes, dense = np.empty((rows, columns), np.uint8), np.empty((rows, columns), np.float32)
        scale_codes, zero_codes = (np.empty((rows, groups), np.uint8) for _ in range(2))
        second = np.empty((-(-rows // TILE_ROWS), groups, 4), np.float16)
        for group in range(groups) if rows else ():
            members = slice(group * GROUP, min((group + 1) * GROUP, columns))
            scales, zeros = fit(values[:, members], self.bits)
            scale_codes[:, group], second[:, group, :2] = second_level(scales, self.bits, "scale")
            zero_codes[:, group], second[:, group, 2:] = second_level(zeros, self.bits, "zero")
            scales = second_values(scale_codes[:, group], second[:, group, :2])[:, None]
            zeros = second_values(zero_codes[:, group], second[:, group, 2:])[:, None]
            codes[:, members] = quantize(values[:, members], scales, zeros, self.bits)
            dense[:, members] = dequantize(codes[:, members], scales, zeros)
        parts = Parts(
            codes=codes, scale_codes=scale_codes, zero_codes=zero_codes, second=second,
            outliers=self._largest(values - dense) if self.num_outliers else None,
            order=np.arange(columns) if self.ordered else None,
        )  # fmt: skip
        return pack(self.bits, parts)

    def _largest(self, missing: np.ndarray) -> Outliers:
        flat = np.sort(np.argsort(-np.abs(missing), axis=None, kind="stable")[: self.num_outliers])
        rows, places = np.divmod(flat, missing.shape[1])
        return Outliers(rows=rows, places=places, values=missing[rows, places].astype(np.float16))

    def decode(self, packed: Packed) -> np.ndarray:
        """float32 [rows, cols], columns in their own order."""
        parts = unpack(packed)
        shape = parts.codes.shape
        stored = np.empty(shape, np.float32)
        for group in range(parts.scale_codes.shape[1]) if shape[0] else ():
            members = slice(group * GROUP, min((group + 1) * GROUP, shape[1]))
            scales = second_values(parts.scale_codes[:, group], parts.second[:, group, :2])[:, None]
            zeros = second_values(parts.zero_codes[:, group], parts.second[:, group, 2:])[:, None]
            stored[:, members] = dequantize(parts.codes[:, members], scales, zeros)
        if parts.outliers is not None:
            stored[parts.outliers.rows, parts.outliers.places] += parts.outliers.values.astype(np.float32)
        if parts.order is None:
            return stored
        values = np.empty_like(stored)
        values[:, parts.order] = stored
        return values


def pack(bits: int, parts: Parts) -> Packed:
    """Parts to bytes; the spec names how many outliers there are."""
    num_outliers = 0 if parts.outliers is None else len(parts.outliers.values)
    form = SpqrCodec(bits=bits, ordered=parts.order is not None, num_outliers=num_outliers)
    rows, columns = parts.codes.shape
    buffers = {name: np.zeros(shape, dtype) for name, (shape, dtype) in form.buffers(parts.codes.shape).items()}
    tiles, units = buffers["codes"].shape[:2]
    for start in range(0, tiles, step := max(1, _SLAB_VALUES // (TILE_ROWS * UNIT_COLUMNS * max(units, 1)))):
        slab = slice(start, min(start + step, tiles))
        held = slice(slab.start * TILE_ROWS, slab.stop * TILE_ROWS)
        codes = _padded(parts.codes[held], slab.stop - slab.start, units * UNIT_COLUMNS)
        packed = pack_tiles(codes, bits, UNIT_COLUMNS)
        buffers["codes"][slab] = packed.reshape(packed.shape[0], units, bits * LANE_BYTES)
        for first, numbers in ((0, parts.scale_codes), (_CODE_BYTES, parts.zero_codes)):
            small = _padded(numbers[held], slab.stop - slab.start, 2 * units)
            runs = small.reshape(slab.stop - slab.start, TILE_ROWS, 2 * units).transpose(0, 2, 1)
            buffers["statistics"][slab, :, first : first + _CODE_BYTES] = pack_rows(runs, SECOND_BITS)
    groups = parts.second.shape[1]
    pairs = np.ascontiguousarray(parts.second).view(np.uint8).reshape(tiles, groups, 8)
    buffers["statistics"][:, :groups, 2 * _CODE_BYTES :] = pairs
    if parts.order is not None:
        buffers["order"][:] = parts.order
    if parts.outliers is not None and num_outliers:
        counts = np.bincount(parts.outliers.rows, minlength=rows)
        buffers["row_offsets"][1:] = np.cumsum(counts)
        buffers["outlier_columns"][:] = parts.outliers.places
        buffers["outlier_values"][:] = parts.outliers.values
    return Packed(spec=form.spec, shape=(rows, columns), buffers=buffers)


def unpack(packed: Packed) -> Parts:
    """The parts of a packed matrix."""
    form = SpqrCodec.parse(packed.spec)
    buffers = packed.buffers
    rows, columns = matrix_shape(packed.spec, packed.shape)
    tiles = len(buffers["codes"])
    groups = -(-columns // GROUP)
    codes = unpack_tiles(buffers["codes"][:, :, None], form.bits, UNIT_COLUMNS)[:rows, :columns]
    statistics = np.ascontiguousarray(buffers["statistics"][:, :groups])
    runs = [
        unpack_rows(statistics[:, :, first : first + _CODE_BYTES], TILE_ROWS, SECOND_BITS).transpose(0, 2, 1)
        for first in (0, _CODE_BYTES)
    ]
    scale_codes, zero_codes = (run.reshape(tiles * TILE_ROWS, groups)[:rows] for run in runs)
    second = np.ascontiguousarray(statistics[:, :, 2 * _CODE_BYTES :]).view(np.float16)
    outliers = None
    if form.num_outliers:
        offsets = buffers["row_offsets"].astype(np.int64)
        outliers = Outliers(
            rows=np.repeat(np.arange(rows), offsets[1:] - offsets[:-1]),
            places=buffers["outlier_columns"].astype(np.int64),
            values=buffers["outlier_values"],
        )
    order = buffers["order"].astype(np.int64) if form.ordered else None
    return Parts(
        codes=codes, scale_codes=scale_codes, zero_codes=zero_codes, second=second, outliers=outliers, order=order
    )


def check(packed: Packed) -> None:
    """InputError where indices point outside the matrix: kernels follow them without a look."""
    form, (rows, columns) = SpqrCodec.parse(packed.spec), packed.shape
    if form.ordered and not np.array_equal(np.sort(packed.buffers["order"]), np.arange(columns)):
        raise InputError(f"{form.label} of shape {[rows, columns]}: `order` does not name each column once")
    if form.num_outliers:
        offsets, places = packed.buffers["row_offsets"], packed.buffers["outlier_columns"]
        if offsets[0] != 0 or offsets[-1] != form.num_outliers or bool((offsets[1:] < offsets[:-1]).any()):
            raise InputError(
                f"{form.label} of shape {[rows, columns]}: `row_offsets` must rise from 0 to {len(places)}"
            )
        inside = np.diff(places.astype(np.int64)) > 0
        inside[offsets[1:-1][(offsets[1:-1] > 0) & (offsets[1:-1] < form.num_outliers)].astype(np.int64) - 1] = True
        if int(places.max()) >= columns or not bool(inside.all()):
            raise InputError(
                f"{form.label} of shape {[rows, columns]}: `outlier_columns` must rise within a row and stay inside it"
            )


def _padded(numbers: np.ndarray, tiles: int, columns: int) -> np.ndarray:
    padded = np.zeros((tiles * TILE_ROWS, columns), np.uint8)
    padded[: len(numbers), : numbers.shape[1]] = numbers
    return padded
