"""Every format of the table with input that is no tidy matrix: what it cannot hold is refused by name, the rest kept.

Products take the same matrices with inputs that are not finite: what a row cannot know is not a number, never a guess.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import CODECS, codec, codec_class

SPECS = sorted({spec for family in CODECS for spec in codec_class(family).examples})
UNEVEN = [(1, 1), (1, 97), (5, 37), (17, 129), (33, 64)]


def normal(shape: tuple[int, ...], size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal(shape) * size).astype(np.float32)


def has_kernel(spec: str) -> bool:
    return codec(spec).layout == "tiles" if hasattr(codec(spec), "layout") else not spec.startswith(("static", "dual"))


KERNEL_SPECS = [spec for spec in SPECS if has_kernel(spec)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_no_number_is_refused(spec: str, bad: float) -> None:
    values = normal((6, 70))
    values[3, 41] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        codec(spec).encode(values)


@pytest.mark.parametrize("values", [np.ones((4, 8), np.complex64), np.full((4, 8), "1"), np.full((4, 8), None)])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_not_real_is_refused(spec: str, values: np.ndarray) -> None:
    with pytest.raises(InputError, match=rf"real numbers, got an array of {re.escape(str(values.dtype))}"):
        codec(spec).encode(values)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("spec", SPECS)
def test_empty_matrices_come_back_empty(spec: str, shape: tuple[int, int]) -> None:
    form = codec(spec)
    packed = form.encode(np.empty(shape, np.float32))
    assert form.decode(packed).shape == shape
    assert packed.nbytes == form.nbytes(shape)


@pytest.mark.parametrize("spec", SPECS)
def test_how_numbers_lie_in_memory_changes_no_byte(spec: str) -> None:
    large = normal((12, 140))
    fixed = normal((6, 70))
    fixed.flags.writeable = False
    for values in (large[::2, ::2], large[5::-1, 69::-1], np.asfortranarray(fixed), fixed, large[:6, 3:73]):
        found, expected = codec(spec).encode(values), codec(spec).encode(np.array(values, order="C"))
        for name, buffer in expected.buffers.items():
            np.testing.assert_array_equal(found.buffers[name], buffer)


@pytest.mark.parametrize("shape", UNEVEN)
@pytest.mark.parametrize("spec", SPECS)
def test_sizes_that_no_block_divides(spec: str, shape: tuple[int, int]) -> None:
    """What is padded takes part in nothing: numbers come back as near as in whole blocks."""
    form, values = codec(spec), normal(shape)
    packed = form.encode(values)
    decoded = form.decode(packed)
    assert decoded.shape == shape
    assert packed.nbytes == form.nbytes(shape)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - values).max() <= 2 * np.abs(values).max()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e37])
@pytest.mark.parametrize("spec", SPECS)
def test_tiny_and_huge_numbers_are_held_or_refused(spec: str, size: float) -> None:
    form, values = codec(spec), normal((6, 70), size)
    refused: str | None = None
    try:
        decoded = form.decode(form.encode(values))
    except InputError as error:
        refused = str(error)
    if refused is not None:
        assert size > 1  # nothing is too small
        assert re.search("overflow|float16", refused)
        return
    assert np.isfinite(decoded).all()
    assert size or not decoded.any()


@pytest.mark.parametrize("spec", KERNEL_SPECS)
def test_native_encoders_refuse_the_same(spec: str) -> None:
    values = normal((32, 70))
    for bad in (np.nan, np.inf):
        values[3, 69] = bad
        out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in codec(spec).buffers(values.shape).items()}
        with pytest.raises(InputError, match="NaN or infinite"):
            kernels.encode(spec, values, out=out)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("spec", KERNEL_SPECS)
def test_inputs_that_are_not_finite_make_results_that_are_not(spec: str, tokens: int) -> None:
    """A NaN anywhere among the inputs of a token is seen in its results, and in no other token's."""
    matrix = kernels.matrix(codec(spec).encode(normal((33, 130))))
    for isa in dict.fromkeys((kernels.best_isa(), "avx2", "portable")):
        if isa == "avx2" and kernels.best_isa() == "portable":
            continue
        kernels.force_isa(isa)
        try:
            for place in (0, 63, 129):
                for bad in (np.nan, np.inf, -np.inf):
                    x = normal((tokens, 130)) + np.float32(0.01)
                    x[-1, place] = bad
                    out = np.zeros((tokens, 33), np.float32)
                    kernels.linear(x, [matrix], [out])
                    assert not np.isfinite(out[-1]).any(), (isa, place, bad)
                    assert np.isfinite(out[:-1]).all(), (isa, place, bad)
        finally:
            kernels.force_isa(kernels.best_isa())


@pytest.mark.parametrize("spec", KERNEL_SPECS)
def test_products_refuse_arrays_that_do_not_suit(spec: str) -> None:
    matrix = kernels.matrix(codec(spec).encode(normal((32, 128))))
    x, out = normal((2, 128)), np.zeros((2, 32), np.float32)
    for wrong in (x[:, :127], normal((2, 256))[:, ::2], x.astype(np.float64)):
        with pytest.raises((ValueError, TypeError)):
            kernels.linear(wrong, [matrix], [out])
    for wrong in (out[:, :31], out[:1], np.zeros((32, 2), np.float32).T):
        with pytest.raises((ValueError, TypeError)):
            kernels.linear(x, [matrix], [wrong])
    empty = np.zeros((0, 32), np.float32)
    kernels.linear(normal((0, 128)), [matrix], [empty])
