"""What the step loop asks of who does the arithmetic, and what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from memwall.engine.sequence import Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Entry:
    """Compute tokens [first, first + count) of a sequence; `sample`: and draw the next one from the last of them."""

    sequence: Sequence
    first: int
    count: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Output:
    """The token drawn for an entry, or the vector of a text that was to be embedded (the token is none then: -1)."""

    token: int
    logprobs: TokenLogprobs | None = None
    vector: np.ndarray | None = None


class Executor(Protocol):
    """Does the arithmetic of a step."""

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """Keys and values of every entry's tokens go to its sequence's pages; a token for each that samples."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over."""


@dataclass(slots=True)
class Totals:
    """Counts since the start, for metrics and reports."""

    steps: int = 0
    prompt_tokens: int = 0
    made_tokens: int = 0
    computed_tokens: int = 0
    computed_prompt_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preempted: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)

    def count(self, batch: list[Entry]) -> None:
        """A batch was computed."""
        self.steps += 1
        self.computed_tokens += sum(entry.count for entry in batch)
        self.computed_prompt_tokens += sum(
            max(min(entry.first + entry.count, entry.sequence.num_prompt) - entry.first, 0) for entry in batch
        )
