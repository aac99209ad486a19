"""What a decoder asks of a KV cache.

The caches themselves live in `memwall.kv`, which builds on this room; the decoder only needs these five members.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class DecoderCache(Protocol):
    """Keys and values of the tokens seen so far, in a form of the cache's own choosing."""

    @property
    def length(self) -> int:
        """Tokens held (the position of the next one)."""

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """Add new tokens: k (rotated) and v [T, kv_heads, head_dim] float32, positions [T] int64."""

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Causal attention of q [T, heads, head_dim] over everything held, into out of the same shape."""

    def settle(self, layer: int) -> None:
        """The layer's attention over its newest tokens is done: they may be compressed now."""

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""
