"""What each part of a policy saves: bytes with it over bytes without it, so that the product is the whole saving.

Parts are taken outermost first (which tokens, which channels, how rows are stored), each over float16 rows until the
store comes, and compared at the same tokens. A part that only pays off beside another (pages, matrices that every cache
of its kind holds once) shows here too: factors come from predicted bytes, not from nominal bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memwall.kv.base import CacheShape
from memwall.kv.policy import Policy, stacked
from memwall.kv.table import DEFAULT_STORE, STATE, predict, resolve

STAGING = "kv/staging"
"""Owner of what a prompt needs only while it is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """Bytes of a cache over those of float16 with the same tokens, and each part's share in that.

    factors: of each part, outermost first; their product is `product`. plain_bytes: of the float16 cache.
    """

    factors: Mapping[str, float]
    plain_bytes: int

    @property
    def product(self) -> float:
        """Bytes over those of the float16 cache."""
        return math.prod(self.factors.values())

    def __str__(self) -> str:
        parts = " x ".join(f"{part} {factor:.3f}" for part, factor in self.factors.items())
        return parts if len(self.factors) < 2 else f"{parts} = {self.product:.3f}"


def held_bytes(
    policy: str | Policy,
    shape: CacheShape,
    num_tokens: int,
    prefill_tokens: int = 0,
    capacity_tokens: int | None = None,
) -> int:
    """Bytes of a cache once the prompt is in: `predict` without the prompt's staging."""
    rows = predict(policy, shape, num_tokens, prefill_tokens, capacity_tokens)
    return sum(size for owner, size in rows.items() if owner != STAGING)


def savings(
    policy: str | Policy,
    shape: CacheShape,
    num_tokens: int,
    prefill_tokens: int = 0,
    capacity_tokens: int | None = None,
) -> Savings:
    """The factors of a policy's parts with `num_tokens` taken in, the first `prefill_tokens` of them as a prompt."""
    sizes = (shape, num_tokens, prefill_tokens, capacity_tokens)
    if shape.state is not None:  # over its own numbers in 16 bits
        held = held_bytes(policy, *sizes)
        numbers = shape.num_heads * shape.head_dim * shape.state.state_size
        numbers += (shape.state.conv_taps - 1) * shape.state.conv_size
        plain = 2 * shape.num_layers * numbers
        return Savings(factors={STATE: held / plain}, plain_bytes=plain)
    plain = before = held_bytes(DEFAULT_STORE, *sizes)
    factors: dict[str, float] = {}
    parts = resolve(policy).parts
    for count, part in enumerate(parts, 1):
        if part == DEFAULT_STORE and count > 1:
            continue  # what the parts above were counted over
        after = held_bytes(stacked(parts[:count]), *sizes)
        factors[str(part)] = after / before if before else 1.0
        before = after
    return Savings(factors=factors, plain_bytes=plain)
