"""Calibration: the statistics are those of transformers' inputs; texts that cannot calibrate are refused by name."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from memwall.compress.calibration import (
    BUNDLED_TEXT,
    STAGED_ROWS,
    CalibrationSettings,
    Collector,
    LayerStream,
    Sampler,
    read_text,
    shared_input,
    token_sequences,
)
from memwall.errors import InputError
from memwall.formats import codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.config import EMBEDDING, HEAD
from memwall.models.tokenizer import Tokenizer
from tests.compress.tiny_model import make_model


def reference_statistics(folder: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """X^T X of the inputs of all linears, by transformers."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> None:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            found[name] = x.T @ x

        reference.get_submodule(name).register_forward_hook(hook)

    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name)
    with torch.no_grad():
        reference(torch.from_numpy(tokens))
    return {f"{name}.weight": hessian.numpy() for name, hessian in found.items()}


def test_statistics_are_those_of_transformers(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    config = ModelConfig.from_directory(folder)
    tokens = np.random.default_rng(0).integers(0, 4096, (3, 200))
    expected = reference_statistics(folder, tokens)
    arena = Arena(1 << 28, Ledger())
    with Checkpoint(folder, config) as checkpoint:
        stream = LayerStream(config, checkpoint, tokens, arena)
        stream.embed()
        for layer in range(config.num_layers):
            names = [name for name in expected if f"layers.{layer}." in name]
            before = arena.used_bytes
            collector = stream.collect(layer, names)
            statistics = collector.finish()
            for name in names:
                found = statistics[shared_input(name)]
                assert found.num_tokens == tokens.size
                np.testing.assert_allclose(found.hessian, expected[name], rtol=1e-3, atol=1e-2)
            collector.release()
            assert arena.used_bytes == before
            stream.advance(layer)
        found = stream.collect_final(HEAD).finish()[HEAD]
        np.testing.assert_allclose(found.hessian, expected[HEAD], rtol=1e-3, atol=1e-2)


def test_packed_layers_take_the_place_of_the_checkpoints(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = ModelConfig.from_directory(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    hidden = []
    with Checkpoint(folder, config) as checkpoint:
        for spec in ("float32", "int2"):
            stream = LayerStream(config, checkpoint, np.arange(20).reshape(2, 10), Arena(1 << 28, Ledger()))
            stream.embed(codec("float32").encode(checkpoint.tensor(EMBEDDING)))
            stream.advance(0, {name: codec(spec).encode(checkpoint.tensor(name))})
            collector = stream.collect(1, ["model.layers.1.self_attn.q_proj.weight"])
            hidden.append(collector.finish()["model.layers.1.self_attn.k_proj.weight"].hessian)
    assert not np.allclose(*hidden)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.k_proj.weight"),
        ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        ("m.block_sparse_moe.experts.5.w3.weight", "m.block_sparse_moe.experts.5.w1.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_linears_with_one_input_share_statistics(name: str, expected: str) -> None:
    assert shared_input(name) == expected


@pytest.mark.parametrize("num_rows", [1, STAGED_ROWS - 1, STAGED_ROWS, 3 * STAGED_ROWS + 5])
def test_collector_takes_in_every_row(num_rows: int) -> None:
    x = np.random.default_rng(0).standard_normal((num_rows, 8), np.float32)
    arena = Arena(1 << 24, Ledger())
    collector = Collector({"a": 8}, arena)
    collector("b", x)
    for start in range(0, num_rows, 100):
        collector("a", x[start : start + 100])
    statistics = collector.finish()["a"]
    assert statistics.num_tokens == num_rows
    np.testing.assert_allclose(statistics.hessian, x.T @ x, rtol=1e-4, atol=1e-2)
    collector.release()
    assert arena.used_bytes == 0


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"text\0text", "is binary"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is not text"),
    ],
)
def test_texts_that_are_none(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "calibration.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=match) as raised:
        read_text(path)
    assert str(path) in str(raised.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "missing")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)


def test_sequences(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config, tokenizer = ModelConfig.from_directory(folder), Tokenizer.from_directory(folder)
    text = read_text(BUNDLED_TEXT)
    settings = CalibrationSettings(max_tokens=1000, sequence_tokens=300)
    tokens = token_sequences(text, tokenizer, config, settings, "text")
    assert tokens.shape == (3, 256)  # the model's longest context is shorter than the sequences asked for
    if tokenizer.bos_token_id is not None:
        assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    with pytest.raises(InputError, match=r"short.txt has \d+ tokens; at least 128"):
        token_sequences("too short", tokenizer, config, settings, "short.txt")
    with pytest.raises(InputError, match="sequences of 2000"):
        CalibrationSettings(max_tokens=1000, sequence_tokens=2000)


def test_the_bundled_text_is_text() -> None:
    text = read_text(BUNDLED_TEXT)
    assert 60_000 < len(text) < 100_000
    assert BUNDLED_TEXT.with_name("NOTICE").is_file()


@pytest.mark.parametrize(("rows", "blocks"), [(4, (3, 5, 2)), (100, (7, 3)), (1, (4, 4)), (3, (10,))])
def test_a_sampler_keeps_rows_evenly_and_the_peaks_of_all(rows: int, blocks: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((sum(blocks), 6)).astype(np.float32)
    arena = Arena(1 << 20, Ledger())
    sampler = Sampler({"a": 6, "unseen": 2}, rows, len(x), arena)
    for begin, end in itertools.pairwise(np.cumsum([0, *blocks])):
        sampler("a", x[begin:end])
        sampler("other", x[begin:end])
    step = -(-len(x) // rows)
    np.testing.assert_array_equal(sampler.sample("a"), x[::step])
    np.testing.assert_array_equal(sampler.peaks["a"], np.abs(x).max(axis=0))
    assert len(sampler.sample("unseen")) == 0
    sampler.release()
    assert arena.used_bytes == 0
