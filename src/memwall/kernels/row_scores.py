"""Scores of queries against rows of vectors in few bits, row by row as a file has them: no decoded matrix is made."""

from __future__ import annotations

import numpy as np

from memwall import _native

__all__ = ["bit_scores", "padded", "row_scores"]

_PAD = 16


def padded(table: np.ndarray) -> np.ndarray:
    """float32 [..., n] with zeros up to a multiple of 16 columns, as the kernels read queries and tables."""
    columns = table.shape[-1]
    wide = np.zeros((*table.shape[:-1], -(-columns // _PAD) * _PAD), np.float32)
    wide[..., :columns] = table
    return wide


def row_scores(
    form: str,
    cols: int,
    rows: np.ndarray,
    queries: np.ndarray,
    *,
    cosine: bool = True,
    steps: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [q, n]: products of `queries` with decoded rows; with `cosine` divided by the rows' lengths (0 for a row
    of zeros).

    form: float32, float16, bfloat16, e4m3, e5m2, e2m1 (two columns a byte, the first one low) or bytes (0 to 255).
    rows: uint8 [n, bytes of a row]. queries: float32 [q, cols], `padded`. steps, offsets: float32 [cols], `padded`, of
    bytes and e2m1 only: a number is its level times its column's step, plus its offset.
    """
    scores = np.empty((len(queries), len(rows)), np.float32)
    _native.row_scores(form, cols, rows, queries, scores, cosine, steps, offsets)
    return scores


def bit_scores(cols: int, rows: np.ndarray, queries: np.ndarray, *, signs: bool) -> np.ndarray:
    """float32 [q, n]: cosines of rows of bits, uint8 [n, ceil(cols / 8)] and [q, ...] with zeros behind the last
    column; bits mean 0 and 1, or with `signs` -1 and 1.
    """
    scores = np.empty((len(queries), len(rows)), np.float32)
    _native.bit_scores(cols, rows, queries, scores, signs)
    return scores
