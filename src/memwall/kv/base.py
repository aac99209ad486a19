"""The KV-cache seam: one sequence's cache, what it must answer, and the shape it is built for.

The decoder goes layer by layer. In each layer it appends the keys (after rotation) and values of all new tokens once,
attends in one or more blocks of query rows, and settles: only then may the cache compress, so that new tokens always
attend exactly.

Units: `length` and capacities in tokens; T new tokens, H query heads, Hkv key-value heads, D numbers a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from memwall.memory import Arena


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a cache must know of a model.

    windows: each layer's sliding window in tokens, None where it sees everything.
    scale: what q . k is multiplied with, one over the root of `head_dim` unless given.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise InputError(f"{len(self.windows)} sliding windows for {self.num_layers} layers")

    @property
    def row_values(self) -> int:
        """Numbers in one token's keys of one layer (its values are as many)."""
        return self.num_kv_heads * self.head_dim

    @property
    def logit_scale(self) -> float:
        """What q . k is multiplied with."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def window(self, layer: int) -> int | None:
        """The layer's sliding window in tokens, or None."""
        return self.windows[layer] if self.windows is not None else None


class KVCache(ABC):
    """The keys and values of one sequence, in the form that the policy gives them."""

    codes_prompt: ClassVar[bool] = False
    """Whether settling codes a prompt's tokens, so that a prompt must come in one segment to attend exactly."""

    def __init__(self, shape: CacheShape, arena: Arena, capacity_tokens: int) -> None:
        if capacity_tokens < 1:
            raise InputError(f"a cache for {capacity_tokens} tokens: must be at least 1")
        self.shape = shape
        self.arena = arena
        self.capacity_tokens = capacity_tokens

    @property
    @abstractmethod
    def policy(self) -> str:
        """Canonical policy string; `kv.build` with it gives an equal cache."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens that every layer holds."""

    @abstractmethod
    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """Takes k, v [T, Hkv, D] float32 of the tokens at `positions` [T], which follow what the layer holds.

        BudgetExceeded, with the cache as it was, when the arena has no room.
        """

    @abstractmethod
    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Attention of q [T, H, D] float32 at consecutive `positions` over the layer's tokens, into out [T, H, D]."""

    @abstractmethod
    def settle(self, layer: int) -> None:
        """Called once after a layer's attention: compresses what may be compressed now."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens and gives whole pages back."""

    @abstractmethod
    def fork(self) -> KVCache:
        """A cache of its own with the same tokens, as another branch of a search needs. Between forward passes only."""

    @abstractmethod
    def release(self) -> None:
        """Gives all memory back; the cache is of no more use."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held now, as the ledger counts them."""

    @property
    def bits_per_value(self) -> float:
        """Bits held per number of the cached keys and values, everything counted."""
        numbers = 2 * self.shape.num_layers * self.shape.row_values * self.length
        return 8 * self.nbytes / numbers if numbers else 0.0

    def _check_append(self, held: int, num_new: int, positions: np.ndarray) -> None:
        if len(positions) != num_new or (num_new and (positions[0] != held or positions[-1] != held + num_new - 1)):
            raise ValueError(f"the next position is {held}, not {positions[:1]} for {num_new} new tokens")
        if held + num_new > self.capacity_tokens:
            raise DoesNotFit(
                f"the context holds {self.capacity_tokens:,} tokens, {held:,} are used, {num_new:,} more do not fit; "
                f"ask for a longer one (--context {held + num_new})"
            )

    def _check_truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
