"""Units scored by the attention that queries give them: those of a prompt that stands in for what will be asked, or the
last ones of a block.

Source: EpiCache, arXiv 2509.17396, section 3.2; the window of last queries is SnapKV's, arXiv 2404.14469.
"""

from __future__ import annotations

import numpy as np

from memwall.kv.base import CacheShape
from memwall.kv.blocks import Scorer, Units
from memwall.kv.evict import BLOCK_PRODUCTS

LAST_QUERIES = 64  # paper: window of the block-wise SnapKV baseline
SCORED_LOGITS = 1 << 17
"""Logits held at once."""


class MostAttention(Scorer):
    """The most attention that any of the queries kept gives to a unit: of a whole patched prompt, or of a block's
    end.
    """

    keeps_scores = False

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.probing = False
        self._queries: list[np.ndarray] = []

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> None:
        self._queries.append(q.copy())
        # the oldest go once what follows is enough
        while not self.probing and sum(map(len, self._queries[1:])) >= LAST_QUERIES:
            del self._queries[0]

    def drop(self) -> None:
        """Forgets the queries of a layer."""
        self._queries = []

    def score(self, layer: int, units: Units) -> list[np.ndarray]:
        queries = np.concatenate(self._queries)
        queries = queries if self.probing else queries[-LAST_QUERIES:]
        # a patched prompt comes behind every unit; a block's end must not look ahead
        behind = 0 if self.probing else len(queries)
        rep = self.shape.num_heads // self.shape.num_kv_heads
        found = []
        for head in range(self.shape.num_kv_heads):
            mine = np.ascontiguousarray(queries[:, head * rep : (head + 1) * rep])
            found.append(most_attention(mine, units.keys(head), self.shape.logit_scale, behind))
        return found


def most_attention(queries: np.ndarray, keys: np.ndarray, scale: float, behind: int) -> np.ndarray:
    """max over queries [n, rep, D] of their softmax over keys [S, D]: [S]. behind: the last so many keys are the last
    so many queries' own, which see none after themselves.
    """
    scores, dim = np.zeros(len(keys), np.float32), queries.shape[-1]
    own = np.arange(len(queries)) - len(queries) + len(keys) if behind else np.full(len(queries), len(keys))
    step = max(SCORED_LOGITS // max(queries.shape[1] * len(keys), 1), 1)
    for begin in range(0, len(queries), step):
        some = queries[begin : begin + step]
        rows = some.reshape(-1, dim) * np.float32(scale)
        logits = np.empty((len(rows), len(keys)), np.float32)
        columns = max(BLOCK_PRODUCTS // (dim * len(rows)), 16)  # small products, see BLOCK_PRODUCTS
        for first in range(0, len(keys), columns):
            logits[:, first : first + columns] = rows @ keys[first : first + columns].T
        if behind:
            ahead = np.arange(len(keys)) > np.repeat(own[begin : begin + len(some)], some.shape[1])[:, None]
            logits[ahead] = -np.inf
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        np.maximum(scores, logits.max(axis=0), out=scores)
    return scores
