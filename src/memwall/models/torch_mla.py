"""Multi-head latent attention: all heads' keys and values are rebuilt from one small latent row a token.

*Source*: DeepSeek-V2 (DeepSeek-AI, 2024), arXiv 2405.04434, section 2.1.
*Idea*: c = x W_dkv, normed; keys k_h = c W_uk,h and values v_h = c W_uv,h. Positions cannot pass through W_uk, so
each key has a second part, turned, from x directly and shared by all heads. A step never rebuilds keys: q_h W_uk,h is
compared with c itself, and the heads' means of c are taken through W_uv,h afterwards.
*Units and shapes*: as `torch_blocks`; the cache holds rows [B, tokens, r + R]: c, then the turned key; float32.
*Differs from the paper*: queries are not compressed (as in DeepSeek-V2-Lite).
*Cost*: r + R numbers a token; a step reads all of them, and does h (2 r + R) multiply-adds a token.
*Holds when*: r + R is small beside 2 h D; else plain attention is as small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.torch_blocks import Mixer, Rows, attended, linear, norm_of, rotary, rotated


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """heads of head_dim numbers (and as many of values), a latent row of `rank`, a turned key of `turned_dim`."""

    heads: int
    head_dim: int
    rank: int
    turned_dim: int

    def __post_init__(self) -> None:
        if self.turned_dim < 2 or self.turned_dim % 2 or self.rank < 1:
            raise InputError(f"rank {self.rank}, turned part {self.turned_dim}: at least 1, and an even number from 2")

    def build(self, width: int) -> LatentAttention:
        return LatentAttention(self, width)

    def cached_values(self, context: int) -> int:
        return (self.rank + self.turned_dim) * context


class LatentAttention(Mixer):
    """See the module."""

    def __init__(self, spec: Latent, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        heads, size = spec.heads, spec.head_dim
        self.q_proj = linear(width, heads * (size + spec.turned_dim))
        self.down_proj = linear(width, spec.rank + spec.turned_dim)
        self.norm = nn.Parameter(torch.ones(spec.rank))
        self.key_up = nn.Parameter(torch.empty(heads, size, spec.rank).normal_(std=spec.rank**-0.5))
        self.value_up = nn.Parameter(torch.empty(heads, size, spec.rank).normal_(std=spec.rank**-0.5))
        self.o_proj = linear(heads * size, width)

    def cache(self, batch: int, capacity: int) -> Rows:
        return Rows(capacity, {"rows": (batch, self.spec.rank + self.spec.turned_dim)})

    def forward(self, x: Tensor) -> Tensor:
        return self._whole(x, None)

    def prefill(self, x: Tensor, cache: Rows) -> Tensor:
        return self._whole(x, cache)

    def _whole(self, x: Tensor, cache: Rows | None) -> Tensor:
        plain, turned, latents, key = self._parts(x, 0)
        if cache is not None:
            cache.append(rows=torch.cat([latents, key], -1))
        keys = torch.einsum("btr,hdr->bhtd", latents, self.key_up)
        values = torch.einsum("btr,hdr->bhtd", latents, self.value_up)
        shared = key[:, None].expand(-1, self.spec.heads, -1, -1)
        # values get zeros to the keys' size, which the product needs to run without a matrix of all scores
        mixed = functional.scaled_dot_product_attention(
            torch.cat([plain, turned], -1),
            torch.cat([keys, shared], -1),
            functional.pad(values, (0, self.spec.turned_dim)),
            is_causal=True,
        )
        return self._out(mixed[..., : self.spec.head_dim])

    def step(self, x: Tensor, cache: Rows) -> Tensor:
        spec = self.spec
        plain, turned, latents, key = self._parts(x, cache.length)
        (rows,) = cache.append(rows=torch.cat([latents, key], -1))
        asked = torch.cat([torch.einsum("bhd,hdr->bhr", plain[:, :, 0], self.key_up), turned[:, :, 0]], -1)
        scale, alike = 1 / math.sqrt(spec.head_dim + spec.turned_dim), rows[:, None]  # all heads see one key
        latent = attended(asked[:, None], alike, alike[..., : spec.rank], scale)[:, 0]
        mixed = torch.einsum("bhr,hdr->bhd", latent, self.value_up)
        return self._out(mixed[:, :, None])

    def _parts(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries' plain and turned parts [B, H, T, D] and [B, H, T, R], latents [B, T, r], shared key [B, T, R]."""
        spec = self.spec
        tables = rotary(torch.arange(start, start + x.shape[1]), spec.turned_dim)
        queries = self.q_proj(x).unflatten(-1, (spec.heads, -1)).transpose(1, 2)
        plain, turned = queries.split([spec.head_dim, spec.turned_dim], -1)
        latents, key = self.down_proj(x).split([spec.rank, spec.turned_dim], -1)
        return plain, rotated(turned, tables), norm_of(latents, self.norm), rotated(key, tables)

    def _out(self, mixed: Tensor) -> Tensor:
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return result

    def flop(self, context: int) -> float:
        spec = self.spec
        inner = spec.heads * spec.head_dim
        projected = self.width * (2 * inner + (spec.heads + 1) * spec.turned_dim + spec.rank) + 2 * inner * spec.rank
        return 2 * (projected + spec.heads * (2 * spec.rank + spec.turned_dim) * context)
