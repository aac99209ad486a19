"""Weights in Tilus's stored form: the bytes that a thread loads are, read as codes, its part of a fragment.

A weight tile of, say, 16 x 16 is held by 32 threads as the matrix instruction wants it; a thread's codes are packed
into its bytes, and the tile's bytes are laid out so that a thread loads them in vectors. The whole bytes of a thread
are all that is asked of a type: any width of 1 to 8 bits has this form.
Source: Tilus (2025, arXiv 2504.12984), weight layout. Shapes: codes uint8 [K, N]; packed uint8 [K / tile_k, N / tile_n,
bytes of a tile]; scales float16 [K / group, N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_layout import MMA_B, Layout, local, spatial
from memwall.kernels.tile_types import pack, slice_bytes, tile_type, unpack

LANES = 32
DEFAULT_GROUP = 128
WEIGHT_TILE = (16, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A matrix ready for the programs. shape: [K, N] as given; the buffers are filled up to whole tiles and groups."""

    dtype: str
    shape: tuple[int, int]
    group: int
    weight_tile: tuple[int, int]
    packed: np.ndarray
    scales: np.ndarray

    @property
    def padded(self) -> tuple[int, int]:
        return self.packed.shape[0] * self.weight_tile[0], self.packed.shape[1] * self.weight_tile[1]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def by_columns(self) -> np.ndarray:
        """The packed bytes as [N / tile_n, K / tile_k, bytes]: each column of tiles in one piece, for a processor."""
        return np.ascontiguousarray(self.packed.transpose(1, 0, 2))

    def decode(self) -> np.ndarray:
        """float32 [K, N], code's value times scale."""
        codes = unpack_weights(self.packed, self.dtype, self.weight_tile)
        values = tile_type(self.dtype).decode(codes) * np.repeat(self.scales.astype(np.float32), self.group, axis=0)
        found: np.ndarray = values[: self.shape[0], : self.shape[1]]
        return found


# -- weights ---------------------------------------------------------------------------------------------------------


