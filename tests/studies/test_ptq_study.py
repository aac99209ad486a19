"""The study of formats on the demo model, in small: draws, judges, stored cells, answers, advice, page, peers."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from memwall.engine.counter import CounterDraws
from memwall.engine.quality import log_softmax
from memwall.errors import InputError
from memwall.models import ModelConfig, model_directory
from memwall.plan.choose import held_out_text
from memwall.studies import ptq_across, ptq_answers, ptq_peers, ptq_report
from memwall.studies.llm_int8 import Int8SsmDecoder
from memwall.studies.ptq_costs import costs_of
from memwall.studies.ptq_impact_study import Grid, Runner, Study, study_ptq
from memwall.studies.ptq_models import FORMATS, PROMPTS, FormatModel, forced, specs_of
from tests.models.ssm_models import CONFIGS, write_model

DEMO = model_directory("demo")
SMALL = Grid(
    temperatures=(0.5, 0.8), top_ks=(1, 200), lengths=(4, 8), seeds=2, tokens=6, windows=2, window_tokens=48, steps=4,
    repeats=1,
)  # fmt: skip


def studied(folder: Path, **more: Any) -> Study:
    settings: dict[str, Any] = {"formats": ("bf16", "nf4", "fp4"), "grid": SMALL, "prompts": PROMPTS[:2],
                                "costs": False}  # fmt: skip
    return study_ptq(DEMO, "demo", text=held_out_text(), store=folder, **(settings | more))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    found = studied(tmp_path_factory.mktemp("cells"))
    for number, row in enumerate(found.rows):  # as a process of its own would have measured them
        row.costs = {
            "ledger_bytes": 18_000_000 - 4_000_000 * number, "resident_bytes": 18_000_000 - 4_000_000 * number,
            "weight_bytes": 14_000_000 - 4_000_000 * number, "bits_per_weight": 16 - 5 * number,
            "decode_tokens_per_s": 500.0 + 100 * number, "float_tokens_per_s": None, "time_over_bf16": None,
            "prefill_tokens_per_s": 4000.0,
        }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, FormatModel]:
    return {form: FormatModel(DEMO, form, context_tokens=96) for form in ("bf16", "int8", "nf4", "fp4")}


def test_only_linear_layers_are_in_the_format() -> None:
    config = ModelConfig.from_directory(DEMO)
    for form in FORMATS:
        specs = specs_of(config, form)
        assert specs["model.embed_tokens.weight"] == "bfloat16"
        assert specs["model.norm.weight"] == "float32"
    assert specs_of(config, "nf4")["model.layers.0.mlp.up_proj.weight"] == "nf4-g64"
    for unknown in ("nf5", "saved", "mixed-3.5"):
        with pytest.raises(InputError, match=unknown):
            specs_of(config, unknown)


def test_losses_and_divergences_by_hand(models: dict[str, FormatModel]) -> None:
    base, other = models["bf16"], models["fp4"]
    prompt, made = base.encode(PROMPTS[0]), base.encode(PROMPTS[1])[1:]
    rows = np.stack([row.copy() for row in base.rows(prompt, made)])
    expected = -log_softmax(rows)[np.arange(len(made)), made]
    np.testing.assert_allclose(base.losses(prompt, made), expected, rtol=1e-4)
    theirs = np.stack([row.copy() for row in other.rows(prompt, made)])
    p, q = log_softmax(rows / np.float32(0.5)), log_softmax(theirs / np.float32(0.5))
    kl, agreed = forced(base, other, prompt, made, 0.5)
    assert kl == pytest.approx(float((np.exp(p) * (p - q)).sum(1).mean()), rel=1e-3)
    assert agreed == (rows.argmax(1) == theirs.argmax(1)).mean()
    assert forced(base, base, prompt, made, 0.5) == (0, 1)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_model_gives_all_its_memory_back(form: str) -> None:
    model = FormatModel(DEMO, form, context_tokens=64)
    assert model.ledger.total() > 5_000_000
    model.losses([0], [5, 6, 7])
    model.release()
    assert model.ledger.total() == 0


def test_formats_stray_in_the_order_of_their_errors(models: dict[str, FormatModel]) -> None:
    prompt = models["bf16"].encode(PROMPTS[2])
    made = models["bf16"].sample(prompt, CounterDraws(seed=3), temperature=0.8, top_k=200, num_tokens=40)
    kl = {form: forced(models["bf16"], models[form], prompt, made, 1.0)[0] for form in ("int8", "nf4", "fp4")}
    assert 0 < kl["int8"] < kl["nf4"] < kl["fp4"] < 0.2
    assert models["nf4"].bits_per_weight == 4.5


def test_a_longer_run_begins_like_a_shorter_one(models: dict[str, FormatModel]) -> None:
    model, prompt = models["nf4"], models["nf4"].encode(PROMPTS[0])
    short, long = (
        model.sample(prompt, CounterDraws(seed=5, prompt=1), temperature=0.9, top_k=50, num_tokens=n) for n in (5, 12)
    )
    assert long[:5] == short
    other = model.sample(prompt, CounterDraws(seed=6, prompt=1), temperature=0.9, top_k=50, num_tokens=12)
    assert other != long
    greedy = [
        model.sample(prompt, CounterDraws(seed=seed), temperature=t, top_k=k, num_tokens=5)
        for seed, t, k in ((1, 0.0, 0), (2, 0.8, 1))
    ]
    assert greedy[0] == greedy[1]


def test_bfloat16_against_itself_differs_nowhere(study: Study) -> None:
    for measure, value in (("kl", 0), ("same_text", 1), ("top1_agreement", 1)):
        for table in ptq_answers.curves(study, measure)["bf16"].values():
            assert (table == value).all()


def test_a_kill_loses_one_cell_and_nothing_stale_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    for task, figures in (
        ("heldout", {"losses": [4.0]}),
        ("texts", {"tokens": [[1]] * 4, "losses": [[1.0]] * 4}),
        ("forced", {"kl": [0.0] * 4, "agreement": [1.0] * 4}),
    ):

        def run(self: Runner, form: str, setting: Any, texts: Any, task: str = task, figures: Any = figures) -> Any:
            done.append((form, task))
            return figures

        monkeypatch.setattr(Runner, f"_{task}", run)

    def stop(at: int, whole: int, what: str) -> None:
        if at == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studied(tmp_path, progress=stop)
    assert len(done) == len(list(tmp_path.glob("*.json"))) == 7
    seen: list[tuple[int, int, str]] = []
    studied(tmp_path, progress=lambda *told: seen.append(told))
    assert len(done) == 3 * 6
    assert seen[-1] == (18, 18, "done")
    studied(tmp_path)
    assert len(done) == 18
    studied(tmp_path, grid=dataclasses.replace(SMALL, seeds=2, tokens=7))
    assert len(done) == 18 + 3 * (6 - 3), "held-out cells and those of the longest run do not depend on it"
    studied(tmp_path, prompts=PROMPTS[1:3])
    assert len(done) == 27 + 3 * 5


def test_json_has_intervals_and_differences(study: Study) -> None:
    told = json.loads(json.dumps(ptq_answers.to_dict(study), allow_nan=False))
    assert next(iter(told)) == "version"
    cells = {(c["format"], c["temperature"], c["top_k"], c["max_new_tokens"]): c["measures"] for c in told["cells"]}
    assert set(cells) == {
        (form, t, k, n)
        for form in ("bf16", "nf4", "fp4")
        for t, k, lengths in ((0.5, 200, [6]), (0.8, 1, [6]), (0.8, 200, [4, 6, 8]))
        for n in lengths
    }
    loss = cells["nf4", 0.5, 200, 6]["loss"]
    assert loss["low"] < loss["mean"] < loss["high"]
    assert len(loss["by_seed"]) == 2
    plain = cells["bf16", 0.5, 200, 6]["loss"]
    assert loss["difference"]["mean"] == pytest.approx(loss["mean"] - plain["mean"])
    assert plain["difference"] is None
    ppl = {row["format"]: row["heldout_perplexity"] for row in told["formats"]}
    assert ppl["bf16"] == pytest.approx(math.exp(np.mean(study.base.heldout)))
    assert {one["window"] for one in told["sensitivities"]} == {"[0.5, 0.8]"}


def test_answers_and_advice(study: Study) -> None:
    found = {one.question: one for one in ptq_answers.answers(study)}
    assert len(found) == 3  # no temperatures below 0.5, no dq
    assert {one.verdict for one in found.values()} <= {"holds", "does not hold", "not shown"}
    assert found["bfloat16 is the fastest"].verdict == "does not hold"
    advised = [one for one in ptq_answers.advice(study) if one.window == "[0.5, 0.8]"]
    assert [one.memory_bytes for one in advised] == [10_000_000, 14_000_000, 18_000_000]
    assert advised[0].format == "fp4"
    assert advised[-1].format == "bf16"
    none = ptq_answers.advice(study, 5_000_000)[0]
    assert none.format is None
    assert "the smallest is fp4" in none.reason


def test_table_page_and_plots(study: Study, tmp_path: Path) -> None:
    study.rows.append(dataclasses.replace(study.rows[1], library="bitsandbytes", skipped="not installed", heldout=[],
                                          costs={}, texts={}))  # fmt: skip
    try:
        lines = ptq_report.lines(study)
        assert [line[0] for line in lines] == ["bf16", "nf4", "fp4"]
        assert all(len(line) == len(ptq_report.COLUMNS) for line in lines)
        assert any("not installed" in remark for remark in ptq_report.remarks(study))
        paths = {path.name: path for path in ptq_report.write(study, tmp_path / "out")}
        plots = {"perplexity", "kl", "difference", "repetition", "top_k", "length", "costs"}
        assert set(paths) == {"study.json", "study.html", *(f"{name}.png" for name in plots)}
        page = paths["study.html"].read_text()
        assert page.count("<svg") == 7
        assert not any(outside in page for outside in ("<script", "src=", "<link", "url(http"))
    finally:
        study.rows.pop()


def test_grids() -> None:
    assert SMALL.settings() == [(0.5, 200), (0.8, 200), (0.8, 1)]
    assert set(dataclasses.replace(SMALL, product=True).settings()) == {(0.5, 1), (0.5, 200), (0.8, 1), (0.8, 200)}
    assert (SMALL.tokens_of(0.8, 200), SMALL.tokens_of(0.5, 200)) == (8, 6)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"grid": dataclasses.replace(SMALL, lengths=(1020,))}, "--lengths"),
        ({"grid": dataclasses.replace(SMALL, windows=10**6)}, "tokens; give at least"),
        ({"formats": ("nf5",)}, "nf5"),
    ],
)
def test_what_the_model_cannot_take_is_refused_first(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        studied(tmp_path, **more)
    assert not list(tmp_path.glob("*.json"))


def test_costs_are_those_of_a_process() -> None:
    tokens = list(range(3, 3 + 261))
    found = costs_of(DEMO, "nf4-dq", tokens, steps=4, repeats=1, threads=1)
    assert found["bits_per_weight"] == pytest.approx(4.138, abs=0.001)
    assert found["resident_bytes"] == pytest.approx(found["ledger_bytes"], rel=0.1)
    assert found["weight_bytes"] < found["ledger_bytes"]
    with pytest.raises(InputError, match="nf5"):
        costs_of(DEMO, "nf5", tokens, steps=4, repeats=1, threads=1)


def test_peers_that_cannot_be_had_say_why(tmp_path: Path) -> None:
    arguments: Any = (DEMO, "nf4", [[1, 2, 3]])
    sizes: Any = {"steps": 2, "repeats": 1, "threads": 1}
    assert "cannot be started" in ptq_peers.ask(str(tmp_path / "nothing"), *arguments, **sizes)["skipped"]
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S -E -c 'raise SystemExit(\"broken\")'\n")
    bare.chmod(0o755)
    assert "broken" in ptq_peers.ask(str(bare), *arguments, **sizes)["skipped"]


def test_the_peer_gives_the_same_losses() -> None:
    pytest.importorskip("bitsandbytes")
    tokens = FormatModel(DEMO, "bf16").tokenizer.encode(held_out_text(), add_bos=False)[:299]
    found = ptq_peers.ask(sys.executable, DEMO, "nf4", [[0, *tokens]], steps=2, repeats=1, threads=1)
    assert "bitsandbytes" in found["library"]
    if found.get("skipped"):
        pytest.skip(found["skipped"])
    assert found["losses"][0] == pytest.approx(np.mean(FormatModel(DEMO, "nf4").losses([0], tokens)), rel=0.01)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_models_without_attention_take_part(tmp_path: Path, kind: str) -> None:
    folder = write_model(tmp_path / kind, {**CONFIGS[kind], "vocab_size": 4096})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    found = study_ptq(
        folder, kind, formats=("int8", "nf4", "fp4"), grid=SMALL, prompts=PROMPTS[:2], text=held_out_text(),
        store=tmp_path / "cells", costs=False,
    )  # fmt: skip
    kl = {form: float(np.mean(list(tables.values()))) for form, tables in ptq_answers.curves(found, "kl").items()}
    assert 0 == kl["bf16"] < kl["int8"] < kl["nf4"] < kl["fp4"]
    model = FormatModel(folder, "int8", context_tokens=32)
    model.losses([0], [5, 6, 7])
    products = cast(Int8SsmDecoder, model.decoder).products
    assert products.columns_seen > 0
    assert all("proj" in name for name in products.linears)
    model.release()
    assert model.ledger.total() == 0


def test_answers_across_models(study: Study) -> None:
    other = dataclasses.replace(study, model="other")
    for row in other.rows:
        assert row.costs
    found = ptq_across.across([study, other])
    assert [one.verdict for one in found] == [one.verdict for one in ptq_answers.answers(study)]
    assert found[0].told.startswith(f"{found[0].verdict} for demo, other: ")
    parted = ptq_across.Across(question="q", verdict=ptq_across.DIFFER, models={"a": ("holds", ""), "b": ("no", "")})
    assert parted.told == "models differ: q (a holds; b no)"
    assert ptq_across.folder_names(["x/a", "b"]) == ["a", "b"]
    with pytest.raises(InputError, match="called a"):
        ptq_across.folder_names(["x/a", "y/a/"])
