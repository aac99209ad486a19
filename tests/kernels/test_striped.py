"""Products dealt in stripes: the decoded product, and the same bits whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from memwall import _native, kernels
from memwall.formats import codec
from memwall.kernels import reference
from tests.kernels.test_linear import activations, assert_close, product, weights

ROWS, COLS = 70, 5000  # three strips of 32 or five of 16; the last panel of columns is a short one


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = kernels.num_threads()
    yield
    kernels.set_num_threads(before)


def striped(x: np.ndarray, matrix: kernels.Matrix, threads: int, **options: object) -> tuple[np.ndarray, int]:
    kernels.set_num_threads(threads)
    before = _native.linear_striped_products()
    out = product(x, matrix, **options).numpy()
    return out, _native.linear_striped_products() - before


@pytest.mark.parametrize(
    "spec", ["int4-g128", "int3-g32-asym", "nf4", "irnf4", "e4m3", "sparse4-g256", "sparse2-g64-asym"]
)
def test_stripes_give_the_product_and_no_thread_count_changes_it(spec: str, isa: str) -> None:
    matrix, weight = weights(ROWS, COLS, spec)
    group = int(codec(spec).group)  # type: ignore[attr-defined]
    x = activations(130, COLS)  # three blocks of tokens
    results = []
    for threads in (4, 7, 16):
        found, count = striped(x, matrix, threads)
        assert count == 1
        results.append(found)
    rounded = reference.round_activations(torch.from_numpy(x), group)
    size = weight.abs() + float(weight.abs().max())
    assert_close(torch.from_numpy(results[0]), reference.linear(rounded, weight), rounded, size)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_only_where_threads_would_wait() -> None:
    matrix, _ = weights(ROWS, COLS, "int4-g128")
    x = activations(40, COLS)
    assert striped(x, matrix, 1)[1] == 0
    assert striped(x[:1], matrix, 7)[1] == 0  # one token is read by single tiles
    small, _ = weights(16, 128, "int4-g128")
    assert striped(activations(40, 128), small, 7)[1] == 0  # too little to wake anyone for
    tall, _ = weights(4096, 512, "int4-g128")
    assert striped(activations(40, 512), tall, 4)[1] == 0  # strips enough for all


def test_biases_sums_and_other_matrices_of_the_call() -> None:
    matrix, _ = weights(ROWS, COLS, "int4-g128")
    tall, _ = weights(4096, COLS, "int4-g64")
    x, bias = activations(20, COLS), activations(1, ROWS, seed=3)[0]
    kernels.set_num_threads(7)
    outs = [np.ones((20, ROWS), np.float32), np.ones((20, 4096), np.float32)]
    kernels.linear(x, [matrix, tall], outs, accumulate=True, biases=[bias, None])
    alone = striped(x, matrix, 7)[0]
    np.testing.assert_allclose(outs[0], alone + bias + 1, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(outs[1], striped(x, tall, 7)[0] + 1, rtol=1e-5, atol=1e-4)


def test_room_for_stripes_is_counted() -> None:
    assert kernels.predict_scratch_bytes(64, COLS, group=0, threads=3) == 3 * (72 + 48) * 1024