def tile_layout(weight_tile: tuple[int, int]) -> Layout:
    """How a warp holds a weight tile: fragments of the matrix instruction, k before n."""
    k, n = weight_tile
    if k % MMA_B.shape[0] or n % MMA_B.shape[1]:
        raise InputError(f"weight tile {weight_tile}: multiples of {MMA_B.shape}")
    return local(k // MMA_B.shape[0], n // MMA_B.shape[1]).compose(MMA_B)


def flat_layout(thread_bytes: int) -> Layout:
    """The tile as bytes: vectors of up to 16 bytes, neighbouring threads side by side."""
    inner = math.gcd(thread_bytes, 16)
    return local(thread_bytes // inner).compose(spatial(LANES)).compose(local(inner))


def thread_bytes(dtype: str, weight_tile: tuple[int, int]) -> int:
    """Bytes of a tile that each of the 32 threads holds."""
    return slice_bytes(tile_type(dtype), tile_layout(weight_tile).num_slots)


def pack_weights(codes: np.ndarray, dtype: str, weight_tile: tuple[int, int] = WEIGHT_TILE) -> np.ndarray:
    """uint8 codes [K, N], multiples of the tile -> uint8 [K / tile_k, N / tile_n, bytes of a tile]."""
    tile_k, tile_n = weight_tile
    rows, columns = codes.shape
    if rows % tile_k or columns % tile_n:
        raise InputError(f"weights [{rows}, {columns}] are no multiple of the tile {weight_tile}")
    tiles = codes.reshape(rows // tile_k, tile_k, columns // tile_n, tile_n).transpose(0, 2, 1, 3)
    table = tile_layout(weight_tile).table()
    held = pack(tile_type(dtype), tiles[:, :, table[..., 0], table[..., 1]])
    at = flat_layout(held.shape[-1]).flat_table()
    packed = np.empty((*held.shape[:2], LANES * held.shape[-1]), np.uint8)
    packed[..., at] = held
    return packed


def unpack_weights(packed: np.ndarray, dtype: str, weight_tile: tuple[int, int] = WEIGHT_TILE) -> np.ndarray:
    """The inverse of `pack_weights`."""
    tile_k, tile_n = weight_tile
    layout = tile_layout(weight_tile)
    at = flat_layout(packed.shape[-1] // LANES).flat_table()
    held = unpack(tile_type(dtype), packed[..., at], layout.num_slots)
    tiles = np.empty((*packed.shape[:2], tile_k, tile_n), np.uint8)
    table = layout.table()
    tiles[:, :, table[..., 0], table[..., 1]] = held
    return tiles.transpose(0, 2, 1, 3).reshape(packed.shape[0] * tile_k, packed.shape[1] * tile_n)


def quantize(weights: np.ndarray, dtype: str, group: int = DEFAULT_GROUP) -> tuple[np.ndarray, np.ndarray]:
    """float [K, N], K a multiple of the group -> codes, scales: a group's largest magnitude is the type's largest."""
    form = tile_type(dtype)
    if not form.narrow:
        raise InputError(f"{dtype} is no type of 1 to 8 bits")
    if form.kind == "uint" and (weights < 0).any():
        raise InputError(f"{dtype} has no negative numbers: take i{form.bits} or a float of {form.bits} bits")
    if not np.isfinite(weights).all():
        raise InputError(f"{dtype} cannot hold NaN or infinite values")
    grouped = np.asarray(weights, np.float32).reshape(-1, group, weights.shape[1])
    top = np.abs(grouped).max(axis=1) / np.float32(form.largest)
    with np.errstate(over="ignore"):
        scales = np.maximum(top, np.float32(2.0**-24)).astype(np.float16)  # a scale of zero has no quotient
    if not np.isfinite(scales).all():
        raise InputError(f"{dtype}: weights up to {np.abs(weights).max():.3g} need scales beyond float16")
    codes = form.encode(grouped / scales[:, None].astype(np.float32))
    return codes.reshape(weights.shape), scales


def round_activations(x: np.ndarray, group: int = DEFAULT_GROUP) -> tuple[np.ndarray, np.ndarray]:
    """float [M, K], K a multiple of the group -> int8 codes as uint8 [M, K], float32 scales [M, K / group]."""
    grouped = np.asarray(x, np.float32).reshape(len(x), -1, group)
    scales = np.abs(grouped).max(axis=2) * np.float32(1 / 127)
    codes = np.rint(grouped / np.maximum(scales, np.float32(1e-30))[:, :, None])
    return codes.astype(np.int8).view(np.uint8).reshape(x.shape), scales


def prepare(
    codes: np.ndarray,
    scales: np.ndarray,
    dtype: str,
    *,
    group: int = DEFAULT_GROUP,
    weight_tile: tuple[int, int] = WEIGHT_TILE,
    columns: int = 128,
) -> Weights:
    """Codes [K, N] and scales [K / group, N] in the stored form, filled with zeros to whole groups and `columns`."""
    k, n = codes.shape
    if group % weight_tile[0] or scales.shape != (-(-k // group), n) or not k or not n:
        raise InputError(
            f"codes [{k}, {n}] in groups of {group}: a multiple of the tile's {weight_tile[0]}, with scales "
            f"[{-(-k // group)}, {n}], got {list(scales.shape)}"
        )
    if int(codes.max()) >> tile_type(dtype).bits:
        raise InputError(f"codes up to {codes.max()} do not fit {dtype}")
    more = ((0, -k % group), (0, -n % math.lcm(columns, weight_tile[1])))
    packed = pack_weights(np.pad(codes, more), dtype, weight_tile)
    held = np.ascontiguousarray(np.pad(scales.astype(np.float16), ((0, 0), more[1])))
    return Weights(dtype=dtype, shape=(k, n), group=group, weight_tile=weight_tile, packed=packed, scales=held)


def encode(weights: np.ndarray, dtype: str, group: int = DEFAULT_GROUP) -> Weights:
    """float [K, N] -> Weights: `quantize` and `prepare`."""
    if weights.ndim != 2:
        raise InputError(f"weights are a matrix [K, N], got shape {list(weights.shape)}")
    filled = np.pad(np.asarray(weights, np.float32), ((0, -weights.shape[0] % group), (0, 0)))
    codes, scales = quantize(filled, dtype, group)
    made = prepare(codes, scales, dtype, group=group)
    return replace(made, shape=(int(weights.shape[0]), int(weights.shape[1])))
