"""L_m: by hand, by the formula, and measured in a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.engine.apart import ApartEngine
from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.saturation import measure, saturating_tokens
from memwall.errors import InputError
from tests.engine.test_workers import start


def test_the_least_batch_near_the_best_rate() -> None:
    rates = [(16, 1.0), (32, 1.2), (64, 2.1), (128, 3.6), (256, 8.0)]  # 16, 27, 30, 36, 32 tokens a second
    assert saturating_tokens(rates) == 128
    assert saturating_tokens(rates, share=0.85) == 64
    assert saturating_tokens(rates, share=0.7) == 32
    assert saturating_tokens([(50, 0.5)]) == 50


@pytest.mark.parametrize("samples", [[], [(16, 0.0)]])
def test_nothing_to_go_by(samples: list[tuple[int, float]]) -> None:
    with pytest.raises(InputError, match="at least one batch"):
        saturating_tokens(samples)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_measured_in_the_worker_and_kept_to() -> None:
    serving = start(PhaseSettings.apart(2))
    engine = serving.engine
    assert isinstance(engine, ApartEngine)
    found = measure(engine, repeats=1)
    assert [tokens for tokens, _ in found] == [16, 32, 64]
    assert all(seconds > 0 for _, seconds in found)
    engine.fill(32)
    assert engine.front.limits.token_budget == 32
    assert engine.limits.token_budget == 64  # the decode side's stays
    engine.fill(1000)
    assert engine.front.limits.token_budget == 32  # what a step was made for is not exceeded
    assert engine.front.pages.pool.used_pages == 0
    serving.release()
