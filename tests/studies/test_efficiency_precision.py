"""Precisions of a stored model: bytes that are held, losses as it runs, and the compression ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.plan.choose import held_out_text
from memwall.studies.efficiency_precision import flop_of, stored
from memwall.studies.efficiency_records import Record, compression_ratio
from memwall.studies.efficiency_sizes import TINY
from memwall.studies.subjects import StudyModel
from tests.compress.tiny_model import make_model


def measured(folder: Path, form: str, **more: Any) -> Record:
    source = folder / "model"
    if not source.exists():
        make_model(source)
    text = folder / "text"
    text.write_text(held_out_text(), encoding="utf-8")
    request = {"directory": str(source), "name": "tiny", "technique": form, "sizes": TINY.to_dict(), "threads": 1,
               "held_out": str(text), **more}  # fmt: skip
    return Record.from_dict(stored(request, lambda done, whole, what: None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


def test_bytes_losses_and_ratio(folder: Path) -> None:
    base = measured(folder, "bfloat16")
    baseline = {"weight_bytes": base.figures["weight_bytes"], "losses": base.quality["losses"]}
    four = measured(folder, "int4", baseline=baseline)
    assert base.metrics.mcr == pytest.approx(1)
    assert base.figures["bits_per_weight"] == pytest.approx(16)
    assert 4 < four.figures["bits_per_weight"] < 4.6  # scales are counted
    assert four.metrics.mcr == pytest.approx(
        compression_ratio(base.figures["weight_bytes"], four.figures["weight_bytes"], base.loss or 0, four.loss or 0)
    )
    assert len(four.quality["losses"]) == TINY.windows
    assert four.metrics.it == pytest.approx(len(four.figures["steps_s"]) / sum(four.figures["steps_s"]))
    assert four.axis == base.axis == "precision"
    assert four.group == base.group


def test_without_text_nothing_is_judged(folder: Path) -> None:
    record = measured(folder, "float32", held_out=None)
    assert record.quality == {}
    assert record.metrics.mcr is None
    assert record.figures["weight_bytes"] > 0


def test_operations_of_a_token(folder: Path) -> None:
    measured(folder, "float32", held_out=None)
    model = StudyModel(folder / "model", "float32", 32)
    shapes = [t.shape for t in model.config.tensors() if t.role in ("linear", "head", "router", "expert")]
    tied = [t.shape for t in model.config.tensors() if t.role == "embedding" and model.config.tie_word_embeddings]
    assert flop_of(model) == sum(2 * int(np.prod(shape)) for shape in shapes + tied)
