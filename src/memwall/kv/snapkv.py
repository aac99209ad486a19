"""SnapKV: after the prompt is read, each head keeps only the prompt tokens that its last queries look at.

Source: SnapKV: LLM Knows What You are Looking for Before Generation; Li et al., 2024 (NeurIPS), arXiv 2404.14469;
official code github.com/FasterDecoding/SnapKV.
Idea: which prompt tokens a head attends to while it answers shows already in the attention of the prompt's last w
queries. Their softmax over all tokens, summed, is each token's vote; votes are pooled over neighbours, so that a span
around a strong token stays whole; the C - w highest and the last w stay. What comes later is never dropped.
Units and shapes: T prompt tokens; keys and values [T, Hkv, D]; w, C and the pooling kernel in tokens.
Differs from the paper: votes are summed over the query heads that share a key head, and one set of rows is kept for
them (the official code repeats keys for every query head first, and loses what sharing saves); kept rows stay in the
order of tokens; later prompts of a conversation are kept in full. Selection goes layer by layer while the prompt is
read, so that one layer at a time holds its whole prompt, in the decoder's own buffers: the paper's peak is that of the
whole prompt's cache, this one's is that of the kept rows.
Cost: resident bytes are those of the inner store for C rows and what comes after, during the prompt besides
4 * (w * H * (D + 2) + 2 * C * Hkv * D); w * H * D * T multiply-adds a layer to select.
Holds when: the answer hangs on what the prompt's end asks for; going back into a pruned prompt means reading it anew.
Not with sliding windows shorter than the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kv import table
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.evict import EvictingCache, attention_votes, inner_of, pooled, predict_evicting
from memwall.kv.policy import AMOUNT, Policy

if TYPE_CHECKING:
    from memwall.memory import Arena

POOLS = ("avg", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapSettings:
    """share: of the prompt before the window that stays, or None; tokens: rows C kept at most, where share is None.

    window: last queries w that vote, whose own tokens stay; kernel: pooled neighbours, odd; pool: mean or maximum.
    """

    share: float | None = None
    tokens: int = 2048
    window: int = 32
    kernel: int = 5
    pool: str = "avg"

    @classmethod
    @lru_cache(maxsize=256)
    def from_policy(cls, policy: Policy) -> SnapSettings:
        """Settings of a policy string, checked."""
        own = Policy(policy.name, policy.settings)
        texts = policy.settings
        pool = texts.get("pool", "avg")
        numbers = own.numbers({AMOUNT: 1.0, "tokens": 2048, "window": 32, "kernel": 5}, words=("pool",))
        share, tokens, window, kernel = numbers[AMOUNT], *(int(numbers[n]) for n in ("tokens", "window", "kernel"))
        if pool not in POOLS:
            raise InputError(f"policy {own}: pool={pool!r}; must be one of {', '.join(POOLS)}")
        if AMOUNT in texts and "tokens" in texts:
            raise InputError(f"policy {own}: a share and tokens= say the same thing; give one")
        if not 0 < share <= 1:
            raise InputError(
                f"policy {own}: keeps {texts.get(AMOUNT)} of the prompt; must be above 0 and at most 1, such as 0.25"
            )
        if window < 1:
            raise InputError(f"policy {own}: window={window}; must be at least 1")
        if kernel % 2 == 0:
            raise InputError(f"policy {own}: kernel={kernel} has no middle; must be odd: try {kernel + 1}")
        if tokens <= window:
            raise InputError(
                f"policy {own}: tokens={tokens} holds no more than the window of {window}; try tokens={2 * window}, "
                "or a smaller window"
            )
        return cls(share=share if AMOUNT in texts else None, tokens=tokens, window=window, kernel=kernel, pool=pool)

    def kept(self, num_tokens: int) -> int:
        """Rows C that a head keeps of a prompt."""
        if self.share is None:
            return min(self.tokens, num_tokens)
        return min(int(self.share * max(num_tokens - self.window, 0)) + self.window, num_tokens)

    def __str__(self) -> str:
        default = SnapSettings()
        parts = [f"tokens={self.tokens}" if self.share is None else f"{self.share:g}"]
        for name in ("window", "kernel", "pool"):
            if getattr(self, name) != getattr(default, name):
                parts.append(f"{name}={getattr(self, name)}")
        return f"snapkv({','.join(parts)})"


@dataclass(frozen=True, slots=True)
class WindowVotes:
    """Scores by the pooled attention of the last queries, whose own tokens always stay."""

    settings: SnapSettings

    def window(self, num_tokens: int) -> int:
        return min(self.settings.window, num_tokens)

    def __call__(
        self, layer: int, keys: np.ndarray, queries: np.ndarray, stats: np.ndarray, scale: float
    ) -> np.ndarray:
        past = len(keys) - len(queries)
        scores = np.full((keys.shape[1], len(keys)), np.inf, np.float32)
        votes = attention_votes(keys, queries, stats, scale, past)
        scores[:, :past] = pooled(votes, self.settings.kernel, self.settings.pool)
        return scores


class SnapCache(EvictingCache):
    """See the module's text."""

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        self.settings = SnapSettings.from_policy(policy)
        super().__init__(
            policy, shape, arena, capacity_tokens, model, scorer=WindowVotes(self.settings), budget=self.settings.kept
        )

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner with `num_tokens` taken in, the first `prefill_tokens` of them as the prompt."""
        settings = SnapSettings.from_policy(policy)
        return predict_evicting(
            policy, shape, (num_tokens, prefill_tokens, capacity_tokens), settings.kept, settings.window
        )

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads after a prompt of `num_tokens`."""
        kept = SnapSettings.from_policy(policy).kept(num_tokens)
        return table.read_bytes(inner_of(policy), shape, kept)

    @property
    def policy(self) -> str:
        return f"{self.settings}+{self.inner.policy}"
