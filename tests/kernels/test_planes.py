"""Bit-plane products against 64-bit integers, for every pair of widths, odd sizes and every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from memwall import _native, kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats import apmm_bipolar_int as planes
from memwall.kernels.planes import pack_planes, plane_products, plane_products_apart

ISAS = ("portable", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        _native.force_isa(request.param)
    except (ValueError, RuntimeError) as why:
        pytest.skip(f"this machine has no {request.param}: {why}")
    yield request.param
    _native.force_isa(_native.best_isa())


def random_planes(rows: int, cols: int, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, cols), np.uint8)
    return planes.pack(codes, bits), planes.integers_of(codes, bits)


@pytest.mark.parametrize(("n", "m"), list(itertools.product(range(1, 9), range(1, 9))))
def test_products_are_exact(isa: str, n: int, m: int) -> None:
    for cols in (1, 63, 64, 65, 257, 1003):
        w, w_values = random_planes(11, cols, n, cols)
        x, x_values = random_planes(3, cols, m, cols + 1)
        np.testing.assert_array_equal(plane_products(w, x, cols), x_values @ w_values.T)


def test_sums_beyond_what_float32_holds(isa: str) -> None:
    cols = 33_000
    ones = planes.pack(np.full((1, cols), 255, np.uint8), 8)
    most = 255 * 255 * cols
    assert most > 1 << 24
    assert plane_products(ones, ones, cols).tolist() == [[most]]
    # one bit less in one place: a change far below the precision of float32 at that size
    codes = np.full((1, cols), 255, np.uint8)
    codes[0, 17] = 254
    assert plane_products(planes.pack(codes, 8), ones, cols).tolist() == [[most - 2 * 255]]


def test_planes_apart_add_up(isa: str) -> None:
    w, w_values = random_planes(9, 130, 3, 0)
    x, x_values = random_planes(4, 130, 5, 1)
    apart = plane_products_apart(w, x, 130)
    assert apart.shape == (3, 5, 4, 9)
    weights = 1 << np.add.outer(np.arange(3), np.arange(5))
    np.testing.assert_array_equal(np.einsum("ijtr,ij->tr", apart.astype(np.int64), weights), x_values @ w_values.T)
    # the form with AND instead of exclusive or is the same number
    a, b = (planes.unpack(one, 130) for one in (w, x))
    bits = [(a >> i & 1).astype(np.int64) for i in range(3)], [(b >> j & 1).astype(np.int64) for j in range(5)]
    by_and = 4 * bits[1][2] @ bits[0][1].T - 2 * bits[0][1].sum(1) - 2 * bits[1][2].sum(1)[:, None] + 130
    np.testing.assert_array_equal(apart[1, 2], by_and)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_the_codec_s(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((6, 131)).astype(np.float32)
    x[2] = 0
    words, scales = pack_planes(x, bits, grouped=True)
    codes, expected = planes.codes_of(planes.in_groups(x), bits)
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(words, planes.pack(codes.reshape(6, -1)[:, :131], bits))
    words, scales = pack_planes(x, bits)
    codes, expected = planes.codes_of(x, bits)
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(words, planes.pack(codes, bits))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="NaN"):
        pack_planes(np.array([[np.inf, 1.0]], np.float32), 2)
    w, _ = random_planes(2, 64, 8, 0)
    with pytest.raises(ValueError, match="32 bits"):
        plane_products(np.zeros((1, 8, 600), np.uint64), np.zeros((1, 8, 600), np.uint64), 600 * 64)
    with pytest.raises(ValueError, match="ceil"):
        plane_products(w, w, 65)
    assert plane_products(w, np.zeros((0, 2, 1), np.uint64), 64).shape == (0, 2)


@pytest.mark.parametrize(("spec", "tokens"), [("w1a1", 1), ("w3a4", 1), ("w2a8", 5), ("w5a3", 40), ("w8a8", 3)])
def test_layers_multiply_by_planes(isa: str, spec: str, tokens: int) -> None:
    random = np.random.default_rng(5)
    rows, cols = 45, 131
    form = codec(spec)
    packed = form.encode(random.standard_normal((rows, cols)).astype(np.float32))
    x = random.standard_normal((tokens, cols)).astype(np.float32)
    bias = random.standard_normal(rows).astype(np.float32)
    codes, scales = planes.codes_of(x, form.activation_bits)
    rounded = planes.integers_of(codes, form.activation_bits) * scales[:, None].astype(np.float64)
    weights = form.decode(packed).astype(np.float64)
    for exact, given in ((False, rounded), (True, x.astype(np.float64))):
        out = np.full((tokens, rows), 7, np.float32)
        kernels.linear(x, [kernels.matrix(packed)], [out], exact=exact, accumulate=True, biases=[bias])
        np.testing.assert_allclose(out, given @ weights.T + bias + 7, rtol=2e-5, atol=2e-4)
    # beside integers and floats in one call
    other = kernels.matrix(codec("int8").encode(weights.astype(np.float32)))
    outs = [np.empty((tokens, rows), np.float32) for _ in range(2)]
    kernels.linear(x, [kernels.matrix(packed), other], outs)
    np.testing.assert_allclose(outs[0], rounded @ weights.T, rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(
        kernels.gather_rows(kernels.matrix(packed), np.array([3, 44]), np.empty((2, cols), np.float32)),
        weights[[3, 44]],
        rtol=1e-6,
    )
    assert kernels.matrix(packed).nbytes == packed.nbytes


def grouped_reference(form: planes.BitPlaneCodec, packed: Packed, x: np.ndarray) -> np.ndarray:
    """What the codec's docstring says, in NumPy: float32 [tokens, rows]."""
    groups = planes.in_groups(x)
    codes, x_scales = planes.codes_of(groups, form.activation_bits)
    w = planes.integers_of(planes.unpack(packed.buffers["words"], x.shape[1]), form.weight_bits)
    w = planes.in_groups(w.astype(np.float32)).astype(np.int64)
    sums = np.einsum("tgc,rgc->trg", planes.integers_of(codes, form.activation_bits), w).astype(np.float32)
    terms = sums * (packed.buffers["scales"].astype(np.float32)[None] * x_scales[:, None])
    lanes = np.zeros((*terms.shape[:2], 8), np.float32)
    for word in range(terms.shape[2]):
        lanes[..., word % 8] += terms[..., word]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


