"""All ways to write attention compute the same, tiles short or not, large scores too; so do the other cascades."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.simulate.attention_cascades import ATTENTION, attend, cascade, pass_rank
from memwall.simulate.einsum_run import run_cascade


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 16), st.integers(0))
def test_every_form_is_softmax(rows: int, keys: int, size: int, width: int, tile: int, seed: int) -> None:
    draw = np.random.default_rng(seed % 2**32)
    q, k, v = (draw.standard_normal(shape) for shape in ((rows, size), (keys, size), (keys, width)))
    truth = softmax(0.3 * q @ k.T) @ v
    for name in ATTENTION:
        found = attend(cascade(name), q, k, v, tile=tile, scale=0.3)
        np.testing.assert_allclose(found, truth, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ATTENTION)
def test_scores_of_a_thousand_do_not_overflow(name: str) -> None:
    draw = np.random.default_rng(1)
    # eighths: products are exact in float32, so that only the softmax can go wrong
    q, k = (np.float32(draw.integers(-16, 17, (rows, 16)) / 8) for rows in (11, 45))
    q[::2] *= 64
    v = draw.standard_normal((45, 8), np.float32)
    scores = q.astype(np.float64) @ k.T.astype(np.float64)
    assert np.abs(scores).max() > 800
    found = attend(cascade(name), q, k, v, tile=16)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax(scores) @ v, atol=1e-5)


def test_linear_attention_and_two_normalisers() -> None:
    draw = np.random.default_rng(2)
    q, k, v = (draw.standard_normal(shape) for shape in ((4, 3), (10, 3), (10, 5)))
    turned = {"Q": q.T, "K": k.T, "V": v.T}
    feature = lambda x: np.where(x > 0, x + 1, np.exp(x))  # noqa: E731
    weights = feature(q) @ feature(k).T
    found = run_cascade(cascade("linear"), turned)["AV"].T
    np.testing.assert_allclose(found, weights @ v / weights.sum(1, keepdims=True))
    weights = softmax(q @ k.T)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    for name in ("two-normalisers", "two-normalisers-deferred"):
        np.testing.assert_allclose(run_cascade(cascade(name), turned)["AV"].T, weights @ v)


def test_sinkhorn_ends_in_rows_and_columns_of_equal_sums() -> None:
    draw = np.random.default_rng(3)
    inputs = {"Q": draw.standard_normal((3, 6)), "K": draw.standard_normal((3, 6)), "V": draw.standard_normal((2, 6))}
    found = run_cascade(cascade("sinkhorn"), inputs, {"i": 300})
    np.testing.assert_allclose(found["A"].sum(0), 1, rtol=1e-6)
    np.testing.assert_allclose(found["A"].sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["layernorm-textbook", "layernorm-moments", "layernorm-running"])
def test_norms_are_the_same(name: str) -> None:
    draw = np.random.default_rng(4)
    x, w = 5 + draw.standard_normal((33, 4)), draw.standard_normal((33, 7))
    found = run_cascade(cascade(name), {"X": x, "W": w, "EPS": np.array(1e-5)})["Z"]
    normed = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(found, w.T @ normed, atol=1e-9)
    assert pass_rank(cascade(name)) == "d"


def test_an_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean one-pass"):
        cascade("one-pas")
