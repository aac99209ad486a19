"""Pages of coded blocks: what they hold of tokens that come in pieces, and attention over them, on every processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.kernels import attention_reference, int8_rows, pages, store_int8

# Hkv, D, page tokens, group
FORMS = [(2, 32, 32, 32), (1, 48, 32, 16), (3, 64, 64, 64), (2, 128, 32, 64)]


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


class Pool:
    """Two layers in pages that lie anywhere; the second is used."""

    def __init__(self, kv_heads: int, dim: int, page_tokens: int, group: int, count: int = 12, seed: int = 0) -> None:
        self.form = pages.page_form(kv_heads, dim, page_tokens=page_tokens, group=group)
        self.offset = self.form.layer_bytes
        self.bytes = np.full((count, 2 * self.offset), 0xA5, np.uint8)
        self.table = np.random.default_rng(seed).permutation(count).astype(np.int32)

    def places(self, first: int, count: int, table: np.ndarray | None = None) -> np.ndarray:
        at, per = np.arange(first, first + count), self.form.page_tokens
        return (self.table if table is None else table)[at // per].astype(np.int64) * per + at % per

    def store(self, k: np.ndarray, v: np.ndarray, first: int) -> None:
        pages.store_pages(self.form, self.bytes, self.offset, k, v, self.places(first, len(k)))

    def read(self, length: int, table: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return pages.read_pages(self.form, self.bytes, self.offset, self.table if table is None else table, length)


def in_int8(x: np.ndarray) -> np.ndarray:
    return int8_rows(store_int8(x, np.arange(len(x)), np.empty((*x.shape[:2], x.shape[2] + 2), np.int8)))


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, **told: float | int | None) -> np.ndarray:
    return attention_reference.attend(*(torch.from_numpy(x) for x in (q, k, v)), **told)[0].numpy()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_held_is_near_what_came(isa: str, form: tuple[int, int, int, int]) -> None:
    kv_heads, dim, per, group = form
    rng, length = np.random.default_rng(1), 3 * per - 5
    k, v = rows(rng, length, kv_heads, dim), rows(rng, length, kv_heads, dim)
    k[:, 0, 3] += 40  # a channel of large numbers costs no other one
    pool = Pool(*form)
    pool.store(k, v, 0)
    keys, values = pool.read(length)
    whole = length // 16 * 16
    np.testing.assert_array_equal(keys[whole:], in_int8(k[whole:]))
    rounded = in_int8(k)[:whole].reshape(-1, 16, kv_heads, dim)
    step = (rounded.max(1) - rounded.min(1))[:, None] / 15
    off = np.abs(keys[:whole].reshape(rounded.shape) - rounded)
    assert (off <= 0.51 * step + 2e-3 * np.abs(rounded).max(1, keepdims=True)).all()
    grouped = v.reshape(length, kv_heads, dim // group, group)
    step = (grouped.max(-1) - grouped.min(-1))[..., None] / 15
    assert (np.abs(values.reshape(grouped.shape) - grouped) <= 0.51 * step + 4e-3).all()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_pieces_leave_the_same_bytes(cuts: list[int], seed: int) -> None:
    rng, length = np.random.default_rng(seed), sum(cuts)
    k, v = rows(rng, length, 2, 32), rows(rng, length, 2, 32)
    whole, cut = Pool(2, 32, 32, 32, seed=seed), Pool(2, 32, 32, 32, seed=seed)
    whole.store(k, v, 0)
    at = 0
    for count in cuts:
        cut.store(k[at : at + count], v[at : at + count], at)
        at += count
    for mine, theirs in zip(whole.read(length), cut.read(length)):
        np.testing.assert_array_equal(mine, theirs)
    used = cut.table[: -(-length // 32)]
    assert (np.delete(cut.bytes, used, axis=0) == 0xA5).all()  # no other page, and no other layer
    assert (cut.bytes[:, : cut.offset] == 0xA5).all()


@pytest.mark.parametrize("again", [0, 3, 16, 20, 31])
def test_tokens_may_come_again(again: int) -> None:
    """As after a step that failed in a later layer, or a cut."""
    rng = np.random.default_rng(2)
    k, v = rows(rng, 40, 2, 32), rows(rng, 40, 2, 32)
    pool = Pool(2, 32, 32, 32)
    pool.store(k, v, 0)
    before = pool.read(40)
    pool.store(k[again:], v[again:], again)
    keys, values = pool.read(40)
    np.testing.assert_array_equal(values, before[1])
    # keys that waited again have been coded twice
    np.testing.assert_allclose(keys, before[0], atol=0.0 if again % 16 == 0 else 0.25)
    pages.cut_page(pool.form, pool.bytes, pool.offset, int(pool.table[0]), again)
    short, _ = pool.read(again)
    np.testing.assert_allclose(short, keys[:again], atol=0.02)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 33, 150])
@pytest.mark.parametrize("window", [None, 21])
def test_attention_reads_the_codes(
    isa: str, threads: int, form: tuple[int, int, int, int], length: int, window: int | None
) -> None:
    kv_heads, dim, _, _ = form
    rng, pool, heads = np.random.default_rng(3), Pool(*form), 3 * kv_heads
    k, v = rows(rng, length, kv_heads, dim), rows(rng, length, kv_heads, dim)
    pool.store(k, v, 0)
    held_k, held_v = pool.read(length)
    where = {"scale": dim**-0.5, "window": window}
    for count in {1, min(length, 20), length}:
        q, first = 2 * rows(rng, count, heads, dim), length - count
        out, stats = np.full_like(q, np.nan), np.empty((count, heads, 2), np.float32)
        pages.attend_pages(
            pool.form, pool.bytes, pool.offset, q, pool.table, length=length, first_position=first, **where, out=out,
            stats=stats,
        )  # fmt: skip
        np.testing.assert_allclose(out, expected(q, held_k, held_v, first_position=first, **where), atol=3e-5)
        assert np.isfinite(stats).all()
        if not first:
            continue
        # the newest rows as they came, before they are stored
        k2, v2 = rows(rng, count, kv_heads, dim), rows(rng, count, kv_heads, dim)
        past_k, past_v = Pool(*form), None
        past_k.store(k[:first], v[:first], 0)
        past_k, past_v = past_k.read(first)
        other = Pool(*form)
        other.store(k[:first], v[:first], 0)
        pages.attend_pages(
            other.form, other.bytes, other.offset, q, other.table, length=length, first_position=first, **where,
            out=out, fresh=(k2, v2),
        )  # fmt: skip
        want = expected(q, np.concatenate([past_k, k2]), np.concatenate([past_v, v2]), first_position=first, **where)
        np.testing.assert_allclose(out, want, atol=3e-5)


@pytest.mark.parametrize("window", [None, 30])
def test_sequences_and_prefixes(isa: str, threads: int, window: int | None) -> None:
    rng, pool = np.random.default_rng(4), Pool(2, 32, 32, 32, count=20)
    lengths, tables, held = [1, 70, 47, 32], [], []
    for number, length in enumerate(lengths):
        table = pool.table[3 * number : 3 * number + 3]
        k, v = rows(rng, length, 2, 32), rows(rng, length, 2, 32)
        pages.store_pages(pool.form, pool.bytes, pool.offset, k, v, pool.places(0, length, table))
        tables.append(table)
        held.append(pool.read(length, table))
    q = rows(rng, 4, 6, 32)
    out, where = np.empty_like(q), {"scale": 0.2, "window": window}
    pages.attend_pages_sequences(
        pool.form, pool.bytes, pool.offset, q, np.stack(tables), np.array(lengths), **where, out=out
    )
    for row, (length, (k, v)) in enumerate(zip(lengths, held)):
        np.testing.assert_allclose(
            out[row : row + 1], expected(q[row : row + 1], k, v, first_position=length - 1, **where), atol=3e-5
        )
    # two sequences go on from the second one's 70 tokens: three rows after it, and one
    own = np.array([[0, 3, 0, 47, 44], [3, 1, 3, 32, 31]], np.int64)
    after = [70 + 44, 70 + 31]
    prefixes = np.array([[0, 3, 6, 70, after[0]], [3, 1, 6, 70, after[1]]], np.int64)
    joined = np.concatenate([tables[2], tables[3], tables[1]])
    pages.attend_pages_shared(pool.form, pool.bytes, pool.offset, q, joined, own, prefixes, **where, out=out)
    for rows_, number, first in ((slice(0, 3), 2, after[0]), (slice(3, 4), 3, after[1])):
        k, v = (np.concatenate([one, two]) for one, two in zip(held[1], held[number]))
        want = expected(q[rows_], k, v, first_position=first, **where)
        np.testing.assert_allclose(out[rows_], want, atol=3e-5)


def test_bytes() -> None:
    for kv_heads, dim, bits in ((4, 32, 6.1), (8, 64, 5.8), (8, 128, 5.7)):
        form = pages.page_form(kv_heads, dim, page_tokens=32, group=min(dim, 64))
        assert 8 * form.layer_bytes < bits * 2 * 32 * kv_heads * dim


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        pages.page_form(2, 40, page_tokens=32, group=16)
    with pytest.raises(ValueError, match="page_tokens"):
        pages.page_form(2, 32, page_tokens=48, group=16)
    with pytest.raises(ValueError, match="32 at least"):
        pages.page_form(2, 32, page_tokens=16, group=16)
    pool, x = Pool(2, 32, 32, 32), np.zeros((1, 2, 32), np.float32)
    with pytest.raises(ValueError, match="not in the pool"):
        pages.store_pages(pool.form, pool.bytes, pool.offset, x, x, np.array([32 * 12]))
    with pytest.raises(ValueError, match="not lie inside a page"):
        pages.store_pages(pool.form, pool.bytes, pool.offset + 64, x, x, np.array([0]))
    with pytest.raises(ValueError, match="not there"):
        pages.read_pages(pool.form, pool.bytes, pool.offset, np.array([12], np.int32), 4)
