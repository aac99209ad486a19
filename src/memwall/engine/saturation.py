"""L_m: how many tokens of prompts, computed together, fill a device (DistServe, arXiv 2401.09670, section 3.1).

Below it a batch wastes compute, above it a longer one only takes longer: nobody's first token comes sooner, and the
first of the batch's waits for the last. So prompts are batched up to near L_m, and a longer one goes by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memwall.engine.executor import Entry
from memwall.engine.sequence import Request
from memwall.engine.sequence import Sequence as Running
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.engine.apart import ApartEngine

SHARE = 0.9
LEAST_TOKENS = 16
REPEATS = 3


def saturating_tokens(samples: Sequence[tuple[int, float]], share: float = SHARE) -> int:
    """Of (tokens, seconds) of batches: the least tokens at which so large a share of the best rate is reached."""
    if not samples or min(seconds for _, seconds in samples) <= 0:
        raise InputError("L_m needs at least one batch, and each must have taken some time")
    best = max(tokens / seconds for tokens, seconds in samples)
    return min(tokens for tokens, seconds in samples if tokens / seconds >= share * best)


def measure(engine: ApartEngine, repeats: int = REPEATS) -> list[tuple[int, float]]:
    """Seconds of prompts of doubling length in the prefill worker, medians. Nothing else may run meanwhile."""
    limits, pages, found = engine.front.limits, engine.front.pages, []
    most = min(limits.token_budget, engine.context_tokens - 1, pages.available_pages * limits.page_tokens)
    counts = [LEAST_TOKENS << step for step in range(most.bit_length()) if LEAST_TOKENS << step < most]
    for count in (*counts, most):
        one = Running(id=-1, request=Request(prompt=(0,) * count), arrival=0.0, eos=())
        one.pages = pages.take(limits.pages(count))
        times = []
        for _ in range(repeats):
            began = engine.clock()
            engine.workers.start("prefill", [Entry(one, 0, count, True)])
            while not engine.workers.collect():
                pass
            times.append(engine.clock() - began)
        pages.release(one.pages)
        found.append((count, statistics.median(times)))
    return found
