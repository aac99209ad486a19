"""How much Cache-Craft should repair for one model: the smallest alpha that keeps what it says of text close enough.

Prompts are cut from the text: chunks in their true order, each of which was computed behind other chunks before, and
the text's next words as the question. For each alpha of a grid, least repair first, the question's next-token
distributions are compared with those of a full prefill; the first whose mean divergence is at most the target is taken.
(The paper takes F1 of a task's answers on a validation set; a text serves any model.)

Units: divergence in nats a token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall import kernels
from memwall.compress.calibration import BUNDLED_TEXT, read_text
from memwall.errors import InputError
from memwall.kv import fitted
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.cache_craft import NAME, Chooser, CraftSettings
from memwall.kv.chunk_prefill import Outcome, prefill
from memwall.kv.chunk_prompt import ChunkPrompt
from memwall.kv.chunk_store import ChunkStore
from memwall.kv.policy import Policy
from memwall.kv.saved import Origin
from memwall.kv.table import build
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights

if TYPE_CHECKING:
    from memwall.kv.base import KVCache

FIT_KEY = "cache-craft/1"
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
TARGET_NATS = 0.03
"""Less than half of what 4-bit weights cost the bundled model."""
PROMPTS, CHUNKS, CHUNK_TOKENS, QUESTION_TOKENS = 12, 4, 128, 48
ALL_LAYERS = CraftSettings(alpha=0.0, stop=0)


class CacheCraftFit:
    """What `memwall fit MODEL cache-craft` runs."""

    fits = True

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        """One alpha for each model."""
        CraftSettings.from_policy(policy)
        return FIT_KEY

    @classmethod
    def fit(
        cls,
        policy: Policy,
        directory: Path,
        text: str | None,
        threads: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """`alpha`, and the grid's `alphas` with their `divergences` and `shares` of rows that ran."""
        if threads is not None:
            kernels.set_num_threads(threads)
        words = read_text(BUNDLED_TEXT) if text is None else text
        with Trial(directory, words) as trial:
            return trial.run(progress)


def fitted_alpha(model: CacheModel) -> float | None:
    """What was fitted to a model, if anything was."""
    if not fitted.place(model.fingerprint, FIT_KEY).is_file():
        return None
    return float(fitted.load(model, Policy(NAME), FIT_KEY, ["alpha"])["alpha"][0])


class Trial:
    """A model that reads prompts with kept chunks and without."""

    def __init__(self, directory: Path, text: str) -> None:
        config = ModelConfig.from_directory(directory)
        self.tokenizer = tokenizer = Tokenizer.from_directory(directory)
        self.ids = tokenizer.encode(text, add_bos=False)
        self.opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        size = min(CHUNK_TOKENS, (config.max_position - QUESTION_TOKENS - 1) // CHUNKS)
        self._chunk_tokens = size
        self.window = CHUNKS * size + QUESTION_TOKENS
        if len(self.ids) < 2 * self.window:
            raise InputError(f"the text has {len(self.ids):,} tokens; fitting needs {2 * self.window:,} at least")
        self.arena = Arena(1 << 62, Ledger())
        with Checkpoint(directory, config) as checkpoint:
            specs = resolve(config, "float16", checkpoint)
            weights = load_weights(config, checkpoint, specs, self.arena)
            self.origin = Origin(model=checkpoint.fingerprint(), weights="float16", specs=specs)
        self.decoder = Decoder(
            config, weights, self.arena, segment_tokens=self.window + 1, logit_rows=QUESTION_TOKENS, exact=True
        )
        shape = CacheShape(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            windows=config.sliding_windows,
            hidden_size=config.hidden_size,
        )
        self.cache: KVCache = build("float32", shape, self.arena, self.window + 1)
        self._folder = tempfile.TemporaryDirectory(prefix="memwall-fit-")

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._folder.cleanup()

    def pieces(self, place: int) -> tuple[list[list[int]], list[int]]:
        """Chunks and question of the prompt that is cut from there."""
        ids, size = self.ids[place : place + self.window], self._chunk_tokens
        return [ids[begin : begin + size] for begin in range(0, CHUNKS * size, size)], ids[CHUNKS * size :]

    def run(
        self, progress: Callable[[str, int, int], None] | None = None, num_prompts: int | None = None
    ) -> dict[str, np.ndarray]:
        """Divergence of each alpha up to the first that is good enough."""
        places = np.linspace(0, len(self.ids) - self.window, num_prompts or PROMPTS).astype(int)
        prompts = [ChunkPrompt(self.opening, *self.pieces(int(place))) for place in places]
        wanted = [self.full(prompt) for prompt in prompts]
        divergences, shares = [], []
        with ChunkStore(Path(self._folder.name), self.origin, self.cache.shape, self.arena, ALL_LAYERS) as store:
            for number, prompt in enumerate(prompts):
                self.keep(store, prompt.chunks, prompts[number - 1].chunks)
            for number, alpha in enumerate(GRID):
                if progress is not None:
                    progress("alpha", number, len(GRID))
                found = [self.reused(store, prompt, alpha) for prompt in prompts]
                each = [divergence(full, mine) for full, (mine, _) in zip(wanted, found)]
                divergences.append(float(np.mean(each)))
                shares.append(float(np.mean([outcome.share for _, outcome in found])))
                if divergences[-1] <= TARGET_NATS:
                    break
        if progress is not None:
            progress("alpha", len(GRID), len(GRID))
        tried = np.array(GRID[: len(divergences)])
        return {
            "alpha": tried[-1:],
            "alphas": tried,
            "divergences": np.array(divergences),
            "shares": np.array(shares),
        }

    def keep(self, store: ChunkStore, chunks: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> None:
        """Computes each chunk once, behind chunks that it will not have before it later."""
        for chunk in chunks:
            self.cache.truncate(0)
            prefill(self.decoder, self.cache, store, ChunkPrompt(self.opening, [*others[::-2], chunk], [0]), alpha=0.0)

    def full(self, prompt: ChunkPrompt) -> np.ndarray:
        """Log-probabilities after each token of the question, by an ordinary prefill."""
        self.cache.truncate(0)
        hidden = self.decoder.hidden(np.array(prompt.tokens), self.cache)
        return log_probabilities(self.decoder.logits(hidden[-len(prompt.question) :]))

    def reused(
        self, store: ChunkStore, prompt: ChunkPrompt, alpha: float, choose: Chooser | None = None
    ) -> tuple[np.ndarray, Outcome]:
        """The same with what the store keeps."""
        self.cache.truncate(0)
        outcome = prefill(self.decoder, self.cache, store, prompt, alpha=alpha, choose=choose)
        logits = self.decoder.logits(outcome.hidden[-len(prompt.question) :])
        return log_probabilities(logits), outcome


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of logits [n, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergence(full: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence, in nats, of log-probabilities [n, V] from those of the full model."""
    return float((np.exp(full) * (full - other)).sum(axis=1).mean())
