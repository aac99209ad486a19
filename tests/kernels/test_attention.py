"""Attention kernels against plain torch, on every instruction set, over sizes that divide nothing."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.kernels import attention, attention_reference

TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}
# T, S, H, Hkv, D, window
SIZES = [
    (1, 1, 1, 1, 1, None),
    (1, 7, 3, 1, 5, None),
    (1, 300, 8, 4, 32, None),
    (1, 700, 8, 2, 64, 100),
    (1, 261, 6, 6, 80, None),
    (1, 1500, 32, 8, 64, None),
    (5, 9, 4, 2, 20, 3),
    (37, 137, 8, 4, 32, None),
    (70, 70, 6, 2, 65, 17),
    (130, 130, 14, 2, 64, None),
    (3, 513, 23, 1, 64, None),
    (1, 259, 14, 2, 64, None),
    (1, 141, 6, 1, 128, 50),
    (1, 133, 5, 1, 64, None),
    (1, 77, 23, 1, 64, None),
    (1, 202, 13, 1, 32, 20),
    (0, 5, 2, 1, 16, None),
]


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def stored(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, Hkv, D] as a cache keeps them, and the numbers that they are then."""
    if dtype != "int8":
        kept = x.astype(TYPES[dtype])
        return kept, kept.astype(np.float32)
    rows = kernels.store_int8(x, np.arange(len(x)), np.empty((*x.shape[:2], x.shape[2] + 2), np.int8))
    return rows, kernels.int8_rows(rows)


def expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, **settings: float | int | None
) -> tuple[np.ndarray, np.ndarray]:
    out, stats = attention_reference.attend(*(torch.from_numpy(x.astype(np.float32)) for x in (q, k, v)), **settings)
    return out.numpy(), stats.numpy()


