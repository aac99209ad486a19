"""Fitting alpha: the first of the grid that is close enough, found again by the model it was fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kv import cache_craft_fit, fitted
from memwall.kv.base import CacheModel
from memwall.kv.cache_craft_fit import CacheCraftFit, divergence, fitted_alpha, log_probabilities
from memwall.kv.policy import parse
from memwall.models import ModelConfig, model_directory
from memwall.plan.choose import held_out_text


def test_alpha_is_the_least_that_is_close_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_craft_fit, "PROMPTS", 2)
    monkeypatch.setattr(cache_craft_fit, "GRID", (0.0, 1.0, 9.0))
    monkeypatch.setattr(cache_craft_fit, "TARGET_NATS", 0.0005)
    directory = model_directory("demo")
    model = CacheModel(config=ModelConfig.from_directory(directory), weights=None, directory=directory)  # type: ignore[arg-type]
    assert fitted_alpha(model) is None
    stages: list[tuple[str, int, int]] = []
    (path,) = fitted.fit(
        "cache-craft", directory, text=held_out_text()[:20_000], progress=lambda *told: stages.append(told)
    )
    assert path.is_file()
    assert fitted_alpha(model) == 9.0
    arrays = fitted.load(model, parse("cache-craft"), CacheCraftFit.fit_key(parse("cache-craft")))
    path.unlink()
    assert arrays["alphas"].tolist() == [0.0, 1.0, 9.0]
    assert arrays["divergences"][0] > arrays["divergences"][1] > 0.0005 > arrays["divergences"][2]
    assert arrays["shares"][0] < arrays["shares"][1] < arrays["shares"][2] == 1
    assert stages[-1] == ("alpha", 3, 3)


def test_a_short_text_is_refused() -> None:
    with pytest.raises(InputError, match="tokens"):
        CacheCraftFit.fit(parse("cache-craft"), Path(model_directory("demo")), "Too short.", None, None)


def test_divergence_by_hand() -> None:
    full = log_probabilities(np.log(np.array([[0.5, 0.5], [0.9, 0.1]])))
    other = log_probabilities(np.log(np.array([[0.25, 0.75], [0.9, 0.1]])) + 3)
    want = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert divergence(full, other) == pytest.approx(want)
    assert divergence(full, full) == 0
