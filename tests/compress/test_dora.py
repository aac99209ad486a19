"""DoRA: the definition, its start, and lengths without the adapted weight."""

from __future__ import annotations

import numpy as np
import torch

from memwall import kernels
from memwall.compress.tuning import tune_method
from memwall.kernels.torch_frozen import FrozenLinear


def test_layer_is_the_definition() -> None:
    """y = m (W + s B A) x / ||W + s B A|| + bias, rows one by one."""
    random = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(20, 12)
    layer = tune_method("dora", {"rank": "3", "alpha": "6"}).linear(base, (20, 12), torch.zeros)
    layer.start(random)
    x = torch.randn(4, 20, generator=random)
    torch.testing.assert_close(layer(x), base(x))  # m is ||W||, B is zero
    for parameter in (layer.lora_B, layer.lora_magnitude_vector):
        torch.nn.init.normal_(parameter, generator=random)
    adapted = base.weight + 2.0 * layer.lora_B @ layer.lora_A
    directed = adapted / adapted.norm(dim=1, keepdim=True)
    expected = x @ (layer.lora_magnitude_vector[:, None] * directed).T + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_lengths_over_a_packed_base() -> None:
    random = torch.Generator().manual_seed(1)
    packed = kernels.encode("nf4-dq", np.random.default_rng(0).standard_normal((48, 128)).astype(np.float32))
    base = FrozenLinear(kernels.matrix(packed))
    layer = tune_method("dora", {"rank": "4"}).linear(base, (128, 48), torch.zeros)
    layer.start(random)
    torch.nn.init.normal_(layer.lora_B, generator=random)
    dense = base(torch.eye(128)).T + layer.scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.lengths(), dense.detach().norm(dim=1), rtol=1e-4, atol=1e-4)
    assert set(layer.exported()) == {"A", "B", "magnitude_vector"}


def test_lengths_start_from_a_plain_adapter() -> None:
    """Going on from LoRA changes nothing at first."""

    class Saved:
        dora, scale, path, rank = False, 2.0, "here", 3

        def factors(self, layer: int, target: str) -> tuple[np.ndarray, np.ndarray]:
            draw = np.random.default_rng(0)
            return draw.standard_normal((3, 20)).astype(np.float32), draw.standard_normal((12, 3)).astype(np.float32)

    base = torch.nn.Linear(20, 12, bias=False)
    layer = tune_method("dora", {"rank": "3", "alpha": "6"}).linear(base, (20, 12), torch.zeros)
    layer.start(torch.Generator().manual_seed(0))
    layer.load(Saved(), 0, "q_proj")
    a, b = Saved().factors(0, "q_proj")
    x = torch.ones(2, 20)
    torch.testing.assert_close(layer(x), x @ (base.weight + 2.0 * torch.from_numpy(b @ a)).T, rtol=1e-4, atol=1e-4)
