"""What a decoder asks of a KV cache.

The caches themselves live in `memwall.kv`, which builds on this room; the decoder only needs these members.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np

from memwall.kernels import Program


class StreamedFeedForward(Protocol):
    """The feed-forwards of a model whose neurons are not among its weights (`models.neurons`)."""

    def run(self, layer: int, x: np.ndarray, residual: np.ndarray) -> None:
        """residual [T, H] += the layer's feed-forward of x [T, H]; both float32."""

    def release(self) -> None:
        """Gives back what it holds."""


class DecoderCache(Protocol):
    """Keys and values of the tokens seen so far, in a form of the cache's own choosing."""

    takes_inputs: ClassVar[bool]
    records: ClassVar[bool]
    """Whether its part of a token's step can be recorded (`RecordedCache`)."""

    @property
    def length(self) -> int:
        """Tokens taken in (the place of the next one in the sequence)."""

    @property
    def next_position(self) -> int:
        """The rotary position of the next token."""

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        """The layer's normed inputs x [n, d] of new tokens; called before `append` where `takes_inputs` is set."""

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """Add new tokens: k (rotated) and v [T, kv_heads, head_dim] float32, positions [T] int64."""

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Causal attention of q [T, heads, head_dim] over everything held, into out of the same shape."""

    def settle(self, layer: int) -> None:
        """The layer's attention over its newest tokens is done: they may be compressed now."""

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""


class RecordedCache(DecoderCache, Protocol):
    """One whose part of a step is kernel calls alone, so that all layers of a token can run without Python between."""

    def record(
        self, program: Program, layer: int, k: np.ndarray, v: np.ndarray, q: np.ndarray, out: np.ndarray
    ) -> None:
        """Adds to a program what `append` and `attend` do for one token: k, v, q, out as there, T being 1."""

    def begin_recorded(self, positions: np.ndarray) -> None:
        """The next run of what was recorded takes in the token at positions [1]: makes room for it in all layers."""

    def end_recorded(self) -> None:
        """That run is over: the token is held."""


class SelectedCache(DecoderCache, Protocol):
    """One that has rows of all tokens already, of which chosen ones are computed again."""

    def staying(self, layer: int) -> np.ndarray | None:
        """Indices of the tokens, of those that ran through the layer, that run through the next; None for all."""
