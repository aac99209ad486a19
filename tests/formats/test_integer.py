"""Group-wise integers: error bounds, exact codes, sizes, padding, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.integer import IntegerCodec

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def codecs(draw: st.DrawFn) -> IntegerCodec:
    layout = draw(st.sampled_from(["tiles", "rows"]))
    group = draw(st.sampled_from([32, 64, 128]) if layout == "tiles" else st.integers(1, 80))
    return IntegerCodec(bits=draw(st.integers(2, 8)), group=group, symmetric=draw(st.booleans()), layout=layout)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = random.standard_normal((rows, columns), np.float32) * np.float32(10.0 ** draw(st.integers(-3, 3)))
    values += np.float32(draw(st.sampled_from([0.0, 0.5, -20.0])))
    values[random.random((rows, columns)) < draw(st.sampled_from([0.0, 0.9, 1.0]))] = 0
    return values


def expand(codec: IntegerCodec, statistics: np.ndarray, columns: int) -> np.ndarray:
    return np.repeat(statistics.astype(np.float32), codec.group, axis=-1)[:, :columns]


@QUICK
@given(codecs(), matrices())
def test_error_is_half_a_step(coder: IntegerCodec, values: np.ndarray) -> None:
    packed = coder.encode(values)
    codes, scales, mins = coder.unpack(packed)
    step = np.abs(expand(coder, scales, values.shape[1]))
    error = np.abs(coder.decode(packed) - values)
    # what rounding the statistics to float16 may add: relative 2^-11 and absolute 2^-25 (subnormals)
    reach = float(1 << coder.bits)
    slack = step * reach * 2**-10 + reach * 2**-24 + np.abs(values) * 2**-20
    if mins is None:
        # the end opposite to the extreme has one level less: there the error may reach a whole step
        half = np.where(codes == reach - 1, 1.0, 0.5)
    else:
        half = 0.5
        slack += np.abs(expand(coder, mins, values.shape[1])) * 2**-10
    assert (error <= half * step + slack).all()


@QUICK
@given(codecs(), matrices())
def test_pack_undoes_unpack(coder: IntegerCodec, values: np.ndarray) -> None:
    packed = coder.encode(values)
    codes, scales, mins = coder.unpack(packed)
    assert codes.shape == values.shape
    assert codes.max() < 1 << coder.bits
    again = coder.pack(codes, scales, mins)
    assert again.shape == packed.shape
    for name, buffer in packed.buffers.items():
        np.testing.assert_array_equal(again.buffers[name], buffer)


@QUICK
@given(codecs(), matrices())
def test_codes_survive_encoding_again(coder: IntegerCodec, values: np.ndarray) -> None:
    """The symmetric form encodes what it decoded to itself: the extreme value is one of its levels."""
    if not coder.symmetric:
        coder = IntegerCodec(bits=coder.bits, group=coder.group, symmetric=True, layout=coder.layout)
    first = coder.decode(coder.encode(values))
    second = coder.decode(coder.encode(first))
    np.testing.assert_array_equal(second, first)


@QUICK
@given(codecs(), matrices())
def test_size_is_known_before(coder: IntegerCodec, values: np.ndarray) -> None:
    packed = coder.encode(values)
    rows, columns = values.shape
    groups = -(-columns // coder.group)
    statistics = 2 if coder.symmetric else 4
    if coder.layout == "tiles":
        rows = -(-rows // 16) * 16
        expected = rows * groups * coder.group * coder.bits // 8 + rows * groups * statistics
    else:
        expected = rows * -(-columns * coder.bits // 8) + rows * groups * statistics
    assert packed.nbytes == coder.nbytes(values.shape) == expected


@pytest.mark.parametrize("spec", ["int2-g5-rows", "int3-g16-asym-rows", "int8-g64-rows"])
def test_rows_of_torch_tensors_agree_with_numpy(spec: str) -> None:
    values = np.random.default_rng(1).standard_normal((2, 3, 37), np.float32)
    coder = codec(spec)
    expected, found = coder.encode(values), coder.encode(torch.from_numpy(values))
    for name, buffer in expected.buffers.items():
        assert buffer.flags.c_contiguous
        np.testing.assert_array_equal(found.buffers[name].numpy(), buffer)
    np.testing.assert_array_equal(coder.decode(found).numpy(), coder.decode(expected))


def test_numbers_checked_by_hand() -> None:
    values = np.array([[4.0, -2.0, 1.0, 0.5]], np.float32)
    codes, scales, _ = codec("int4-g4-rows").unpack(codec("int4-g4-rows").encode(values))
    assert scales == np.float16(-0.5)  # the extreme, +4, takes the code 0 = -8 steps of -0.5
    np.testing.assert_array_equal(codes, [[0, 12, 6, 7]])
    codes, scales, mins = codec("int2-g4-asym-rows").unpack(codec("int2-g4-asym-rows").encode(values))
    assert (scales, mins) == (np.float16(2.0), np.float16(-2.0))
    np.testing.assert_array_equal(codes, [[3, 0, 2, 1]])  # 1.5 and 1.25 steps: halves go to even


def test_padding_of_tiles() -> None:
    values = np.full((3, 40), -3.0, np.float32)
    for spec, code in (("int4-g32", 0x88), ("int4-g32-asym", 0)):
        packed = codec(spec).encode(values)
        assert not packed.buffers["scales"][:, :, 3:].any()
        lanes = packed.buffers["codes"][0, 1, 0].reshape(4, 16, 4)
        assert (lanes[1:] == code).all()  # columns 40..63
        assert (lanes[:, 3:] == code).all()  # rows 3..15
        assert (packed.buffers["mins"][:, :, 3:] == 0).all() if "mins" in packed.buffers else True


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("suffix", ["", "-asym", "-rows", "-asym-rows"])
def test_zero_groups_and_one_element(bits: int, suffix: str) -> None:
    coder = codec(f"int{bits}-g32{suffix}")
    assert not coder.decode(coder.encode(np.zeros((2, 33), np.float32))).any()
    np.testing.assert_allclose(coder.decode(coder.encode(np.array([[-1.5]], np.float32))), [[-1.5]])
    assert coder.decode(coder.encode(np.zeros((0, 33), np.float32))).shape == (0, 33)
    assert coder.decode(coder.encode(np.zeros((3, 0), np.float32))).shape == (3, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", ["int4", "int2", "int4-g3-rows", "int3-g8-asym-rows"])
def test_values_that_are_not_finite_are_refused(spec: str, value: float) -> None:
    values = np.ones((20, 70), np.float32)
    values[17, 3] = value
    with pytest.raises(ValueError, match=r"int\d-g\d+.* cannot hold NaN or infinite"):
        codec(spec).encode(values)


def test_scales_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="overflows float16"):
        codec("int2-g32").encode(np.full((1, 32), 3e5, np.float32))
    with pytest.raises(ValueError, match="minimum of"):
        codec("int8-g32-asym").encode(np.full((1, 32), -3e5, np.float32))


@pytest.mark.parametrize(
    "spec", ["int1", "int9", "int4-g48", "int4-g0-rows", "int4-asym", "int4-g64-foo", "nf5", "", "int"]
)
def test_unknown_specs_are_refused(spec: str) -> None:
    with pytest.raises(InputError):
        codec(spec)


def test_defaults() -> None:
    assert codec("int4").spec == "int4-g64"
    assert codec("int3").spec == "int3-g64-asym"
    assert codec("int3-g64").spec == "int3-g64"
    assert codec("int2-rows").spec == "int2-g64-asym-rows"
    with pytest.raises(InputError, match="holds matrices"):
        codec("int4").encode(np.ones(3, np.float32))
    with pytest.raises(InputError, match="minima are missing"):
        codec("int2").pack(np.zeros((1, 1), np.uint8), np.ones((1, 1), np.float16))
