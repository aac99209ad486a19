"""What leaves a Mamba model as it is, through the engine; and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.compress import ssm_transforms
from memwall.compress.ssm_run import LayerRun
from memwall.memory import Arena, Ledger
from memwall.models.config import ModelConfig
from memwall.models.ssm_config import Quantized
from tests.models.ssm_models import CONFIGS, MAMBA2, random_tensors

FLOAT = Quantized(layers=("float",), head="float", state="float32", head_ranges=1, channel_ranges=1)


def layer(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    prefix = "model.layers.0."
    return {n.removeprefix(prefix): t for n, t in random_tensors(config, seed).items() if n.startswith(prefix)}


def output(config: ModelConfig, tensors: dict[str, np.ndarray], x: np.ndarray, quantized: Quantized | None = None):
    run = LayerRun(config, tensors, quantized, Arena(1 << 30, Ledger()), x.shape[1])
    x = x.copy()
    run.run(x)
    run.release()
    return x


def hidden(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, 9, config.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_and_turns(name: str) -> None:
    config = ModelConfig.from_dict(CONFIGS[name])
    tensors, x = layer(config), hidden(config)
    want = output(config, tensors, x)
    fused = ssm_transforms.fuse_norm(tensors)
    np.testing.assert_allclose(output(config, fused, x), want, atol=1e-4)
    turned = ssm_transforms.rotate_residual(fused)
    stream = ssm_transforms.turned_rows(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    made = output(config, turned, stream)
    want_turned = ssm_transforms.turned_rows(want.reshape(-1, want.shape[-1])).reshape(want.shape)
    np.testing.assert_allclose(made, want_turned, atol=1e-4)
    whole = ssm_transforms.turn_output(turned)
    np.testing.assert_allclose(output(config, whole, stream, FLOAT), want_turned, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_orders(groups: int) -> None:
    config = ModelConfig.from_dict({**MAMBA2, "n_groups": groups, "use_bias": True})
    assert config.ssm is not None
    tensors, x, rng = layer(config), hidden(config), np.random.default_rng(5)
    want = output(config, tensors, x)
    per, width = config.ssm.num_heads // groups, config.ssm.head_dim
    heads = np.concatenate([group * per + rng.permutation(per) for group in range(groups)])
    channels = (heads[:, None] * width + np.stack([rng.permutation(width) for _ in heads])).reshape(-1)
    made = ssm_transforms.reorder(tensors, config.ssm, channels, heads)
    np.testing.assert_allclose(output(config, made, x), want, atol=1e-5)
    if groups > 1:  # a head that meets another group's B and C
        heads[[0, per]] = heads[[per, 0]]
        channels = (heads[:, None] * width + np.arange(width)).reshape(-1)
        wrong = ssm_transforms.reorder(tensors, config.ssm, channels, heads)
        assert np.abs(output(config, wrong, x) - want).max() > 0.01
