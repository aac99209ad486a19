"""Weights as planes of +1 and -1, for products of any widths by exclusive or and population count.

*Source*: Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores (Ma, 2024, arXiv
2409.17870), sections 3 and 4; its follow-up APT-LLM (arXiv 2508.19087).

*Idea*: a bit of n means -1 or +1, so a number is the sum of (2 bit - 1) 2^i: an odd integer from -(2^n - 1) to
2^n - 1, symmetric, without zero, with no plane unlike the others. A product of an n-bit and an m-bit matrix is then
n x m products of single bits, cols - 2 popcount(w xor x), weighted by 2^(i+j); hardware that only compares bits
multiplies any pair of widths, at a cost that grows with n x m.

*Units and shapes*: `w3a4` keeps weights [rows, cols] in 3 bits and rounds activations to 4 when it multiplies. `words`
uint64 [rows, n, ceil(cols / 64)], bit k of a word is column 64 word + k, padding bits are 0; `scales` float32 [rows]:
value = scale (2 code - 2^n + 1). `w3a4-g64` has a scale for every word instead, float16 [rows, ceil(cols / 64)], and
one for every 64 activations of a token, which few bits need: the sum of a word leaves the integers and is added up in
float32, in eight sums (word w in the w mod 8th) that are then added in pairs of the first and second half.

*Differs from the paper*: words of 64 bits instead of 32, planes of a row side by side instead of stacked over the whole
matrix (a processor walks a row's planes together; a tensor core wants them stacked). The activation quantizer, which
the paper leaves open, is the weights' own, a scale per token. The kernel for GPUs (1-bit matrix instructions) is not
here.

*Cost*: bytes: rows x (n x ceil(cols / 64) x 8 + 4), in groups rows x ceil(cols / 64) x (8 n + 2). Moved per product:
those, and m / 8 per activation. Work: rows x cols x tokens x n x m bit products. The sums of planes never leave
registers; kept apart they would be 4 n m bytes per result.

*Holds when*: cols (2^n - 1)(2^m - 1) < 2^31, so that sums fit in 32 bits: 33,000 columns at eight by eight bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32

WORD_BITS = 64
_SPEC = re.compile(r"w(?P<weights>[0-9]+)a(?P<activations>[0-9]+)(?P<grouped>-g64)?")
_ROWS_AT_ONCE = 256


def codes_of(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., cols] -> codes uint8 of that shape and scales float32 [...]: nearest odd multiples of the scale.

    scale = max|row| / (2^bits - 1); a row of zeros has scale 0. InputError for numbers that are not finite.
    """
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{bits}-bit planes cannot hold NaN or infinite values")
    scales = np.max(np.abs(values), axis=-1, initial=0) / np.float32((1 << bits) - 1)
    return codes_with(values, bits, scales), scales


