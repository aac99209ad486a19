"""`memwall plan`: table, JSON, report, and status 1 when nothing fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PLAN = ("plan", "demo", "--no-measure", "--context", "256")


def test_table_and_json_agree(memwall: Any) -> None:
    document = json.loads(memwall(*PLAN, "--memory", "2GB", "--json").stdout)
    assert document["version"] >= 1
    assert document["choice"]["context"] == 256
    assert sum(row["bytes"] for row in document["rows"]) == document["peak_bytes"]["ram"] <= 2_000_000_000
    table = memwall(*PLAN, "--memory", "2GB")
    assert table.exit_code == 0, table.stderr
    assert document["choice"]["weights"] in table.stdout
    assert document["explanation"].split(",")[0][:30] in " ".join(table.stdout.split())


def test_exact_settings(memwall: Any) -> None:
    result = memwall(*PLAN, "--weights", "int4", "--kv", "kivi(2bit)", "--json")
    document = json.loads(result.stdout)
    assert document["choice"]["weights"].startswith("int4")
    assert "kivi" in document["choice"]["kv"]


def test_nothing_fits(memwall: Any) -> None:
    result = memwall(*PLAN, "--memory", "1MB")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    exact = memwall(*PLAN, "--memory", "1MB", "--weights", "int4", "--kv", "float16", "--json")
    assert exact.exit_code == 1
    assert json.loads(exact.stdout)["peak_bytes"]["ram"] > 1_000_000


def test_report(memwall: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = memwall(*PLAN, "--memory", "2GB", "--html", report, "--quiet")
    assert result.exit_code == 0, result.stderr
    text = report.read_text()
    assert "<html" in text
    assert "weights/" in text


def test_a_folder_with_only_a_config_is_planned_for_before_its_weights_are_there(memwall: Any, tmp_path: Path) -> None:
    from memwall.models import model_directory

    whole = model_directory("demo")
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    settings = ["--memory", "200MB", "--context", "256", "--weights", "int4", "--kv", "kivi", "--json"]
    done = memwall("plan", tmp_path, *settings)  # measuring is not left out, but there is nothing to measure
    assert done.exit_code == 0, done.stderr
    plan, other = json.loads(done.stdout), json.loads(memwall("plan", "demo", "--no-measure", *settings).stdout)
    assert "holds no weights" in plan["explanation"]
    assert plan["quality"] is None
    owners = [{row["owner"]: row["bytes"] for row in one["rows"] if row["owner"] != "runtime"} for one in (plan, other)]
    assert owners[0] == owners[1]
    done = memwall("plan", tmp_path, "--memory", "200MB", "--max-kl", "0.1")
    assert done.exit_code == 2
    assert "holds no weights" in done.stderr
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"half a download")
    assert memwall("plan", tmp_path, "--memory", "200MB").exit_code == 2


def test_a_pipe_is_told_what_is_measured(memwall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exact = ("plan", "demo", "--context", "128", "--weights", "int4", "--kv", "float16")
    told = memwall(*exact, "--json")
    assert "measuring the quality of int4 weights and a float16 cache" in told.stderr
    assert json.loads(told.stdout)["choice"]["kv"] == "float16"
    assert "measuring" not in memwall(*exact).stderr  # it is known now
