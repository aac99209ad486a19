"""Tiny saved models behind the caches that rebuild keys: loaded once, decoded with any cache policy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kv
from memwall.engine.loading import cache_shape
from memwall.kv.latent import decoded
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.weights import load_weights
from tests.models import families


class Loaded:
    """A model in memory; `policy` strings become caches on a ledger of their own."""

    def __init__(self, directory: Path, weights: str = "float32") -> None:
        self.config = ModelConfig.from_directory(directory)
        self.shape = cache_shape(self.config)
        arena = Arena(1 << 40, Ledger())
        with Checkpoint(directory, self.config) as checkpoint:
            held = load_weights(self.config, checkpoint, resolve(self.config, weights), arena)
        self.model = kv.CacheModel(config=self.config, weights=held, directory=directory)
        self.decoder = Decoder(self.config, held, arena, segment_tokens=400, logit_rows=400, exact=True)

    def cache(self, policy: str, capacity: int = 400, ledger: Ledger | None = None, cap: int = 1 << 40) -> Any:
        return kv.build(policy, self.shape, Arena(cap, ledger or Ledger()), capacity, self.model)

    def decode(self, cache: kv.KVCache, tokens: np.ndarray, *counts: int) -> np.ndarray:
        """Logits [sum of counts, V] of forward passes of so many tokens each."""
        begin, logits = 0, []
        for count in counts:
            logits.append(self.decoder.forward(tokens[begin : begin + count], cache, all_logits=True).copy())
            begin += count
        return np.concatenate(logits)

    def tokens(self, count: int, seed: int = 0) -> np.ndarray:
        return np.array(families.some_tokens(count, seed=seed))


@cache
def loaded(family: str, weights: str = "float32", **changes: Any) -> Loaded:
    import tempfile

    return Loaded(families.make_family(family, Path(tempfile.mkdtemp(dir=families._home())), **changes), weights)


def project(tiny: Loaded, layer: int, x: np.ndarray, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys (normed, rotated) and values of inputs x [n, d] at positions `first ..` as the model makes them."""
    config, weights, shape = tiny.config, tiny.model.weights, tiny.shape
    parts = []
    for name in "kv":
        prefix = f"model.layers.{layer}.self_attn.{name}"
        part = x @ decoded(weights.matrices[f"{prefix}_proj.weight"], shape.row_values, config.hidden_size).T
        bias = weights.vectors.get(f"{prefix}_proj.bias")
        part = (part if bias is None else part + bias).reshape(len(x), shape.num_kv_heads, shape.head_dim)
        norm = weights.vectors.get(f"{prefix}_norm.weight")
        if norm is not None:
            part = part / np.sqrt((part**2).mean(-1, keepdims=True) + config.rms_norm_eps) * norm
        parts.append(np.ascontiguousarray(part, np.float32))
    cos, sin = (table[:, None] for table in tiny.model.rotary.at(np.arange(first, first + len(x))))
    half = shape.head_dim // 2
    low, high = parts[0][..., :half], parts[0][..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1), parts[1]
