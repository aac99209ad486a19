"""Operations between the products: normalization, rotary embedding, activations, 8-bit rows. NumPy arrays."""

from __future__ import annotations

import numpy as np

from memwall import _native

__all__ = ["gelu", "int8_rows", "layer_norm", "relu", "rms_norm", "rope", "store_int8", "swiglu"]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> np.ndarray:
    """out = x / sqrt(mean(x^2) + eps) * weight over rows of x [rows, width]; `out` may be `x`. Returns `out`."""
    _native.rms_norm(x, weight, eps, out)
    return out


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray) -> np.ndarray:
    """out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over rows of x [rows, width]; `out` may be `x`.

    The variance is the mean of squares, not that of a sample. Returns `out`.
    """
    _native.layer_norm(x, weight, bias, eps, out)
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


def gelu(x: np.ndarray, out: np.ndarray, *, near: bool = False) -> np.ndarray:
    """out = x * Phi(x) on [tokens, width], Phi(x) being the share of a normal distribution below x; `out` may be `x`.

    near: with the tanh that comes near to Phi (Hendrycks 2016, arXiv 1606.08415, section 2). Returns `out`.
    """
    _native.gelu(x, near, out)
    return out


def relu(x: np.ndarray, out: np.ndarray, *, threshold: float = 0.0, up: np.ndarray | None = None) -> np.ndarray:
    """out = x where that is above the threshold, else 0, times `up` if there is one; on [tokens, width]; `out` may be
    `x` or `up`. Returns `out`.
    """
    if up is None:
        _native.relu(x, threshold, out)
    else:
        _native.reglu(x, up, threshold, out)
    return out


def store_int8(x: np.ndarray, places: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows of x [n, H, D] float32 go to rows `places` [n] (int64) of out [N, H, D + 2] int8. Returns `out`.

    A head's D codes are x over its scale, to nearest, ties to even, -127 to 127; the two bytes behind them are the
    scale, max |x| / 127 rounded up to half precision, so that no number is off by more than half of it. A head with
    infinities, or whose scale half precision does not hold, has no finite scale and reads as no numbers.
    """
    _native.store_int8(x, places, out)
    return out


def int8_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [n, H, D + 2] of `store_int8` as float32 [n, H, D]."""
    scales = np.ascontiguousarray(rows[..., -2:]).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # no finite scale: no numbers
        return np.multiply(rows[..., :-2], scales, dtype=np.float32)
