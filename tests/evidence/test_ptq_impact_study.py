"""What the verdicts of the format study's evidence hang on: yardsticks, tables, weights in bytes of their own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.formats import codec
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.studies.ptq_models import FormatModel
from memwall.systems import find_system


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_experiment(find_system("ptq-impact-study"))


def test_plain_integers_by_hand(study: ModuleType) -> None:
    values = np.zeros((1, 64), np.float32)
    values[0, :3] = [7, -3.4, 1.6]
    assert study.integers(values, symmetric=True)[0, :3].tolist() == [7, -3, 2]
    values[0, :3] = [10, -5, 2.6]
    assert study.integers(values, symmetric=False)[0, :3].tolist() == [10, -5, 3]


def test_the_tables_are_those_of_the_formats(study: ModuleType) -> None:
    assert study.table_claim().passed
    assert len(set(study.NF4)) == 16
    assert sorted(study.FP4) != list(study.FP4)


def test_another_table_fails(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "FP4", tuple(sorted(study.FP4)))
    assert not study.table_claim().passed


def test_the_outlier_path_matters(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((64, 256), np.float32)}
    assert study.outlier_claim(weights).passed
    monkeypatch.setattr(study.llm_int8, "THRESHOLD", 1e9)
    assert not study.outlier_claim(weights).passed


def test_layers_share_no_bytes_and_products_agree(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SHAPES", ((128, 64), (32, 128)))
    values = {shape: np.random.default_rng(0).standard_normal(shape, np.float32) for shape in study.SHAPES}
    layers = study.layers_of("nf4", values, 2)
    x = np.ones((1, 64), np.float32)
    expected = x @ codec("nf4").decode(codec("nf4").encode(values[128, 64])).T
    for layer in layers:
        out = np.empty((1, 128), np.float32)
        study.kernels.linear(x, [layer[0]], [out], exact=True)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert layers[0][0] is not layers[1][0]
    took = study.alternately({"a": study.pass_of(layers, {64: x, 128: np.ones((1, 128), np.float32)}, exact=False)}, 1)
    assert took["a"] > 0


def test_a_claim_of_all_models_fails_with_one(study: ModuleType) -> None:
    studies = [SimpleNamespace(model=name) for name in ("a", "b")]
    good = study.of_all(studies, "c", "small", lambda one: (f"{one.model}!", True))
    assert good.measured == "a: a! | b: b!"
    assert good.required == "small, for each of 2 models"
    assert good.passed
    assert not study.of_all(studies, "c", "small", lambda one: ("", one.model == "a")).passed
    assert study.family_claim(studies).passed is None


def test_orders_of_divergences(study: ModuleType) -> None:
    rising = np.arange(9.0).reshape(3, 3) / 100
    good = {"int8": {0.5: rising, 1.0: rising}, "nf4": {0.5: rising + 1, 1.0: rising + 1},
            "fp4": {0.5: rising + 2, 1.0: rising * 2 + 0.95}}  # fmt: skip
    assert study.strays_in_order(good)  # at 1.0 fp4 strays less, by less than two standard errors
    assert not study.strays_in_order({**good, "fp4": {0.5: rising + 2, 1.0: rising + 0.9}})
    assert not study.strays_in_order({**good, "fp4": {0.5: rising * 2 + 0.95, 1.0: rising * 2 + 0.95}})
    assert not study.strays_in_order({**good, "int8": {0.5: rising, 1.0: rising + 1}})


@pytest.mark.parametrize(("form", "kv_heads"), [("falcon", 1), ("llama", 2)])
def test_a_model_is_trained_once(
    study: ModuleType, form: str, kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "cache_directory", lambda: tmp_path / "cache")
    size = study.Trained(family=form, hidden=256, layers=1, steps=3, rate=1e-3, batch=1, sequence=16)
    text = "The wall between memory and compute. " * 20
    first = study.trained_model(tmp_path / "first", size, text, None)
    config = ModelConfig.from_directory(first)
    falcon = form == "falcon"
    assert (config.family, config.parallel, config.layer_norm) == (form, falcon, falcon)
    assert (config.num_heads, config.num_kv_heads) == (4, kv_heads)
    training = import_module("memwall.studies.ptq_training_torch")
    monkeypatch.setattr(training, "train", None)  # what an earlier run has kept is read
    second = study.trained_model(tmp_path / "second", size, text, None)
    with Checkpoint(first) as one, Checkpoint(second) as other:
        assert all(np.array_equal(one.tensor(name), other.tensor(name)) for name in one.names())
    with pytest.raises(TypeError):
        study.trained_model(tmp_path / "third", size, text + "More. ", None)  # another text is another model
    models = {name: FormatModel(second, name, context_tokens=64) for name in ("bf16", "nf4")}
    losses = {name: np.mean(model.losses([0, 5], [9] * 20)) for name, model in models.items()}
    assert losses["bf16"] != losses["nf4"]
    assert abs(losses["bf16"] - losses["nf4"]) < 0.5
    for model in models.values():
        model.release()


def test_the_whole_run_has_two_families_of_two_sizes(study: ModuleType) -> None:
    demo = ModelConfig.from_directory(model_directory("demo"))
    trained = [ModelConfig.from_dict(size.config()) for size in study.TRAINED]
    assert [(config.family, config.num_parameters) for config in (demo, *trained)] == [
        ("llama", 6_951_168), ("llama", 28_648_960), ("falcon", 5_180_928), ("falcon", 28_978_176),
    ]  # fmt: skip
    assert len({size.name for size in study.TRAINED}) == 3


def test_every_source_is_scored_and_none_of_that_is_learned(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, Path | None]] = []

    def text(scored: str | None = None, root: Path | None = None) -> str:
        asked.append((scored, root))
        name = "standard" if root is None else root.name
        return f"{name} learned" if scored else "." * 400_000 + f"{name} scored"

    monkeypatch.setattr(study, "library_text", text)
    learned, scored = study.training_texts()
    assert [part.split()[0].strip(".") for part in scored.split("\n\n")] == ["standard", *study.PACKAGES]
    assert len(scored) == study.SCORED_CHARACTERS + 2 * len(study.PACKAGES)
    assert learned == "\n\n".join(f"{name} learned" for name in ("standard", *study.PACKAGES))
    assert all(unlike.endswith(scored) for unlike, _ in asked if unlike)
    assert [root for unlike, root in asked if unlike] == [root for unlike, root in asked if not unlike]
