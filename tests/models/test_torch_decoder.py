"""The torch form agrees with transformers for every family, with and without a cache, and its seams work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY, Checkpoint
from memwall.models.torch_decoder import TorchCache, TorchDecoder
from tests.models.families import FAMILIES, make_family, reference_logits, some_tokens

TOLERANCE = 2e-4


def logits_of(decoder: TorchDecoder, tokens: list[int]) -> np.ndarray:
    return decoder(torch.tensor(tokens)).numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_agree_with_transformers(name: str, tmp_path: Path) -> None:
    path = make_family(name, tmp_path)
    tokens = some_tokens(70)
    found = logits_of(TorchDecoder.from_directory(path), tokens)
    assert np.abs(found - reference_logits(path, tokens)).max() <= TOLERANCE


def test_the_demo_model_agrees_with_transformers() -> None:
    tokens = some_tokens(200, vocab_size=4096)
    found = logits_of(TorchDecoder.from_directory(DEMO_DIRECTORY), tokens)
    assert np.abs(found - reference_logits(DEMO_DIRECTORY, tokens)).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_agree(name: str, tmp_path: Path) -> None:
    path = make_family(name, tmp_path, sharded=True)
    assert len(list(path.glob("*.safetensors"))) > 2
    tokens = some_tokens(9)
    found = logits_of(TorchDecoder.from_directory(path), tokens)
    assert np.abs(found - reference_logits(path, tokens)).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "qwen3", "mixtral", "llama-yarn"])
def test_a_cache_changes_nothing(name: str, tmp_path: Path) -> None:
    decoder = TorchDecoder.from_directory(make_family(name, tmp_path))
    tokens = torch.tensor(some_tokens(30))
    whole = decoder(tokens)
    cache = TorchCache(decoder.config, 30)
    pieces = [decoder(tokens[a:b], cache=cache) for a, b in [(0, 11), (11, 12), (12, 29)]]
    assert cache.length == 29
    cache.truncate(20)
    pieces[2] = torch.cat([pieces[2][:8], decoder(tokens[20:], cache=cache)])
    torch.testing.assert_close(torch.cat(pieces), whole, atol=TOLERANCE, rtol=0)
    with pytest.raises(InputError, match="holds 30 tokens; 31"):
        decoder(tokens[:1], cache=cache)


def test_a_batch_equals_its_sequences(tmp_path: Path) -> None:
    decoder = TorchDecoder.from_directory(make_family("mixtral", tmp_path))
    batch = torch.tensor([some_tokens(12, seed=1), some_tokens(12, seed=2)])
    torch.testing.assert_close(decoder(batch), torch.stack([decoder(row) for row in batch]), atol=1e-4, rtol=0)


def test_windows_hide_what_lies_before_them(tmp_path: Path) -> None:
    """Three layers with a window of 7 reach 18 positions back, no further."""
    decoder = TorchDecoder.from_directory(make_family("mistral", tmp_path))
    tokens = some_tokens(40)
    changed = [*tokens[:5], (tokens[5] + 1) % 300, *tokens[6:]]
    difference = np.abs(logits_of(decoder, tokens) - logits_of(decoder, changed)).max(-1)
    assert np.all(difference[5:24] > 0)
    assert np.all(difference[24:] == 0)


def test_positions_can_be_given(tmp_path: Path) -> None:
    """Rotary attention sees differences of positions only."""
    decoder = TorchDecoder.from_directory(make_family("llama", tmp_path))
    tokens = torch.tensor(some_tokens(10))
    torch.testing.assert_close(decoder(tokens), decoder(tokens, torch.arange(50, 60)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_an_observer_sees_every_linear_input(name: str, tmp_path: Path) -> None:
    decoder = TorchDecoder.from_directory(make_family(name, tmp_path))
    seen: dict[str, list[torch.Tensor]] = {}
    with decoder.observed(lambda name, x: seen.setdefault(name, []).append(x)):
        decoder(torch.tensor(some_tokens(60)))
    assert set(seen) == set(decoder.linears())
    assert "lm_head.weight" in seen
    for name, module in decoder.linears().items():
        assert seen[name][0].shape[-1] == module.weight.shape[1]
    first = "model.layers.0.self_attn."
    torch.testing.assert_close(seen[first + "q_proj.weight"], seen[first + "v_proj.weight"])
    decoder(torch.tensor([1]))
    assert len(seen["lm_head.weight"]) == 1


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
    ],
)
def test_a_linear_layer_can_be_replaced(family: str, name: str, tmp_path: Path) -> None:
    decoder = TorchDecoder.from_directory(make_family(family, tmp_path))
    tokens = torch.tensor(some_tokens(20))
    before = decoder(tokens)
    old = decoder.linears()[name]
    same = torch.nn.Linear(old.weight.shape[1], old.weight.shape[0], bias=False)
    same.weight = old.weight
    decoder.replace_linear(name, same)
    assert decoder.linears()[name] is same
    torch.testing.assert_close(decoder(tokens), before)
    same.weight = torch.nn.Parameter(-old.weight, requires_grad=False)
    assert (decoder(tokens) - before).abs().max() > 0.01
    with pytest.raises(InputError, match="no such linear layer"):
        decoder.replace_linear("model.norm.weight", same)


def test_a_tied_head_is_replaced_without_the_embedding(tmp_path: Path) -> None:
    decoder = TorchDecoder.from_directory(make_family("llama-tied", tmp_path))
    embedding = decoder.model.embed_tokens.weight
    assert decoder.lm_head.weight is embedding
    decoder.replace_linear("lm_head.weight", torch.nn.Linear(96, 300, bias=False))
    assert decoder.model.embed_tokens.weight is embedding


def test_half_precision_loads_bit_for_bit(tmp_path: Path) -> None:
    path = make_family("qwen2", tmp_path)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.source_dtype("model.norm.weight") == "bfloat16"
    tokens = some_tokens(20)
    found = logits_of(TorchDecoder.from_directory(path), tokens)
    assert np.abs(found - reference_logits(path, tokens)).max() <= TOLERANCE
    low = TorchDecoder.from_directory(path, dtype=torch.bfloat16)(torch.tensor(tokens))
    assert low.dtype == torch.bfloat16
    assert np.abs(low.float().numpy() - found).max() < 0.3
