"""Places in memory: strides, swizzles as one-to-one moves, sectors and bank conflicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kernels.tile_memory import (
    bank_conflicts,
    column_major_memory,
    row_major_memory,
    sectors,
    swizzled_memory,
)


def every_index(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)


def test_orders() -> None:
    assert row_major_memory((2, 3)).offset(every_index((2, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert column_major_memory((2, 3)).offset(every_index((2, 3))).tolist() == [[0, 2, 4], [1, 3, 5]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4, 8, 12, 16, 32]), st.sampled_from([8, 16, 32, 64, 128, 256]),
    st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_a_swizzle_only_moves_elements_within_their_stage(stages: int, rows: int, columns: int, size: int) -> None:
    if columns * size % 16:
        return
    shape = (stages, rows, columns)
    memory = swizzled_memory(shape, size)
    offsets = memory.offset(every_index(shape))
    per_stage = rows * columns
    assert sorted(offsets.ravel()) == list(range(stages * per_stage))
    assert (offsets // per_stage == np.arange(stages)[:, None, None]).all()
    vectors = offsets.reshape(-1, 16 // size)  # 16 bytes stay together
    assert (np.diff(vectors, axis=1) == 1).all()
    assert (vectors[:, 0] % (16 // size) == 0).all()


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_a_column_of_eight_rows_meets_all_banks(columns: int) -> None:
    """What one step of ldmatrix reads: eight rows, 16 bytes each."""
    shape = (32, columns)
    swizzled, plain = swizzled_memory(shape, 2), row_major_memory(shape)
    for first_row in range(0, 32, 8):
        for vector in range(0, columns, 8):
            index = np.stack([np.arange(first_row, first_row + 8), np.full(8, vector)], axis=1)
            assert bank_conflicts(swizzled.offset(index) * 2, 16) == 0
            assert bank_conflicts(plain.offset(index) * 2, 16) == {16: 1, 32: 3, 64: 7, 128: 7}[columns]


def test_conflicts_and_sectors_by_hand() -> None:
    threads = np.arange(32)
    assert bank_conflicts(threads * 4, 4) == 0
    assert bank_conflicts(threads * 8, 4) == 1
    assert bank_conflicts(threads * 128, 4) == 31
    assert bank_conflicts(threads * 0, 4) == 0  # one word for all
    assert bank_conflicts(threads * 16, 16) == 0
    assert sectors(threads * 4, 4) == 4
    assert sectors(threads * 32, 4) == 32
    assert sectors(threads * 4 + 16, 4) == 5


@pytest.mark.parametrize("shape", [(8, 12), (8, 4)])
def test_rows_that_no_swizzle_fits(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="power of two"):
        swizzled_memory(shape, 2)
