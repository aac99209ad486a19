"""Engines with two workers, and loads for them, that several tests share."""

from __future__ import annotations

import random
from typing import Any

from memwall.engine.base import Lanes, Limits, RequestView, Scheduler, Shares, State, Window, Work
from memwall.engine.phase_device import Device, ModelSize, virtual_engine
from memwall.engine.phased import PhasedEngine
from memwall.engine.phases import Split
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Event, Request, Sequence
from memwall.engine.simulated import Arrival, VirtualClock, replay

SIZE = ModelSize(parameters=10**9, weight_bytes=2 * 10**9, kv_bytes=65536, attention_flop=4 * 24 * 2048)
DEVICE = Device(flop_per_s=2e13, bytes_per_s=4e11, seconds=5e-4)
HALVES = Shares(prefill=50, decode=50)
LIMITS = Limits(token_budget=64, max_sequences=8, page_tokens=16)


def load(count: int, rate: float, *, seed: int = 1, prompt: int = 200, output: int = 40) -> list[Arrival]:
    draw, at, found = random.Random(seed), 0.0, []
    for number in range(count):
        at += draw.expovariate(rate)
        tokens = tuple(draw.randrange(3, 4000) for _ in range(draw.randint(1, 2 * prompt)))
        sampling = Sampling(max_new_tokens=draw.randint(1, 2 * output), ignore_eos=True)
        found.append(Arrival(at=at, request=Request(prompt=tokens, sampling=sampling, priority=number % 7 == 0)))
    return found


def engine(
    scheduler: Scheduler | None = None, *, pages: int = 400, limits: Limits = LIMITS, **more: Any
) -> PhasedEngine:
    shares = more.pop("shares", HALVES)
    return virtual_engine(
        scheduler or Split(), device=DEVICE, size=SIZE, shares=shares, num_pages=pages, limits=limits, **more
    )


def served(made: PhasedEngine, arrivals: list[Arrival]) -> tuple[list[Sequence], list[Event]]:
    """All requests of a trace, when they are over."""
    found: list[Sequence] = []
    submit = made.submit

    def watch(*told: Any) -> Sequence:
        found.append(submit(*told))
        return found[-1]

    made.submit = watch  # type: ignore[method-assign]
    assert isinstance(made.clock, VirtualClock)
    events = replay(made, made.clock, arrivals)
    return found, events


def view(number: int, *, known: int, computed: int = 0, prompt: int | None = None) -> RequestView:
    return RequestView(
        id=number, arrival=float(number), prompt=known if prompt is None else prompt, known=known, computed=computed,
        most_tokens=known + 50, pages=LIMITS.pages(computed), freeable=LIMITS.pages(computed),
    )  # fmt: skip


def decoding(number: int, known: int) -> RequestView:
    return view(number, known=known, computed=known - 1, prompt=known - 1)


def lanes(shares: Shares = HALVES, *, flying: tuple[int, ...] = (), **more: Any) -> Lanes:
    return Lanes(shares=shares, flying=tuple(Work(id=number, tokens=1) for number in flying), **more)


def state(**told: Any) -> State:
    return State(**{"free_pages": 100, "total_pages": 100, "limits": LIMITS, "lanes": lanes(), **told})


def window(shares: Shares, first: float, token: float, *, requests: int = 10, rate: float = 2.0) -> Window:
    return Window(
        shares=shares, seconds=requests / rate, arrived=requests, prompts=requests,
        prefill_seconds=0.7 * requests / rate, first=(first,) * requests, token=(token,) * requests,
    )  # fmt: skip
