"""What APEX's verdicts hang on: orders with ties, errors, published figures read right, and claims without a clock."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memwall.cli.evidence import load_experiment
from memwall.simulate.iterations import Served
from memwall.simulate.plans import enumerate_plans
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("apex"))


def test_pairs_in_another_order(experiment: ModuleType) -> None:
    assert experiment.misordered([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == []
    assert experiment.misordered([1.0, 2.0, 3.0], [20.0, 10.0, 30.0]) == [(0, 1)]
    # what is measured within the tie has no order
    assert experiment.misordered([1.0, 1.04], [2.0, 1.0]) == []


def test_orders_need_more_than_drift_and_noise(experiment: ModuleType) -> None:
    drifting = [[1.0, 2.0, 4.0], [1.1, 2.2, 4.4], [1.02, 2.04, 4.08]]  # the third is within the tie of the first
    assert experiment.ordered(drifting) == [(0, 1), (2, 1)]
    assert experiment.ordered([[1.0, 1.0, 1.0], [1.5, 0.9, 1.1]]) == []  # a mean of 1.14, but one error from one
    assert experiment.ordered([[1.0], [2.0]]) == []
    # by hand: logarithms 0.1 and 0.3 have the mean 0.2 and the error 0.1, two of which it is from zero
    assert experiment.ordered([[1.0, 1.0], [math.exp(0.1), math.exp(0.3)]]) == []
    assert experiment.ordered([[1.0, 1.0], [math.exp(0.16), math.exp(0.24)]]) == [(0, 1)]


def test_orders_that_are_predicted_the_other_way(experiment: ModuleType) -> None:
    def outcomes(*rates: float) -> list[Any]:
        return [experiment.Outcome(total=1.0, first=1.0, per=1.0, whole=1.0, rate=rate) for rate in rates]

    rounds = [outcomes(1.0, 1.1, 1.0), outcomes(2.0, 2.2, 2.0), outcomes(2.01, 2.2, 2.0)]
    orders = experiment.Orders()
    orders.add("abc", "rate", rounds, outcomes(5.0, 6.0, 4.0))  # b and c are not apart; a and c are, the other way
    assert (orders.pairs, orders.apart, orders.wrong) == (3, 2, ["rate of a and c"])
    assert orders.claim("x", "y", 3).passed is False
    orders.wrong.clear()
    assert orders.claim("x", "y", 3).passed is False  # in the right order, but two are too few
    orders.add("abc", "rate", rounds, outcomes(4.0, 6.0, 5.0))
    assert (orders.apart, orders.wrong) == (4, [])
    assert orders.claim("x", "y", 3).passed is True
    assert orders.claim("x", "y", 1).passed is None


def test_outcomes_and_errors(experiment: ModuleType) -> None:
    served = [
        Served(arrival=0.0, prompt=9, output=3, first=1.0, last=3.0, tokens=3),
        Served(arrival=1.0, prompt=9, output=2, first=3.0, last=4.0, tokens=2),
    ]
    outcome = experiment.Outcome.of(served)
    assert (outcome.total, outcome.first, outcome.per, outcome.whole, outcome.rate) == (4.0, 1.5, 1.0, 3.0, 1.25)
    twice = dataclasses.replace(outcome, total=8.0, first=1.5, per=0.5)
    assert twice.errors(outcome) == [1.0, 0.0, -0.5]
    assert experiment.mean_error([1.0, 0.0, -0.5]) == 0.5
    assert experiment.Outcome.median([outcome, twice, outcome]) == outcome


def test_a_trillion_weights_are_that(experiment: ModuleType) -> None:
    model = experiment.trillion()
    assert 0.99e12 < model.parameters < 1.02e12
    assert len(list(enumerate_plans(model, 32))) > 100
    # OPT-13B and 66B by their published sizes
    assert experiment.opt("facebook/opt-13b").parameters == pytest.approx(12.85e9, rel=0.01)
    assert experiment.opt("facebook/opt-66b").parameters == pytest.approx(65.7e9, rel=0.01)


def test_published_latencies_are_read_as_they_were_fitted(experiment: ModuleType) -> None:
    fitted = {"prefill": [10.0, 0.1, 1e-5], "decoding_smallbs": [20.0, 0.001, 0.5]}
    found = {name: (shape, seconds) for name, shape, seconds in experiment.latencies(fitted)}
    assert found["prefill 512"][1] == pytest.approx((10 + 51.2 + 1e-5 * 512**2) / 1e3)
    assert found["decode 16"][1] == pytest.approx((20 + 0.001 * 16 * 512 + 0.5 * 16) / 1e3)
    assert found["decode 16"][0].cached == 16 * 512


def test_without_the_published_files_nothing_is_judged(experiment: ModuleType, tmp_path: Path) -> None:
    claims = list(experiment.published_claims(None)) + list(experiment.published_claims(tmp_path))
    assert [claim.verdict for claim in claims] == ["not run"] * 4


@pytest.mark.slow
def test_claims_without_a_clock_hold(experiment: ModuleType) -> None:
    assert experiment.depth_claim().passed
    assert experiment.energy_claim(experiment.QUICK).passed


def test_bursts_have_the_rate_that_was_asked(experiment: ModuleType) -> None:
    _, loads = experiment.bursty_loads(None, dataclasses.replace(experiment.QUICK, requests=400), 5.0)
    assert len(loads) / max(load.at for load in loads) == pytest.approx(5.0, rel=0.35)
