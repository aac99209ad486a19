"""PiSSA: the strongest part of the weight, no change at the start, and a plain adapter as the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.compress.tuning import tune_method
from memwall.errors import InputError
from memwall.kernels.torch_frozen import FrozenLinear
from memwall.models.torch_lora import LoraLinear


def made(base: torch.nn.Module, shape: tuple[int, int], **options: str) -> LoraLinear:
    layer = tune_method("pissa", {"rank": "4", "alpha": "8", **options}).linear(base, shape, torch.zeros)
    layer.start(torch.Generator().manual_seed(0))
    return layer


@pytest.mark.parametrize("packed", [False, True])
def test_factors_are_the_first_terms_of_the_singular_value_decomposition(packed: bool) -> None:
    draw = np.random.default_rng(0)
    weight = (draw.standard_normal((96, 128)) * np.geomspace(4, 0.2, 128)).astype(np.float32)
    if packed:
        base: torch.nn.Module = FrozenLinear(kernels.matrix(kernels.encode("nf4-dq", weight)))
        weight = base(torch.eye(128)).T.numpy()
    else:
        base = torch.nn.Linear(128, 96)
        base.weight.data.copy_(torch.from_numpy(weight))
    layer = made(base, (128, 96))
    left, values, right = np.linalg.svd(weight)
    expected = (left[:, :4] * values[:4]) @ right[:4]
    found = layer.scale * (layer.lora_B @ layer.lora_A).detach().numpy()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()  # factors are rounded to half precision
    np.testing.assert_allclose(np.linalg.norm(layer.first_a, axis=1) ** 2 * layer.scale, values[:4], rtol=3e-3)


def test_starts_from_exactly_no_change_and_merges_exactly() -> None:
    base = torch.nn.Linear(24, 16)
    layer = made(base, (24, 16))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-6)
    a, b = layer.merged()
    assert (a.shape, b.shape) == ((8, 24), (16, 8))
    assert (b @ a).abs().max() < 1e-6
    with torch.no_grad():
        layer.lora_A.mul_(1.1)
        layer.lora_B.add_(0.01)
    a, b = layer.merged()
    torch.testing.assert_close(base(x) + layer.scale * (x @ a.T) @ b.T, layer(x), rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.abs().max() > 0


def test_what_it_cannot_start_from() -> None:
    with pytest.raises(InputError, match="rank=32"):
        made(torch.nn.Linear(24, 16), (24, 16), rank="32")
    with pytest.raises(InputError, match="alpha=0"):
        tune_method("pissa", {"alpha": "0"})
    with pytest.raises(InputError, match="rank=300"):
        tune_method("pissa", {"rank": "300"})
    with pytest.raises(InputError, match="--method lora"):
        made(torch.nn.Linear(24, 16), (24, 16)).load(None, 0, "q_proj")
