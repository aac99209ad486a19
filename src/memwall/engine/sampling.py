"""From logits to the next token: greedy, temperature, top-k and nucleus (top-p) sampling, and stop strings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError

LEAST_TEMPERATURE = 1e-6
"""Below it float32 would overflow; the likeliest token is certain long before."""
MOST_TEMPERATURE = 1e30
"""Above it float32 would overflow; all tokens are alike long before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to continue a text.

    temperature 0 is greedy. top_k 0 and top_p 1 switch those filters off. stop: texts that end the generation and are
    not returned. ignore_eos: go on through the model's end-of-text token (for benchmarks). frequency_penalty is taken
    off a token's logit for each time that it was made, presence_penalty once it was; bias: token id and what is added.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def bends(self) -> bool:
        """Whether logits change before a token is drawn: see `bend`."""
        return bool(self.bias) or self.frequency_penalty != 0 or self.presence_penalty != 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}; it must be 0 (off) or a count of tokens")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be 0 or a positive whole number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty; it would stop before the first token")


class Sampler:
    """Draws tokens by one `Sampling`, reproducibly from its seed.

    It works in `scratch` alone: what a pick needs is 16 bytes per token of the vocabulary, megabytes for the large
    ones, and belongs on the ledger.
    """

    def __init__(self, sampling: Sampling, scratch: np.ndarray | None = None) -> None:
        """scratch: float32 of `scratch_shape`; made on the heap when it is needed and not given."""
        self._sampling = sampling
        # Python's generator: that of numpy.random costs 3 MB of memory
        self._random = random.Random(sampling.seed)
        self._scratch = scratch

    @staticmethod
    def scratch_shape(vocab_size: int) -> tuple[int, int]:
        """Rows of float32: chances, the same sorted, and two that hold float64 sums."""
        return 4, vocab_size

    def draw(self) -> float | None:
        """The next number of its own; None where the likeliest token is taken."""
        return None if self._sampling.temperature == 0 else self._random.random()

    def pick(self, logits: np.ndarray, draw: float | None = None) -> int:
        """Next token id from logits [V] float32. draw: the random number in [0, 1) to use (see `counter`); None takes
        the next of the sampler's own. InputError where logits are no numbers, as those of damaged weights are.
        """
        settings = self._sampling
        likeliest = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[likeliest]):
            raise InputError("the model's outputs are not numbers (NaN or infinite): its weights are damaged")
        if settings.temperature == 0:
            return likeliest
        if self._scratch is None:
            self._scratch = np.empty(self.scratch_shape(len(logits)), np.float32)
        chances, ordered, sums = self._scratch[0], self._scratch[1], self._scratch[2:].reshape(-1).view(np.float64)
        np.subtract(logits, logits[likeliest], out=chances)
        temperature = min(max(settings.temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
        np.divide(chances, np.float32(temperature), out=chances)
        np.exp(chances, out=chances)
        if 0 < settings.top_k < len(chances):
            np.copyto(ordered, chances)
            ordered.partition(len(ordered) - settings.top_k)
            _keep(chances, settings.top_k, ordered[len(ordered) - settings.top_k])
        if settings.top_p < 1:
            np.copyto(ordered, chances)
            ordered.sort()
            _sum_up(ordered[::-1], sums)
            # the smallest set whose mass reaches top_p: the token that crosses it is kept
            count = min(int(np.searchsorted(sums, settings.top_p * sums[-1])) + 1, len(ordered))
            _keep(chances, count, ordered[len(ordered) - count])
        _sum_up(chances, sums)
        draw = self._random.random() if draw is None else draw
        drawn = int(np.searchsorted(sums, draw * sums[-1], side="right"))
        return drawn if drawn < len(chances) else int(np.argmax(chances))


def picks(sampler: Sampler, draw: float | None) -> Callable[[np.ndarray], int]:
    """Draws for one place, any number of times: first with `draw`, then with numbers that follow from it, so that it
    does not matter which process draws.
    """
    more = None if draw is None else random.Random(draw)
    numbers = iter([draw])

    def pick(logits: np.ndarray) -> int:
        return sampler.pick(logits, next(numbers, None if more is None else more.random()))

    return pick


def _sum_up(values: np.ndarray, sums: np.ndarray) -> None:
    """Running sums in float64. In place, since a sum over another type makes a copy of its own."""
    np.copyto(sums, values)
    np.cumsum(sums, out=sums)


def _keep(chances: np.ndarray, count: int, least: np.floating) -> None:
    """Zeroes all but the `count` largest; `least` is the smallest of these, and of its equals the first are kept."""
    above = int(np.count_nonzero(chances > least))
    if least > 0:
        chances[np.flatnonzero(chances == least)[count - above :]] = 0
    np.multiply(chances, chances >= least, out=chances)


def bend(logits: np.ndarray, made: Sequence[int], sampling: Sampling) -> None:
    """Penalties and bias of `sampling`, in place on logits [V] float32. made: the tokens of the answer so far."""
    if made and (sampling.frequency_penalty or sampling.presence_penalty):
        tokens, counts = np.unique(np.asarray(made, np.int64), return_counts=True)
        logits[tokens] -= (sampling.frequency_penalty * counts + sampling.presence_penalty).astype(np.float32)
    for token, more in sampling.bias:
        logits[token] += np.float32(more)


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
