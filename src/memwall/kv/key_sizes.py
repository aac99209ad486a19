"""How large each channel of a model's keys is, measured over some thousand tokens of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.compress.calibration import (
    BUNDLED_TEXT,
    CalibrationSettings,
    LayerStream,
    PromptCache,
    read_text,
    token_sequences,
)
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.tokenizer import Tokenizer

CALIBRATION = CalibrationSettings(max_tokens=4096, sequence_tokens=512)


class _Squares(PromptCache):
    """Sums up the squares of all keys that it is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.sums = np.zeros((config.num_kv_heads, config.head_dim))
        self.count = 0

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        super().append(layer, k, v, positions)
        self.sums += np.square(k.astype(np.float64)).sum(axis=0)
        self.count += len(k)


def key_sizes(
    directory: Path,
    text: str | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """Root mean square of each key channel after rotation, float32 [layers, Hkv, D]; text: None for the bundled one."""
    if threads is not None:
        kernels.set_num_threads(threads)
    config = ModelConfig.from_directory(directory)
    words, source = (read_text(BUNDLED_TEXT), "bundled") if text is None else (text, "given")
    tokens = token_sequences(words, Tokenizer.from_directory(directory), config, CALIBRATION, source)
    sizes = np.empty((config.num_layers, config.num_kv_heads, config.head_dim), np.float32)
    with Checkpoint(directory, config) as checkpoint:
        stream = LayerStream(config, checkpoint, tokens, Arena(1 << 62, Ledger()))
        stream.embed()
        for layer in range(config.num_layers):
            if progress is not None:
                progress("layers", layer, config.num_layers)
            seen = _Squares(config)
            stream.run_layer(layer, stream.hidden, cache=seen)
            sizes[layer] = np.sqrt(seen.sums / seen.count)
    if progress is not None:
        progress("layers", config.num_layers, config.num_layers)
    return sizes
