"""What DistServe's verdicts hang on: lengths, draws, and claims that are not run without what they need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.engine.phase_study import Figures
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("distserve"))


def test_made_lengths_are_of_the_published_kind(experiment: ModuleType) -> None:
    lengths = experiment.read_lengths(None)
    prompts, outputs = zip(*lengths, strict=True)
    assert all(p + o <= experiment.LONGEST for p, o in lengths)
    assert 650 < sum(prompts) / len(prompts) < 850
    assert 180 < sum(outputs) / len(outputs) < 280


def test_claims_that_need_no_clock(experiment: ModuleType) -> None:
    assert all(claim.passed for claim in (*experiment.joint(), *experiment.bursts()))
    found = experiment.published(experiment.read_lengths(None)[:200], None, experiment.QUICK)
    assert next(claim for claim in found if "published" in claim.claim).passed is None
    assert all(claim.passed for claim in experiment.mapped())


def test_two_processes_under_a_burst_whatever_the_clock(experiment: ModuleType, tmp_path: Path) -> None:
    sizes = replace(experiment.QUICK, layers=2, hidden=128, intermediate=256, served=16)
    model = experiment.write_model(tmp_path / "model", sizes)
    assert all(claim.passed for claim in experiment.under_bursts(model, sizes))


def test_goodput_is_the_highest_rate_that_meets_both(experiment: ModuleType) -> None:
    def figures(first: float, token: float) -> Figures:
        return Figures([first] * 10, [token] * 10, [(first, token)] * 10, 1.0)

    alone = (0.1, 0.01)
    slow_tokens, slow_first = figures(0.1, 0.1), figures(1.0, 0.02)
    found = {0.1: (figures(0.1, 0.01), figures(0.2, 0.02)), 0.5: (slow_tokens, slow_first)}
    tight, loose = experiment.goodputs(found, 10.0, alone)
    assert tight.passed
    assert "5.00 requests/s apart, 1.00 colocated" in tight.measured
    assert loose.passed
    assert "1.00 requests/s apart, 5.00 colocated" in loose.measured


def test_a_formula_that_is_off_fails(experiment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "waiting_first_token", lambda rate, seconds: 2 * seconds)
    assert experiment.queueing(experiment.Sizes(requests=2000, queued=500, seeds=(0,), repeats=1))[0].passed is False
