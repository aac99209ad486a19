"""CSKV's evidence in small: factors fitted in place are those of the front door, and more channels lose less."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.compress.calibration import CalibrationSettings
from memwall.kv import cskv_fit
from memwall.kv.cskv import CskvSettings
from memwall.kv.policy import parse
from memwall.models import model_directory
from memwall.systems import find_system


@pytest.fixture(scope="module")
def cskv() -> ModuleType:
    return load_experiment(find_system("cskv"))


def test_the_study_s_factors_are_the_fit_s(cskv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cskv_fit, "CALIBRATION", CalibrationSettings(max_tokens=2048, sequence_tokens=512))
    policy = "cskv(0.2,init=pca,train=0)"
    sizes = cskv.kivi.Sizes(
        windows=1, step_tokens=16, recall_tries=1, rounds=1, prompt_tokens=130, decoded_tokens=32, recall_tokens=64
    )
    demo = cskv.CskvDemo(model_directory("demo"), None, sizes, 10)
    found = cskv_fit.fit_factors(CskvSettings.from_policy(parse(policy)), model_directory("demo"), None, None, None)
    for layer, pairs in enumerate(demo.pairs(policy)):
        for name, pair in zip("kv", pairs):
            product = found[f"{layer}.{name}.out"].astype(np.float32) @ found[f"{layer}.{name}.in"].astype(np.float32)
            np.testing.assert_allclose(product.T, pair[0] @ pair[1], atol=5e-3)
    scores = cskv.xquant.Scores(demo, lambda what: None)
    few, many = (scores.of(f"cskv({density},init=pca,train=0)").divergence for density in (0.1, 0.5))
    assert few > 3 * many > 0
