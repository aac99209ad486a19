"""From logits to the next token: greedy, temperature, top-k and nucleus (top-p) sampling, and stop strings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to continue a text.

    temperature 0 is greedy. top_k 0 and top_p 1 switch those filters off. stop: texts that end the generation and are
    not returned. ignore_eos: go on through the model's end-of-text token (for benchmarks).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}; it must be 0 (off) or a count of tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty; it would stop before the first token")


class Sampler:
    """Draws tokens by one `Sampling`, reproducibly from its seed."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # numpy.random costs 2 MB of memory: greedy sampling does without it
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None

    def pick(self, logits: np.ndarray) -> int:
        """Next token id from logits [V] float32."""
        settings = self._sampling
        if self._random is None:
            return int(np.argmax(logits))
        # only the candidates are sorted, not the whole vocabulary
        count = min(settings.top_k or len(logits), len(logits))
        candidates = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
        scores = logits[candidates].astype(np.float64) / settings.temperature
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        order = np.argsort(-chances, kind="stable")
        if settings.top_p < 1:
            # the smallest set whose mass reaches top_p: the token that crosses it is kept
            order = order[: int(np.searchsorted(np.cumsum(chances[order]), settings.top_p)) + 1]
        kept = chances[order] / chances[order].sum()
        return int(candidates[order[self._random.choice(len(order), p=kept)]])


class StopWatcher:
    """Finds stop texts in a stream, holding back only what may still become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """New text -> (text that is safe to show, whether a stop text was met)."""
        self._held += text
        hits = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if hits:
            shown, self._held = self._held[: min(hits)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back at the end of the stream."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
