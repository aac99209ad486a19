"""Cache-Craft: keys and values of a text chunk, made once, serve wherever the chunk comes up again in a prompt.

Source: "Cache-Craft: Managing Chunk-Caches for Efficient Retrieval-Augmented Generation", 2025 (SIGMOD 2025), arXiv
2502.15734; no official code. Scores, token choice, variants, early stop and preload depth are here; `kv.chunk_store`
keeps the variants on their tiers and `kv.chunk_prefill` runs only the chosen tokens through the layers.
Idea: most tokens of a chunk look at their own chunk. While a chunk is computed, the attention that each of its tokens
pays to earlier chunks is summed up; later this says how much a new context can change the chunk (CFO) and which tokens
it changes (those that looked outside most). Only these are computed again, on top of the kept rest.
Units and shapes: chunks are named by the hash of their tokens; `inter` [predecessors] and `intra` are sums of attention
over token pairs, averaged over heads and layers; `token_inter` [T] is summed over predecessors and layers; CFO is a
share of the chunk's tokens.
Differs from the paper: beta counts what a chunk looked at and has lost. A chunk kept from the beginning of a prompt has
lost nothing anywhere, though it will see much that is new; so the share of its new context that it knew bounds beta.
Measured on the demo model over 100 pairs of contexts (WikiText, November 2026), the rank correlation of CFO with the
true deviation is 0.95 so and 0.79 without. Attention is averaged over heads (the paper does not say how they are
joined). The prompt's very first token is no context: it draws attention from everywhere, whatever it says. How much a
use is worth (1 over CFO, at most 20, halved every 32 requests), when a chunk counts as focused, and what alpha is
fitted to (divergence of text, not F1 of answers) are choices made here. Repaired rows are not kept as a variant: only
what was computed in full behind its predecessors is.
Cost: statistics, one more attention pass per layer over chunks computed in full. A prompt with a share r of its tokens
chosen costs r of a prefill in the linear layers and r of the attention rows, and reads 2 * layers * T * Hkv * D float16
numbers of each kept chunk.
Holds when: chunks are long enough to be mostly about themselves; rotary positions, which can be turned.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from memwall.errors import InputError
from memwall.hardware.units import MB
from memwall.kv.policy import Policy, parse

NAME = "cache-craft"
MOST_WORTH = 20.0
"""What one use adds to a variant's score at most, however little it took to repair: 1 / CFO has no bound."""
HALF_LIFE_REQUESTS = 32.0
DEFAULT_ALPHA = 1.0

Chooser = Callable[["Context", int], np.ndarray]
"""chooser(context, count) -> the places of that many tokens of the chunk; the paper's rule unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CraftSettings:
    """`cache-craft(alpha=1.0,variants=5,...)`.

    alpha: tokens repaired for a score of context lost (None: as fitted to the model, else 1); variants: contexts kept
    of one chunk; chunks: chunks kept, in the average; stop: consecutive layers for which the question must look at the
    same chunks before the others are no longer repaired (0: never); margin: how much more it must look at the least of
    these than at the best of the others; ram_mb: memory tier of kept chunks where several requests come, in MB.
    """

    alpha: float | None = None
    variants: int = 5
    chunks: int = 100
    stop: int = 3
    margin: float = 1.5
    ram_mb: int = 32

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 100:
            raise InputError(f"{NAME}: alpha is {self.alpha}: must be from 0 (never repair) to 100")
        if not (1 <= self.variants <= 1000 and 1 <= self.chunks <= 1_000_000):
            raise InputError(f"{NAME}: variants={self.variants},chunks={self.chunks}: both must be 1 at least")
        if self.margin < 1:
            raise InputError(f"{NAME}: margin is {self.margin}: must be 1 at least")

    @staticmethod
    def from_policy(policy: Policy | str) -> CraftSettings:
        """Reads `cache-craft(...)`."""
        policy = parse(policy) if isinstance(policy, str) else policy
        if policy.name != NAME or policy.inner is not None:
            raise InputError(
                f"{policy}: write {NAME} or {NAME}(alpha=1.0,variants=5,chunks=100,stop=3,margin=1.5,ram_mb=32)"
            )
        known: dict[str, float] = {
            "alpha": -1.0,
            "variants": 5,
            "chunks": 100,
            "stop": 3,
            "margin": 1.5,
            "ram_mb": 32,
        }
        values = policy.numbers(known)
        return CraftSettings(
            alpha=None if values["alpha"] < 0 else values["alpha"],
            variants=int(values["variants"]),
            chunks=int(values["chunks"]),
            stop=int(values["stop"]),
            margin=values["margin"],
            ram_mb=int(values["ram_mb"]),
        )

    @property
    def ram_bytes(self) -> int:
        """Bytes of the memory tier."""
        return self.ram_mb * MB


def chunk_id(tokens: Sequence[int] | np.ndarray) -> str:
    """Names a chunk by its tokens: 32 hexadecimal digits."""
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """How a chunk of `num_tokens` looked at its predecessors when it was computed behind them.

    predecessors: their ids in order, the prompt's opening first; lengths: their tokens that count as context.
    """

    num_tokens: int
    predecessors: tuple[str, ...]
    lengths: tuple[int, ...]
    inter: np.ndarray
    intra: float
    token_inter: np.ndarray

    @property
    def impact(self) -> float:
        """Cache context impact: 0.5 for a chunk that looked only at itself, towards 1 for one bound to its context."""
        own = self.intra / self.num_tokens**2
        lengths = np.maximum(np.asarray(self.lengths, np.float64), 1.0)
        other = float((np.asarray(self.inter, np.float64) / (self.num_tokens * lengths)).sum())
        if own <= 0:
            return 1.0 if other > 0 else 0.5
        return 1.0 / (1.0 + math.exp(-min(other / own, 700.0)))

    def shared(self, now: Sequence[str]) -> float:
        """beta: of what it looked at, the share that is there again.

        A chunk that comes up twice among the predecessors counts as often as both contexts have it.
        """
        total = float(np.sum(self.inter))
        return min(_common(self.predecessors, self.inter, now) / total, 1.0) if total > 0 else 1.0

    def known(self, now: Sequence[str], lengths: Sequence[int]) -> float:
        """Of the tokens that come before it now, the share that it was computed behind."""
        total = float(sum(lengths))
        return min(_common(now, lengths, self.predecessors) / total, 1.0) if total > 0 else 1.0

    def overlap(self, now: Sequence[str], lengths: Sequence[int]) -> float:
        """beta': the lesser of both shares, less for predecessors in another order."""
        share = min(self.shared(now), self.known(now, lengths))
        return share * (1.0 - order_distance(self.predecessors, now))

    def overhead(self, now: Sequence[str], lengths: Sequence[int], alpha: float) -> float:
        """Cache fix overhead (CFO): the share of its tokens to compute again behind `now`, from 0 to 1."""
        return min(max(alpha * self.impact * (1.0 - self.overlap(now, lengths)), 0.0), 1.0)

    def ranked(self, count: int) -> np.ndarray:
        """The places of the `count` tokens that looked outside most, ascending; of equals the first."""
        order = np.argsort(-self.token_inter, kind="stable")[:count]
        return np.sort(order)


