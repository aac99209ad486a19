"""SmoothQuant: equation 4 by hand, and 8-bit weights and activations where channels are planted forty times larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.compress.model import CompressReport, compress_model
from memwall.compress.smoothquant import SmoothQuant
from memwall.compress.transforms import Scale
from memwall.errors import InputError
from memwall.models import Checkpoint
from tests.compress.planted import logits_of, plant_outliers
from tests.compress.tiny_model import QUICK, make_model


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    return plant_outliers(make_model(folder / "tiny"), folder / "planted", 40.0)


def compress(source: Path, out: Path, **options: Any) -> CompressReport:
    return compress_model(source, out, **{"method": "smoothquant", "tuning": QUICK, **options})


def test_factors_are_those_of_the_paper() -> None:
    weights = [np.float32([[1, -4], [0.5, 2]]), np.float32([[0.25, 9]])]
    found = SmoothQuant().factors([np.float32([16, 4]), np.float32([8, 1])], weights)
    np.testing.assert_allclose(found, [16**0.5 / 1**0.5, 4**0.5 / 9**0.5], rtol=1e-6)
    np.testing.assert_allclose(SmoothQuant(strength=1).factors([np.float32([16, 4])], weights), [16, 4], rtol=1e-6)
    np.testing.assert_allclose(SmoothQuant(strength=0).factors([np.float32([16, 4])], weights), [1, 1 / 9], rtol=1e-6)


def per_token(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def test_rounding_by_token_and_by_output_loses_less_after_it() -> None:
    """The paper's own setting: dynamic scales per token, static ones per output channel."""
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 96)).astype(np.float32)
    x[:, ::13] *= 60
    weight = random.standard_normal((48, 96)).astype(np.float32)
    scale = Scale(SmoothQuant().factors([np.abs(x).max(axis=0)], [weight]))
    expected = x @ weight.T
    plain = per_token(x) @ per_token(weight).T
    smooth = per_token(scale.produce(x)) @ per_token(scale.read(weight)).T
    assert np.square(smooth - expected).mean() < 0.2 * np.square(plain - expected).mean()


def test_8_bits_on_both_sides_with_planted_outliers(planted: Path, tmp_path: Path) -> None:
    report = compress(planted, tmp_path / "smooth")
    assert report.specs["model.layers.0.mlp.up_proj.weight"] == "int8-g64"
    compress(planted, tmp_path / "plain", method="rtn", bits="int8")
    expected = logits_of(planted)
    smooth, plain = (
        float(np.square(logits_of(tmp_path / name, exact=False) - expected).mean()) for name in ("smooth", "plain")
    )
    assert smooth < 0.5 * plain
    with Checkpoint(tmp_path / "smooth") as checkpoint:
        checkpoint.verify(digests=True)
        assert checkpoint.source_dtype("model.layers.0.input_layernorm.weight") == "float32"


def test_bad_settings(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        compress(planted, tmp_path / "out", options={"strength": "2"})
    with pytest.raises(InputError, match="integer formats"):
        compress(planted, tmp_path / "out", bits="nf4")
