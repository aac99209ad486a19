"""Iterations on a virtual clock: tokens are conserved, one engine is the engine's own replay, pipelines by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine import Sampling
from memwall.engine.arrivals import Load, drawn_lengths, gamma_gaps, timed
from memwall.engine.base import Limits
from memwall.engine.batchllm import BatchLLM
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.sequence import Request
from memwall.engine.simulated import Arrival, StepCost, VirtualClock, replay, simulated_engine
from memwall.errors import InputError
from memwall.simulate.blocks import BatchShape, StageTimes
from memwall.simulate.iterations import Batching, run_plan
from memwall.simulate.plans import CellPlan, ServingPlan


@dataclass
class Fixed:
    """A timer whose stages take what a function of the batches says."""

    plan: ServingPlan
    seconds: Any
    send: float = 0.0

    def step(self, batches: list[BatchShape]) -> StageTimes:
        return StageTimes([self.seconds(batches)] * self.plan.stages, self.send, 1.0, {"all": 1.0}, 1.0, 1.0)


def plan_of(replicas: int = 1, stages: int = 1, attention: int = 1) -> ServingPlan:
    return ServingPlan(
        replicas=replicas, stages=stages,
        cells=(
            CellPlan(replicas=attention, devices=1, template="heads"),
            CellPlan(replicas=1, devices=attention, template="filters"),
        ),
    )  # fmt: skip


SMALL = Limits(token_budget=64, max_sequences=6, page_tokens=16)


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 30), replicas=st.integers(1, 3), stages=st.integers(1, 3), attention=st.integers(1, 3),
    pages=st.integers(9, 40), rate=st.sampled_from([5.0, 500.0]), seed=st.integers(0, 99), batchllm=st.booleans(),
)  # fmt: skip
def test_every_request_gets_its_tokens(
    count: int, replicas: int, stages: int, attention: int, pages: int, rate: float, seed: int, batchllm: bool
) -> None:
    loads = timed(drawn_lengths(60, 20, count, seed), gamma_gaps(rate, 2.0, count, seed))
    timer = Fixed(plan_of(replicas, stages, attention), lambda batches: 0.001 * sum(one.tokens for one in batches))
    batching = Batching(scheduler=BatchLLM if batchllm else FirstComeFirstServed, limits=SMALL)
    run = run_plan(timer, pages * 16 * stages, loads, batching)  # type: ignore[arg-type]
    made = sum(load.output_tokens for load in loads)
    assert [one.tokens for one in run.requests] == [load.output_tokens for load in loads]
    assert len(run.gaps) == made - count
    assert all(gap > 0 for gap in run.gaps)
    assert all(one.arrival < one.first <= one.last <= run.finished_at for one in run.requests)
    # the last token of an answer is never computed; what was set aside is computed again
    needed = sum(load.prompt_tokens + load.output_tokens - 1 for load in loads)
    preempted = sum(run.preempted.values())
    assert run.computed_tokens == needed if not preempted else run.computed_tokens > needed
    assert preempted == sum(one.preemptions for one in run.requests)
    assert run.joules == run.steps


@pytest.mark.parametrize("pages", [12, 200])
def test_one_engine_is_the_engines_own_replay(pages: int) -> None:
    cost = StepCost(seconds=0.01, seconds_per_token=0.001, seconds_per_cached_token=0.0)
    loads = timed(drawn_lengths(60, 25, 25, 3), gamma_gaps(8.0, 2.0, 25, 3))
    timer = Fixed(plan_of(), lambda batches: 0.01 + 0.001 * batches[0].tokens)
    run = run_plan(timer, pages * 16, loads, Batching(limits=SMALL))  # type: ignore[arg-type]

    engine = simulated_engine(FirstComeFirstServed(), num_pages=pages, limits=SMALL, cost=cost)
    engine.pages.keep_prefixes = False
    assert isinstance(engine.clock, VirtualClock)
    seen: list[Any] = []
    submit = engine.submit

    def note(*arguments: Any) -> Any:
        seen.append(submit(*arguments))
        return seen[-1]

    engine.submit = note  # type: ignore[method-assign]
    arrivals = [
        Arrival(
            at=load.at or 0.0,
            request=Request(
                prompt=(0,) * load.prompt_tokens,
                sampling=Sampling(max_new_tokens=load.output_tokens, ignore_eos=True),
            ),
        )
        for load in loads
    ]
    replay(engine, engine.clock, arrivals)
    assert [one.last for one in run.requests] == pytest.approx([one.last_token for one in seen])
    assert [one.first for one in run.requests] == pytest.approx([one.first_token for one in seen])
    assert [one.preemptions for one in run.requests] == [one.preemptions for one in seen]
    assert run.steps == engine.totals.steps
    assert (sum(run.preempted.values()) > 0) == (pages == 12)


def test_a_full_pipeline_ends_an_iteration_with_every_stage_time() -> None:
    loads = [Load(at=0.0, prompt_tokens=4, output_tokens=10) for _ in range(4)]
    run = run_plan(Fixed(plan_of(stages=4), lambda _: 1.0), 10_000, loads, Batching())  # type: ignore[arg-type]
    # flight f enters at f, leaves at f + 4, and enters again at once: 10 iterations of 4 s behind its first entry
    assert [one.last for one in run.requests] == pytest.approx([f + 40.0 for f in range(4)])
    assert list(run.gaps) == pytest.approx([4.0] * 36)


def test_a_pipeline_with_one_flight_has_bubbles() -> None:
    loads = [Load(at=0.0, prompt_tokens=4, output_tokens=10)]
    timer = Fixed(plan_of(stages=4), lambda _: 1.0, send=0.5)
    run = run_plan(timer, 10_000, loads, Batching())  # type: ignore[arg-type]
    assert run.finished_at == pytest.approx(10 * (4 * 1.0 + 3 * 0.5))


def test_the_largest_of_each_window_bounds_uneven_flights() -> None:
    """The paper's rule: of S interleaved flights each window of S iterations moves at the pace of its slowest."""
    loads = [Load(at=0.0, prompt_tokens=4, output_tokens=20) for _ in range(2)]
    times = iter([1.0, 3.0] * 40)
    run = run_plan(Fixed(plan_of(stages=2), lambda _: next(times)), 10_000, loads, Batching())  # type: ignore[arg-type]
    windows = 40 * 3.0  # the largest of every two
    assert windows * 0.9 <= run.finished_at <= windows + 3.0 + 3.0


def test_attention_replicas_share_a_step_and_not_a_cache() -> None:
    loads = [Load(at=0.0, prompt_tokens=30, output_tokens=2) for _ in range(4)]
    seen: list[list[int]] = []

    def seconds(batches: list[BatchShape]) -> float:
        seen.append([one.tokens for one in batches])
        return 1.0

    run_plan(Fixed(plan_of(attention=2), seconds), 96, loads, Batching())  # type: ignore[arg-type]
    # 6 pages each, of which one is kept spare for each that runs: two requests of 2 pages in each of both
    assert seen[0] == [60, 60]
    assert seen[1] == [2, 2]


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(InputError, match="110 tokens does not fit the 96"):
        run_plan(Fixed(plan_of(), lambda _: 1.0), 100, [Load(at=0.0, prompt_tokens=100, output_tokens=10)], Batching())  # type: ignore[arg-type]


def test_what_is_of_no_more_interest_is_given_up() -> None:
    loads = [Load(at=0.0, prompt_tokens=4, output_tokens=100)]
    run = run_plan(Fixed(plan_of(), lambda _: 1.0), 1000, loads, Batching(), give_up_after=10.0)  # type: ignore[arg-type]
    assert run.given_up
    assert run.steps == 11
