"""semi-PD's controller: its models against the queue's own formula, its steps by hand, and how it settles."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.base import Limits, Shares, Window
from memwall.engine.semi_pd import SemiPD, fit_line, percentile
from memwall.errors import InputError
from tests.engine.phased_loads import HALVES, engine, lanes, load, served, state, window

CONTROLLER = SemiPD(first_seconds=0.3, token_seconds=0.03, least_requests=5)
SPREAD = math.log(10)
"""P90 of a time that is exponential, by its mean."""


def queue_window(x: int, rate: float, work: float, token: float = 0.01) -> Window:
    """What an M/M/1 queue shows: mu = x / (100 l100), TTFT = 1 / (mu - r) in the mean, and exponential."""
    first = SPREAD / (x / (100 * work) - rate)
    return Window(
        shares=Shares(prefill=x, decode=100 - x), seconds=100.0, arrived=round(100 * rate), prompts=round(100 * rate),
        prefill_seconds=100 * rate * work * 100 / x, first=(first,) * 5, token=(token * 100 / (100 - x) + 0.002,) * 5,
    )  # fmt: skip


def test_the_models_are_the_queues_own() -> None:
    windows = [queue_window(x, rate=2.0, work=0.1) for x in (40, 50, 70)]
    models = CONTROLLER.fit(windows)
    assert models.theta == pytest.approx(20.0)
    assert models.first.slope == pytest.approx(10.0 * SPREAD, rel=1e-6)
    assert models.first.floor == pytest.approx(0.0, abs=1e-6)
    assert models.first_seconds(60) == pytest.approx(SPREAD / (0.6 / 0.1 - 2.0))
    assert models.token.slope == pytest.approx(1.0)
    assert models.token_seconds(25) == pytest.approx(0.042)
    assert models.first_seconds(20) == float("inf")


def test_one_window_takes_the_slope_from_the_queue() -> None:
    models = CONTROLLER.fit([queue_window(50, rate=2.0, work=0.1)])
    assert models.first.slope == pytest.approx(10.0 * SPREAD)
    assert models.first_seconds(80) == pytest.approx(SPREAD / 6.0)


def test_after_a_change_of_rate_the_prediction_comes_right_within_a_few_windows() -> None:
    windows = [queue_window(x, rate=1.0, work=0.1) for x in (40, 60, 50)]
    errors = []
    for x in (50, 60, 70, 50, 60):
        new = queue_window(x, rate=2.5, work=0.1)
        errors.append(abs(CONTROLLER.fit(windows[-4:]).first_seconds(x) - new.first[0]))
        windows.append(new)
    assert errors[-1] < 0.2 * errors[0]


def adjusted(first: float, token: float, **told: object) -> object:
    controller = dataclasses.replace(CONTROLLER, cap=100, start=HALVES)
    seen = window(HALVES, first, token)
    return controller.adjust(lanes(HALVES, **{"windows": (seen,), "fresh": True, **told}))  # type: ignore[arg-type]


def test_it_moves_only_when_one_objective_is_missed() -> None:
    assert adjusted(0.1, 0.01) is None
    assert adjusted(0.9, 0.09) is None  # no room
    # l100 0.175 s, theta 35: by the queue's slope of 40 no share will do; tokens may take half of their 0.03 s
    assert adjusted(0.9, 0.008) == Shares(prefill=70, decode=30)  # at 20 they would take 0.02 s
    assert adjusted(0.9, 0.011) == Shares(prefill=60, decode=40)  # at 30 they would take 0.018 s
    assert adjusted(0.9, 0.02) is None
    assert adjusted(0.1, 0.04) is None  # theta is too near to take from prefill
    calm = dataclasses.replace(window(HALVES, 0.1, 0.04), prefill_seconds=0.1)
    assert adjusted(0.1, 0.04, windows=(calm,)) == Shares(prefill=30, decode=70)
    assert adjusted(0.9, 0.01, fresh=False) is None
    assert adjusted(0.9, 0.01, preparing=Shares(prefill=60, decode=40)) is None
    other = window(Shares(prefill=20, decode=80), 0.9, 0.01)
    assert adjusted(0.9, 0.01, windows=(other,)) is None  # it tells of other shares
    few = dataclasses.replace(window(HALVES, 0.9, 0.008), first=(0.9,) * 4)
    assert adjusted(0.9, 0.008, windows=(few,)) is None
    assert adjusted(0.9, 0.008, windows=(few, few)) == Shares(prefill=70, decode=30)  # both together are enough
    assert adjusted(0.9, 0.008, windows=(few, other, few)) is None


def test_prompts_that_wait_for_room_are_helped_by_decoding_faster() -> None:
    seen = dataclasses.replace(window(HALVES, 5.0, 0.01), prefill_seconds=0.4)
    assert CONTROLLER.blocked(seen)
    assert not CONTROLLER.blocked(dataclasses.replace(seen, prefill_seconds=4.9))
    assert not CONTROLLER.blocked(dataclasses.replace(seen, first=(0.1,)))
    assert adjusted(5.0, 0.01, windows=(seen,)) == Shares(prefill=40, decode=60)


def test_shares_above_the_whole_are_moved_by_raising_first() -> None:
    free = SemiPD(cap=200)
    assert free.moved(Shares(prefill=80, decode=100), "prefill") == Shares(prefill=90, decode=100)
    assert free.moved(Shares(prefill=100, decode=100), "prefill") == Shares(prefill=100, decode=90)
    tight = SemiPD(cap=180)
    assert tight.moved(Shares(prefill=80, decode=100), "prefill") == Shares(prefill=90, decode=90)
    assert tight.moved(Shares(prefill=100, decode=10), "prefill") == Shares(prefill=100, decode=10)


@settings(max_examples=200, deadline=None)
@given(
    x=st.integers(1, 100), y=st.integers(1, 100), slack=st.integers(0, 100), step=st.integers(1, 50),
    first=st.floats(0.01, 5), token=st.floats(0.001, 0.5), most=st.integers(1, 8),
)  # fmt: skip
def test_shares_stay_whole(x: int, y: int, slack: int, step: int, first: float, token: float, most: int) -> None:
    start = Shares(prefill=x, decode=y)
    cap = min(x + y + slack, 200)
    controller = SemiPD(cap=cap, start=start, step=step, most_steps=most)
    found = controller.adjust(lanes(start, windows=(window(start, first, token),), fresh=True))
    if found is None:
        return
    assert found.prefill + found.decode <= cap
    if found.prefill + found.decode >= 100:
        assert found.effective("prefill") + found.effective("decode") == pytest.approx(100)
    late_first = first > controller.first_seconds
    grew = "prefill" if late_first else "decode"
    assert found.of(grew) >= start.of(grew)  # type: ignore[arg-type]
    assert found.effective(grew) >= start.effective(grew)  # type: ignore[arg-type]


def test_under_a_steady_load_it_settles() -> None:
    start = Shares(prefill=20, decode=80)
    controller = SemiPD(first_seconds=0.15, token_seconds=0.03, cap=100, start=start)
    made = engine(controller, pages=2000, limits=Limits(token_budget=64, max_sequences=64), shares=start)
    seen: list[Shares] = []
    made.observer = lambda state, step: seen.append(step.shares) if step.shares is not None else None
    sequences, _ = served(made, load(400, 10.0))
    assert 1 <= len(seen) <= 8
    assert len(set(seen[-2:])) <= 2
    waits = [one.first_token - one.arrival for one in sequences[-150:] if one.first_token is not None]
    assert percentile(waits, 90) <= 0.2
    assert made.totals.finished == {"length": 400}


def test_small_parts() -> None:
    assert percentile([], 90) == 0
    assert percentile([3, 1, 2], 100) == 3
    assert percentile(list(range(1, 11)), 90) == 9
    line = fit_line([(1.0, 3.0), (2.0, 5.0)], slope=7.0)
    assert (line.slope, line.floor, line.error) == (2.0, 1.0, 0.0)
    assert fit_line([(2.0, 5.0), (2.0, 7.0)], slope=1.0).floor == 4.0
    assert fit_line([], slope=1.0).at(3.0) == 3.0
    step = SemiPD().plan_step(state(), 0.0)
    assert step.shares is None


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"first_seconds": 0.0}, "objectives of 0.0 s"),
        ({"percentile": 0}, "percentile is 0"),
        ({"step": 60}, "steps of 60 percent"),
        ({"cap": 120}, "cap of 120"),
    ],
)
def test_bad_settings(told: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SemiPD(**told)  # type: ignore[arg-type]
