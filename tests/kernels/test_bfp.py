"""Block floating point rows against an oracle of NumPy's own, and attention on them against attention on what they
stand for.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memwall import _native
from memwall.kernels import attention, bfp

FINITE = st.floats(-1e4, 1e4, width=32)


def oracle(x: np.ndarray, bits: int, raise_top: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mantissas and exponents of blocks x [..., n], by the definition alone."""
    top = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    exponent = np.floor(np.log2(np.where(top > 0, top, 1.0)))
    most = 2.0 ** (bits - 1)
    if raise_top:
        exponent += np.rint(top / 2.0 ** (exponent - bits + 2)) >= most
    step = 2.0 ** (exponent - bits + 2)
    mantissa = np.clip(np.rint(x.astype(np.float64) / step), -most, most - 1)
    return np.where(top >= 7.9e-31, mantissa, 0), np.where(top >= 7.9e-31, exponent, -128)


def decoded(x: np.ndarray, bits: int, block: int, raise_top: bool = False) -> np.ndarray:
    """What x [..., D] stands for once coded in blocks along its last axis."""
    cut = x.reshape(*x.shape[:-1], -1, block)
    mantissa, exponent = oracle(cut, bits, raise_top)
    return (mantissa * 2.0 ** np.maximum(exponent - bits + 2, -126)).reshape(x.shape).astype(np.float32)


@pytest.fixture(params=["portable", "best"])
def isa(request: pytest.FixtureRequest) -> object:
    before = _native.isa()
    _native.force_isa("portable" if request.param == "portable" else _native.best_isa())
    yield request.param
    _native.force_isa(before)


def forms() -> list[bfp.BfpForm]:
    return [
        bfp.BfpForm(bits=bits, value_bits=value_bits, block=block, by_token=by_token, raise_top=raise_top)
        for (bits, value_bits), block, by_token, raise_top in itertools.product(
            zip(bfp.BITS, (8, 6, 3, 4)), (16, 32, 64), (True, False), (False, True)
        )
    ]


