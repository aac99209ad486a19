"""`memwall study low-bit`: table, JSON and files agree; clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.studies import low_bit_llama3_study
from memwall.studies.low_bit_llama3_study import Sizes
from tests.compress.tiny_model import make_model

SMALL = Sizes(
    calibration=128, sequence_tokens=64, windows=2, window_tokens=24, prompts=1, prompt_tokens=150, questions=2
)


def test_table_json_and_files_agree(memwall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_llama3_study, "QUICK", SMALL)
    source = make_model(tmp_path / "model", num_hidden_layers=1)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"context": "Water is", "choices": [" wet", " dry", " new"], "answer": 0}\n')
    arguments = ("study", "low-bit", source, "--quick", "--methods", "rtn,pb-llm", "--bits", "1.7,2")
    arguments = (*arguments, "--choices", questions, "--out", tmp_path / "out")
    table = memwall(*arguments)
    assert table.exit_code == 0, table.stderr
    told = json.loads(memwall(*arguments, "--json").stdout)
    kept = json.loads((tmp_path / "out" / "study.json").read_text())
    assert {**told, "seconds": 0} == {**kept, "seconds": 0}
    rows = [row for row in told["rows"] if not row["skipped"]]
    assert [row["name"] for row in rows] == ["float16", "rtn int2-g128-asym", "pb-llm 2", "pb-llm 1.7"]
    for row in rows:
        assert f"{row['perplexity']:.2f}" in table.stdout
        assert row["num_choice"] == 1
    assert "left out: qlora" in table.stdout
    assert (tmp_path / "out" / "study.html").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--methods", "gguf"), "unknown method 'gguf'"),
        (("--methods", ","), "names none"),
        (("--bits", "few"), "--bits 'few'"),
        (("--bits", "17"), "no method has these"),
        (("--choices", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(memwall: Any, options: tuple[str, ...], says: str) -> None:
    found = memwall("study", "low-bit", "demo", *options)
    assert found.exit_code == 2
    assert says in found.stderr
    assert "Traceback" not in found.stderr
