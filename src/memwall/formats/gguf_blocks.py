"""GGUF's block types, and their numbers as group-wise integers of our own.

A row is cut in blocks of 32 or 256 values. Types with one half-precision scale (and minimum) per 32 values are our
integers in another order of bits: they carry over exactly. The K types of 256 values have small integer scales times
one of half precision; for groups of 32 (Q4_K, Q5_K) the product is rounded to half precision once, a relative error
below 2^-11. Q6_K has groups of 16, which no tile of ours has: it becomes 8-bit integers, whose own rounding is at most
a 256th of a group's range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from memwall.formats.base import Packed
from memwall.formats.bitpack import TILE_ROWS
from memwall.formats.integer import IntegerCodec

SLAB_VALUES = 1 << 20

Codes = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""uint8 codes [rows, columns]; float16 scales and minima [rows, groups], minima None for symmetric forms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One type. values, nbytes: of a block. spec: our form; codes: None where the form is rounded anew (`decode`)."""

    name: str
    values: int
    nbytes: int
    spec: str
    exact: bool
    codes: Callable[[np.ndarray], Codes] | None = None
    decode: Callable[[np.ndarray], np.ndarray]


def packed(block: Block, raw: np.ndarray) -> Packed:
    """A matrix of blocks, uint8 [rows, blocks, bytes], in our form; a slab of rows at a time."""
    rows, columns = raw.shape[0], raw.shape[1] * block.values
    form = IntegerCodec.parse(block.spec)
    buffers = {name: np.empty(shape, dtype) for name, (shape, dtype) in form.buffers((rows, columns)).items()}
    step = max(SLAB_VALUES // columns // TILE_ROWS, 1) * TILE_ROWS
    for first in range(0, rows, step):
        slab = raw[first : first + step]
        part = form.encode(block.decode(slab)) if block.codes is None else form.pack(*block.codes(slab))
        for name, buffer in part.buffers.items():
            buffers[name][first // TILE_ROWS : first // TILE_ROWS + len(buffer)] = buffer
    return Packed(spec=block.spec, shape=(rows, columns), buffers=buffers)


# -- pieces of blocks: raw uint8 [rows, blocks, bytes] ---------------------------------------------------------------


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    """float16 [rows, blocks] from bytes `at` and the next; -0.0 as 0.0, as our codec has it."""
    found: np.ndarray = np.ascontiguousarray(raw[..., at : at + 2]).view("<f2")[..., 0] + np.float16(0)
    return found


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2 n] codes: all low halves, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _flat(codes: np.ndarray) -> np.ndarray:
    """[rows, blocks, ...] -> [rows, all the rest]."""
    return np.ascontiguousarray(codes).reshape(len(codes), -1)


def _fifth_bits(raw: np.ndarray, at: int) -> np.ndarray:
    """[rows, blocks, 32]: 16 where the bit of a value is set in the four bytes from `at`."""
    return np.unpackbits(raw[..., at : at + 4], axis=-1, bitorder="little") << 4


def _q4_0(raw: np.ndarray) -> Codes:
    return _flat(_nibbles(raw[..., 2:])), _half(raw, 0), None


def _q4_1(raw: np.ndarray) -> Codes:
    return _flat(_nibbles(raw[..., 4:])), _half(raw, 0), _half(raw, 2)


def _q5_0(raw: np.ndarray) -> Codes:
    return _flat(_nibbles(raw[..., 6:]) | _fifth_bits(raw, 2)), _half(raw, 0), None


def _q5_1(raw: np.ndarray) -> Codes:
    return _flat(_nibbles(raw[..., 8:]) | _fifth_bits(raw, 4)), _half(raw, 0), _half(raw, 2)


def _q8_0(raw: np.ndarray) -> Codes:
    return _flat(raw[..., 2:] ^ 128), _half(raw, 0), None  # two's complement plus 128


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of a K block's eight groups, float16 [rows, 8 blocks].

    Twelve bytes hold eight pairs of 6 bits: the first four pairs lie whole in bytes 0-7; of the others the low halves
    are in bytes 8-11 and the two high bits on top of bytes 0-7.
    """
    a, b, c = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=-1)
    mins = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=-1)
    d, m = (_half(raw, at).astype(np.float32)[..., None] for at in (0, 2))
    return _flat((d * scales).astype(np.float16)), _flat((0.0 - m * mins).astype(np.float16))


def _q4_k(raw: np.ndarray) -> Codes:
    quads = raw[..., 16:].reshape(*raw.shape[:2], 4, 32)
    return _flat(_nibbles(quads)), *_k_scales(raw)


def _q5_k(raw: np.ndarray) -> Codes:
    quads = raw[..., 48:].reshape(*raw.shape[:2], 4, 32)
    high = raw[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # one bit of a byte for each group
    codes = _nibbles(quads).reshape(*raw.shape[:2], 8, 32) | high << 4
    return _flat(codes), *_k_scales(raw)


def _q6_k(raw: np.ndarray) -> np.ndarray:
    shape = raw.shape[:2]
    low = raw[..., :128].reshape(*shape, 2, 2, 32)  # of each half: 32 bytes, 32 bytes
    high = raw[..., 128:192].reshape(*shape, 2, 1, 32)
    quarters = np.concatenate([low & 15, low >> 4], axis=-2)
    codes = quarters | (high >> np.array([[0], [2], [4], [6]], np.uint8) & 3) << 4
    eighths = np.ascontiguousarray(raw[..., 192:208]).view(np.int8)
    scales = eighths * _half(raw, 208).astype(np.float32)[..., None]
    values = (codes.astype(np.float32) - 32).reshape(*shape, 16, 16) * scales[..., None]
    return _flat(values)


def _from_codes(spec: str, codes: Callable[[np.ndarray], Codes]) -> Callable[[np.ndarray], np.ndarray]:
    form = IntegerCodec.parse(spec)

    def decode(raw: np.ndarray) -> np.ndarray:
        found, scales, mins = codes(raw)
        grouped = found.reshape(len(found), -1, form.group)
        return np.asarray(form.dequantize(grouped, scales, mins)).reshape(found.shape)

    return decode


def _floats(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    def decode(raw: np.ndarray) -> np.ndarray:
        return _flat(raw).view(dtype)

    return decode


def _integers(name: str, nbytes: int, spec: str, codes: Callable[[np.ndarray], Codes], values: int = 32) -> Block:
    return Block(
        name=name, values=values, nbytes=nbytes, spec=spec, exact=values == 32, codes=codes,
        decode=_from_codes(spec, codes),
    )  # fmt: skip


def _float(name: str, spec: str, dtype: Any) -> Block:
    return Block(name=name, values=1, nbytes=np.dtype(dtype).itemsize, spec=spec, exact=True, decode=_floats(dtype))


BLOCKS: dict[int, Block] = {
    0: _float("F32", "float32", "<f4"),
    1: _float("F16", "float16", "<f2"),
    2: _integers("Q4_0", 18, "int4-g32", _q4_0),
    3: _integers("Q4_1", 20, "int4-g32-asym", _q4_1),
    6: _integers("Q5_0", 22, "int5-g32", _q5_0),
    7: _integers("Q5_1", 24, "int5-g32-asym", _q5_1),
    8: _integers("Q8_0", 34, "int8-g32", _q8_0),
    12: _integers("Q4_K", 144, "int4-g32-asym", _q4_k, 256),
    13: _integers("Q5_K", 176, "int5-g32-asym", _q5_k, 256),
    14: Block(name="Q6_K", values=256, nbytes=210, spec="int8-g32", exact=False, decode=_q6_k),
    30: _float("BF16", "bfloat16", ml_dtypes.bfloat16),
}
