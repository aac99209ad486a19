"""Loads and figures by which schedulers of two phases are compared, on a virtual clock or a real one."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memwall.engine.core import Engine
from memwall.engine.sampling import Sampling
from memwall.engine.semi_pd import percentile
from memwall.engine.sequence import Event, Request
from memwall.engine.sequence import Sequence as Served
from memwall.engine.simulated import Arrival, VirtualClock, replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Log-normal lengths by their medians and means, in tokens."""

    prompt: tuple[float, float]
    output: tuple[float, float]
    most: tuple[int, int] = (16384, 1024)

    def draw(self, source: random.Random, scale: float = 1.0) -> tuple[int, int]:
        """Tokens of a prompt and of its answer; scale: of both."""
        found = []
        for (median, mean), most in zip((self.prompt, self.output), self.most):
            value = source.lognormvariate(math.log(median), math.sqrt(2 * math.log(mean / median)))
            found.append(max(round(scale * min(value, most)), 1))
        return found[0], found[1]


# medians and means of Nexus' Table of workloads (arXiv 2507.06608)
SHAREGPT = Lengths(prompt=(432, 496), output=(37, 97))
LONG = Lengths(prompt=(5461, 5905), output=(159, 180))
ARXIV = Lengths(prompt=(3575, 3832), output=(181, 200))


def arrivals(
    lengths: Sequence[tuple[Lengths, float]], rate: float, count: int, seed: int, *, scale: float = 1.0, at: float = 0.0
) -> list[Arrival]:
    """A Poisson process from `at` on. lengths: kinds and how often each comes, in shares that sum to 1."""
    source, found = random.Random(seed), []
    for number in range(count):
        at += source.expovariate(rate)
        kind = source.choices([kind for kind, _ in lengths], [share for _, share in lengths])[0]
        prompt, output = kind.draw(source, scale)
        # all different: no beginnings to share
        tokens = (3 + seed % 97, 3 + number % 3000, 3 + number // 3000, *((3 + number % 997,) * prompt))[:prompt]
        sampling = Sampling(max_new_tokens=output, ignore_eos=True)
        found.append(Arrival(at=at, request=Request(prompt=tokens, sampling=sampling)))
    return found


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of each request: to the first token, and per further token (of those that made more than one)."""

    first: list[float]
    token: list[float]
    both: list[tuple[float, float]]
    seconds: float

    @classmethod
    def of(cls, served: Sequence[Served], seconds: float) -> Figures:
        """Of requests that are over."""
        both = []
        for one in served:
            assert one.first_token is not None
            assert one.last_token is not None
            token = (one.last_token - one.first_token) / max(one.num_made - 1, 1)
            both.append((one.first_token - one.arrival, token))
        tokens = [pair[1] for pair, one in zip(both, served) if one.num_made > 1]
        return cls([pair[0] for pair in both], tokens, both, seconds)

    def attained(self, first: float, token: float) -> float:
        """Share of requests that met both objectives."""
        return sum(a <= first and b <= token for a, b in self.both) / len(self.both)

    def first_at(self, percent: float) -> float:
        """A percentile of the time to the first token."""
        return percentile(self.first, percent)

    def token_at(self, percent: float) -> float:
        """A percentile of the time per token."""
        return percentile(self.token, percent)

    @property
    def first_mean(self) -> float:
        """Mean seconds to the first token."""
        return sum(self.first) / len(self.first)

    @property
    def token_mean(self) -> float:
        """Mean seconds per token."""
        return sum(self.token) / max(len(self.token), 1)


def serve_all(engine: Engine, coming: Sequence[Arrival], between: Callable[[], None] | None = None) -> Figures:
    """Replays a load and waits for its end. between: called before each step of a real clock."""
    served: list[Served] = []
    if isinstance(engine.clock, VirtualClock):
        submit = engine.submit

        def watch(request: Request, arrival: float | None = None, number: int | None = None) -> Served:
            served.append(submit(request, arrival, number))
            return served[-1]

        engine.submit = watch  # type: ignore[method-assign]
        try:
            replay(engine, engine.clock, coming)
        finally:
            engine.submit = submit  # type: ignore[method-assign]
        return Figures.of(served, engine.clock.now)
    return _serve_now(engine, coming, between)


def _serve_now(engine: Engine, coming: Sequence[Arrival], between: Callable[[], None] | None) -> Figures:
    began, left, served = engine.clock(), sorted(coming, key=lambda arrival: arrival.at), []
    events: list[Event] = []
    while left or engine.busy:
        now = engine.clock()
        while left and began + left[0].at <= now:
            arrival = left.pop(0)
            served.append(engine.submit(arrival.request, began + arrival.at))
        engine.wakes_at = began + left[0].at if left else None
        if engine.busy:
            if between is not None:
                between()
            events += engine.step()
        else:
            time.sleep(max(began + left[0].at - engine.clock(), 0.0))
    return Figures.of(served, engine.clock() - began)


def r_squared(points: Sequence[tuple[float, float]]) -> float:
    """Of the line that fits best; 1 is a line."""
    count = len(points)
    mx, my = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    sxx = sum((x - mx) ** 2 for x, _ in points)
    syy = sum((y - my) ** 2 for _, y in points)
    sxy = sum((x - mx) * (y - my) for x, y in points)
    return sxy * sxy / (sxx * syy) if sxx > 0 and syy > 0 else 0.0
