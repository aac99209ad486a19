"""DB-LLM's stored form: two bits a weight that each switch a scale on, so that a product is two of binary matrices.

Source: "DB-LLM: Accurate Dual-Binarization for Efficient LLMs" (Hong Chen, 2024, arXiv 2402.11960), section 3.2, from
the formulas of "How Good Are Low-bit Quantized LLaMA3 Models?"; no code is published. `compress.db_llm` finds what is
stored here.

Idea: value = a1 b1 + a2 b2, b in {0, 1}, with a pair of scales per row and group. It starts as two-bit integers, levels
-s, 0, s, 2s (a1 = 2s, a2 = -s), and the scales then part: four levels of two free numbers, zero among them.

Units and shapes: as `formats.leveled`, with two scales per group: `scales` holds a1, `second` a2; a code is b1 + 2 b2.
Differs from the paper: s may be negative, so that the far level lies on the side of the larger weights. Scales are
fitted by alternating least squares.
Cost: 2 + 32 / group bits per weight, 2.25 in groups of 128.
Holds when: as formats of two bits do, with something that makes up for the error.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.leveled import ResidualBinaryCodec, Scales
from memwall.formats.levels import LevelSet

REFINEMENTS = 8
"""Rounds of least squares; each can only lower the error."""
_STARTS = np.linspace(0.4, 1.0, 13, dtype=np.float32)
_BITS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
"""b1 and b2 by code."""
_LEVELS = LevelSet(
    name="dual2",
    bits=2,
    values=np.asarray([0, 2, -1, 1], np.float32),
    codes=np.asarray([2, 0, 3, 1], np.uint8),
    thresholds=np.asarray([-0.5, 0.5, 1.5], np.float32),
)


class DualBinaryCodec(ResidualBinaryCodec):
    """`dual2`, groups of 128 unless the spec says otherwise."""

    examples: ClassVar[tuple[str, ...]] = ("dual2", "dual2-g64", "dual2-g10-rows")
    encodes_natively: ClassVar[bool] = False

    @classmethod
    def parse(cls, spec: str) -> DualBinaryCodec:
        match = re.fullmatch(r"dual2(?:-g(?P<group>[0-9]{1,6}))?(?P<rows>-rows)?", spec)
        if match is None:
            raise InputError(f"unknown format {spec!r}; two binary matrices are called dual2, such as dual2-g64")
        layout: Any = "rows" if match["rows"] else "tiles"
        return cls(name="dual2", group=int(match["group"] or 128), scale="f16", layout=layout)

    @property
    def spec(self) -> str:
        return f"dual2-g{self.group}{'-rows' if self.layout == 'rows' else ''}"

    @property
    def levels(self) -> LevelSet:
        return _LEVELS

    def pair_counts(self) -> tuple[np.ndarray, np.ndarray, int]:
        return _BITS[:, 0].astype(np.uint8), _BITS[:, 1].astype(np.uint8), 0

    def fit(self, groups: np.ndarray) -> Scales:
        first, second = dual_scales(groups)
        return self.store.rounded(first, self.spec), self.store.rounded(second, self.spec)

    def quantize(self, groups: np.ndarray, scales: Scales) -> np.ndarray:
        return nearest(groups, scales[0][..., None], scales[1][..., None])

    def dequantize(self, codes: np.ndarray, scales: Scales) -> np.ndarray:
        first, second = np.float32(codes & 1), np.float32(codes >> 1)
        return scales[0][..., None] * first + scales[1][..., None] * second


def nearest(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Codes uint8 of the nearest of 0, a1, a2 and a1 + a2; first, second broadcast with values."""
    codes = np.zeros(values.shape, np.uint8)
    least = np.abs(values)
    for code, level in ((1, first), (2, second), (3, first + second)):
        away = np.abs(values - level)
        better = away < least
        codes[better] = code
        np.minimum(least, away, out=least)
    return codes


def dual_scales(groups: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """a1 and a2 [...] float32 of groups [..., n]. weights [n]: what a squared error of a member costs; None: all alike.

    The best of some starts (either side, several s) by cost, then least squares for the bits and bits for the scales.
    """
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    best = np.full(low.shape, np.inf, np.float32)
    first, second = np.zeros(low.shape, np.float32), np.zeros(low.shape, np.float32)
    share = np.ones(groups.shape[-1], np.float32) if weights is None else weights.astype(np.float32)
    for side in (1, -1):
        widest = np.maximum(side * (high if side > 0 else low) / 2, -side * (low if side > 0 else high))
        for start in _STARTS:
            step = side * start * widest
            cost = _cost(groups, 2 * step, -step, share)
            better = cost < best
            best[better], first[better], second[better] = cost[better], 2 * step[better], -step[better]
    for _ in range(REFINEMENTS):
        bits = _BITS[nearest(groups, first[..., None], second[..., None])]
        tried = _least_squares(groups, bits, share)
        cost = _cost(groups, *tried, share)
        better = cost < best
        if not better.any():
            break
        best[better], first[better], second[better] = cost[better], tried[0][better], tried[1][better]
    return first, second


def _cost(groups: np.ndarray, first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    bits = _BITS[nearest(groups, first[..., None], second[..., None])]
    left = groups - bits[..., 0] * first[..., None] - bits[..., 1] * second[..., None]
    return np.asarray((np.square(left) * share).sum(axis=-1), np.float32)


def _least_squares(groups: np.ndarray, bits: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair of scales that is best for these bits [..., n, 2]; a scale that no weight switches on is zero."""
    one, two = bits[..., 0] * share, bits[..., 1] * share
    a, b, d = (one * bits[..., 0]).sum(-1), (one * bits[..., 1]).sum(-1), (two * bits[..., 1]).sum(-1)
    u, v = (one * groups).sum(-1), (two * groups).sum(-1)
    determinant = a * d - b * b
    solvable = determinant > 1e-6 * np.maximum(a * d, np.float32(1e-30))
    safe = np.where(solvable, determinant, np.float32(1))
    alone = np.where(a > 0, u / np.where(a > 0, a, 1), 0), np.where(d > 0, v / np.where(d > 0, d, 1), 0)
    first = np.where(solvable, (d * u - b * v) / safe, np.where(a >= d, alone[0], 0))
    second = np.where(solvable, (a * v - b * u) / safe, np.where(a >= d, 0, alone[1]))
    return first.astype(np.float32), second.astype(np.float32)
