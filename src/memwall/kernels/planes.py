"""Products of bipolar integers in bit planes: what `formats.apmm_bipolar_int` describes, compiled."""

from __future__ import annotations

import numpy as np

from memwall import _native
from memwall.errors import InputError
from memwall.formats.apmm_bipolar_int import WORD_BITS

__all__ = ["pack_planes", "plane_products", "plane_products_apart"]


def pack_planes(x: np.ndarray, bits: int, *, grouped: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, cols] -> planes uint64 [rows, bits, ceil(cols / 64)] and scales float32 [rows], or, grouped,
    [rows, ceil(cols / 64)].

    InputError for numbers that are not finite.
    """
    x = np.ascontiguousarray(x, np.float32)
    words = np.empty((len(x), bits, -(-x.shape[1] // WORD_BITS)), np.uint64)
    scales = np.empty((len(x), words.shape[2]) if grouped else len(x), np.float32)
    if not _native.pack_planes(x, words, scales):
        raise InputError(f"{bits}-bit planes cannot hold NaN or infinite values")
    return words, scales


def plane_products(w: np.ndarray, x: np.ndarray, cols: int, out: np.ndarray | None = None) -> np.ndarray:
    """Integer products [rows of x, rows of w], int32: the sums of all plane pairs, recovered in registers.

    w, x: planes uint64 [rows, bits, ceil(cols / 64)] of equal columns. ValueError where sums could pass 2^31.
    """
    out = np.empty((len(x), len(w)), np.int32) if out is None else out
    _native.plane_products(w, x, cols, out)
    return out


def plane_products_apart(w: np.ndarray, x: np.ndarray, cols: int, out: np.ndarray | None = None) -> np.ndarray:
    """The products of every pair of planes apart, int32 [planes of w, planes of x, rows of x, rows of w].

    The scheme without recovery in the kernel, for comparison: 4 n m bytes per result are written and read again.
    """
    out = np.empty((w.shape[1], x.shape[1], len(x), len(w)), np.int32) if out is None else out
    _native.plane_products_apart(w, x, cols, out)
    return out
