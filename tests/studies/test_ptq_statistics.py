"""Errors over seeds and prompts, measures of texts, slopes: by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.studies.ptq_statistics import (
    WINDOWS,
    Texts,
    distinct,
    estimate,
    first_difference,
    measures,
    repeated,
    sensitivities,
    slopes,
    student,
)


def texts(tokens: list[list[int]], losses: list[list[float]] | None = None, form: str = "nf4") -> Texts:
    losses = losses or [[1.0] * len(each) for each in tokens]
    return Texts(format=form, temperature=0.8, top_k=200, num_tokens=9, seeds=2, tokens=tokens, losses=losses,
                 kl=[], agreement=[])  # fmt: skip


def test_an_interval_by_hand() -> None:
    found = estimate(np.array([[1.0, 3.0, 5.0]]))
    assert found is not None
    assert (found.mean, found.error) == (3, 2 / math.sqrt(3))
    assert found.low == pytest.approx(3 - 4.303 * 2 / math.sqrt(3))
    assert found.above
    assert not found.below


def test_the_larger_spread_counts() -> None:
    """Seeds that agree say nothing of other prompts."""
    found = estimate(np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert found is not None
    assert found.error == pytest.approx(1)


def test_one_text_has_no_error() -> None:
    found = estimate(np.array([[2.0]]))
    assert found is not None
    assert found.error is None
    assert not found.above
    assert estimate(np.full((2, 2), np.nan)) is None


def test_missing_texts_are_left_out() -> None:
    found = estimate(np.array([[1.0, np.nan], [3.0, 3.0], [np.nan, np.nan]]))
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)


def test_intervals_cover_the_mean() -> None:
    """Seeds and prompts with effects of their own, as texts have: the interval holds the mean nine times in ten."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        table = rng.standard_normal((10, 1)) + rng.standard_normal((1, 5)) + rng.standard_normal((10, 5))
        found = estimate(table)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert hits >= 270


def test_students_quantiles() -> None:
    assert (student(1), student(4), student(30)) == (12.706, 2.776, 2.042)
    assert 1.96 < student(1000) <= student(30)


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_measures_of_texts(one: list[int], other: list[int], size: int) -> None:
    place = first_difference(one, other)
    assert one[:place] == other[:place]
    assert place == min(len(one), len(other)) or one[place] != other[place]
    share = repeated(one, size)
    assert (share is None) == (len(one) < size)
    if share is not None:
        assert 0 <= share < 1
        assert distinct(one, size) == 1 - share


def test_measures_by_hand() -> None:
    base = texts([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6], [], [7]])
    mine = texts([[1, 2, 9, 4], [5, 6], [], [8]], [[1, 3, 5, 7], [2, 2], [], [4]])
    found = measures(mine, base)
    assert found["loss"].tolist()[0] == [4, 2]
    assert np.isnan(found["loss"][1, 0])
    assert found["first_difference"].tolist() == [[2, 2], [0, 0]]
    assert found["same_text"].tolist() == [[0, 1], [1, 0]]
    assert measures(base, base)["repeated_4grams"][0, 0] == pytest.approx(1 / 5)
    assert base.cut(3).tokens[0] == [1, 2, 3]


def test_slopes_and_flags() -> None:
    """A format that reacts one nat more per unit of temperature is flagged; noise is not."""
    rng = np.random.default_rng(1)
    temperatures = (0.5, 0.6, 0.7, 0.8)
    noise = {t: rng.standard_normal((10, 5)) * 0.5 for t in temperatures}
    curves = {
        "bf16": {t: 2 * t + noise[t] for t in temperatures},
        "steep": {t: 3 * t + noise[t] + 0.01 * rng.standard_normal((10, 5)) for t in temperatures},
        "same": {t: 2 * t + noise[t] + 0.01 * rng.standard_normal((10, 5)) for t in temperatures},
    }
    found = {one.format: one for one in sensitivities(curves, "bf16")}
    assert found["steep"].flagged
    assert found["steep"].excess.mean == pytest.approx(1, abs=0.05)
    assert not found["same"].flagged
    assert not found["bf16"].flagged
    assert found["bf16"].excess.mean == 0
    assert {one.window for one in found.values()} == {"[0.5, 0.8]"}
    assert slopes({0.5: np.zeros((1, 1))}) is None


def test_every_temperature_has_one_window() -> None:
    for step in range(1, 11):
        assert sum(holds(step / 10) for holds in WINDOWS.values()) == 1
