"""RWKV's time mixing: a mean of all past values, weighed by their keys and by how long ago they were, as a recurrence.

*Source*: "RWKV: Reinventing RNNs for the Transformer Era" (Bo Peng, 2023), arXiv 2305.13048, section 3 (RWKV-4).
*Idea*: r, k, v are projections of the token mixed with the one before it (eq. 11 to 13). Each channel holds two sums,
a = sum e^(-(t-1-i) w + k_i) v_i and b, the same without v; the output is (a + e^(u + k_t) v_t) / (b + e^(u + k_t)),
eq. 16, behind a gate sigmoid(r). A sequence is worked in chunks: inside one by a table of weights, between chunks by
the sums.
*Units and shapes*: as `torch_blocks`; the state is three numbers a channel (both sums and the exponent that they are
scaled by) and the last token's x, float32, at any length.
*Differs from the paper*: its channel mixing is replaced by the feed that all variants here have.
*Cost*: 4 W numbers a sequence, at any context; a step reads all of them.
*Holds when*: decays stay above zero, which the parameter's form sees to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memwall.errors import InputError
from memwall.models.torch_blocks import Cache, Mixer, linear

CHUNK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rwkv:
    """size: channels of the recurrence."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"{self.size} channels: must be at least 1")

    def build(self, width: int) -> RwkvMixer:
        return RwkvMixer(self, width)

    def cached_values(self, context: int) -> int:
        """Without the last token's x, whose width the spec does not know."""
        return 3 * self.size if context else 0


class RwkvCache(Cache):
    """sums: [3, B, C]: a, b, and the exponent that both are divided by; last: [B, 1, W]."""

    def __init__(self, batch: int, size: int, width: int) -> None:
        self.sums = torch.zeros(3, batch, size)
        self.sums[2] = -math.inf
        self.last = torch.zeros(batch, 1, width)

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + self.last.nbytes

    def read_bytes(self) -> int:
        return self.nbytes

    def fill(self, num_tokens: int) -> None:
        self.length += num_tokens
        self.sums.copy_(torch.rand(self.sums.shape) + 0.5)
        self.last.copy_(torch.randn(self.last.shape))


class RwkvMixer(Mixer):
    """See the module."""

    def __init__(self, spec: Rwkv, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.k_proj, self.v_proj, self.r_proj = (linear(width, spec.size) for _ in range(3))
        self.o_proj = linear(spec.size, width)
        self.mix = nn.Parameter(torch.full((3, width), 0.5))
        # e^log_decay spans some 0.01 to 3 a token, so that channels forget at different speeds
        self.log_decay = nn.Parameter(torch.linspace(-4.5, 1.0, spec.size))
        self.bonus = nn.Parameter(torch.full((spec.size,), 0.3))

    def cache(self, batch: int, capacity: int) -> RwkvCache:
        return RwkvCache(batch, self.spec.size, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x, self.cache(len(x), x.shape[1]))

    def prefill(self, x: Tensor, cache: RwkvCache) -> Tensor:
        before = torch.cat([cache.last, x[:, :-1]], 1)
        r, k, v = self._parts(x, before)
        sums, outs = tuple(cache.sums), []
        for start in range(0, x.shape[1], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            out, sums = self._chunk(k[:, part], v[:, part], sums)
            outs.append(out)
        cache.sums, cache.last = torch.stack(sums), x[:, -1:]
        cache.length += x.shape[1]
        result: Tensor = self.o_proj(r.sigmoid() * torch.cat(outs, 1))
        return result

    def step(self, x: Tensor, cache: RwkvCache) -> Tensor:
        return self.prefill(x, cache)

    def _parts(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed = (share * x + (1 - share) * before for share in self.mix)
        r, k, v = (
            project(one).float() for project, one in zip((self.r_proj, self.k_proj, self.v_proj), mixed, strict=True)
        )
        return r, k, v

    def _chunk(self, k: Tensor, v: Tensor, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs [B, T, C] of a chunk and the sums after it. All weights are divided by e^top, the largest exponent
        of each channel, which cancels in the quotient.
        """
        decay, (a, b, scale) = self.log_decay.exp(), sums
        count = k.shape[1]
        at = torch.arange(count)
        # exponents of past tokens at each token, of the token itself, and of what was before the chunk
        passed = (at[:, None] - 1 - at[None, :])[None, :, :, None]
        past = (k[:, None] - passed * decay).masked_fill(passed < 0, -math.inf)
        own, old = k + self.bonus, scale[:, None] - at[:, None] * decay
        top = torch.maximum(torch.maximum(past.amax(2), own), old).detach()
        weights, mine, older = (past - top[:, :, None]).exp(), (own - top).exp(), (old - top).exp()
        above = (weights * v[:, None]).sum(2) + mine * v + older * a[:, None]
        below = weights.sum(2) + mine + older * b[:, None]
        # the sums after the chunk: its tokens have aged, the old sums by the whole chunk
        aged, rest = k - (count - 1 - at)[:, None] * decay, scale - count * decay
        new = torch.maximum(aged.amax(1), rest).detach()
        weight, old_weight = (aged - new[:, None]).exp(), (rest - new).exp()
        return above / below, ((weight * v).sum(1) + old_weight * a, weight.sum(1) + old_weight * b, new)

    def flop(self, context: int) -> float:
        return 2.0 * 4 * self.width * self.spec.size
