"""Mamba-2's mixer as a block: a state that decays and takes in each token as the token itself says, of fixed size.

*Source*: "Transformers are SSMs" (Tri Dao, 2024), arXiv 2405.21060, sections 6 and 7.
*Idea*: from x come z, u, B, C and a time step dt for each head; (u, B, C) pass a short causal convolution; the state
h = exp(-dt A) h + dt u B^T is read as y = h C + D u; y, gated by z and normed, goes out. A sequence is worked in chunks
(`torch_ssm.chunked_scan`), a step by the recurrence itself.
*Units and shapes*: as `torch_blocks`; the state is [B, H, P, N] and the convolution's last taps [B, taps - 1,
H P + 2 N], float32, at any length.
*Differs from the paper*: one group of B and C; the layer has a feed of its own behind it, as all variants here.
*Cost*: H P N + (taps - 1)(H P + 2 N) numbers a sequence, at any context; a step reads all of them.
*Holds when*: what is to be recalled fits that state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.torch_blocks import Cache, Mixer, linear, norm_of
from memwall.models.torch_ssm import chunked_scan

TAPS, CHUNK_TOKENS = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba:
    """heads of head_dim channels, each with a state of `state` numbers."""

    heads: int
    head_dim: int
    state: int = 16

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.state) < 1:
            raise InputError(f"{self.heads} heads of {self.head_dim} with {self.state} states: must be at least 1 each")

    def build(self, width: int) -> MambaMixer:
        return MambaMixer(self, width)

    @property
    def conv_size(self) -> int:
        """Channels that pass the convolution."""
        return self.heads * self.head_dim + 2 * self.state

    def cached_values(self, context: int) -> int:
        return self.heads * self.head_dim * self.state + (TAPS - 1) * self.conv_size if context else 0


class MambaCache(Cache):
    """state [B, H, P, N]; taps [B, TAPS - 1, channels]: the last inputs of the convolution."""

    def __init__(self, spec: Mamba, batch: int) -> None:
        self.state = torch.zeros(batch, spec.heads, spec.head_dim, spec.state)
        self.taps = torch.zeros(batch, TAPS - 1, spec.conv_size)

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.taps.nbytes

    def read_bytes(self) -> int:
        return self.nbytes

    def fill(self, num_tokens: int) -> None:
        self.length += num_tokens
        self.state.copy_(torch.randn(self.state.shape))
        self.taps.copy_(torch.randn(self.taps.shape))


class MambaMixer(Mixer):
    """See the module."""

    def __init__(self, spec: Mamba, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        inner = spec.heads * spec.head_dim
        self.in_proj = linear(width, inner + spec.conv_size + spec.heads)
        self.conv = nn.Conv1d(spec.conv_size, spec.conv_size, TAPS, groups=spec.conv_size)
        # the usual start: decays from 1 to 16, time steps from 0.001 to 0.1
        self.log_decay = nn.Parameter(torch.empty(spec.heads).uniform_(1, 16).log())
        steps = torch.empty(spec.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.skip = nn.Parameter(torch.ones(spec.heads))
        self.norm = nn.Parameter(torch.ones(inner))
        self.out_proj = linear(inner, width)

    def cache(self, batch: int, capacity: int) -> MambaCache:
        return MambaCache(self.spec, batch)

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x, self.cache(len(x), x.shape[1]))

    def prefill(self, x: Tensor, cache: MambaCache) -> Tensor:
        z, u, b, c, dt, taps = self._parts(x, cache.taps)
        decay = -self.log_decay.exp()
        with torch.autocast(x.device.type, enabled=False):  # sums over a whole text
            y = chunked_scan(u, dt, decay, b[:, :, None], c[:, :, None], CHUNK_TOKENS)
            # what is left of each token at the end
            left = (dt * decay).flip(1).cumsum(1).flip(1) - dt * decay
            cache.state = torch.einsum("bth,bthp,btn->bhpn", left.exp() * dt, u, b)
        cache.taps, cache.length = taps, cache.length + x.shape[1]
        return self._out(y + self.skip[:, None] * u, z)

    def step(self, x: Tensor, cache: MambaCache) -> Tensor:
        z, u, b, c, dt, taps = self._parts(x, cache.taps)
        kept = (dt[:, 0] * -self.log_decay.exp()).exp()[..., None, None]
        cache.state = kept * cache.state + torch.einsum("bh,bhp,bn->bhpn", dt[:, 0], u[:, 0], b[:, 0])
        cache.taps, cache.length = taps, cache.length + 1
        y = torch.einsum("bhpn,bn->bhp", cache.state, c[:, 0])[:, None]
        return self._out(y + self.skip[:, None] * u, z)

    def _parts(self, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z [B, T, H P], u [B, T, H, P], B and C [B, T, N], dt [B, T, H], and the inputs that the next token needs."""
        spec = self.spec
        inner = spec.heads * spec.head_dim
        z, into, dt = self.in_proj(x).split([inner, spec.conv_size, spec.heads], -1)
        into = torch.cat([taps, into], 1)
        mixed = functional.silu(self.conv(into.transpose(1, 2)).float()).transpose(1, 2)
        u, b, c = mixed.split([inner, spec.state, spec.state], -1)
        steps = functional.softplus(dt + self.dt_bias)
        return z, u.unflatten(-1, (spec.heads, -1)), b, c, steps, into[:, -(TAPS - 1) :]

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        result: Tensor = self.out_proj(norm_of(y.flatten(-2) * functional.silu(z), self.norm))
        return result

    def flop(self, context: int) -> float:
        spec = self.spec
        inner = spec.heads * spec.head_dim
        projected = self.width * (2 * inner + spec.conv_size + spec.heads)
        return 2.0 * (projected + TAPS * spec.conv_size + 3 * inner * spec.state)
