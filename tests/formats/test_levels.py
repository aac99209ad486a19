"""Level sets against independent oracles: ml_dtypes, softposit, bitsandbytes, or a reading of the definition."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import levels
from memwall.formats.levels import LevelSet

PUBLISHED = {
    (2, 1): "float4_e2m1fn",
    (2, 3): "float6_e2m3fn",
    (3, 2): "float6_e3m2fn",
    (4, 3): "float8_e4m3fn",
    (5, 2): "float8_e5m2",
}
SETS = [
    *(levels.minifloat(*sizes) for sizes in [*PUBLISHED, (1, 0), (3, 0), (1, 6), (7, 0), (3, 4)]),
    *(levels.posit(*sizes) for sizes in [(4, 0), (4, 1), (5, 3), (6, 1), (8, 0), (8, 2), (11, 1), (16, 1)]),
    *(levels.nf4(), levels.fp4(), levels.dynamic8(), levels.ternary()),
    *(levels.integers(bits) for bits in (1, 2, 8)),
    *(levels.bipolar(bits) for bits in range(1, 9)),
]


def hard_numbers(found: LevelSet, seed: int = 0) -> np.ndarray:
    """Random numbers of all sizes, the levels, where they part, and the float32 on either side of that."""
    random = np.random.default_rng(seed)
    spread = random.standard_normal(4000) * found.largest * 2.0 ** random.integers(-20, 2, 4000)
    halves = (found.levels[1:] + found.levels[:-1]) / np.float32(2)
    marks = np.concatenate([found.levels, halves, found.thresholds, [0.0, -0.0]]).astype(np.float32)
    around = [np.nextafter(marks, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([spread.astype(np.float32), marks, *around])


@pytest.mark.parametrize("found", SETS, ids=lambda found: found.name)
def test_levels_are_sorted_and_survive(found: LevelSet) -> None:
    assert (np.diff(found.levels) > 0).all()
    assert len(found.values) == 1 << found.bits
    np.testing.assert_array_equal(found.encode(found.levels), found.codes)
    np.testing.assert_array_equal(found.decode(found.codes), found.levels)
    # beyond the levels there is nothing: numbers saturate
    huge = np.float32([-3e38, 3e38])
    np.testing.assert_array_equal(found.decode(found.encode(huge)), found.levels[[0, -1]])
    assert abs(found.values[found.zero_code]) == np.abs(found.levels).min()


@pytest.mark.parametrize("found", [one for one in SETS if "posit" not in one.name], ids=lambda found: found.name)
def test_rounding_is_to_the_nearest(found: LevelSet) -> None:
    x = np.clip(hard_numbers(found), found.levels[0], found.levels[-1])
    error = np.abs(found.decode(found.encode(x)).astype(np.float64) - x)
    best = np.abs(found.levels.astype(np.float64) - x[:, None].astype(np.float64)).min(axis=1)
    np.testing.assert_allclose(error, best, rtol=1e-6, atol=1e-7 * found.largest)


@pytest.mark.parametrize("sizes", PUBLISHED)
def test_published_floats_equal_ml_dtypes(sizes: tuple[int, int]) -> None:
    found, dtype = levels.minifloat(*sizes), np.dtype(getattr(ml_dtypes, PUBLISHED[sizes]))
    codes = np.arange(1 << found.bits, dtype=np.uint8)
    theirs = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(found.values, np.where(np.isfinite(theirs), theirs, np.nan))
    x = np.clip(hard_numbers(found), -found.largest, found.largest)
    np.testing.assert_array_equal(found.decode(found.encode(x)), x.astype(dtype).astype(np.float32))


def test_special_codes_are_those_of_the_specification() -> None:
    assert np.flatnonzero(np.isnan(levels.minifloat(4, 3).values)).tolist() == [0x7F, 0xFF]
    assert np.flatnonzero(np.isnan(levels.minifloat(5, 2).values)).tolist() == [*range(0x7C, 0x80), *range(0xFC, 0x100)]
    assert np.flatnonzero(np.isnan(levels.posit(8, 0).values)).tolist() == [0x80]
    assert not np.isnan(levels.minifloat(3, 2).values).any()


def read_posit(code: int, bits: int, exponent_bits: int) -> Fraction | None:
    """The definition, read off the string of digits."""
    digits = format(code, f"0{bits}b")
    if "1" not in digits:
        return Fraction(0)
    if "1" not in digits[1:]:
        return None
    sign = -1 if digits[0] == "1" else 1
    body = format((-code if sign < 0 else code) % (1 << bits), f"0{bits}b")[1:]
    run = len(body) - len(body.lstrip(body[0]))
    regime = run - 1 if body[0] == "1" else -run
    rest = body[run + 1 :]
    exponent = int(rest[:exponent_bits].ljust(exponent_bits, "0") or "0", 2)
    fraction = rest[exponent_bits:]
    significand = 1 + Fraction(int(fraction, 2), 1 << len(fraction)) if fraction else Fraction(1)
    return sign * significand * Fraction(2) ** (regime * 2**exponent_bits + exponent)


@pytest.mark.parametrize("exponent_bits", range(4))
@pytest.mark.parametrize("bits", range(4, 12))
def test_posits_by_their_definition(bits: int, exponent_bits: int) -> None:
    found = levels.posit(bits, exponent_bits)
    for code, value in enumerate(found.values.tolist()):
        expected = read_posit(code, bits, exponent_bits)
        assert np.isnan(value) if expected is None else Fraction(value) == expected
    # a string of one more bit that ends in 1 is halfway between two strings: it goes to the even one of them
    for code in range(1, (1 << bits - 1) - 1):
        halfway = np.float32(read_posit(2 * code + 1, bits + 1, exponent_bits))
        assert found.encode(halfway[None])[0] == code + code % 2
        assert found.encode(np.nextafter(halfway, np.float32(0))[None])[0] == code
        assert found.encode(np.nextafter(halfway, np.float32(np.inf))[None])[0] == code + 1
    assert found.encode(np.float32([1e-30, -1e-30])).tolist() == [1, (1 << bits) - 1]


def test_posits_of_the_paper() -> None:
    assert levels.posit(4, 1).values[1:8].tolist() == [1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16]
    assert (levels.posit(8, 0).largest, levels.posit(16, 1).largest) == (64, 2.0**28)


@pytest.mark.parametrize(("bits", "exponent_bits"), [(8, 0), (16, 1)])
def test_posits_equal_softposit(bits: int, exponent_bits: int) -> None:
    softposit = pytest.importorskip("softposit")
    kind = {8: softposit.posit8, 16: softposit.posit16}[bits]
    found = levels.posit(bits, exponent_bits)
    x = hard_numbers(found)[:: 1 if bits == 8 else 7]
    theirs = np.asarray([float(kind(value)) for value in x.tolist()], np.float32)
    np.testing.assert_array_equal(found.decode(found.encode(x)), theirs)


def test_tables_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for name, found in (("nf4", levels.nf4()), ("fp4", levels.fp4())):
        np.testing.assert_array_equal(functional.get_4bit_type(name, device="cpu").numpy(), found.values)
    np.testing.assert_array_equal(functional.create_dynamic_map().numpy(), levels.dynamic8().levels)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.floats(-4, 4, width=32))
def test_bipolar_by_its_formula(bits: int, value: float) -> None:
    expected = min(max(int(np.floor(value * 2**bits / 2)) + 2 ** (bits - 1), 0), 2**bits - 1)
    found = levels.bipolar(bits)
    assert found.encode(np.float32([value * 2**bits]))[0] == expected
    assert found.values.tolist() == [2 * code - 2**bits + 1 for code in range(2**bits)]


def test_ties_go_to_the_even_code() -> None:
    e2m1 = levels.minifloat(2, 1)
    assert e2m1.decode(e2m1.encode(np.float32([0.25, 0.75, 1.25, 2.5, 3.5, 5.0, -5.0]))).tolist() == [
        *(0, 1, 1, 2, 4, 4, -4),
    ]
    integers = levels.integers(4)
    assert integers.decode(integers.encode(np.float32([0.5, 1.5, -2.5, 7.5]))).tolist() == [0, 2, -2, 7]


def test_levels_of_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    found, x = levels.posit(8, 0), hard_numbers(levels.posit(8, 0))
    codes = found.encode(torch.from_numpy(x))
    np.testing.assert_array_equal(codes.numpy(), found.encode(x))
    np.testing.assert_array_equal(found.decode(codes).numpy(), found.decode(found.encode(x)))


def test_scaled_and_cut_levels_round_alike() -> None:
    whole = levels.posit(8, 0)
    part = whole.within(2.0, 0.5)
    assert part.levels.tolist() == [value / 2 for value in whole.levels.tolist() if abs(value) <= 2]
    x = np.clip(hard_numbers(whole), -2, 2)
    x = x[(np.abs(x) > 1e-37) | (x == 0)]  # others lose digits when they are halved
    np.testing.assert_array_equal(part.encode(x * np.float32(0.5)), whole.encode(x))


@pytest.mark.parametrize("sizes", [(0, 3), (4, 4), (8, 0)])
def test_floats_that_do_not_exist(sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="such as e2m1"):
        levels.minifloat(*sizes)


@pytest.mark.parametrize("sizes", [(3, 0), (17, 1), (8, 4)])
def test_posits_that_do_not_exist(sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="such as posit8es0"):
        levels.posit(*sizes)
