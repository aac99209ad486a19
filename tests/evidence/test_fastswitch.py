"""What FastSwitch's verdicts hang on: the churn, the baselines, answers that stay the same, and the order of a load."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.memory.page_groups import PageGroups
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("fastswitch"))


def test_groups_are_few_runs_until_the_pool_is_full(experiment: ModuleType) -> None:
    claims = list(experiment.group_claims())
    assert [claim.passed for claim in claims] == [True] * 3, claims
    plain = experiment.churn(experiment.FreeList(300), 300, 0.9, operations=2000)
    grouped = experiment.churn(PageGroups(300, 60), 300, 0.9, operations=2000)
    assert plain.pages == grouped.pages  # the same load
    assert np.mean(grouped.runs) < np.mean(plain.runs) / 3


def test_scattered_pages_are_in_as_many_runs_as_told(experiment: ModuleType) -> None:
    for pages, runs in ((16, 1), (17, 4), (256, 256)):
        found = experiment.scattered(pages, runs)
        assert len(found) == pages
        assert len(experiment.runs_of(found)) == runs


def test_answers_are_those_of_a_run_without_preemption(experiment: ModuleType) -> None:
    claims = list(experiment.same_claims(experiment.QUICK, lambda what: None))
    assert all(claim.passed for claim in claims), claims


def test_a_load_on_the_virtual_clock_costs_less_with_every_part(experiment: ModuleType) -> None:
    chats = experiment.draw_chats(
        14, rate_per_s=2.5, lengths=experiment.lengths_of(None, 300), most_tokens=1200, seed=1, think_seconds=3.0
    )
    found = [experiment.virtual(chats, variant, "random", 0.1, 160) for variant in range(4)]
    counts = [one.counts for one in found]
    assert counts[1].out_copies < counts[0].out_copies / 2
    assert counts[0].stall_seconds > counts[1].stall_seconds > counts[2].stall_seconds
    assert counts[3].out_bytes < counts[2].out_bytes / 2
    assert counts[3].clean_bytes > 0
    assert [len(one.first) for one in found] == [sum(len(chat.turns) for chat in chats)] * 4
    assert experiment.bytes_claim(found, chats).measured


def figures(experiment: ModuleType, tail: float) -> Any:
    counts = experiment.SwitchCounts()
    return experiment.Figures(
        first=[tail] * 9, gaps=[tail] * 9, counts=counts, made=[], seconds=1.0, peak_pages=1, page_bytes=1
    )


@pytest.mark.parametrize(
    ("tails", "passed"),
    [
        ((40, 30, 25, 25.2), True),  # neighbours nearer than the noise
        ((40, 30, 20, 28), False),  # reuse is worse than what it is put on
        ((30, 30, 30, 30), False),  # nothing is gained
        ((40, 44, 25, 20), False),  # worse than no part at all
    ],
)
def test_an_order_is_judged_by_pairs_and_their_errors(
    experiment: ModuleType, tails: tuple[float, ...], passed: bool
) -> None:
    rng = np.random.default_rng(1)
    loads = []
    for load in range(8):
        whole = 1 + load  # what a load does to all of its variants counts for nothing
        loads.append([figures(experiment, 1e-3 * whole * tail * rng.uniform(0.97, 1.03)) for tail in tails])
    claim = experiment.paired_claim(loads, "here", "gaps", "time between tokens")
    assert claim.passed is passed, claim.measured
    assert experiment.paired_claim(loads[:1], "here", "gaps", "x").passed is None  # one load tells no error


def test_the_error_of_a_change_by_hand(experiment: ModuleType) -> None:
    change, error = experiment.change_of(np.array([1.0, 2.0]), np.array([2.0, 2.0]))
    assert change == pytest.approx(np.log(2) / 2)
    assert error == pytest.approx(np.log(2) / 2)
