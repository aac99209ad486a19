"""What every codec of the table keeps: canonical specs, exact sizes, files, determinism, lazy loading."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.formats import CODECS, Codec, codec, codec_class

SPECS = sorted({spec for family in CODECS for spec in codec_class(family).examples})
SHAPES = [(1, 1), (3, 5), (16, 64), (37, 131), (0, 4)]


def sample(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape, np.float32)


@pytest.mark.parametrize("family", CODECS)
def test_table_names_codecs(family: str) -> None:
    found = codec_class(family)
    assert issubclass(found, Codec)
    assert any(spec.startswith(family) for spec in found.examples)


@pytest.mark.parametrize("spec", SPECS)
def test_spec_is_canonical(spec: str) -> None:
    assert codec(codec(spec).spec) == codec(spec)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_buffers_are_known_before_encoding(spec: str, shape: tuple[int, ...]) -> None:
    coder, values = codec(spec), sample(shape)
    packed = coder.encode(values)
    assert packed.spec == coder.spec
    assert packed.shape == shape
    assert {n: (b.shape, b.dtype) for n, b in packed.buffers.items()} == coder.buffers(shape)
    assert packed.nbytes == coder.nbytes(shape)
    assert all(buffer.flags.c_contiguous for buffer in packed.buffers.values())
    again = coder.encode(values.copy())
    assert all((again.buffers[name] == buffer).all() for name, buffer in packed.buffers.items())
    decoded = coder.decode(packed)
    assert decoded.shape == shape
    assert decoded.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("spec", SPECS)
def test_any_float_type_goes_in(spec: str, dtype: type) -> None:
    values = sample((5, 40)).astype(np.float16)
    expected = codec(spec).encode(values.astype(np.float32))
    found = codec(spec).encode(values.astype(dtype))
    assert all((found.buffers[name] == buffer).all() for name, buffer in expected.buffers.items())


@pytest.mark.parametrize("spec", SPECS)
def test_rebuilt_from_its_tensors(spec: str) -> None:
    coder = codec(spec)
    packed = coder.encode(sample((37, 70)))
    tensors = packed.to_tensors("model.w")
    assert all(name == "model.w" or name.startswith("model.w::") for name in tensors)
    rebuilt = codec(packed.spec).from_tensors("model.w", packed.shape, tensors)
    np.testing.assert_array_equal(coder.decode(rebuilt), coder.decode(packed))
    name, buffer = next(iter(tensors.items()))
    with pytest.raises(InputError, match=name):
        coder.from_tensors("model.w", packed.shape, {**tensors, name: buffer[:-1]})
    with pytest.raises(InputError, match="is missing"):
        coder.from_tensors("model.w", packed.shape, {})
