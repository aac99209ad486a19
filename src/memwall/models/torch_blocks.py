"""What the blocks of small torch models share: the seams, rotary tables, rows of a cache, normal starts.

A *mixer* (attention of some kind, a recurrence) and a *feed* (dense, experts) are each described by a frozen dataclass
that builds the module. A mixer's module has three ways to run, which must agree: `forward` over a whole sequence, for
training; `prefill`, the same that also fills an empty cache; `step` with one token more.

Shapes: x [B, T, W]; a step's x [B, 1, W]; queries and keys [B, heads, T, D].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from memwall.errors import InputError
from memwall.kernels import attention

ROTARY_BASE = 10000.0


class Cache(ABC):
    """What one layer remembers. length: tokens taken in."""

    length: int = 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the tokens taken in so far need, of all sequences."""

    @abstractmethod
    def read_bytes(self) -> int:
        """Bytes that the next step reads of them."""

    @abstractmethod
    def fill(self, num_tokens: int) -> None:
        """Takes in this many random tokens, where only time and bytes are to be measured."""


class Rows(Cache):
    """Tensors that grow by one row a token: name -> [B, ..., capacity, D], allocated once and touched as they fill."""

    def __init__(self, capacity: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """shapes: name -> (B, ..., D)."""
        self.capacity = capacity
        self.held = {name: torch.empty(*shape[:-1], capacity, shape[-1]) for name, shape in shapes.items()}

    def append(self, **rows: Tensor) -> list[Tensor]:
        """Puts new rows [B, ..., T, D] behind the old ones; gives all of them, in the order of the names."""
        count = next(iter(rows.values())).shape[-2]
        stop = self.length + count
        if stop > self.capacity:
            raise InputError(f"the cache holds {self.capacity} tokens; {stop} are wanted")
        for name, row in rows.items():
            self.held[name][..., self.length : stop, :] = row
        self.length = stop
        return [self.held[name][..., :stop, :] for name in rows]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes // self.capacity * self.length for tensor in self.held.values())

    def read_bytes(self) -> int:
        return self.nbytes

    def fill(self, num_tokens: int) -> None:
        rows = {name: torch.randn(*t.shape[:-2], num_tokens, t.shape[-1]) for name, t in self.held.items()}
        self.append(**rows)


class Mixer(nn.Module, ABC):
    """A layer's exchange between tokens."""

    @abstractmethod
    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty one."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] of a whole sequence."""

    @abstractmethod
    def prefill(self, x: Tensor, cache: Any) -> Tensor:
        """`forward`, and `cache` (empty before) holds the sequence afterwards."""

    @abstractmethod
    def step(self, x: Tensor, cache: Any) -> Tensor:
        """[B, 1, W] of the token after the cache's."""

    @abstractmethod
    def flop(self, context: int) -> float:
        """Of one token with `context` tokens to see, itself included: two for each multiply-add of a product."""


class MixerSpec(Protocol):
    """Describes a mixer; a frozen dataclass. `cached_values(context)`: numbers that a sequence of it keeps."""

    def build(self, width: int) -> Mixer: ...

    def cached_values(self, context: int) -> int: ...


class Feed(nn.Module, ABC):
    """A layer's feed-forward part. `balance` is its auxiliary loss of the last training pass, 0 where it has none."""

    balance: Tensor

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def flop(self) -> float:
        """Of one token."""


class FeedSpec(Protocol):
    """Describes a feed; a frozen dataclass."""

    def build(self, width: int) -> Feed: ...


def described(spec: Any) -> dict[str, Any]:
    """A spec as records hold it, its kind first."""
    return {"kind": type(spec).__name__.lower(), **asdict(spec)}


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def rotary(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, dim / 2]."""
    rates = ROTARY_BASE ** (-torch.arange(0, dim, 2).float() / dim)
    angles = positions.float()[:, None] * rates
    return angles.cos(), angles.sin()


def rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., T, D] turned by its position; halves are pairs."""
    cos, sin = tables
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def scores_of(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [..., n, D] by keys [..., T, D] -> [..., n, T], for few queries and many keys: read row by row, this
    order takes little more than half the time of the other.
    """
    return (keys @ queries.transpose(-1, -2)).transpose(-1, -2)


def attended(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One token's attention: queries [B, G, n, D] over keys [B, G, T, D] and values [B, G, T, V] -> [B, G, n, V].

    Without gradients it is the compiled one, which reads a key once for all n queries and shares the tokens out among
    all threads; torch's product of few rows with many takes one of them.
    """
    if torch.is_grad_enabled():
        return (scale * scores_of(queries, keys)).softmax(-1) @ values
    out = torch.empty(*queries.shape[:-1], values.shape[-1])
    for batch, group in np.ndindex(*keys.shape[:2]):
        q, k, v, to = (each[batch, group].numpy() for each in (queries.contiguous(), keys, values, out))
        attention.attend_float(
            q[None], _one_head(k), _one_head(v), scale=scale, first_position=len(k) - 1, out=to[None]
        )  # fmt: skip
    return out


def _one_head(x: np.ndarray) -> np.ndarray:
    """Rows [T, D], which may lie apart, as [T, 1, D]."""
    return np.lib.stride_tricks.as_strided(x, (len(x), 1, x.shape[1]), (x.strides[0], x[0].nbytes, x.itemsize))


def norm_of(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the last axis, in float32."""
    x = x.float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight
