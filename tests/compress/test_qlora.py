"""QLoRA: the published settings, its base and what that costs."""

from __future__ import annotations

import pytest

from memwall.compress.qlora import QLora
from memwall.compress.tuning import tune_method
from memwall.formats import codec
from memwall.models import DEMO_DIRECTORY, ModelConfig


def test_the_published_settings() -> None:
    method = tune_method("qlora")
    assert isinstance(method, QLora)
    told = (method.rank, method.alpha, method.learning_rate, method.batch, method.max_grad_norm, method.optimizer)
    assert told == (64, 16.0, 2e-4, 16, 0.3, "paged")
    assert method.scale == 0.25
    assert len(method.shapes(ModelConfig.from_directory(DEMO_DIRECTORY))) == 7


def test_base_costs_an_eighth_of_a_bit_more_than_its_codes() -> None:
    """4 + 8 / 64 + 32 / (64 * 256) bits, and here 32 bits for the mean of a row tile."""
    bits = 8 * codec(QLora.base).nbytes((4096, 4096)) / 4096**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
