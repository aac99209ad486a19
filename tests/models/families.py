"""Tiny random models of every family, saved by transformers in the Hugging Face form, and their reference logits.

    path = make_family("qwen3", tmp_path)      # config, weights and a tokenizer, a fresh copy that a test may damage
    logits = reference_logits(path, tokens)    # transformers, float32, eager attention

Made once per session. Sizes are no multiples of kernel tiles, and weights are scaled so that attention is far from
uniform and logits are of order one: at transformers' own initialization a wrong mask would hardly show.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 300
NUM_LAYERS = 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

# name -> class prefix in transformers and what differs from the common sizes
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama-linear": ("Llama", {"rope_parameters": _LINEAR}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "falcon": ("Falcon", {"ffn_hidden_size": 136}),
    "falcon-tied": ("Falcon", {"tie_word_embeddings": True, "bias": True, "activation": "gelu_new"}),
    "falcon-heads": ("Falcon", {"multi_query": False, "bias": True}),
    "falcon-sequential": ("Falcon", {"parallel_attn": False, "bias": True, "ffn_hidden_size": 136}),
    "falcon-groups": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-one-norm": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 136},
    ),
}
FAMILIES = list(_VARIANTS)

_TEXT = "The quick brown fox jumps over the lazy dog; the wall between memory and compute is where the fox lives. " * 3


def make_family(name: str, tmp_path: Path, *, sharded: bool = False, **changes: Any) -> Path:
    """A fresh copy of the tiny model `name` under `tmp_path`; `changes` are hashable configuration fields."""
    source = _made(name, sharded, tuple(sorted(changes.items())))
    suffix = 0
    while (target := tmp_path / f"{name}-{suffix}").exists():
        suffix += 1
    return Path(shutil.copytree(source, target))


def reference_logits(path: Path, tokens: list[int] | np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens))[None]).logits[0].numpy()


def some_tokens(count: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[int]:
    """Random token ids with repeats, so that attention has something to find."""
    rng = np.random.default_rng(seed)
    half = rng.integers(3, vocab_size, (count + 1) // 2)
    return np.concatenate([half, half])[:count].tolist()


@cache
def _home() -> Path:
    home = tempfile.mkdtemp(prefix="memwall-families-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return Path(home)


@cache
def _made(name: str, sharded: bool, changes: tuple[tuple[str, Any], ...]) -> Path:
    import torch
    import transformers

    prefix, differences = _VARIANTS[name]
    config = getattr(transformers, prefix + "Config")(**{**_SIZES, **differences, **dict(changes)})
    torch.manual_seed(len(name))
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _randomize(parameter_name, parameter)
    path = Path(tempfile.mkdtemp(dir=_home()))
    model.save_pretrained(path, max_shard_size="200KB" if sharded else "1GB")
    write_tokenizer(path)
    return path


def _randomize(name: str, parameter: Any) -> None:
    if name.endswith("bias"):
        parameter.normal_(0.0, 0.2)
    elif "norm" in name or "ln_" in name:
        parameter.normal_(1.0, 0.1)
    elif "embed" in name:
        parameter.normal_(0.0, 0.3)
    else:
        scale = 2.0 if any(part in name for part in ("q_proj", "k_proj", "query_key")) else 1.0
        parameter.normal_(0.0, scale * parameter.shape[-1] ** -0.5)


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer with special tokens 0 to 2 and a few merges, some 290 tokens in all."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
