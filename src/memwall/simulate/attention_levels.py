"""Attention's least traffic between each two tiers of a machine, and the time below which it cannot be.

Each tier is a fast memory over the next larger one, down to the one that holds inputs and output; the bound is that of
`attention_io_complexity` with the tier's capacity, the rate that of reading the larger one (or of writing the smaller
one, or of the link between, if that is less). Where there are several of a tier (a GPU's shared memories) each does its
share of the work with what one holds, which the bound allows for: an epoch is one memory's.

Units: seconds, words of `word_bytes`, capacities in whole words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memwall.errors import DoesNotFit, InputError
from memwall.hardware.machine import Compute, Machine, Tier
from memwall.hardware.units import format_bytes
from memwall.simulate.attention_io_complexity import Plan, choose, count_words, io_star, lower_bound, regime
from memwall.simulate.attention_shape import Attention

WORD_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
REMOTE = ("net",)
"""Tiers that are another machine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Between a tier and the one below it."""

    tier: str
    below: str
    count: int
    fast_words: int
    bytes_per_s: float
    regime: str
    least_words: int
    order_words: float
    words: int
    plan: Plan
    word_bytes: int

    @property
    def least_seconds(self) -> float:
        """No schedule takes less."""
        return self.least_words * self.word_bytes / self.bytes_per_s

    @property
    def seconds(self) -> float:
        """Of the chosen plan's traffic alone."""
        return self.words * self.word_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """All levels of a machine, the fastest first, and its arithmetic."""

    machine: str
    unit: str
    home: str
    levels: tuple[Level, ...]
    compute_seconds: float

    @property
    def least_seconds(self) -> float:
        """The larger of arithmetic and every level's bound."""
        return max(self.compute_seconds, *(level.least_seconds for level in self.levels), 0.0)

    @property
    def seconds(self) -> float:
        """The same with what the chosen plans move, as if all of it went on at once."""
        return max(self.compute_seconds, *(level.seconds for level in self.levels), 0.0)

    @property
    def limit(self) -> str:
        """What the time with the chosen plans is that of: `arithmetic`, or `below to tier`."""
        slowest = max(self.levels, key=lambda level: level.seconds, default=None)
        if slowest is None or slowest.seconds <= self.compute_seconds:
            return "arithmetic"
        return f"{slowest.below} to {slowest.tier}"


def hierarchy(
    shape: Attention,
    machine: Machine,
    dtype: str = "float32",
    *,
    unit: str | None = None,
    fast_bytes: int | None = None,
) -> Hierarchy:
    """The levels of a machine. unit: None for its first; fast_bytes: a memory above the machine's smallest tier.

    InputError for a type or a unit that the machine does not state; DoesNotFit where no tier holds the arrays.
    """
    if dtype not in WORD_BYTES:
        raise InputError(f"no type {dtype!r}; words are {', '.join(WORD_BYTES)}")
    compute = _unit(machine, unit)
    word_bytes = WORD_BYTES[dtype]
    chain = _chain(machine, compute, shape.compulsory * word_bytes)
    found = []
    above = [(tier.name, tier.count, int(tier.capacity_bytes), tier.write_bytes_per_s * tier.count) for tier in chain]
    if fast_bytes is not None:
        if fast_bytes >= above[0][2]:
            raise InputError(f"--fast-memory: {machine.name}'s {chain[0].name} has {above[0][2]:,} bytes; give less")
        above.insert(0, ("fast memory", 1, fast_bytes, float("inf")))
        chain = (chain[0], *chain)
    for (name, count, capacity, write), below in zip(above, chain[1:], strict=False):
        link = machine.link(below.name, name)
        rate = min(below.read_bytes_per_s * below.count, write)
        rate = rate if link is None else min(rate, link.bytes_per_s * max(count, 1))
        words = capacity // word_bytes
        plan = choose(shape, words)
        found.append(Level(
            tier=name, below=below.name, count=count, fast_words=words, bytes_per_s=rate,
            regime=regime(shape, words), least_words=lower_bound(shape, words), order_words=io_star(shape, words),
            words=count_words(shape, plan), plan=plan, word_bytes=word_bytes,
        ))  # fmt: skip
    flop_per_s = machine.flop_per_s(compute.unit, dtype) * compute.count
    return Hierarchy(
        machine=machine.name, unit=compute.unit, home=chain[-1].name, levels=tuple(found),
        compute_seconds=shape.flop / flop_per_s,
    )  # fmt: skip


def _unit(machine: Machine, name: str | None) -> Compute:
    if not machine.compute:
        raise InputError(f"{machine.name} states no compute unit, so no time is known")
    for compute in machine.compute:
        if name in (None, compute.unit):
            return compute
    raise InputError(f"{machine.name} has no {name!r}; it has {', '.join(one.unit for one in machine.compute)}")


def _chain(machine: Machine, compute: Compute, num_bytes: int) -> tuple[Tier, ...]:
    """From the smallest tier to the one that holds the arrays, which is the unit's own or a larger one."""
    local = [tier for tier in machine.tiers if tier.name not in REMOTE]
    ordered = sorted(local, key=lambda tier: tier.capacity_bytes)
    own = machine.tier(compute.tier).capacity_bytes
    for place, tier in enumerate(ordered):
        if tier.capacity_bytes >= own and tier.capacity_bytes * tier.count >= num_bytes:
            return tuple(ordered[: place + 1])
    largest = ordered[-1]
    raise DoesNotFit(
        f"inputs and output are {format_bytes(num_bytes)}; {machine.name}'s largest tier, {largest.name}, "
        f"holds {format_bytes(largest.capacity_bytes * largest.count)}"
    )


def to_dict(found: Hierarchy) -> dict[str, Any]:
    """For `--json`."""
    return {
        "machine": found.machine, "unit": found.unit, "home": found.home, "compute_seconds": found.compute_seconds,
        "least_seconds": found.least_seconds, "seconds": found.seconds, "limit": found.limit,
        "levels": [
            {"tier": one.tier, "below": one.below, "count": one.count, "fast_words": one.fast_words,
             "bytes_per_s": one.bytes_per_s, "regime": one.regime, "least_words": one.least_words,
             "order_words": one.order_words, "words": one.words, "schedule": one.plan.schedule,
             "least_seconds": one.least_seconds, "seconds": one.seconds}
            for one in found.levels
        ],
    }  # fmt: skip


def nested_tiles(
    shape: Attention, inner_words: int, outer_words: int, *, step: int, share: float = 0.5
) -> tuple[int, int]:
    """(rows, keys) of q-outer's tiles for two caches: a tile of keys and values is read from the inner one for every
    few rows, so it must fit there; rows, with what they gather, must stay in the outer one while all keys pass.

    share: of each cache that tiles may take; the rest is for what streams by, as caches do not place by hand. step: key
    tiles are multiples of it, one at least.
    """
    size = shape.head_size
    keys = max(step, int(share * inner_words) // (2 * size) // step * step)
    keys = min(keys, -(-shape.num_keys // step) * step)
    rows = (int(share * outer_words) - 2 * size * keys) // (2 * size + 2 + keys)
    return max(1, min(rows, shape.rows)), keys
