"""Predictors find what is active where it can be found, and are judged as counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.engine.neuron_file import rows_wanted
from memwall.engine.neuron_predictors import Training, best_low_rank, judge, train
from memwall.errors import InputError

DRAW = np.random.default_rng(0)
# inputs of 12 dimensions within 32, of unlike sizes
X = (DRAW.standard_normal((3000, 12)) * np.linspace(3, 0.2, 12)) @ np.linalg.qr(DRAW.standard_normal((32, 12)))[0].T
X = X.astype(np.float32)
FIRST = DRAW.standard_normal((80, 32)).astype(np.float32)
BIAS = (-1.5 * (FIRST @ X[:500].T).std(1)).astype(np.float32)


def test_the_rank_that_inputs_have_loses_nothing() -> None:
    down, up = best_low_rank(FIRST, X, 12)
    np.testing.assert_allclose((X @ down.T) @ up.T, X @ FIRST.T, atol=1e-2)
    errors = []
    for rank in (1, 3, 6, 9, 12):
        down, up = best_low_rank(FIRST, X, rank)
        errors.append(float(np.square((X @ down.T) @ up.T - X @ FIRST.T).mean()))
    assert errors == sorted(errors, reverse=True)
    # no matrix of that rank comes nearer: what is left are the smallest directions of the products
    left = np.linalg.svd(X @ FIRST.T, compute_uv=False)[3:]
    down, up = best_low_rank(FIRST, X, 3)
    assert np.square((X @ down.T) @ up.T - X @ FIRST.T).sum() == pytest.approx(np.square(left).sum(), rel=1e-2)


def test_training_beats_the_beginning_and_keeps_the_share_it_may_miss() -> None:
    fresh = X[:1000] @ np.eye(32, dtype=np.float32)
    activations = np.maximum(fresh @ FIRST.T + BIAS, 0)
    found = {}
    for steps in (0, 500):
        made = train(FIRST, BIAS, X[1000:], Training(rank=6, steps=steps, batch=128, missed=0.05))
        found[steps] = judge(made.active(fresh), activations)
        assert found[steps].recall == pytest.approx(0.95, abs=0.03)
    assert found[500].predicted < 0.97 * found[0].predicted
    whole = train(FIRST, BIAS, X[1000:], Training(rank=12, steps=0, missed=0.001))
    assert judge(whole.active(fresh), activations).recall > 0.99


def test_other_inputs_can_be_read() -> None:
    made = train(FIRST, BIAS, X, Training(rank=8, steps=60), inputs=np.roll(X, 1, axis=0))
    judged = judge(made.active(np.roll(X, 1, axis=0)), np.maximum(X @ FIRST.T + BIAS, 0))
    best = train(FIRST, BIAS, X, Training(rank=8, steps=60))
    assert judged.predicted > 2 * judge(best.active(X), np.maximum(X @ FIRST.T + BIAS, 0)).predicted


def test_judged_by_hand() -> None:
    activations = np.array([[1.0, 0, 0, 3.0], [0, 0, 4.0, 0]])
    predicted = np.array([[True, True, False, False], [False, False, True, False]])
    found = judge(predicted, activations)
    assert (found.active, found.predicted) == (3 / 8, 3 / 8)
    assert (found.recall, found.precision) == (2 / 3, 2 / 3)
    assert found.missed_weight == 3 / 8


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 6))
def test_rows_wanted_is_the_largest_union(seed: int, tokens: int, windows: int) -> None:
    active = np.random.default_rng(seed).random((tokens, 9)) < 0.2
    found = rows_wanted(active, windows)
    for window, rows in enumerate(found, 1):
        last = min(window, tokens)
        unions = [int(active[at : at + last].any(0).sum()) for at in range(tokens - last + 1)]
        assert rows == max(*unions, 1)


def test_bad_settings_and_short_texts_are_told() -> None:
    for change in ({"rank": 0}, {"missed": 0.0}, {"held_out": 1.0}, {"rate": 0.0}):
        with pytest.raises(InputError):
            Training(**change)
    with pytest.raises(InputError, match="too few"):
        train(FIRST, BIAS, X[:50], Training())
