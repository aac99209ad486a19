"""The next token of several caches at once: caches that lie apart, each of another length, in one call per layer.

A `CachePart` is one layer of one cache: rows for exact tokens, as many as may ever come, and blocks of codes, KIVI's or
block floating point, if there are any. It holds addresses, so it is made once. What a token needs to know of a cache
beside it are whole numbers, the rows of `places`: they are the same for all layers, and made once a step.

What a cache finds is to the bit what it finds by itself, whichever caches come with it and however many threads there
are: its tokens are cut and summed as `attention.attend_float` and `attention.attend_kivi` do it.

Shapes: n parts, one new token each; H query heads, Hkv key-value heads, D numbers a head; floats are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import memwall._native as _native
from memwall._native import CachePart
from memwall.kernels.bfp import BfpForm

__all__ = [
    "PLACES",
    "CachePart",
    "CodedForm",
    "append_parts",
    "attend_parts",
    "bfp_part",
    "coded_part",
    "encode_parts",
    "float_part",
    "join_pieces",
]

PLACES = 8
"""Numbers of a row of `places`: coded keys; coded values; the token of the blocks that they begin at; the first exact
row of keys, and of values; tokens in all; the last token, and the first one, that the query sees."""


def float_part(k: np.ndarray, v: np.ndarray) -> CachePart:
    """Rows [capacity, Hkv, D] of any type that `attention.attend_float` reads."""
    return CachePart(_plain(k), _plain(v))


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedForm:
    """How tokens are coded: as in `attention.attend_kivi`."""

    bits: int
    group: int
    key_group: int
    integers: bool = False


def coded_part(
    rows: tuple[np.ndarray, np.ndarray], blocks: tuple[np.ndarray, np.ndarray], form: CodedForm
) -> CachePart:
    """Keys and values each: rows [n, Hkv, D] for exact tokens, floats, and blocks, uint8, of all that may ever come."""
    k, v = map(_plain, rows)
    return CachePart.kivi(k, v, *blocks, form.bits, form.group, form.key_group, form.integers)


def bfp_part(
    rows: tuple[np.ndarray, np.ndarray], blocks: tuple[np.ndarray, np.ndarray], form: BfpForm, order: np.ndarray | None
) -> CachePart:
    """The same in block floating point; order: int16 [Hkv, D] as in `bfp.attend_bfp`, or None."""
    k, v = map(_plain, rows)
    return CachePart.floating(
        k, v, *blocks, order, form.bits, form.value_bits, form.block, form.by_token, form.raise_top
    )


def append_parts(parts: Sequence[CachePart], k: np.ndarray, v: np.ndarray, rows: np.ndarray) -> None:
    """Key and value i [n, Hkv, D] go to the rows [n, 2] (int64; of keys, of values) of part i."""
    _native.append_parts(parts, k, v, rows)


def attend_parts(
    parts: Sequence[CachePart],
    q: np.ndarray,
    places: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    out: np.ndarray,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of query i of q [n, H, D] over the tokens of part i that `places` [n, PLACES] (int64) tell of, into out
    [n, H, D]; stats [n, H, 2] as in `attention`. window: of the tokens that a query sees, the last so many.
    """
    _native.attend_parts(parts, q, places, out, scale, window, stats)
    return out


def encode_parts(parts: Sequence[CachePart], jobs: np.ndarray) -> None:
    """Codes exact tokens of each part. jobs: int64 [n, 6] of (first row, tokens, the token of the blocks that the first
    becomes) for keys, whole units of them, and the same for values; no tokens where there is nothing to do.
    """
    _native.encode_parts(parts, jobs)


def join_pieces(
    outs: np.ndarray, stats: np.ndarray, ends: np.ndarray, out: np.ndarray, joined: np.ndarray | None = None
) -> np.ndarray:
    """Joins attentions of the same query over tokens that lie apart: pieces `ends[i - 1] .. ends[i]` (int64 [n]) of
    outs [pieces, H, D] and stats [pieces, H, 2] are query i's, whose row of out [n, H, D] becomes what it finds in all
    of them; joined [n, H, 2] gets its stats.
    """
    _native.join_pieces(outs, stats, ends, out, joined)
    return out


def _plain(rows: np.ndarray) -> np.ndarray:
    """bfloat16 is unknown to NumPy itself: its bits travel as uint16."""
    return rows.view(np.uint16) if rows.dtype.name == "bfloat16" else rows
