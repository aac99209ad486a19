"""Latency formulas: fitted to what was measured, by relative errors."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.simulate.phase_latency import (
    LARGE_BATCH,
    OPT_13B,
    fit_decode,
    fit_prefill,
    relative_errors,
    waiting_first_token,
)


def test_a_fit_finds_the_formula_again() -> None:
    draw, one = np.random.default_rng(0), OPT_13B[1]
    batches = [draw.integers(4, 2000, draw.integers(1, 8)).tolist() for _ in range(60)]
    steps = [(int(draw.integers(10, 60000)), int(draw.integers(1, LARGE_BATCH))) for _ in range(60)]
    prompts = [one.prefill_seconds(batch) for batch in batches]
    tokens = [one.decode_seconds(*step) for step in steps]
    np.testing.assert_allclose(fit_prefill(batches, prompts), one.prefill, rtol=1e-6)
    np.testing.assert_allclose(fit_decode(steps, tokens), one.decode, rtol=1e-6)
    noisy = np.array(prompts) * draw.normal(1, 0.03, 60)
    a, b, c = fit_prefill(batches, noisy)
    predicted = [a + b * sum(batch) + c * sum(n * n for n in batch) for batch in batches]
    assert relative_errors(predicted, prompts).max() < 0.05


def test_short_steps_count_as_much_as_long_ones() -> None:
    batches = [[10], [20], [30], [100_000], [200_000]]
    seconds = [1.0, 1.0, 1.0, 1000.0, 2500.0]
    a, b, c = fit_prefill(batches, seconds)
    assert a + b * 20 + c * 400 == pytest.approx(1.0, rel=0.05)


def test_large_batches_have_their_own_set() -> None:
    one = OPT_13B[1]
    assert one.decode_seconds(0, LARGE_BATCH) == pytest.approx(7.17e-3 + LARGE_BATCH * 0.158e-3)
    assert one.decode_seconds(0, LARGE_BATCH - 1) == pytest.approx(19.93e-3 + (LARGE_BATCH - 1) * 0.0385e-3)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least three"):
        fit_prefill([[1], [2]], [1.0, 2.0])
    with pytest.raises(InputError, match="not above zero"):
        fit_decode([(1, 1), (2, 2), (3, 3)], [1.0, 0.0, 1.0])
    with pytest.raises(InputError, match=r"1\.20 times"):
        waiting_first_token(12.0, 0.1)
