"""LoRA, rsLoRA, LoRA+: scales, rates, and where they meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall.compress.adamw import AdamSettings, AdamW, HeldMoments
from memwall.compress.tuning import tune_method
from memwall.errors import InputError
from memwall.memory import Arena, Ledger


def test_scales() -> None:
    assert tune_method("lora", {"rank": "16", "alpha": "32"}).scale == 2.0
    assert tune_method("rslora", {"rank": "16", "alpha": "32"}).scale == 8.0


def test_with_rank_one_rslora_is_lora() -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    found = []
    for name in ("lora", "rslora"):
        layer = tune_method(name, {"rank": "1"}).linear(torch.nn.Linear(24, 16, bias=False), (24, 16), torch.zeros)
        torch.nn.init.constant_(layer.base.weight, 0.5)
        layer.start(torch.Generator().manual_seed(0))
        torch.nn.init.ones_(layer.lora_B)
        found.append(layer(x))
    assert torch.equal(*found)


def test_plus_moves_b_sixteen_times_as_fast() -> None:
    method = tune_method("lora-plus")
    assert (method.rate("0.q_proj.lora_A"), method.rate("0.q_proj.lora_B")) == (1.0, 16.0)
    values = [np.zeros(3, np.float32) for _ in range(2)]
    moments = HeldMoments([3, 3], Arena(1 << 20, Ledger()))
    optimizer = AdamW(AdamSettings(learning_rate=0.01), moments)
    optimizer.step(values, [np.ones(3, np.float32)] * 2, rates=[1.0, 16.0])
    np.testing.assert_allclose(values[1], 16 * values[0], rtol=1e-6)
    np.testing.assert_allclose(values[0], -0.01, rtol=1e-5)  # Adam's first step is the rate itself


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="rank=0"):
        tune_method("lora", {"rank": "0"})
    with pytest.raises(InputError, match="no setting 'rate_ratio'"):
        tune_method("lora", {"rate_ratio": "4"})
