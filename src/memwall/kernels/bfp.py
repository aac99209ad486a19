"""Attention over keys and values in block floating point, on the coded form, and the coding itself.

A block of numbers shares an exponent E of 8 bits; a signed mantissa m of p bits stands for m * 2^(E - p + 2).
A coded key is one head's D channels of one token, put in the head's own order before they are cut into blocks: queries
are put in it too, so that any order gives the same logits. Values have blocks along channels (`by_token`), or along
tokens of one channel, which is the direction in which attention sums them.

Shapes: as in `kernels.attention`; D a multiple of 32 and of the block. Buffers are flat uint8: units of TOKENS tokens
(values with blocks along tokens: of `block` tokens), in each head by head, codes and then exponents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import memwall._native as _native
from memwall.kernels.attention import _plain

TOKENS = 16
"""Tokens whose codes lie together. They are coded one by one all the same, and no byte belongs to two."""
BITS = (3, 4, 6, 8)
BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class BfpForm:
    """bits, value_bits: of a mantissa, sign included; block: numbers that share an exponent; by_token: see above;
    raise_top: a block whose largest number rounds up to 2^(p - 1) takes the next exponent, in place of cutting it.
    """

    bits: int = 4
    value_bits: int = 4
    block: int = 32
    by_token: bool = True
    raise_top: bool = False

    @property
    def value_tokens(self) -> int:
        """Tokens of a unit of values."""
        return TOKENS if self.by_token else self.block

    def key_bytes(self, head_dim: int) -> int:
        """Bytes of a unit of one head's keys."""
        return TOKENS * (self.bits * head_dim // 8 + head_dim // self.block)

    def value_bytes(self, head_dim: int) -> int:
        """Bytes of a unit of one head's values."""
        exponents = TOKENS * (head_dim // self.block) if self.by_token else head_dim
        return self.value_tokens * self.value_bits * head_dim // 8 + exponents


def attend_bfp(
    q: np.ndarray,
    key_blocks: np.ndarray,
    value_blocks: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    form: BfpForm,
    order: np.ndarray | None,
    coded_keys: int,
    coded_values: int,
    scale: float,
    first_position: int,
    window: int | None = None,
    out: np.ndarray,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """q [T, H, D] float32 over coded tokens followed by exact ones k, v -> out [T, H, D] float32.

    order: int16 [Hkv, D], the channel at each place of a coded key. One query at a time multiplies integers: it is
    brought into blocks with mantissas of 8 bits. Several meet the keys in float.
    """
    _native.attend_bfp(
        q, key_blocks, value_blocks, coded_keys, coded_values, _plain(k), _plain(v), order, out, form.bits,
        form.value_bits, form.block, form.by_token, scale, first_position, window, stats,
    )  # fmt: skip
    return out


def encode_keys(
    rows: np.ndarray, first: int, blocks: np.ndarray, form: BfpForm, order: np.ndarray | None = None
) -> None:
    """Codes keys [n, Hkv, D] as tokens `first .. first + n` of `blocks`; those before keep their codes."""
    _native.bfp_encode(True, _plain(rows), first, blocks, order, form.bits, form.block, form.by_token, form.raise_top)


def encode_values(rows: np.ndarray, first: int, blocks: np.ndarray, form: BfpForm) -> None:
    """The same for values; where blocks run along tokens, first and n are whole blocks."""
    bits, block = form.value_bits, form.block
    _native.bfp_encode(False, _plain(rows), first, blocks, None, bits, block, form.by_token, form.raise_top)


def decode_keys(
    coded: np.ndarray, first: int, out: np.ndarray, form: BfpForm, order: np.ndarray | None = None
) -> np.ndarray:
    """Floats of coded keys `first .. first + n` into out [n, Hkv, D], channels in their own places."""
    _native.bfp_decode(True, coded, first, out, order, form.bits, form.block, form.by_token)
    return out


def decode_values(coded: np.ndarray, first: int, out: np.ndarray, form: BfpForm) -> np.ndarray:
    """Floats of coded values `first .. first + n` into out [n, Hkv, D]."""
    _native.bfp_decode(False, coded, first, out, None, form.value_bits, form.block, form.by_token)
    return out
