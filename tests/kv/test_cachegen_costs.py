"""What is believed of link and processor: margins of past errors, recomputing behind a context, what still waits."""

from __future__ import annotations

import pytest

from memwall.errors import InputError
from memwall.kv.cachegen_costs import REMEMBERED_ERRORS, Backlog, Costs, Pace, Task


def test_a_pace_is_the_last_measured_and_allows_for_the_largest_of_the_last_errors() -> None:
    pace = Pace(0.5)
    assert pace.seconds(10, careful=True) == 0  # nothing is known
    pace.saw(100, 10)
    assert (pace.per_s, pace.margin) == (10, 1.5)
    pace.saw(100, 30)  # 10 s were expected
    assert pace.margin == pytest.approx(3)
    assert pace.seconds(10, careful=False) == pytest.approx(3)
    assert pace.seconds(10, careful=True) == pytest.approx(9)
    pace.saw(100, 15)  # faster than expected: an error as well, if a smaller one
    assert pace.per_s == pytest.approx(100 / 15)
    for _ in range(REMEMBERED_ERRORS):
        pace.saw(100, 15)
    assert pace.margin == pytest.approx(1)


def test_a_pace_must_be_above_zero() -> None:
    with pytest.raises(InputError, match="more than zero"):
        Pace(0.0, 0.0)


def test_recomputing_costs_more_behind_a_longer_context() -> None:
    costs = Costs(growth=0.001, text=Pace(0.2, 100.0))
    assert costs.text_seconds(0, 100) == pytest.approx(1.05)
    assert costs.text_seconds(900, 100) == pytest.approx(1.95)
    parts = sum(costs.text_seconds(first, 100) for first in range(0, 1000, 100))
    assert costs.text_seconds(0, 1000) == pytest.approx(parts)


def test_growth_is_found_from_two_measurements() -> None:
    known, found = Costs(growth=0.002, text=Pace(0.0, 50.0)), Costs()
    found.learn_growth(known.text_seconds(0, 64), known.text_seconds(700, 64), 700, 64)
    assert found.growth == pytest.approx(0.002)
    found.learn_growth(1.0, 0.9, 700, 64)  # noise: a context makes nothing cheaper
    assert found.growth == 0
    found.learn_growth(1.0, 100.0, 10, 64)  # nor is a short context told from noise
    assert found.growth <= 99


def test_a_backlog_counts_what_waits_and_what_is_left_of_what_runs() -> None:
    costs = Costs(text=Pace(0.5, 10.0), decoding=Pace(1.0, 100.0))
    backlog = Backlog()
    assert backlog.seconds(0.0, careful=True) == 0
    backlog.add(Task(costs=costs, text=True, first=0, num_tokens=20))
    backlog.add(Task(costs=costs, text=False, first=20, num_tokens=20))
    assert backlog.seconds(5.0, careful=False) == pytest.approx(2.2)
    assert backlog.seconds(5.0, careful=True) == pytest.approx(3.4)
    backlog.begin(5.0)
    assert backlog.seconds(6.0, careful=False) == pytest.approx(1.2)
    assert backlog.seconds(9.0, careful=True) == pytest.approx(0.4)  # late: no less than nothing is left of it
    backlog.end()
    assert backlog.seconds(9.0, careful=False) == pytest.approx(0.2)
