"""The kernel whose tiles are parameters, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import _native
from memwall.kernels.tiled_attention import tiled_attention
from memwall.simulate.attention_schedules import reference
from memwall.simulate.attention_shape import Attention


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(("row_tile", "key_tile"), [(1, 16), (7, 48), (64, 32), (1000, 1024)])
@pytest.mark.parametrize(("rows", "keys", "causal"), [(1, 1, True), (37, 37, False), (50, 81, True), (16, 64, False)])
def test_tiles_do_not_change_the_result(
    isa: str, row_tile: int, key_tile: int, rows: int, keys: int, *, causal: bool
) -> None:
    try:
        _native.force_isa(isa)
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error))
    try:
        draw = np.random.default_rng(rows)
        q = 3 * draw.standard_normal((rows, 48), np.float32)
        k, v = (draw.standard_normal((keys, 48), np.float32) for _ in range(2))
        out = tiled_attention(q, k, v, row_tile=row_tile, key_tile=key_tile, causal=causal)
    finally:
        _native.force_isa(_native.best_isa())
    shape = Attention(tokens=rows, head_size=48, keys=keys, causal=causal)
    truth = reference(shape, q[None, None], k[None, None], v[None, None])[0, 0]
    assert np.abs(out - truth).max() < 1e-5


def test_bad_shapes_are_refused() -> None:
    q, k = np.ones((4, 32), np.float32), np.ones((3, 32), np.float32)
    with pytest.raises(ValueError, match="causal"):
        tiled_attention(q, k, k, row_tile=4, key_tile=16, causal=True)
    with pytest.raises(ValueError, match="multiple of 16"):
        tiled_attention(q, k, k, row_tile=4, key_tile=8)
    with pytest.raises(ValueError, match="head size"):
        tiled_attention(*(np.ones((4, 20), np.float32),) * 3, row_tile=4, key_tile=16)
