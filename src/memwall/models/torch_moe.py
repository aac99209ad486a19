"""Feed-forward parts of small models: one for all tokens, or experts of which a router gives each token a few.

*Source*: top-k gates: "Outrageously Large Neural Networks" (Noam Shazeer, 2017, arXiv 1701.06538); capacity and
balance: "GShard" (Dmitry Lepikhin, 2020, arXiv 2006.16668) and "Switch Transformers" (William Fedus, 2021, arXiv
2101.03961), section 2.2.
*Idea*: a token's output is the sum of its k likeliest experts', weighed by the router's probabilities, normed over the
k. The balance loss, E sum_e f_e P_e with f_e the share of choices that fell on expert e and P_e the router's mean
probability, is 1 when all experts get as much. In training an expert takes at most `capacity` times its fair share of
choices: the first choices of all tokens first, then the second ones; what is over is dropped, and counted.
*Units and shapes*: x [B, T, W]; `load` counts choices by expert, `dropped` those left out, since `reset`.
*Differs from the paper*: outside training nothing is dropped, so that a token's output does not depend on its batch.
*Cost*: E experts' parameters, k experts' operations.
*Holds when*: 1 <= k <= E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.torch_blocks import Feed, linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A gated feed of `size` inner numbers."""

    size: int

    def build(self, width: int) -> DenseFeed:
        return DenseFeed(self.size, width)


class DenseFeed(Feed):
    """down(silu(gate x) * up x)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_up, self.down = linear(width, 2 * size), linear(size, width)
        self.register_buffer("balance", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        result: Tensor = self.down(functional.silu(gate) * up)
        return result

    def flop(self) -> float:
        return 6.0 * self.down.weight.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """count experts of `size` inner numbers; `top` of them for each token."""

    count: int
    top: int
    size: int
    capacity: float = 1.25

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.count:
            raise InputError(f"top {self.top} of {self.count} experts: must be from 1 to their number")
        if not self.capacity > 0:
            raise InputError(f"capacity {self.capacity:g}: must be above 0")

    def build(self, width: int) -> ExpertFeed:
        return ExpertFeed(self, width)


class ExpertFeed(Feed):
    """See the module."""

    load: Tensor
    dropped: Tensor

    def __init__(self, spec: Experts, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.router = linear(width, spec.count)
        self.gate_up = nn.Parameter(torch.empty(spec.count, 2 * spec.size, width).normal_(std=width**-0.5))
        self.down = nn.Parameter(torch.empty(spec.count, width, spec.size).normal_(std=spec.size**-0.5))
        self.register_buffer("load", torch.zeros(spec.count, dtype=torch.long), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.long), persistent=False)
        self.balance = torch.zeros(())

    def reset(self) -> None:
        """Counting begins anew."""
        self.load.zero_()
        self.dropped.zero_()

    def forward(self, x: Tensor) -> Tensor:
        spec, rows = self.spec, x.flatten(0, -2)
        with torch.autocast(rows.device.type, enabled=False):  # choices hang on small differences
            likely = self.router(rows.float()).softmax(-1)
        weights, experts = likely.topk(spec.top, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        chosen = experts.t().flatten()  # first choices of all tokens before the second ones
        counts = torch.bincount(chosen, minlength=spec.count)
        self.balance = spec.count * (counts / len(chosen) * likely.mean(0)).sum()
        self.load += counts
        capacity = math.ceil(spec.capacity * len(chosen) / spec.count) if self.training else len(chosen)
        order = chosen.argsort(stable=True)
        flat, out = weights.t().flatten(), torch.zeros_like(rows)
        for expert, places in enumerate(order.split(counts.tolist())):
            kept = places[:capacity]
            self.dropped += len(places) - len(kept)
            if len(kept):
                tokens = kept % len(rows)
                gate, up = functional.linear(rows[tokens], self.gate_up[expert]).chunk(2, -1)
                made = functional.linear(functional.silu(gate) * up, self.down[expert])
                out = out.index_add(0, tokens, made * flat[kept, None])
        return out.view_as(x)

    def flop(self) -> float:
        return 2.0 * self.width * (self.spec.count + 3 * self.spec.top * self.spec.size)