def _common(names: Sequence[str], weights: Sequence[float] | np.ndarray, others: Sequence[str]) -> float:
    """The weights of those names that the others have too."""
    left, total = Counter(others), 0.0
    for name, weight in zip(names, weights):
        if left[name] > 0:
            left[name] -= 1
            total += float(weight)
    return total


def order_distance(one: Sequence[str], other: Sequence[str]) -> float:
    """Kendall's tau distance between the orders of what both have: discordant pairs over all pairs, 0 to 1."""
    places: dict[tuple[str, int], int] = {key: place for place, key in enumerate(_numbered(other))}
    common = [places[key] for key in _numbered(one) if key in places]
    pairs = len(common) * (len(common) - 1) // 2
    if not pairs:
        return 0.0
    turned = sum(common[i] > common[j] for i in range(len(common)) for j in range(i + 1, len(common)))
    return turned / pairs


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """What is done with one chunk of a prompt: `variant` names the kept one (None: it is computed in full)."""

    variant: str | None
    overhead: float
    repair: np.ndarray


def decide(
    variants: Mapping[str, Context],
    now: Sequence[str],
    lengths: Sequence[int],
    num_tokens: int,
    alpha: float,
    choose: Chooser | None = None,
) -> Reuse:
    """The cheapest variant behind the predecessors `now` and the tokens to repair in it; of equals the first.

    Decided before anything is computed, from what was seen when the variants were made.
    """
    whole = np.arange(num_tokens)
    costs = {name: context.overhead(now, lengths, alpha) for name, context in variants.items()}
    best = min(costs, key=costs.__getitem__, default=None)
    if best is None or costs[best] >= 1.0:
        return Reuse(variant=None, overhead=1.0, repair=whole)
    count = math.ceil(costs[best] * num_tokens)
    repair = choose(variants[best], count) if choose is not None else variants[best].ranked(count)
    return Reuse(variant=best, overhead=costs[best], repair=repair)


def worth(overhead: float) -> float:
    """What one use adds to a variant's score: the cheaper it was to repair, the more."""
    return min(1.0 / max(overhead, 1e-9), MOST_WORTH)


def decayed(score: float, requests: float) -> float:
    """A score after so many more requests."""
    return float(score * 0.5 ** (requests / HALF_LIFE_REQUESTS))


def preload_layers(num_layers: int, prefill_seconds: float, load_seconds: float) -> int:
    """Layers to have before computing begins, from the seconds that one layer takes to compute and to load (L_p):
    the last layer must be there when it is reached.
    """
    if load_seconds <= prefill_seconds or load_seconds <= 0:
        return 1
    depth = math.ceil((num_layers - 1) * (1.0 - prefill_seconds / load_seconds) + 1)
    return min(max(depth, 1), num_layers)


@dataclass(slots=True)
class Focus:
    """Which chunks the question looks at, layer by layer, until that stands still.

    seen: attention paid so far, by chunk. A chunk is focused when it lies above the widest relative gap of the sorted
    sums; these stand still when they were the same for `stop` layers with a gap of at least `margin`.
    """

    settings: CraftSettings
    seen: np.ndarray
    _top: frozenset[int] = field(default=frozenset())
    _layers: int = 0
    settled: bool = False

    def look(self, paid: np.ndarray) -> frozenset[int] | None:
        """One more layer's attention by chunk; gives the focused chunks once, when they stand still."""
        if self.settled or self.settings.stop < 1 or len(self.seen) < 2:
            return None
        self.seen = self.seen + paid
        order = np.argsort(-self.seen, kind="stable")
        sums = np.maximum(self.seen[order], 1e-12)
        gaps = sums[:-1] / sums[1:]
        cut = int(np.argmax(gaps))
        top = frozenset(int(index) for index in order[: cut + 1])
        self._layers = self._layers + 1 if top == self._top and gaps[cut] >= self.settings.margin else 1
        self._top = top
        if gaps[cut] < self.settings.margin or self._layers < self.settings.stop:
            return None
        self.settled = True
        return top
