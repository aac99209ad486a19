"""The compensated sweep: its factor, its exactness under H = I, and that it does what a slow reference does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress.sweep import ColumnQuantizer, Factor, IntegerColumns, factor, sweep
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SPECS = ["int2", "int3-g32", "int4", "int4-g128-asym", "int5-g32", "int8"]


def integer_codec(spec: str) -> IntegerCodec:
    found = codec(spec)
    assert isinstance(found, IntegerCodec)
    return found


def correlated(num_tokens: int, num_columns: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((num_columns // 4, num_columns), np.float32)
    noise = random.standard_normal((num_tokens, num_columns), np.float32)
    return random.standard_normal((num_tokens, num_columns // 4), np.float32) @ mixing + 0.3 * noise


@QUICK
@given(
    st.sampled_from(SPECS),
    st.integers(1, 40),
    st.integers(1, 150),
    st.booleans(),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_identity_is_round_to_nearest_bit_for_bit(
    spec: str, rows: int, columns: int, activation_order: bool, size: float, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    weight[:, ::7] = 0
    coder = integer_codec(spec)
    hessian = np.eye(columns, dtype=np.float32) * np.float32(size)
    swept = sweep(weight, Factor.of(hessian, 0.01, activation_order), IntegerColumns(coder, rows, columns))
    nearest = coder.encode(weight)
    assert swept.shape == nearest.shape
    for name, buffer in nearest.buffers.items():
        np.testing.assert_array_equal(swept.buffers[name], buffer)


def test_factor_rebuilds_the_hessian() -> None:
    x = correlated(200, 40)
    hessian = x.T @ x
    feedback, pivots = factor(hessian, 0.01)
    upper = feedback * np.sqrt(pivots)
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(40)
    np.testing.assert_allclose(upper @ upper.T, damped, rtol=1e-4, atol=1e-3)
    assert not np.tril(feedback, -1).any()


def test_agrees_with_the_published_recursion() -> None:
    """GPTQ as published, through the inverse: a slow reference in float64."""
    rows, columns = 8, 64
    weight = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    x = correlated(300, columns)
    hessian = (x.T @ x).astype(np.float64)
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(columns)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    coder = integer_codec("int4")
    work, expected = weight.astype(np.float64), np.empty((rows, columns), np.uint8)
    scales, mins = coder.fit(weight)
    for j in range(columns):
        column = work[:, j].astype(np.float32)[:, None]
        expected[:, j] = coder.quantize(column, scales, mins)[:, 0]
        error = (column - coder.dequantize(expected[:, j : j + 1], scales, mins))[:, 0] / inverse[j, j]
        work[:, j:] -= np.outer(error, inverse[j, j:])
    swept = sweep(weight, Factor.of(hessian.astype(np.float32)), IntegerColumns(coder, rows, columns))
    codes, _, _ = coder.unpack(swept)
    assert (codes == expected).mean() > 0.99  # a tie may fall either way in float32


def test_dead_inputs_and_singular_statistics() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    coder = integer_codec("int4")
    nearest = coder.encode(weight)
    for hessian in (np.zeros((64, 64)), np.diag(np.arange(64.0) % 2)):
        swept = sweep(weight, Factor.of(hessian.astype(np.float32)), IntegerColumns(coder, 4, 64))
        np.testing.assert_array_equal(swept.buffers["codes"], nearest.buffers["codes"])
    one_token = np.outer(*[np.arange(64, dtype=np.float32)] * 2)
    assert np.isfinite(coder.decode(sweep(weight, Factor.of(one_token), IntegerColumns(coder, 4, 64)))).all()
    with pytest.raises(InputError, match="not positive definite"):
        factor(-np.eye(4, dtype=np.float32), 0.01)
    with pytest.raises(InputError, match="NaN"):
        factor(np.full((4, 4), np.nan, np.float32), 0.01)


def test_outliers_leave_no_error_behind() -> None:
    class KeepAll:
        def keep(self, column: int, values: np.ndarray, rounded: np.ndarray, weight: float) -> np.ndarray:
            assert weight > 0
            return np.ones(len(values), bool)

    weight = np.random.default_rng(0).standard_normal((16, 96), np.float32)
    x = correlated(300, 96)
    coder = integer_codec("int3")
    swept = sweep(weight, Factor.of(x.T @ x), IntegerColumns(coder, 16, 96), outliers=KeepAll())
    # with every entry kept exact, no column has anything to make up for
    np.testing.assert_array_equal(swept.buffers["codes"], coder.encode(weight).buffers["codes"])


def test_entries_kept_are_handed_to_the_quantizer_that_stores_them() -> None:
    class Halving(IntegerColumns):
        """Stores what is kept at half precision, as a sparse form would."""

        def store_exact(self, column: int, kept: np.ndarray, values: np.ndarray, rounded: np.ndarray) -> np.ndarray:
            stored[:, column] = np.where(kept, values, 0).astype(np.float16)
            return np.where(kept, stored[:, column], rounded)

    class KeepLarge:
        def keep(self, column: int, values: np.ndarray, rounded: np.ndarray, weight: float) -> np.ndarray:
            return (values - rounded) ** 2 * weight > threshold

    weight = np.random.default_rng(0).standard_normal((16, 96), np.float32)
    x = correlated(300, 96)
    factored, coder = Factor.of(x.T @ x), integer_codec("int2")
    threshold = float(np.quantile(factored.pivots, 0.9)) * 0.2
    stored = np.zeros((16, 96), np.float16)
    swept = sweep(weight, factored, Halving(coder, 16, 96), outliers=KeepLarge())
    assert 0 < np.count_nonzero(stored) < 16 * 96 // 4
    change = np.where(stored != 0, stored, coder.decode(swept)) - weight
    plain = coder.decode(sweep(weight, factored, IntegerColumns(coder, 16, 96))) - weight
    hessian = x.T @ x
    assert np.trace(change @ hessian @ change.T) < np.trace(plain @ hessian @ plain.T)


def test_an_arranged_factor_sweeps_columns_put_in_order_beforehand() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    x = correlated(300, 64)
    factored = Factor.of(x.T @ x, 0.01, activation_order=True)
    coder = integer_codec("int4-g32")
    arranged = coder.decode(sweep(weight[:, factored.order], factored.arranged(), IntegerColumns(coder, 8, 64)))
    back = np.empty_like(arranged)
    back[:, factored.order] = arranged
    hessian = x.T @ x
    nearest = coder.decode(coder.encode(weight)) - weight
    change = back - weight
    assert np.trace(change @ hessian @ change.T) < np.trace(nearest @ hessian @ nearest.T)


class Looking(ColumnQuantizer):
    """Rounds nothing, but keeps what groups are entered with and loses `lost` of its first group."""

    group, inside, foresees = 4, False, True

    def __init__(self, lost: np.ndarray) -> None:
        self.entered: list[np.ndarray] = []
        self._lost, self._now = lost, np.empty(0)

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        self.entered.append(columns.copy())
        self._now = columns - self._lost if index == 0 else columns

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        return np.asarray(self._now[column % 4])

    def finish(self) -> Packed:
        return codec("float32").encode(np.zeros((1, 1), np.float32))


def test_groups_are_entered_with_what_makes_up_best_for_those_before() -> None:
    """With the first four columns' errors given, later ones are the least-squares answer for all of them together."""
    random = np.random.default_rng(3)
    x, weight = correlated(64, 8, 1), random.standard_normal((5, 8)).astype(np.float32)
    hessian = x.T @ x
    lost = random.standard_normal((4, 5)).astype(np.float32)
    looking = Looking(lost)
    sweep(weight, Factor.of(hessian, 1e-6), looking)
    np.testing.assert_allclose(looking.entered[0], weight[:, :4].T, atol=1e-5)
    # minimize |e_first H.. + move|: the change of the others is H_oo^-1 H_of times what the first have lost
    wanted = weight[:, 4:] + (np.linalg.solve(hessian[4:, 4:].astype(np.float64), hessian[4:, :4]) @ lost).T
    np.testing.assert_allclose(looking.entered[1].T, wanted, rtol=2e-3, atol=2e-3)
