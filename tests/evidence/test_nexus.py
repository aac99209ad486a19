"""What Nexus' verdicts hang on: errors of the model, loads, and an ablation that differs in one thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.engine.base import Shares
from memwall.engine.phase_costs import Costs, Demand
from memwall.engine.phase_profile import Probe, profile
from memwall.engine.phases import Split
from memwall.systems import find_system


@pytest.fixture(scope="module")
def nexus() -> ModuleType:
    return load_experiment(find_system("nexus"))


@pytest.fixture(scope="module")
def costs(nexus: ModuleType) -> Costs:
    return profile(nexus.virtual(Split()), nexus.SIZE)


def test_errors_are_those_of_the_prediction(nexus: ModuleType, costs: Costs) -> None:
    point = ([(0, 512)], [(400, 1)] * 4, 50)
    demand = Demand.of(point[0], [401] * 4)
    exact = (*point, costs.decode(demand, 0.5, 0.5))
    with_it, without = nexus.model_errors(costs, [exact])
    assert with_it == pytest.approx(0.0)
    assert without > 0


def test_measured_costs_hold_on_the_virtual_device(nexus: ModuleType, costs: Costs) -> None:
    probe = Probe(nexus.virtual(Split()))
    for percent in (30, 60):
        demand = Demand.of([(2000, 1500)], [801] * 16)
        assert costs.prefill(demand, percent / 100) == pytest.approx(
            probe.alone("prefill", [(2000, 1500)], percent), rel=0.1
        )
        pair = Shares(prefill=percent, decode=100 - percent)
        beside = probe.beside([(2000, 1500)], [(800, 1)] * 16, pair)
        assert costs.decode(demand, 1 - percent / 100) == pytest.approx(beside, rel=0.15)


def test_a_trace_gives_the_lengths(nexus: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n10,3\n20,4\n")
    load = nexus.drawn(nexus.QUICK, nexus.MIXED, 2.0, 1, path)
    assert [(len(one.request.prompt), one.request.sampling.max_new_tokens) for one in load] == [(11, 3), (21, 4)]


def test_the_ablation_differs_in_the_order_alone(nexus: ModuleType, costs: Costs) -> None:
    made = replace(nexus.InOrder(costs=costs), gamma=1.0)
    assert made.costs is costs
    load = nexus.drawn(replace(nexus.QUICK, requests=12), nexus.MIXED, 2.0, 1, None)
    engine = nexus.virtual(made)
    assert len(nexus.serve_all(engine, load).first) == 12
