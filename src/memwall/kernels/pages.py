"""Pages of coded blocks: tokens come one by one, and attention reads the codes where they lie.

A page holds `page_tokens` tokens (a power of two, 32 at least) of every layer that it is made for. One layer of a
page is `form.layer_bytes` long: key blocks of 16 tokens, whose codes have a scale and a minimum for each channel, and
value blocks of 32 tokens, whose codes have them for each token and group of channels; both in float16. A value is coded
when it comes. Keys wait until 16 are there, in int8 rows of `elementwise.store_int8` that begin where their block will
be; so nothing lies outside of the page, and a page can be copied at any moment.

pool: uint8 [pages, page bytes]; offset: where the layer begins in each page, a multiple of 4; table: int32, the page of
every `page_tokens` tokens. k, v, q and outputs are float32 [tokens, heads, D].
"""

from __future__ import annotations

from functools import cache

import numpy as np

from memwall import _native
from memwall._native import PageForm

__all__ = [
    "PageForm",
    "attend_pages",
    "attend_pages_sequences",
    "attend_pages_shared",
    "cut_page",
    "page_form",
    "read_pages",
    "store_pages",
]


@cache
def page_form(kv_heads: int, head_dim: int, *, page_tokens: int, bits: int = 4, group: int) -> PageForm:
    """How a layer lies in its pages. bits: 2, 3 or 4; group: channels of a value that share a scale, a divisor of
    head_dim.
    """
    return _native.page_form(kv_heads, head_dim, page_tokens, bits, group)


def store_pages(
    form: PageForm, pool: np.ndarray, offset: int, k: np.ndarray, v: np.ndarray, places: np.ndarray
) -> None:
    """Rows i of k and v [n, Hkv, D] become token `places[i] % page_tokens` of page `places[i] // page_tokens` (int64).

    A page's tokens come in order. One that comes again is the newest from then on: if its block was full, the keys
    before it in that block wait again, as their codes have them. What a page holds does not depend on the pieces that
    tokens came in, but for that.
    """
    _native.store_pages(form, pool, offset, k, v, places)


def cut_page(form: PageForm, pool: np.ndarray, offset: int, page: int, tokens: int) -> None:
    """The layer of a page holds its first `tokens` tokens from now on."""
    _native.cut_page(form, pool, offset, page, tokens)


def attend_pages(
    form: PageForm,
    pool: np.ndarray,
    offset: int,
    q: np.ndarray,
    table: np.ndarray,
    *,
    length: int,
    scale: float,
    first_position: int,
    window: int | None = None,
    out: np.ndarray,
    fresh: tuple[np.ndarray, np.ndarray] | None = None,
    stats: np.ndarray | None = None,
) -> np.ndarray:
    """As `attention.attend_paged`, over the first `length` tokens of a table.

    fresh: keys and values of the last of these tokens, which are not in the pages yet and are attended to as they are.
    """
    k, v = fresh if fresh is not None else (None, None)
    _native.attend_pages(form, pool, offset, q, k, v, table, length, out, scale, first_position, window, stats)
    return out


def attend_pages_sequences(
    form: PageForm,
    pool: np.ndarray,
    offset: int,
    q: np.ndarray,
    tables: np.ndarray,
    lengths: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    out: np.ndarray,
) -> np.ndarray:
    """As `attention.attend_paged_sequences`: one query of each of B sequences, its last token."""
    _native.attend_pages_sequences(form, pool, offset, q, tables, lengths, out, scale, window)
    return out


def attend_pages_shared(
    form: PageForm,
    pool: np.ndarray,
    offset: int,
    q: np.ndarray,
    tables: np.ndarray,
    own: np.ndarray,
    prefixes: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    out: np.ndarray,
) -> np.ndarray:
    """As `attention.attend_shared`: rows of sequences of which some go on from keys that others share."""
    _native.attend_pages_shared(form, pool, offset, q, tables, own, prefixes, out, scale, window)
    return out


def read_pages(
    form: PageForm, pool: np.ndarray, offset: int, table: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values float32 [length, Hkv, D] of a table's first `length` tokens, as they are held."""
    shape = (length, form.kv_heads, form.head_dim)
    k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
    _native.read_pages(form, pool, offset, table, k, v)
    return k, v
