"""Scales of groups: how one is chosen, and how it is stored.

Rules give a float32 scale per group from its numbers; the levels are multiples of it. Stores keep scales in few bytes:
as float16 or float32; as powers of two in the e8m0 form of the Open Compute Project (one byte, 2^(byte - 127)); or
twice quantized as in the QLoRA paper (arXiv 2305.14314, section 3): less their mean, eight bits each, with one float32
per 256 of them.

In tiles a store's arrays lie as [row tiles, groups, 16 rows], the order in which products read them. There the mean of
a twice quantized scale is that of its row tile, so that tiles stay independent and a matrix can be coded in pieces; in
the flat form it is that of the whole array, as in bitsandbytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.bitpack import TILE_ROWS
from memwall.formats.levels import LevelSet, dynamic8

Buffers = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]

EXPONENT_BIAS = 127
NESTED_BLOCK = 256
_NESTED_GROUPS = NESTED_BLOCK // TILE_ROWS
# the inverse of anything smaller overflows float32
SMALLEST_DIVISOR = np.ldexp(np.float32(1), -EXPONENT_BIAS)


def peak_scale(groups: np.ndarray, levels: LevelSet) -> np.ndarray:
    """The largest magnitude [..., group] takes the largest level."""
    return _largest(groups) / np.float32(levels.largest)


def mean_scale(groups: np.ndarray, levels: LevelSet) -> np.ndarray:
    """Mean magnitude: for signs the scale of least squares, for ternary weights that of BitNet (arXiv 2402.17764)."""
    return np.abs(groups).mean(axis=-1, dtype=np.float32)


def power_scale(groups: np.ndarray, levels: LevelSet) -> np.ndarray:
    """2^(floor(log2 of the largest magnitude) - that of the largest level): the rule of shared exponents.

    (OCP Microscaling Formats 1.0, section 6.3.) Numbers above the largest level saturate.
    """
    largest = _largest(groups)
    exponents = np.frexp(largest)[1] - np.frexp(levels.levels[-1])[1]
    exponents = np.where(largest > 0, np.clip(exponents, -EXPONENT_BIAS, EXPONENT_BIAS), -EXPONENT_BIAS)
    return np.ldexp(np.float32(1), exponents)


def _largest(groups: np.ndarray) -> np.ndarray:
    """Largest magnitude, without a copy of magnitudes; zero is +0."""
    largest: np.ndarray = np.maximum(groups.max(axis=-1), -groups.min(axis=-1)) + np.float32(0)
    return largest


def inverse_scale(scales: np.ndarray) -> np.ndarray:
    """What numbers are multiplied by before they are rounded to levels: zero where the scale is."""
    inverses = np.float32(1) / np.maximum(scales, SMALLEST_DIVISOR)
    return np.where(scales > 0, inverses, np.float32(0))


class ScaleStore(ABC):
    """How scales of groups lie in buffers. `tiles` is for [rows, groups], `rows` for [..., groups]."""

    name: ClassVar[str]

    def rounded(self, scales: np.ndarray, spec: str) -> np.ndarray:
        """Scales as the codes are to see them, float32."""
        return scales

    @abstractmethod
    def tile_buffers(self, tiles: int, groups: int) -> Buffers:
        """Shapes and types for a matrix of so many row tiles."""

    @abstractmethod
    def row_buffers(self, leading: tuple[int, ...], groups: int) -> Buffers:
        """Shapes and types for groups along the last axis."""

    @abstractmethod
    def to_tiles(self, scales: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [rows, groups] -> buffers; missing rows of the last tile are filled."""

    @abstractmethod
    def from_tiles(self, buffers: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray:
        """Buffers -> float32 [rows, groups]."""

    @abstractmethod
    def to_rows(self, scales: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [..., groups] -> buffers."""

    @abstractmethod
    def from_rows(self, buffers: Mapping[str, np.ndarray]) -> np.ndarray:
        """Buffers -> float32 [..., groups]."""


class PlainStore(ScaleStore):
    """One number per group, of one type."""

    dtype: ClassVar[np.dtype[Any]]

    def put(self, scales: np.ndarray) -> np.ndarray:
        """float32 scales, rounded already -> stored numbers."""
        return scales.astype(self.dtype)

    def get(self, stored: np.ndarray) -> np.ndarray:
        """Stored numbers -> float32 scales."""
        return stored.astype(np.float32)

    def tile_buffers(self, tiles: int, groups: int) -> Buffers:
        return {"scales": ((tiles, groups, TILE_ROWS), self.dtype)}

    def row_buffers(self, leading: tuple[int, ...], groups: int) -> Buffers:
        return {"scales": ((*leading, groups), self.dtype)}

    def to_tiles(self, scales: np.ndarray) -> dict[str, np.ndarray]:
        return {"scales": statistic_tiles(self.put(scales))}

    def from_tiles(self, buffers: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray:
        return self.get(statistic_rows(buffers["scales"], num_rows))

    def to_rows(self, scales: np.ndarray) -> dict[str, np.ndarray]:
        return {"scales": self.put(scales)}

    def from_rows(self, buffers: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.get(buffers["scales"])


class HalfStore(PlainStore):
    """float16."""

    name = "f16"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float16)

    def rounded(self, scales: np.ndarray, spec: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            half = scales.astype(np.float16).astype(np.float32)
        if not np.isfinite(half).all():
            raise InputError(
                f"{spec}: a group's scale of {float(scales.max()):g} overflows float16 (65504); "
                "use float32 or bfloat16, or scales in float32 (-f32)"
            )
        return half


class SingleStore(PlainStore):
    """float32."""

    name = "f32"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)


class ExponentStore(PlainStore):
    """e8m0: a power of two in one byte."""

    name = "e8m0"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.uint8)

    def put(self, scales: np.ndarray) -> np.ndarray:
        return (np.frexp(scales)[1] - 1 + EXPONENT_BIAS).astype(np.uint8)

    def get(self, stored: np.ndarray) -> np.ndarray:
        # 255 is NaN in this form; no encoder writes it
        powers = np.ldexp(np.float32(1), stored.astype(np.int32) - EXPONENT_BIAS)
        return np.where(stored == 255, np.float32(np.nan), powers)


class NestedStore(ScaleStore):
    """Twice quantized. In tiles a block of 256 scales is 16 groups of one row tile."""

    name = "dq"

    def tile_buffers(self, tiles: int, groups: int) -> Buffers:
        blocks = -(-groups // _NESTED_GROUPS)
        return {
            "scales": ((tiles, groups, TILE_ROWS), np.dtype(np.uint8)),
            "nested": ((tiles, blocks), np.dtype(np.float32)),
            "offsets": ((tiles,), np.dtype(np.float32)),
        }

    def row_buffers(self, leading: tuple[int, ...], groups: int) -> Buffers:
        blocks = -(-groups // NESTED_BLOCK)
        return {
            "scales": ((*leading, groups), np.dtype(np.uint8)),
            "nested": ((*leading, blocks), np.dtype(np.float32)),
            "offsets": (leading, np.dtype(np.float32)),
        }

    def to_tiles(self, scales: np.ndarray) -> dict[str, np.ndarray]:
        rows, groups = scales.shape
        tiles = -(-rows // TILE_ROWS)
        blocks = -(-groups // _NESTED_GROUPS)
        held = np.zeros((tiles * TILE_ROWS, groups), np.float32)
        held[:rows] = scales
        stacked = held.reshape(tiles, TILE_ROWS, groups)
        counts = np.minimum(rows - TILE_ROWS * np.arange(tiles), TILE_ROWS) * max(groups, 1)
        offsets = (stacked.sum(axis=(1, 2), dtype=np.float64) / counts).astype(np.float32)
        centred = np.zeros((tiles, blocks * _NESTED_GROUPS, TILE_ROWS), np.float32)
        centred[:, :groups] = (stacked - offsets[:, None, None]).transpose(0, 2, 1)
        missing = tiles * TILE_ROWS - rows
        if missing:
            centred[-1, :, TILE_ROWS - missing :] = 0
        codes, nested = _nest(centred.reshape(tiles, blocks, NESTED_BLOCK))
        return {
            "scales": np.ascontiguousarray(codes.reshape(tiles, -1, TILE_ROWS)[:, :groups]),
            "nested": nested,
            "offsets": offsets,
        }

    def from_tiles(self, buffers: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray:
        codes = buffers["scales"]
        nested = np.repeat(buffers["nested"], _NESTED_GROUPS, axis=1)[:, : codes.shape[1], None]
        scales = dynamic8().decode(codes) * nested + buffers["offsets"][:, None, None]
        return statistic_rows(scales, num_rows)

    def to_rows(self, scales: np.ndarray) -> dict[str, np.ndarray]:
        leading, groups = scales.shape[:-1], scales.shape[-1]
        blocks = -(-groups // NESTED_BLOCK)
        offsets = scales.mean(axis=-1, dtype=np.float32) if groups else np.zeros(leading, np.float32)
        centred = np.zeros((*leading, blocks * NESTED_BLOCK), np.float32)
        centred[..., :groups] = scales - offsets[..., None]
        codes, nested = _nest(centred.reshape(*leading, blocks, NESTED_BLOCK))
        codes = codes.reshape(*leading, -1)[..., :groups]
        return {"scales": np.ascontiguousarray(codes), "nested": nested, "offsets": np.asarray(offsets, np.float32)}

    def from_rows(self, buffers: Mapping[str, np.ndarray]) -> np.ndarray:
        codes = buffers["scales"]
        nested = np.repeat(buffers["nested"], NESTED_BLOCK, axis=-1)[..., : codes.shape[-1]]
        found: np.ndarray = dynamic8().decode(codes) * nested + np.asarray(buffers["offsets"])[..., None]
        return found


def _nest(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., block] -> codes of the same shape and the largest magnitude of each block."""
    nested = np.abs(centred).max(axis=-1, initial=0).astype(np.float32)
    return dynamic8().encode(centred * inverse_scale(nested)[..., None]), nested


STORES: dict[str, ScaleStore] = {
    store.name: store for store in (HalfStore(), SingleStore(), ExponentStore(), NestedStore())
}


def statistic_tiles(values: np.ndarray) -> np.ndarray:
    """[rows, groups] -> [row tiles, groups, 16], zeros for missing rows."""
    rows, groups = values.shape
    tiles = -(-rows // TILE_ROWS)
    full = np.zeros((tiles * TILE_ROWS, groups), values.dtype)
    full[:rows] = values
    return np.ascontiguousarray(full.reshape(tiles, TILE_ROWS, groups).transpose(0, 2, 1))


def statistic_rows(tiles: np.ndarray, num_rows: int) -> np.ndarray:
    """[row tiles, groups, 16] -> [rows, groups]."""
    return tiles.transpose(0, 2, 1).reshape(tiles.shape[0] * TILE_ROWS, tiles.shape[1])[:num_rows]
