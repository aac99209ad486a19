"""The study as a whole: cells are kept one by one, a kill loses one of them, nothing stale is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.models import model_directory
from memwall.plan.choose import held_out_text
from memwall.studies import kv_report
from memwall.studies.kv_resident import resident_bytes_of
from memwall.studies.kv_study import Row, Store, Study, frontier, study_kv
from memwall.studies.kv_tasks import Sizes, Tasks

SMALL = Sizes(windows=1, prompt_tokens=64, decoded_tokens=4, tries=1, recall_tokens=160, dialogues=1)
DEMO = model_directory("demo")


def studied(folder: Path, **more: Any) -> Study:
    settings = {"methods": ["float16", "kivi(2bit)"], "budgets": [0.5], "sizes": SMALL, "peers": False}
    return study_kv(
        DEMO, "demo", text=held_out_text(), store=folder, resident=False, **(settings | more)  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Tasks that were really run; made cheap."""
    done: list[tuple[str, str]] = []

    def run(self: Tasks, task: str, subject: Any) -> dict[str, Any]:
        done.append((task, subject.policy))
        figures = {
            "text": {"kl_nats": 0.1, "perplexity": 9.0, "step_seconds": 0.01},
            "recall": {"recall": 1, "later": 0.5},
        }
        return {**figures.get(task, {"talk": 0.5}), "kv_bytes": 500, "float16_bytes": 1000, "tokens": 10}

    monkeypatch.setattr(Tasks, "run", run)
    return done


def test_finished_cells_are_not_run_again(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    first = studied(tmp_path)
    assert len(runs) == 6
    again = studied(tmp_path)
    assert len(runs) == 6
    assert [row.figures for row in again.rows] == [row.figures for row in first.rows]
    studied(tmp_path, methods=["float16", "kivi(2bit)", "kivi(4bit)"])
    assert {policy for _, policy in runs[6:]} == {"kivi(4bit)"}
    studied(tmp_path, sizes=Sizes(**{**first.to_dict()["sizes"], "tries": 2}))
    assert len(runs) == 6 + 3 + 6, "other sizes are other cells"
    studied(tmp_path, weights="int8")
    assert len(runs) == 6 + 3 + 6 + 6


def test_a_kill_loses_one_cell_at_most(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    def stop(done: int, whole: int, what: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studied(tmp_path, progress=stop)
    assert len(runs) == len(list(tmp_path.glob("*.json"))) == 4
    assert not list(tmp_path.glob(".cell*"))
    studied(tmp_path)
    assert len(runs) == 6
    assert len(set(runs)) == 6


def test_damaged_cells_are_run_anew(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    studied(tmp_path)
    broken, empty, foreign = sorted(tmp_path.glob("*.json"))[:3]
    broken.write_text("{")
    empty.write_text("")
    foreign.write_text("[1]")
    studied(tmp_path)
    assert len(runs) == 9
    assert Store(tmp_path).read(broken.stem)


def test_progress_counts_to_the_end(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    studied(tmp_path, progress=lambda *told: seen.append(told))
    assert [done for done, _, _ in seen] == list(range(7))
    assert seen[-1][:2] == (6, 6)
    assert "kivi(2bit), recall" in {what for _, _, what in seen}


def test_a_policy_that_turns_out_impossible_is_a_skipped_row(tmp_path: Path) -> None:
    found = studied(tmp_path, methods=["float16", "locret"])
    assert "memwall fit" in found.rows[1].skipped
    assert not found.rows[1].figures
    assert any("locret" in text for text in kv_report.remarks(found))


def row(policy: str, nbytes: int, loss: float, **more: Any) -> Row:
    figures = {
        "text": {"kl_nats": loss, "perplexity": 9.0, "kv_bytes": nbytes, "float16_bytes": 1000, "step_seconds": 0.01},
        "recall": {"recall": 1 - loss, "later": 0.5, "kv_bytes": nbytes, "float16_bytes": 1000},
        "talk": {"talk": 0.5, "kv_bytes": nbytes, "float16_bytes": 1000},
        "resident": {"resident_bytes": 8080, "ledger_bytes": 8000},
    }
    return Row(method=policy.split("(")[0], policy=policy, budget=None, figures=figures, **more)


ROWS = [
    row("float16", 1000, 0.0),
    row("kivi(4bit)", 400, 0.01),
    row("kivi(2bit)", 250, 0.3),
    row("snapkv(0.5)", 500, 0.1),
    row("SnapKVPress(0.5)", 500, 0.11, library="kvpress 0.5"),
    Row(method="think", policy="", budget=0.25, skipped="its least is 0.55 of float16 here"),
]


def a_study() -> Study:
    return Study(model="demo", fingerprint="f", weights="float32", sizes=SMALL, machine="m", seconds=1.0, rows=ROWS)


def test_the_frontier_has_no_row_beaten_twice() -> None:
    assert [one.policy for one in frontier(ROWS)] == ["float16", "kivi(4bit)", "kivi(2bit)"]


def test_plots_name_what_is_best_for_its_size() -> None:
    points = [
        (ROWS[0], 1.0, 0.0),
        (ROWS[1], 0.4, 0.01),
        (ROWS[3], 0.5, 0.1),
        (ROWS[2], 0.25, 0.3),
        (ROWS[4], 0.25, 0.4),
    ]
    told = [one.policy for one, _, _ in kv_report.best_of_each_size(points, lower=True)]
    assert told == ["kivi(2bit)", "kivi(4bit)", "float16"]
    told = [one.policy for one, _, _ in kv_report.best_of_each_size(points, lower=False)]
    assert told == ["SnapKVPress(0.5)"]
    assert kv_report.best_of_each_size([], lower=True) == []


def test_table_page_and_plots(tmp_path: Path) -> None:
    study = a_study()
    lines = kv_report.lines(study)
    assert len(lines) == 5
    assert all(len(line) == len(kv_report.COLUMNS) for line in lines)
    assert lines[1][0] == "kivi *"
    assert lines[3][0] == "snapkv"
    assert lines[1][3] == lines[1][6] == lines[1][9] == "0.400"
    assert "(1.010)" in lines[1][-1]
    paths = {path.name: path for path in kv_report.write(study, tmp_path / "out")}
    assert set(paths) == {"study.json", "study.html", "text.png", "recall.png", "later.png", "talk.png"}
    assert paths["text.png"].read_bytes().startswith(b"\x89PNG")
    page = paths["study.html"].read_text()
    assert page.count("<svg") == 4
    assert "SnapKVPress" in page
    assert "its least is" in page
    assert not any(outside in page for outside in ("<script", "src=", "<link", "url(http"))
    told = json.loads(paths["study.json"].read_text())
    assert told["version"] >= 1
    assert len(told["rows"]) == len(ROWS)


def test_resident_bytes_are_those_of_the_ledger() -> None:
    found = resident_bytes_of(DEMO, "float32", "kivi(4bit)", 512, held_out_text(), sequences=6)
    assert found["tokens"] == 512
    assert found["resident_bytes"] == pytest.approx(found["ledger_bytes"], rel=0.05)
