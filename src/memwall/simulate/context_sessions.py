"""Sessions of a long-context server on a virtual clock: who holds memory, who is swapped out, what waits for what.

Source: the workload of Fu 2024 (arXiv 2405.08944): a document, then rounds of question and answer; while a user reads,
the least recently used one's keys and values may leave for another's. `long_context_peak_analysis` has the formulas
that this is held against.
Idea: memory has C places; a user needs one to be served. A place that is taken over costs its owner's way out, and a
user who comes back the way in; a session that is over leaves nothing to take out.
Units and shapes: seconds; answers in tokens; swap_seconds is one way.
in_turn: documents are read one at a time and before answers, answers run as one batch, the link carries one user at a
time, as on one device. Else all go on side by side, each answer as slow as in a full batch: what the paper's formula
of sessions assumes.
Cost: an event per part of a service, each of at most C steps.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from memwall.errors import DoesNotFit, InputError
from memwall.memory.cache_policy import Lru
from memwall.simulate.long_context_peak_analysis import Analysis

Part = Literal["link", "prefill", "answer"]
WARM = 0.25
"""Share of the sessions that is over before counting begins."""
WAVES = 8
"""Least sessions of each place: users who begin together end together, so that rates of fewer are coarse."""
TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What parts of a service take; step_seconds(batch): of a decode step."""

    places: int
    prefill_seconds: float
    swap_seconds: float
    step_seconds: Callable[[float], float]
    answer: int
    rounds: int
    reading_seconds: float = 0.0

    @staticmethod
    def of(analysis: Analysis) -> Costs:
        """An analysis' own numbers; DoesNotFit where no user fits."""
        if analysis.users < 1:
            raise DoesNotFit(f"no user's keys and values fit beside the weights on {analysis.peak.name}")
        work = analysis.workload
        return Costs(
            places=int(analysis.users), prefill_seconds=analysis.prefill, swap_seconds=analysis.switch / 2,
            step_seconds=lambda batch: analysis.answer_seconds(batch) / work.answer, answer=work.answer,
            rounds=work.rounds, reading_seconds=work.reading_seconds,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came of it. sessions_per_s: after the warm beginning; most_held: users in memory at once; swaps: ways out
    and ways in of all sessions, a session.
    """

    sessions_per_s: float
    sessions: int
    seconds: float
    most_held: int
    swaps: float


@dataclass(slots=True)
class _User:
    stage: int = 0
    """0: the document; after that the question's number."""
    live: bool = False
    """Whether it has keys and values that are still wanted."""
    parts: deque[tuple[Part, float]] = field(default_factory=deque)
    """What is left of its service, in seconds, of answers in tokens."""


def simulate(costs: Costs, users: int, *, sessions: int | None = None, in_turn: bool = False, seed: int = 0) -> Served:
    """`users` users, one session after another, until `sessions` are over (unless given, enough for a steady rate).

    Reading takes an exponential time of mean `reading_seconds`.
    """
    if users < 1:
        raise InputError(f"{users} users: there must be one at least")
    wanted = sessions or max(400, 40 * min(users, costs.places), 4 * users)
    return _Server(costs, users, in_turn, seed).run(wanted)


class _Server:
    def __init__(self, costs: Costs, users: int, in_turn: bool, seed: int) -> None:
        self.costs, self.in_turn = costs, in_turn
        self.random = random.Random(seed)
        self.users = [_User() for _ in range(users)]
        self.policy = Lru(costs.places)
        self.held: set[int] = set()
        self.most_held = 0
        self.waiting: deque[int] = deque(range(users))
        self.active: dict[int, None] = {}
        """Users that are served, in the order in which they were taken."""
        self.reading: list[tuple[float, int]] = []
        self.now, self.done, self.swaps = 0.0, 0, 0
        self.full_batch = min(users, costs.places)

    def run(self, wanted: int) -> Served:
        wanted = max(wanted, WAVES * self.full_batch)
        warm, began = int(WARM * wanted), 0.0
        counted = wanted - warm
        while self.done < wanted:
            self._take()
            before = self.done
            self._advance()
            if before < warm <= self.done:
                began, counted = self.now, wanted - self.done
        seconds = self.now - began
        counted += self.done - wanted
        return Served(
            sessions_per_s=counted / seconds, sessions=self.done, seconds=self.now, most_held=self.most_held,
            swaps=self.swaps / self.done,
        )  # fmt: skip

    def _take(self) -> None:
        """Whoever waits gets a place, as long as not all of them are at work."""
        while self.waiting and len(self.active) < self.costs.places:
            number = self.waiting.popleft()
            user, ways = self.users[number], 0
            if number not in self.held:
                for busy in self.active:  # they are the newest, so that none of them leaves
                    self.policy.on_access(busy)
                ways = 1 if user.live else 0
                for victim in self.policy.on_access(number):
                    assert isinstance(victim, int)
                    self.held.discard(victim)
                    ways += self.users[victim].live
                self.held.add(number)
                self.most_held = max(self.most_held, len(self.held))
            else:
                self.policy.on_access(number)
            self.swaps += ways
            user.parts = deque([("link", ways * self.costs.swap_seconds)] if ways else [])
            if user.stage:
                user.parts.append(("answer", self.costs.answer))
            else:
                user.parts.append(("prefill", self.costs.prefill_seconds))
            self.active[number] = None

    def _rates(self) -> dict[int, float]:
        """Of each user that is served, how fast what it is at goes on: seconds, or tokens, a second."""
        at: dict[Part, list[int]] = {"link": [], "prefill": [], "answer": []}
        for number in self.active:
            at[self.users[number].parts[0][0]].append(number)
        if not self.in_turn:
            token = 1 / self.costs.step_seconds(self.full_batch)
            return {number: token if part == "answer" else 1.0 for part, all_of in at.items() for number in all_of}
        rates = {all_of[0]: 1.0 for part, all_of in at.items() if part != "answer" and all_of}
        if at["answer"] and not at["prefill"]:
            rates |= dict.fromkeys(at["answer"], 1 / self.costs.step_seconds(len(at["answer"])))
        return rates

    def _advance(self) -> None:
        """To the next time at which something ends."""
        rates = self._rates()
        left = {number: self.users[number].parts[0][1] / rate for number, rate in rates.items()}
        step = min(left.values(), default=float("inf"))
        if self.reading:
            step = min(step, max(self.reading[0][0] - self.now, 0.0))
        self.now += step
        for number, rate in rates.items():
            part, amount = self.users[number].parts[0]
            if left[number] <= step * (1 + TINY):
                self.users[number].parts.popleft()
                if not self.users[number].parts:
                    self._end(number)
            else:
                self.users[number].parts[0] = (part, amount - rate * step)
        while self.reading and self.reading[0][0] <= self.now:
            self.waiting.append(heapq.heappop(self.reading)[1])

    def _end(self, number: int) -> None:
        """A service is over: the user reads."""
        user = self.users[number]
        del self.active[number]
        self.policy.on_access(number)
        user.stage, user.live = user.stage + 1, True
        if user.stage > self.costs.rounds:
            user.stage, user.live = 0, False
            self.done += 1
        pause = self.costs.reading_seconds
        heapq.heappush(self.reading, (self.now + (self.random.expovariate(1 / pause) if pause else 0.0), number))
