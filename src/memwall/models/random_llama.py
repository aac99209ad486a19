"""A Llama with random weights, as a Hugging Face directory: where only speed, memory or sameness is measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.models.config import ModelConfig

HEAD_DIM = 64


def write_random_llama(
    folder: Path,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocabulary: int = 4096,
    positions: int = 2048,
) -> ModelConfig:
    """Writes the model to a new folder, float16, embeddings tied. heads of 64 numbers: as many as `hidden` has room for
    unless said, and none shared by queries.

    Weights are normal with a variance of one over the inputs, so that states neither vanish nor grow; norms are one.
    """
    heads = heads or hidden // HEAD_DIM
    told = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, "head_dim": HEAD_DIM,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "float16",
        "bos_token_id": 0, "eos_token_id": 1, "rope_theta": 10000.0,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(told))
    config, draw = ModelConfig.from_directory(folder), np.random.default_rng(0)
    tensors = config.tensors()
    with SafetensorsWriter(folder / "model.safetensors", [(t.name, np.float16, t.shape) for t in tensors]) as writer:
        for tensor in tensors:
            values = draw.standard_normal(tensor.shape, np.float32) / np.sqrt(tensor.shape[-1])
            writer.write(tensor.name, (np.ones(tensor.shape) if len(tensor.shape) == 1 else values).astype(np.float16))
    return config
