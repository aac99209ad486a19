"""A model's parts: every tensor once, layers in order."""

from __future__ import annotations

from memwall.compress.parts import model_parts
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.config import EMBEDDING


def test_every_tensor_has_one_part() -> None:
    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    parts = model_parts(config)
    assert [part.layer for part in parts] == [None, *range(config.num_layers), None]
    assert [tensor.name for tensor in parts[0].tensors] == [EMBEDDING]
    assert sorted(t.name for part in parts for t in part.tensors) == sorted(t.name for t in config.tensors())
    assert all(len(tensor.shape) == 2 for part in parts for tensor in part.matrices)
