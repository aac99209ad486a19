"""Random models are what they were asked to be, and the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memwall.models.checkpoint import Checkpoint
from memwall.models.random_llama import write_random_llama


def test_shapes_scales_and_sameness(tmp_path: Path) -> None:
    configs = [
        write_random_llama(tmp_path / name, hidden=128, intermediate=192, layers=2, kv_heads=1, vocabulary=300)
        for name in ("a", "b")
    ]
    assert (configs[0].num_heads, configs[0].num_kv_heads, configs[0].head_dim) == (2, 1, 64)
    with Checkpoint(tmp_path / "a", configs[0]) as one, Checkpoint(tmp_path / "b", configs[1]) as other:
        for tensor in configs[0].tensors():
            values = np.array(one.tensor(tensor.name), np.float32)
            assert np.array_equal(values, np.array(other.tensor(tensor.name), np.float32))
            if len(tensor.shape) == 2:
                assert abs(values.std() * np.sqrt(tensor.shape[1]) - 1) < 0.05
            else:
                assert (values == 1).all()
