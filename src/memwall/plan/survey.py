"""Many caches for one budget: which are worth measuring, and in which order.

Measuring a cache means decoding held-out text through it, which takes seconds to minutes. Three things spare most of
that:

- a cache that is a harsher form of another (the same parts and more, fewer bytes) can only be better if it leaves more
  bits to the weights;
- no cache makes up for what its weights lose: their loss alone, which one pass over the text gives, is a floor, and
  caches are measured in the order of their floors until the next floor is above the best loss found;
- figures are kept per model, as all measured ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from memwall import kv
from memwall.errors import InputError
from memwall.kv import fitted
from memwall.kv.base import CacheShape
from memwall.kv.table import DEFAULT_STORE
from memwall.plan.base import Choice, Quality
from memwall.plan.search import Candidate

#: caches that need no fitting, mildest first: the settings that their papers and the claims in `evidence/` stand on,
#: one at a time and on top of each other
CACHES = (
    "float16",
    "int8",
    "kivi(4bit)",
    "int4",
    "kivi(3bit)",
    "kivi(2bit)",
    "think(0.4)",
    "think(0.4)+kivi(4bit)",
    "snapkv(0.5)",
    "snapkv(0.5)+kivi(4bit)",
    "snapkv(0.5)+think(0.4)+kivi(4bit)",
    "snapkv(0.25)",
    "snapkv(0.25)+kivi(4bit)",
    "snapkv(0.25)+think(0.4)+kivi(4bit)",
    "snapkv(0.25)+think(0.4)+kivi(2bit)",
    "epicache(0.25,chunk=256)",
    "xquant(4bit)",
    "xquant(3bit,cl=1)",
)
#: weights are no better for so few bits more
SAME_BITS = 0.02

Measure = Callable[[Choice], Quality | None]
Tick = Callable[[int, int], None]


def caches_for(shape: CacheShape, fingerprint: str, context: int) -> tuple[str, ...]:
    """The caches above that this model can have, and those that were fitted to it."""
    return tuple(policy for policy in (*CACHES, *fitted.stored(fingerprint)) if _works(policy, shape, context))


def _works(policy: str, shape: CacheShape, context: int) -> bool:
    try:
        kv.predict(policy, shape, context, context)
    except InputError:
        return False
    return True


def survey(
    candidates: Sequence[Candidate], measure: Measure, floor: Measure, *, tick: Tick | None = None
) -> list[Candidate]:
    """The candidates, those worth it with their loss, the others with a note that says why they have none.

    measure: loss of a choice through its cache; floor: loss of its weights alone. tick(done, at most).
    """
    waiting, found = [], []
    for one in candidates:
        milder = next((other for other in candidates if other is not one and _is_harsher(one, other)), None)
        if milder is None:
            waiting.append((_loss(floor(one.choice)), one))
        else:
            found.append(replace(one, note=f"not measured: no more bits for weights than with {milder.choice.kv}"))
    best = float("inf")
    order = sorted(waiting, key=lambda pair: (pair[0], -pair[1].cache_bits))
    for done, (least, one) in enumerate(order):
        if tick is not None:
            tick(done, len(order))
        if least > best:
            found.append(replace(one, note=f"not measured: its weights alone lose {least:.3g} nats"))
            continue
        quality = measure(one.choice)
        best = min(best, _loss(quality))
        found.append(replace(one, quality=quality))
    return found


def _loss(quality: Quality | None) -> float:
    return float("inf") if quality is None else quality.kl_nats


def _is_harsher(one: Candidate, other: Candidate) -> bool:
    """Whether `one` keeps less than `other` in the same ways and more, for no better weights."""
    ours, theirs = (_parts(each.choice.kv) for each in (one, other))
    keeps_less = not theirs or (theirs <= ours and one.cache_bits < other.cache_bits)
    return ours != set() and keeps_less and one.bits_per_weight <= other.bits_per_weight + SAME_BITS


def _parts(policy: str) -> set[str]:
    """Names of the parts that lose something; none for a float16 cache."""
    return {part.name for part in kv.resolve(policy).parts} - {DEFAULT_STORE.name}
