"""Integers whose columns stand in another order: products are bit for bit those of the same on gathered inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memwall import _native, kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec
from memwall.formats.ordered import OrderedCodec, weights_of

SIZES = [(1, 33, 300), (1, 16, 128), (2, 50, 128), (7, 31, 129), (9, 64, 257), (19, 100, 704), (3, 17, 1), (70, 40, 96)]


def matrix_of(rows: int, cols: int, inner: IntegerCodec, seed: int, order: np.ndarray | None = None) -> Packed:
    rng = np.random.default_rng(seed)
    held = inner.encode(rng.standard_normal((rows, cols)).astype(np.float32))
    return OrderedCodec(inner=inner).around(held, rng.permutation(cols) if order is None else order)


def product(x: np.ndarray, packed: Packed, *, exact: bool = False) -> np.ndarray:
    out = np.empty((len(x), packed.shape[0]), np.float32)
    kernels.linear(x, [kernels.matrix(packed)], [out], exact=exact)
    return out


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 64, True), (3, 128, False), (2, 32, False), (8, 128, True), (5, 64, True)]
)
def test_every_bit_of_plain_integers(
    isa: str, threads: int, bits: int, group: int, symmetric: bool, exact: bool
) -> None:
    inner = IntegerCodec(bits=bits, group=group, symmetric=symmetric)
    for case, (tokens, rows, cols) in enumerate(SIZES):
        packed = matrix_of(rows, cols, inner, case)
        x = np.random.default_rng(case).standard_normal((tokens, cols)).astype(np.float32)
        gathered = np.ascontiguousarray(x[:, packed.buffers["order"]])
        expected = product(gathered, weights_of(packed), exact=exact)
        np.testing.assert_array_equal(product(x, packed, exact=exact), expected)


def test_matrices_of_several_orders_and_groups_in_one_call(isa: str) -> None:
    """Two that share an order, one of another order, one of another group, and plain ones between them."""
    rng = np.random.default_rng(3)
    cols, order = 192, rng.permutation(192)
    fours = IntegerCodec(bits=4, group=64)
    held = [
        matrix_of(40, cols, fours, 0, order),
        fours.encode(rng.standard_normal((24, cols)).astype(np.float32)),
        matrix_of(17, cols, fours, 1, order),
        matrix_of(33, cols, IntegerCodec(bits=3, group=32, symmetric=False), 2, order),
        matrix_of(20, cols, fours, 3),
        codec("float16").encode(rng.standard_normal((5, cols)).astype(np.float32)),
        codec("comet-g64-x1-gather").encode(rng.standard_normal((9, cols)).astype(np.float32)),
        matrix_of(16, cols, fours, 4, order),
    ]
    for tokens in (1, 3, 40):
        x = rng.standard_normal((tokens, cols)).astype(np.float32)
        for exact in (False, True):
            outs = [np.empty((tokens, each.shape[0]), np.float32) for each in held]
            kernels.linear(x, [kernels.matrix(each) for each in held], outs, exact=exact)
            for each, out in zip(held, outs, strict=True):
                np.testing.assert_array_equal(out, product(x, each, exact=exact), err_msg=each.spec)


def test_rows_bytes_and_scratch(isa: str) -> None:
    packed = matrix_of(37, 300, IntegerCodec(bits=3, group=64, symmetric=False), 5)
    matrix = kernels.matrix(packed)
    assert matrix.nbytes == packed.nbytes == weights_of(packed).nbytes + 600
    rows = np.empty((37, 300), np.float32)
    kernels.gather_rows(matrix, np.arange(37), rows)
    np.testing.assert_array_equal(rows, codec(packed.spec).decode(packed))
    assert kernels.roundings(packed.spec) == (1064,)
    assert kernels.roundings(packed.spec, exact=True) == (1,)


def test_inputs_that_are_not_finite_stay_apart(isa: str) -> None:
    """A group with an infinity gives no number, as with plain integers; which group that is follows the order."""
    packed = matrix_of(16, 128, IntegerCodec(bits=4, group=64), 6, np.arange(128)[::-1])
    x = np.ones((2, 128), np.float32)
    x[1, 3] = np.inf
    out = product(x, packed)
    assert np.isfinite(out[0]).all()
    assert not np.isfinite(out[1]).any()


def test_refused() -> None:
    packed = matrix_of(16, 128, IntegerCodec(bits=4, group=64), 7)
    with pytest.raises(InputError, match="name each once"):
        kernels.matrix(replace(packed, buffers={**packed.buffers, "order": np.zeros(128, np.uint16)}))
    codes, scales = packed.buffers["codes"], packed.buffers["scales"].view(np.uint16)
    with pytest.raises(ValueError, match="order"):
        _native.tile_matrix("int4", 16, 128, 4, 64, codes, scales, None, np.zeros(127, np.uint16))
