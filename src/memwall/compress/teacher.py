"""A teacher's answers over a text, made once and kept in a file, so that teacher and student are never in memory
together.

For every position either all logits as float16, or the `top` largest log-probabilities and which tokens they are of.
With `top`, what a student learns about the other tokens is their sum only: the divergence over the kept tokens and one
more that stands for the rest, which is never more than the whole one.

Source: INT2.1 (Yuji Chai, 2023, arXiv 2306.08162), section 3.2, which caches all logits of 10,000 samples: 1.2 TB.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memwall.compress.calibration import PromptCache
from memwall.compress.saved import check_disk, disk_errors
from memwall.errors import InputError
from memwall.memory import Arena
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve, source_spec
from memwall.models.weights import load_weights

Progress = Callable[[int, int, str], None]


class Teacher:
    """The kept answers. vocab: logits per position; top: how many of them are kept, 0 for all."""

    def __init__(self, path: Path, vocab: int, positions: int, top: int) -> None:
        self.path, self.vocab, self.positions, self.top = path, vocab, positions, min(top, vocab) if top else 0
        # a kept answer is a float32 log-probability and an int32 token
        self.row_bytes = 8 * self.top if self.top else 2 * vocab

    def rows(self, window: int, first: int, count: int) -> np.ndarray:
        """Positions first to first + count of a window: float16 [count, V], or float32 pairs' bytes (see `kept`)."""
        with open(self.path, "rb") as file:
            file.seek((window * self.positions + first) * self.row_bytes)
            data = file.read(count * self.row_bytes)
        if not self.top:
            return np.frombuffer(data, np.float16).reshape(count, self.vocab)
        return np.frombuffer(data, np.float32).reshape(count, 2, self.top)

    def kept(self, window: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities float32 and tokens int64 of the kept answers, [count, top] each."""
        rows = self.rows(window, first, count)
        return rows[:, 0], rows[:, 1].view(np.int32).astype(np.int64)

    def fill(self, model: Path, tokens: np.ndarray, arena: Arena, progress: Progress | None = None) -> None:
        """Ask the float model about windows [windows, T] that are not answered yet."""
        size = self.positions * self.row_bytes
        done = self.path.stat().st_size // size if self.path.exists() else 0
        if done == len(tokens):
            return
        check_disk(self.path.parent, (len(tokens) - done) * size)
        config = teacher_config(model, self.vocab)
        with Checkpoint(model, config) as checkpoint:
            if checkpoint.manifest is not None:
                raise InputError(f"teacher {model}: is compressed; give the float model it was made from")
            weights = load_weights(config, checkpoint, resolve(config, source_spec(config)), arena)
        decoder = Decoder(config, weights, arena, segment_tokens=self.positions, logit_rows=self.positions, exact=True)
        try:
            with disk_errors(self.path), open(self.path, "ab") as file:
                os.truncate(self.path, done * size)  # what a kill left of the next window
                for number in range(done, len(tokens)):
                    logits = decoder.forward(tokens[number, :-1], PromptCache(config), all_logits=True)
                    file.write(self._form(logits))
                    file.flush()
                    if progress is not None:
                        progress(number + 1, len(tokens), "asking the teacher")
        finally:
            decoder.release()
            weights.release()

    def _form(self, logits: np.ndarray) -> bytes:
        centred = logits - logits.max(axis=1, keepdims=True)
        if not self.top:
            return centred.astype(np.float16).tobytes()
        centred -= np.log(np.exp(centred).sum(axis=1, keepdims=True))
        chosen = np.argpartition(-centred, self.top - 1, axis=1)[:, : self.top].astype(np.int32)
        found = np.take_along_axis(centred, chosen, axis=1).astype(np.float32)
        return np.stack([found, chosen.view(np.float32)], axis=1).tobytes()


def teacher_config(model: Path, vocab: int) -> ModelConfig:
    """The teacher's configuration. InputError where it speaks other tokens."""
    found = ModelConfig.from_directory(model)
    if found.vocab_size != vocab:
        raise InputError(
            f"teacher {model} has {found.vocab_size} tokens and the model {vocab}: they must share a tokenizer"
        )
    return found
