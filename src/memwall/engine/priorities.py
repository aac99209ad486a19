"""Who goes first, told anew every few steps: random and Markov traces, and a fair share by tokens served.

Source: FastSwitch, 2024, arXiv 2411.18424: priorities change with a frequency of f updates a step, by a trace that is
computed off-line. `random`: each update draws all of them. `markov`: a conversation that is likely to be served keeps
its priority more often than one that is not (temporal locality). The paper gives no transition matrix: here the levels
are equally likely, and the chance to keep one falls in a line from `keep` at the first to half of it at the last.

`LeastServed` computes priorities: whoever had the fewest tokens goes first. Source: Fairness in Serving Large Language
Models, Sheng 2024, arXiv 2401.00588 (virtual token counter: a made token weighs as two of a prompt; who comes back is
lifted to the least of those who are here).

A level is a whole number, lower first. All are functions of a seed and of what was served, so a run can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal, Protocol

from memwall.engine.sequence import Sequence
from memwall.errors import InputError

Pattern = Literal["random", "markov"]
LEVELS = 8
FREQUENCY = 0.04
"""Of the paper for a model of 8 billion weights: an update every 25 steps."""


class Priorities(Protocol):
    """Sets `Sequence.level`."""

    frequency: float

    def assign(self, update: int, requests: Iterable[Sequence]) -> None:
        """The levels of everyone from update number `update` on."""

    def served(self, one: Sequence, prompt_tokens: int, made_tokens: int) -> None:
        """Tokens were computed for a request."""


class Ranking:
    """When priorities are told: every 1 / frequency steps, and to newcomers at once."""

    def __init__(self, priorities: Priorities | None) -> None:
        self.priorities = priorities
        self.newcomers = False
        self._updates = -1

    def update(self, steps: int, requests: Iterable[Sequence]) -> bool:
        """Call it before each step; whether levels were told anew."""
        if self.priorities is None:
            return False
        number = int(steps * self.priorities.frequency + 1e-9)
        if number == self._updates and not self.newcomers:
            return False
        self._updates, self.newcomers = number, False
        self.priorities.assign(number, requests)
        return True

    def served(self, one: Sequence, first: int, made: bool) -> None:
        """Tokens from `first` to the computed ones are new; made: and a token came out."""
        if self.priorities is not None:
            self.priorities.served(one, max(min(one.computed, one.num_prompt) - first, 0), int(made))


class PriorityTrace:
    """See the top of the file. A conversation (a session, or a request without one) has one level in each update."""

    def __init__(
        self,
        pattern: Pattern,
        *,
        frequency: float = FREQUENCY,
        levels: int = LEVELS,
        keep: float = 0.9,
        seed: int = 0,
    ) -> None:
        if not 0 < frequency <= 1:
            raise InputError(f"frequency is {frequency}; it must be above 0 and at most 1 (an update every step)")
        if levels < 2 or not 0 <= keep <= 1:
            raise InputError(f"levels is {levels} and keep {keep}; they must be at least 2, and 0 to 1")
        self.pattern = pattern
        self.frequency = frequency
        self.levels = levels
        self.keep = keep
        self.seed = seed
        self._last: dict[str, tuple[int, int]] = {}

    def level(self, conversation: str, update: int) -> int:
        """The level of a conversation from an update on."""
        if self.pattern == "random":
            return self._draw(conversation, update).randrange(self.levels)
        at, level = self._last.get(conversation, (-1, 0))
        if at > update:
            at, level = -1, 0
        while at < update:
            at += 1
            draw = self._draw(conversation, at)
            kept = self.keep * (1 - level / (2 * (self.levels - 1)))
            if at == 0 or draw.random() >= kept:
                level = draw.randrange(self.levels)
        self._last[conversation] = (at, level)
        return level

    def assign(self, update: int, requests: Iterable[Sequence]) -> None:
        """See `Priorities`."""
        for one in requests:
            one.level = self.level(one.request.session or f"#{one.id}", update)

    def served(self, one: Sequence, prompt_tokens: int, made_tokens: int) -> None:
        """See `Priorities`: a trace does not care."""

    def _draw(self, conversation: str, update: int) -> random.Random:
        return random.Random(f"{self.seed}/{conversation}/{update}")


class LeastServed:
    """See the top of the file. A user is `Request.user`, else the session, else the request itself."""

    def __init__(self, *, frequency: float = FREQUENCY, made_weight: float = 2.0) -> None:
        if not 0 < frequency <= 1:
            raise InputError(f"frequency is {frequency}; it must be above 0 and at most 1 (an update every step)")
        self.frequency = frequency
        self.made_weight = made_weight
        self.tokens: dict[str, float] = {}

    def assign(self, update: int, requests: Iterable[Sequence]) -> None:
        """See `Priorities`. Whoever is no longer here is forgotten, and lifted when they come again."""
        everyone = list(requests)
        names = [self._user(one) for one in everyone]
        self.tokens = {name: self.tokens[name] for name in dict.fromkeys(names) if name in self.tokens}
        least = min(self.tokens.values(), default=0.0)
        for name in names:
            self.tokens.setdefault(name, least)
        order = {count: level for level, count in enumerate(sorted(set(self.tokens.values())))}
        for one, name in zip(everyone, names):
            one.level = order[self.tokens[name]]

    def served(self, one: Sequence, prompt_tokens: int, made_tokens: int) -> None:
        """See `Priorities`."""
        name = self._user(one)
        if name in self.tokens:
            self.tokens[name] += prompt_tokens + self.made_weight * made_tokens

    def _user(self, one: Sequence) -> str:
        return one.request.user or one.request.session or f"#{one.id}"


def make_priorities(name: str, *, frequency: float = FREQUENCY, seed: int = 0) -> Priorities | None:
    """By the name that commands use: `fair`, `random`, `markov`, or `fixed` for what requests say alone."""
    if name == "fair":
        return LeastServed(frequency=frequency)
    if name == "random" or name == "markov":
        return PriorityTrace("random" if name == "random" else "markov", frequency=frequency, seed=seed)
    if name == "fixed":
        return None
    raise InputError(f"no priorities are called {name!r}; there are fair, random, markov and fixed")
