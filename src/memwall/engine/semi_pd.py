"""semi-PD: prefill and decode computed apart by two workers, over one copy of the weights and one store of keys and
values, with shares of the compute that follow latency objectives.

Source: semi-PD: Towards Efficient LLM Serving via Phase-Wise Disaggregated Computation and Unified Storage, Hong 2025,
arXiv 2504.19867: unified memory manager 4.2, low-overhead switching 4.3, latency models and adjustment 4.4.

Idea: a prompt's wait and work follow a queue, TTFT(x) = a1 / (x - theta) + b1 with theta = 100 r l100 (r requests per
second, l100 seconds of prefill at the whole device), a token's time TPOT(y) = a2 / y + b2. Both are fitted to what was
observed under recent shares. When one objective is missed and the other is met, shares move a step at a time until the
model says that it will be met; when both are missed there is no room, and nothing moves.

Units and shapes: shares x, y in percent of the compute, x + y at most `cap` (above 100 they compete: x' = 100 x /
(x + y)); seconds. State in, step out; what was observed comes with the state (`Window`).

Differs from the paper: without two different shares in the windows a line has no slope, and then the queue's own is
taken (a1 = 100 l100, a2 from the last point). A step that by the model would use up more than half of the other
objective is not taken (`guard`), else a load that can just be served makes shares swing. Of requests that came before
the shares in force no time to the first token counts. Prompts that wait for sequences or pages that decoding holds,
while the prefill worker rests, are helped by decoding faster (`blocked`). When pages run out, whoever came last is set
aside. On the CPU a share is a quota of processor time.

Cost: one more set of activations per worker, and while shares change two more workers; no bytes moved.

Holds when: there are objectives to meet, and load stays alike for some windows. window, step and most_steps are not
told in the paper; these are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memwall.engine.base import Lanes, Phase, Shares, State, Step, Window
from memwall.engine.phases import plan_phases, with_shares
from memwall.errors import InputError

RELEASED = Shares(prefill=80, decode=100)
"""The released code's shares at the start."""
BLOCKED_BUSY, BLOCKED_TIMES = 0.6, 3.0
MOST_THETA = 95.0
GUARDED = 0.5
"""Of an objective, what a step towards the other phase may bring it to. The line over 1 / y does not see that answers
that take longer are more at a time, each of which makes the next iteration longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """latency = slope * feature + floor, seconds. error: mean distance of what it was fitted to."""

    slope: float
    floor: float
    error: float = 0.0

    def at(self, feature: float) -> float:
        """Predicted seconds."""
        return self.slope * feature + self.floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What the windows tell: TTFT over 1 / (x - theta), TPOT over 1 / y."""

    first: Line
    token: Line
    theta: float

    def first_seconds(self, percent: float) -> float:
        """Time to the first token when prefill has so much; infinite where prompts would pile up."""
        return self.first.at(1 / (percent - self.theta)) if percent > self.theta else float("inf")

    def token_seconds(self, percent: float) -> float:
        """Time per token when decode has so much."""
        return self.token.at(1 / percent)


