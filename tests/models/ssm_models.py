"""Small Mamba models with random weights, written as Hugging Face writes them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.models.config import ModelConfig
from memwall.models.ssm_config import known_as

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "dtype": "float32"}
MAMBA = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", **SIZES, "time_step_rank": 4}
MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", **SIZES, "num_heads": 8, "head_dim": 16,
    "n_groups": 2, "chunk_size": 8, "time_step_limit": [0.0, {"__float__": "Infinity"}], "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "mamba2, one group, tied, biases": {**MAMBA2, "n_groups": 1, "tie_word_embeddings": True, "use_bias": True},
    "mamba2, odd sizes": {**MAMBA2, "head_dim": 32, "num_heads": 4, "state_size": 24, "time_step_limit": [0.01, 0.2]},
}


def stored_names(config: ModelConfig) -> dict[str, str]:
    """Name here -> name in Hugging Face's files."""
    guesses = {"model.embed_tokens.weight": "backbone.embeddings.weight", "model.norm.weight": "backbone.norm_f.weight"}
    names = {
        tensor.name: guesses.get(tensor.name, tensor.name.replace("model.layers.", "backbone.layers."))
        for tensor in config.tensors()
    }
    assert all(known_as(stored) == name for name, stored in names.items())
    return names


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors by their names here, of sizes that let every part matter."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in config.tensors():
        kind = tensor.name.rsplit(".", 2)[-2:]
        if tensor.name.endswith("A_log"):
            values = np.log(rng.uniform(1, 8, tensor.shape))
        elif tensor.name.endswith(("dt_bias", "dt_proj.bias")):
            values = rng.uniform(-4, -1, tensor.shape)
        elif len(tensor.shape) == 1:
            values = 0.1 * rng.standard_normal(tensor.shape) + (kind[-1] != "bias")
        else:
            values = rng.standard_normal(tensor.shape) / np.sqrt(np.prod(tensor.shape[1:]))
        tensors[tensor.name] = values.astype(np.float32)
    return tensors


def write_model(folder: Path, config: dict[str, object], seed: int = 0, dtype: str = "float32") -> Path:
    """A model folder without tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    parsed = ModelConfig.from_directory(folder)
    write_tensors(folder, parsed, random_tensors(parsed, seed), dtype)
    return folder


def write_tensors(folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray], dtype: str = "float32") -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    names = stored_names(config)
    entries = [(names[name], kind, array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(folder / "model.safetensors", entries, {"format": "pt"}) as writer:
        for name, array in tensors.items():
            writer.write(names[name], array.astype(kind))
