"""Training a model's own weights: all, or the last layers; the result is a model that the engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memwall.compress.tune import tune_model
from memwall.compress.tuning import tune_method
from memwall.engine import Settings, load
from memwall.errors import InputError
from memwall.models import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.torch_decoder import TorchDecoder
from tests.compress.tiny_model import contents, make_model

QUICK = {"context": "64", "batch": "4", "steps": "4", "save_every": "2", "held_out": "0.1", "learning_rate": "0.001"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"A city of {n} lies on a river that comes from hill {n * 7 % 13}. " for n in range(120)))
    return path


def changed(model: Path, out: Path) -> set[str]:
    """Names of tensors that differ."""
    with Checkpoint(model) as before, Checkpoint(out) as after:
        return {
            t.name for t in before.config.tensors() if not np.array_equal(before.tensor(t.name), after.tensor(t.name))
        }


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_the_result_is_a_model(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    out, config = tmp_path / method, ModelConfig.from_directory(model)
    report = tune_model(model, text, out, method=method, options=QUICK)
    losses = [each["held_out"] for each in report.history]
    assert losses[-1] < losses[0]
    found = changed(model, out)
    last = {t.name for t in config.tensors() if t.name.startswith(("model.layers.1.", "model.layers.2."))}
    assert found == ({t.name for t in config.tensors()} if method == "full" else last)
    assert report.run_with == f"memwall run {out}"
    tokens = np.arange(5, 60)
    session = load(out, Settings(weights="float32", kv="float32", context_tokens=64, exact=True, logit_rows=64))
    logits = session.decoder.forward(tokens, session.cache, all_logits=True)
    expected = TorchDecoder.from_directory(out)(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())
    session.release()


def test_frozen_layers_cost_neither_gradients_nor_moments(model: Path, text: Path, tmp_path: Path) -> None:
    reports = {m: tune_model(model, text, tmp_path / m, method=m, options=QUICK) for m in ("full", "freeze", "lora")}
    rows = {m: {r["owner"]: int(r["bytes"]) for r in report.rows} for m, report in reports.items()}
    for method, report in reports.items():
        owner = "adapters" if method == "lora" else "trained"
        assert rows[method]["optimizer"] == report.predicted["optimizer"]
        assert rows[method][f"{owner}/gradients"] == report.predicted[f"{owner}/gradients"]
        assert rows[method]["optimizer"] == pytest.approx(8 * report.trained_parameters, rel=0.02)
    assert rows["full"]["optimizer"] > rows["freeze"]["optimizer"] > rows["lora"]["optimizer"]


def test_going_on_gives_the_same_bits(model: Path, text: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune_model(model, text, whole, method="freeze", options=QUICK)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        tune_model(model, text, cut, method="freeze", options=QUICK, progress=stop)
    report = tune_model(model, text, cut, method="freeze", options=QUICK)
    assert report.resumed_from == 2
    assert contents(cut)["model.safetensors"] == contents(whole)["model.safetensors"]


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("full", {"weights": "nf4-dq"}, "trains weights themselves"),
        ("full", {"options": {**QUICK, "rank": "4"}}, "no setting 'rank'"),
        ("freeze", {"options": {**QUICK, "layers": "9"}}, "layers=9: the model has 3"),
        ("freeze", {"options": {**QUICK, "layers": "0"}}, "layers=0"),
    ],
)
def test_refusals(model: Path, text: Path, tmp_path: Path, method: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune_model(model, text, tmp_path / "out", method=method, **{"options": QUICK, **more})
    assert not list(tmp_path.iterdir())


def test_only_its_own_results_are_replaced(model: Path, text: Path, tmp_path: Path) -> None:
    out = make_model(tmp_path / "other")
    with pytest.raises(InputError, match="is not a model that was tuned here"):
        tune_model(model, text, out, method="freeze", options=QUICK, force=True)
    assert tune_method("freeze").settings()["layers"] == 2
