"""Attention on the CPU: over full-precision rows, over KIVI-coded ones, and over heads that hold different tokens.

Shapes: T query tokens, H query heads, Hkv key-value heads (a divisor of H), D numbers a head, S cached tokens. Keys,
and queries with them, may be narrower than values: Dk numbers a head, any width. Queries and what comes out are
float32; rows of a cache may be float32, float16 or bfloat16, and, but for heads of different lengths and beside coded
tokens, int8 of `elementwise.store_int8`, whose heads are two bytes longer than D.
Query i sits at position `first_position + i`, cached token j at `key_start + j`; a query sees the keys at or before its
own position and, with a window, the last `window` of them. `stats[T, H, 2]` receives the largest logit and the sum of
exponentials relative to it: what `merge_partials` needs to join attentions over pieces of a cache that are held apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

import memwall._native as _native
from memwall._native import Program

__all__ = [
    "attend_float",
    "attend_kivi",
    "attend_paged",
    "attend_paged_sequences",
    "attend_ragged",
    "attend_scattered",
    "attend_shared",
    "kivi_block_bytes",
    "kivi_decode_keys",
    "kivi_decode_values",
    "kivi_encode_keys",
    "kivi_encode_values",
    "kivi_key_block_bytes",
    "merge_partials",
    "paired_prompt_tokens",
    "predict_attention_scratch_bytes",
    "record_attend_next",
]

VALUE_BLOCK_TOKENS = 32
"""Tokens of a KIVI value block; a key block has one group of tokens."""


def attend_float(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    first_position: int,
    window: int | None = None,
    key_start: int = 0,
    out: np.ndarray,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """q [T, H, Dk] over k [S, Hkv, Dk], v [S, Hkv, D] -> out [T, H, D]; k and v may be of less than float32, see above.

    Tokens may lie apart (rows of several layers in turn); a token's heads must lie beside each other.
    """
    _native.attend_float(q, _plain(k), _plain(v), out, scale, first_position, window, key_start, stats)
    return out


def record_attend_next(
    program: Program,
    q: np.ndarray,
    new_k: np.ndarray,
    new_v: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    place: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    out: np.ndarray,
) -> None:
    """Adds to a program: the key and value of a sequence's next token are stored, and its query attends.

    q [1, H, Dk], new_k [1, Hkv, Dk], new_v [1, Hkv, D] go to row place[0] of k, v [capacity, Hkv, ..], of any type that
    `attend_float` reads, and out [1, H, D] gets the attention over rows 0 .. place[0]. place: int64 [1], read whenever
    the program runs; IndexError then where it lies beyond the capacity.
    """
    program.attend_next(q, new_k, new_v, _plain(k), _plain(v), place, out, scale, window)


def attend_scattered(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    out: np.ndarray,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """`attend_float` of queries at any ascending `positions` [T] (int64) over keys whose first one is at position 0."""
    _native.attend_scattered(q, _plain(k), _plain(v), positions, out, scale, window, stats)
    return out


def attend_paged(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    table: np.ndarray,
    *,
    page_tokens: int,
    length: int,
    scale: float,
    first_position: int,
    window: int | None = None,
    out: np.ndarray,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """`attend_float` over pages anywhere in k, v [pages * page_tokens, Hkv, D]: token t is in page `table[t //
    page_tokens]` (int32); page_tokens a power of two from 16 on. The same code, with a table to walk.
    """
    _native.attend_paged(q, _plain(k), _plain(v), table, page_tokens, length, out, scale, first_position, window, stats)
    return out


def attend_paged_sequences(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    tables: np.ndarray,
    lengths: np.ndarray,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
    out: np.ndarray,
) -> np.ndarray:
    """`attend_paged` of one query of each of B sequences, its last token: q, out [B, H, D]; tables [B, pages] int32,
    lengths [B] int64. One parallel region for all; a sequence's sums do not depend on the others.
    """
    _native.attend_paged_sequences(q, _plain(k), _plain(v), tables, lengths, page_tokens, out, scale, window)
    return out


def attend_shared(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    tables: np.ndarray,
    own: np.ndarray,
    prefixes: np.ndarray,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
    out: np.ndarray,
) -> np.ndarray:
    """Rows of several sequences of which some go on from keys that others share: q, out [T, H, D], k and v as in
    `attend_paged`. A shared prefix is read once for all rows in one pass, as a product of matrices; its tasks and those
    of what each sequence has of its own are one list in one parallel region, the longest first; both are then joined by
    their maxima and sums.

    own, prefixes: int64 [pieces, 5] of (first row, rows, place of its table in `tables`, length, query_key): row i of a
    piece sees the first `query_key + i + 1` of the `length` tokens that its pages hold. Every row is in one piece of
    `own`, and in one of `prefixes` at most; one that sees all of a prefix says so with a query_key from length - 1 on.
    tables [pages] int32: page tables behind one another. With a window, query_key must be the row's place among the
    piece's keys, beyond their end for a prefix.

    Source: BatchLLM (Zheng 2024, arXiv 2412.03594), prefix-shared attention with horizontal fusion.
    """
    _native.attend_shared(q, k, v, tables, own, prefixes, page_tokens, out, scale, window)
    return out


def attend_kivi(
    q: np.ndarray,
    key_blocks: np.ndarray,
    value_blocks: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    coded_keys: int,
    coded_values: int,
    bits: int,
    group: int,
    key_group: int | None = None,
    integers: bool = False,
    scale: float,
    first_position: int,
    window: int | None = None,
    key_start: int = 0,
    out: np.ndarray,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """Attention over coded tokens followed by exact ones, on the coded form.

    key_blocks, value_blocks: uint8, as `kivi_encode_keys` and `kivi_encode_values` fill them; the first `coded_keys`
    keys and `coded_values` values are read from there, the rest from the rows of k and v, which start where these end.
    key_group: tokens of a key block; None for as many as a value's group has channels. integers: where codes have 2 or
    4 bits, q times a key block's scales, and shares times a value block's, are rounded to 8 bits, with a step for each
    head and block, and their products with codes summed as integers.
    """
    _native.attend_kivi(
        q, key_blocks, value_blocks, coded_keys, coded_values, _plain(k), _plain(v), out, bits, group,
        group if key_group is None else key_group, integers, scale, first_position, window, key_start, stats,
    )  # fmt: skip
    return out


def attend_ragged(
    q: np.ndarray,
    past_k: np.ndarray,
    past_v: np.ndarray,
    offsets: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    first_query: int,
    out: np.ndarray,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """Attention over heads of different lengths, and a tail k, v [S, Hkv, D] that all of them share.

    past_k, past_v [rows, D]: head h has the rows offsets[h] .. offsets[h + 1] (int64 [Hkv + 1]), which every query
    sees. Query i sees the tail up to its token `first_query + i`.
    """
    _native.attend_ragged(
        q, _plain(past_k), _plain(past_v), offsets, _plain(k), _plain(v), out, scale, first_query, stats
    )
    return out


def paired_prompt_tokens() -> int:
    """Tokens of a prompt from which on, over rows of bfloat16, queries and the softmax's shares are rounded to bfloat16
    as well, since products of such pairs take half the time on this processor; 0 where none are. Sums stay float32.
    """
    return int(_native.paired_prompt_tokens())


def predict_attention_scratch_bytes(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tokens: int,
    *,
    threads: int | None = None,
    sequences: int = 1,
    shared_rows: int = 0,
) -> int:
    """What attention keeps between calls, over all threads, once it has seen `tokens` queries at once, so many
    `sequences` together, and `attend_shared` over so many rows.
    """
    held = _native.attention_scratch_bytes_for(
        num_heads, num_kv_heads, head_dim, tokens, threads or _native.num_threads(), sequences, shared_rows
    )
    return int(held)


def merge_partials(outs: Sequence[np.ndarray], stats: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Joins attentions of the same queries over disjoint keys: (out, stats) of all keys together.

    A piece in which a query saw no key carries the sum 0 and adds nothing.
    """
    all_stats = np.stack(list(stats))
    peaks, sums = all_stats[..., 0], all_stats[..., 1]
    peak = np.max(np.where(sums > 0, peaks, -np.inf), axis=0)
    with np.errstate(invalid="ignore"):
        weights = np.where(sums > 0, sums * np.exp(peaks - peak), 0.0)
    total = weights.sum(axis=0)
    out = np.einsum("pth,pthd->thd", weights, np.stack(list(outs))) / np.where(total > 0, total, 1.0)[..., None]
    return out.astype(np.float32), np.stack([peak, total], axis=-1).astype(np.float32)


