"""`memwall study efficiency`: table, JSON and files agree; clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.studies import efficiency_sizes
from tests.compress.tiny_model import make_model


def test_table_json_and_files_agree(memwall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(efficiency_sizes, "QUICK", efficiency_sizes.TINY)
    source = make_model(tmp_path / "model", num_hidden_layers=1)
    arguments = ("study", "efficiency", source, "--quick", "--techniques", "mqa,bfloat16", "--threads", "1")
    arguments = (*arguments, "--out", tmp_path / "out")
    table = memwall(*arguments)
    assert table.exit_code == 0, table.stderr
    told = json.loads(memwall(*arguments, "--json").stdout)
    kept = json.loads((tmp_path / "out" / "study.json").read_text())
    assert {**told, "seconds": 0} == {**kept, "seconds": 0}
    assert [(row["technique"], row["stage"]) for row in told["rows"]] == [
        ("mqa", "pretraining"), ("mqa", "inference"), ("bfloat16", "inference"),
    ]  # fmt: skip
    for row in told["rows"]:
        assert f"{row['values']['quality']:.4f} (1)" in table.stdout
    assert len(list((tmp_path / "out" / "records").glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--axes", "heads"), "unknown axis 'heads'"),
        (("--axes", ","), "names none"),
        (("--techniques", "gpt"), "'gpt' is none of"),
        (("--score", "speed=1"), "none of quality"),
        (("--dt", "0"), "must be from 0.001"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(memwall: Any, options: tuple[str, ...], says: str) -> None:
    found = memwall("study", "efficiency", "demo", "--quick", *options)
    assert found.exit_code == 2
    assert says in found.stderr
    assert "Traceback" not in found.stderr
