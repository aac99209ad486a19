"""`memwall study ptq-impact`: table, JSON and files agree; clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memwall.studies import ptq_impact_study
from tests.compress.tiny_model import make_model

FAST = ("study", "ptq-impact", "--quick", "--no-peers", "--no-costs")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = replace(ptq_impact_study.QUICK, temperatures=(0.5, 0.8), top_ks=(200,), lengths=(4,), seeds=2, tokens=4,
                   windows=2, window_tokens=32)  # fmt: skip
    monkeypatch.setattr(ptq_impact_study, "QUICK", grid)


@pytest.mark.usefixtures("small")
def test_table_json_and_files_agree(memwall: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Water is\n\nThe king\n")
    arguments = (*FAST, "--formats", "nf4,int4-g64", "--prompts", prompts, "--out", tmp_path / "out")
    table = memwall(*arguments)
    assert table.exit_code == 0, table.stderr
    told = json.loads(memwall(*arguments, "--json").stdout)
    kept = json.loads((tmp_path / "out" / "study.json").read_text())
    assert {**told, "seconds": 0} == {**kept, "seconds": 0}
    assert told["grid"]["prompts"] == ["Water is", "The king"]
    assert [row["format"] for row in told["formats"]] == ["bf16", "nf4", "int4-g64"]
    for row in told["formats"]:
        assert f"{row['heldout_perplexity']:.2f}" in table.stdout
    assert "more sensitive to temperature" in table.stdout
    assert (tmp_path / "out" / "study.html").is_file()


@pytest.mark.usefixtures("small")
def test_several_models_stand_side_by_side(memwall: Any, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", max_position_embeddings=512)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Water is\n")
    arguments = (*FAST, "demo", other, "--formats", "nf4", "--prompts", prompts, "--out", tmp_path / "out")
    table = memwall(*arguments)
    assert table.exit_code == 0, table.stderr
    told = json.loads(memwall(*arguments, "--json").stdout)
    assert [one["model"] for one in told["models"]] == ["demo", str(other)]
    question = told["across"][0]
    assert set(question["models"]) == {"demo", str(other)}
    assert question["question"] in table.stdout
    for name in ("demo", "other"):
        assert (tmp_path / "out" / name / "study.html").is_file()
    assert len(json.loads((tmp_path / "out" / "study.json").read_text())["models"]) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--formats", "nf5"), "nf5"),
        (("--formats", ","), "names none"),
        (("--temperatures", "hot"), "--temperatures 'hot'"),
        (("--temperatures", "nan"), "--temperatures 'nan'"),
        (("--temperatures", "-1"), "from 0.01 to 100"),
        (("--temperatures", "0"), "from 0.01"),
        (("--top-k", "0"), "from 1"),
        (("--top-k", "1.5"), "whole numbers"),
        (("--lengths", "5000"), "--lengths"),
        (("--seeds", "0"), "--seeds"),
        (("--prompts", "/nowhere.txt"), "/nowhere.txt"),
        (("--text", "/nowhere.txt"), "/nowhere.txt"),
        (("--memory", "lots"), "lots"),
        (("--memory", "0"), "--memory 0"),
        (("--memory", "9MB"), "--no-costs"),
        (("--peer-python", "/nowhere/python"), "/nowhere/python"),
        (("/nowhere",), "/nowhere"),
        (("demo", "demo"), "called demo"),
    ],
)
def test_bad_input(memwall: Any, options: tuple[str, ...], says: str) -> None:
    result = memwall(*FAST, *options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_an_empty_list_of_prompts_is_refused(memwall: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n \n")
    result = memwall(*FAST, "--prompts", prompts)
    assert result.exit_code == 2
    assert "0 prompts" in result.stderr
