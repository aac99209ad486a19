"""Configurations of Mamba models: both forms of infinity, sizes that do not fit, a compressed model's choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.models import Checkpoint, ModelConfig
from memwall.models.ssm_config import Quantized, with_quantized
from tests.models.ssm_models import MAMBA, MAMBA2, write_model

QUANTIZED = Quantized(layers=("w8a8", "w4a16"), head="w4a8", state="int8", head_ranges=2, channel_ranges=4)


@pytest.mark.parametrize("text", ['{"__float__": "Infinity"}', "Infinity", '"Infinity"'])
def test_infinity_in_a_file(tmp_path: Path, text: str) -> None:
    folder = write_model(tmp_path / "model", MAMBA2)
    document = json.dumps({**MAMBA2, "time_step_limit": [0.5, "HERE"]}).replace('"HERE"', text)
    (folder / "config.json").write_text(document)
    config = ModelConfig.from_directory(folder)
    assert config.ssm is not None
    assert config.ssm.dt_limits == (0.5, float("inf"))
    json.loads(json.dumps(dict(config.source), allow_nan=False))


def test_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    with Checkpoint(write_model(tmp_path / "model", MAMBA)) as checkpoint:
        assert checkpoint.config.tie_word_embeddings
        assert checkpoint.tensor("model.embed_tokens.weight").shape == (96, 64)
        assert checkpoint.tensor("model.layers.1.mixer.A_log").shape == (128, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 24}, "expand"),
        ({"n_groups": 3}, "divisor of num_heads"),
        ({"state_size": 4096}, "state_size"),
        ({"conv_kernel": 1}, "conv_kernel"),
        ({"time_step_limit": [2, 1]}, "time_step_limit"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quamba2": {"layers": ["w3a3"] * 2}}, "layers"),
        ({"quamba2": {"layers": [], "what": 1}}, "unknown field"),
        ({"use_bias": True, "quamba2": {**QUANTIZED.to_dict(), "layers": ["w4a16", "w4a8"]}}, "use_bias must be false"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict({**MAMBA2, **change})


def test_choices_of_a_compressed_model_survive_its_configuration() -> None:
    made = QUANTIZED
    config = ModelConfig.from_dict(with_quantized({**MAMBA2, "tie_word_embeddings": True}, made))
    assert config.ssm is not None
    assert config.ssm.quantized == made
    assert not config.tie_word_embeddings
    shapes = {tensor.name: tensor.shape for tensor in config.tensors()}
    assert shapes["model.layers.0.mixer.scales.state"] == (2 * 8, 16)
    assert shapes["lm_head.scale"] == (1,)
    assert "model.layers.1.mixer.scales.x" not in shapes
