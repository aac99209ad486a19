"""Half of the weights gone: of every four neighbours two are kept, as codes of 2 to 8 bits and two positions of 2 bits.

Sources: Sparse-MARLIN, in "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models" (E.
Frantar, 2024, arXiv 2408.11743), section 3.5; the pattern is that of NVIDIA's sparse tensor cores; "AccLLM" (2025,
arXiv 2505.03745) stores 2-bit weights the same way.

Idea: which two of four weights are zero is free to choose, and costs 2 bits per kept weight to write down: 4-bit codes
take 3 bits per weight of the matrix instead of 4. Kept weights share a scale per `group` columns of the matrix:

    symmetric    value = scale * (code - 2^(bits-1))
    asymmetric   value = scale * (code - zero)          zero is a code: what is pruned can be written as one

Units and shapes: weights [rows, cols], row tiles of 16, groups of 64, 128 or 256 columns (32, 64, 128 kept weights).

    codes      uint8 [row tiles, groups, group / 64, 64 * (bits + 2)]: per 64 columns the kept codes as a unit of 32
               columns of the tile layout (`bitpack`), then their positions as another, of 2 bits; one stream
    scales     float16 [row tiles, groups, 16]
    zeros      uint8 [row tiles, groups, 16], asymmetric only

Kept weights stand in order, two for columns 0-3, two for 4-7...; the positions (0 to 3) of a pair rise. Rows and
columns that are missing in the last tile and group are padded with zeros.
Differs from the papers: their metadata is permuted for the tensor cores' registers, here for byte shuffles of a CPU.
Cost: (bits + 2) / 2 + 16 / group bits per weight (24 / group asymmetric).
Holds when: half of the weights can be spared; `compress.pruning` chooses them by what their loss costs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32
from memwall.formats.bitpack import LANE_BYTES, TILE_ROWS, UNIT_COLUMNS, matrix_shape, pack_tiles, unpack_tiles
from memwall.formats.scales import statistic_rows, statistic_tiles

OF, KEPT, POSITION_BITS = 4, 2, 2
GROUPS = (64, 128, 256)
DEFAULT_GROUP = 128
_SLAB_VALUES = 1 << 18
_SPEC = re.compile(r"sparse(?P<bits>[0-9])(?:-g(?P<group>[0-9]{1,4}))?(?P<asym>-asym)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a matrix [rows, cols] consists of; `kept` is half of the columns, rounded up to whole fours.

    codes, positions uint8 [rows, kept]; scales float16 [rows, groups]; zeros uint8 [rows, groups], None if symmetric.
    """

    codes: np.ndarray
    positions: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None


