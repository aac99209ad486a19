"""Plain floats: rounding, refusals, both array kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall.formats import codec


@pytest.mark.parametrize("spec", ["float32", "float16", "bfloat16"])
def test_round_trip_and_torch(spec: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 7), np.float32)
    coder = codec(spec)
    packed = coder.encode(values)
    decoded = coder.decode(packed)
    assert packed.nbytes == coder.nbytes(values.shape) == values.size * (4 if spec == "float32" else 2)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, values, rtol={"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[spec])
    np.testing.assert_array_equal(coder.decode(coder.encode(decoded)), decoded)
    tensor = coder.encode(torch.from_numpy(values))
    assert tensor.nbytes == packed.nbytes
    np.testing.assert_array_equal(coder.decode(tensor).numpy(), decoded)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="float16 cannot hold values that overflow it"):
        codec("float16").encode(np.array([1e6], np.float32))
    with pytest.raises(ValueError, match="float32 cannot hold NaN or infinite values"):
        codec("float32").encode(np.array([np.nan], np.float32))
    with pytest.raises(ValueError, match="unknown"):
        codec("float8")
