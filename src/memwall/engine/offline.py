"""Runs a planned batch through an engine: requests enter in the order of the plan, a few steps before they can start.

The requests themselves are made when they enter (`request_of`), so that a batch costs its token ids and little more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memwall.engine.base import State, Step
from memwall.engine.batchllm import BatchPlan, Group
from memwall.engine.core import Engine
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Event, Request

LOOK_AHEAD = 4
"""Requests that wait, in steps' worth of tokens: a step admits no more requests than it computes tokens."""
MOST_POINTS = 256


@dataclass(slots=True)
class StepStatistics:
    """What steps did: tokens of each, and the bytes of held prefixes over time. Set it as an engine's observer."""

    page_bytes: int
    clock: Callable[[], float]
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    peak_prefix_bytes: int = 0
    peak_requests: int = 0
    curve: list[tuple[float, int]] = field(default_factory=list)
    _stride: int = 1
    _skipped: int = 0

    def __call__(self, state: State, step: Step) -> None:
        if not step.work:
            return
        if step.tokens >= len(self.counts):
            self.counts = np.concatenate([self.counts, np.zeros(step.tokens + 1 - len(self.counts), np.int64)])
        self.counts[step.tokens] += 1
        held = sum(view.pages for view in state.held) * self.page_bytes
        self.peak_prefix_bytes = max(self.peak_prefix_bytes, held)
        self.peak_requests = max(self.peak_requests, len(state.running) + len(step.admit))
        self._skipped += 1
        if self._skipped >= self._stride:
            self._skipped = 0
            self.curve.append((self.clock(), held))
            if len(self.curve) > MOST_POINTS:
                self.curve, self._stride = self.curve[::2], 2 * self._stride

    @property
    def steps(self) -> int:
        """Steps that computed something."""
        return int(self.counts.sum())

    @property
    def mean_tokens(self) -> float:
        """Tokens per step."""
        return float(self.counts @ np.arange(len(self.counts)) / self.steps) if self.steps else 0.0

    def percentile(self, share: float) -> int:
        """Tokens that so many of the steps (0 to 1) stay at or below."""
        return int(np.searchsorted(np.cumsum(self.counts), share * self.steps)) if self.steps else 0


class OfflineRun:
    """A batch on its way. `step` until `done`."""

    def __init__(
        self,
        engine: Engine,
        plan: BatchPlan,
        lengths: Sequence[int],
        request_of: Callable[[int], Request],
        expected: Callable[[int], int],
    ) -> None:
        """lengths: tokens of each prompt; expected: how many its answer will likely have."""
        self.engine = engine
        self.plan = plan
        self.lengths = lengths
        self.request_of = request_of
        self.expected = expected
        self.statistics = StepStatistics(engine.pages.pool.page_bytes, engine.clock)
        engine.observer = self.statistics
        self.numbers: dict[int, int] = {}
        self.prompts: dict[int, int] = {}
        self._coming = self._requests()
        self._all_in = False

    @property
    def done(self) -> bool:
        """Whether every prompt has its answer."""
        return self._all_in and not self.engine.busy

    def step(self) -> list[tuple[int, Event]]:
        """One step of the engine; events by prompt."""
        self._feed()
        events = []
        for event in self.engine.step():
            prompt = self.prompts.get(event.id)
            if prompt is not None:
                events.append((prompt, event))
                if event.finish is not None:
                    self._forget(event.id)
        return events

    def end(self, prompt: int) -> None:
        """Ends a prompt's answer where it is: nothing more is wanted of it."""
        number = self.numbers.get(prompt)
        if number is not None:
            self.engine.cancel(number)
            self._forget(number)

    def _forget(self, number: int) -> None:
        del self.numbers[self.prompts.pop(number)]

    def _feed(self) -> None:
        while not self._all_in and len(self.engine.waiting) < LOOK_AHEAD * self.engine.limits.token_budget:
            found = next(self._coming, None)
            if found is None:
                self._all_in = True
                return
            prompt, request = found
            number = self.engine.submit(request).id
            self.numbers[prompt], self.prompts[number] = number, prompt

    def _requests(self) -> Iterator[tuple[int, Request]]:
        for group in self.plan.groups:
            if not group.prefix:
                for member in group.members:
                    yield member, self._made(member)
                continue
            prefix = None
            for member in group.members:
                request = self._made(member)
                if prefix is None:
                    prefix = self.engine.submit(self._prefix(group, request)).id
                yield member, replace(request, prefix=prefix, base=group.base(len(request.prompt)))

    def _made(self, member: int) -> Request:
        request = self.request_of(member)
        # the order is the plan's: a priority of its own would tear a group apart
        return replace(request, priority=0, expected_tokens=len(request.prompt) + self.expected(member))

    def _prefix(self, group: Group, first: Request) -> Request:
        largest = max(self.lengths[m] - group.base(self.lengths[m]) + self.expected(m) for m in group.members)
        return Request(
            prompt=first.prompt[: group.prefix],
            members=len(group.members),
            sampling=Sampling(max_new_tokens=max(largest, 1)),
            salt=first.salt,
        )
