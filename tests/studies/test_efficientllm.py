"""The efficiency study in small: records kept and taken again, axes that cannot run, the page and the JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.compress.model import compress_model
from memwall.errors import InputError
from memwall.plan.choose import held_out_text
from memwall.studies import efficiency_report, efficientllm
from memwall.studies.efficiency_records import Record
from memwall.studies.efficiency_sizes import AXES, TINY, Sizes, select
from memwall.studies.efficientllm import Study, study_efficiency
from tests.compress.tiny_model import make_model

torch = pytest.importorskip("torch")
CHOSEN = {"attention": ("mha", "mla"), "experts": ("moe",), "precision": ("int4",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def studied(folder: Path, **more: Any) -> Study:
    source = folder / "model"
    if not source.exists():
        make_model(source)
    text = held_out_text().encode()
    settings: dict[str, Any] = {"axes": CHOSEN, "sizes": TINY, "text": text[:30_000], "held_out": text[30_000:]}
    return study_efficiency(source, "tiny", store=folder / "records", threads=1, **(settings | more))


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return studied(folder)


def test_a_record_a_run(study: Study, folder: Path) -> None:
    told = [(record.axis, record.technique, record.stage) for record in study.records]
    assert told == [
        ("attention", "mha", "pretraining"), ("attention", "mha", "inference"),
        ("attention", "mla", "pretraining"), ("attention", "mla", "inference"),
        ("experts", "moe", "pretraining"), ("experts", "moe", "inference"),
        ("precision", "bfloat16", "inference"), ("precision", "int4", "inference"),
    ]  # fmt: skip
    files = sorted((folder / "records").glob("*.json"))
    assert len(files) == len(told)
    assert [path.name for path in (folder / "records").iterdir() if path.suffix != ".json"] == []
    kept = [Record.from_dict(json.loads(path.read_text())) for path in files]
    assert {(each.axis, each.technique, each.stage) for each in kept} == set(told)


def test_a_stopped_study_goes_on(study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All records are taken from disk; without one decoding its training is run again, as its weights are gone."""
    asked: list[str] = []
    call = efficientllm.Runner.call
    monkeypatch.setattr(
        efficientllm.Runner,
        "call",
        lambda self, module, job, *more: asked.append(job) or call(self, module, job, *more),
    )
    again = studied(folder)
    assert again.records == study.records
    assert asked == []
    lost = next(record for record in study.records if record.technique == "mla" and record.stage == "inference")
    path = next(
        p
        for p in (folder / "records").glob("*.json")
        if json.loads(p.read_text()) == json.loads(json.dumps(lost.to_dict()))
    )
    path.write_text("{")
    third = studied(folder)
    assert asked == ["pretrain", "decode"]
    assert [(r.technique, r.stage, r.loss) for r in third.records] == [
        (r.technique, r.stage, r.loss) for r in study.records
    ]


def test_weights_wait_for_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = efficientllm.Runner.call

    def stopped(self: Any, module: str, job: str, *more: Any) -> Record:
        if job == "decode":
            raise KeyboardInterrupt
        return call(self, module, job, *more)

    monkeypatch.setattr(efficientllm.Runner, "call", stopped)
    one = {"axes": {"attention": ("mqa",)}}
    with pytest.raises(KeyboardInterrupt):
        studied(tmp_path, **one)
    assert len(list((tmp_path / "records" / "waiting").iterdir())) == 1
    asked: list[str] = []
    monkeypatch.setattr(
        efficientllm.Runner,
        "call",
        lambda self, module, job, *more: asked.append(job) or call(self, module, job, *more),
    )
    assert len(studied(tmp_path, **one).records) == 2
    assert asked == ["decode"]
    assert not (tmp_path / "records" / "waiting").exists()


def test_progress_reaches_the_end(folder: Path, study: Study) -> None:
    told: list[tuple[int, int, str]] = []
    studied(folder, progress=lambda *each: told.append(each))
    assert told[-1][0] == told[-1][1]
    assert all(done <= whole for done, whole, _ in told)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_axes_that_cannot_run_are_left_out_with_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientllm, "PEFT_MODULE", "memwall.studies.no_such_module")
    found = studied(folder, axes={"peft": AXES["peft"]})
    assert found.records == ()
    assert found.left_out == ("peft: this memwall has no fine-tuning axis",)
    find = efficientllm.importlib.util.find_spec
    monkeypatch.setattr(efficientllm.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    left = efficientllm.missing({"attention": ("mha",), "precision": ("int4",)})
    assert left.keys() == {"attention"}
    assert "memwall[torch]" in left["attention"]


def test_json_page_and_table_are_of_the_records(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = efficiency_report.to_dict(study)
    again = Study(
        records=tuple(Record.from_dict(each) for each in json.loads(json.dumps(told))["records"]),
        left_out=study.left_out, sizes=study.sizes, machine=study.machine, seconds=study.seconds,
    )  # fmt: skip
    assert efficiency_report.to_dict(again) == told
    paths = {path.name for path in efficiency_report.write(study, tmp_path)}
    assert {
        "study.json",
        "study.html",
        "precision-inference-series.png",
        "attention-inference.png",
        "precision-inference.png",
    } <= paths
    page = (tmp_path / "study.html").read_text()
    assert "src=" not in page
    assert "modelled" in page or "rapl" in page
    for rows in efficiency_report.groups(study).values():
        for row, line in zip(rows, efficiency_report.lines(rows), strict=True):
            assert line[0] == row.technique
            assert f"({row.ranks['amu']})" in line[4]


def test_energy_that_is_modelled_says_so_everywhere(study: Study) -> None:
    for key, rows in efficiency_report.groups(study).items():
        sources = {record.metrics.power_source for row in rows for record in row.records}
        assert all(source in efficiency_report.title(key, rows) for source in sources)


@pytest.mark.parametrize(
    ("axes", "techniques", "says"),
    [(["heads"], None, "unknown axis 'heads'"), (None, ["gpt"], "'gpt' is none of"), (["experts"], ["mha"], "'mha'")],
)
def test_unknown_axes_and_techniques_are_named(axes: Any, techniques: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        select(axes, techniques)
    assert select(["experts"], None) == {"experts": ("dense", "moe")}
    assert select(None, ["mla", "int4"]) == {"attention": ("mla",), "precision": ("int4",)}


@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"steps": 0}, {"tokens": 8, "decoded": 8}, {"width": 30}, {"arithmetic": "int8"}]
)
def test_bad_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Sizes(**wrong)


def test_too_little_text_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="held-out text has 5 bytes"):
        studied(folder, held_out=b"short")


def test_models_that_cannot_be_compared_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    """The axes with training come first, so a wrong folder must not wait for them."""
    text = held_out_text().encode()
    for wrong, says in ((tmp_path / "nowhere", "nowhere"), (compressed(tmp_path), "compressed weights")):
        with pytest.raises(InputError, match=says):
            study_efficiency(
                wrong, "wrong", axes=AXES, sizes=TINY, text=text, held_out=text, store=tmp_path / "records"
            )
    assert not list((tmp_path / "records").glob("*.json"))


def compressed(folder: Path) -> Path:
    compress_model(make_model(folder / "float"), folder / "packed", bits="int8", method="rtn")
    return folder / "packed"
