"""Round to nearest is the codec's own encoding; the table names methods."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.compress import METHODS, WeightMethod, weight_method
from memwall.compress.base import MethodConfig
from memwall.errors import InputError
from memwall.formats import codec


def test_is_the_codecs_encoding() -> None:
    weight = np.random.default_rng(0).standard_normal((20, 70), np.float32)
    packed = weight_method("rtn").compress(weight, None, MethodConfig(spec="int3"))
    for name, buffer in codec("int3").encode(weight).buffers.items():
        np.testing.assert_array_equal(packed.buffers[name], buffer)


@pytest.mark.parametrize("spec", ["nf4-dq", "e4m3", "mxfp4", "posit8", "bipolar3", "binary2"])
def test_level_formats_too(spec: str) -> None:
    weight = np.random.default_rng(0).standard_normal((20, 70), np.float32)
    packed = weight_method("rtn").compress(weight, None, MethodConfig(spec=spec))
    for name, buffer in codec(spec).encode(weight).buffers.items():
        np.testing.assert_array_equal(packed.buffers[name], buffer)
    with pytest.raises(InputError, match="--method rtn"):
        weight_method("gptq").compress(weight, None, MethodConfig(spec=spec))


@pytest.mark.parametrize("name", METHODS)
def test_table(name: str) -> None:
    method = weight_method(name)
    assert isinstance(method, WeightMethod)
    assert method.name == name
    assert method.work_bytes(64, 64) >= 0
    weight = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    packed = method.compress(weight, None, MethodConfig(spec="int8"))
    assert packed.nbytes == codec("int8").nbytes((3, 5))
    with pytest.raises(InputError, match="known are rtn, gptq"):
        weight_method("other")
