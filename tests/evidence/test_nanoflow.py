"""What NanoFlow's verdicts hang on: figures of the table, lengths drawn or read, spreads, and who still waits."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.engine.base import Limits
from memwall.engine.executor import Entry
from memwall.engine.nanoflow import NanoFlow
from memwall.engine.sequence import Sequence
from memwall.engine.simulated import VirtualClock
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("nanoflow"))


def test_the_table_and_the_bound_hold(experiment: ModuleType) -> None:
    claims = list(experiment.model_claims())
    assert [claim.passed for claim in claims] == [True, True]
    assert "20 figures" in claims[0].measured


def test_lengths_have_the_means_they_are_drawn_for(experiment: ModuleType, tmp_path: Path) -> None:
    found = experiment.drawn("LMSYS", 4000, 1, None)
    assert statistics.mean(len(one.request.prompt) for one in found) == pytest.approx(102, rel=0.15)
    assert statistics.mean(one.request.sampling.max_new_tokens for one in found) == pytest.approx(222, rel=0.1)
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,42,285\nXXX,19,82\n")
    assert [len(one.request.prompt) for one in experiment.drawn("trace", 9, 1, trace)] == [42, 19]


def test_an_iteration_costs_what_the_table_says(experiment: ModuleType) -> None:
    watching = experiment.Watching(VirtualClock())
    one = Sequence(id=0, request=experiment.Request(prompt=(1,) * 2048), arrival=0.0, eos=())
    watching.waits = True
    watching.run([Entry(one, 0, 2048, False)])
    tokens, seconds = watching.seen[0]
    assert tokens == 2048
    attention = 4 * 2048 * 1024 * 8192 * 80 / (0.5 * 8 * 312e12)
    assert seconds == pytest.approx(0.137 + 0.0479 + 0.00456 + attention, rel=1e-3)
    assert experiment.percentile_ratio([1.0] * 99 + [3.0]) > 1
    assert experiment.percentile_ratio([]) == float("inf")


def test_iterations_are_those_after_which_somebody_waits(experiment: ModuleType) -> None:
    coming = experiment.drawn("ShareGPT", 80, 1, None)
    seen, engine = experiment.iterations(NanoFlow(), coming, Limits(token_budget=128, max_sequences=256), 4000)
    assert {tokens for tokens, _ in seen} == {128}
    assert engine.totals.finished["length"] == 80
    assert len(seen) < engine.totals.steps
