"""MARLIN's packed form of 4-bit weights: what the tensor cores of a GPU read with one 16-byte load a thread.

Source: "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models" (Elias Frantar, 2024,
arXiv 2408.11743), section 3; official code: github.com/IST-DASLab/marlin (Apache-2.0), whose bytes these are.

Idea: weights are put, once and offline, into the order in which the 32 threads of a warp hold them as operands of the
m16n8k16 instruction, so that no thread ever shuffles; nibbles are interleaved such that one mask gives the two codes of
one 32-bit register of half floats, and an integer becomes a half float by one logic operation and one arithmetic one:
code v in the low bits of 0x6400 (1024) reads as 1024 + v, in the next four as 1024 + 16 v.

Units and shapes: codes q [K, N] uint8, K inputs and N outputs, value = s (q - 8); packed B int32 [K/16, 2 N]; scales s
float16 [groups, N], groups of 128 inputs (or one of all K), stored in the order in which fragments meet them.
Differs from the paper: nothing known of the layout; `marlin_model` says what the NumPy form of the kernel leaves out.
Cost: K N / 2 bytes, and 2 N per group: 4.125 bits per weight in groups of 128.
Holds when: K is a multiple of 128 and N of 256 (64 for packing alone); 4 bits, symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec

TILE, FRAGMENT_COLUMNS, THREADS, WORDS = 16, 64, 32, 4
GROUP = 128
K_MULTIPLE, N_MULTIPLE = 128, 256
"""What the published kernel asks of a matrix."""
ZERO = 8

MASK_LOW, MASK_HIGH, EXPONENT = np.uint32(0x000F000F), np.uint32(0x00F000F0), np.uint32(0x64006400)
LOW_OFFSET, HIGH_FACTOR, HIGH_OFFSET = np.float16(1032), np.float16(1 / 16), np.float16(-72)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarlinWeight:
    """words int32 [K/16, 2 N]; scales float16 [groups, N] in stored order. group: inputs of a scale, K for one."""

    words: np.ndarray
    scales: np.ndarray
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.words.shape[0] * TILE, self.words.shape[1] // 2

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.words.nbytes + self.scales.nbytes


# -- codes -----------------------------------------------------------------------------------------------------------


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """uint8 codes [K, N] of 0 to 15 -> int32 [K/16, 2 N].

    A row of a tile is 8 half + 2 pair + low, a column 8 block + c; thread 4 c + pair of 32 takes, in each of four tiles
    side by side, the eight codes of its c and pair. Nibble 4 low + 2 block + half (0 is least significant) holds one.
    """
    size_k, size_n = _fragments(codes.shape)
    if codes.size and int(codes.max()) > 15:
        raise InputError(f"MARLIN packs 4-bit codes, got a code of {int(codes.max())}")
    parts = codes.reshape(size_k // TILE, 2, 4, 2, size_n // FRAGMENT_COLUMNS, WORDS, 2, 8)
    # [k tile, half, pair, low, n, word, block, c] -> [k tile, n, c, pair, word, low, block, half]
    nibbles = np.ascontiguousarray(parts.transpose(0, 4, 7, 2, 5, 3, 6, 1)).reshape(size_k // TILE, 2 * size_n, 4, 2)
    pairs = np.ascontiguousarray(nibbles[..., 0] | nibbles[..., 1] << 4)
    return pairs.view("<i4").reshape(size_k // TILE, 2 * size_n)


def unpack_codes(words: np.ndarray) -> np.ndarray:
    """Inverse of `pack_codes`: uint8 [K, N]."""
    tiles, size_n = words.shape[0], words.shape[1] // 2
    _fragments((tiles * TILE, size_n))
    pairs = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1)
    parts = nibbles.reshape(tiles, size_n // FRAGMENT_COLUMNS, 8, 4, WORDS, 2, 2, 2)
    return np.ascontiguousarray(parts.transpose(0, 7, 3, 5, 1, 4, 6, 2)).reshape(tiles * TILE, size_n)


def _fragments(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or shape[0] % TILE or shape[1] % FRAGMENT_COLUMNS:
        raise InputError(
            f"MARLIN packs [K, N] with K a multiple of {TILE} and N of {FRAGMENT_COLUMNS}, got {list(shape)}"
        )
    return shape[0], shape[1]


# -- scales ----------------------------------------------------------------------------------------------------------


def permute_scales(scales: np.ndarray) -> np.ndarray:
    """float16 [groups, N] by column -> the stored order: N by 64 at a time, or by 32 where there is one group of all.

    Grouped scales are multiplied into fragments, of which a thread has columns c, c + 8, c + 16...; a scale per column
    is multiplied into results, of which it has columns 2 i, 2 i + 1 and those 8, 16 and 24 on.
    """
    groups, size_n = scales.shape
    if groups > 1:
        parts = scales.reshape(groups, _blocks(size_n, 64), 8, 8).transpose(0, 1, 3, 2)
    else:
        parts = scales.reshape(groups, _blocks(size_n, 32), 4, 4, 2).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(parts).reshape(groups, size_n)


def restore_scales(stored: np.ndarray) -> np.ndarray:
    """Inverse of `permute_scales`: the order of the columns. Both are exchanges of two axes, so each undoes itself."""
    return permute_scales(stored)


def _blocks(size_n: int, block: int) -> int:
    if size_n % block:
        raise InputError(f"MARLIN's scales are permuted {block} columns at a time; N is {size_n}")
    return size_n // block


# -- whole matrices --------------------------------------------------------------------------------------------------


def pack(codes: np.ndarray, scales: np.ndarray) -> MarlinWeight:
    """Codes uint8 [K, N] and scales [groups, N], in the order of the columns -> the published bytes."""
    groups, size_k = len(scales), codes.shape[0]
    if groups < 1 or scales.shape[1:] != codes.shape[1:] or size_k % max(groups, 1) or size_k // groups % TILE:
        raise InputError(
            f"scales {list(scales.shape)} do not go with codes {list(codes.shape)}: [groups of K, N] would"
        )
    half = np.asarray(scales, np.float16)
    return MarlinWeight(words=pack_codes(codes), scales=permute_scales(half), group=size_k // groups)


def unpack(weight: MarlinWeight) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [K, N] and scales float16 [groups, N], in the order of the columns."""
    return unpack_codes(weight.words), restore_scales(weight.scales)


