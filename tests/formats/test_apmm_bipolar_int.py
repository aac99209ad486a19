"""Bipolar integers in bit planes: values, packing, conversion, sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.apmm_bipolar_int import codes_of, codes_of_signed, integers_of, pack, unpack


def test_two_bits_are_the_four_odd_numbers() -> None:
    codes, scales = codes_of(np.array([[-6.0, -1.0, 0.0, 1.9, 4.1, 6.0]], np.float32), 2)
    assert scales.tolist() == [2.0]
    # nearest odd multiples of 2: -6, -2, 2 (zero lies between -2 and 2 and goes up), 2, 6, 6
    assert (integers_of(codes, 2) * scales[:, None]).tolist() == [[-6, -2, 2, 2, 6, 6]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_values_are_symmetric_odd_and_whole(bits: int) -> None:
    values = integers_of(np.arange(1 << bits, dtype=np.uint8), bits)
    assert 0 not in values
    assert values.tolist() == (-values[::-1]).tolist()
    assert values.tolist() == list(range(-((1 << bits) - 1), 1 << bits, 2))
    one_by_one = sum((2 * ((np.arange(1 << bits) >> i) & 1) - 1) << i for i in range(bits))
    assert values.tolist() == np.asarray(one_by_one).tolist()


@given(bits=st.integers(1, 8), rows=st.integers(0, 5), cols=st.integers(1, 200), seed=st.integers(0, 99))
def test_packing_is_undone_and_takes_its_bits(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, cols), np.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows, bits, -(-cols // 64))
    np.testing.assert_array_equal(unpack(words, cols), codes)
    assert words.nbytes == rows * bits * -(-cols // 64) * 8


@given(bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_decoding_is_off_by_at_most_the_scale(bits: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((7, 33)).astype(np.float32)
    form = codec(f"w{bits}a4")
    packed = form.encode(x)
    off = np.abs(form.decode(packed) - x)
    assert (off <= packed.buffers["scales"][:, None] * 1.0001).all()


@given(bits=st.integers(1, 8), cols=st.integers(1, 200), seed=st.integers(0, 99))
def test_groups_have_scales_of_their_own(bits: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = (random.standard_normal((5, cols)) * 10.0 ** random.integers(-3, 4, (5, cols))).astype(np.float32)
    form = codec(f"w{bits}a4-g64")
    packed = form.encode(x)
    groups = -(-cols // 64)
    assert packed.nbytes == form.nbytes(x.shape) == 5 * groups * (8 * bits + 2)
    scales = np.repeat(packed.buffers["scales"].astype(np.float32), 64, axis=1)[:, :cols]
    off = np.abs(form.decode(packed) - x)
    # half a step, and what float16 may round a scale by at the largest number
    assert (off <= scales * (1.0001 + 2.0**-11 * ((1 << bits) - 1)) + 1e-7 * (1 << bits)).all()
    alone = codec(f"w{bits}a4").encode(x[:, :64])
    np.testing.assert_allclose(packed.buffers["scales"][:, 0], alone.buffers["scales"], rtol=2.0**-10, atol=1e-7)


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="float16"):
        codec("w1a4-g64").encode(np.full((1, 64), 1e6, np.float32))


def test_signed_integers_convert_without_loss() -> None:
    for bits in range(1, 9):
        q = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
        assert integers_of(codes_of_signed(q, bits), bits).tolist() == (2 * q + 1).tolist()
    with pytest.raises(InputError, match="between -4 and 3"):
        codes_of_signed(np.array([4]), 3)


def test_the_file_form_is_whole() -> None:
    x = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    form = codec("w3a4")
    packed = form.encode(x)
    assert packed.nbytes == form.nbytes((5, 70)) == 5 * 3 * 2 * 8 + 5 * 4
    again = form.from_tensors("t", (5, 70), packed.to_tensors("t"))
    np.testing.assert_array_equal(form.decode(again), form.decode(packed))


@pytest.mark.parametrize("spec", ["w0a4", "w9a1", "w3a0", "w3", "w3a4-g32", "w9a1-g64"])
def test_other_widths_are_refused(spec: str) -> None:
    with pytest.raises(InputError):
        codec(spec)


def test_what_has_no_planes_is_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        codec("w2a2").encode(np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(InputError, match="matrices"):
        codec("w2a2").encode(np.zeros(4, np.float32))


def test_zeros_and_nothing() -> None:
    form = codec("w4a4")
    assert (form.decode(form.encode(np.zeros((2, 65), np.float32))) == 0).all()
    assert form.decode(form.encode(np.zeros((0, 5), np.float32))).shape == (0, 5)
