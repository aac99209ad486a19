"""A store of made-up chunks, and prompts of the demo model, for the tests of Cache-Craft's parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from memwall import kv
from memwall.engine.loading import cache_shape
from memwall.kv.cache_craft import CraftSettings, chunk_id
from memwall.kv.chunk_file import ChunkWriter
from memwall.kv.chunk_prefill import Outcome, prefill
from memwall.kv.chunk_prompt import ChunkPrompt
from memwall.kv.chunk_store import ChunkStore
from memwall.kv.saved import Origin
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.weights import Weights, load_weights

SHAPE = kv.CacheShape(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
ORIGIN = Origin(model="a" * 64, weights="int4", specs={"x": "int4-g64"})
TOKENS = 20
SETTINGS = CraftSettings(alpha=1.0, stop=0)


def new_store(folder: Path, settings: CraftSettings = SETTINGS, **options: object) -> ChunkStore:
    return ChunkStore(folder, ORIGIN, SHAPE, Arena(1 << 24, Ledger()), settings, **options)  # type: ignore[arg-type]


def rows_of(tokens: Sequence[int], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The made-up keys and values of a chunk's layer."""
    rng = np.random.default_rng([tokens[0], layer])
    shape = (len(tokens), SHAPE.num_kv_heads, SHAPE.head_dim)
    keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    return keys, values


def write_chunk(folder: Path, first: int, predecessors: Sequence[str] = (), tokens: int = TOKENS) -> Path:
    """A file of the chunk first, first + 1, ..."""
    ids = np.arange(first, first + tokens)
    names = [chunk_id([ord(name)]) for name in predecessors]
    writer = ChunkWriter(folder, ORIGIN, SHAPE, ids, names, [10] * len(names))
    for layer in range(SHAPE.num_layers):
        keys, values = rows_of(ids.tolist(), layer)
        writer.write(layer, keys[:7], values[:7])
        writer.write(layer, keys[7:], values[7:])
    return writer.close(np.arange(1.0, len(names) + 1), 2.0, np.linspace(0, 1, tokens))


@cache
def loaded(directory: Path) -> tuple[ModelConfig, Weights, Origin]:
    """A model in float32, loaded once."""
    config = ModelConfig.from_directory(directory)
    with Checkpoint(directory, config) as checkpoint:
        specs = resolve(config, "float32", checkpoint)
        weights = load_weights(config, checkpoint, specs, Arena(1 << 40, Ledger()))
        return config, weights, Origin(model=checkpoint.fingerprint(), weights="float32", specs=specs)


class Reader:
    """Reads prompts through a store with a cache of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        policy: str = "float32",
        segment_tokens: int = 512,
        settings: CraftSettings = SETTINGS,
        most_bytes: int = 1 << 40,
        model: Path | None = None,
        **options: object,
    ) -> None:
        """model: its folder; the bundled one unless given."""
        config, weights, origin = loaded(model_directory("demo") if model is None else model)
        self.arena = Arena(most_bytes, Ledger())
        shape = cache_shape(config)
        self.config = config
        self.decoder = Decoder(config, weights, self.arena, segment_tokens=segment_tokens, exact=True)
        self.cache = kv.build(policy, shape, self.arena, config.max_position)
        self.store = ChunkStore(folder, origin, shape, self.arena, settings, **options)  # type: ignore[arg-type]

    def read(self, prompt: ChunkPrompt, alpha: float = 0.0, **options: object) -> Outcome:
        self.cache.truncate(0)
        return prefill(self.decoder, self.cache, self.store, prompt, alpha=alpha, **options)  # type: ignore[arg-type]

    def full(self, prompt: ChunkPrompt) -> np.ndarray:
        """The last token's logits by an ordinary prefill."""
        self.cache.truncate(0)
        ids = np.array(prompt.tokens)
        for begin in range(0, len(ids), self.decoder.segment_tokens):
            logits = self.decoder.forward(ids[begin : begin + self.decoder.segment_tokens], self.cache)
        return logits.copy()


def made_up_chunk(seed: int, tokens: int = 40) -> list[int]:
    """Token ids at random."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, 4000, tokens)]
