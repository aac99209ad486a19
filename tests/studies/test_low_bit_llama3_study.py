"""The study of weight compression, in small: rows, stored cells, the front, the page, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.plan.choose import held_out_text
from memwall.studies import low_bit_llama3_study, low_bit_report
from memwall.studies.low_bit_llama3_study import GRID, Sizes, Study, Variant, select, study_low_bit
from tests.compress.tiny_model import make_model

SMALL = Sizes(
    calibration=256, sequence_tokens=128, windows=2, window_tokens=32, prompts=1, prompt_tokens=160, questions=4
)
VARIANTS = (
    Variant(method="rtn", bits="int2-g128-asym", nominal=2.0),
    Variant(method="billm", bits="1.1", nominal=1.1),
    Variant(method="smoothquant", bits="int8", nominal=8.0, rounded=True),
    Variant(method="no-such-method", bits="2", nominal=2.0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def studied(folder: Path, **more: Any) -> Study:
    source = folder / "model"
    if not source.exists():
        make_model(source)
    settings: dict[str, Any] = {"variants": VARIANTS, "sizes": SMALL, "text": held_out_text()}
    return study_low_bit(source, "tiny", store=folder / "cells", **(settings | more))


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return studied(folder)


def test_every_row_is_measured_or_says_why_not(study: Study, folder: Path) -> None:
    assert [row.name for row in study.measured] == ["float16", "rtn int2-g128-asym", "billm 1.1", "smoothquant int8"]
    assert [row.name for row in study.rows if row.skipped] == ["no-such-method 2", "qlora", "ir-qlora tuned"]
    for row in study.measured:
        figures = row.figures
        assert len(figures["losses"]) == 2
        assert 0 <= figures["recall"] <= 1
        assert figures["num_recall"] == figures["num_choice"] == 4
    float_row, rounded, billm, eight = study.measured
    assert rounded.figures["bits_per_weight"] == pytest.approx(2.25)
    assert billm.figures["bits_per_weight"] == pytest.approx(2 + 7 * 16 / 128, abs=0.3)
    gaps = {row.name: low_bit_report.loss(row) - low_bit_report.loss(float_row) for row in (rounded, eight)}
    assert abs(gaps["smoothquant int8"]) < abs(gaps["rtn int2-g128-asym"])
    assert not list((folder / "made").glob("*")) or not (folder / "made").exists()


def test_finished_cells_are_not_measured_again(study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(low_bit_llama3_study, "judged", refuse)
    again = studied(folder)
    assert [row.figures for row in again.rows] == [row.figures for row in study.rows]
    with pytest.raises(AssertionError, match="measured again"):
        studied(
            folder,
            sizes=Sizes(
                calibration=256,
                sequence_tokens=128,
                windows=1,
                window_tokens=32,
                prompts=1,
                prompt_tokens=160,
                questions=4,
            ),
        )


def test_report(study: Study, tmp_path: Path) -> None:
    lines = low_bit_report.lines(study)
    assert [line[0] for line in lines] == [row.name for row in study.measured]
    assert all(len(line) == len(low_bit_report.COLUMNS) for line in lines)
    told = low_bit_report.to_dict(study)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["version"] == 1
    assert "within 3 true bits" in "".join(told["remarks"])
    assert "left out: qlora" in "".join(told["remarks"])
    pytest.importorskip("matplotlib")
    written = {path.name for path in low_bit_report.write(study, tmp_path)}
    assert written == {"study.json", "study.html", "perplexity.png", "recall.png", "choice.png"}
    page = (tmp_path / "study.html").read_text()
    assert "billm 1.1" in page
    assert "src=" not in page.replace('src="data:', "")


def test_the_front_holds_what_nothing_beats(study: Study) -> None:
    rows = study.measured
    kept = [row.figures for row in rows]
    for row, (bits, loss) in zip(rows, [(16, 1.0), (2.0, 3.0), (3.0, 2.0), (3.5, 2.5)], strict=True):
        row.figures = {**row.figures, "bits_per_weight": bits, "losses": [loss, loss]}
    try:
        assert low_bit_report.frontier(study) == {rows[0].name, rows[1].name, rows[2].name}
        assert low_bit_report.measure(rows[2], "perplexity") == pytest.approx(math.exp(2.0))
    finally:
        for row, figures in zip(rows, kept, strict=True):
            row.figures = figures


def test_rows_are_chosen_and_unknown_ones_refused(folder: Path, study: Study) -> None:
    assert {v.name for v in select(["billm", "pb-llm"], None, False)} == {"pb-llm 2", "pb-llm 1.7", "billm 1.1"}
    assert {v.method for v in select(None, [1.1, 1.7], False)} == {"billm", "pb-llm"}
    assert max(v.nominal for v in select(None, None, True)) <= 3
    assert len(select(None, None, False)) == len(GRID) == len({v.name for v in GRID})
    with pytest.raises(InputError, match="unknown method 'gguf'"):
        select(["gguf"], None, False)
    with pytest.raises(InputError, match="no method has these"):
        select(None, [17.0], False)
    with pytest.raises(InputError, match="give at least"):
        studied(folder, text="a few words")
    assert np.isfinite(low_bit_report.loss(study.measured[0]))