@dataclass(frozen=True, slots=True, kw_only=True)
class SemiPD:
    """first_seconds, token_seconds: objectives that `percentile` of the requests shall meet. start: shares at the
    start. cap: the most of both together. step, most_steps: percent and steps of one adjustment. least_requests: shares
    are judged by so many. recent: windows that the models are fitted to.
    """

    first_seconds: float = 1.0
    token_seconds: float = 0.1
    percentile: float = 90.0
    start: Shares = RELEASED
    cap: int = 200
    step: int = 10
    most_steps: int = 10
    least_requests: int = 20
    recent: int = 4
    spare_pages: int = 1
    guard: bool = True

    def __post_init__(self) -> None:
        if not (self.first_seconds > 0 and self.token_seconds > 0):
            raise InputError(
                f"objectives of {self.first_seconds} s and {self.token_seconds} s; both must be above zero"
            )
        if not 0 < self.percentile <= 100:
            raise InputError(f"the percentile is {self.percentile}; it must be above 0 and at most 100")
        if self.recent < 1:
            raise InputError(f"models are fitted to {self.recent} windows; take at least 1")
        if not 1 <= self.step <= 50 or self.most_steps < 1:
            raise InputError(f"{self.most_steps} steps of {self.step} percent; take at least 1 step of 1 to 50")
        if not self.start.prefill + self.start.decode <= self.cap <= 200:
            raise InputError(
                f"shares of {self.start.prefill} and {self.start.decode} percent with a cap of {self.cap}; the cap "
                f"must be at least their sum and at most 200"
            )

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        assert state.lanes is not None
        return with_shares(plan_phases(state, self.spare_pages), self.adjust(state.lanes))

    def adjust(self, lanes: Lanes) -> Shares | None:
        """New shares, where one objective is missed and the other is met (section 4.4); one switch at a time."""
        windows = [window for window in lanes.windows if window.first or window.token][-self.recent :]
        if not lanes.fresh or lanes.preparing is not None or not lanes.windows:
            return None
        last = self.latest(lanes)
        if last is None:
            return None
        first, token = self.observed(last)
        late: tuple[bool, bool] = (first > self.first_seconds, token > self.token_seconds)
        if late[0] == late[1]:
            return None
        if late[0] and self.blocked(last):
            found = self.moved(lanes.shares, "decode")
        else:
            found = self._search(lanes.shares, "prefill" if late[0] else "decode", self.fit(windows))
        return None if found == lanes.shares else found

    def latest(self, lanes: Lanes) -> Window | None:
        """The newest windows under the shares in force as one, as many as have `least_requests` of both latencies; a
        percentile of a few would be their largest. None where there are too few.
        """
        found: list[Window] = []
        for window in reversed(lanes.windows):
            if window.shares != lanes.shares:
                return None
            found.append(window)
            if all(sum(len(each) for each in some) >= self.least_requests
                   for some in ([one.first for one in found], [one.token for one in found])):  # fmt: skip
                return _joined(found[::-1])
        return None

    def observed(self, window: Window) -> tuple[float, float]:
        """The percentiles of a window; zero where nobody tells."""
        return percentile(window.first, self.percentile), percentile(window.token, self.percentile)

    @property
    def spread(self) -> float:
        """How many times the mean the percentile of a time in M/M/1 is: that time is exponential."""
        return -math.log(max(1 - self.percentile / 100, 1e-3))

    def blocked(self, window: Window) -> bool:
        """Whether prompts wait for room that decoding holds rather than for compute: the prefill worker rested, and
        still they waited far longer than its queue explains (the wait of M/M/1 is exponential).
        """
        busy = window.prefill_seconds / window.seconds if window.seconds > 0 else 1.0
        if busy > BLOCKED_BUSY or not window.prompts:
            return False
        explained = window.prefill_seconds / window.prompts / (1 - busy) * self.spread
        return percentile(window.first, self.percentile) > BLOCKED_TIMES * explained

    def fit(self, windows: Sequence[Window]) -> Models:
        """Least squares over the windows, each with the theta of its own rate; the newest two tell the rate to come."""
        first = [
            (
                1 / max(window.shares.effective("prefill") - _theta([window]), 1.0),
                percentile(window.first, self.percentile),
            )
            for window in windows
            if window.first
        ]
        token = [
            (1 / window.shares.effective("decode"), percentile(window.token, self.percentile))
            for window in windows
            if window.token
        ]
        own = token[-1][1] / token[-1][0] if token else 0.0
        return Models(
            first=fit_line(first, slope=self.spread * 100 * _work_seconds(windows[-2:])),
            token=fit_line(token, slope=own),
            theta=_theta(windows[-2:]),
        )

    def _search(self, shares: Shares, phase: Phase, models: Models) -> Shares:
        """Steps towards one phase until the model says that its objective is met."""
        found = shares
        for _ in range(self.most_steps):
            moved = self.moved(found, phase)
            if moved == found:
                break
            x, y = moved.effective("prefill"), moved.effective("decode")
            other = models.token_seconds(y) if phase == "prefill" else models.first_seconds(x)
            if self.guard and other > GUARDED * (self.token_seconds if phase == "prefill" else self.first_seconds):
                break
            found = moved
            own = models.first_seconds(x) if phase == "prefill" else models.token_seconds(y)
            if own <= (self.first_seconds if phase == "prefill" else self.token_seconds):
                break
        return found

    def moved(self, shares: Shares, phase: Phase) -> Shares:
        """One step towards a phase; the other gives way where its own share is whole or both would pass the cap."""
        own, other = shares.of(phase), shares.of("decode" if phase == "prefill" else "prefill")
        if own < 100:
            own = min(own + self.step, 100)
            other = max(min(other, self.cap - own), min(other, self.step))
        else:
            other = max(other - self.step, min(other, self.step))
        if own + other > self.cap:  # the other keeps its last step
            return shares
        return Shares(prefill=own, decode=other) if phase == "prefill" else Shares(prefill=other, decode=own)


def _joined(windows: Sequence[Window]) -> Window:
    """Several under the same shares as one."""
    return Window(
        shares=windows[-1].shares, seconds=sum(one.seconds for one in windows),
        arrived=sum(one.arrived for one in windows), prompts=sum(one.prompts for one in windows),
        prefill_seconds=sum(one.prefill_seconds for one in windows),
        first=tuple(each for one in windows for each in one.first),
        token=tuple(each for one in windows for each in one.token),
    )  # fmt: skip


def _work_seconds(windows: Sequence[Window]) -> float:
    """l100: a prompt's seconds at the whole device."""
    prompts = sum(window.prompts for window in windows)
    used = sum(window.prefill_seconds * window.shares.effective("prefill") / 100 for window in windows)
    return used / prompts if prompts else 0.0


def _theta(windows: Sequence[Window]) -> float:
    """theta = 100 r l100, percent."""
    seconds = sum(window.seconds for window in windows)
    rate = sum(window.arrived for window in windows) / seconds if seconds > 0 else 0.0
    return min(100 * rate * _work_seconds(windows), MOST_THETA)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(max(int(-(-len(ordered) * percent // 100)) - 1, 0), len(ordered) - 1)]


def fit_line(points: Sequence[tuple[float, float]], *, slope: float) -> Line:
    """Least squares; with one feature only, or a slope that falls, the given slope through the mean. The floor is not
    below zero: a queue that has not yet built up would make the line promise times that no share can keep.
    """
    if not points:
        return Line(slope=slope, floor=0.0)
    x, y = sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)
    spread = sum((p[0] - x) ** 2 for p in points)
    if spread > 1e-12 * x * x:
        fitted = sum((p[0] - x) * (p[1] - y) for p in points) / spread
        slope = fitted if fitted > 0 else slope
    line = Line(slope=slope, floor=max(y - slope * x, 0.0))
    error = sum(abs(line.at(p[0]) - p[1]) for p in points) / len(points)
    return Line(slope=line.slope, floor=line.floor, error=error)
