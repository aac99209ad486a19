"""Rows in bytes, tokens rounded, outlier columns as they are: against the published formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.memory import Arena, Ledger
from memwall.studies.llm_int8 import Int8Matrix, round_activations, round_rows, spec_of


def formula(x: np.ndarray, weight: np.ndarray, threshold: float = 6.0) -> np.ndarray:
    """Two products, in 64-bit integers and floats."""
    codes, row_scales = round_rows(weight)
    out = (np.abs(x) >= threshold).any(axis=0)
    rest = np.where(out, 0, x)
    peaks = np.abs(rest).max(axis=1, keepdims=True)
    scales = np.where(peaks > 0, peaks / 127, 1)
    rounded = np.rint(rest / scales).astype(np.int64)
    plain = (rounded @ codes.T.astype(np.int64)) * scales * row_scales
    outlying: np.ndarray = plain + x[:, out].astype(np.float64) @ (codes[:, out] * row_scales[:, None]).T
    return outlying


def product(x: np.ndarray, weight: np.ndarray, threshold: float = 6.0) -> np.ndarray:
    matrix, out = Int8Matrix(weight, Arena(1 << 30, Ledger())), np.empty((len(x), len(weight)), np.float32)
    rounded, scales, _ = round_activations(x, threshold)
    matrix.product(rounded, scales, out)
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 300), st.integers(0, 3), st.integers(0, 99))
def test_product_equals_the_formula(tokens: int, rows: int, columns: int, outliers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((tokens, columns), np.float32), rng.standard_normal((rows, columns), np.float32)
    x[:, rng.integers(0, columns, outliers)] *= 40
    expected = formula(x, weight)
    np.testing.assert_allclose(product(x, weight), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_rows_by_hand() -> None:
    codes, scales = round_rows(np.float32([[1, -2, 0.5], [0, 0, 0]]))
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert scales.tolist() == [np.float32(2) / np.float32(127), 0]


def test_a_planted_channel_does_not_spoil_the_rest() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((8, 256), np.float32), rng.standard_normal((32, 256), np.float32)
    x[:, 7] = 60
    codes, scales = round_rows(weight)
    truth = x @ (codes * scales[:, None]).T
    kept, lost = (np.abs(product(x, weight, threshold) - truth).mean() for threshold in (6.0, 0.0))
    assert lost > 5 * kept
    assert round_activations(x)[2] == 1


def test_bytes_are_on_the_ledger() -> None:
    ledger = Ledger()
    matrix = Int8Matrix(np.ones((64, 256), np.float32), Arena(1 << 30, ledger))
    assert matrix.nbytes == 64 * 256 + 64 * 2 * 2 + 64 * 4
    assert sum(row.nbytes for row in ledger.rows() if row.owner == "weights/llm-int8") >= matrix.nbytes
    assert (spec_of(704), spec_of(256)) == ("int8-g64", "int8-g128")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="NaN"):
        round_rows(np.float32([[1, bad]]))
