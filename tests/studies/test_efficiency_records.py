"""Records of the efficiency study: the six metrics by hand, files that come back equal, and what is no record."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.hardware.meter import Series
from memwall.studies.efficiency_records import Record, RecordStore, compression_ratio, metrics_of, software_versions

SERIES = Series(
    dt_s=0.5, times_s=(0.0, 0.5, 1.5), memory_bytes=(100, 200, 200), utilisation=(0.0, 0.5, 0.5),
    busy=((0.0,), (1.0,), (1.0,)), watts=(0.0, 2.0, 2.0), power_source="modelled", sampler_share=0.001,
)  # fmt: skip


def record(**more: object) -> Record:
    metrics = metrics_of(SERIES, steps_s=[0.5, 0.7], stage="inference", count=30, num_parameters=10, tokens=30)
    held: dict[str, object] = {
        "axis": "attention", "group": "1M", "technique": "mqa", "stage": "inference", "model": {"width": 64},
        "num_parameters": 10, "flop_per_token": 20.0, "tokens": 30, "hardware": {"processor": "p"},
        "versions": software_versions(), "seed": 3, "dt_s": 0.5, "series": SERIES, "metrics": metrics,
        "quality": {"losses": [1.0, 2.0]},
    }  # fmt: skip
    return Record(**(held | more))  # type: ignore[arg-type]


def test_metrics_by_hand() -> None:
    found = metrics_of(
        SERIES, steps_s=[0.5, 0.7], stage="inference", count=30, num_parameters=10, tokens=30, base_bytes=50
    )
    assert found.amu_bytes == pytest.approx((75 + 200) / 1.5)
    assert found.amu_own_bytes == pytest.approx((75 + 200) / 1.5 - 50)
    assert found.pcu == pytest.approx(0.5)
    assert found.al_s == pytest.approx(0.6)
    assert found.it == pytest.approx(30 / 1.2)
    assert (found.tt, found.st) == (None, None)
    assert found.aec_w == pytest.approx(2)
    assert found.joules == pytest.approx(3)
    assert found.joules_per_token == pytest.approx(0.1)


@pytest.mark.parametrize(("stage", "name"), [("pretraining", "tt"), ("fine-tuning", "st")])
def test_training_throughput_is_per_parameter(stage: str, name: str) -> None:
    found = metrics_of(SERIES, steps_s=[1.0, 1.0], stage=stage, count=600, num_parameters=100, tokens=600)
    assert getattr(found, name) == pytest.approx(3)
    assert found.it is None


def test_compression_ratio_rewards_small_and_good() -> None:
    assert compression_ratio(400, 100, 1.0, 1.0) == pytest.approx(4)
    assert compression_ratio(400, 100, 1.0, 1.1) == pytest.approx(4 * math.exp(-0.1))
    assert compression_ratio(400, 100, 1.0, 1.1) < compression_ratio(400, 100, 1.0, 1.05)


def test_a_run_without_steps_has_no_latency() -> None:
    with pytest.raises(InputError, match="without steps"):
        metrics_of(SERIES, steps_s=[], stage="inference", count=0, num_parameters=1, tokens=0)


def test_stored_records_come_back_equal(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records")
    key = store.key({"a": 1, "b": [2]})
    assert key == store.key({"b": [2], "a": 1}) != store.key({"a": 1, "b": [3]})
    assert store.read(key) is None
    store.write(key, record())
    assert store.read(key) == record()
    assert record().loss == pytest.approx(1.5)
    assert replace(record(), quality={}).loss is None
    assert len(list(store.folder.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 99}', "null"])
def test_what_is_no_record_is_not_taken(tmp_path: Path, text: str) -> None:
    store = RecordStore(tmp_path)
    (tmp_path / "x.json").write_text(text)
    assert store.read("x") is None


def test_unknown_fields_and_stages_are_named() -> None:
    told = json.loads(json.dumps(record().to_dict()))
    with pytest.raises(InputError, match="unknown fields: colour"):
        Record.from_dict(told | {"colour": "red"})
    with pytest.raises(InputError, match="version 99"):
        Record.from_dict(told | {"version": 99})
    with pytest.raises(InputError, match="pretraining, fine-tuning, inference"):
        record(stage="thinking")
