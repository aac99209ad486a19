"""Embeddings: one vector of length 1 for a whole text, out of the hidden states of its tokens.

`last` takes the state of the last token, which has seen all others; `mean` the mean over all tokens. Both are normed
states, as the head reads them. Sums are kept in float64, so that it makes no difference in how many steps a text came.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memwall.engine.executor import Entry, Output


class Pooler:
    """Pools texts while they are computed."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, entry: Entry, hidden: np.ndarray) -> np.ndarray | None:
        """hidden [count, H]: of the entry's tokens. The vector [H] float32 once the text's last token is among them."""
        return self.add(entry, part_of(entry, hidden, self.seen_before(entry)))

    def seen_before(self, entry: Entry) -> int:
        """Tokens of the entry whose states are in the sum already: what was set aside may be computed again."""
        return max(self._sums.get(entry.sequence.id, (0, None))[0] - entry.first, 0)

    def add(self, entry: Entry, total: np.ndarray) -> np.ndarray | None:
        """The same with what `part_of` made of the hidden states, here or in another process."""
        one = entry.sequence
        if one.request.pooling == "mean":
            seen, before = self._sums.get(one.id, (0, np.zeros(len(total))))
            total = before + total
            self._sums[one.id] = (max(seen, entry.first + entry.count), total)
        if not entry.sample:
            return None
        length = np.linalg.norm(total)
        return (total / length if length > 0 else total).astype(np.float32)

    def forget(self, number: int) -> None:
        """The sequence is over."""
        self._sums.pop(number, None)


def part_of(entry: Entry, hidden: np.ndarray, seen_before: int) -> np.ndarray:
    """What the entry's tokens add, [H] float64: the last one's state, or for `mean` the sum of all but those seen."""
    if entry.sequence.request.pooling == "mean":
        return hidden[seen_before:].sum(axis=0, dtype=np.float64)
    return hidden[-1].astype(np.float64)


def pooled(batch: Sequence[Entry], outputs: Sequence[Output | None], pooler: Pooler) -> list[Output | None]:
    """A batch that another process computed, whose outputs bring `part_of` each text: their vectors in its place."""
    found: list[Output | None] = []
    for entry, output in zip(batch, outputs, strict=True):
        if output is not None and output.vector is not None:
            vector = pooler.add(entry, output.vector)
            output = None if vector is None else Output(-1, vector=vector)
        found.append(output)
    return found
