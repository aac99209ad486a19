"""Planning anew when the load has changed: DistServe's watch over recent requests.

Source: DistServe, arXiv 2401.09670, section 4.3 (re-planning): mean lengths of prompts and answers and the rate of
arrivals are watched, and on a clear shift the placement search runs again on recent history.

Idea: a window of the last requests is held against the one that the present plan was made for. A mean has shifted
clearly when it changed by more than `factor` and by more than `sigmas` standard errors of the two windows, so that a
heavy tail or a short burst alone does not set off a search.

Differs from the paper: it does not say what a significant shift is; both bounds are ours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from memwall.errors import InputError
from memwall.simulate.distserve import Lengths, Plan

FACTOR, SIGMAS, WINDOW = 1.3, 4.0, 200
NAMES = ("prompt tokens", "output tokens", "requests a second")
Planner = Callable[[Lengths, float], Plan]
"""(lengths to draw from, requests a second) -> a plan."""


@dataclass(frozen=True, slots=True)
class Habits:
    """Means of a window, and their standard errors: prompt tokens, output tokens, requests a second."""

    means: tuple[float, float, float]
    errors: tuple[float, float, float]

    @staticmethod
    def of(requests: Sequence[tuple[float, int, int]]) -> Habits:
        """Of (arrival, prompt tokens, output tokens), two at least."""
        table = np.asarray(requests, float)
        root = math.sqrt(len(table))
        seconds = max(float(table[-1, 0] - table[0, 0]), 1e-9)
        gaps = np.diff(table[:, 0])
        rate = (len(table) - 1) / seconds
        spread = float(gaps.std() / max(gaps.mean(), 1e-12))  # of the gaps, relative: bursty arrivals tell less
        return Habits(
            (float(table[:, 1].mean()), float(table[:, 2].mean()), rate),
            (float(table[:, 1].std()) / root, float(table[:, 2].std()) / root, rate * spread / root),
        )

    def shifted(self, other: Habits, factor: float, sigmas: float) -> tuple[str, ...]:
        """Names of what has clearly changed from here to the other."""
        found = []
        for name, a, b, e, f in zip(NAMES, self.means, other.means, self.errors, other.errors):
            far = max(a, b) > factor * max(min(a, b), 1e-12)
            if far and abs(a - b) > sigmas * math.hypot(e, f):
                found.append(name)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Change:
    """A plan, since when it stands, and what had shifted (nothing for the first one)."""

    at: float
    plan: Plan
    shifted: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Replanner:
    """Watches requests as they end and plans by `planner`. window: requests that a plan is made of, and judged by."""

    planner: Planner
    window: int = WINDOW
    factor: float = FACTOR
    sigmas: float = SIGMAS
    changes: list[Change] = field(default_factory=list)
    searches: int = 0
    _recent: deque[tuple[float, int, int]] = field(default_factory=deque)
    _planned: Habits | None = None

    def __post_init__(self) -> None:
        if self.window < 10 or self.factor <= 1 or self.sigmas < 0:
            raise InputError(
                f"a window of {self.window} requests, a factor of {self.factor} and {self.sigmas} standard errors: the "
                "window must be at least 10, the factor above 1, the errors 0 or more"
            )
        self._recent = deque(maxlen=self.window)

    @property
    def plan(self) -> Plan | None:
        """The present one; None until a window has passed."""
        return self.changes[-1].plan if self.changes else None

    def observe(self, at: float, prompt_tokens: int, output_tokens: int) -> Change | None:
        """One more request; a new plan where there is one. The same plan again is no change."""
        self._recent.append((at, prompt_tokens, output_tokens))
        if len(self._recent) < self.window:
            return None
        now = Habits.of(self._recent)
        shifted = () if self._planned is None else self._planned.shifted(now, self.factor, self.sigmas)
        if self._planned is not None and not shifted:
            return None
        self._planned = now
        self.searches += 1
        plan = self.planner([(prompt, output) for _, prompt, output in self._recent], now.means[2])
        before = self.plan
        # what it was made for is the newest window from here on, so that a slow drift is followed too
        self._recent.clear()
        if before is not None and _shape(before) == _shape(plan):
            return None
        self.changes.append(Change(at, plan, shifted))
        return self.changes[-1]


def _shape(plan: Plan) -> tuple[object, ...]:
    return (plan.prefill, plan.decode, plan.prefill_instances, plan.decode_instances, plan.segments)
