"""Bit-plane products against 64-bit integers, for every pair of widths, odd sizes and every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from memwall import _native
from memwall.errors import InputError
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
