"""XR-NPE's formats: every code, every product of two, sums in the quire and their one rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.xr_npe import (
    FORMATS,
    FP4,
    POSIT4,
    POSIT8,
    POSIT16,
    LaneFormat,
    Quire,
    exact_dot,
    integers,
    lane_format,
    matmul,
    pack_words,
    round_exactly,
    unpack_words,
)

NAMES = pytest.mark.parametrize("found", FORMATS, ids=lambda found: found.name)


def real_codes(found: LaneFormat) -> np.ndarray:
    codes = np.arange(1 << found.bits)
    return codes[codes != found.nar]


def test_facts_of_the_paper() -> None:
    assert [(found.lanes, found.blocks) for found in FORMATS] == [(4, 4), (4, 0), (2, 18), (1, 49)]
    assert [round(100 * found.utilisation) for found in FORMATS] == [8, 0, 37, 100]
    assert FP4.levels.values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert POSIT4.levels.values[1:8].tolist() == [1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16]
    assert (POSIT8.levels.largest, POSIT8.levels.values[1]) == (64, 2.0**-6)
    assert (POSIT16.levels.largest, POSIT16.levels.values[1]) == (2.0**28, 2.0**-28)


@NAMES
def test_every_code_is_an_integer_of_units(found: LaneFormat) -> None:
    codes = real_codes(found)
    counts = integers(found, codes)
    values = found.levels.values[codes].astype(np.float64)
    np.testing.assert_array_equal(counts * 2.0**found.unit, values)
    odd = np.abs(counts[counts != 0])
    assert (odd & -odd).min() == 1  # no larger unit would do
    significands = odd // (odd & -odd)
    assert int(significands.max()).bit_length() == found.significand_bits


@NAMES
def test_every_code_survives_rounding(found: LaneFormat) -> None:
    for code, count in zip(real_codes(found).tolist(), integers(found, real_codes(found)).tolist()):
        assert round_exactly(found, count, found.unit) == (0 if count == 0 else code)


@NAMES
def test_rounding_equals_the_level_set(found: LaneFormat) -> None:
    """Levels, the points where they part, and their float32 neighbours, which the format engine rounds too."""
    levels = found.levels
    marks = np.concatenate([levels.levels, levels.thresholds, np.nextafter(levels.thresholds, np.float32(-np.inf))])
    marks = np.concatenate([marks, np.float32([1e9, -1e9])])[:: 1 if found.bits < 16 else 37]
    for mark, code in zip(marks.tolist(), levels.encode(marks).tolist(), strict=True):
        exact = Fraction(mark)
        exponent = 1 - exact.denominator.bit_length()
        assert round_exactly(found, exact.numerator, exponent) == code, mark


def test_rounding_sees_what_float32_does_not() -> None:
    tie = 3 << 60  # 0.75 * 2^62 stands for 0.75: between 0.5 (odd code) and 1 (even code)
    assert [round_exactly(FP4, tie + d, -62) for d in (-1, 0, 1)] == [1, 2, 2]
    assert [round_exactly(FP4, -tie + d, -62) for d in (-1, 0, 1)] == [10, 10, 9]
    assert round_exactly(POSIT16, 1, -400) == 1
    assert round_exactly(POSIT16, -1, -400) == 0xFFFF
    assert round_exactly(POSIT8, 1, 400) == 0x7F
    assert round_exactly(FP4, 1, -400) == 0


@pytest.mark.parametrize("found", [FP4, POSIT4, POSIT8], ids=lambda found: found.name)
def test_all_products(found: LaneFormat) -> None:
    codes = real_codes(found)
    values = found.levels.values[codes].astype(np.float64)
    products = matmul(found, codes[:, None], codes[:, None])
    assert (products.astype(np.float64) * 2.0**found.product_unit == np.outer(values, values)).all()
    quire = Quire()
    for a, b in ((a, b) for a in codes[::7].tolist() for b in codes.tolist()):
        quire.clear()
        quire.multiply_add(found, a, b)
        assert quire.value * Fraction(2) ** found.product_unit == exact_dot(found, [a], [b])


@NAMES
@given(data=st.data())
def test_sums_are_exact(found: LaneFormat, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    one = st.sampled_from(real_codes(found).tolist())
    a, b = (np.asarray(data.draw(st.lists(one, min_size=size, max_size=size)), np.uint16) for _ in range(2))
    quire = Quire()
    for x, y in zip(pack_words(found, a).tolist(), pack_words(found, b).tolist(), strict=True):
        quire.multiply_add(found, x, y)
    exact = exact_dot(found, a.tolist(), b.tolist())
    assert quire.value * Fraction(2) ** found.product_unit == exact
    assert matmul(found, a[None], b[None])[0, 0] == quire.value
    assert (quire.saturated, quire.nar) == (False, False)


@NAMES
def test_words_hold_lanes_from_the_low_bits_up(found: LaneFormat) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << found.bits, (3, 7)).astype(np.uint16)
    words = pack_words(found, codes)
    assert words.shape == (3, -(-7 // found.lanes))
    assert words.nbytes >= 3 * 7 * found.bits / 8
    np.testing.assert_array_equal(unpack_words(found, words, 7), codes)
    assert words[0, 0] & ((1 << found.bits) - 1) == codes[0, 0]


def test_cancellation_that_float32_loses() -> None:
    big, one = round_exactly(POSIT16, 1 << 28), round_exactly(POSIT16, 1)
    minus = round_exactly(POSIT16, -(1 << 28))
    a, b = np.asarray([[big, one, minus]]), np.asarray([[big, one, big]])
    values = POSIT16.levels.values
    assert np.float32(values[a] * values[b]).cumsum(dtype=np.float32)[-1] == 0
    assert matmul(POSIT16, a, b)[0, 0] * Fraction(2) ** POSIT16.product_unit == 1


def test_a_narrow_quire_saturates_and_says_so() -> None:
    largest = 7 * 0x1111
    quire = Quire()
    for _ in range((1 << 31) // (4 << 16) - 1):
        quire.add(POSIT4, 4 << 16)  # what a word of largest 4-bit posits adds
    quire.multiply_add(POSIT4, largest, largest)
    assert quire.saturated
    assert quire.value == 2**31 - 1
    assert quire.code(POSIT4, POSIT8) == 0x7F
    short = Quire(bits=20)
    short.multiply_add(POSIT8, 0x8181, 0x7F7F)
    assert (short.value, short.saturated) == (-(1 << 19), True)
    with pytest.raises(InputError, match="16 to 256"):
        Quire(bits=8)


def test_not_a_real_stays() -> None:
    quire = Quire()
    quire.multiply_add(POSIT8, 0x8001, 0x4040)
    quire.multiply_add(POSIT8, 0x4040, 0x4040)
    assert quire.nar
    assert [quire.code(POSIT8, out) for out in FORMATS] == [0, 0x8, 0x80, 0x8000]
    with pytest.raises(InputError, match="NaR"):
        matmul(POSIT4, np.asarray([[8]]), np.asarray([[1]]))


def test_names() -> None:
    assert lane_format("posit8") is lane_format("posit8es0-g64") is lane_format("posit8_0") is POSIT8
    assert lane_format("e2m1") is FP4
    for found in FORMATS:
        assert codec(f"{found.spec}-raw").levels.name == found.levels.name  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="posit16_1"):
        lane_format("int4")
