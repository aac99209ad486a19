"""What the verdicts on Victima hang on: pairing of runs, means and errors, and a whole small run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.simulate.victima import Result
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("victima"))


def made(instructions_per_cycle: float, **counters: int) -> Result:
    slots = round(4000 / instructions_per_cycle)
    return Result(trace="t", variant="v", width=4, counters={"instructions": 1000, "slots": slots, **counters})


def test_gains_are_paired_by_trace(experiment: ModuleType) -> None:
    runs = {
        ("radix", "a", 0): made(0.5), ("radix", "b", 0): made(1.0), ("victima", "b", 0): made(2.0),
        ("victima", "a", 0): made(0.5),
    }  # fmt: skip
    logs = experiment.logs(runs, "victima", "radix")
    assert sorted(logs) == pytest.approx([0, math.log(2)], abs=1e-3)
    assert experiment.told(logs) == "+41.4% ± 34.7%"
    assert experiment.kernels_of(runs) == ["a", "b"]


def test_a_drop_that_is_too_small_fails(experiment: ModuleType) -> None:
    sizes = replace(experiment.QUICK, accesses=30_000)
    few = {"walks": 60, "reach_bytes_sum": 1, "samples": 1}
    for walks, passed in ((100, True), (80, False)):
        runs = {("radix", "a", 0): made(1, walks=walks), ("victima", "a", 0): made(1, **few)}
        first, *_ = experiment.walk_claims(runs, sizes)
        assert first.passed is passed


def test_a_small_whole_run(experiment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = replace(experiment.QUICK, kernels=("kv-pages-small",), accesses=20_000, predictor_accesses=20_000)
    monkeypatch.setattr(experiment, "QUICK", small)
    told: list[str] = []
    claims = experiment.run(True, None, lambda done, whole, what: told.append(what))
    assert len(claims) == 15
    assert "kv-pages-small 0: virtual victima" in told
    by_claim = {claim.claim: claim for claim in claims}
    assert by_claim["a TLB and a cache of one set miss as often as LRU does"].passed
    with pytest.raises(InputError, match="holds no trace"):
        experiment.run(True, tmp_path, None)
    (tmp_path / "mine.txt").write_text("".join(f"r {64 * 97 * at}\n" for at in range(20_000)))
    assert "mine" in next(claim.measured for claim in experiment.run(True, tmp_path, None))
