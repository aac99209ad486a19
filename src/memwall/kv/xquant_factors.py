"""XQuant's matrices where heads share keys: the singular directions of W_K and W_V, computed once and kept."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from memwall.kv import fitted
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.latent import decoded, hidden_size, projection_names

if TYPE_CHECKING:
    from memwall.memory import Arena

FITTING = "kv/building"
LEAST_SINGULAR_SHARE = 1e-3
"""Singular values below this share of the largest count as this much: float16 holds neither them nor their inverse."""


def factor_arrays(
    model: CacheModel, shape: CacheShape, arena: Arena, *, first: int, joint: bool
) -> dict[str, np.ndarray]:
    """The matrices of all layers from `first` on: from the weights as they are held, once; then from the file they
    were kept in.

    joint: one map for keys and values, d to 2 h and back; else one each, h to h and back.
    """
    d, h = hidden_size(shape, "xquant"), shape.row_values
    forms = "".join(model.weights.specs[name] for layer in range(shape.num_layers) for name in projection_names(layer))
    digest = hashlib.sha256(forms.encode()).hexdigest()[:16]
    copies = copies_bytes(shape, first=first, joint=joint)
    charge = arena.charge(FITTING, copies)

    def make() -> dict[str, np.ndarray]:
        charge.resize(copies + work_bytes(shape, joint=joint))
        arrays: dict[str, np.ndarray] = {}
        for layer in range(first, shape.num_layers):
            weights = [decoded(model.weights.matrices[name], h, d) for name in projection_names(layer)]
            found = _shared_factors(weights) if joint else _own_factors(weights)
            arrays |= {f"{layer}.{name}": array.astype(np.float16) for name, array in found.items()}
        return arrays

    try:
        return fitted.remembered(model, f"xquant joint={int(joint)} first={first} {digest}", make)
    finally:
        charge.release()


def copies_bytes(shape: CacheShape, *, first: int, joint: bool) -> int:
    """All matrices in float16, before they are copied to where they stay."""
    d, h = hidden_size(shape, "xquant"), shape.row_values
    return 2 * (shape.num_layers - first) * (4 * d * h if joint else 4 * h * h)


def work_bytes(shape: CacheShape, *, joint: bool) -> int:
    """One layer's matrices while they are made: its weights, and what the decomposition holds in double."""
    d, h = hidden_size(shape, "xquant"), shape.row_values
    if joint:  # weights twice; the matrix twice, its factors, and the work space of the divide-and-conquer SVD
        return 2 * 8 * d * h + 8 * 3 * 2 * d * h + 8 * 8 * (2 * h) ** 2
    return 8 * 2 * h * (2 * d + 4 * h)


def _own_factors(weights: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Maps between X W [h] and latent rows, both ways, for keys and for values; weights are W^T [h, d].

    With W = U S B^T a latent row of keys is X W B = X U S: groups along tokens do not see the scale of a channel. Those
    of values run along channels, so there it is X W B S^-1 = X U.
    """
    found = {}
    for which, weight in zip("kv", weights):
        weight = weight.astype(np.float64)
        squares, basis = np.linalg.eigh(weight @ weight.T)
        singular = np.sqrt(np.maximum(squares, 0))
        singular = np.maximum(singular / singular[-1], LEAST_SINGULAR_SHARE) if which == "v" else np.ones_like(squares)
        # large first, so that neighbours in a group are alike
        basis, singular = basis[:, ::-1], singular[::-1]
        found[f"{which}.in"], found[f"{which}.out"] = (basis / singular).T, basis * singular
    return found


def _shared_factors(weights: list[np.ndarray]) -> dict[str, np.ndarray]:
    """U_KV of [W_K | W_V], d x 2h, in both orientations."""
    basis = np.linalg.svd(np.concatenate(weights).T.astype(np.float64), full_matrices=False)[0]
    return {"in": basis.T, "out": basis}
