"""Pruning inside the sweep against SparseGPT as published, its scores, and that damage is named."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.compress.pruning import PruningColumns, SparseColumns, fixed_mask
from memwall.compress.sweep import Factor, sweep
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.sparse import SparseCodec, largest_pairs
from tests.compress.test_spqr import layer

DAMPING = 0.01


def published_sparsegpt(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Algorithm 1 with blocks of one column, in the inverse's Cholesky factor and float64."""
    columns = len(hessian)
    damped = hessian.astype(np.float64) + DAMPING * np.diagonal(hessian).mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight.astype(np.float64).copy()
    for column in range(columns):
        if column % 4 == 0:
            four = slice(column, column + 4)
            mask = largest_pairs(np.square(left[:, four]) / np.square(np.diagonal(upper)[four]))
        kept = np.where(mask[:, column % 4], left[:, column], 0)
        error = (left[:, column] - kept) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
        left[:, column] = kept
    return left


def test_pruned_matrix_is_that_of_the_published_algorithm() -> None:
    weight, statistics = layer(24, 148)
    packed = sweep(weight, Factor.of(statistics.hessian, DAMPING), PruningColumns(24, 148))
    expected = published_sparsegpt(weight, statistics.hessian)
    found = packed.buffers["values"]
    np.testing.assert_array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_choosing_as_the_sweep_goes_loses_least() -> None:
    """Ordering of the papers' scores at equal pattern: magnitude, Wanda, then SparseGPT, which makes up for errors."""
    weight, statistics = layer(64, 256)
    factored = Factor.of(statistics.hessian, DAMPING)

    def loss(pruned: np.ndarray) -> float:
        return statistics.error(pruned - weight) / statistics.error(weight)

    def without_update(score: str) -> np.ndarray:
        mask = fixed_mask(weight, statistics, score)
        assert mask is not None
        return np.where(mask.T, weight, 0)

    def swept(score: str) -> np.ndarray:
        mask = fixed_mask(weight, statistics, score)
        return sweep(weight, factored, PruningColumns(64, 256, mask)).buffers["values"]

    losses = [loss(without_update("magnitude")), loss(without_update("wanda")), loss(swept("wanda"))]
    losses.append(loss(swept("hessian")))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("spec", ["sparse4-g64", "sparse3-g128-asym", "sparse8-g256"])
@pytest.mark.parametrize("columns", [256, 131])
def test_what_is_stored_is_what_was_swept(spec: str, columns: int) -> None:
    weight, statistics = layer(37, columns)
    form = codec(spec)
    assert isinstance(form, SparseCodec)
    seen = np.zeros((columns, 37), np.float32)

    class Recorded(SparseColumns):
        def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
            seen[column] = super().quantize(column, values)
            return seen[column]

    recorded = Recorded(form, 37, columns, shrinks=np.linspace(1, 0.5, 5))
    packed = sweep(weight, Factor.of(statistics.hessian, DAMPING), recorded)
    np.testing.assert_array_equal(form.decode(packed), seen.T)
    assert packed.nbytes == form.nbytes((37, columns))


def test_masks_that_do_not_fit_are_refused() -> None:
    weight, statistics = layer(8, 16)
    with pytest.raises(InputError, match="does not fit"):
        PruningColumns(8, 16, np.ones((8, 16), bool))
    with pytest.raises(InputError, match="hessian, wanda, magnitude"):
        fixed_mask(weight, statistics, "random")
    columns = PruningColumns(8, 16)
    with pytest.raises(InputError, match="worked in order"):
        sweep(weight, Factor.of(statistics.hessian, DAMPING, activation_order=True), columns)