def check(
    out: np.ndarray, stats: np.ndarray, *rows: np.ndarray, rounded: bool = False, **settings: float | int | None
) -> None:
    """rounded: the prompt's queries are of bfloat16, and so is each share, by which a value's part of the sum may be
    off by one in 256; shares themselves are exact to 2 in 10,000.
    """
    q, k, v = rows
    if rounded:
        scale = np.float32(settings["scale"])
        q = (q * scale).astype(TYPES["bfloat16"]).astype(np.float32) / scale
    want, want_stats = expected(q, k, v, **settings)
    error = expected(q, k, np.abs(v), **settings)[0] / 256 if rounded else 0
    assert (np.abs(out - want) <= error + 2e-5 + 1e-7 * np.abs(want)).all()
    np.testing.assert_allclose(stats, want_stats, rtol=4e-4 if rounded else 1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float(isa: str, threads: int, dtype: str, size: tuple) -> None:
    num_queries, num_keys, heads, kv_heads, dim, window = size
    rng = np.random.default_rng(0)
    q = 3 * rows(rng, num_queries, heads, dim)
    (k, plain_k), (v, plain_v) = (stored(rows(rng, num_keys, kv_heads, dim), dtype) for _ in range(2))
    out, stats = np.full_like(q, np.nan), np.empty((num_queries, heads, 2), np.float32)
    settings = {"scale": dim**-0.5, "first_position": num_keys - num_queries, "window": window}
    attention.attend_float(q, k, v, **settings, out=out, stats=stats)
    rounded = dtype == "bfloat16" and 0 < attention.paired_prompt_tokens() <= num_queries
    check(out, stats, q, plain_k, plain_v, rounded=rounded, **settings)


def test_short_prompts_are_exact_and_chunks_change_nothing(isa: str) -> None:
    """Over rows of bfloat16: a prompt in chunks that are rounded gives what it gives at once, to the bit."""
    rng = np.random.default_rng(3)
    q, k, v = rows(rng, 200, 6, 48), rows(rng, 200, 2, 48), rows(rng, 200, 2, 48)
    k, v = (each.astype(TYPES["bfloat16"]) for each in (k, v))

    def attend(first: int, end: int) -> np.ndarray:
        out = np.empty_like(q[first:end])
        return attention.attend_float(q[first:end], k[:end], v[:end], scale=0.2, first_position=first, out=out)

    least = attention.paired_prompt_tokens()
    assert least in (0, 32)
    whole = attend(0, 200)
    for first, end in ((0, 64), (64, 101), (101, 200)):
        np.testing.assert_array_equal(attend(first, end), whole[first:end])
    short = attend(100, 131)
    want, _ = expected(q[100:131], k[:131], v[:131], scale=0.2, first_position=100)
    np.testing.assert_allclose(short, want, atol=2e-5)
    assert np.array_equal(short, whole[100:131]) == (least == 0)


@pytest.mark.parametrize("num_queries", [1, 6])
def test_pieces_merge_to_the_whole(isa: str, num_queries: int) -> None:
    rng = np.random.default_rng(1)
    q = rows(rng, num_queries, 4, 32)
    k, v = rows(rng, 200, 2, 32), rows(rng, 200, 2, 32)
    settings = {"scale": 0.2, "first_position": 90, "window": 77}  # keys behind the queries stay unseen
    outs, all_stats = [], []
    for begin, end in [(0, 5), (5, 64), (64, 101), (101, 200)]:
        out, stats = np.empty_like(q), np.empty((num_queries, 4, 2), np.float32)
        attention.attend_float(q, k[begin:end], v[begin:end], **settings, key_start=begin, out=out, stats=stats)
        outs.append(out)
        all_stats.append(stats)
    out, stats = attention.merge_partials(outs, all_stats)
    want, want_stats = expected(q, k, v, **settings)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(stats, want_stats, rtol=1e-5)
    assert not outs[-1][0].any()  # saw nothing
    assert np.isneginf(all_stats[-1][0, :, 0]).all()


FORMS = [
    (bits, group, dim) for bits in (2, 3, 4, 8) for group, dim in ((16, 48), (32, 32), (32, 96), (64, 64), (128, 128))
]


@pytest.mark.parametrize(("bits", "group", "dim"), FORMS)
def test_kivi_codes_and_attention(isa: str, bits: int, group: int, dim: int) -> None:
    rng = np.random.default_rng(2)
    heads, kv_heads, coded_keys, coded_values = 6, 2, 3 * group, 83
    length = max(coded_keys, coded_values) + 40
    k, v = (rows(rng, length, kv_heads, dim).astype(np.float16) for _ in range(2))
    k[:, 0, 3] *= 20
    k[:, :, 4] = 2
    form = {"bits": bits, "group": group}
    key_bytes, value_bytes = attention.kivi_block_bytes(**form, head_dim=dim)
    key_blocks, value_blocks = (np.full(3 * kv_heads * n, 255, np.uint8) for n in (key_bytes, value_bytes))
    attention.kivi_encode_keys(k[:coded_keys], key_blocks, **form)
    attention.kivi_encode_values(v[:50], 0, value_blocks, **form)
    for i in range(50, coded_values):
        attention.kivi_encode_values(v[i : i + 1], i, value_blocks, **form)

    tk, tv = torch.from_numpy(k[:coded_keys]).float(), torch.from_numpy(v[:coded_values]).float()
    codes = attention_reference.kivi_unpack(torch.from_numpy(key_blocks), bits, group, kv_heads, dim, keys=True)
    want = attention_reference.kivi_quantize(tk.view(3, group, kv_heads, dim), bits, 1)[0]
    assert torch.equal(codes, want.view(coded_keys, kv_heads, dim).long())
    codes = attention_reference.kivi_unpack(torch.from_numpy(value_blocks), bits, group, kv_heads, dim, keys=False)
    want = attention_reference.kivi_quantize(tv.view(coded_values, kv_heads, -1, group), bits, 3)[0]
    assert torch.equal(codes[:coded_values], want.view(coded_values, kv_heads, dim).long())

    past_keys = attention_reference.kivi_round_trip(tk, bits, group, along_tokens=True).numpy()
    past_values = attention_reference.kivi_round_trip(tv, bits, group, along_tokens=False).numpy()
    some = np.empty((coded_keys - 5, kv_heads, dim), np.float32)
    np.testing.assert_allclose(
        attention.kivi_decode_keys(key_blocks, 5, some, **form), past_keys[5:], rtol=1e-6, atol=1e-6
    )
    some = np.empty((coded_values - 5, kv_heads, dim), np.float32)
    np.testing.assert_allclose(
        attention.kivi_decode_values(value_blocks, 5, some, **form), past_values[5:], rtol=1e-6, atol=1e-6
    )
    keys = np.concatenate([past_keys, k[coded_keys:].astype(np.float32)])
    values = np.concatenate([past_values, v[coded_values:].astype(np.float32)])
    for num_queries, first, window in [
        (1, length - 1, None),
        (5, length - 5, None),
        (1, 40, None),
        (1, length - 1, 70),
    ]:
        q = rows(rng, num_queries, heads, dim)
        settings = {"scale": dim**-0.5, "first_position": first, "window": window}
        out, stats = np.empty_like(q), np.empty((num_queries, heads, 2), np.float32)
        attention.attend_kivi(
            q, key_blocks, value_blocks, k[coded_keys:], v[coded_values:],
            coded_keys=coded_keys, coded_values=coded_values,
            **form, **settings, out=out, stats=stats,
        )  # fmt: skip
        want_out, want_stats = expected(q, keys, values, **settings)
        np.testing.assert_allclose(out, want_out, atol=5e-5)
        np.testing.assert_allclose(stats, want_stats, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [1, 3, 7, 8, 13, 20, 39, 77])
def test_keys_narrower_than_values(isa: str, threads: int, width: int) -> None:
    rng = np.random.default_rng(width)
    for name, num_queries, dim in (("float16", 1, 64), ("float32", 1, 40), ("bfloat16", 9, 32), ("float16", 70, 48)):
        q = rows(rng, num_queries, 8, width)
        k, v = (rows(rng, 333, 2, size).astype(TYPES[name]) for size in (width, dim))
        out, stats = np.empty((num_queries, 8, dim), np.float32), np.empty((num_queries, 8, 2), np.float32)
        settings = {"scale": dim**-0.5, "first_position": 333 - num_queries, "window": 300}
        attention.attend_float(q, k, v, **settings, out=out, stats=stats)
        want, want_stats = expected(q, k, v, **settings)
        np.testing.assert_allclose(out, want, atol=2e-5)
        np.testing.assert_allclose(stats, want_stats, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 13, 20, 39, 77])
