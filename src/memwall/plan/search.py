"""Choosing settings under a budget: enumerate, bound, compare.

The search knows nothing of models or machines. It asks a `Space` what a choice weighs on each tier and how many bits
it spends, and walks the choices: for every cache policy the most weight bits that fit (uniform or mixed, in
hundredths of a bit), then the best of these.

Mixed weights grow with their bits, so the most bits that fit are found by bisection; the result is checked against a
full enumeration in the tests. The weights' own dtype is the ceiling: past it no bit helps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from memwall import kv as caches
from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import format_bytes
from memwall.plan.base import LONGEST_SEGMENT_TOKENS, Choice, Quality

AUTO = "auto"
#: below this many bits per weight a longer context is not worth the loss (model figure: low-bit curves bend near 4
#: bits)
KEEPS_QUALITY_BITS = 4.0
#: context aimed at when none is asked, halved until the weights keep KEEPS_QUALITY_BITS
DEFAULT_CONTEXT_TOKENS = 4096
SHORTEST_CONTEXT_TOKENS = 256
LARGEST_BATCH = 256
#: tokens of a sequence where the cache numbers what it keeps anew: whatever the model's positions
LONGEST_PACKED_TOKENS = 1 << 24
#: loss of cached numbers in a number of bits against that of weights in as many, in `proxy_loss` (measured on the demo
#: model, 2026-11-23: KL of 27-43 nats x 4^-bits for weights at 2.8 to 4.3 bits, 6.6 for KIVI at 3 and 5 bits)
_CACHE_LOSS_SHARE = 0.2


class Space(ABC):
    """What the search must know about one model on one machine.

    max_context: positions the model can address. ceiling: the dtype the weights come in. uniform: codec specs worth
    trying, any order. lowest_bits, ceiling_bits: true bits per weight of the lowest mixed choice and of the ceiling.
    policies: cache policies worth trying. mixes: what mixed choices begin with: it names the formats that they mix.
    """

    mixes: str = "mixed"

    max_context: int
    ceiling: str
    ceiling_bits: float
    lowest_bits: float
    uniform: tuple[str, ...]
    policies: tuple[str, ...]

    def ladder(self) -> tuple[int, int]:
        """First and last of the graded choices of weights, by number: bytes and bits grow along them."""
        return grid(self)

    def rung(self, number: int) -> str:
        """A graded choice of weights."""
        return mixed(self, number)

    @abstractmethod
    def peak_bytes(self, choice: Choice) -> dict[str, int]:
        """Predicted peak per tier, load transients included."""

    @abstractmethod
    def weight_bits(self, weights: str) -> float:
        """True bits per weight of a choice of weights."""

    @abstractmethod
    def cache_bits(self, choice: Choice) -> float:
        """True bits per cached number at the end of the context, exact tail included."""

    @abstractmethod
    def stored_bits(self, policy: str) -> float:
        """Bits per number of what a policy compresses, its exact tail left out: what the loss depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked. `auto` weights or cache, and None for context or batch, leave these to the search.

    prompt_tokens: length of the prompt where it is known; it sizes the segments (see `segment_tokens`).
    """

    budget: Mapping[str, int]
    weights: str = AUTO
    kv: str = AUTO
    context: int | None = None
    prompt_tokens: int | None = None
    batch: int | None = 1
    threads: int = 1
    device: str = "cpu"
    max_kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A choice that fits, with what the comparison needs. note: why it has no measured quality, where others have."""

    choice: Choice
    peak_bytes: Mapping[str, int]
    bits_per_weight: float
    cache_bits: float
    stored_bits: float
    quality: Quality | None = None
    note: str = ""


Measure = Callable[[Choice], Quality | None]
Survey = Callable[[list["Candidate"]], list["Candidate"]]


def is_open(weights: str) -> bool:
    """Whether weights are left to the search: `auto`, or `auto(...)` with formats to mix."""
    return weights.partition("(")[0] == AUTO


def fits(space: Space, choice: Choice, budget: Mapping[str, int]) -> bool:
    """True when no tier goes over its cap."""
    peak = space.peak_bytes(choice)
    return all(peak.get(tier, 0) <= cap for tier, cap in budget.items())


