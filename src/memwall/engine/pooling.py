"""Embeddings: one vector of length 1 for a whole text, out of the hidden states of its tokens.

`last` takes the state of the last token, which has seen all others; `mean` the mean over all tokens. Both are normed
states, as the head reads them. Sums are kept in float64, so that it makes no difference in how many steps a text came.
"""

from __future__ import annotations

import numpy as np

from memwall.engine.executor import Entry


class Pooler:
    """Pools texts while they are computed."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, entry: Entry, hidden: np.ndarray) -> np.ndarray | None:
        """hidden [count, H]: of the entry's tokens. The vector [H] float32 once the text's last token is among them."""
        one = entry.sequence
        total = hidden[-1].astype(np.float64)
        if one.request.pooling == "mean":
            # what was set aside may be computed again
            seen, before = self._sums.get(one.id, (0, np.zeros(hidden.shape[1])))
            total = before + hidden[max(seen - entry.first, 0) :].sum(axis=0, dtype=np.float64)
            self._sums[one.id] = (max(seen, entry.first + entry.count), total)
        if not entry.sample:
            return None
        length = np.linalg.norm(total)
        return (total / length if length > 0 else total).astype(np.float32)

    def forget(self, number: int) -> None:
        """The sequence is over."""
        self._sums.pop(number, None)
