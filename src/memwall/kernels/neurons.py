"""A feed-forward of neurons that lie one after another in memory, each with all its weights in one row."""

from __future__ import annotations

import numpy as np

from memwall import _native

__all__ = ["add_neurons"]


def add_neurons(
    form: str,
    rows: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
    active: np.ndarray,
    *,
    gated: bool = False,
    biases: np.ndarray | None = None,
    threshold: float = 0.0,
) -> np.ndarray:
    """out [tokens, width] += the sum over neurons of h * down; returns `out`.

    form: float32, float16 or bfloat16. rows: uint8 [n, bytes of a row], which begin with `up | down` or, gated, with
    `gate | up | down`, `width` numbers each. h is relu(up x + bias), or relu(gate x + bias) (up x + bias); relu gives 0
    up to the threshold. x: float32 [tokens, width]. biases: float32 [n, 1], or [n, 2] of gated ones. active: float32
    [tokens, n], where h goes. The sum goes in the order of rows whatever the number of threads.
    """
    _native.neurons(form, gated, threshold, rows, x, biases, active, out)
    return out
