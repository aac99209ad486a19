"""SpQR's stored form: exact bytes, numbers checked by hand, and outliers that meet what their codes stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.spqr import Outliers, Parts, SpqrCodec, fit, pack, second_level, second_values, unpack

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def random_parts(rows: int, columns: int, bits: int, seed: int, *, share: float, ordered: bool) -> Parts:
    random = np.random.default_rng(seed)
    groups = -(-columns // 16)
    kept = np.nonzero(random.random((rows, columns)) < share)
    outliers = Outliers(rows=kept[0], places=kept[1], values=random.standard_normal(len(kept[0])).astype(np.float16))
    return Parts(
        codes=random.integers(0, 1 << bits, (rows, columns), np.uint8),
        scale_codes=random.integers(0, 8, (rows, groups), np.uint8),
        zero_codes=random.integers(0, 8, (rows, groups), np.uint8),
        second=random.standard_normal((-(-rows // 16), groups, 4)).astype(np.float16),
        outliers=outliers if len(kept[0]) else None,
        order=random.permutation(columns) if ordered else None,
    )


@QUICK
@given(
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(2, 8),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_packing_keeps_every_part(rows: int, columns: int, bits: int, share: float, ordered: bool, seed: int) -> None:
    parts = random_parts(rows, columns, bits, seed, share=share, ordered=ordered)
    packed = pack(bits, parts)
    found = unpack(packed)
    for name in ("codes", "scale_codes", "zero_codes", "second", "order"):
        np.testing.assert_array_equal(getattr(found, name), getattr(parts, name))
    assert (found.outliers is None) == (parts.outliers is None)
    if found.outliers is not None and parts.outliers is not None:
        for name in ("rows", "places", "values"):
            np.testing.assert_array_equal(getattr(found.outliers, name), getattr(parts.outliers, name))
    form = codec(packed.spec)
    assert {n: (b.shape, b.dtype) for n, b in packed.buffers.items()} == form.buffers(packed.shape)
    num_outliers = 0 if parts.outliers is None else len(parts.outliers.values)
    tiles, units = -(-rows // 16), -(-columns // 32)
    expected = tiles * units * (64 * bits + 40) + 2 * columns * ordered
    assert packed.nbytes == expected + (4 * (rows + 1) + 4 * num_outliers if num_outliers else 0)
    # by hand, one number at a time
    wanted = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for place in range(columns):
            step, least, zero_step, zero_least = parts.second[row // 16, place // 16].astype(np.float32)
            scale = step * np.float32(parts.scale_codes[row, place // 16]) + least
            zero = zero_step * np.float32(parts.zero_codes[row, place // 16]) + zero_least
            wanted[row, place] = scale * (np.float32(parts.codes[row, place]) - zero)
    if parts.outliers is not None:
        wanted[parts.outliers.rows, parts.outliers.places] += parts.outliers.values.astype(np.float32)
    decoded = form.decode(packed)
    order = np.arange(columns) if parts.order is None else parts.order
    np.testing.assert_array_equal(decoded[:, order], wanted)


def test_bits_are_those_of_the_paper_and_files_hold_them() -> None:
    """3 + 6 / 16 + 64 / 256 = 3.625 at whole tiles, and 32 bits an outlier and a row."""
    weight = np.random.default_rng(0).standard_normal((256, 512), np.float32)
    assert codec("spqr3").encode(weight).bits_per_value == 3.625
    assert codec("spqr4").encode(weight).bits_per_value == 4.625
    share = 0.01
    packed = codec(f"spqr3-o{int(share * weight.size)}").encode(weight)
    assert packed.bits_per_value == pytest.approx(3.625 + 32 * share + 32 / 512, abs=2e-3)


def test_a_group_is_fitted_from_minimum_to_maximum() -> None:
    scales, zeros = fit(np.float32([[-1.0, 0.25, 2.5], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]), 3)
    np.testing.assert_allclose(scales, [0.5, 0.0, 5 / 7], rtol=1e-6)
    np.testing.assert_allclose(zeros, [2.0, 0.0, 0.0])


@QUICK
@given(st.integers(1, 50), st.floats(-100, 100), st.floats(0, 10), st.integers(0, 99))
def test_second_level_is_within_half_a_step(rows: int, centre: float, spread: float, seed: int) -> None:
    values = (centre + spread * np.random.default_rng(seed).standard_normal(rows)).astype(np.float32)
    codes, pair = second_level(values, 3, "scale")
    assert codes.max() <= 7
    found = second_values(codes, pair)
    runs = [values[start : start + 16] for start in range(0, rows, 16)]
    steps = np.repeat([np.ptp(run) / 7 for run in runs], [len(run) for run in runs])
    slack = 2e-3 * np.abs(values).max() + 7 * 2e-3 * steps + 1e-6  # of float16
    assert (np.abs(found - values) <= 0.5 * steps + slack).all()


def test_equal_scales_cost_nothing_and_zero_rows_stay_near_zero() -> None:
    weight = np.tile(np.linspace(-1, 1, 16, dtype=np.float32), (20, 4))
    form = codec("spqr4")
    assert np.abs(form.decode(form.encode(weight)) - weight).max() < 2e-3
    np.testing.assert_array_equal(form.decode(form.encode(np.zeros((5, 40), np.float32))), 0)
    constant = np.full((16, 32), 7.25, np.float32)
    assert np.abs(form.decode(form.encode(constant)) - constant).max() < 0.02


@QUICK
@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 20), st.integers(0, 99))
def test_outliers_of_encode_are_the_largest_errors(rows: int, columns: int, count: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_t(2, (rows, columns)).astype(np.float32)
    count = min(count, weight.size)
    plain = codec("spqr3").decode(codec("spqr3").encode(weight))
    kept = codec(f"spqr3-o{count}")
    found = kept.decode(kept.encode(weight))
    errors = np.abs(plain - weight)
    changed = found != plain
    assert changed.sum() <= count
    # value and code meet: what is left is the rounding of what was missing
    assert (np.abs(found - weight)[changed] <= errors[changed] * 2.0**-11 + 1e-6).all()
    assert errors[~changed].max(initial=0) <= errors[changed].min(initial=np.inf) + 1e-6


def test_wide_matrices_have_wide_indices() -> None:
    form = SpqrCodec(bits=3, ordered=True, num_outliers=5)
    assert form.buffers((1, 65_536))["outlier_columns"][1] == np.uint16
    assert form.buffers((1, 65_537))["outlier_columns"][1] == form.buffers((1, 65_537))["order"][1] == np.uint32
    parts = random_parts(1, 70_001, 3, 0, share=0.001, ordered=True)
    found = unpack(pack(3, parts))
    assert found.outliers is not None
    assert parts.outliers is not None
    np.testing.assert_array_equal(found.outliers.places, parts.outliers.places)
    assert parts.outliers.places.max() > 65_536


@pytest.mark.parametrize(
    ("spec", "complaint"), [("spqr1", "2 to 8"), ("spqr9", "2 to 8"), ("spqr3-x", "unknown"), ("spqr", "unknown")]
)
def test_specs_that_name_nothing(spec: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        codec(spec)


def test_numbers_that_do_not_fit() -> None:
    weight = np.ones((4, 32), np.float32)
    with pytest.raises(InputError, match="NaN"):
        codec("spqr3").encode(np.where(weight, np.nan, 0).astype(np.float32))
    with pytest.raises(InputError, match="overflows float16"):
        codec("spqr3").encode(weight * np.linspace(-1e6, 1e6, 32, dtype=np.float32))
    with pytest.raises(InputError, match="fewer weights than outliers"):
        codec("spqr3-o129").encode(weight)
    with pytest.raises(InputError, match="matrices"):
        codec("spqr3").encode(np.ones(16, np.float32))


def test_the_label_leaves_out_what_differs_between_matrices() -> None:
    assert codec("spqr3-ordered-o12").label == codec("spqr3").label == "spqr3"
    assert replace(codec("spqr3-ordered-o12"), num_outliers=0, ordered=False) == codec("spqr3")  # type: ignore[type-var]
