"""NanoFlow's batches: the predicted peak against stepping through the future, full batches, who is let in or swaps."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.base import Limits, RequestView, State
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.nanoflow import NanoFlow, peak_pages
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.engine.simulated import Arrival, VirtualClock, replay, simulated_engine
from memwall.errors import InputError

LIMITS = Limits(token_budget=64, max_sequences=32, page_tokens=16)


def load(count: int, *, seed: int = 1, expected: bool = True) -> list[Arrival]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = tuple(draw.randrange(3, 4000) for _ in range(draw.randint(20, 200)))
        output = draw.randint(5, 60)
        request = Request(
            prompt=prompt,
            sampling=Sampling(max_new_tokens=output, ignore_eos=True),
            expected_tokens=len(prompt) + output if expected else 0,
        )
        found.append(Arrival(at=0.0, request=request))
    return found


def steps_of(scheduler: Any, arrivals: list[Arrival], **told: Any) -> tuple[list[int], Any]:
    """Tokens of the steps after which somebody still waited (0 of the others), and the engine."""
    made = simulated_engine(scheduler, **{"num_pages": 400, "limits": LIMITS, "swap_pages": 400, **told})
    tokens: list[int] = []
    made.observer = lambda state, step: tokens.append(step.tokens if len(state.waiting) > len(step.admit) else 0)
    clock = made.clock
    assert isinstance(clock, VirtualClock)
    replay(made, clock, arrivals)
    return tokens, made


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 80)), min_size=1, max_size=12))
def test_the_predicted_peak_covers_every_moment_and_no_more_than_a_page_each(requests: list[tuple[int, int]]) -> None:
    def held(at: int) -> int:
        return sum(-(-(tokens + at) // 16) for tokens, left in requests if left >= at)

    truth = max(held(at) for at in range(max(left for _, left in requests) + 1))
    assert truth <= peak_pages(requests, 16) <= truth + len(requests)


def test_the_peak_by_hand() -> None:
    # both go on for 16 tokens: 4 + 2 pages; then the second is done and the first grows to 6 alone
    assert peak_pages([(48, 48), (16, 16)], 16) == (48 + 16 + 2 * 16) // 16 + 2
    assert peak_pages([], 16) == 0


def test_batches_are_full_to_the_last_token_while_requests_wait() -> None:
    tokens, engine = steps_of(NanoFlow(), load(60))
    assert {count for count in tokens if count} == {64}
    assert len([count for count in tokens if count]) > 50
    assert engine.totals.finished["length"] == 60
    assert not engine.totals.preempted


def test_who_is_predicted_not_to_fit_waits_and_nobody_is_set_aside() -> None:
    _, without = steps_of(FirstComeFirstServed(spare_pages=0), load(60), num_pages=60)
    _, engine = steps_of(NanoFlow(), load(60), num_pages=60)
    assert sum(without.totals.preempted.values()) > 0
    assert sum(engine.totals.preempted.values()) == 0
    assert engine.totals.finished["length"] == 60


def test_a_wrong_prediction_swaps_and_computes_nothing_again() -> None:
    _, engine = steps_of(NanoFlow(mean_output=1), load(60, expected=False), num_pages=60)
    assert engine.totals.preempted["swap"] > 0
    assert engine.totals.preempted["recompute"] == 0
    assert engine.totals.finished["length"] == 60


def test_decoding_goes_before_prompts_and_one_alone_is_let_in() -> None:
    def view(number: int, known: int, computed: int, prompt: int) -> RequestView:
        return RequestView(
            id=number, arrival=float(number), prompt=prompt, known=known, computed=computed, most_tokens=known + 9,
            pages=-(-computed // 16), freeable=-(-computed // 16),
        )  # fmt: skip

    limits = Limits(token_budget=8, max_sequences=8, page_tokens=16)
    state = State(
        running=(view(0, 100, 16, 100), view(1, 20, 19, 10), view(2, 30, 29, 10)), waiting=(view(3, 50, 0, 50),),
        free_pages=50, total_pages=60, limits=limits,
    )  # fmt: skip
    step = NanoFlow().plan_step(state, 0.0)
    assert {one.id: one.tokens for one in step.work} == {0: 6, 1: 1, 2: 1}
    huge = State(waiting=(view(0, 400, 0, 400),), free_pages=5, total_pages=5, limits=limits)
    assert NanoFlow().plan_step(huge, 0.0).admit == (0,)


@pytest.mark.parametrize("wrong", [{"mean_output": 0}, {"most_memory": 0}, {"most_memory": 1.5}])
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be above 0"):
        NanoFlow(**wrong)