def test_coded_keys_narrower_than_values(isa: str, bits: int, width: int) -> None:
    rng = np.random.default_rng(width)
    heads, kv_heads, dim, group, coded_keys, coded_values = 6, 2, 64, 16, 192, 150
    k, v = rows(rng, 200, kv_heads, width), rows(rng, 200, kv_heads, dim)
    form = {"bits": bits, "group": group}
    key_bytes, value_bytes = attention.kivi_block_bytes(**form, head_dim=dim, key_dim=width)
    key_blocks = np.full(12 * kv_heads * key_bytes, 255, np.uint8)
    value_blocks = np.full(5 * kv_heads * value_bytes, 255, np.uint8)
    attention.kivi_encode_keys(k[:coded_keys], key_blocks, **form)
    attention.kivi_encode_values(v[:coded_values], 0, value_blocks, **form)
    past_keys = attention_reference.kivi_round_trip(torch.from_numpy(k[:coded_keys]), bits, group, along_tokens=True)
    past_values = attention_reference.kivi_round_trip(
        torch.from_numpy(v[:coded_values]), bits, group, along_tokens=False
    )
    decoded = np.empty((coded_keys, kv_heads, width), np.float32)
    attention.kivi_decode_keys(key_blocks, 0, decoded, **form)
    np.testing.assert_allclose(decoded, past_keys.numpy(), rtol=1e-6, atol=1e-6)
    keys = np.concatenate([past_keys.numpy(), k[coded_keys:]])
    values = np.concatenate([past_values.numpy(), v[coded_values:]])
    for num_queries in (1, 5):
        q = rows(rng, num_queries, heads, width)
        settings = {"scale": dim**-0.5, "first_position": 200 - num_queries, "window": None}
        out = np.empty((num_queries, heads, dim), np.float32)
        attention.attend_kivi(
            q, key_blocks, value_blocks, k[coded_keys:], v[coded_values:],
            coded_keys=coded_keys, coded_values=coded_values, **form, **settings, out=out,
        )  # fmt: skip
        np.testing.assert_allclose(out, expected(q, keys, values, **settings)[0], atol=5e-5)