def kept_columns(columns: int) -> int:
    """Kept weights of a row of so many."""
    return -(-columns // OF) * KEPT


def largest_pairs(scores: np.ndarray) -> np.ndarray:
    """Scores [..., cols] -> mask [..., cols]: the two largest of every four, the first of equals."""
    *leading, columns = scores.shape
    whole = -(-columns // OF)
    padded = np.full((*leading, whole * OF), -np.inf, np.float32)
    padded[..., :columns] = scores
    fours = padded.reshape(*leading, whole, OF)
    best = np.argsort(-fours, axis=-1, kind="stable")[..., :KEPT]
    mask = np.zeros(fours.shape, bool)
    np.put_along_axis(mask, best, True, axis=-1)
    return mask.reshape(padded.shape)[..., :columns]


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Mask [rows, cols] with at most two of every four columns set -> positions uint8 [rows, kept], rising in pairs.

    A four with fewer keeps others beside them, whose codes are then zero. InputError where a four has more.
    """
    rows, columns = mask.shape
    whole = -(-columns // OF)
    fours = np.zeros((rows, whole * OF), np.int8)
    fours[:, :columns] = mask
    fours = fours.reshape(rows, whole, OF)
    if bool((fours.sum(axis=-1) > KEPT).any()):
        raise InputError(f"of every {OF} weights in a row {KEPT} may be kept, not more")
    first = np.argsort(-fours, axis=-1, kind="stable")[..., :KEPT]
    return np.sort(first, axis=-1).astype(np.uint8).reshape(rows, whole * KEPT)


def gather_kept(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """values [rows, cols] at positions [rows, kept] -> [rows, kept]; zeros past the last column."""
    rows, columns = values.shape
    fours = np.zeros((rows, positions.shape[1] // KEPT * OF), values.dtype)
    fours[:, :columns] = values
    pairs = positions.reshape(rows, positions.shape[1] // KEPT, KEPT).astype(np.intp)
    return np.take_along_axis(fours.reshape(*pairs.shape[:2], OF), pairs, axis=-1).reshape(positions.shape)


def scatter_kept(kept: np.ndarray, positions: np.ndarray, columns: int) -> np.ndarray:
    """kept [rows, kept] to where they stand in [rows, columns]; zeros elsewhere."""
    rows = len(kept)
    fours = np.zeros((rows, kept.shape[1] // KEPT, OF), kept.dtype)
    pairs = positions.reshape(rows, positions.shape[1] // KEPT, KEPT).astype(np.intp)
    np.put_along_axis(fours, pairs, kept.reshape(pairs.shape), axis=-1)
    return fours.reshape(rows, kept.shape[1] // KEPT * OF)[:, :columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCodec(Codec):
    """See the module's text. group: columns of the matrix, kept and pruned ones, that share a scale."""

    examples: ClassVar[tuple[str, ...]] = (
        "sparse4", "sparse2-g64-asym", "sparse8-g256", "sparse3-g64", "sparse4-g128-asym", "sparse5-g256-asym",
    )  # fmt: skip

    bits: int
    group: int = DEFAULT_GROUP
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"sparse{self.bits}: kept weights have 2 to 8 bits")
        if self.group not in GROUPS:
            raise InputError(f"{self.spec}: the group is one of 64, 128, 256 columns, got {self.group}")

    @classmethod
    def parse(cls, spec: str) -> SparseCodec:
        """`sparse4`, `sparse2-g64-asym`."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(
                f"unknown format {spec!r}; two of four weights kept at 2 to 8 bits are sparse4, sparse2-g64-asym..."
            )
        group = int(match["group"] or DEFAULT_GROUP)
        return cls(bits=int(match["bits"]), group=group, symmetric=match["asym"] is None)

    @property
    def spec(self) -> str:
        return f"sparse{self.bits}-g{self.group}{'' if self.symmetric else '-asym'}"

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def zero_code(self) -> int:
        """Code of padding, and of zero where symmetric."""
        return 1 << (self.bits - 1) if self.symmetric else 0

    def num_groups(self, columns: int) -> int:
        """Groups of a row."""
        return -(-columns // self.group)

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        rows, columns = matrix_shape(self.spec, shape)
        tiles, groups = -(-rows // TILE_ROWS), self.num_groups(columns)
        units = self.group // (UNIT_COLUMNS * OF // KEPT)
        found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "codes": ((tiles, groups, units, LANE_BYTES * (self.bits + POSITION_BITS)), np.dtype(np.uint8)),
            "scales": ((tiles, groups, TILE_ROWS), np.dtype(np.float16)),
        }
        if not self.symmetric:
            found["zeros"] = (tiles, groups, TILE_ROWS), np.dtype(np.uint8)
        return found

    # -- arithmetic of one group, shared with pruning ----------------------------------------------------------------

    def fit(
        self, values: np.ndarray, weights: np.ndarray | None = None, shrinks: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """float32 values [rows, n] of a group, zeros for what is not kept -> scales float16, zeros uint8 [rows].

        shrinks [s]: factors of the full range that are tried (1 alone by default); of them the one of least error is
        taken. weights [n] or [rows, n]: what a squared error costs. Symmetric zeros are all `zero_code`.
        """
        low, high = values.min(axis=1, initial=0), values.max(axis=1, initial=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        tried = np.ones(1, np.float32) if shrinks is None else np.asarray(shrinks, np.float32)
        costs = np.float32(1) if weights is None else np.asarray(weights, np.float32)
        best = np.full(len(values), np.inf, np.float32)
        scales, zeros = np.zeros(len(values), np.float16), np.full(len(values), self.zero_code, np.uint8)
        for shrink in tried:
            found = self._range(low * shrink, high * shrink)
            if len(tried) > 1:
                error = np.square(self.dequantize(self.quantize(values, *found), *found) - values)
                loss = (error * costs).sum(axis=1)
                better = loss < best
                best = np.where(better, loss, best)
                scales, zeros = np.where(better, found[0], scales), np.where(better, found[1], zeros)
            else:
                scales, zeros = found
        return scales, zeros

    def _range(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero of groups between low <= 0 and high >= 0."""
        with np.errstate(over="ignore"):
            if self.symmetric:
                # the sign of the extreme, so that it takes the code of full magnitude (as IntegerCodec has it)
                scales = np.where(high > -low, high, low) / np.float32(-self.zero_code)
            else:
                scales = (high - low) / np.float32(self.top)
            half = scales.astype(np.float16) + np.float16(0)
        if not np.isfinite(half).all():
            raise InputError(f"{self.spec}: a group's scale of {np.abs(scales).max():g} overflows float16 (65504)")
        if self.symmetric:
            return half, np.full(len(half), self.zero_code, np.uint8)
        single = half.astype(np.float32)
        zeros = np.rint(-low / np.where(single == 0, np.float32(1), single)).clip(0, self.top)
        return half, np.where(single == 0, 0, zeros).astype(np.uint8)

    def quantize(self, values: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """float32 [rows, n] with scales and zeros [rows] -> codes uint8 [rows, n]; a scale of zero gives the zero."""
        scale, zero = scales.astype(np.float32)[:, None], zeros.astype(np.float32)[:, None]
        empty = scale == 0
        codes = np.rint(values / np.where(empty, np.float32(1), scale)) + zero
        return np.where(empty, zero, codes.clip(0, self.top)).astype(np.uint8)

    def dequantize(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """What codes [rows, n] stand for, float32, in the order of operations of the kernels."""
        return scales.astype(np.float32)[:, None] * (codes.astype(np.float32) - zeros.astype(np.float32)[:, None])

    # -- whole matrices ----------------------------------------------------------------------------------------------

    def encode(self, x: Any) -> Packed:
        """Prunes the two smallest of every four and rounds the others; `compress` chooses better, by calibration."""
        values = real_float32(self.spec, x)
        rows, columns = matrix_shape(self.spec, values.shape)
        groups, kept = self.num_groups(columns), kept_columns(columns)
        positions, codes = np.empty((rows, kept), np.uint8), np.empty((rows, kept), np.uint8)
        scales, zeros = np.zeros((rows, groups), np.float16), np.zeros((rows, groups), np.uint8)
        step = max(TILE_ROWS, _SLAB_VALUES // max(columns, 1))
        for start in range(0, rows, step) if columns else ():
            slab = slice(start, start + step)
            if not np.isfinite(values[slab]).all():
                raise InputError(f"{self.spec} cannot hold NaN or infinite values")
            positions[slab] = positions_of(largest_pairs(np.abs(values[slab])))
            found = gather_kept(values[slab], positions[slab])
            for group, members in enumerate(self.members(columns)):
                scales[slab, group], zeros[slab, group] = parameters = self.fit(found[:, members])
                codes[slab, members] = self.quantize(found[:, members], *parameters)
        parts = Kept(codes=codes, positions=positions, scales=scales, zeros=None if self.symmetric else zeros)
        return self.pack(parts, columns)

    def members(self, columns: int) -> list[slice]:
        """The kept weights of each group."""
        step, kept = self.group // OF * KEPT, kept_columns(columns)
        return [slice(start, min(start + step, kept)) for start in range(0, kept, step)]

    def pack(self, parts: Kept, columns: int) -> Packed:
        """Parts of a matrix of `columns` columns to bytes; InputError where positions do not rise in pairs."""
        rows = len(parts.codes)
        expected, groups = (rows, kept_columns(columns)), self.num_groups(columns)
        if parts.codes.shape != expected or parts.positions.shape != expected or parts.scales.shape != (rows, groups):
            raise InputError(
                f"{self.spec}: {columns} columns have codes and positions {list(expected)}, scales {[rows, groups]}, "
                f"got {list(parts.codes.shape)}, {list(parts.positions.shape)} and {list(parts.scales.shape)}"
            )
        if (parts.zeros is None) != self.symmetric:
            raise InputError(f"{self.spec}: zeros {'are missing' if parts.zeros is None else 'have no place'}")
        check_positions(self.spec, parts.positions)
        sizes = self.buffers((rows, columns))
        codes = np.full((sizes["codes"][0][0] * TILE_ROWS, groups * self.group // 2), self.zero_code, np.uint8)
        positions = np.zeros_like(codes)
        positions[:, 1::2] = 1
        if parts.zeros is not None:
            codes[:rows] = np.repeat(parts.zeros, self.group // 2, axis=1)
        codes[:rows, : expected[1]], positions[:rows, : expected[1]] = parts.codes, parts.positions
        units = [pack_tiles(each, bits, self.group // 2) for each, bits in ((codes, self.bits), (positions, 2))]
        buffers = {"codes": np.concatenate(units, axis=-1), "scales": statistic_tiles(parts.scales.astype(np.float16))}
        if parts.zeros is not None:
            buffers["zeros"] = statistic_tiles(parts.zeros.astype(np.uint8))
        return Packed(spec=self.spec, shape=(rows, columns), buffers=buffers)

    def unpack(self, packed: Packed) -> Kept:
        """Inverse of `pack`."""
        rows, columns = matrix_shape(self.spec, packed.shape)
        codes, positions = (
            unpack_tiles(np.ascontiguousarray(units), bits, self.group // 2)[:rows, : kept_columns(columns)]
            for units, bits in (
                (packed.buffers["codes"][..., : LANE_BYTES * self.bits], self.bits),
                (packed.buffers["codes"][..., LANE_BYTES * self.bits :], POSITION_BITS),
            )
        )
        zeros = None if self.symmetric else statistic_rows(packed.buffers["zeros"], rows)
        scales = statistic_rows(packed.buffers["scales"], rows)
        return Kept(codes=codes, positions=positions, scales=scales, zeros=zeros)

    def decode(self, packed: Packed) -> np.ndarray:
        """float32 [rows, cols], zero where pruned."""
        rows, columns = matrix_shape(self.spec, packed.shape)
        values, step = np.zeros((rows, columns), np.float32), max(TILE_ROWS, _SLAB_VALUES // max(columns, 1) // 16 * 16)
        for start in range(0, rows, step) if columns else ():
            tiles = slice(start // TILE_ROWS, (start + step) // TILE_ROWS)
            stop = min(start + step, rows)
            part = {name: buffer[tiles] for name, buffer in packed.buffers.items()}
            parts = self.unpack(Packed(spec=self.spec, shape=(stop - start, columns), buffers=part))
            zeros = np.full(parts.scales.shape, self.zero_code, np.uint8) if parts.zeros is None else parts.zeros
            kept = np.empty(parts.codes.shape, np.float32)
            for group, members in enumerate(self.members(columns)):
                kept[:, members] = self.dequantize(parts.codes[:, members], parts.scales[:, group], zeros[:, group])
            values[start:stop] = scatter_kept(kept, parts.positions, columns)
        return values


def check_positions(spec: str, positions: np.ndarray) -> None:
    """InputError where a pair names one place twice or stands out of order: a product would count it twice."""
    if bool((positions[:, ::KEPT] >= positions[:, 1::KEPT]).any()) or bool((positions >= OF).any()):
        raise InputError(f"{spec}: the positions of a pair must rise, from 0 to {OF - 1}")


@lru_cache(maxsize=1)
def _rising() -> np.ndarray:
    """By two neighbouring bytes of positions, four pairs of them: whether all rise."""
    first, second = np.arange(1 << 8), np.arange(1 << 8)[:, None]
    return np.logical_and.reduce([(first >> s & 3) < (second >> s & 3) for s in range(0, 8, POSITION_BITS)]).reshape(-1)


def check(packed: Packed) -> None:
    """InputError for damaged positions, padding included: the kernels do not look."""
    stored = packed.buffers["codes"][..., LANE_BYTES * SparseCodec.parse(packed.spec).bits :]
    step = max(1, _SLAB_VALUES // max(1, stored[:1].size))
    for start in range(0, len(stored), step):
        if not bool(_rising()[np.ascontiguousarray(stored[start : start + step]).view("<u2")].all()):
            raise InputError(f"{packed.spec} of shape {list(packed.shape)}: the positions of a pair must rise")
