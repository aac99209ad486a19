"""The search: order, what it gives up, energy, the estimator that looks at no iteration, and metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memwall.engine.arrivals import drawn_lengths, gamma_gaps, timed
from memwall.errors import DoesNotFit, InputError
from memwall.hardware import load_machine
from memwall.simulate import report
from memwall.simulate.apex import Case, heuristic_plan, search, simulate, static_estimate
from memwall.simulate.base import Device, Operation, Priced, Roofline
from memwall.simulate.cluster import Cluster
from memwall.simulate.iterations import Served
from memwall.simulate.metrics import Objectives, figures_of
from memwall.simulate.plans import enumerate_plans
from tests.simulate.cases import at_once, dense, h100, llama_70b, sparse


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(model=llama_70b(), cluster=h100(per_node=4), loads=at_once(24, 300, 20))


def test_the_best_plan_comes_first_and_all_are_there(case: Case) -> None:
    found = search(case, goal="time", keep_all=True)
    names = {one.plan.name for one in found.results} | {plan.name for plan in found.misfits}
    assert names == {plan.name for plan in enumerate_plans(case.model, 4)}
    assert [one.figures.seconds for one in found.results] == sorted(one.figures.seconds for one in found.results)
    assert found.heuristic is not None
    assert found.heuristic.plan.name == "TP4"
    alone = simulate(case, found.best.plan)
    assert alone == found.best
    pruned = search(case, goal="time")
    assert pruned.best == found.best
    assert len(pruned.results) + len(pruned.given_up) == len(found.results)


def test_two_processes_find_the_same(case: Case) -> None:
    one, two = search(case, goal="latency", keep_all=True), search(case, goal="latency", keep_all=True, jobs=2)
    assert one.results == two.results


def test_less_energy_at_a_lower_clock_and_more_time(case: Case) -> None:
    found = search(case, goal="energy", clocks=(1.0, 0.5))
    assert len({(one.plan, one.clock) for one in found.results}) == len(found.results)
    by_clock = {one.clock: one for one in found.results if one.plan == found.best.plan}
    assert by_clock[0.5].figures.joules < by_clock[1.0].figures.joules  # type: ignore[operator]
    assert by_clock[0.5].figures.seconds > by_clock[1.0].figures.seconds


def test_figures_of_a_run_add_up(case: Case) -> None:
    result = search(case).best
    figures = result.figures
    assert figures.requests == 24
    assert figures.output_tokens_per_s * figures.seconds == pytest.approx(
        sum(load.output_tokens for load in case.loads)
    )
    assert 0 < figures.mfu < 1  # type: ignore[operator]
    assert 0 < figures.mbu < 1  # type: ignore[operator]
    assert sum(result.sources.values()) == pytest.approx(1)
    watts = figures.joules / figures.seconds  # type: ignore[operator]
    assert 4 * 700 * 0.15 <= watts <= 4 * 700


def test_a_steady_load_is_estimated_well_and_a_bursty_one_is_not() -> None:
    model, cluster = llama_70b(), h100(per_node=8)
    lengths = drawn_lengths(1000, 60, 120, 1)
    errors = []
    for cv in (0.3, 5.0):
        loads = tuple(timed(lengths, gamma_gaps(10.0, cv, len(lengths), 1)))
        case = Case(model=model, cluster=cluster, loads=loads)
        plan = heuristic_plan(model, cluster)
        assert plan is not None
        simulated, static = simulate(case, plan), static_estimate(case, plan)
        assert simulated is not None
        errors.append(abs(static.first_token / simulated.figures.first_token["mean"] - 1))
    assert errors[0] < errors[1]


def test_the_count_of_simulations_does_not_grow_with_depth() -> None:
    counts = {
        len(search(Case(model=dense(blocks=b), cluster=h100(per_node=4), loads=at_once(4)), keep_all=True).results)
        for b in (8, 64)
    }
    assert len(counts) == 1


def test_bad_input_is_named() -> None:
    case = Case(model=sparse(), cluster=h100(per_node=2), loads=at_once(2))
    with pytest.raises(InputError, match="unknown goal 'cost'"):
        search(case, goal="cost")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no load"):
        replace(case, loads=())
    with pytest.raises(InputError, match="clock of 2"):
        search(case, clocks=(2.0,))
    big = Case(model=llama_70b(), cluster=h100(per_node=1), loads=at_once(1))
    with pytest.raises(DoesNotFit, match="it fits 2 of them"):
        search(big)
    with pytest.raises(DoesNotFit, match="leave room for 0 cached"):
        simulate(big, next(enumerate_plans(big.model, 1)))
    silent = Case(model=sparse(), cluster=Cluster.of(load_machine("a100-40gb")), loads=at_once(2))
    with pytest.raises(InputError, match="no power"):
        search(silent, goal="energy")


def test_the_roofline_by_hand() -> None:
    device = Device(name="x", flop_per_s={"float16": 1e12}, bytes_per_s=1e11, capacity_bytes=1, watts=100.0)
    line = Roofline(device=device, compute_efficiency=0.5, memory_efficiency=0.5, launch_seconds=1e-6)
    arithmetic = Operation(name="a", kind="gemm", dtype="float16", shape=(1, 1, 1), flop=1e9, tier_bytes=1e6)
    moving = Operation(name="b", kind="gemm", dtype="float16", shape=(1, 1, 1), flop=1e6, tier_bytes=1e9, repeat=2)
    costs = [line.cost(one) for one in (arithmetic, moving)]
    assert costs[0] is not None
    assert costs[1] is not None
    assert costs[0].seconds == pytest.approx(2e-3 + 1e-6)
    assert costs[1].seconds == pytest.approx(2e-2 + 2e-6)
    assert device.at_clock(0.5).rate("float16") == 5e11
    assert device.rate("float8") == 1e12  # the next wider that is known
    with pytest.raises(InputError, match="no rate for float32"):
        device.rate("float32")
    with pytest.raises(InputError, match="nothing says what all_reduce"):
        Priced([("roofline", line)]).cost(
            Operation(name="r", kind="all_reduce", dtype="float16", shape=(1, 2), link_bytes=1)
        )


def test_metrics_by_hand() -> None:
    from array import array

    requests = [
        Served(arrival=0.0, prompt=10, output=3, first=1.0, last=3.0, tokens=3),
        Served(arrival=1.0, prompt=20, output=1, first=4.0, last=4.0, tokens=1),
    ]
    figures = figures_of(requests, array("d", [0.5, 1.5]), Objectives(first_token=2.0, per_token=1.0))
    assert figures.seconds == 4.0
    assert figures.output_tokens_per_s == 1.0
    assert figures.tokens_per_s == 34 / 4
    assert figures.first_token["mean"] == 2.0
    assert figures.per_token["mean"] == 1.0
    assert figures.completion["mean"] == 3.0
    assert (figures.first_token_met, figures.per_token_met, figures.both_met) == (0.5, 1.0, 0.5)
    with pytest.raises(InputError, match="above zero"):
        Objectives(first_token=0.0)
    with pytest.raises(InputError, match="no request was answered"):
        figures_of([Served(arrival=0.0, prompt=1, output=1)], array("d"), Objectives())


def test_a_page_and_its_json(case: Case, tmp_path: Path) -> None:
    found = search(case)
    told = {"model": "<m>", "machine": "h100-sxm", "devices": 4, "requests": 24, "weights": "float16"}
    path = report.write_page(found, told, tmp_path / "page.html")
    text = path.read_text()
    assert text.count("<svg") == 2
    assert "&lt;m&gt;" in text
    assert "<m>" not in text
    again = json.loads(json.dumps(report.to_dict(found, told), allow_nan=False))
    assert again["best"]["plan"]["name"] == found.best.plan.name
    with pytest.raises(InputError, match="not a directory"):
        report.write_page(found, told, tmp_path / "no" / "page.html")
