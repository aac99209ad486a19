"""Streamed models hold the same weights as their sources, and nothing half-made is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress.model import compress_model
from memwall.engine import neuron_file
from memwall.engine.neuron_file import make_flash_model
from memwall.engine.neuron_predictors import Training
from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from tests.engine.relu_models import write_relu_model

QUICK = Training(rank=4, steps=10)


@pytest.mark.parametrize(("kind", "dtype"), [("falcon", "float16"), ("llama", "float32"), ("fatrelu", "float16")])
def test_neurons_and_the_rest_are_the_source(tmp_path: Path, kind: str, dtype: str) -> None:
    config = write_relu_model(tmp_path / "whole", kind, dtype)
    told: list[str] = []
    report = make_flash_model(
        tmp_path / "whole", tmp_path / "out", max_tokens=1024, training=QUICK,
        progress=lambda done, whole, what: told.append(what),
    )  # fmt: skip
    made = ModelConfig.from_directory(tmp_path / "out")
    layout = made.neurons
    assert layout is not None
    assert layout == report.layout
    assert layout.form == dtype
    assert layout.row_bytes % 512 == 0
    with Checkpoint(tmp_path / "whole") as whole, Checkpoint(tmp_path / "out") as rest:
        names = ("gate", "up") if config.gated else ("up",)
        rows = np.fromfile(tmp_path / "out" / "neurons.bin", layout.dtype).reshape(2, 96, -1)
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp."
            parts = [whole.tensor(f"{prefix}{name}_proj.weight") for name in names]
            parts.append(whole.tensor(f"{prefix}down_proj.weight").T)
            np.testing.assert_array_equal(rows[layer, :, : 64 * len(parts)], np.concatenate(parts, 1))
            assert rest.tensor(f"{prefix}predictor.up.weight").shape == (96, 4)
        for spec in made.tensors():
            if "predictor" not in spec.name:
                np.testing.assert_array_equal(rest.tensor(spec.name), whole.tensor(spec.name))
    held = np.array(layout.held)
    assert (np.diff(held, axis=0) >= 0).all()
    assert {"reading the text", "writing"} <= set(told)
    assert len(report.judged) == 2
    assert all(0.9 < each.recall <= 1 for each in report.judged)


def test_models_without_zeros_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"swiglu.*needs a ReLU"):
        make_flash_model(DEMO_DIRECTORY, tmp_path / "out")
    write_relu_model(tmp_path / "whole", "llama")
    make_flash_model(tmp_path / "whole", tmp_path / "out", max_tokens=1024, training=QUICK)
    with pytest.raises(InputError, match="already"):
        make_flash_model(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(InputError, match="stream already"):
        make_flash_model(tmp_path / "out", tmp_path / "again")


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_relu_model(tmp_path / "whole", "falcon")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(neuron_file, "write_neurons", fail)
    with pytest.raises(OSError, match="full"):
        make_flash_model(tmp_path / "whole", tmp_path / "out", max_tokens=1024, training=QUICK)
    assert [item.name for item in tmp_path.iterdir()] == ["whole"]


def test_what_needs_all_weights_refuses_streamed_models(tmp_path: Path) -> None:
    write_relu_model(tmp_path / "whole", "llama")
    make_flash_model(tmp_path / "whole", tmp_path / "out", max_tokens=1024, training=QUICK)
    with pytest.raises(InputError, match="stream from disk"):
        compress_model(tmp_path / "out", tmp_path / "packed", method="rtn")
