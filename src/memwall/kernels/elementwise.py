"""Operations between the products: normalization, rotary embedding, gated activation, 8-bit floats. NumPy arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from memwall import _native

__all__ = ["rms_norm", "rope", "store_float8", "swiglu"]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> np.ndarray:
    """out = x / sqrt(mean(x^2) + eps) * weight over rows of x [rows, width]; `out` may be `x`. Returns `out`."""
    _native.rms_norm(x, weight, eps, out)
    return out


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate x [tokens, heads, head_width] in place; cos and sin [tokens, rotated_width / 2].

    Pairs are (i, i + rotated_width / 2), as Hugging Face models store them. Where the tables cover less than a head,
    the rest of the head stays as it is. Returns `x`.
    """
    _native.rope(x, cos, sin)
    return x


def swiglu(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out = silu(gate) * up on [tokens, width]; `out` may be `gate` or `up`. Returns `out`."""
    _native.swiglu(gate, up, out)
    return out


def store_float8(x: np.ndarray, places: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows of x [n, ...] float32 go to rows `places` [n] (int64) of out [N, ...] float8_e4m3fn. Returns `out`.

    To the nearest number, ties to even. What lies beyond 448, infinities included, becomes 448, as caches of other
    engines do it (a cast of NumPy's would make it no number); what is no number stays none.
    """
    if out.dtype != ml_dtypes.float8_e4m3fn:
        raise TypeError(f"out must be float8_e4m3fn, not {out.dtype}")
    _native.store_float8(x.reshape(len(x), -1), places, out.reshape(len(out), -1).view(np.uint8))
    return out
