"""Vectors of many texts at once, offline: the engine that serves `/v1/embeddings`, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Pooling, Request
from memwall.engine.serving import ServingSettings, load_engine
from memwall.errors import InputError
from memwall.models.pooling import pooling_of
from memwall.models.tokenizer import Tokenizer

AT_ONCE = 64
"""Texts that wait in the engine."""


class TextEmbedder:
    """A model that makes a vector of length 1 of each text. Load it once, after everything else is imported."""

    def __init__(self, directory: Path, *, weights: str = "float16", threads: int | None = None) -> None:
        """directory: of the model, whose `1_Pooling` says how (`models.pooling`)."""
        self.pooling: Pooling = pooling_of(directory)
        self.tokenizer = Tokenizer.from_directory(directory)
        settings = ServingSettings(weights=weights, keep_prefixes=False, swap_bytes=0, threads=threads)
        self.serving = load_engine(directory, settings)

    @property
    def dimensions(self) -> int:
        return self.serving.config.hidden_size

    def embed(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """float32 [n, H]. InputError, with its number, for a text that is empty or longer than the model's context."""
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        engine, coming, done = self.serving.engine, 0, 0
        places: dict[int, int] = {}
        while coming < len(texts) or engine.busy:
            while coming < len(texts) and len(places) < AT_ONCE:
                places[engine.submit(self._request(coming, texts[coming])).id] = coming
                coming += 1
            for event in engine.step():
                if event.vector is not None:
                    vectors[places.pop(event.id)] = event.vector
                    done += 1
            if progress is not None:
                progress(done, len(texts))
        return vectors

    def close(self) -> None:
        """Ends the engine's threads."""
        self.serving.release()

    def _request(self, number: int, text: str) -> Request:
        tokens = self.tokenizer.encode(text)
        most = self.serving.context_tokens - 1
        if not tokens or len(tokens) > most:
            what = "is empty" if not tokens else f"has {len(tokens)} tokens"
            raise InputError(f"text {number + 1} {what}; the model takes 1 to {most}: cut or drop it")
        # a salt of its own: the states of a beginning that another text shares would be missing from its mean
        salt = number.to_bytes(8, "little")
        return Request(prompt=tuple(tokens), sampling=Sampling(max_new_tokens=1), pooling=self.pooling, salt=salt)
