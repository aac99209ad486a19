"""Streamed models on the command line: made, run in a budget, and told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.engine.neuron_file import make_flash_model
from memwall.engine.neuron_predictors import Training
from memwall.plan import make_plan
from tests.engine.relu_models import write_relu_model

ASK = (
    "A city by the sea, where all the ships come in",
    "--ignore-eos",
    "--max-new-tokens",
    "4",
    "--weights",
    "float16",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relu") / "whole"
    # so many neurons that what is kept of them is less than all of them by more than what streaming needs
    write_relu_model(folder, "falcon", hidden_size=128, ffn_hidden_size=16384, num_attention_heads=4)
    return folder


@pytest.fixture(scope="module")
def streamed(whole: Path) -> Path:
    out = whole.parent / "streamed"
    make_flash_model(whole, out, max_tokens=256, training=Training(rank=4, steps=0))
    return out


def test_conversion_tells_what_it_found(memwall: Any, tmp_path: Path) -> None:
    write_relu_model(tmp_path / "whole", "llama")
    (tmp_path / "words").write_text("A city by the sea. " * 200)
    asked = ("convert", tmp_path / "whole", tmp_path / "out", "--stream-neurons", "--rank", "4")
    done = memwall(*asked, "--text", tmp_path / "words", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["neuron_bytes"] == (tmp_path / "out" / "neurons.bin").stat().st_size == 2 * 96 * 512
    assert len(found["layers"]) == 2
    assert len(found["held_rows"]) == 8
    again = memwall(*asked)
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    done = memwall("convert", "demo", tmp_path / "demo", "--stream-neurons")
    assert done.exit_code == 2


def test_runs_tell_what_was_read(memwall: Any, streamed: Path) -> None:
    done = memwall("run", streamed, *ASK, "--json", "--window", "2")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    told = found["neurons"]
    assert told["window_tokens"] == 2
    assert told["tokens"] == 3  # the first new token comes of the prompt
    assert 0 < told["loaded_share"] <= told["predicted_share"] < 1
    assert told["streamed_bytes"] == 2 * 16384 * 512
    rows = {row["owner"]: row for row in found["ledger"]}
    for owner in ("neurons/window", "neurons/stage"):
        assert rows[owner]["bytes"] == pytest.approx(rows[owner]["predicted_bytes"], rel=0.02)
    assert "neurons: window of 2 tokens" in memwall("run", streamed, *ASK, "--window", "2").stderr


def test_a_budget_that_the_whole_does_not_fit_takes_the_streamed_one(spawn: Any, whole: Path, streamed: Path) -> None:
    done = spawn("run", streamed, *ASK, "--json", "--window", "1")
    least = json.loads(done.stdout)["plan"]["peak_bytes"]["ram"]
    refused = spawn("run", whole, *ASK, "--memory", str(least))
    assert refused.returncode == 1
    done = spawn("run", streamed, *ASK, "--memory", str(least), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_resident_bytes"] <= least
    assert found["neurons"]["window_tokens"] >= 1
    assert spawn("run", streamed, *ASK, "--memory", "20MB").returncode == 1


def test_windows_are_for_streamed_models(memwall: Any, whole: Path) -> None:
    done = memwall("run", whole, *ASK, "--window", "3")
    assert done.exit_code == 2
    assert "--stream-neurons" in done.stderr
    assert memwall("run", whole, *ASK).exit_code == 0


def test_plans_count_the_window(whole: Path, streamed: Path) -> None:
    found = {}
    for folder in (whole, streamed):
        plan = make_plan(folder, weights="float16", context=64, measure=False, profile=False)
        found[folder] = {row.owner: row.nbytes for row in plan.rows}
    assert found[streamed]["neurons/window"] > 0
    assert found[streamed]["weights/float16"] < found[whole]["weights/float16"]


def test_conversion_knows_models_by_name_and_refuses_those_without_zeros(memwall: Any, tmp_path: Path) -> None:
    result = memwall("convert", "demo", str(tmp_path / "out"), "--stream-neurons")
    assert result.exit_code == 2
    assert "swiglu" in result.stderr
    assert not (tmp_path / "out").exists()
