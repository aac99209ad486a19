"""What EfficientLLM's verdicts hang on: orders told right, wrong and not separable; both sides of a trade; a saw."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memwall.cli.evidence import load_experiment
from memwall.studies.efficiency_rank import ranked
from memwall.studies.efficiency_sizes import TINY
from memwall.studies.efficientllm import Study
from memwall.systems import find_system
from tests.compress.tiny_model import make_model
from tests.studies.efficiency_runs import make_record


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("efficientllm"))


def study(*records: Any) -> Study:
    return Study(records=records, left_out=(), sizes=TINY, machine="", seconds=0.0)


def trained(losses: dict[str, float], noise: float) -> dict[str, Any]:
    """Rows of three seeds, each two windows."""
    signs = itertools.cycle((1, -1, 0.5, -0.5, 0.2))
    records = [
        make_record(name, losses=[loss + noise * next(signs), loss + 1 + noise * next(signs)], memory=1, step_s=1.0,
                    seed=seed, stage="pretraining")
        for seed in range(3)
        for name, loss in losses.items()
    ]  # fmt: skip
    return {row.technique: row for row in ranked(records)}


def test_perplexities_in_order_in_the_other_order_and_not_separable(experiment: ModuleType) -> None:
    right = {"mha": 1.0, "mqa": 1.2, "gqa": 1.1, "mla": 1.0}
    wrong = {"mha": 1.2, "mqa": 1.0, "gqa": 1.1, "mla": 1.0}
    assert experiment.perplexity_claim(trained(right, 0.001)).passed
    assert not experiment.perplexity_claim(trained(wrong, 0.001)).passed
    blurred = experiment.perplexity_claim(trained(wrong, 3.0))
    assert blurred.passed
    assert "not separable" in blurred.measured


def expert_runs(moe_loss: float, moe_memory: int, flop: float, steps: int) -> Study:
    figures = {"expert_load": [[30, 20, 25, 25]], "dropped": 0.1, "others": 0.0, "steps_s": [1.0] * steps}
    records = []
    for name, loss, memory, count in (("dense", 2.0, 1000, 100), ("moe", moe_loss, moe_memory, 300)):
        for stage in ("pretraining", "inference"):
            records.append(
                make_record(name, losses=[loss, loss + 1.0], memory=memory, step_s=1.0, axis="experts", stage=stage,
                            num_parameters=count, flop_per_token=flop if name == "moe" else 100.0, figures=figures)
            )  # fmt: skip
    return study(*records)


@pytest.mark.parametrize(
    ("loss", "memory", "flop", "passed"),
    [(1.9, 1800, 100.5, True), (2.1, 1800, 100.0, False), (1.9, 1000, 100.0, False), (1.9, 1800, 150.0, False)],
)
def test_experts_must_show_both_sides(
    experiment: ModuleType, loss: float, memory: int, flop: float, passed: bool
) -> None:
    trade, load = experiment.expert_claims(expert_runs(loss, memory, flop, experiment.FULL.steps))
    assert trade.passed is passed
    assert load.passed


def test_bytes_a_token_by_hand(experiment: ModuleType) -> None:
    sizes = experiment.FULL
    assert experiment.computed("mha", sizes) == 4 * 6 * 2 * 256
    assert experiment.computed("mqa", sizes) < experiment.computed("mla", sizes) < experiment.computed("gqa", sizes)


def test_a_saw_is_seen(experiment: ModuleType) -> None:
    mean, truth, series = experiment.sawtooth(1)
    assert 0 < mean < experiment.STAIR_BYTES * experiment.STAIRS
    assert 0 < truth < experiment.STAIR_BYTES * experiment.STAIRS
    assert max(series.memory_bytes) - series.memory_bytes[0] > 0.9 * experiment.STAIR_BYTES * experiment.STAIRS


def test_an_interrupted_whole_run_leaves_its_records_and_one_that_ends_does_not(
    experiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = []
    for interrupted in (True, False):
        with contextlib.suppress(KeyboardInterrupt), experiment.record_folder(quick=False) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            folders.append(folder)
            (folder / str(interrupted)).touch()
            if interrupted:
                raise KeyboardInterrupt
            assert (folder / "True").exists()
    assert folders[0] == folders[1]
    assert not folders[0].exists()
    with experiment.record_folder(quick=True) as folder:
        assert folder not in folders


def test_the_model_to_fine_tune_is_made_once(
    experiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = make_model(tmp_path / "small")
    monkeypatch.setattr(experiment, "wide_heads", lambda: small)
    monkeypatch.setattr(experiment, "library_text", lambda scored: "A list of words, and what they are for. " * 40)
    monkeypatch.setattr(experiment, "GROWN", experiment.GROWN | {"steps": 1, "batch": 1, "tokens": 32})
    heard: list[tuple[int, int, str]] = []
    text = b"A city lies on a river, and the river comes down from the hills. " * 20
    first, told = experiment.grown(text, text, lambda *each: heard.append(each))
    assert (first / "model.safetensors").is_file()
    assert len(heard) == 1
    assert "perplexity" in told
    assert experiment.grown(text, text, lambda *each: heard.append(each)) == (first, told)
    assert len(heard) == 1
    assert experiment.grown(text, text[:-65], lambda *each: heard.append(each))[0] != first
    assert [path.name for path in first.parent.iterdir() if not path.name.startswith("efficientllm-grown-")] == []


def test_energy_must_be_named_in_every_table(experiment: ModuleType) -> None:
    one = study(make_record("mha", losses=[1.0], memory=1, step_s=1.0))
    claim = experiment.energy_claim(one)
    source = one.records[0].metrics.power_source
    assert claim.passed is (f"watts are {source}" in claim.measured)


def test_without_the_axis_fine_tuning_is_not_run(experiment: ModuleType) -> None:
    (claim,) = experiment.peft_claims(study(), "", ["no fine-tuning axis"])
    assert claim.passed is None
    assert "no fine-tuning axis" in claim.measured
