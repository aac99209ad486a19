"""Attention of queries at scattered positions, against plain torch one query at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall.kernels import attention, attention_reference


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("count", "length", "heads", "kv_heads", "dim", "width", "window"),
    [
        (1, 90, 4, 2, 32, 32, None),
        (7, 300, 8, 4, 32, 32, None),
        (70, 261, 6, 2, 20, 5, None),  # values that are narrower than keys
        (130, 700, 8, 2, 64, 64, 100),
        (3, 64, 2, 1, 16, 70, 9),
        (40, 40, 4, 4, 8, 8, None),
    ],
)
def test_each_query_sees_what_its_position_allows(
    isa: str, threads: int, dtype: type, count: int, length: int, heads: int, kv_heads: int, dim: int, width: int,
    window: int | None,
) -> None:  # fmt: skip
    rng = np.random.default_rng(count)
    q, k, v = 2 * rows(rng, count, heads, dim), rows(rng, length, kv_heads, dim), rows(rng, length, kv_heads, width)
    k, v = k.astype(dtype), v.astype(dtype)
    positions = np.sort(rng.choice(length, count, replace=False)).astype(np.int64)
    out, stats = np.full((count, heads, width), np.nan, np.float32), np.empty((count, heads, 2), np.float32)
    attention.attend_scattered(q, k, v, positions, scale=0.3, window=window, out=out, stats=stats)
    keys, values = (torch.from_numpy(x.astype(np.float32)) for x in (k, v))
    for index, position in enumerate(positions):
        want, want_stats = attention_reference.attend(
            torch.from_numpy(q[index : index + 1]), keys, values, scale=0.3, first_position=int(position), window=window
        )
        np.testing.assert_allclose(out[index : index + 1], want.numpy(), atol=3e-5)
        np.testing.assert_allclose(stats[index : index + 1], want_stats.numpy(), rtol=1e-4, atol=1e-5)


def test_consecutive_positions_give_what_attend_float_gives() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rows(rng, 33, 8, 32), rows(rng, 150, 4, 32), rows(rng, 150, 4, 32)
    one, other = np.empty_like(q), np.empty_like(q)
    attention.attend_scattered(q, k, v, np.arange(60, 93), scale=0.2, out=one)
    attention.attend_float(q, k, v, scale=0.2, first_position=60, out=other)
    np.testing.assert_array_equal(one, other)


def test_values_that_mark_tokens_give_sums_of_attention() -> None:
    """What Cache-Craft's statistics rest on."""
    rng = np.random.default_rng(1)
    q, k = rows(rng, 5, 4, 16), rows(rng, 60, 2, 16)
    marks = np.zeros((60, 2, 3), np.float32)
    marks[:20, :, 0] = marks[20:50, :, 1] = marks[50:, :, 2] = 1
    positions = np.array([3, 19, 25, 49, 55])
    paid = np.empty((5, 4, 3), np.float32)
    attention.attend_scattered(q, k, marks, positions, scale=0.5, out=paid)
    np.testing.assert_allclose(paid.sum(-1), 1, rtol=1e-5)
    assert not paid[:2, :, 1:].any()
    weights = np.exp(0.5 * q[2, 3] @ k[:26, 1].T)
    np.testing.assert_allclose(paid[2, 3, 0], weights[:20].sum() / weights.sum(), rtol=1e-4)


def test_wrong_positions_are_refused() -> None:
    q, k = np.zeros((2, 2, 8), np.float32), np.zeros((9, 2, 8), np.float32)
    for positions in ([4, 3], [-1, 2], [1]):
        with pytest.raises(ValueError, match="position"):
            attention.attend_scattered(q, k, k, np.array(positions), scale=1.0, out=np.empty_like(q))
