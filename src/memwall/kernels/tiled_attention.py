"""Exact attention of one head with tiles of the caller's choice, in one thread: what a choice of tiles is timed with.

For attention to compute with use `memwall.kernels.attention`, whose tiles are fixed and which uses all cores.
"""

from __future__ import annotations

import math

import numpy as np

from memwall import _native

__all__ = ["TILE_STEP", "tiled_attention"]

TILE_STEP = 16
"""Key tiles and head sizes are multiples of it."""


def tiled_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, row_tile: int, key_tile: int, causal: bool = False
) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v of q [rows, d], k, v [keys, d], float32, as float32 [rows, d].

    `row_tile` rows stay while `key_tile` keys and values at a time pass (Q outer); key_tile and d are multiples of 16.
    causal: row i sees keys 0 .. keys - rows + i. ValueError for other shapes.
    """
    out = np.empty_like(q)
    _native.tiled_attention(q, k, v, out, row_tile, key_tile, 1 / math.sqrt(q.shape[1]), causal)
    return out
