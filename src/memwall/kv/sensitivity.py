"""How much the keys of each layer change when attention is cut into blocks: what EpiCache shares its budget by.

One long sample runs through the model twice, layer by layer: once with full causal attention, once with each token
seeing its own block, the sample's first tokens, and the last half of the block before. A layer's similarity is the mean
cosine between both runs' keys, flattened over windows of 100 tokens; the less alike, the more sensitive the layer.

Source: EpiCache, arXiv 2509.17396, section 3.3: a sample of 16,384 tokens, blocks of 4,096, 128 first tokens. A model
whose context is shorter gets a sample of its context and blocks and first tokens in the same proportion.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from memwall.compress.calibration import BUNDLED_TEXT, LayerStream, PromptCache
from memwall.errors import InputError
from memwall.kernels.attention import attend_float
from memwall.memory import Arena, Ledger
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.decoder import BLOCK_ROWS
from memwall.models.tokenizer import Tokenizer

SAMPLE_TOKENS, BLOCK_TOKENS, FIRST_TOKENS = 16_384, 4_096, 128  # paper: section 3.3
WINDOW_TOKENS = 100  # paper: windows whose keys are compared


class MaskedCache(PromptCache):
    """One layer's keys, and attention over the own block, the last half of the one before, and the first tokens.

    block: tokens of a block, whole blocks of the decoder's rows; None for attention over everything before.
    """

    def __init__(self, config: ModelConfig, block: int | None, first: int) -> None:
        super().__init__(config)
        assert block is None or block % BLOCK_ROWS == 0
        self._block, self._first = block, first
        self.keys = np.empty(0, np.float32)

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        begin = int(positions[0]) // self._block * self._block if self._block else 0
        if not begin:
            return super().attend(layer, q, positions, out)
        assert self._block is not None
        start, first = begin - self._block // 2, min(self._first, begin - self._block // 2)
        end = int(positions[-1]) + 1
        k, v = (np.concatenate([rows[:first], rows[start:end]]) for rows in (self._k, self._v))
        scale = self._config.head_dim**-0.5
        return attend_float(q, k, v, scale=scale, first_position=first + int(positions[0]) - start, out=out)

    def settle(self, layer: int) -> None:
        self.keys = self._k.copy()


def layer_similarity(directory: Path, text: str | None, progress: Callable[[str, int, int], None] | None) -> np.ndarray:
    """sigma [L], float32."""
    config = ModelConfig.from_directory(directory)
    tokenizer = Tokenizer.from_directory(directory)
    ids = tokenizer.encode(BUNDLED_TEXT.read_text(encoding="utf-8") if text is None else text)
    length = min(SAMPLE_TOKENS, config.max_position, len(ids))
    block = max(length * BLOCK_TOKENS // SAMPLE_TOKENS // BLOCK_ROWS, 1) * BLOCK_ROWS
    if length < 2 * block:
        raise InputError(f"the text to fit on has {len(ids):,} tokens; at least {2 * block:,} are needed")
    caches = [MaskedCache(config, size, max(length * FIRST_TOKENS // SAMPLE_TOKENS, 1)) for size in (None, block)]
    found = np.zeros(config.num_layers, np.float32)
    with Checkpoint(directory, config) as checkpoint:
        stream = LayerStream(config, checkpoint, np.array([ids[:length]], np.int64), Arena(1 << 62, Ledger()))
        stream.embed()
        states = [stream.hidden, stream.hidden.copy()]
        for layer in range(config.num_layers):
            if progress is not None:
                progress("layer similarity", layer, config.num_layers)
            for hidden, cache in zip(states, caches):
                stream.run_layer(layer, hidden, cache=cache)
            found[layer] = windows_likeness(caches[0].keys, caches[1].keys)
    if progress is not None:
        progress("layer similarity", config.num_layers, config.num_layers)
    return found


def windows_likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over heads and windows of the cosine of keys [T, Hkv, D], flattened over each window."""
    cosines = []
    for begin in range(0, len(one), WINDOW_TOKENS):
        a, b = (
            keys[begin : begin + WINDOW_TOKENS].transpose(1, 0, 2).reshape(keys.shape[1], -1) for keys in (one, other)
        )
        cosines.append((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))
    return float(np.mean(cosines))
