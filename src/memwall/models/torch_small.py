"""A small language model out of any mixer and any feed, to compare architectures on equal terms.

Layers are x + mixer(norm x), then x + feed(norm x), with a tied head. Positions: `rotary` is the mixer's own;
sinusoidal ("Attention Is All You Need", Ashish Vaswani, 2017, arXiv 1706.03762, section 3.5) and learned ones are added
to the embedding; `relative` is a bias in the mixer; `none` adds nothing.

Shapes: tokens [B, T]; logits [B, T, V].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.torch_blocks import Cache, Feed, FeedSpec, Mixer, MixerSpec, described, norm_of
from memwall.models.torch_moe import Dense, ExpertFeed

POSITIONS = ("rotary", "sinusoidal", "learned", "relative", "none")
BALANCE_WEIGHT = 0.01
"""Of each layer's balance loss (Switch Transformers, section 2.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallConfig:
    """width: of the residual; most_tokens: the longest text that learned positions are made for."""

    mixer: MixerSpec
    feed: FeedSpec
    width: int = 128
    num_layers: int = 6
    vocab_size: int = 256
    positions: str = "rotary"
    most_tokens: int = 512

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise InputError(f"positions {self.positions!r}: must be one of {', '.join(POSITIONS)}")

    def to_dict(self) -> dict[str, Any]:
        """As records hold it."""
        own = {name: getattr(self, name) for name in ("width", "num_layers", "vocab_size", "positions", "most_tokens")}
        return {"mixer": described(self.mixer), "feed": described(self.feed), **own}


class SmallLayer(nn.Module):
    """Mixer and feed around the residual."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.mixer: Mixer = config.mixer.build(config.width)
        self.feed: Feed = config.feed.build(config.width)
        self.mixer_norm, self.feed_norm = (nn.Parameter(torch.ones(config.width)) for _ in range(2))

    def forward(self, x: Tensor, cache: Cache | None, stepping: bool) -> Tensor:
        normed = norm_of(x, self.mixer_norm)
        if cache is None:
            mixed = self.mixer(normed)
        else:
            mixed = self.mixer.step(normed, cache) if stepping else self.mixer.prefill(normed, cache)
        x = x + mixed
        fed: Tensor = x + self.feed(norm_of(x, self.feed_norm))
        return fed


class SmallLm(nn.Module):
    """See the module. seed: of the first parameters."""

    def __init__(self, config: SmallConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(config.vocab_size, config.width)
            nn.init.normal_(self.embed.weight, std=config.width**-0.5)
            self.layers = nn.ModuleList(SmallLayer(config) for _ in range(config.num_layers))
            self.norm = nn.Parameter(torch.ones(config.width))
            learned = config.positions == "learned"
            self.places = nn.Embedding(config.most_tokens, config.width) if learned else None
            if self.places is not None:
                nn.init.normal_(self.places.weight, std=0.02)

    @property
    def blocks(self) -> list[SmallLayer]:
        """The layers."""
        return cast("list[SmallLayer]", list(self.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of whole sequences."""
        return self._run(tokens, None, stepping=False)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean loss in nats of tokens [B, T + 1] after the first, and the balance loss of experts."""
        logits = self(tokens[:, :-1])
        lost = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return lost + BALANCE_WEIGHT * torch.stack([layer.feed.balance for layer in self.blocks]).sum()

    def caches(self, batch: int, capacity: int) -> list[Cache]:
        """Empty ones, a layer each."""
        return [layer.mixer.cache(batch, capacity) for layer in self.blocks]

    def prefill(self, tokens: Tensor, caches: list[Cache]) -> Tensor:
        """Logits of a prompt, which the caches hold afterwards."""
        return self._run(tokens, caches, stepping=False)

    def step(self, tokens: Tensor, caches: list[Cache]) -> Tensor:
        """Logits [B, 1, V] after tokens [B, 1]."""
        return self._run(tokens, caches, stepping=True)

    def _run(self, tokens: Tensor, caches: list[Cache] | None, *, stepping: bool) -> Tensor:
        start = caches[0].length if caches else 0
        x: Tensor = self.embed(tokens) * math.sqrt(self.config.width)
        x = x + self._places(start, tokens.shape[1])
        for number, layer in enumerate(self.blocks):
            x = layer(x, caches[number] if caches else None, stepping)
        return functional.linear(norm_of(x, self.norm), self.embed.weight)

    def _places(self, start: int, count: int) -> Tensor:
        """What positions add to the embedding, [count, W] or a zero."""
        if self.places is not None:
            if start + count > self.config.most_tokens:
                raise InputError(f"learned positions end at {self.config.most_tokens}; {start + count} are wanted")
            learned: Tensor = self.places(torch.arange(start, start + count))
            return learned
        if self.config.positions == "sinusoidal":
            return sinusoids(torch.arange(start, start + count), self.config.width)
        return torch.zeros(())

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active(self) -> int:
        """Parameters that work on a token: experts that are not chosen do not."""
        idle = 0
        for layer in self.blocks:
            feed = layer.feed
            if isinstance(feed, ExpertFeed):
                per_expert = (feed.gate_up.numel() + feed.down.numel()) // feed.spec.count
                idle += per_expert * (feed.spec.count - feed.spec.top)
        return self.num_parameters - idle

    def flop(self, context: int) -> float:
        """Operations of one token's forward pass with `context` tokens to see, itself included."""
        inside = sum(layer.mixer.flop(context) + layer.feed.flop() for layer in self.blocks)
        return inside + 2.0 * self.embed.weight.numel()


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """[T, W]: sines and cosines of falling frequencies."""
    rates = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angles = positions.float()[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[:, :width]


def matched_feed(config: SmallConfig, num_parameters: int) -> int:
    """The size of a dense feed with which the model comes nearest to `num_parameters`; InputError where none does."""
    with torch.device("meta"):
        rest = SmallLm(replace(config, feed=Dense(size=1))).num_parameters - 3 * config.width * config.num_layers
    size = round((num_parameters - rest) / (3 * config.width * config.num_layers))
    if size < 1:
        raise InputError(f"{num_parameters:,} parameters are too few: {rest:,} are outside the feed")
    return size