@pytest.mark.parametrize("form", forms(), ids=str)
def test_buffers_alone_give_the_oracles_numbers(form: bfp.BfpForm) -> None:
    rng = np.random.default_rng(form.bits)
    x = (rng.normal(size=(128, 3, 64)) * np.exp(rng.normal(size=(128, 3, 64)))).astype(np.float16)
    x[5], x[64:128, 1, 7] = 0, 0
    order = np.stack([rng.permutation(64) for _ in range(3)]).astype(np.int16)
    keys = np.zeros(8 * 3 * form.key_bytes(64), np.uint8)
    bfp.encode_keys(x[:37], 0, keys, form, order)
    bfp.encode_keys(x[37:], 37, keys, form, order)
    found = bfp.decode_keys(keys, 0, np.empty(x.shape, np.float32), form, order)
    placed = np.take_along_axis(x.astype(np.float32), np.broadcast_to(order, x.shape).astype(np.intp), axis=2)
    wanted = np.empty_like(placed)
    np.put_along_axis(
        wanted,
        np.broadcast_to(order, x.shape).astype(np.intp),
        decoded(placed, form.bits, form.block, form.raise_top),
        axis=2,
    )
    np.testing.assert_array_equal(found, wanted)
    values = np.zeros(128 // form.value_tokens * 3 * form.value_bytes(64), np.uint8)
    cut = 37 if form.by_token else 64
    bfp.encode_values(x[:cut], 0, values, form)
    bfp.encode_values(x[cut:], cut, values, form)
    found = bfp.decode_values(values, 3, np.empty((125, 3, 64), np.float32), form)
    along = x.astype(np.float32) if form.by_token else x.astype(np.float32).transpose(1, 2, 0)
    wanted = decoded(np.ascontiguousarray(along), form.value_bits, form.block, form.raise_top)
    np.testing.assert_array_equal(found, (wanted if form.by_token else wanted.transpose(2, 0, 1))[3:])


def test_bytes_are_mantissas_and_one_exponent_a_block() -> None:
    for bits, block, by_token in itertools.product(bfp.BITS, bfp.BLOCKS, (True, False)):
        form = bfp.BfpForm(bits=bits, value_bits=bits, block=block, by_token=by_token)
        assert 8 * form.key_bytes(128) == bfp.TOKENS * 128 * (bits + 8 / block)
        assert 8 * form.value_bytes(128) == form.value_tokens * 128 * (bits + 8 / block)


def test_a_token_changes_no_byte_of_those_before() -> None:
    rows = np.random.default_rng(0).normal(size=(16, 2, 64)).astype(np.float32)
    for bits in bfp.BITS:
        form = bfp.BfpForm(bits=bits, value_bits=bits)
        for size, encode in ((form.key_bytes(64), bfp.encode_keys), (form.value_bytes(64), bfp.encode_values)):
            blocks, own = np.zeros(2 * size, np.uint8), np.zeros(2 * size, bool)
            encode(rows[:1], 0, blocks, form)
            for token in range(1, 16):
                before = blocks.copy()
                encode(rows[token : token + 1], token, blocks, form)
                changed = blocks != before
                assert not (changed & own).any()
                own |= changed


@given(arrays(np.float32, (2, 1, 32), elements=FINITE), st.sampled_from(bfp.BITS), st.sampled_from([16, 32]))
@settings(max_examples=60, deadline=None)
def test_any_numbers_come_back_as_the_oracle_has_them(x: np.ndarray, bits: int, block: int) -> None:
    form = bfp.BfpForm(bits=bits, block=block)
    coded = np.zeros(form.key_bytes(32), np.uint8)
    bfp.encode_keys(x, 0, coded, form)
    found = bfp.decode_keys(coded, 0, np.empty_like(x), form)
    np.testing.assert_array_equal(found, decoded(x, bits, block))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", forms()[::2], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "window"), [(6, 2, 211, None), (2, 2, 77, 50), (3, 1, 130, None)]
)
def test_decoding_meets_what_the_codes_stand_for(
    form: bfp.BfpForm, heads: int, kv_heads: int, length: int, window: int | None
) -> None:
    rng = np.random.default_rng(length)
    k, v = (rng.normal(size=(length, kv_heads, 64)).astype(np.float16) for _ in range(2))
    order = np.stack([rng.permutation(64) for _ in range(kv_heads)]).astype(np.int16)
    q = rng.normal(size=(1, heads, 64)).astype(np.float32)
    coded_keys = length - 5
    coded_values = length - 2 if form.by_token else (length - 2) // form.block * form.block
    keys = np.zeros(-(-coded_keys // 16) * kv_heads * form.key_bytes(64), np.uint8)
    values = np.zeros(-(-coded_values // form.value_tokens) * kv_heads * form.value_bytes(64), np.uint8)
    bfp.encode_keys(k[:coded_keys], 0, keys, form, order)
    bfp.encode_values(v[:coded_values], 0, values, form)
    plain_k, plain_v = k.astype(np.float32), v.astype(np.float32)
    bfp.decode_keys(keys, 0, plain_k[:coded_keys], form, order)
    bfp.decode_values(values, 0, plain_v[:coded_values], form)
    where = {"scale": 0.125, "first_position": length - 1, "window": window}
    out, stats = np.empty_like(q), np.empty((1, heads, 2), np.float32)
    bfp.attend_bfp(
        q, keys, values, k[coded_keys:], v[coded_values:], form=form, order=order, coded_keys=coded_keys,
        coded_values=coded_values, **where, out=out, stats=stats,
    )  # fmt: skip
    # the query meets coded keys in blocks of its own, exact ones as it is
    by_place = np.take_along_axis(
        q * np.float32(0.125), np.repeat(order, heads // kv_heads, axis=0)[None].astype(np.intp), axis=2
    )
    coded_q = np.empty_like(q)
    np.put_along_axis(
        coded_q,
        np.repeat(order, heads // kv_heads, axis=0)[None].astype(np.intp),
        decoded(by_place, 8, form.block),
        axis=2,
    )
    scores = np.einsum("hd,thd->ht", coded_q[0], np.repeat(plain_k, heads // kv_heads, axis=1))
    exact = np.einsum("hd,thd->ht", q[0] * 0.125, np.repeat(plain_k, heads // kv_heads, axis=1))
    scores[:, coded_keys:] = exact[:, coded_keys:]
    if window is not None:
        scores[:, : length - window] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = np.einsum("ht,thd->hd", weights, np.repeat(plain_v, heads // kv_heads, axis=1)) / weights.sum(1)[:, None]
    np.testing.assert_allclose(out[0], wanted, atol=2e-5)
    np.testing.assert_allclose(stats[0, :, 0], scores.max(axis=1), atol=2e-5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", [bfp.BfpForm(), bfp.BfpForm(bits=3, value_bits=6, by_token=False)], ids=str)
def test_a_prompt_meets_the_coded_past_in_float(form: bfp.BfpForm) -> None:
    rng = np.random.default_rng(3)
    k, v = (rng.normal(size=(100, 2, 32)).astype(np.float16) for _ in range(2))
    order = np.stack([rng.permutation(32) for _ in range(2)]).astype(np.int16)
    q = rng.normal(size=(36, 4, 32)).astype(np.float32)
    keys = np.zeros(4 * 2 * form.key_bytes(32), np.uint8)
    values = np.zeros(64 // form.value_tokens * 2 * form.value_bytes(32), np.uint8)
    bfp.encode_keys(k[:64], 0, keys, form, order)
    bfp.encode_values(v[:64], 0, values, form)
    plain_k, plain_v = k.astype(np.float32), v.astype(np.float32)
    bfp.decode_keys(keys, 0, plain_k[:64], form, order)
    bfp.decode_values(values, 0, plain_v[:64], form)
    where = {"scale": 0.2, "first_position": 64}
    found = bfp.attend_bfp(
        q, keys, values, k[64:], v[64:], form=form, order=order, coded_keys=64, coded_values=64, **where,
        out=np.empty_like(q),
    )  # fmt: skip
    wanted = attention.attend_float(q, plain_k, plain_v, **where, out=np.empty_like(q))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_bad_shapes_are_refused() -> None:
    rows, out = np.zeros((4, 1, 48), np.float16), np.zeros(1000, np.uint8)
    with pytest.raises(ValueError, match="multiple of 32"):
        bfp.encode_keys(rows, 0, out, bfp.BfpForm(block=16))
    with pytest.raises(ValueError, match="bits must be"):
        bfp.encode_keys(rows, 0, out, bfp.BfpForm(bits=5))
    with pytest.raises(ValueError, match="too short"):
        bfp.encode_keys(np.zeros((4, 1, 64), np.float16), 0, out[:10], bfp.BfpForm())
    with pytest.raises(ValueError, match="not there"):
        bfp.encode_keys(np.zeros((4, 1, 32), np.float16), 0, out, bfp.BfpForm(), np.full((1, 32), 32, np.int16))
    with pytest.raises(ValueError, match="whole blocks"):
        bfp.encode_values(np.zeros((4, 1, 32), np.float16), 0, out, bfp.BfpForm(by_token=False))
