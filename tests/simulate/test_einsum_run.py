"""The interpreter: small cascades against plain NumPy, iterations, tiles, early stops, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.simulate import einsum_run
from memwall.simulate.einsum_run import run_cascade
from memwall.simulate.einsum_text import parse_cascade
from memwall.simulate.einsum_work import all_operations, operations, points

DRAW = np.random.default_rng(5)
X = DRAW.standard_normal((7, 5))


def result(text: str, sizes: dict[str, int] | None = None, **inputs: object) -> np.ndarray:
    one = parse_cascade(text)
    return run_cascade(one, inputs, sizes)[one.outputs[-1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Z[p] = X[m, p]", X.sum(0)),
        ("Z[p] = max{m} X[m, p]", X.max(0)),
        ("Z[p] = min{m} (X[m, p] * 2)", 2 * X.min(0)),
        ("Z = prod{m, p} X[m, p]", X.prod()),
        ("Z[p, m] = X[m, p]", X.T),
        ("Z[m, n] = X[m, p] * X[n, p]", X @ X.T),
        ("Z[m] = (X[m, p] + m) / P", (X + np.arange(7)[:, None]).sum(1) / 5),
        ("Z[p] = abs(X[m, p]) - -1 * relu(X[m, p])", (abs(X) + np.maximum(X, 0)).sum(0)),
        ("Z[m, p] = elu(X[m, p]) + sigmoid(X[m, p]) * tanh(X[m, p])",
         np.where(X > 0, X, np.exp(X) - 1) + np.tanh(X) / (1 + np.exp(-X))),
        ("Z[m, p] = rsqrt(square(X[m, p])) - sqrt(min(4, 9)) + log(exp(1))", 1 / abs(X) - 1),
        ("Z[0, p] = 1\nZ[m+1, p] = Z[m, p] * 2 + X[m, p]", None),
    ],
)  # fmt: skip
def test_einsums_are_what_they_say(text: str, expected: np.ndarray | None) -> None:
    found = result(text, X=X)
    if expected is None:
        column = np.ones(5)
        rows = [column := column * 2 + row for row in X]
        expected = np.vstack([np.ones((1, 5)), rows])
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_text_is_free_outside_iterations() -> None:
    np.testing.assert_allclose(result("Z[p] = Y[p] * 2\nY[p] = X[m, p]", X=X), 2 * X.sum(0))


def test_an_iteration_over_two_tensors_and_its_end() -> None:
    text = "A[0] = 1\nB[0] = 0\nB[i+1] = A[i] + B[i]\nA[i+1] = A[i] + B[i+1]\nZ = A[I] + 0 * B[I]"
    a, b = 1.0, 0.0
    for _ in range(6):
        b = a + b
        a = a + b
    assert result(text, {"i": 6}) == a


def test_an_iteration_ends_early_where_all_points_meet_its_stop() -> None:
    text = """
        stop i when E[i] <= 1e-6
        R[0, p] = 1
        R[i+1, p] = (R[i, p] + N[p] / R[i, p]) / 2
        D[i, p] = abs(R[i+1, p] - R[i, p])
        E[i] = max{p} D[i, p]
        S[p] = R[I, p] * 1
    """
    one = parse_cascade(text)
    number = np.array([2.0, 1e4])
    found = run_cascade(one, {"N": number}, {"i": 50})
    np.testing.assert_allclose(found["S"], np.sqrt(number), rtol=1e-9)
    steps = found["D"].shape[0]
    assert found["R"].shape == (steps + 1, 2)
    assert 5 < steps < 15
    assert found["E"][-1] <= 1e-6 < found["E"][-2]
    assert run_cascade(one, {"N": number}, {"i": 3})["D"].shape == (3, 2)


@pytest.mark.parametrize("length", [1, 4, 8, 9, 15])
@pytest.mark.parametrize("tile", [1, 4, 16])
def test_a_short_last_tile_changes_nothing(length: int, tile: int) -> None:
    text = """
        split m = m1 * m0
        L[m1] = max{m0} (0 - exp(K[m1*M0+m0]))
        T[m1] = sum{m0} exp(K[m1*M0+m0])
        P[m1] = prod{m0} (K[m1*M0+m0] + 3)
        R[0] = 0
        R[m1+1] = R[m1] + C[m1]
        C[m1] = K[m1*M0+m0] * K[m1*M0+m0]
        E[m1, m0] = exp(K[m1*M0+m0])
        F[m1] = E[m1, m0] * K[m1*M0+m0]
        Z = max{m1} L[m1]
        W = sum{m1} (T[m1] + F[m1])
        U = prod{m1} P[m1]
        Q = R[M1]
    """
    k = DRAW.standard_normal(length)
    found = run_cascade(parse_cascade(text), {"K": k}, {"m0": tile})
    np.testing.assert_allclose(found["Z"], -np.exp(k).min())
    np.testing.assert_allclose(found["W"], (np.exp(k) * (1 + k)).sum())
    np.testing.assert_allclose(found["U"], (k + 3).prod())
    np.testing.assert_allclose(found["Q"], (k * k).sum())
    pad = -length % tile
    assert (found["E"].reshape(-1)[length:] == 0).all()
    assert found["E"].size == length + pad


def test_types_are_kept() -> None:
    assert result("Z[p] = exp(X[m, p])", X=X.astype(np.float32)).dtype == np.float32
    assert result("Z[p] = exp(X[m, p])", X=X).dtype == np.float64


@pytest.mark.parametrize(
    ("inputs", "sizes", "says"),
    [
        ({}, {}, "inputs X, Y are missing"),
        ({"X": X, "Y": X}, {}, "wants 1 axes"),
        ({"X": X, "Y": np.ones(3)}, {}, "rank m has 3 points, and 7 elsewhere"),
        ({"X": X, "Y": np.ones(7), "W": X}, {}, "W is no input"),
        ({"X": X, "Y": np.ones(7)}, {"q": 2}, "no rank 'q' to have 2 points"),
        ({"X": X, "Y": np.ones(7)}, {"i": 0}, "rank i has 0 points"),
        ({"X": X, "Y": np.ones(7)}, {}, "sizes of i are wanted"),
        ({"X": X[:0], "Y": np.ones(0)}, {"i": 2}, "rank m has 0 points"),
    ],
)
def test_bad_sizes_are_named(inputs: dict, sizes: dict, says: str) -> None:
    one = parse_cascade("Z[p] = X[m, p] * Y[m]\nA[0, p] = 0\nA[i+1, p] = A[i, p] + Z[p]")
    with pytest.raises(InputError, match=says):
        run_cascade(one, inputs, sizes)


def test_what_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(einsum_run, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="points would take 280 B at once"):
        result("Z[p] = exp(X[m, p])", X=X)


def test_operations_and_points() -> None:
    one = parse_cascade("QK[m, p] = Q[e, p] * K[e, m]\nS[m, p] = exp(QK[m, p] - 1)\nT[p] = max{m} S[m, p]\n"
                        "U[p] = sum{m} S[m, p]\nV[p] = -T[p] / U[p]")  # fmt: skip
    assert [dict(operations(each)) for each in one.einsums] == [
        {"mac": 1}, {"exp": 1, "add": 1}, {"max": 1}, {"add": 1}, {"divide": 1, "add": 1},
    ]  # fmt: skip
    sizes = {"m": 3, "p": 5, "e": 2}
    assert [points(each, sizes) for each in one.einsums] == [30, 15, 15, 15, 5]
    assert all_operations(one, sizes) == {"mac": 30, "exp": 15, "add": 35, "max": 15, "divide": 5}
    with pytest.raises(InputError, match="sizes of e are wanted"):
        points(one.einsums[0], {"m": 3, "p": 5})
