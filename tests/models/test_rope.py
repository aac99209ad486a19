"""Rotary tables against transformers for all four scalings, and a few values by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memwall.models import ModelConfig
from memwall.models.config import RopeConfig
from memwall.models.rope import BLOCK_POSITIONS, inverse_frequencies, rope_tables

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{s['rope_theta']:g}")
@pytest.mark.parametrize("head_dim", [64, 20])
def test_tables_agree_with_transformers(scaling: dict[str, Any], head_dim: int) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 131072}
    theirs = LlamaConfig(**sizes, vocab_size=8, rope_parameters=dict(scaling), bos_token_id=0, eos_token_id=1)
    embedding = LlamaRotaryEmbedding(theirs)
    values = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    rope = ModelConfig.from_dict({**values, **sizes, "rope_parameters": scaling}).rope
    expected = embedding.inv_freq.numpy()
    found = inverse_frequencies(rope, head_dim)
    np.testing.assert_allclose(found, expected, rtol=3e-7)
    positions = np.arange(300)
    cos, sin = embedding(torch.zeros(1, dtype=torch.float32), torch.from_numpy(positions)[None])
    found_cos, found_sin = rope_tables(rope, head_dim, positions)
    assert found_cos.dtype == found_sin.dtype == np.float32
    np.testing.assert_allclose(found_cos, cos[0, :, : head_dim // 2].numpy(), atol=3e-5)
    np.testing.assert_allclose(found_sin, sin[0, :, : head_dim // 2].numpy(), atol=3e-5)


def test_values_by_hand() -> None:
    rope = RopeConfig(theta=100.0)
    np.testing.assert_allclose(inverse_frequencies(rope, 4), [1.0, 0.1], rtol=1e-7)
    cos, sin = rope_tables(rope, 4, np.array([0, 3]))
    np.testing.assert_allclose(cos, [[1, 1], [np.cos(3.0), np.cos(0.3)]], rtol=1e-6)
    np.testing.assert_allclose(sin, [[0, 0], [np.sin(3.0), np.sin(0.3)]], rtol=1e-6)


def test_llama3_keeps_short_and_stretches_long_waves() -> None:
    rope = RopeConfig(type="llama3", theta=1e6, factor=8.0, original_max_position=64)
    plain = inverse_frequencies(RopeConfig(theta=1e6), 32)
    scaled = inverse_frequencies(rope, 32)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 8
    assert np.all(scaled <= plain)
    assert np.all(scaled >= plain / 8)


def test_tables_go_where_they_are_wanted_block_by_block() -> None:
    rope = RopeConfig(type="yarn", theta=1e4, factor=4.0, attention_factor=1.5, original_max_position=64)
    positions = np.arange(3, 3 + 2 * BLOCK_POSITIONS + 7)
    out = np.empty((2, len(positions), 8), np.float32)
    cos, sin = rope_tables(rope, 16, positions, (out[0], out[1]))
    assert cos.base is out
    assert sin.base is out
    for place in (0, BLOCK_POSITIONS, len(positions) - 1):
        alone = rope_tables(rope, 16, positions[place : place + 1])
        np.testing.assert_array_equal(cos[place], alone[0][0])
        np.testing.assert_array_equal(sin[place], alone[1][0])