@pytest.mark.parametrize("cols", [1, 63, 64, 131, 511, 512, 513, 700])
@pytest.mark.parametrize(("spec", "tokens"), [("w1a1-g64", 1), ("w2a2-g64", 5), ("w3a4-g64", 1), ("w8a8-g64", 3)])
def test_groups_multiply_bit_for_bit(isa: str, spec: str, tokens: int, cols: int) -> None:
    random = np.random.default_rng(cols)
    form = codec(spec)
    assert isinstance(form, planes.BitPlaneCodec)
    packed = form.encode(random.standard_normal((45, cols)).astype(np.float32))
    x = random.standard_normal((tokens, cols)).astype(np.float32)
    matrix = kernels.matrix(packed)
    out = np.empty((tokens, 45), np.float32)
    kernels.linear(x, [matrix], [out])
    np.testing.assert_array_equal(out, grouped_reference(form, packed, x))
    kernels.linear(x, [matrix], [out], exact=True)
    weights = form.decode(packed).astype(np.float64)
    np.testing.assert_allclose(out, x.astype(np.float64) @ weights.T, rtol=2e-5, atol=2e-4)
    np.testing.assert_array_equal(
        kernels.gather_rows(matrix, np.array([3, 44]), np.empty((2, cols), np.float32)), form.decode(packed)[[3, 44]]
    )
    assert matrix.nbytes == packed.nbytes
    # beside the same widths with a scale per token, which round the same input otherwise
    plain = codec(spec.removesuffix("-g64")).encode(random.standard_normal((45, cols)).astype(np.float32))
    outs, alone = [np.empty((tokens, 45), np.float32) for _ in range(2)], np.empty((tokens, 45), np.float32)
    kernels.linear(x, [kernels.matrix(plain), matrix], outs)
    kernels.linear(x, [kernels.matrix(plain)], [alone])
    np.testing.assert_array_equal(outs[0], alone)
    np.testing.assert_array_equal(outs[1], grouped_reference(form, packed, x))


def test_scratch_is_predicted() -> None:
    for spec, tokens in (("w3a4", 1), ("w2a8", 64), ("w3a4-g64", 8)):
        packed = codec(spec).encode(np.ones((64, 4160), np.float32))
        before = kernels.scratch_bytes()
        kernels.linear(
            np.ones((tokens, 4160), np.float32), [kernels.matrix(packed)], [np.empty((tokens, 64), np.float32)]
        )
        panels = kernels.predict_scratch_bytes(tokens, 4160, group=0)
        predicted = kernels.predict_scratch_bytes(tokens, 4160, group=kernels.roundings(spec)[0]) - panels
        assert 0 <= kernels.scratch_bytes() - before <= predicted + panels
        form = codec(spec)
        assert isinstance(form, planes.BitPlaneCodec)
        scales = 65 if form.grouped else 1
        assert predicted == -(-tokens * (65 * 8 * form.activation_bits + 4 * scales) // 64) * 64


def test_compiled_encoding_is_the_codec_s() -> None:
    values = np.random.default_rng(3).standard_normal((37, 200)).astype(np.float16)
    packed, expected = kernels.encode("w3a4", values), codec("w3a4").encode(values)
    for name, buffer in expected.buffers.items():
        np.testing.assert_array_equal(packed.buffers[name], buffer)
    with pytest.raises(InputError, match="NaN"):
        kernels.encode("w3a4", np.full((2, 3), np.inf, np.float32))
