"""Small models with a ReLU feed-forward and random weights, as folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.models import DEMO_DIRECTORY
from memwall.models.config import ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "relu", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 4096, "num_attention_heads": 2, "head_dim": 32,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FATRELU = {**LLAMA, "hidden_act": "fatrelu", "hidden_act_param": 0.3, "mlp_bias": True}
FALCON = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "activation": "relu", "bias": True,
    "hidden_size": 64, "ffn_hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "multi_query": False,
    "parallel_attn": False, "new_decoder_architecture": False, "alibi": False, "vocab_size": 4096,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
PARALLEL = {**FALCON, "parallel_attn": True, "multi_query": True}
MODELS = {"llama": LLAMA, "fatrelu": FATRELU, "falcon": FALCON, "parallel": PARALLEL}


def write_relu_model(folder: Path, kind: str, dtype: str = "float16", **changes: object) -> ModelConfig:
    """Weights with a variance of one over the inputs; biases push most neurons below zero."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**MODELS[kind], "dtype": dtype, **changes}))
    for item in DEMO_DIRECTORY.iterdir():
        if "token" in item.name:
            shutil.copyfile(item, folder / item.name)
    config, draw = ModelConfig.from_directory(folder), np.random.default_rng(0)
    tensors = config.tensors()
    with SafetensorsWriter(folder / "model.safetensors", [(t.name, dtype, t.shape) for t in tensors]) as writer:
        for tensor in tensors:
            values = draw.standard_normal(tensor.shape).astype(np.float32) / np.sqrt(tensor.shape[-1])
            if len(tensor.shape) == 1:
                values = np.full(tensor.shape, -0.5 if "mlp" in tensor.name else "norm" in tensor.name, np.float32)
            writer.write(tensor.name, values.astype(dtype))
    return config
