"""Configurations of the five families in both forms of transformers; every absurd value is refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY, ModelConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
}


def of(architecture: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, "architectures": [architecture], **changes})


def test_the_demo_model() -> None:
    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    assert (config.family, config.num_layers, config.head_dim, config.dtype) == ("llama", 8, 32, "float16")
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (0, (1,), True)
    assert config.num_parameters == 6_951_168


def test_old_and_new_forms_agree() -> None:
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    old = of("LlamaForCausalLM", rope_scaling=scaling, torch_dtype="bfloat16")
    parameters = {**scaling, "rope_type": "llama3", "rope_theta": 5000.0}
    del parameters["type"]
    new = of("LlamaForCausalLM", rope_theta=None, rope_parameters=parameters, dtype="bfloat16")
    assert old.rope == new.rope
    assert old.rope.original_max_position == 64
    assert old.dtype == new.dtype == "bfloat16"


def test_yarn_attention_factor() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert of("LlamaForCausalLM", rope_scaling=yarn).rope.attention_factor == pytest.approx(1.13862944)
    assert of("LlamaForCausalLM", rope_scaling={**yarn, "attention_factor": 1.5}).rope.attention_factor == 1.5
    scaled = of("LlamaForCausalLM", rope_scaling={**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}).rope
    assert scaled.attention_factor == 1.0
    assert of("LlamaForCausalLM", rope_scaling=yarn).rope.original_max_position == 512


def test_windows() -> None:
    assert of("LlamaForCausalLM", sliding_window=7).sliding_windows == (None,) * 3
    assert of("MistralForCausalLM", sliding_window=7).sliding_windows == (7,) * 3
    assert of("MistralForCausalLM", sliding_window=None).sliding_windows == (None,) * 3
    assert of("MistralForCausalLM").sliding_windows == (4096,) * 3
    assert of("MixtralForCausalLM").sliding_windows == (None,) * 3
    assert of("Qwen2ForCausalLM", sliding_window=7).sliding_windows == (None,) * 3
    used = {"sliding_window": 7, "use_sliding_window": True}
    assert of("Qwen2ForCausalLM", max_window_layers=1, **used).sliding_windows == (None, 7, 7)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert of("Qwen3ForCausalLM", layer_types=types, **used).sliding_windows == (7, None, 7)


def test_tensors_of_each_family() -> None:
    names = {spec.name: spec for spec in of("Qwen2ForCausalLM").tensors()}
    assert names["model.layers.2.self_attn.k_proj.bias"].shape == (32,)
    assert "model.layers.2.self_attn.o_proj.bias" not in names
    assert names["lm_head.weight"].role == "head"
    assert "lm_head.weight" not in {spec.name for spec in of("LlamaForCausalLM", tie_word_embeddings=True).tensors()}
    biased = {spec.name for spec in of("LlamaForCausalLM", attention_bias=True, mlp_bias=True).tensors()}
    assert {"model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.down_proj.bias"} <= biased
    qwen3 = of("Qwen3ForCausalLM")
    assert qwen3.head_dim == 128
    assert {spec.name: spec for spec in qwen3.tensors()}["model.layers.0.self_attn.q_norm.weight"].shape == (128,)
    mixtral = of("MixtralForCausalLM", num_local_experts=5)
    experts = [spec for spec in mixtral.tensors() if spec.role == "expert"]
    assert len(experts) == 3 * 5 * 3
    assert (experts[-1].layer, experts[-1].expert, experts[-1].shape) == (2, 4, (64, 96))
    assert mixtral.num_parameters == sum(spec.size for spec in mixtral.tensors())


def test_generation_config_gives_the_token_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2, "bos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "bos_token_id": None}))
    config = ModelConfig.from_directory(tmp_path)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (5, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["FooForCausalLM"]},
            "unknown architecture 'FooForCausalLM'; supported are LlamaForCausalLM",
        ),
        ({"architectures": None}, "names no known architecture"),
        ({"architectures": [3]}, "unknown architecture"),
        ({"hidden_size": None}, "hidden_size must be .* got missing"),
        ({"hidden_size": "64"}, "hidden_size must be"),
        ({"hidden_size": 2**40}, "hidden_size must be"),
        ({"hidden_size": 65}, "multiple of num_attention_heads"),
        ({"head_dim": 15}, "even"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "divisor"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must be"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu"),
        ({"eos_token_id": 128}, "below vocab_size"),
        ({"eos_token_id": [1, "x"]}, "below vocab_size"),
        ({"bos_token_id": -1}, "below vocab_size"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"torch_dtype": "int8"}, "dtype must be one of float32"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized by 'gptq'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type must be one of default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor must be"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per kind of layer"),
        ({"rope_theta": -1}, "rope_theta must be"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ],
)
def test_absurd_values_are_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict({**LLAMA, **changes}, "config.json")


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("MixtralForCausalLM", {"num_local_experts": 10**6}, "num_local_experts must be"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok must be"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types must be"),
        ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is off"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window must be"),
    ],
)
def test_family_fields_are_checked(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        of(architecture, **changes)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        ModelConfig.from_directory(tmp_path / "absent")
    with pytest.raises(InputError, match="folder is empty"):
        ModelConfig.from_directory(tmp_path)
    with pytest.raises(InputError):
        ModelConfig.from_directory("a\0b")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"no config\.json .*notes\.txt"):
        ModelConfig.from_directory(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        ModelConfig.from_directory(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(InputError, match=r"config\.json: broken JSON"):
        ModelConfig.from_directory(tmp_path)
