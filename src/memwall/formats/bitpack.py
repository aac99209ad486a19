"""Codes of 1 to 8 bits to dense bytes and back, in two layouts.

*Rows*: one little-endian bit stream along the last axis, each row padded to whole bytes (code i of b bits holds the
bits [i*b, (i+1)*b) of the row). Written against the array API, so NumPy and torch arrays both work.

*Tiles*: 16 rows x `group` columns, cut in bit planes whose widths divide 8, in the order the kernels read them; the
stored form is the form that is computed with. A lane vector is 64 bytes: byte 4*r + c holds row r, column c of a
block of 16 rows x 4 columns. A unit of 32 columns has 8 such blocks; a plane of width w keeps them in w vectors,
vector p holding block p*(8/w) + i at the bits [w*i, w*(i+1)) of its bytes. The low bits of a code are in the first
plane.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import array_namespace

TILE_ROWS = 16
UNIT_COLUMNS = 32
BLOCK_COLUMNS = 4
LANE_BYTES = TILE_ROWS * BLOCK_COLUMNS

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def row_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one row of the row layout."""
    return (num_codes * bits + 7) // 8


def pack_rows(codes: Any, bits: int) -> Any:
    """uint8 codes [..., n] -> uint8 bit stream [..., ceil(n * bits / 8)]."""
    if bits == 8:
        return codes
    xp = array_namespace(codes)
    num_codes = codes.shape[-1]
    # eight codes fill `bits` whole bytes, whatever the width: one 64-bit word carries them
    eights = xp.reshape(_pad_last(xp, codes, -num_codes % 8), (*codes.shape[:-1], -(-num_codes // 8), 8))
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        parts = xp.reshape(eights, (*eights.shape[:-1], bits, per_byte))
        stream = parts[..., 0]
        for i in range(1, per_byte):
            stream = stream | (parts[..., i] << (i * bits))
    else:
        words = xp.astype(eights[..., 0], xp.int64)
        for i in range(1, 8):
            words = words | (xp.astype(eights[..., i], xp.int64) << (i * bits))
        stream = xp.stack([xp.astype((words >> (8 * k)) & 255, xp.uint8) for k in range(bits)], axis=-1)
    flat = xp.reshape(stream, (*codes.shape[:-1], stream.shape[-2] * bits))
    return flat[..., : row_bytes(num_codes, bits)]


def unpack_rows(stream: Any, num_codes: int, bits: int) -> Any:
    """uint8 bit stream [..., bytes] -> uint8 codes [..., num_codes]."""
    if bits == 8:
        return stream[..., :num_codes]
    xp = array_namespace(stream)
    leading = tuple(stream.shape[:-1])
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        codes = xp.stack([(stream >> shift) & mask for shift in range(0, 8, bits)], axis=-1)
        return xp.reshape(codes, (*leading, stream.shape[-1] * (8 // bits)))[..., :num_codes]
    num_eights = -(-num_codes // 8)
    padded = _pad_last(xp, stream, num_eights * bits - stream.shape[-1])
    parts = xp.astype(xp.reshape(padded, (*leading, num_eights, bits)), xp.int64)
    words = parts[..., 0]
    for k in range(1, bits):
        words = words | (parts[..., k] << (8 * k))
    codes = xp.stack([xp.astype((words >> (i * bits)) & mask, xp.uint8) for i in range(8)], axis=-1)
    return xp.reshape(codes, (*leading, num_eights * 8))[..., :num_codes]


def _pad_last(xp: Any, array: Any, num_zeros: int) -> Any:
    if num_zeros == 0:
        return array
    shape = (*array.shape[:-1], num_zeros)
    return xp.concat([array, xp.zeros(shape, dtype=array.dtype, device=_device(array))], axis=-1)


def contiguous(array: Any) -> Any:
    """The same array in C order, copied only where it is not."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.contiguous()


def _device(array: Any) -> Any:
    return None if isinstance(array, np.ndarray) else array.device


def matrix_shape(spec: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of what is to lie in tiles; InputError for anything but a matrix."""
    if len(shape) != 2:
        raise InputError(f"{spec} holds matrices [rows, cols], got shape {list(shape)}; {spec}-rows holds any shape")
    return shape[0], shape[1]


def pack_tiles(codes: np.ndarray, bits: int, group: int) -> np.ndarray:
    """uint8 codes [16 * row_tiles, groups * group] -> uint8 [row_tiles, groups, group / 32, 64 * bits]."""
    row_tiles, groups, units = codes.shape[0] // TILE_ROWS, codes.shape[1] // group, group // UNIT_COLUMNS
    blocks = codes.reshape(row_tiles, TILE_ROWS, groups, units, 8, BLOCK_COLUMNS).transpose(0, 2, 3, 4, 1, 5)
    lanes = np.ascontiguousarray(blocks).reshape(row_tiles, groups, units, 8, LANE_BYTES)
    packed = np.empty((row_tiles, groups, units, bits, LANE_BYTES), np.uint8)
    low = 0
    for width in PLANES[bits]:
        plane = ((lanes >> low) & ((1 << width) - 1)).reshape(row_tiles, groups, units, width, 8 // width, LANE_BYTES)
        vectors = packed[:, :, :, low : low + width]
        vectors[...] = plane[:, :, :, :, 0]
        for i in range(1, 8 // width):
            vectors |= plane[:, :, :, :, i] << (width * i)
        low += width
    return packed.reshape(row_tiles, groups, units, bits * LANE_BYTES)


def unpack_tiles(packed: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Inverse of `pack_tiles`: uint8 codes [16 * row_tiles, groups * group]."""
    row_tiles, groups, units = packed.shape[:3]
    vectors = packed.reshape(row_tiles, groups, units, bits, LANE_BYTES)
    lanes = np.zeros((row_tiles, groups, units, 8, LANE_BYTES), np.uint8)
    low = 0
    for width in PLANES[bits]:
        plane = lanes.reshape(row_tiles, groups, units, width, 8 // width, LANE_BYTES)
        for i in range(8 // width):
            part = (vectors[:, :, :, low : low + width] >> (width * i)) & ((1 << width) - 1)
            plane[:, :, :, :, i] |= part << low
        low += width
    blocks = lanes.reshape(row_tiles, groups, units, 8, TILE_ROWS, BLOCK_COLUMNS).transpose(0, 4, 1, 2, 3, 5)
    return np.ascontiguousarray(blocks).reshape(row_tiles * TILE_ROWS, groups * group)
