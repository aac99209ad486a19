"""The GPU product, run by Triton's interpreter on the CPU (and on a GPU where there is one)."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from memwall.formats import codec  # noqa: E402
from memwall.kernels.triton_linear import PackedLinear  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize(
    "spec", ["int2-g32-asym", "int3-g64-asym", "int4-g64", "int5-g32", "int6-g128", "int7-g64-asym", "int8-g64"]
)
def test_matches_the_decoded_weight(spec: str, tokens: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(37, 150)).astype(np.float32)  # neither rows nor columns fill their last tile
    packed = codec(spec).encode(weight)
    layer = PackedLinear(packed, bias=torch.arange(37.0), device=DEVICE)
    x = torch.from_numpy(rng.normal(size=(tokens, 150)).astype(np.float32)).to(DEVICE)
    want = x @ torch.from_numpy(codec(spec).decode(packed)).to(DEVICE).T + torch.arange(37.0, device=DEVICE)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_holds_only_packed_bytes() -> None:
    packed = codec("int4-g64").encode(np.ones((64, 256), np.float32))
    layer = PackedLinear(packed, device=DEVICE)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == packed.nbytes
    assert not list(layer.parameters())


def test_float_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="no GPU product"):
        PackedLinear(codec("float16").encode(np.ones((16, 64), np.float32)), device=DEVICE)