def decode(weight: MarlinWeight) -> np.ndarray:
    """float32 [K, N]: s (q - 8)."""
    codes, scales = unpack(weight)
    return (codes.astype(np.float32) - ZERO) * np.repeat(scales.astype(np.float32), weight.group, axis=0)


def from_packed(packed: Packed) -> MarlinWeight:
    """Symmetric 4-bit integers [rows, cols] of `formats.integer` in MARLIN's form: K = cols, N = rows, the same codes.

    InputError for other forms, and for sizes that MARLIN has no tiles for.
    """
    form = codec(packed.spec)
    if not isinstance(form, IntegerCodec) or form.bits != 4 or not form.symmetric:
        raise InputError(f"{packed.spec} is not MARLIN's: symmetric 4-bit integers such as int4-g128 are")
    cols = packed.shape[1]
    if cols % form.group:
        raise InputError(f"{packed.spec} of {cols} columns: MARLIN's last group is a whole one")
    codes, scales, _ = form.unpack(packed)
    return pack(np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T))


def to_packed(weight: MarlinWeight) -> Packed:
    """The same numbers in the tiles that the CPU reads, groups of 128 at most (a larger group's scale is repeated)."""
    group = next((size for size in (GROUP, 64, 32) if weight.group % size == 0), None)
    if group is None:
        raise InputError(f"MARLIN groups of {weight.group} inputs: tiles have groups of 32, 64 or 128")
    codes, scales = unpack(weight)
    form = codec(f"int4-g{group}")
    assert isinstance(form, IntegerCodec)
    repeated = np.repeat(scales.T, weight.group // group, axis=1)
    return form.pack(np.ascontiguousarray(codes.T), repeated)


# -- from integers to half floats ------------------------------------------------------------------------------------


def dequantize_words(words: np.ndarray) -> np.ndarray:
    """int32 words [...] -> float16 [..., 2, 4]: by block of 8 columns, four codes of each less 8, by bit operations.

    Two logic operations and two arithmetic ones on pairs for a half word of four codes, as the GPU does it: the pairs
    are the rows (2 pair, 2 pair + 1) and those 8 on.
    """
    bits = np.ascontiguousarray(words).view(np.uint32)
    blocks = []
    for shift in (0, 8):
        moved = bits >> np.uint32(shift)
        low = np.ascontiguousarray(moved & MASK_LOW | EXPONENT)[..., None].view(np.float16) - LOW_OFFSET
        high = np.ascontiguousarray(moved & MASK_HIGH | EXPONENT)[..., None].view(np.float16)
        # a fused multiply-add on the GPU; here the product is exact, so that two roundings are one
        blocks.append(np.concatenate([low, high * HIGH_FACTOR + HIGH_OFFSET], axis=-1))
    return np.stack(blocks, axis=-2)
