"""A model of random rows for CacheGen's tests: configuration, planes like a text's, and a profile learned from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from memwall import kv
from memwall.kv.cachegen import Shape, encode_chunk
from memwall.kv.cachegen_fit import learn
from memwall.memory import Arena, Ledger
from memwall.models import ModelConfig

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    }
)
SHAPE = Shape.of(CONFIG)
CACHE_SHAPE = kv.CacheShape(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
MODEL = "m" * 64


def rows(num_tokens: int, seed: int = 0, smooth: float = 0.0) -> list[np.ndarray]:
    """Planes of rows with channels of different means and spreads; smooth: what a token keeps of the one before."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(7)  # what is the model's, not the text's
    planes = []
    for _ in range(SHAPE.planes):
        x = rng.standard_normal((num_tokens, SHAPE.channels))
        for token in range(1, num_tokens):
            x[token] = smooth * x[token - 1] + (1 - smooth**2) ** 0.5 * x[token]
        means, spreads = 3 * fixed.standard_normal(SHAPE.channels), np.exp(0.6 * fixed.standard_normal(SHAPE.channels))
        planes.append((means + spreads * x).astype(np.float32))
    return planes


class Text:
    """What `learn` asks of a model: rows of windows, and losses that say which part matters."""

    config = CONFIG

    def __init__(self, smooth: float = 0.0, losses: Sequence[float] = (1, 1, 1, 1, 1, 1)) -> None:
        self.smooth, self.losses = smooth, losses

    def rows(self, stage: str) -> Iterator[tuple[int, np.ndarray]]:
        for window in range(3):
            yield from enumerate(rows(400, 100 + window, self.smooth))

    def divergence(self, rounded: Sequence[Callable[[int, np.ndarray], np.ndarray]]) -> list[float]:
        return list(self.losses)


PROFILES = {form: learn(Text(), form) for form in ("auto", "delta", "mean", "direct")}  # type: ignore[arg-type]


def encode(num_tokens: int, form: str = "auto", level: int = 2, *, own: bool = False, first: int = 0) -> bytes:
    planes = rows(num_tokens)
    profile = None if own else PROFILES[form]
    return encode_chunk(planes.__getitem__, SHAPE, model=MODEL, first=first, level=level, form=form, profile=profile)


def cache(policy: str = "float32", capacity: int = 2000) -> kv.KVCache:
    return kv.build(policy, CACHE_SHAPE, Arena(1 << 26, Ledger()), capacity)
