"""`memwall study kv`: a table of caches, JSON, files, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from memwall.studies import kv_tasks

SMALL = kv_tasks.Sizes(windows=1, prompt_tokens=64, decoded_tokens=4, tries=1, recall_tokens=160, dialogues=1)
FAST = ("study", "kv", "--quick", "--no-peers", "--no-resident")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_tasks, "QUICK", SMALL)


@pytest.mark.usefixtures("small")
def test_table_json_and_files_agree(memwall: Any, tmp_path: Path) -> None:
    arguments = (*FAST, "--methods", "float16,snapkv,kivi(2bit)", "--budgets", "0.5", "--out", tmp_path / "out")
    table = memwall(*arguments)
    assert table.exit_code == 0, table.stderr
    told = json.loads(memwall(*arguments, "--json").stdout)
    assert told == json.loads((tmp_path / "out" / "study.json").read_text())
    assert {row["method"] for row in told["rows"]} == {"float16", "snapkv", "kivi(bits=2)"}
    for row in told["rows"]:
        assert set(row["figures"]) == {"text", "recall", "talk"}
        assert row["policy"] in table.stdout
        assert f"{row['figures']['text']['kl_nats']:.4f}" in table.stdout
    assert (tmp_path / "out" / "study.html").is_file()
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 9


@pytest.mark.usefixtures("small")
def test_methods_without_a_fit_say_what_to_run(memwall: Any) -> None:
    result = memwall(*FAST, "--methods", "float16,locret")
    assert result.exit_code == 0
    assert "memwall fit demo 'locret'" in result.stderr


def test_plots_that_cannot_be_drawn_are_refused_first(
    memwall: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    result = memwall(*FAST, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "matplotlib" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--methods", "zip"), "zip"),
        (("--methods", ""), "names none"),
        (("--methods", "snapkv+locret"), "both choose the tokens"),
        (("--budgets", "2"), "at most 1"),
        (("--budgets", "x"), "shares"),
        (("--text", "/nowhere.txt"), "/nowhere.txt"),
        (("--weights", "int9"), "int9"),
    ],
)
def test_bad_input(memwall: Any, options: tuple[str, ...], says: str) -> None:
    result = memwall(*FAST, *options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
