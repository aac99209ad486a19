"""The benchmark's models: both forms hold the same numbers, and a standard reader accepts them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


random_models = _load("random_models")
SMALL = random_models.Shape(
    name="small", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96, vocab=320
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return random_models.make_directory(SMALL, tmp_path_factory.mktemp("models") / "small")


@pytest.mark.parametrize(("name", "millions"), [("0.5b", 494), ("1b", 1236)])
def test_shapes_have_the_sizes_they_are_named_after(name, millions):
    assert round(random_models.SHAPES[name].num_matrix_weights / 1e6) == millions


def test_bfloat16_rounds_half_to_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5], np.float32)
    assert random_models.widen(random_models.narrow(values)).tolist() == [1.0, 1.0, 1 + 2**-6, -2.5]


def test_safetensors_reads_what_was_written(directory):
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(random_models.tensor_shapes(SMALL))
        for name, dims in random_models.tensor_shapes(SMALL).items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == dims
            assert np.array_equal(
                tensor.float().numpy(), random_models.widen(random_models.read_tensor(directory, name))
            )


def test_same_seed_same_model(directory, tmp_path):
    again = random_models.make_directory(SMALL, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    other = random_models.make_directory(SMALL, tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (directory / "model.safetensors").read_bytes()


def test_transformers_runs_it_with_finite_logits(directory):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.arange(2, 34)[None]).logits
    assert logits.shape == (1, 32, SMALL.vocab)
    assert bool(torch.isfinite(logits).all())
    assert 0.1 < float(logits.std()) < 10


def test_tokenizer_has_every_byte(directory):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "memwall é\n\t\x00"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is True


def test_gguf_holds_the_same_weights_reordered_for_its_rotation(directory, tmp_path):
    pytest.importorskip("gguf")
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path = random_models.make_gguf(SMALL, directory, tmp_path / "small.gguf")
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert len(found) == len(random_models.tensor_shapes(SMALL))
    value = random_models.widen(random_models.read_tensor(directory, "model.layers.1.self_attn.v_proj.weight"))
    packed = found["blk.1.attn_v.weight"]
    assert np.abs(dequantize(packed.data, packed.tensor_type) - value).max() < np.abs(value).max() / 8
    query = random_models.widen(random_models.read_tensor(directory, "model.layers.1.self_attn.q_proj.weight"))
    packed = found["blk.1.attn_q.weight"]
    stored = dequantize(packed.data, packed.tensor_type)
    half = SMALL.head_dim // 2
    assert np.abs(stored[1] - query[half]).max() < np.abs(query).max() / 8
    assert not list(tmp_path.glob("*.part"))
