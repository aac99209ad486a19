"""The quadratic form of fetched weights, against matrices that choose, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import _native


@pytest.mark.parametrize(
    ("stages", "rows", "cols", "entries"), [(1, 1, 1, 1), (1, 5, 7, 3), (2, 9, 33, 20), (2, 3, 40, 100), (1, 0, 4, 2)]
)
def test_the_form(stages: int, rows: int, cols: int, entries: int, isa: str, threads: int) -> None:
    random = np.random.default_rng(rows + cols)
    root = random.standard_normal((cols, cols))
    hessian = (root @ root.T).astype(np.float32)
    slots = random.integers(0, entries, (stages, rows, cols)).astype(np.int32)
    wanted = np.zeros((entries, entries))
    for m in range(rows):
        chosen = sum(np.eye(entries)[slots[s, m]] for s in range(stages))
        wanted += chosen.T @ hessian.astype(np.float64) @ chosen
    gram = np.full((entries, entries), np.nan, np.float32)
    _native.selection_gram(slots, hessian, gram)
    np.testing.assert_allclose(gram, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(initial=1))
    np.testing.assert_array_equal(gram, gram.T)


def test_refused() -> None:
    slots, gram = np.zeros((1, 2, 3), np.int32), np.empty((2, 2), np.float32)
    with pytest.raises(ValueError, match="row and a column per column"):
        _native.selection_gram(slots, np.eye(4, dtype=np.float32), gram)
    for wrong in (-1, 2):
        slots[0, 1, 2] = wrong
        with pytest.raises(ValueError, match="names no entry"):
            _native.selection_gram(slots, np.eye(3, dtype=np.float32), gram)
