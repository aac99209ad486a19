"""Planning anew: on a clear shift and only then, and with the newest requests."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from memwall.errors import InputError
from memwall.simulate.distserve import Cluster, Degrees, Lengths, Limits, Plan, Search
from memwall.simulate.phase_models import PUBLISHED
from memwall.simulate.replan import Habits, Replanner


def load(count: int, rate: float, prompt: int, output: int, seed: int, at: float = 0.0) -> list[tuple[float, int, int]]:
    draw, found = random.Random(seed), []
    for _ in range(count):
        at += draw.expovariate(rate)
        found.append((at, draw.randint(prompt // 2, 3 * prompt // 2), draw.randint(output // 2, 3 * output // 2)))
    return found


def planner(lengths: Lengths, rate: float) -> Plan:
    """As many decode instances as there are tokens a second, in hundreds."""
    tokens = rate * sum(output for _, output in lengths) / len(lengths)
    one = Degrees(tensor=1)
    return Plan(prefill=one, decode=one, goodput=1.0, decode_instances=max(round(tokens / 100), 1))


def test_means_and_their_errors_by_hand() -> None:
    habits = Habits.of([(0.0, 10, 1), (1.0, 20, 3), (2.0, 30, 5), (3.0, 40, 7)])
    assert habits.means == (25.0, 4.0, 1.0)
    assert habits.errors[0] == pytest.approx(125**0.5 / 2)
    assert habits.errors[2] == pytest.approx(0.0)


def test_a_steady_load_is_planned_once_however_long_its_tail() -> None:
    watched, draw = Replanner(planner=planner, window=100), random.Random(1)
    at = 0.0
    for _ in range(3000):
        at += draw.expovariate(5.0)
        watched.observe(at, min(int(draw.lognormvariate(5, 1)), 8000), 50)
    assert watched.searches == 1
    assert len(watched.changes) == 1


@pytest.mark.parametrize(
    ("shift", "named"),
    [((20.0, 400, 50), "requests a second"), ((5.0, 400, 400), "output tokens"), ((5.0, 1600, 50), "prompt tokens")],
)
def test_a_shift_is_seen_within_two_windows_and_named(shift: tuple[float, int, int], named: str) -> None:
    watched = Replanner(planner=planner, window=100)
    before = load(500, 5.0, 400, 50, 1)
    after = load(300, *shift, seed=2, at=before[-1][0])
    for one in before:
        watched.observe(*one)
    assert watched.searches == 1
    for one in after[:200]:
        watched.observe(*one)
    assert watched.searches >= 2
    if named != "prompt tokens":  # which changes nothing in this planner's plan
        assert named in watched.changes[1].shifted
        assert watched.plan != watched.changes[0].plan


def test_the_real_search_answers_longer_prompts_with_more_for_prefill() -> None:
    search = Search(
        model=PUBLISHED["opt-13b"], cluster=Cluster(devices=4, per_node=4), lengths=[(1, 2)], requests=60,
        limits=Limits(first_token=0.4, per_token=0.1), fill=True, rate_most=30.0, rate_step=0.5,
    )  # fmt: skip
    watched = Replanner(planner=lambda lengths, rate: replace(search, lengths=lengths).apart(rate), window=50)
    short = load(60, 20.0, 150, 120, 1)
    for one in (*short, *load(120, 20.0, 1000, 120, 2, at=short[-1][0])):
        watched.observe(*one)
    first, last = watched.changes[0].plan, watched.changes[-1].plan
    assert len(watched.changes) >= 2

    def share(plan: Plan) -> float:
        return plan.prefill_instances * plan.prefill.devices / plan.devices

    assert share(last) > share(first)


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match="window of 5 requests"):
        Replanner(planner=planner, window=5)