@cache
def kivi_block_bytes(bits: int, group: int, head_dim: int, key_dim: int | None = None) -> tuple[int, int]:
    """Bytes of one key-value head's key block (`group` tokens) and value block (`VALUE_BLOCK_TOKENS` tokens).

    key_dim: channels of a key where some were dropped.
    """
    key, value = _native.kivi_block_bytes(bits, group, head_dim, head_dim if key_dim is None else key_dim)
    return int(key), int(value)


def kivi_key_block_bytes(bits: int, tokens: int, key_dim: int) -> int:
    """Bytes of one key-value head's block of `tokens` keys, however wide values and their groups are."""
    return kivi_block_bytes(bits, tokens, tokens, key_dim)[0]


def kivi_encode_keys(k: np.ndarray, blocks: np.ndarray, *, bits: int, group: int) -> None:
    """Codes exact keys [n, Hkv, Dk], n whole groups, into `blocks` from its start."""
    _native.kivi_encode_keys(_plain(k), blocks, bits, group)


def kivi_encode_values(v: np.ndarray, first: int, blocks: np.ndarray, *, bits: int, group: int) -> None:
    """Codes exact values [n, Hkv, D] as tokens `first .. first + n` of `blocks`; those before keep their codes."""
    _native.kivi_encode_values(_plain(v), first, blocks, bits, group)


def kivi_decode_keys(blocks: np.ndarray, first: int, out: np.ndarray, *, bits: int, group: int) -> np.ndarray:
    """Floats of coded keys `first .. first + n` into out [n, Hkv, D]."""
    _native.kivi_decode(True, blocks, first, out, bits, group)
    return out


def kivi_decode_values(blocks: np.ndarray, first: int, out: np.ndarray, *, bits: int, group: int) -> np.ndarray:
    """Floats of coded values `first .. first + n` into out [n, Hkv, D]."""
    _native.kivi_decode(False, blocks, first, out, bits, group)
    return out


def _plain(rows: np.ndarray) -> np.ndarray:
    """bfloat16 is unknown to NumPy itself: its bits travel as uint16."""
    if rows.dtype.kind != "V":  # a name costs microseconds, this nothing
        return rows
    return rows.view(np.uint16) if rows.dtype.name == "bfloat16" else rows
