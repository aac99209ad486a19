"""One trace through the engine with a model and through the simulator: the same decisions, step by step."""

from __future__ import annotations

import random

import pytest

from memwall.engine.base import Costs, State, Step
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import ServingSettings, load_engine
from memwall.engine.simulated import Arrival, SimulatedExecutor, StepCost, VirtualClock, replay, simulated_engine
from memwall.models import DEMO_DIRECTORY

COST = StepCost()
COSTS = Costs(seconds_per_token=1e-3, seconds_per_page=1e-3)


def arrivals() -> list[Arrival]:
    draw = random.Random(11)
    openings = [tuple(draw.randrange(3, 4000) for _ in range(40)) for _ in range(3)]
    found, at = [], 0.0
    for number in range(24):
        at += draw.expovariate(60.0)
        prompt = (*draw.choice(openings), *(draw.randrange(3, 4000) for _ in range(draw.randint(1, 60))))
        sampling = Sampling(max_new_tokens=draw.randint(20, 55), ignore_eos=True)
        found.append(Arrival(at=at, request=Request(prompt=prompt, sampling=sampling, priority=number % 5 == 0)))
    return found


class Timed:
    """A real executor whose steps take the time that the cost model says."""

    def __init__(self, inner: object, clock: VirtualClock) -> None:
        self.inner, self.clock = inner, clock

    def run(self, batch: list[Entry]) -> list[Output | None]:
        outputs: list[Output | None] = self.inner.run(batch)  # type: ignore[attr-defined]
        self.clock.now += COST.of(batch)
        # what was drawn must not matter to decisions: digests of made tokens would differ from the simulator's
        return [None if output is None else Output(0) for output in outputs]

    def forget(self, sequence: Sequence) -> None:
        self.inner.forget(sequence)  # type: ignore[attr-defined]


def decisions(engine: Engine, clock: VirtualClock) -> list[tuple[State, Step]]:
    seen: list[tuple[State, Step]] = []
    engine.observer = lambda state, step: seen.append((state, step))
    replay(engine, clock, arrivals())
    return seen


@pytest.mark.parametrize("swap", [False, True])
def test_engine_and_simulator_decide_alike(swap: bool) -> None:
    clock = VirtualClock()
    settings = ServingSettings(
        weights="int4", context_tokens=160, max_sequences=6, token_budget=64, threads=1, swap_bytes=(1 << 24) * swap
    )
    serving = load_engine(DEMO_DIRECTORY, settings, clock=clock)
    serving.engine.executor = Timed(serving.engine.executor, clock)
    serving.engine.costs, serving.engine._measures = COSTS, False
    serving.engine.wanted_pages = 16
    serving.engine.fit_limit()
    real = decisions(serving.engine, clock)
    simulated = simulated_engine(
        FirstComeFirstServed(),
        num_pages=16,
        page_bytes=serving.pool.page_bytes,
        limits=serving.engine.limits,
        context_tokens=160,
        swap_pages=serving.engine.swap.capacity_pages if serving.engine.swap is not None else 0,
        cost=COST,
        costs=COSTS,
    )
    assert isinstance(simulated.clock, VirtualClock)
    assert isinstance(simulated.executor, SimulatedExecutor)
    predicted = decisions(simulated, simulated.clock)
    assert [step for _, step in real] == [step for _, step in predicted]
    assert [state for state, _ in real] == [state for state, _ in predicted]
    assert sum(len(step.preempt) for _, step in real) >= 3
    assert {one.by for _, step in real for one in step.preempt} == {"swap" if swap else "recompute"}
    assert any(view.hit for state, _ in real for view in state.waiting)
    assert serving.engine.totals == simulated.totals
    serving.release()


def test_a_long_queue_is_looked_up_by_first_pages_and_sees_what_a_whole_lookup_does() -> None:
    draw = random.Random(5)
    openings = [tuple(draw.randrange(3, 4000) for _ in range(48)) for _ in range(3)]
    coming = [
        Arrival(
            at=0.002 * number,
            request=Request(
                prompt=((*draw.choice(openings),) if number % 3 == 0 else ()) + (number,) * draw.randint(5, 300),
                sampling=Sampling(max_new_tokens=draw.randint(2, 40), ignore_eos=True),
            ),
        )
        for number in range(60)
    ]
    engine = simulated_engine(FirstComeFirstServed(), num_pages=60, swap_pages=200, costs=COSTS)
    clock, find = engine.clock, engine.pages.find
    lookups = views = hits = 0

    def counted(digests: list[bytes]) -> list[int]:
        nonlocal lookups
        lookups += 1
        return find(digests)

    def compare(state: State, step: Step) -> None:
        nonlocal views, hits
        for view in state.waiting:
            one = engine.waiting[view.id]
            digests = one.digests_of(len(one.tokens) - 1, engine.pages.page_tokens)
            assert view.hit == len(find(digests)) * engine.pages.page_tokens
            views, hits = views + 1, hits + (view.hit > 0)

    engine.pages.find = counted  # type: ignore[method-assign, assignment]
    engine.observer = compare
    assert isinstance(clock, VirtualClock)
    replay(engine, clock, coming)
    assert engine.totals.finished["length"] == 60
    assert hits > 50
    assert lookups < views / 2