def proxy_loss(candidate: Candidate) -> float:
    """Expected order of quality where nothing was measured: the error's power falls fourfold with each bit."""
    return float(4.0**-candidate.bits_per_weight + _CACHE_LOSS_SHARE * 4.0**-candidate.stored_bits)


def search(
    space: Space, goal: Goal, *, measure: Measure | None = None, survey: Survey | None = None
) -> list[Candidate]:
    """Candidates that fit the goal, best first; measured when `measure` is given, all of them unless `survey` measures
    those that are worth it.

    Raises DoesNotFit naming the smallest budget that works, or the largest context that fits; InputError for settings
    that cannot be.
    """
    check(space, goal)
    candidates = _within_budget(space, goal)
    if not candidates:
        raise DoesNotFit(explain_misfit(space, goal))
    if survey is not None:
        candidates = survey(candidates)
    elif measure is not None:
        candidates = [replace(one, quality=measure(one.choice)) for one in candidates]
    candidates.sort(key=_order)
    if goal.max_kl is not None:
        candidates = _bounded(space, goal, candidates, measure)
    if goal.batch is None:
        candidates = [_grow_batch(space, goal, one) for one in candidates]
    return candidates


def check(space: Space, goal: Goal) -> None:
    """Refuse settings that no budget could make work."""
    longest = longest_context(space, goal.kv)
    if goal.context is not None and not 1 <= goal.context <= longest:
        raise InputError(f"context {goal.context} is out of range: this model takes 1 to {longest} tokens")
    if goal.batch is not None and goal.batch < 1:
        raise InputError(f"batch {goal.batch} is out of range: it must be at least 1")
    if goal.max_kl is not None and not goal.max_kl > 0:  # NaN is not
        raise InputError(f"max-kl {goal.max_kl} is out of range: it must be above 0 nats")


def longest_context(space: Space, kv: str) -> int:
    """Tokens that a sequence may have: as many as the model has positions, unless the cache numbers what it keeps
    anew.
    """
    packs = kv != AUTO and caches.packs_positions(kv)
    return max(LONGEST_PACKED_TOKENS, space.max_context) if packs else space.max_context


