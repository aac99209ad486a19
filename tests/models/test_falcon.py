"""Falcon: its configurations, its fused matrices in files, and models of both forms through the engine's ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memwall import kv
from memwall.compress.model import compress_model
from memwall.engine.loading import cache_shape
from memwall.errors import InputError
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import BLOCK_ROWS, activation_shapes
from memwall.models.lora import target_shapes
from tests.models.families import make_family, reference_logits, some_tokens
from tests.models.test_decoder import Loaded

CONFIG: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
FAMILIES = ["falcon", "falcon-tied", "falcon-heads", "falcon-sequential", "falcon-groups", "falcon-one-norm"]


def of(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**CONFIG, **changes})


# ---- configurations ------------------------------------------------------------------------------------------------


def test_what_a_configuration_leaves_out() -> None:
    config = of()
    assert (config.family, config.num_kv_heads, config.head_dim, config.intermediate_size) == ("falcon", 1, 8, 256)
    assert (config.max_position, config.tie_word_embeddings, config.rms_norm_eps) == (2048, True, 1e-5)
    assert (config.layer_norm, config.feed_forward, config.gated) == (True, "gelu", False)
    assert (config.parallel, config.shared_norm, config.qkv_bias) == (True, True, False)
    assert ModelConfig.from_dict({**CONFIG, "architectures": None, "model_type": "falcon"}).family == "falcon"


def test_forms() -> None:
    new = of(new_decoder_architecture=True, num_kv_heads=2, multi_query=True)
    assert (new.num_kv_heads, new.parallel, new.shared_norm) == (2, True, False)
    assert of(new_decoder_architecture=True).num_kv_heads == 8
    assert of(new_decoder_architecture=True, num_ln_in_parallel_attn=1).shared_norm
    heads = of(multi_query=False, parallel_attn=False, bias=True, activation="gelu_pytorch_tanh")
    assert (heads.num_kv_heads, heads.parallel, heads.shared_norm, heads.feed_forward) == (8, False, False, "gelu_tanh")
    names = {tensor.name: tensor for tensor in heads.tensors()}
    assert names["model.layers.1.mlp.up_proj.bias"].shape == (256,)
    assert names["model.layers.1.post_attention_layernorm.bias"].role == names["model.norm.bias"].role == "norm"
    assert "model.layers.1.mlp.gate_proj.weight" not in names
    assert "model.layers.0.post_attention_layernorm.weight" not in {tensor.name for tensor in of().tensors()}
    assert "gate" not in activation_shapes(of(), 4)
    assert "gate_proj" not in target_shapes(of())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi": True}, "ALiBi"),
        ({"alibi": "no"}, "alibi"),
        ({"num_attention_heads": 7}, "hidden_size"),
        ({"hidden_size": 56}, "rotary"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ({"num_ln_in_parallel_attn": 3, "new_decoder_architecture": True}, "num_ln_in_parallel_attn"),
        ({"activation": "relu"}, "activation 'relu' is not supported"),
        ({"ffn_hidden_size": 0}, "ffn_hidden_size"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon"),
        ({"bias": 1}, "bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        of(**changes)


# ---- files ---------------------------------------------------------------------------------------------------------


def split(fused: np.ndarray, name: str, heads: int, kv_heads: int) -> np.ndarray:
    """Rows of queries, keys or values as transformers' own code takes them apart."""
    size = len(fused) // (heads + 2 * kv_heads)
    grouped = fused.reshape(kv_heads, heads // kv_heads + 2, size, *fused.shape[1:])
    part = {"q": grouped[:, :-2], "k": grouped[:, -2:-1], "v": grouped[:, -1:]}[name]
    return part.reshape(-1, *fused.shape[1:])


@pytest.mark.parametrize("family", ["falcon-tied", "falcon-heads", "falcon-groups"])
def test_fused_rows(family: str, tmp_path: Path) -> None:
    path = make_family(family, tmp_path)
    stored = load_file(path / "model.safetensors")
    with Checkpoint(path) as checkpoint:
        config = checkpoint.config
        for end in ("weight", "bias"):
            fused = stored[f"transformer.h.1.self_attention.query_key_value.{end}"]
            for part in "qkv":
                name = f"model.layers.1.self_attn.{part}_proj.{end}"
                want = split(fused, part, config.num_heads, config.num_kv_heads)
                np.testing.assert_array_equal(checkpoint.tensor(name), want)
                np.testing.assert_array_equal(checkpoint.alone(name), want)
                assert not checkpoint.tensor(name).flags.writeable
                assert checkpoint.stored_bytes(name) == want.nbytes
                for multiple, most in ((1, 1), (1, 3000), (16, 1), (16, 9000), (7, 1 << 30)):
                    pieces = list(checkpoint.pieces(name, most, multiple))
                    assert [first for first, _ in pieces] == np.cumsum([0, *(len(p) for _, p in pieces[:-1])]).tolist()
                    assert all(len(piece) % multiple == 0 for _, piece in pieces[:-1])
                    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), want)
                checkpoint.drop(name)
    assert sum(tensor.size for tensor in config.tensors()) == sum(each.size for each in stored.values())


def test_shards_and_tensors_that_are_apart_already(tmp_path: Path) -> None:
    whole, sharded = make_family("falcon-groups", tmp_path), make_family("falcon-groups", tmp_path, sharded=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "config.json").write_bytes((whole / "config.json").read_bytes())
    with Checkpoint(whole) as one, Checkpoint(sharded) as other:
        tensors = {name: np.array(one.tensor(name)) for name in one.names()}
        assert all(np.array_equal(tensor, other.tensor(name)) for name, tensor in tensors.items())
    save_file(tensors, apart / "model.safetensors")
    tokens = some_tokens(9)
    np.testing.assert_array_equal(
        Loaded(apart, "float32").logits(np.array(tokens)), Loaded(whole, "float32").logits(np.array(tokens))
    )


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = make_family("falcon-groups", tmp_path)
    stored = load_file(path / "model.safetensors")
    fused = "transformer.h.0.self_attention.query_key_value.weight"
    for change, words in (
        ({fused: stored[fused][:-1]}, "query_key_value.weight' has shape .* says 160 rows"),
        ({fused: None}, "missing tensors: 'model.layers.0.self_attn.q_proj.weight'"),
        ({"transformer.h.0.self_attention.other.weight": stored[fused]}, "does not know: .*other.weight"),
        ({"model.layers.0.self_attn.q_proj.weight": stored[fused][:96]}, "two tensors go by the name"),
        ({"transformer.h.0.ln_mlp.bias": np.full(96, np.nan, np.float32)}, "holds NaN"),
    ):
        kept = {name: value for name, value in {**stored, **change}.items() if value is not None}
        save_file(kept, path / "model.safetensors")
        with pytest.raises(InputError, match=words):
            Loaded(path, "float32")


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["falcon", "falcon-groups", "falcon-sequential"])
def test_prompts_of_several_blocks(family: str, tmp_path: Path) -> None:
    """Rows that are worked apart see the hidden state from before their block's attention was added."""
    path = make_family(family, tmp_path)
    tokens = np.array(some_tokens(BLOCK_ROWS + 40))
    assert np.abs(Loaded(path, "float32").logits(tokens) - reference_logits(path, tokens)).max() <= 2e-4


@pytest.mark.parametrize("policy", ["kivi(2bit)", "kivi(4bit)", "xquant(4bit)"])
def test_caches_that_compress(policy: str, tmp_path: Path) -> None:
    """One head of keys and values for all queries; caches of inputs rebuild them with biases."""
    path = make_family("falcon-tied", tmp_path)
    tokens = np.array(some_tokens(160))
    loaded = Loaded(path, "float32", segment=64)
    behind = kv.CacheModel(config=loaded.config, weights=loaded.decoder.weights, directory=path)
    loaded.cache = kv.build(policy, cache_shape(loaded.config), loaded.arena, 256, behind)
    whole = reference_logits(path, tokens)
    parts = [loaded.logits(tokens[first : first + 8]) for first in range(0, 160, 8)]
    off = np.abs(np.concatenate(parts) - whole).mean(axis=1)
    assert off[:8].max() < 0.02  # in floats still
    assert off.mean() < 0.35
    assert loaded.cache.nbytes < 160 * 2 * 3 * 16 * 4 or "xquant" in policy


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant", "comet", "spqr"])
def test_compressed_and_run(method: str, tmp_path: Path) -> None:
    path, text = make_family("falcon-groups", tmp_path), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; the wall lives between memory and compute. " * 30)
    out = tmp_path / "out"
    bits = {"smoothquant": "int8", "comet": "comet-g64"}.get(method, "spqr4" if method == "spqr" else "int4")
    compress_model(path, out, bits=bits, method=method, calibration_text=text)
    assert json.loads((out / "memwall.json").read_text())["model_config"]["new_decoder_architecture"]
    tokens = np.array(some_tokens(40))
    off = np.abs(Loaded(out, "saved").logits(tokens) - Loaded(path, "float32").logits(tokens)).mean()
    assert off < (0.1 if method == "smoothquant" else 0.6)
