"""Rows kept in few bits, and attention over keys and values that exist for one block of tokens only.

A code q stands for (q - z) * s: a float16 scale s and a one-byte zero point z for each group, which runs along the
channels of one token or along the tokens of one channel. Shapes: rows [tokens, width] float32; records are bytes, one
record a token, or `group` tokens where groups run along tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memwall import _native
from memwall._native import LatentPart, LatentStore, latent_part

__all__ = [
    "MOST_TOKENS",
    "LatentPart",
    "LatentStore",
    "attend_block",
    "attend_parts",
    "decode_rows",
    "encode_rows",
    "finish_parts",
    "latent_part",
    "record_bytes",
]

MOST_TOKENS = 512
"""Tokens of one block of `attend_block`."""


def record_bytes(width: int, bits: int, group: int, *, along_tokens: bool) -> int:
    """Bytes of one record: its codes, then scales, then zero points."""
    codes = -(-width // 8) * bits
    return group * codes + 3 * width if along_tokens else codes + 3 * -(-width // group)


def encode_rows(
    rows: np.ndarray, records: np.ndarray, *, bits: int, group: int, along_tokens: bool, zero_inside: bool
) -> None:
    """Codes rows (whole groups, where these run along tokens) into the front of `records` (uint8).

    zero_inside: zero points are codes themselves, 0 .. 2^bits - 1, so a group's range is widened to hold zero; else
    they reach beyond, and groups far from zero keep a fine grid.
    """
    _native.latent_encode(rows, records, bits, group, along_tokens, zero_inside)


def decode_rows(
    records: np.ndarray,
    first: int,
    out: np.ndarray,
    *,
    bits: int,
    group: int,
    along_tokens: bool,
    zero_inside: bool,
) -> np.ndarray:
    """Rows `first .. first + n` of `records` into out [n, width]."""
    _native.latent_decode(records, first, out, bits, group, along_tokens, zero_inside)
    return out


def attend_block(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    stats: np.ndarray,
    *,
    scale: float,
    first_key: int = -(1 << 40),
) -> None:
    """Adds one block's share to a running attention: q [T, H, D] over k [S, Hkv, D], v [S, Hv, w] into out [T, H, w].

    v has a row for each key-value head, or one (Hv = 1) that all heads share. out holds sums not yet divided and
    stats [T, H, 2] the largest logit and the sum of exponentials so far; a sum of 0 starts anew. Query i sees the keys
    from place `first_key + i` of the block on.
    """
    _native.latent_attend(q, k, v, out, stats, scale, first_key)


def attend_parts(
    parts: Sequence[LatentPart],
    q: np.ndarray,
    places: np.ndarray,
    stats: np.ndarray,
    begin: int,
    table: tuple[np.ndarray, np.ndarray],
    *,
    scale: float,
) -> None:
    """For one query each of several caches, q [n, H, D]: rebuilds the keys of tokens `begin` (where a block begins) and
    on, as many as `table` has cos and sin for [tokens, D / 2], and adds what the queries find there to their parts'
    sums. places: int64 [n, 4] of coded keys and values, tokens, and the first one that the query sees. stats [n, H, 2]:
    as in `attend_block`; zeros at first.

    What a part finds is to the bit what it finds alone, or in `attend_block` block after block.
    """
    _native.attend_latent_parts(parts, q, places, stats, begin, *table, scale)


def finish_parts(parts: Sequence[LatentPart], stats: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Divides the sums and applies the matrices of values to them, which gives out [n, H, D]."""
    _native.finish_latent_parts(parts, stats, out)
    return out