def contexts(space: Space, goal: Goal) -> list[int]:
    """Contexts to try, longest first: the one asked, or halvings of the default."""
    if goal.context is not None:
        return [goal.context]
    longest = min(space.max_context, DEFAULT_CONTEXT_TOKENS)
    ladder = [longest]
    while ladder[-1] // 2 >= SHORTEST_CONTEXT_TOKENS:
        ladder.append(ladder[-1] // 2)
    return ladder


def most_weights(space: Space, choice: Choice, budget: Mapping[str, int]) -> str | None:
    """The weights with the most bits that fit beside everything else in `choice`; None when the fewest bits do not."""
    if fits(space, replace(choice, weights=space.ceiling), budget):
        return space.ceiling
    low, high = space.ladder()
    if not fits(space, replace(choice, weights=space.rung(low)), budget):
        return _best_uniform(space, choice, budget, at_least_bits=0.0)
    best = _largest(
        lambda number: fits(space, replace(choice, weights=space.rung(number)), budget),
        low,
        high,
        _guess(space, choice, budget, low, high),
    )
    # a uniform format of the same size is preferred: one kernel, one look-up
    least_bits = space.weight_bits(space.rung(best))
    return _best_uniform(space, choice, budget, at_least_bits=least_bits) or space.rung(best)


def _guess(space: Space, choice: Choice, budget: Mapping[str, int], low: int, high: int) -> int:
    """Where the budget would be used up if bytes grew evenly with bits, which they nearly do."""
    least, most = (space.peak_bytes(replace(choice, weights=one)) for one in (space.rung(low), space.ceiling))
    shares = [
        (cap - least.get(tier, 0)) / (most[tier] - least.get(tier, 0))
        for tier, cap in budget.items()
        if most.get(tier, 0) > least.get(tier, 0)
    ]
    return max(low, min(high, low + int(min(shares, default=1.0) * (high - low))))


def _largest(holds: Callable[[int], bool], low: int, high: int, guess: int) -> int:
    """The largest number in [low, high] for which `holds`, which is true at low and, once false, stays false."""
    step = 1
    if holds(guess):
        low = guess
        while low + step <= high and holds(low + step):
            low, step = low + step, 2 * step
        high = min(high, low + step - 1)
    else:
        high = guess - 1
        while high - step >= low and not holds(high - step + 1):
            high, step = high - step, 2 * step
        low = max(low, high - step + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def mixed(space: Space, hundredths: int) -> str:
    """The mixed choice of so many hundredths of a bit per weight."""
    return f"{space.mixes}-{hundredths / 100:.2f}"


def grid(space: Space) -> tuple[int, int]:
    """First and last mixed choice, in hundredths of a bit."""
    low = -int(-space.lowest_bits * 100 // 1)
    return low, max(low, int(space.ceiling_bits * 100))


def smallest(space: Space, goal: Goal) -> tuple[Choice, dict[str, int]]:
    """The choice that needs the least on the budget's tiers at the shortest context allowed, and its peak."""
    context = contexts(space, goal)[-1]
    weights = [goal.weights] if goal.weights != AUTO else [space.rung(space.ladder()[0]), *space.uniform, space.ceiling]
    policies = [goal.kv] if goal.kv != AUTO else list(space.policies)
    choices = [_choice(goal, one, kv, context, goal.batch or 1) for one in weights for kv in policies]
    peaks = [space.peak_bytes(choice) for choice in choices]
    tiers = list(goal.budget) or sorted(peaks[0])
    best = min(range(len(choices)), key=lambda i: sum(peaks[i].get(tier, 0) for tier in tiers))
    return choices[best], peaks[best]


def largest_context(space: Space, goal: Goal) -> int | None:
    """The longest context for which some choice fits; None when none does."""

    def possible(context: int) -> bool:
        _, peak = smallest(space, replace(goal, context=context))
        return all(peak.get(tier, 0) <= cap for tier, cap in goal.budget.items())

    longest = longest_context(space, goal.kv)
    return _largest(possible, 1, longest, longest) if possible(1) else None


def explain_misfit(space: Space, goal: Goal) -> str:
    """Why nothing fits and the nearest thing that would."""
    choice, peak = smallest(space, goal)
    asked = ", ".join(f"{tier}={format_bytes(cap)}" for tier, cap in goal.budget.items())
    needs = ", ".join(f"{tier}={peak.get(tier, 0)} bytes ({format_bytes(peak.get(tier, 0))})" for tier in goal.budget)
    text = (
        f"does not fit in {asked}: the smallest budget that works at context {choice.context} is {needs}, "
        f"with weights {choice.weights} and cache {choice.kv}"
    )
    longest = largest_context(space, goal)
    if longest is not None and longest < choice.context:
        return f"{text}; within the budget asked the largest context that fits is {longest}: try --context {longest}"
    advice = [f"--memory {peak['ram']}"] if list(goal.budget) == ["ram"] else []
    return f"{text}; try {advice[0]}" if advice else text


def segment_tokens(goal: Goal, kv: str, context: int) -> int:
    """Prompt tokens to work at once.

    A cache that codes the prompt gets it whole, however long, since the tokens of a second segment would attend to the
    coded form of the first. Others lose nothing by segments, which need less memory.
    """
    if goal.prompt_tokens is None:
        return min(LONGEST_SEGMENT_TOKENS, context)
    prompt = max(min(goal.prompt_tokens, context), 1)
    return prompt if caches.codes_prompt(kv) else min(LONGEST_SEGMENT_TOKENS, prompt)


def _choice(goal: Goal, weights: str, kv: str, context: int, batch: int) -> Choice:
    return Choice(
        weights=weights,
        kv=kv,
        context=context,
        batch=batch,
        threads=goal.threads,
        device=goal.device,
        segment_tokens=segment_tokens(goal, kv, context),
    )


def _best_uniform(space: Space, choice: Choice, budget: Mapping[str, int], *, at_least_bits: float) -> str | None:
    fitting = [one for one in space.uniform if fits(space, replace(choice, weights=one), budget)]
    best = max(fitting, key=space.weight_bits, default=None)
    return best if best is not None and space.weight_bits(best) >= at_least_bits else None


def candidate_of(space: Space, choice: Choice) -> Candidate:
    """What the comparison needs of a choice."""
    return Candidate(
        choice=choice,
        peak_bytes=space.peak_bytes(choice),
        bits_per_weight=space.weight_bits(choice.weights),
        cache_bits=space.cache_bits(choice),
        stored_bits=space.stored_bits(choice.kv),
    )


def _frontier(space: Space, goal: Goal, context: int) -> list[Candidate]:
    """For every cache policy the most weight bits that fit at this context."""
    found: list[Candidate] = []
    for kv in [goal.kv] if goal.kv != AUTO else space.policies:
        base = _choice(goal, goal.weights, kv, context, goal.batch or 1)
        if goal.weights != AUTO:
            weights: str | None = goal.weights if fits(space, base, goal.budget) else None
        else:
            weights = most_weights(space, base, goal.budget)
        if weights is not None:
            found.append(candidate_of(space, replace(base, weights=weights)))
    return found


def _within_budget(space: Space, goal: Goal) -> list[Candidate]:
    """The frontier at the longest context that keeps the quality; when none does, at the shortest that fits."""
    last: list[Candidate] = []
    for context in contexts(space, goal):
        found = _frontier(space, goal, context)
        if found and max(one.bits_per_weight for one in found) >= min(KEEPS_QUALITY_BITS, space.ceiling_bits):
            return found
        last = found or last
    return last


def _order(candidate: Candidate) -> tuple[float, float, float]:
    """Lowest measured loss first; unmeasured ones by the expected loss."""
    loss = proxy_loss(candidate)
    if candidate.quality is None:
        return (float("inf"), loss, 0.0)
    return (candidate.quality.kl_nats, candidate.quality.perplexity, loss)


def _bounded(space: Space, goal: Goal, candidates: Sequence[Candidate], measure: Measure | None) -> list[Candidate]:
    limit = goal.max_kl if goal.max_kl is not None else float("inf")
    if measure is None:
        raise InputError("max-kl needs measured quality: leave measuring on, or drop the bound")
    good = [one for one in candidates if one.quality is not None and one.quality.kl_nats <= limit]
    if good:
        return good
    measured = [one for one in candidates if one.quality is not None]
    if not measured:
        raise InputError("max-kl needs measured quality, and none could be measured for this model")
    best = min(measured, key=_order)
    lowest = best.quality.kl_nats if best.quality else limit
    text = (
        f"no choice within the budget stays under {limit:g} nats: "
        f"the best, {best.choice.weights} with {best.choice.kv}, loses {lowest:.3g}"
    )
    for weights in sorted(space.uniform, key=space.weight_bits):
        if space.weight_bits(weights) <= best.bits_per_weight:
            continue
        choice = replace(best.choice, weights=weights, kv=space.policies[0] if goal.kv == AUTO else goal.kv)
        quality = measure(choice)
        if quality is not None and quality.kl_nats <= limit:
            peak = space.peak_bytes(choice)
            needs = ", ".join(f"{tier}={peak.get(tier, 0)} bytes" for tier in goal.budget)
            raise DoesNotFit(f"{text}; {weights} loses {quality.kl_nats:.3g} and needs {needs}")
    raise DoesNotFit(f"{text}; no low-bit format stays under the bound, only {space.ceiling} does")


def _grow_batch(space: Space, goal: Goal, candidate: Candidate) -> Candidate:
    """Spend what is left on more sequences at once: the largest power of two that still fits."""
    best = candidate
    batch = 2
    while batch <= LARGEST_BATCH:
        wider = replace(candidate.choice, batch=batch)
        if not fits(space, wider, goal.budget):
            break
        best = replace(candidate_of(space, wider), quality=candidate.quality)
        batch *= 2
    return best
