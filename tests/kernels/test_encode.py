from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec

SPECS = [f"int{bits}-g{group}{asym}" for bits in range(2, 9) for group in (32, 64, 128) for asym in ("", "-asym")]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)


def assert_same(got: Packed, want: Packed) -> None:
    assert (got.spec, got.shape, set(got.buffers)) == (want.spec, want.shape, set(want.buffers))
    for name, buffer in want.buffers.items():
        assert got.buffers[name].dtype == buffer.dtype
        np.testing.assert_array_equal(got.buffers[name].view(np.uint8), buffer.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("spec", SPECS)
def test_same_bytes_as_the_codec(spec: str, isa: str) -> None:
    for dtype in DTYPES:
        for rows, cols in [(1, 1), (17, 100), (32, 256)]:
            values = normal(rows, cols).astype(dtype)
            assert_same(kernels.encode(spec, values), codec(spec).encode(values))


@pytest.mark.parametrize("spec", ["int2-g32", "int4-g64", "int8-g64", "int3-g64-asym", "int8-g128-asym"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.integers(1, 140)),
        elements=st.one_of(
            st.floats(-60000, 60000, width=32),
            st.floats(-(2**-20), 2**-20, width=32),  # scales that are subnormal in float16, or round to zero
            st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.5]),  # ties
        ),
    )
)
def test_same_bytes_on_hard_numbers(spec: str, values: np.ndarray) -> None:
    assert_same(kernels.encode(spec, values), codec(spec).encode(values))


def test_large_offset_and_small_spread() -> None:
    """The rounded minimum is many steps away from the values: quotients far outside the codes."""
    values = np.float32(60007.0) + np.float32(0.00390625) * np.random.default_rng(0).integers(0, 3, (16, 64)).astype(
        np.float32
    )
    for spec in ("int2-g64-asym", "int8-g64-asym"):
        assert_same(kernels.encode(spec, values), codec(spec).encode(values))


def test_into_given_buffers_slab_by_slab() -> None:
    values, form = normal(80, 96), codec("int4-g32-asym")
    whole = {name: np.zeros(shape, dtype) for name, (shape, dtype) in form.buffers(values.shape).items()}
    for start, stop in [(0, 32), (32, 80)]:
        slab = {name: array[start // 16 : stop // 16] for name, array in whole.items()}
        kernels.encode(form.spec, values[start:stop], out=slab)
    assert_same(Packed(spec=form.spec, shape=values.shape, buffers=whole), form.encode(values))


def test_uint16_is_bfloat16() -> None:
    values = normal(16, 64).astype(ml_dtypes.bfloat16)
    assert_same(kernels.encode("int4", values.view(np.uint16)), codec("int4").encode(values))


@pytest.mark.parametrize("spec", ["float32", "float16", "bfloat16", "int4-g64-rows"])
def test_forms_without_native_code_use_the_codec(spec: str) -> None:
    values = normal(5, 70)
    assert_same(kernels.encode(spec, values), codec(spec).encode(values))
    form = codec(spec)
    out = {name: np.empty(shape, dtype) for name, (shape, dtype) in form.buffers(values.shape).items()}
    assert_same(kernels.encode(spec, values, out=out), form.encode(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("spec", ["int4-g64", "int3-g64-asym"])
def test_numbers_that_cannot_be_encoded_are_refused(bad: float, spec: str, isa: str) -> None:
    values = normal(40, 70)
    values[33, 69] = bad
    with pytest.raises(InputError, match=r"NaN or infinite|overflows float16"):
        kernels.encode(spec, values)


def test_wrong_buffers_are_refused() -> None:
    with pytest.raises(InputError, match="codes"):
        kernels.encode("int4-g64", normal(16, 64), out={"codes": np.zeros(3, np.uint8)})
