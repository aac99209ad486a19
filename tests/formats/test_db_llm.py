"""Two binary matrices and two scales: hand-made numbers, the nearest of four levels, and fits that only get better."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.db_llm import DualBinaryCodec, dual_scales, nearest

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def form(spec: str = "dual2") -> DualBinaryCodec:
    found = codec(spec)
    assert isinstance(found, DualBinaryCodec)
    return found


def test_a_value_is_two_switched_scales() -> None:
    """Levels -1, 0, 1, 2 and, mirrored, -2, -1, 0, 1: both come back as they are."""
    values = np.array([[-1, 0, 1, 2] * 32, [-2, -1, 0, 1] * 32], np.float32) * 0.5
    packed = form().encode(values)
    np.testing.assert_array_equal(form().decode(packed), values)
    codes, (first, second) = form().unpack(packed)
    np.testing.assert_array_equal(first[:, 0], [1, -1])
    np.testing.assert_array_equal(second[:, 0], [-0.5, 0.5])
    np.testing.assert_array_equal(codes[0, :4], [2, 0, 3, 1])
    assert packed.bits_per_value == 2.25 * 8  # a row tile is 16 rows


def test_scales_part_where_levels_are_not_even() -> None:
    values = np.array([[-0.7, 0, 1.7, 1.0] * 32], np.float32)
    np.testing.assert_allclose(form().decode(form().encode(values)), values, atol=2e-3)
    even = codec("int2-g128-asym")
    assert np.abs(even.decode(even.encode(values)) - values).max() > 0.05


@QUICK
@given(st.integers(1, 9), st.integers(1, 130), st.integers(0, 99), st.booleans())
def test_codes_are_nearest_and_fits_beat_their_start(rows: int, count: int, seed: int, weighed: bool) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_t(3, (rows, count)).astype(np.float32)
    weights = random.random(count).astype(np.float32) + 0.1 if weighed else None
    first, second = dual_scales(values, weights)
    codes = nearest(values, first[:, None], second[:, None])
    levels = np.stack([np.zeros(rows), first, second, first + second], axis=1)
    away = np.abs(values[:, :, None] - levels[:, None])
    np.testing.assert_allclose(
        np.take_along_axis(away, codes[..., None].astype(int), 2)[..., 0], away.min(axis=2), atol=1e-6
    )
    share = np.ones(count) if weights is None else weights
    cost = (np.square(away.min(axis=2)) * share).sum(axis=1)
    for side in (1, -1):
        step = side * np.maximum((side * values).max(axis=1) / 2, (-side * values).max(axis=1))[:, None]
        start = np.abs(values[:, :, None] - step[..., None] * np.array([-1, 0, 1, 2])).min(axis=2)
        assert (cost <= (np.square(start) * share).sum(axis=1) * 1.001 + 1e-6).all()


@pytest.mark.parametrize("spec", ["dual", "dual3", "dual2-g0", "dual2-g128-f32"])
def test_specs_that_name_nothing(spec: str) -> None:
    with pytest.raises(InputError):
        codec(spec)


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="NaN"):
        form().encode(np.full((4, 8), np.nan, np.float32))
