"""Conversations that are held with an engine: each turn's prompt is all that was said before and something new.

The same loop drives an engine with a model on a real clock and a simulated one on a virtual clock. A turn is asked for
`think_seconds` after the answer before it. Times are seconds of the engine's clock, lengths are tokens.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memwall.engine.arrivals import gamma_gaps
from memwall.engine.core import Engine
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Event, Request
from memwall.engine.simulated import VirtualClock
from memwall.errors import InputError

TURNS_MEAN = 5.5
"""Of FastSwitch's load, 1,000 conversations of ShareGPT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation. turns: (new tokens of the prompt, tokens of the answer) of each. times: before which none of them
    comes, where a trace tells them.
    """

    start: float
    turns: tuple[tuple[int, int], ...]
    think_seconds: float = 1.0
    user: str | None = None
    times: tuple[float, ...] = ()


@dataclass(slots=True)
class Told:
    """What became of one turn. times: of its tokens; made: the tokens themselves."""

    chat: int
    turn: int
    asked: float
    prompt_tokens: int
    times: list[float] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    finish: str | None = None

    @property
    def first_token_seconds(self) -> float:
        """From the question to the first token."""
        return self.times[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def draw_chats(
    count: int,
    *,
    rate_per_s: float,
    lengths: Sequence[tuple[int, int]],
    most_tokens: int,
    turns_mean: float = TURNS_MEAN,
    think_seconds: float = 1.0,
    seed: int = 0,
) -> list[Chat]:
    """Poisson arrivals, a geometric number of turns, lengths drawn from the given pairs; a conversation ends before it
    holds more than `most_tokens`.
    """
    if turns_mean < 1:
        raise InputError(f"turns_mean is {turns_mean}; it must be at least 1")
    draw, chats = random.Random(seed), []
    for start in gamma_gaps(rate_per_s, 1.0, count, seed):
        turns: list[tuple[int, int]] = []
        left = most_tokens
        while not turns or draw.random() >= 1 / turns_mean:
            new, answer = draw.choice(lengths)
            if new + answer > left and turns:
                break
            new, answer = min(new, max(left - answer, 1)), min(answer, left - 1)
            turns.append((new, answer))
            left -= new + answer
        thinks = draw.expovariate(1 / think_seconds) if think_seconds else 0.0
        chats.append(Chat(start=start, turns=tuple(turns), think_seconds=thinks))
    return chats


def hold_chats(
    engine: Engine, chats: Sequence[Chat], *, vocabulary: int, seed: int = 0, idle_step: float = 1e-3
) -> list[Told]:
    """Holds them all; turns in the order in which they were asked. What is said depends on the seed and the answers."""
    started, clock = engine.clock(), engine.clock
    texts: list[list[int]] = [[] for _ in chats]
    draws = [random.Random(f"{seed}/{number}") for number in range(len(chats))]
    due = [(started + chat.start, number, 0) for number, chat in enumerate(chats)]
    heapq.heapify(due)
    told: list[Told] = []
    under_way: dict[int, Told] = {}
    while due or engine.busy:
        if not engine.busy:
            _pass(clock, due[0][0])
        while due and due[0][0] <= clock():
            at, number, turn = heapq.heappop(due)
            new, answer = chats[number].turns[turn]
            texts[number] += [draws[number].randrange(8, vocabulary) for _ in range(new)]
            request = Request(
                prompt=tuple(texts[number]),
                sampling=Sampling(max_new_tokens=answer, ignore_eos=True),
                session=f"chat {number}",
                user=chats[number].user,
            )
            one = Told(number, turn, at, len(request.prompt))
            under_way[engine.submit(request, at).id] = one
            told.append(one)
        steps = engine.totals.steps
        for event in engine.step():
            _note(event, under_way, chats, texts, due, started, clock())
        if engine.totals.steps == steps and engine.busy:
            _pass(clock, clock() + idle_step)
    return told


def _note(
    event: Event,
    under_way: dict[int, Told],
    chats: Sequence[Chat],
    texts: list[list[int]],
    due: list[tuple[float, int, int]],
    started: float,
    now: float,
) -> None:
    one = under_way[event.id]
    if event.token is not None:
        one.times.append(now)
        one.made.append(event.token)
    if event.finish is not None:
        one.finish = event.finish
        del under_way[event.id]
        texts[one.chat] += one.made
        chat, turn = chats[one.chat], one.turn + 1
        if turn < len(chat.turns):
            earliest = started + chat.times[turn] if chat.times else now
            heapq.heappush(due, (max(now + chat.think_seconds, earliest), one.chat, turn))


def _pass(clock: Callable[[], float], until: float) -> None:
    """Time goes on: by itself, or because it is told to."""
    if isinstance(clock, VirtualClock):
        clock.now = max(clock.now, until)
    else:
        time.sleep(max(until - clock(), 0.0))
