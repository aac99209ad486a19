"""Adapters in PEFT's form for tests: real directories with chosen numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from memwall.models.config import ModelConfig
from memwall.models.lora import target_shapes, tensor_name, write_lora

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_lora(
    folder: Path,
    config: ModelConfig,
    *,
    rank: int = 8,
    seed: int = 0,
    targets: tuple[str, ...] = ATTENTION,
    dtype: Any = np.float16,
    strength: float = 0.5,
    layers: range | None = None,
    **fields: Any,
) -> Path:
    """A directory with random factors. strength: of what it adds, beside what typical weights give."""
    draw = np.random.default_rng(seed)
    shapes = target_shapes(config)
    tensors = {}
    for layer in layers or range(config.num_layers):
        for target in targets:
            inputs, outputs = shapes[target]
            a = draw.standard_normal((rank, inputs)) / np.sqrt(inputs)
            b = draw.standard_normal((outputs, rank)) * strength / np.sqrt(rank)
            tensors[tensor_name(layer, target, "A")] = a.astype(dtype)
            tensors[tensor_name(layer, target, "B")] = b.astype(dtype)
    told = {"r": rank, "lora_alpha": rank, **fields}
    return write_lora(folder, tensors, rank=told.pop("r"), alpha=told.pop("lora_alpha"), base="demo", **told)