def codes_with(values: np.ndarray, bits: int, scales: np.ndarray) -> np.ndarray:
    """Codes uint8 [..., cols] of float32 values, the nearest odd multiples of scales float32 [...]."""
    inverse = np.divide(np.float32(0.5), scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.floor(values * inverse[..., None] + np.float32(1 << (bits - 1)))
    return np.asarray(np.clip(codes, 0, (1 << bits) - 1)).astype(np.uint8)


def in_groups(values: np.ndarray) -> np.ndarray:
    """float32 [rows, cols] -> [rows, ceil(cols / 64), 64], zeros behind the last column."""
    rows, cols = values.shape
    padded = np.zeros((rows, -(-cols // WORD_BITS) * WORD_BITS), np.float32)
    padded[:, :cols] = values
    return padded.reshape(rows, -1, WORD_BITS)


def integers_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes -> the odd integers that they stand for, int64."""
    return 2 * codes.astype(np.int64) - ((1 << bits) - 1)


def codes_of_signed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Two's complement integers q of `bits` bits -> codes of the bipolar integers 2 q + 1, which lose nothing:

    scale q + zero = (scale / 2)(2 q + 1) + (zero - scale / 2), so that products differ by a row sum of the other side.
    """
    half = 1 << (bits - 1)
    integers = np.asarray(integers)
    if integers.size and not -half <= int(integers.min()) <= int(integers.max()) < half:
        raise InputError(f"integers of {bits} bits lie between {-half} and {half - 1}")
    return (integers.astype(np.int64) + half).astype(np.uint8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [rows, cols] -> planes uint64 [rows, bits, ceil(cols / 64)]."""
    rows, cols = codes.shape
    padded = np.zeros((rows, -(-cols // WORD_BITS) * WORD_BITS), np.uint8)
    padded[:, :cols] = codes
    planes = (padded[:, None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return np.packbits(planes, axis=-1, bitorder="little").view("<u8").astype(np.uint64, copy=False)


def unpack(words: np.ndarray, cols: int) -> np.ndarray:
    """Planes -> codes uint8 [rows, cols]."""
    bits = np.unpackbits(np.ascontiguousarray(words, "<u8").view(np.uint8), axis=-1, bitorder="little")[..., :cols]
    weights = (1 << np.arange(words.shape[1])).astype(np.uint8)
    return np.einsum("rbc,b->rc", bits, weights, dtype=np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitPlaneCodec(Codec):
    """Weights of 1 to 8 bipolar bits that multiply activations of 1 to 8; grouped: a scale for every 64 of both."""

    examples: ClassVar[tuple[str, ...]] = ("w1a1", "w1a8", "w2a4", "w3a3", "w5a6", "w8a8", "w2a2-g64", "w4a4-g64")

    weight_bits: int
    activation_bits: int
    grouped: bool = False

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weight_bits), ("activations", self.activation_bits)):
            if not 1 <= bits <= 8:
                raise InputError(f"{self.spec}: {what} take 1 to 8 bits, got {bits}")

    @classmethod
    def parse(cls, spec: str) -> BitPlaneCodec:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(
                f"unknown bit-plane format {spec!r}; write the widths of weights and activations, w3a4, or w3a4-g64 "
                "for scales by groups"
            )
        return cls(
            weight_bits=int(match["weights"]),
            activation_bits=int(match["activations"]),
            grouped=match["grouped"] is not None,
        )

    @property
    def spec(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}" + ("-g64" if self.grouped else "")

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        if len(shape) != 2:
            raise InputError(f"{self.spec} holds matrices, got shape {list(shape)}")
        groups = -(-shape[1] // WORD_BITS)
        scales = ((shape[0], groups), np.dtype(np.float16)) if self.grouped else (shape[:1], np.dtype(np.float32))
        return {"words": ((shape[0], self.weight_bits, groups), np.dtype(np.uint64)), "scales": scales}

    def encode(self, x: Any) -> Packed:
        values = real_float32(self.spec, x)
        buffers = {name: np.empty(shape, dtype) for name, (shape, dtype) in self.buffers(values.shape).items()}
        for row in range(0, len(values), _ROWS_AT_ONCE):
            part = slice(row, row + _ROWS_AT_ONCE)
            if self.grouped:
                codes, buffers["scales"][part] = self._group_codes(values[part])
            else:
                codes, buffers["scales"][part] = codes_of(values[part], self.weight_bits)
            buffers["words"][part] = pack(codes, self.weight_bits)
        return Packed(spec=self.spec, shape=values.shape, buffers=buffers)

    def _group_codes(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes of a slab and the float16 scales that they were chosen for; InputError where float16 has none."""
        groups = in_groups(values)
        _, scales = codes_of(groups, self.weight_bits)
        with np.errstate(over="ignore"):
            stored = scales.astype(np.float16)
        if np.isinf(stored).any():
            raise InputError(f"{self.spec}: a scale of {scales.max():g} does not fit in float16")
        codes = codes_with(groups, self.weight_bits, stored.astype(np.float32))
        return codes.reshape(len(values), -1)[:, : values.shape[1]], stored

    def decode(self, packed: Packed) -> np.ndarray:
        codes = unpack(packed.buffers["words"], packed.shape[1])
        scales = packed.buffers["scales"].astype(np.float32)
        scales = np.repeat(scales, WORD_BITS, axis=1)[:, : packed.shape[1]] if self.grouped else scales[:, None]
        return (integers_of(codes, self.weight_bits).astype(np.float32) * scales).reshape(packed.shape)
