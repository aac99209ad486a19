"""Which tensor gets how many bits: the least total loss inside a budget of bytes.

Every tensor offers candidates (bytes, loss); one of each is to be taken. The states worth keeping after some tensors
are those that no other state beats in both bytes and loss, so the tensors are merged one at a time and only that
front is kept. The result is the optimum as long as the front stays under `MAX_STATES`; beyond that it is thinned
evenly, which never breaks the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwall.errors import DoesNotFit, InputError

MAX_STATES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One form that a tensor may take."""

    spec: str
    nbytes: int
    loss: float


def allocate(candidates: Sequence[Sequence[Candidate]], budget_bytes: int) -> list[Candidate]:
    """One candidate per tensor, in order, with the least total loss and at most `budget_bytes` in all.

    Raises DoesNotFit, which says the least that works, when even the smallest candidates are too large, and InputError
    for losses that are no numbers, as those of damaged weights are.
    """
    if not all(math.isfinite(candidate.loss) for options in candidates for candidate in options):
        raise InputError("what roundings lose is not a number (NaN or infinite): the model's weights are damaged")
    smallest = sum(min(candidate.nbytes for candidate in options) for options in candidates)
    if smallest > budget_bytes:
        raise DoesNotFit(f"the smallest forms need {smallest:,} bytes, {budget_bytes:,} are allowed")
    # what the tensors still to come take at least: a state that leaves less than that is a dead end
    rest = smallest
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for options in candidates:
        rest -= min(candidate.nbytes for candidate in options)
        more = np.array([candidate.nbytes for candidate in options], np.int64)
        worse = np.array([candidate.loss for candidate in options])
        parents, choices = np.divmod(np.arange(len(sizes) * len(options)), len(options))
        sizes, losses = sizes[parents] + more[choices], losses[parents] + worse[choices]
        front = _front(sizes, losses, budget_bytes - rest)
        steps.append((parents[front], choices[front]))
        sizes, losses = sizes[front], losses[front]
    return _trace_back(candidates, steps)


def _front(sizes: np.ndarray, losses: np.ndarray, allowed_bytes: int) -> np.ndarray:
    """Indices of the states that are worth keeping, smallest first (so the last one has the least loss)."""
    order = np.lexsort((losses, sizes))
    order = order[sizes[order] <= allowed_bytes]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    front = order[losses[order] < best_before]
    if len(front) > MAX_STATES:
        # both ends stay: the smallest keeps the budget reachable, the largest is the best so far
        front = front[np.linspace(0, len(front) - 1, MAX_STATES).astype(np.int64)]
    return front


def _trace_back(
    candidates: Sequence[Sequence[Candidate]], steps: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[Candidate]:
    chosen: list[Candidate] = []
    state = -1
    for options, (parents, choices) in zip(reversed(candidates), reversed(steps), strict=True):
        chosen.append(options[choices[state]])
        state = int(parents[state])
    return chosen[::-1]
