"""What CacheGen's controller believes of a link and a processor: what was measured last, and how far such beliefs went.

The paper takes the throughput of the chunk before for that of the chunks to come (section 5.3). Whether a deadline is
met also depends on how wrong that is: `Pace` allows for the largest relative error of its last five estimates, as
RobustMPC does for video (A Control-Theoretic Approach for Dynamic Adaptive Video Streaming over HTTP; Yin et al.,
SIGCOMM 2015). It knows the past only. Before there are errors it assumes one.

Recomputing n tokens on top of a context of c takes a * n + b * n * (c + n / 2) seconds: weights are multiplied with
each token, and each token looks at all before it. In units of a, the pace of recomputing is one number.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from memwall.errors import InputError

REMEMBERED_ERRORS = 5
LINK_ERROR, WORK_ERROR = 2.0, 0.2
"""Errors to begin with: a link may carry a third of what it just did; a processor, which was measured before it also
had a link to attend to, may need a fifth longer. Chosen on drawn bandwidths, the link's after recorded ones had been
seen (at 1 the coarsest level missed less)."""


class Pace:
    """Units a second as last measured, and how far off the last estimates were."""

    def __init__(self, prior_error: float, per_s: float | None = None) -> None:
        if per_s is not None and not per_s > 0:
            raise InputError(f"a pace of {per_s} a second: must be more than zero")
        self.per_s = per_s
        self._errors: deque[float] = deque([prior_error], REMEMBERED_ERRORS)

    def saw(self, units: float, seconds: float) -> None:
        """So many units took so long."""
        seconds = max(seconds, 1e-9)
        if self.per_s is not None:
            self._errors.append(abs(self.per_s * seconds / units - 1))
        self.per_s = units / seconds

    @property
    def margin(self) -> float:
        """How many times longer than estimated anything took lately; at least once."""
        return 1 + max(self._errors)

    def seconds(self, units: float, *, careful: bool) -> float:
        """How long so many units take, with the margin if careful; 0 before anything was measured."""
        if self.per_s is None:
            return 0.0
        return units / self.per_s * (self.margin if careful else 1)


@dataclass(slots=True, kw_only=True)
class Costs:
    """Seconds of a processor. growth: b / a, by how much each token of context adds to the cost of one behind it."""

    growth: float = 0.0
    text: Pace = field(default_factory=lambda: Pace(WORK_ERROR))
    decoding: Pace = field(default_factory=lambda: Pace(WORK_ERROR))

    def work(self, first: int, num_tokens: int) -> float:
        """Recomputing tokens [first, first + num_tokens), in tokens without a context."""
        return num_tokens * (1 + self.growth * (first + num_tokens / 2))

    def text_seconds(self, first: int, num_tokens: int, *, careful: bool = False) -> float:
        return self.text.seconds(self.work(first, num_tokens), careful=careful)

    def decode_seconds(self, num_tokens: int, *, careful: bool = False) -> float:
        """The same for any level: as many numbers come out."""
        return self.decoding.seconds(num_tokens, careful=careful)

    def learn_growth(self, near_seconds: float, far_seconds: float, far_first: int, num_tokens: int) -> None:
        """From the same tokens recomputed without a context and on top of one of `far_first`."""
        half = num_tokens / 2
        ratio = far_seconds / near_seconds
        # (1 + g (first + half)) / (1 + g half) = ratio
        self.growth = max((ratio - 1) / max(far_first + half - ratio * half, 1.0), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A chunk that waits for a processor: tokens [first, first + num_tokens) to recompute (text) or decode."""

    costs: Costs
    text: bool
    first: int
    num_tokens: int

    def seconds(self, *, careful: bool = False) -> float:
        if self.text:
            return self.costs.text_seconds(self.first, self.num_tokens, careful=careful)
        return self.costs.decode_seconds(self.num_tokens, careful=careful)


class Backlog:
    """What a processor has been given, one after the other, and has not done."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._began: float | None = None

    def add(self, task: Task) -> None:
        self._tasks.append(task)

    def begin(self, now: float) -> None:
        """The first is being worked on from now."""
        self._began = now

    def end(self) -> None:
        """The first is done."""
        self._tasks.popleft()
        self._began = None

    def seconds(self, now: float, *, careful: bool) -> float:
        """Until all is done, by what is known now."""
        left = [task.seconds(careful=careful) for task in list(self._tasks)]
        if left and (began := self._began) is not None:
            left[0] = max(left[0] - (now - began), 0.0)
        return sum(left)
