"""The next tokens of caches that lie apart, in one call: each as if it were alone, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memwall.kernels import attention, bfp, parts
from tests.kernels.test_attention import TYPES, stored

HEADS, KV_HEADS, DIM, CAPACITY = 6, 2, 32, 700
LENGTHS = (1, 2, 700, 17, 129, 128, 300, 64, 1, 33, 90, 511, 256, 40, 7, 3, 65, 200)
SCALE = 0.3


def places_of(lengths: tuple[int, ...]) -> np.ndarray:
    """Of plain rows, the query being the last token's."""
    places = np.zeros((len(lengths), parts.PLACES), np.int64)
    places[:, 5], places[:, 6] = lengths, np.array(lengths) - 1
    return places


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_many_lengths(isa: str, threads: int, dtype: str, window: int | None) -> None:
    rng = np.random.default_rng(0)
    count = len(LENGTHS)
    held = [[stored(floats(rng, CAPACITY, KV_HEADS, DIM), dtype)[0] for _ in range(2)] for _ in LENGTHS]
    q = floats(rng, count, HEADS, DIM)
    out, stats = np.empty_like(q), np.empty((count, HEADS, 2), np.float32)
    mine = [parts.float_part(k, v) for k, v in held]
    parts.attend_parts(mine, q, places_of(LENGTHS), scale=SCALE, window=window, out=out, stats=stats)
    for i, ((k, v), length) in enumerate(zip(held, LENGTHS)):
        want, want_stats = np.empty((1, HEADS, DIM), np.float32), np.empty((1, HEADS, 2), np.float32)
        attention.attend_float(
            q[i : i + 1], k[:length], v[:length], scale=SCALE, first_position=length - 1, window=window, out=want,
            stats=want_stats,
        )  # fmt: skip
        np.testing.assert_array_equal(out[i], want[0])
        np.testing.assert_array_equal(stats[i], want_stats[0])


