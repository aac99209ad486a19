"""What the verdicts on long contexts hang on: fits, spreads, and claims that fail on times that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.simulate.context_model import PUBLISHED_MODEL, PUBLISHED_PEAK
from memwall.simulate.long_context_peak_analysis import Analysis, Workload
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("long-context-peak-analysis"))


def test_lines_and_spreads(experiment: ModuleType) -> None:
    slope, intercept, certain = experiment.fit([1, 2, 3], [3, 5, 7])
    assert (slope, intercept, certain) == pytest.approx((2, 1, 1))
    assert experiment.fit([1, 2, 3, 4], [1, -1, 1, -1])[2] < 0.3
    assert experiment.spread([2.0, 3.0, 2.5]) == 1.5


@pytest.mark.parametrize("part", ["published_claims", "method_claims"])
def test_claims_without_a_clock(experiment: ModuleType, part: str) -> None:
    assert all(claim.passed for claim in getattr(experiment, part)())


def test_limits_and_other_calculators(experiment: ModuleType) -> None:
    for claim in (experiment.batch_claim, experiment.bottleneck_claim, experiment.sweep_claim, experiment.apex_claim):
        assert claim().passed, claim()


def test_bytes_of_real_caches(experiment: ModuleType, tmp_path: Path) -> None:
    assert experiment.bytes_claim(tmp_path).passed


def _judged(experiment: ModuleType, spoiled: str | None) -> list[bool | None]:
    """Verdicts on times that are the formulas' own, half as fast; one of the three spoiled."""
    sizes = experiment.FULL
    ones = [
        Analysis(model=PUBLISHED_MODEL, peak=PUBLISHED_PEAK, workload=Workload(context=n, answer=1))
        for n in sizes.contexts
    ]
    times = {name: [2 * getattr(one, name) for one in ones] for name in ("prefill", "answer", "switch")}
    if spoiled is not None:
        draw = np.random.default_rng(0)
        times[spoiled] = [max(times[spoiled]) * draw.uniform(0.2, 1) for _ in ones]
    found = experiment.Times(times["prefill"], times["answer"], times["switch"])
    config = SimpleNamespace(num_parameters=34e9)
    return [claim.passed for claim in experiment.judged(found, PUBLISHED_MODEL, PUBLISHED_PEAK, sizes, config)]


def test_times_that_do_not_fit_are_told(experiment: ModuleType) -> None:
    assert _judged(experiment, None) == [True, True, True, True]
    for number, name in enumerate(("prefill", "answer", "switch"), 1):
        verdicts = _judged(experiment, name)
        assert verdicts[0] is False, name
        assert verdicts[number] is False or name == "prefill"
    flat = replace(experiment.FULL, contexts=(512, 1024, 2048))
    linear = experiment.Times([1.0, 2.0, 4.0], [1.0, 1.0, 1.0001], [1.0, 2.0, 4.0])
    claims = list(
        experiment.judged(linear, PUBLISHED_MODEL, PUBLISHED_PEAK, flat, SimpleNamespace(num_parameters=34e9))
    )
    assert claims[1].passed is False  # a prompt of twice as many tokens took twice as long


def test_a_swap_moves_what_it_says(experiment: ModuleType) -> None:
    assert experiment.switch_seconds(4096, 4, 1) > 0
