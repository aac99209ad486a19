"""Multi-head, grouped-query and multi-query attention, in one block: query heads share key-value heads.

*Source*: MQA: "Fast Transformer Decoding" (Noam Shazeer, 2019, arXiv 1911.02150); GQA: "GQA: Training Generalized
Multi-Query Transformer Models" (Joshua Ainslie, 2023, arXiv 2305.13245). Relative positions: T5's buckets, "Exploring
the Limits of Transfer Learning" (Colin Raffel, 2020, arXiv 1910.10683), section 2.1.
*Idea*: h query heads, g key-value heads, h / g queries to each: g = h is multi-head, g = 1 multi-query.
*Units and shapes*: as `torch_blocks`; the cache holds keys (turned) and values, [B, g, tokens, D] float32 each.
*Differs from the paper*: nothing known.
*Cost*: 2 g D numbers a token; a step reads all of them.
*Holds when*: h is a multiple of g. Relative positions are counted in 32 buckets up to 128 tokens apart, beyond which
all distances are one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.torch_blocks import Mixer, Rows, attended, linear, rotary, rotated, scores_of

BUCKETS, FARTHEST = 32, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """heads: of queries. kv_heads: of keys and values. turned: rotary positions. relative: a bias by distance."""

    heads: int
    kv_heads: int
    head_dim: int
    turned: bool = True
    relative: bool = False

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise InputError(f"heads of {self.head_dim} numbers cannot be turned in pairs")

    def build(self, width: int) -> GroupedAttention:
        return GroupedAttention(self, width)

    def cached_values(self, context: int) -> int:
        return 2 * self.kv_heads * self.head_dim * context


class GroupedAttention(Mixer):
    """See the module."""

    def __init__(self, spec: Grouped, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.q_proj = linear(width, spec.heads * spec.head_dim)
        self.k_proj = linear(width, spec.kv_heads * spec.head_dim)
        self.v_proj = linear(width, spec.kv_heads * spec.head_dim)
        self.o_proj = linear(spec.heads * spec.head_dim, width)
        self.bias = nn.Embedding(BUCKETS, spec.heads) if spec.relative else None

    def cache(self, batch: int, capacity: int) -> Rows:
        shape = (batch, self.spec.kv_heads, self.spec.head_dim)
        return Rows(capacity, {"keys": shape, "values": shape})

    def forward(self, x: Tensor) -> Tensor:
        return self._whole(x, None)

    def prefill(self, x: Tensor, cache: Rows) -> Tensor:
        return self._whole(x, cache)

    def _whole(self, x: Tensor, cache: Rows | None) -> Tensor:
        q, k, v = self._parts(x, 0)
        if cache is not None:
            cache.append(keys=k, values=v)
        repeats = self.spec.heads // self.spec.kv_heads
        k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
        mask = None
        if self.bias is not None:
            places = torch.arange(x.shape[1])
            future = places[None, :] > places[:, None]
            mask = self._biases(places[:, None] - places[None, :]).masked_fill(future, -math.inf)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self._out(mixed)

    def step(self, x: Tensor, cache: Rows) -> Tensor:
        spec = self.spec
        q, k, v = self._parts(x, cache.length)
        keys, values = cache.append(keys=k, values=v)
        q = q.reshape(len(x), spec.kv_heads, -1, spec.head_dim)  # queries that share a head, together
        scale = 1 / math.sqrt(spec.head_dim)
        if self.bias is None:
            mixed = attended(q, keys, values, scale)
        else:
            distances = cache.length - 1 - torch.arange(cache.length)
            biases = self._biases(distances[None]).reshape(1, spec.kv_heads, -1, cache.length)
            mixed = (scale * scores_of(q, keys) + biases).softmax(-1) @ values
        return self._out(mixed.reshape(len(x), spec.heads, 1, spec.head_dim))

    def _parts(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.spec.turned:
            tables = rotary(torch.arange(start, start + x.shape[1]), self.spec.head_dim)
            q, k = rotated(q, tables), rotated(k, tables)
        return q, k, v

    def _out(self, mixed: Tensor) -> Tensor:
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return result

    def _biases(self, distances: Tensor) -> Tensor:
        """[H, ...] for distances into the past."""
        assert self.bias is not None
        result: Tensor = self.bias(buckets(distances)).movedim(-1, 0)
        return result

    def flop(self, context: int) -> float:
        spec = self.spec
        projected = 2 * self.width * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
        return projected + 2 * 2 * spec.heads * spec.head_dim * context


def buckets(distances: Tensor) -> Tensor:
    """T5's buckets of causal distances: half of them exact, the others logarithmic up to FARTHEST."""
    exact = BUCKETS // 2
    near = distances.clamp(min=0)
    far = exact + (near.float().clamp(min=1) / exact).log() / math.log(FARTHEST / exact) * (BUCKETS - exact)
    return torch.where(near < exact, near, far.long().clamp(max=BUCKETS - 1))
