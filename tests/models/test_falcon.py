"""Falcon: its configurations, its fused matrices in files, and models of both forms through the engine's ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memwall import kv
from memwall.compress.convert import convert
from memwall.compress.model import compress_model
from memwall.engine import Sampling, Settings, load
from memwall.engine.loading import cache_shape
from memwall.engine.lone_lora import wear
from memwall.engine.nano_batches import alternating, nano_decoder, two_phases
from memwall.engine.nano_schedule import Schedule
from memwall.engine.sequence import Request
from memwall.engine.serving import ServingSettings, load_engine
from memwall.errors import InputError
from memwall.models import Checkpoint, ModelConfig
from memwall.models.checkpoint import stored_tensors
from memwall.models.decoder import BLOCK_ROWS, activation_shapes
from memwall.models.fused import joined
from memwall.models.lora import LoraWeights, target_shapes, tensor_name, write_lora
from memwall.simulate.fpga_designs import ModelShape
from memwall.simulate.parts import cut_model
from tests.models.families import make_family, reference_logits, some_tokens
from tests.models.loras import make_lora
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
        ({"activation": "silu"}, "activation 'silu' is not supported"),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_names_and_fused_rows_go_back(family: str, tmp_path: Path) -> None:
    """What is written of a trained model are the tensors that transformers wrote, to the bit."""
    path = make_family(family, tmp_path)
    stored = load_file(path / "model.safetensors")
    with Checkpoint(path) as checkpoint:
        found = stored_tensors(checkpoint.config)
        assert {each.name: each.shape for each in found} == {name: each.shape for name, each in stored.items()}
        for each in found:
            parts = {name: checkpoint.tensor(name) for name in each.parts}
            np.testing.assert_array_equal(joined(each, parts), stored[each.name])


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


def served(path: Path, schedule: Schedule | None = None, **changes: Any) -> list[list[int]]:
    """Tokens of some prompts worked together."""
    told = {"weights": "float32", "context_tokens": 128, "max_sequences": 4, "token_budget": 40, **changes}
    held = load_engine(path, ServingSettings(**told))
    if schedule is not None:
        nano_decoder(held, schedule)
    sampling = Sampling(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    prompts = [tuple(some_tokens(5 + 11 * n, seed=n)) for n in range(4)]
    made = [held.engine.submit(Request(prompt=prompt, sampling=sampling)) for prompt in prompts]
    while held.engine.busy:
        held.engine.step()
    found = [list(one.made) for one in made]
    held.release()
    return found


@pytest.mark.parametrize("family", ["falcon", "falcon-groups", "falcon-sequential"])
def test_batches_and_nano_batches(family: str, tmp_path: Path) -> None:
    """Together, in parts that overlap, and alone the same tokens are likeliest."""
    path = make_family(family, tmp_path)
    together = served(path)
    assert served(path, two_phases()) == together
    assert served(path, alternating(2), token_budget=200) == together
    assert served(path, max_sequences=1) == together


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["falcon-tied", "falcon-groups", "falcon-sequential"])
def test_adapters(family: str, dora: bool, tmp_path: Path) -> None:
    """As merged into the weights; a prompt at once and token by token. DoRA makes each product whole before adding."""
    path = make_family(family, tmp_path)
    config = ModelConfig.from_directory(path)
    targets = tuple(target_shapes(config))
    assert targets == ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    folder = make_lora(tmp_path / "one", config, targets=targets, dtype=np.float32)
    with Checkpoint(path) as checkpoint:
        tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()}
    adapter, lengths = LoraWeights.read(folder, config), {}
    for layer in range(config.num_layers):
        for target in targets:
            name = next(n for n in tensors if n.startswith(f"model.layers.{layer}.") and n.endswith(target + ".weight"))
            a, b = adapter.factors(layer, target) or (np.empty(0), np.empty(0))
            tensors[name] += adapter.scale * b @ a
            if dora:
                rows = np.linalg.norm(tensors[name], axis=1)
                lengths[tensor_name(layer, target, "magnitude_vector")] = wanted = rows * np.float32(1.25)
                tensors[name] *= (wanted / rows)[:, None]
    if dora:
        factors = load_file(folder / "adapter_model.safetensors")
        write_lora(folder, {**factors, **lengths}, rank=8, alpha=8, base="x", use_dora=True)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file(tensors, merged / "model.safetensors")
    tokens = np.array(some_tokens(30))
    want = Loaded(merged, "float32").logits(tokens)
    told = {"weights": "float32", "kv": "float32", "context_tokens": 64, "segment_tokens": 24, "logit_rows": 24}
    session = load(path, Settings(exact=True, **told))
    wear(session, LoraWeights.read(folder, config))
    got = [session.decoder.forward(tokens[:24], session.cache, all_logits=True).copy()]
    got += [session.decoder.forward(tokens[i : i + 1], session.cache)[None].copy() for i in range(24, 30)]
    session.release()
    np.testing.assert_allclose(np.concatenate(got), want, atol=2e-2, rtol=0)  # pages hold float16
    assert np.abs(want - Loaded(path, "float32").logits(tokens)).max() > 0.5


def test_what_is_refused(tmp_path: Path) -> None:
    path = make_family("falcon", tmp_path)
    config = ModelConfig.from_directory(path)
    fused = {
        f"base_model.model.transformer.h.0.self_attention.query_key_value.lora_{part}.weight": np.ones(
            shape, np.float32
        )
        for part, shape in (("A", (4, 96)), ("B", (128, 4)))
    }
    folder = write_lora(tmp_path / "peft", fused, rank=4, alpha=4, base="falcon")
    with pytest.raises(InputError, match="not 'query_key_value'"):
        LoraWeights.read(folder, config)
    with pytest.raises(InputError, match="a falcon model is not cut into parts"):
        cut_model(path, tmp_path / "half", "tensor", 0)
    with pytest.raises(InputError, match="feed-forwards with a gate, and this is a falcon"):
        ModelShape.of(config)
    told = json.loads((path / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "marlin", "bits": 4, "group_size": 32}
    (path / "config.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="falcon model in MARLIN's form is not read"):
        convert(path, tmp_path / "converted")
