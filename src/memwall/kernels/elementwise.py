"""Operations between the products: normalization, rotary embedding, gated activation. float32 NumPy arrays."""

from __future__ import annotations

import numpy as np

from memwall import _native

__all__ = ["rms_norm", "rope", "swiglu"]


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
