"""What an attention computes: sizes, mask and sharing of heads, as its traffic depends on them.

Units: tokens, numbers of a head, words. Query heads that share a KV head are rows of one problem; batch and KV heads
are problems of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memwall.errors import InputError

MOST_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What is computed. keys: None for as many as tokens; causal: token i sees keys 0 .. keys - tokens + i.

    backward: gradients of q, k and v, from these, the output, its gradient and the logarithms of the softmax's sums.
    """

    tokens: int
    head_size: int
    keys: int | None = None
    causal: bool = False
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    backward: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "head_size", "heads", "kv_heads", "batch"):
            if not 1 <= getattr(self, name) <= MOST_TOKENS:
                raise InputError(f"{name} {getattr(self, name)}: from 1 to {MOST_TOKENS:,}")
        if not 1 <= self.num_keys <= MOST_TOKENS:
            raise InputError(f"keys {self.keys}: from 1 to {MOST_TOKENS:,}")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads: take a divisor")
        if self.causal and self.num_keys < self.tokens:
            raise InputError(
                f"{self.num_keys} keys: under a causal mask there are no fewer than the {self.tokens} tokens"
            )

    @property
    def num_keys(self) -> int:
        """Keys of a problem."""
        return self.tokens if self.keys is None else self.keys

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of one problem: row r is of token r // group."""
        return self.tokens * self.group

    @property
    def problems(self) -> int:
        """Problems that share nothing."""
        return self.batch * self.kv_heads

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """Keys that rows see, int64."""
        if not self.causal:
            return np.full(rows.shape, self.num_keys, np.int64)
        return self.num_keys - self.tokens + 1 + rows.astype(np.int64) // self.group

    def first_row(self, keys: np.ndarray) -> np.ndarray:
        """The first row that sees a key, int64."""
        if not self.causal:
            return np.zeros(keys.shape, np.int64)
        return self.group * np.maximum(keys.astype(np.int64) - (self.num_keys - self.tokens), 0)

    @cached_property
    def scores(self) -> int:
        """Scores of one problem that count: rows times keys, less what the mask hides."""
        if not self.causal:
            return self.rows * self.num_keys
        return self.group * (self.tokens * self.num_keys - self.tokens * (self.tokens - 1) // 2)

    @property
    def compulsory(self) -> int:
        """Words of inputs and outputs of all problems, which any schedule moves: q, k, v and out, or q, k, v, the
        gradient of out and three gradients (the output itself and the softmax's sums could be made anew).
        """
        rows, keys = (3 * self.rows, 4 * self.num_keys) if self.backward else (2 * self.rows, 2 * self.num_keys)
        return self.problems * (rows + keys) * self.head_size

    @property
    def flop(self) -> int:
        """Operations of the products (a multiply and an add are two): two products, or five of the gradients."""
        return self.problems * self.scores * self.head_size * 2 * (5 if self.backward else 2)
