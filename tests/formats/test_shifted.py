"""Shifted NormalFloat: shifts against their definition, what codes tell, sizes, edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import _native, kernels
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.levels import nf4
from memwall.formats.shifted import (
    SPREAD,
    ShiftedCodec,
    best_shifts,
    entropies,
    information_weights,
    search_steps,
)


def form() -> ShiftedCodec:
    found = codec("irnf4")
    assert isinstance(found, ShiftedCodec)
    return found


def test_entropy_by_hand() -> None:
    codes = np.array([[0] * 32 + [5] * 32, list(range(16)) * 4], np.uint8)
    np.testing.assert_allclose(entropies(codes), [1, 4])


def test_shifts_are_those_of_the_paper() -> None:
    """tau0 + f m over 201 values of f; the largest entropy of the codes of w - tau, the nearest to the median first."""
    blocks = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32) + np.float32(0.3)
    found = best_shifts(blocks)
    for block, shift in zip(blocks, found, strict=True):
        median = np.median(block)
        reach = np.abs(block - median).max()
        tried = [median + np.float32(f) * reach for f in np.linspace(-0.1 * SPREAD, 0.1 * SPREAD, 201)]
        told = [entropies(nf4().encode((block - t) / np.abs(block - t).max())[None])[0] for t in tried]
        chosen = entropies(nf4().encode((block - shift) / np.abs(block - shift).max())[None])[0]
        assert chosen == pytest.approx(max(told), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), lean=st.floats(-2, 2), size=st.floats(-20, 20), ties=st.booleans())
def test_compiled_search_finds_the_same(seed: int, lean: float, size: float, ties: bool) -> None:
    blocks = np.random.default_rng(seed).standard_normal((5, 64)).astype(np.float32) + np.float32(lean)
    if ties:
        blocks = np.round(blocks)
    blocks *= np.float32(2.0**size)
    blocks[-1] = blocks[0, 0]  # a block of one number
    shifts = np.empty(len(blocks), np.float32)
    _native.best_shifts(blocks, search_steps(), nf4().thresholds, information_weights(), shifts)
    np.testing.assert_array_equal(shifts, best_shifts(blocks))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 100))
def test_compiled_bytes_are_the_codecs(rows: int, columns: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    packed, native = form().encode(weight), kernels.encode("irnf4", weight)
    assert {name: buffer.shape for name, buffer in packed.buffers.items()} == {
        name: shape for name, (shape, _) in form().buffers(weight.shape).items()
    }
    for name, buffer in packed.buffers.items():
        np.testing.assert_array_equal(native.buffers[name], buffer, err_msg=name)
    error = np.abs(form().decode(packed) - weight)
    # half the widest gap between levels, what rounding shift and scale twice costs
    assert error.max() <= 0.2 * np.abs(weight).max() + 0.05


def test_codes_tell_more_than_those_of_nf4() -> None:
    weight = np.random.default_rng(3).standard_normal((64, 512)).astype(np.float32)
    plain, shifted = (codec(spec).unpack(codec(spec).encode(weight))[0] for spec in ("nf4-dq", "irnf4"))
    told = [entropies(codes.reshape(-1, 64)).mean() for codes in (plain, shifted)]
    assert told[1] > told[0] + 0.05


def test_without_shifts_bytes_are_those_of_nf4_twice_quantized() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    found, plain = form().encode_slab(weight, np.zeros((32, 4), np.float32)), codec("nf4-dq").encode(weight)
    for name, buffer in plain.buffers.items():
        np.testing.assert_array_equal(found[name], buffer)
    assert not found["shift_peaks"].any()


def test_bits() -> None:
    """NF4's codes, 8 bits a scale and a float32 for 256, and the same again for shifts; a mean per row tile."""
    bits = 8 * form().nbytes((4096, 4096)) / 4096**2
    assert bits == pytest.approx(4 + 2 * (8 / 64 + 32 / (64 * 256)), abs=1e-3)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="irnf4"):
        codec("irnf4-g32")
    with pytest.raises(InputError, match="NaN"):
        kernels.encode("irnf4", np.full((16, 64), np.nan, np.float32))
