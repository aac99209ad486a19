"""The NumPy form of the kernel against the decoded product, for all that may change a result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kernels import marlin
from memwall.kernels.marlin_model import Tiling, copies, multiply


def case(size_k: int, size_n: int, groups: int, rows: int, seed: int) -> tuple[np.ndarray, marlin.MarlinWeight]:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (size_k, size_n)).astype(np.uint8)
    # scales of neighbouring groups differ by powers of ten: one that is applied on the wrong side of a border shows
    sizes = 10.0 ** random.integers(-3, 0, (groups, 1))
    scales = (sizes * (0.5 + random.random((groups, size_n)))).astype(np.float16)
    return random.standard_normal((rows, size_k)).astype(np.float16), marlin.pack(codes, scales)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from([1, 15, 16, 17, 64, 65, 130]),
    st.integers(1, 40), st.integers(0, 99),
)  # fmt: skip
def test_agrees_with_the_decoded_product(
    k_tiles: int, n_tiles: int, grouped: bool, rows: int, processors: int, seed: int
) -> None:
    size_k, size_n = 128 * k_tiles, 256 * n_tiles
    x, weight = case(size_k, size_n, k_tiles if grouped else 1, rows, seed)
    found = multiply(x, weight, processors).astype(np.float64)
    want = x.astype(np.float64) @ marlin.decode(weight).astype(np.float64)
    assert np.abs(found - want).mean() < 1e-3 * np.abs(want).mean()  # the repository's own bound


def test_processors_change_rounding_alone() -> None:
    x, weight = case(512, 256, 4, 20, 0)
    alone, many = multiply(x, weight, 1), multiply(x, weight, 7)
    assert (alone != many).any()  # partial results pass through half floats
    largest = np.abs(x.astype(np.float32)) @ np.abs(marlin.decode(weight))  # sums may nearly cancel
    assert (np.abs(alone.astype(np.float32) - many.astype(np.float32)) <= 1e-3 * largest).all()


def test_tiles_and_launches_are_those_published() -> None:
    assert Tiling.of(16) == Tiling(128, 128, 16)
    assert Tiling.of(17) == Tiling(64, 256, 32)
    assert Tiling.of(64).warps_along_k == 2
    assert Tiling.of(1).warps_along_k == 4
    assert copies(40) == [(40, 1)]
    assert copies(130) == [(128, 2), (2, 1)]
    assert copies(64 * 17) == [(1024, 16), (64, 1)]


def test_what_it_does_not_take() -> None:
    x, weight = case(128, 256, 1, 2, 0)
    with pytest.raises(InputError, match="x must be float16"):
        multiply(x.astype(np.float32), weight, 4)
    narrow = marlin.pack(np.zeros((128, 64), np.uint8), np.ones((1, 64), np.float16))
    with pytest.raises(InputError, match="N of 256"):
        multiply(x, narrow, 4)
