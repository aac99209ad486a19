"""`memwall tune`: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.compress.tiny_model import make_model

SMALL = [
    part
    for pair in ("rank=2", "context=32", "batch=2", "steps=1", "targets=q_proj", "learning_rate=0.05")
    for part in ("--set", pair)
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A city lies on a river, and the river comes down from the hills. " * 20)
    return path


def test_tune_and_run(memwall: Any, text: Path, tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    result = memwall("tune", model, text, out, *SMALL, "--weights", "int4", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["run_with"] == f"memwall run {model} --weights int4 --lora {out}"
    assert report["steps"] == 1
    run = memwall(*report["run_with"].split()[1:], "A city", "--max-new-tokens", "2", "--ignore-eos", "--json")
    assert run.exit_code == 0, run.stderr
    words = ("eval", model, text, "--weights", "int4", "--limit", "100", "--json")
    figures = [json.loads(memwall(*words, *more).stdout) for more in ((), ("--lora", out))]
    assert figures[0]["perplexity"] != figures[1]["perplexity"]
    again = memwall("tune", model, text, out, *SMALL, "--weights", "int4")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    summary = memwall("tune", model, text, out, *SMALL, "--force")
    assert summary.exit_code == 0
    assert "run it with: memwall run" in summary.stderr


def test_refusals(memwall: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    cases = (
        (("--set", "rank"), 2, "NAME=VALUE"),
        (("--method", "lore"), 2, "known are qlora"),
        (("--teacher", "demo"), 2, "no teacher"),
        (("--lora", str(tmp_path)), 2, "adapter_config.json"),
        (("--memory", "20MB"), 1, "try --memory"),
        (("--weights", "int99x"), 2, "unknown weight format"),
    )
    for words, status, message in cases:
        result = memwall("tune", model, text, tmp_path / "out", *SMALL, *words)
        assert (result.exit_code, message in result.stderr) == (status, True), result.stderr
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\x00" * 100)
    assert memwall("tune", model, binary, tmp_path / "out").exit_code == 2
    monkeypatch.setattr("memwall.compress.tune.find_spec", lambda name: None)
    result = memwall("tune", model, text, tmp_path / "out")
    assert result.exit_code == 2
    assert "pip install 'memwall[torch]'" in result.stderr