def test_bad_shapes_are_refused() -> None:
    q, k = np.zeros((1, 4, 32), np.float32), np.zeros((8, 2, 32), np.float32)

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, window: int | None = None) -> None:
        attention.attend_float(q, k, v, scale=1.0, first_position=7, window=window, out=out)

    for change in (
        {"k": np.zeros((8, 3, 32), np.float32), "v": np.zeros((8, 3, 32), np.float32)},
        {"v": k[:7]},
        {"out": np.zeros((2, 4, 32), np.float32)},
        {"window": 0},
        {"k": k.astype(np.int32)},
        {"v": k[:, :, :16].copy()},
    ):
        with pytest.raises(ValueError, match=r"."):
            attend(**{"q": q, "k": k, "v": k, "out": q.copy(), **change})
    for bits, group in ((5, 32), (2, 24), (2, 64)):
        with pytest.raises(ValueError, match=r"bits|group"):
            attention.kivi_block_bytes(bits, group, 32)
    with pytest.raises(ValueError, match="whole groups"):
        attention.kivi_encode_keys(k, np.zeros(4096, np.uint8), bits=2, group=32)
    with pytest.raises(ValueError, match="too short"):
        attention.kivi_encode_values(k, 25, np.zeros(100, np.uint8), bits=2, group=32)


