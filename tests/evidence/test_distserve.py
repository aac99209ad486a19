"""What DistServe's verdicts hang on: lengths, draws, and claims that are not run without what they need."""

from __future__ import annotations

from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
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
    assert all(claim.passed is None for claim in experiment.not_built())


def test_a_formula_that_is_off_fails(experiment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "waiting_first_token", lambda rate, seconds: 2 * seconds)
    assert experiment.queueing(experiment.Sizes(requests=2000, seeds=(0,), repeats=1))[0].passed is False