@pytest.mark.parametrize("dtype", TYPES)
def test_new_rows_go_where_they_are_told(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    width = DIM + (2 if dtype == "int8" else 0)
    held = [[np.zeros((9, KV_HEADS, width), TYPES[dtype]) for _ in range(2)] for _ in range(3)]
    k, v = floats(rng, 3, KV_HEADS, DIM), floats(rng, 3, KV_HEADS, DIM)
    rows = np.array([[0, 8], [5, 5], [8, 0]])
    parts.append_parts([parts.float_part(*pair) for pair in held], k, v, rows)
    for i, pair in enumerate(held):
        for x, place, into in zip((k, v), rows[i], pair):
            want = np.zeros_like(into)
            want[place] = stored(x[i : i + 1], dtype)[0][0]
            assert into.tobytes() == want.tobytes()


def coded(rng: np.random.Generator, form: dict[str, Any], tokens: int, residual: int) -> dict[str, Any]:
    """A cache of so many tokens: the rows and blocks of `coded_part`, and how many of each are coded."""
    keys, values = (floats(rng, tokens, KV_HEADS, DIM).astype(np.float16) for _ in range(2))
    bits, group, key_group = form["bits"], form["group"], form["key_group"]
    key_bytes = attention.kivi_key_block_bytes(bits, key_group, DIM) * KV_HEADS
    value_bytes = attention.kivi_block_bytes(bits, group, DIM)[1] * KV_HEADS
    coded_keys, coded_values = tokens // key_group * key_group, max(tokens - residual, 0)
    key_blocks, value_blocks = np.zeros(24 * key_bytes, np.uint8), np.zeros(24 * value_bytes, np.uint8)
    attention.kivi_encode_keys(keys[:coded_keys], key_blocks, bits=bits, group=key_group)
    attention.kivi_encode_values(values[:coded_values], 0, value_blocks, bits=bits, group=group)
    k, v = (np.zeros((3 + CAPACITY, KV_HEADS, DIM), np.float16) for _ in range(2))
    k[1 : 1 + tokens - coded_keys], v[3 : 3 + tokens - coded_values] = keys[coded_keys:], values[coded_values:]
    return {
        "rows": (k, v), "blocks": (key_blocks, value_blocks), "coded": (coded_keys, coded_values), "tokens": tokens,
    }  # fmt: skip


FORMS = (
    {"bits": 2, "group": 32, "key_group": 64, "integers": False},
    {"bits": 4, "group": 16, "key_group": 128, "integers": True},
    {"bits": 3, "group": 32, "key_group": 32, "integers": False},
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['bits']}bit")
def test_codes_of_many_lengths(isa: str, threads: int, form: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    caches = [
        coded(rng, form, tokens, residual) for tokens, residual in ((1, 0), (63, 40), (300, 128), (640, 0), (190, 7))
    ]
    places = np.array(
        [(*c["coded"], 0, 1, 3, c["tokens"], c["tokens"] - 1, 0) for c in caches], np.int64
    )  # exact rows begin at 1 and 3
    mine = [parts.coded_part(c["rows"], c["blocks"], parts.CodedForm(**form)) for c in caches]
    q, out = floats(rng, len(caches), HEADS, DIM), np.empty((len(caches), HEADS, DIM), np.float32)
    parts.attend_parts(mine, q, places, scale=SCALE, out=out)
    for i, c in enumerate(caches):
        exact = [rows[at : at + c["tokens"] - held] for rows, at, held in zip(c["rows"], (1, 3), c["coded"])]
        want = np.empty((1, HEADS, DIM), np.float32)
        attention.attend_kivi(
            q[i : i + 1], *c["blocks"], *exact, coded_keys=c["coded"][0], coded_values=c["coded"][1], **form,
            scale=SCALE, first_position=c["tokens"] - 1, out=want,
        )  # fmt: skip
        np.testing.assert_array_equal(out[i], want[0])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['bits']}bit")
def test_codes_are_those_of_one_after_the_other(isa: str, threads: int, form: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    size = form["key_group"]
    caches = [coded(rng, form, tokens, 40) for tokens in (100, 41, 200, 64, 70, 33)]
    for c in caches:
        for rows in c["rows"]:
            rows[:] = rng.standard_normal(rows.shape)
    jobs = np.array(
        [(2, size, 0, 5, 1, 0), (2, 0, 0, 5, 1, 31), (0, 2 * size, size, 9, 70, 30), (0, 0, 0, 0, 0, 0),
         (7, size, 3 * size, 0, 0, 5), (0, 0, 0, 8, 2, 64)], np.int64,
    )  # fmt: skip
    copies = [[blocks.copy() for blocks in c["blocks"]] for c in caches]
    parts.encode_parts([parts.coded_part(c["rows"], c["blocks"], parts.CodedForm(**form)) for c in caches], jobs)
    for c, want, job in zip(caches, copies, jobs):
        (k, v), (first, keys, at, first_value, values, at_value) = c["rows"], job
        block = attention.kivi_key_block_bytes(form["bits"], size, DIM) * KV_HEADS
        if keys:
            attention.kivi_encode_keys(
                k[first : first + keys], want[0][at // size * block :], bits=form["bits"], group=size
            )
        if values:
            attention.kivi_encode_values(
                v[first_value : first_value + values], at_value, want[1], bits=form["bits"], group=form["group"]
            )
        for mine, its in zip(c["blocks"], want):
            np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("by_token", [True, False])
def test_block_floating_point(isa: str, threads: int, by_token: bool) -> None:
    rng = np.random.default_rng(6)
    form = bfp.BfpForm(bits=6, value_bits=3, block=32, by_token=by_token, raise_top=False)
    order = np.stack([rng.permutation(DIM) for _ in range(KV_HEADS)]).astype(np.int16)
    mine, wanted, places, jobs, rows = [], [], [], [], []
    for tokens, coded in ((300, 256), (40, 32), (65, 64), (7, 0)):
        k, v = (floats(rng, 80, KV_HEADS, DIM).astype(np.float16) for _ in range(2))
        old = [floats(rng, coded, KV_HEADS, DIM) for _ in range(2)]
        sizes = (form.key_bytes(DIM) * 24, form.value_bytes(DIM) * 24)
        blocks = [np.zeros(KV_HEADS * size, np.uint8) for size in sizes]
        bfp.encode_keys(old[0], 0, blocks[0], form, order)
        bfp.encode_values(old[1], 0, blocks[1], form)
        q, out = floats(rng, 1, HEADS, DIM), np.empty((1, HEADS, DIM), np.float32)
        exact = tokens - coded
        bfp.attend_bfp(
            q, *blocks, k[2 : 2 + exact], v[1 : 1 + exact], form=form, order=order, coded_keys=coded,
            coded_values=coded, scale=SCALE, first_position=tokens - 1, out=out,
        )  # fmt: skip
        wanted.append((q, out, [block.copy() for block in blocks], (k, v), coded))
        mine.append(parts.bfp_part((k, v), (blocks[0], blocks[1]), form, order))
        places.append((coded, coded, 0, 2, 1, tokens, tokens - 1, 0))
        jobs.append((2, 5, coded, 1, 32, coded))
        rows.append(blocks)
    out = np.empty((len(mine), HEADS, DIM), np.float32)
    parts.attend_parts(mine, np.concatenate([one[0] for one in wanted]), np.array(places), scale=SCALE, out=out)
    np.testing.assert_array_equal(out, np.concatenate([one[1] for one in wanted]))
    parts.encode_parts(mine, np.array(jobs))
    for blocks, (_, _, want, (k, v), coded) in zip(rows, wanted):
        bfp.encode_keys(k[2:7], coded, want[0], form, order)
        bfp.encode_values(v[1:33], coded, want[1], form)
        for its, expected in zip(blocks, want):
            np.testing.assert_array_equal(its, expected)


def test_a_part_in_pieces_is_the_whole(isa: str, threads: int) -> None:
    """Codes from the middle of the blocks on, other tokens before them, joined."""
    rng = np.random.default_rng(4)
    form = FORMS[0]
    c = coded(rng, form, 320, 0)
    part = parts.coded_part(c["rows"], c["blocks"], parts.CodedForm(**form))
    q, whole, stats = (
        floats(rng, 1, HEADS, DIM),
        np.empty((1, HEADS, DIM), np.float32),
        np.empty((1, HEADS, 2), np.float32),
    )
    places = np.array([(320, 320, 0, 0, 0, 320, 319, 0)])
    parts.attend_parts([part], q, places, scale=SCALE, out=whole, stats=stats)
    pieces = np.array([(128, 128, 0, 0, 0, 128, 400, 0), (192, 192, 128, 0, 0, 192, 191, 0)])
    outs, found = np.empty((2, HEADS, DIM), np.float32), np.empty((2, HEADS, 2), np.float32)
    parts.attend_parts([part, part], np.repeat(q, 2, 0), pieces, scale=SCALE, out=outs, stats=found)
    out, joined = np.empty_like(whole), np.empty_like(stats)
    parts.join_pieces(outs, found, np.array([2]), out, joined)
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        joined[..., 1] * np.exp(joined[..., 0]), stats[..., 1] * np.exp(stats[..., 0]), rtol=1e-5
    )


def test_joining_leaves_out_pieces_in_which_nothing_was_seen() -> None:
    rng = np.random.default_rng(5)
    outs, stats = floats(rng, 5, HEADS, DIM), np.abs(floats(rng, 5, HEADS, 2)) + 0.1
    stats[1, :, 1], outs[1] = 0, np.nan
    ends, out = np.array([3, 5]), np.empty((2, HEADS, DIM), np.float32)
    parts.join_pieces(outs, stats, ends, out)
    for i, chosen in enumerate(([0, 2], [3, 4])):
        want, _ = attention.merge_partials([outs[j : j + 1] for j in chosen], [stats[j : j + 1] for j in chosen])
        np.testing.assert_allclose(out[i], want[0], rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    rows = np.zeros((4, KV_HEADS, DIM), np.float16)
    part = parts.float_part(rows, rows.copy())
    q, out = np.zeros((1, HEADS, DIM), np.float32), np.zeros((1, HEADS, DIM), np.float32)
    k = np.zeros((1, KV_HEADS, DIM), np.float32)
    with pytest.raises(ValueError, match="outside of a part's rows"):
        parts.attend_parts([part], q, places_of((5,)), scale=SCALE, out=out)
    with pytest.raises(ValueError, match="outside of a part's blocks"):
        parts.attend_parts([part], q, np.array([(4, 0, 0, 0, 0, 4, 3, 0)]), scale=SCALE, out=out)
    with pytest.raises(ValueError, match="one row for each part"):
        parts.attend_parts([part, part], q, places_of((1, 1)), scale=SCALE, out=out)
    with pytest.raises(ValueError, match="outside of a part's rows"):
        parts.append_parts([part], k, k, np.array([[0, 4]]))
    with pytest.raises(ValueError, match="outside of a part's blocks"):
        parts.encode_parts([part], np.array([(0, 0, 0, 0, 1, 0)]))
    with pytest.raises(ValueError, match="ends must not fall"):
        parts.join_pieces(out, np.zeros((1, HEADS, 2), np.float32), np.array([2]), out.copy())
    with pytest.raises(ValueError, match="group"):
        parts.coded_part((rows, rows), (np.zeros(1, np.uint8),) * 2, parts.CodedForm(bits=2, group=64, key_group=32))