@pytest.mark.parametrize(("num_queries", "num_heads", "dim"), [(1, 6, 40), (40, 6, 40), (1, 10, 64)])
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_lie_apart_and_pages_give_the_same_bits(
    isa: str, num_queries: int, num_heads: int, dim: int, dtype: str
) -> None:
    rng = np.random.default_rng(5)
    length, page, layers = 333, 32, 3
    q = rows(rng, num_queries, num_heads, dim)
    spread = stored(rows(rng, 2 * length * layers, 2, dim), dtype)[0].reshape(2, length, layers, 2, -1)
    settings = {"scale": 0.2, "first_position": length - num_queries, "window": 200}
    table = rng.permutation(20)[: -(-length // page)].astype(np.int32)
    for layer in range(layers):
        k, v = spread[:, :, layer]
        outs = [np.empty_like(q) for _ in range(3)]
        stats = [np.empty((num_queries, num_heads, 2), np.float32) for _ in range(3)]
        attention.attend_float(q, k.copy(), v.copy(), **settings, out=outs[0], stats=stats[0])
        attention.attend_float(q, k, v, **settings, out=outs[1], stats=stats[1])
        pools = [np.zeros((20 * page, *spread.shape[3:]), TYPES[dtype]) for _ in range(2)]
        for index, place in enumerate(table):
            for pool, x in zip(pools, (k, v)):
                part = x[index * page : (index + 1) * page]
                pool[place * page : place * page + len(part)] = part
        attention.attend_paged(
            q, *pools, table, page_tokens=page, length=length, **settings, out=outs[2], stats=stats[2]
        )
        for out, stat in zip(outs[1:], stats[1:]):
            np.testing.assert_array_equal(out, outs[0])
            np.testing.assert_array_equal(stat, stats[0])


def test_bad_tables_are_refused() -> None:
    q, pool = np.ones((1, 2, 8), np.float32), np.ones((64, 1, 8), np.float32)
    half = q[..., :4].copy()
    good = {"table": np.array([1, 0], np.int32), "page_tokens": 32, "length": 40}
    for change, says in (
        ({"table": np.array([1], np.int32)}, "too short"),
        ({"table": np.array([1, 2], np.int32)}, "not there"),
        ({"table": np.array([-1, 0], np.int32)}, "not there"),
        ({"page_tokens": 24}, "power of two"),
    ):
        with pytest.raises(ValueError, match=says):
            attention.attend_paged(q, pool, pool, **{**good, **change}, scale=1.0, first_position=39, out=q.copy())
    with pytest.raises(ValueError, match="beside each other"):
        attention.attend_float(half, pool[:, :, ::2], pool[:, :, ::2], scale=1.0, first_position=0, out=half.copy())


# T, tail tokens, heads' past rows, rep, D
RAGGED = [
    (1, 1, (5,), 3, 7),
    (1, 0, (9, 0), 2, 32),
    (1, 130, (700, 3, 0, 131), 2, 64),
    (1, 3, (0, 0), 1, 16),
    (1, 20, (1500, 2900, 700), 8, 80),
    (4, 4, (13, 70), 2, 20),
    (37, 50, (200, 0, 65), 4, 32),
    (130, 130, (129, 1), 1, 65),
    (0, 3, (4,), 1, 16),
]


@pytest.mark.parametrize("types", [("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")], ids=str)
@pytest.mark.parametrize("size", RAGGED, ids=str)
def test_heads_of_different_lengths(isa: str, threads: int, types: tuple[str, str], size: tuple) -> None:
    num_queries, tail, pasts, rep, dim = size
    heads = len(pasts)
    rng = np.random.default_rng(2)
    q = 3 * rows(rng, num_queries, heads * rep, dim)
    past_k, past_v = (rows(rng, sum(pasts), dim).astype(TYPES[types[0]]) for _ in range(2))
    k, v = (rows(rng, tail, heads, dim).astype(TYPES[types[1]]) for _ in range(2))
    offsets = np.concatenate([[0], np.cumsum(pasts)]).astype(np.int64)
    out, stats = np.full_like(q, np.nan), np.empty((num_queries, heads * rep, 2), np.float32)
    first = tail - num_queries if tail >= num_queries else 0
    attention.attend_ragged(q, past_k, past_v, offsets, k, v, scale=dim**-0.5, first_query=first, out=out, stats=stats)
    for h, length in enumerate(pasts):
        mine = slice(h * rep, (h + 1) * rep)
        both = [
            np.concatenate([past[offsets[h] : offsets[h + 1], None].astype(np.float32), new[:, h : h + 1]])
            for past, new in ((past_k, k), (past_v, v))
        ]
        rounded = set(types) == {"bfloat16"} and 0 < attention.paired_prompt_tokens() <= num_queries
        settings = {"scale": dim**-0.5, "first_position": length + first}
        check(out[:, mine], stats[:, mine], q[:, mine], *both, rounded=rounded, **settings)


def test_ragged_rows_are_checked() -> None:
    q, out = np.zeros((1, 2, 4), np.float32), np.zeros((1, 2, 4), np.float32)
    tail, past = np.zeros((0, 2, 4), np.float32), np.zeros((6, 4), np.float16)
    for offsets in ([0, 3], [0, 4, 3], [0, 3, 7], [1, 3, 6]):
        with pytest.raises(ValueError, match="offsets"):
            attention.attend_ragged(
                q, past, past, np.array(offsets, np.int64), tail, tail, scale=1.0, first_query=0, out=out
            )


@pytest.mark.parametrize("threads", [1, 6])
def test_scratch_is_predicted(threads: int) -> None:
    """In a process of its own: what attention keeps is resident memory that nothing else explains."""
    program = f"""
import numpy as np
from memwall import _native, kernels
from memwall.memory import resident_bytes
kernels.set_num_threads({threads})
def attend(keys, queries):
    kernels.attend_float(
        queries, keys, keys, scale=0.1, first_position=len(keys) - len(queries), out=np.ones_like(queries)
    )
keys = np.ones((6000, 8, 128), np.float16)
prompt, one = np.ones((128, 32, 128), np.float32), np.ones((1, 32, 128), np.float32)
attend(np.ones((2, 1, 16), np.float16), np.ones((1, 1, 16), np.float32))
_native.give_back_freed_memory()
before = resident_bytes(exact=True)
for _ in range(5):
    attend(keys, prompt)
    attend(keys, one)
_native.give_back_freed_memory()
print(resident_bytes(exact=True) - before, kernels.predict_attention_scratch_bytes(32, 8, 128, 128))
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    held, predicted = map(int, done.stdout.split())
    # threads wake with a stack and a heap of their own (measured: 168 KiB); one that gets no task holds nothing
    assert held <= predicted + 192 * 1024 * threads + 128 * 1024
    assert threads > 1 or held >= 0.7 * predicted
