"""The scheduler of many adapters: nobody is set aside, order, clustering, early abort, and what it expects next."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine import Sampling
from memwall.engine.adapters import Adapters
from memwall.engine.base import AdapterView, Limits, Pace, RequestView, State, Step
from memwall.engine.core import Engine
from memwall.engine.s_lora import SLora, peak_pages
from memwall.engine.sequence import Request, Sequence
from memwall.engine.simulated import Arrival, SimulatedExecutor, StepCost, replay, simulated_engine
from memwall.errors import InputError

LIMITS = Limits(token_budget=64, max_sequences=8, page_tokens=16)
ONE_TOKEN = Limits(token_budget=64, max_sequences=8, page_tokens=1)


def view(number: int, *, known: int, to_come: int, computed: int = 0, adapter: str | None = None) -> RequestView:
    return RequestView(
        id=number, arrival=float(number), prompt=min(known, max(known - 1, 1)), known=known, computed=computed,
        most_tokens=known + to_come, adapter=adapter, pages=LIMITS.pages(computed),
    )  # fmt: skip


def decoding(number: int, known: int, to_come: int, adapter: str | None = None) -> RequestView:
    return view(number, known=known, to_come=to_come, computed=known - 1, adapter=adapter)


def admitted(scheduler: SLora, state: State, now: float = 100.0) -> list[int]:
    return list(scheduler.plan_step(state, now).admit)


def test_the_peak_is_the_papers_where_all_decode() -> None:
    running = [decoding(0, 100, 2), decoding(1, 1, 10), decoding(2, 30, 5)]
    # sorted by o: (1, 10), (30, 5), (100, 2): 1 + 10; 2 * 5 + 31; 3 * 2 + 131
    assert peak_pages(running, ONE_TOKEN) == max(11, 41, 137)


def test_a_prompt_under_way_may_still_hold_its_last_page_later() -> None:
    running = [decoding(0, 1, 10), view(1, known=640, to_come=2)]
    lockstep = 640 + 2 + 1 + 2
    late = -(-640 // 63)
    assert lockstep < peak_pages(running, ONE_TOKEN) <= 642 + 1 + min(2 + late, 10)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), pages=st.integers(70, 160), budget=st.sampled_from([16, 33, 64]))
def test_an_adversarial_mix_never_runs_out_of_pages(seed: int, pages: int, budget: int) -> None:
    draw = random.Random(seed)
    engine = simulated_engine(
        SLora(read_ahead=draw.randrange(4)), num_pages=pages, context_tokens=512,
        limits=Limits(token_budget=budget, max_sequences=8),
    )  # fmt: skip
    adapters = engine.adapters = Adapters(engine.pages)
    keys = [adapters.add_counted(f"a{i}", draw.choice([2, 4, 8, 16])) for i in range(9)]
    arrivals = []
    for number in range(40):
        prompt, most = draw.choice([(1, 200), (200, 1), (draw.randrange(1, 300), draw.randrange(1, 200))])
        one = Request(
            prompt=(number,) * prompt, sampling=Sampling(max_new_tokens=most, ignore_eos=True),
            adapter=draw.choice([None, *keys]),
        )  # fmt: skip
        arrivals.append(Arrival(at=draw.random(), request=one))
    replay(engine, engine.clock, arrivals)  # type: ignore[arg-type]
    assert engine.totals.finished == {"length": 40}
    assert not engine.totals.preempted
    assert engine.pages.pool.used_pages == engine.pages.idle_pages + adapters.used_pages
    adapters.offload()
    assert adapters.used_pages == adapters.idle_pages == 0


def adapter_state(**changes: object) -> State:
    views = tuple(AdapterView(name=name, pages=10, resident=name == "a") for name in "abcd")
    return replace(State(free_pages=100, total_pages=100, limits=LIMITS, adapters=views), **changes)  # type: ignore[arg-type]


def test_pages_of_adapters_count_once_each() -> None:
    waiting = tuple(view(n, known=160, to_come=160, adapter=name) for n, name in enumerate("aabbc"))
    # each request 20 pages at its end: 2 x 20 + 10; 3 x 20 + 20; 4 x 20 + 20; no more
    assert admitted(SLora(), adapter_state(waiting=waiting[:2], limits=replace(LIMITS, token_budget=999))) == [0, 1]
    assert admitted(SLora(), adapter_state(waiting=waiting, limits=replace(LIMITS, token_budget=999))) == [0, 1, 2, 3]
    one_less = adapter_state(waiting=waiting, total_pages=99, limits=replace(LIMITS, token_budget=999))
    assert admitted(SLora(), one_less) == [0, 1, 2]


def test_a_full_batch_prefers_the_adapters_it_has() -> None:
    running = (decoding(0, 20, 20, "a"), decoding(1, 20, 20, "b"))
    waiting = tuple(view(n, known=4, to_come=4, adapter=name) for n, name in ((2, "c"), (3, "b"), (4, None), (5, "a")))
    state = adapter_state(running=running, waiting=waiting, free_pages=80)
    assert admitted(SLora(), state) == [2, 3, 4, 5]
    assert admitted(SLora(most_adapters=2), state) == [3, 4, 5, 2]  # and then as they came
    tight = replace(state, limits=replace(LIMITS, max_sequences=4))
    assert admitted(SLora(most_adapters=2), tight) == [3, 4]


def test_adapters_of_those_that_wait_are_expected_as_far_as_pages_are_spare() -> None:
    running = tuple(decoding(n, 20, 12, "a") for n in range(8))  # 16 pages, and 10 of the adapter
    waiting = tuple(view(8 + n, known=4, to_come=4, adapter=name) for n, name in enumerate("bacbd"))
    state = adapter_state(running=running, waiting=waiting, free_pages=74, total_pages=26 + 25)
    assert SLora().plan_step(state, 0.0).prefetch == ("b", "c")
    assert SLora(read_ahead=1).plan_step(state, 0.0).prefetch == ("b",)
    assert SLora(read_ahead=0).plan_step(state, 0.0).prefetch == ()


def test_early_abort() -> None:
    waiting = tuple(replace(view(n, known=4, to_come=4), prompt=4) for n in range(8))
    begun = replace(waiting[0], known=9, prompt=4, id=99)
    state = adapter_state(waiting=(begun, *waiting), pace=Pace(arrived=3.0, admitted=1.0))
    step = SLora(abort=True).plan_step(state, now=8.0)
    assert step.abort == (0, 1, 2)  # waited 5.5 s and more; the one that has its first token stays
    assert step.admit == (7, 6, 5, 4, 3, 99)
    calm = replace(state, pace=Pace(arrived=0.5, admitted=1.0))
    assert SLora(abort=True).plan_step(calm, now=8.0).admit == (99, 3, 4, 5, 6, 7)
    assert SLora().plan_step(state, now=8.0).abort == ()


def served(engine: Engine, rate: float, seconds: float) -> tuple[float, Engine]:
    """Share of requests whose first token came within six seconds."""
    draw = random.Random(1)
    arrivals, at = [], 0.0
    while at < seconds:
        at += draw.expovariate(rate)
        one = Request(prompt=(3,) * 40, sampling=Sampling(max_new_tokens=20, ignore_eos=True))
        arrivals.append(Arrival(at=at, request=one))
    met = []

    class Watching(SimulatedExecutor):
        def forget(self, sequence: Sequence) -> None:
            met.append(sequence.first_token is not None and sequence.first_token - sequence.arrival <= 6.0)

    executor = engine.executor
    assert isinstance(executor, SimulatedExecutor)
    engine.executor = Watching(executor.clock, executor.cost)
    replay(engine, executor.clock, arrivals)
    return sum(met) / len(arrivals), engine


def test_abort_keeps_attainment_under_overload() -> None:
    def engine(scheduler: SLora) -> Engine:
        return simulated_engine(scheduler, num_pages=400, limits=LIMITS, cost=StepCost(seconds=0.05))

    kept, held = served(engine(SLora(abort=True)), rate=16.0, seconds=60.0)
    lost, _ = served(engine(SLora()), rate=16.0, seconds=60.0)
    assert held.totals.finished["aborted"] > 0
    assert kept > 2 * lost


def test_pure_and_checked() -> None:
    waiting = tuple(view(n, known=4, to_come=4, adapter="ab"[n % 2]) for n in range(4))
    state = adapter_state(waiting=waiting)
    steps: list[Step] = [SLora(most_adapters=1).plan_step(state, 1.0) for _ in range(2)]
    assert steps[0] == steps[1]
    with pytest.raises(InputError, match="most_adapters"):
        SLora(most_adapters=0)
