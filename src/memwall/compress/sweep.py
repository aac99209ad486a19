"""The compensated column sweep that GPTQ-like methods share.

Columns are rounded one after the other, and each takes in what the rounding of those before it did to the outputs.
With E = W - Q and H = R R^T, R upper triangular, the squared output error is |E R|^2, and its column j is

    R_jj * (e_j + sum over i < j of e_i R_ij / R_jj)

so the best that column j can do, whatever comes later, is to round w_j + sum over i < j of e_i R_ij / R_jj. This is
the form of GPTQ's update that needs one Cholesky factor and no inverse (GPTQ's U is R's inverse: U_jj = 1 / R_jj);
the sums over earlier groups are one matrix product per group, at its entry, which is also when the group's scales are
found from the compensated weights. With H = I the sums are exactly zero, and what is left is rounding to nearest, bit
for bit.

What a column becomes is up to a `ColumnQuantizer`, which also stores what is kept beside its codes; which entries those
are is up to an `OutlierRule`. Arrays are held column by column ([cols, rows]), so that a column is contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memwall.errors import InputError
from memwall.formats import Packed
from memwall.formats.integer import IntegerCodec

if TYPE_CHECKING:
    from memwall.compress.base import Statistics

# above this the factor is made in float32: the damping is far above its rounding, and float64 would take gigabytes
_FLOAT64_COLUMNS = 4096
_DAMPING_TRIES = 6
_BLOCK_COLUMNS = 128


class ColumnQuantizer(ABC):
    """Rounds columns and keeps their codes. `group` columns share parameters that are found at the group's entry."""

    group: int
    inside: bool = True
    """Whether a column takes in the errors of those before it in its own group; else groups are rounded whole."""
    foresees: bool = False
    """Whether groups are entered with what their columns would become were none of them rounded, which is what the
    least error asks of them together; else with what each would become were it the first."""
    span: int = 0
    """How many columns, a part of the group, are also looked at together by `enter_span`; 0 for none."""

    @abstractmethod
    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        """Find the parameters of group `index` from its compensated columns [at most group, rows] float32.

        weights [at most group]: what a squared error in each of the columns costs (R_jj^2).
        """

    def enter_span(self, first: int, columns: np.ndarray, weights: np.ndarray) -> None:
        """Look at columns `first` and on, [at most span, rows], before the first is rounded: for what they share.

        They are as they would become were none of them rounded (as with `foresees`); weights as in `enter_group`.
        """
        raise NotImplementedError("a quantizer with a span has to say what it does with it")

    @abstractmethod
    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        """Round column `column`, values [rows] float32; returns what it decodes to. Its group was entered before."""

    def store_exact(self, column: int, kept: np.ndarray, values: np.ndarray, rounded: np.ndarray) -> np.ndarray:
        """Store the entries `kept` [rows] of a column beside its codes; returns what the column decodes to then.

        values, rounded [rows] float32: the column before and after `quantize`. Without a form for such entries they
        count as exact.
        """
        return np.where(kept, values, rounded)

    @abstractmethod
    def finish(self) -> Packed:
        """All codes and parameters, once every column is done."""


class OutlierRule(Protocol):
    """Chooses entries that are stored beside the codes at full precision."""

    def keep(self, column: int, values: np.ndarray, rounded: np.ndarray, weight: float) -> np.ndarray | None:
        """Mask [rows] of entries to keep exact, None for none; an entry costs error^2 * weight (which is R_jj^2)."""


class IntegerColumns(ColumnQuantizer):
    """Columns of the group-wise integer codec, with the arithmetic of `IntegerCodec.quantize`.

    shrinks [n]: factors of a group's range that are tried when its scale is found, by what errors cost; the range alone
    where None.
    """

    def __init__(self, codec: IntegerCodec, num_rows: int, num_columns: int, shrinks: np.ndarray | None = None) -> None:
        self.codec = codec
        self._shrinks = shrinks
        self.group = codec.group
        num_groups = codec.num_groups(num_columns)
        self._codes = np.empty((num_columns, num_rows), np.uint8)
        self._scales = np.zeros((num_groups, num_rows), np.float16)
        self._mins = None if codec.symmetric else np.zeros((num_groups, num_rows), np.float16)
        self._prepared: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]] = {}

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        scales, mins = self.codec.fit(columns.T)
        if self._shrinks is not None:
            scales, mins = self._clipped(columns.T, scales, mins, weights)
        self._scales[index] = scales
        if self._mins is not None:
            self._mins[index] = mins
        self._prepared.pop(index, None)

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        scale, divisor, low, zero = self._parameters(column // self.group)
        codes = values / divisor if low is None else (values - low) / divisor
        np.rint(codes, out=codes)
        if low is None:
            codes += self.codec.zero_code
        np.maximum(codes, 0, out=codes)
        np.minimum(codes, (1 << self.codec.bits) - 1, out=codes)
        if zero is not None:
            codes[zero] = self.codec.zero_code
        self._codes[column] = codes
        if low is None:
            codes -= self.codec.zero_code
        codes *= scale
        if low is not None:
            codes += low
        return codes

    def _clipped(
        self, values: np.ndarray, scales: np.ndarray, mins: np.ndarray | None, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Of the ranges that are tried the one of least cost, row by row."""
        assert self._shrinks is not None
        kept, kept_mins, least = scales, mins, np.full(len(values), np.inf, np.float32)
        for shrink in self._shrinks.astype(np.float32):
            tried = (scales * shrink).astype(np.float16)
            low = None if mins is None else (mins * shrink).astype(np.float16)
            found = self.codec.dequantize(self.codec.quantize(values, tried, low), tried, low)
            cost = np.square(found - values) @ weights
            better = cost < least
            least, kept = np.where(better, cost, least), np.where(better, tried, kept)
            if low is not None and kept_mins is not None:
                kept_mins = np.where(better, low, kept_mins)
        return kept, kept_mins

    def _parameters(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Scale, divisor, minimum and the rows without a scale of one group in float32, made once for its columns."""
        if index not in self._prepared:
            scale = self._scales[index].astype(np.float32)
            zero = scale == 0
            divisor = np.where(zero, np.float32(1), scale)
            low = None if self._mins is None else self._mins[index].astype(np.float32)
            self._prepared[index] = scale, divisor, low, zero if zero.any() else None
        return self._prepared[index]

    def finish(self) -> Packed:
        mins = None if self._mins is None else self._mins.T
        return self.codec.pack(np.ascontiguousarray(self._codes.T), self._scales.T, mins)


def factor(hessian: np.ndarray, damping: float, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """H + damping * mean(diag H) I = R R^T, R upper triangular -> feedback R_ij / R_jj [cols, cols] float32, R_jj^2.

    order: the columns as they are to be worked. An input that is always zero leaves an empty row and column, which the
    damping fills: its weights are just rounded. Where H is too close to singular for its precision the damping grows
    tenfold until the factor exists.
    """
    diagonal = np.diagonal(hessian)
    if not np.isfinite(hessian.sum(dtype=np.float64)):
        raise InputError("the calibration statistics hold NaN or infinite values; are the model's weights damaged?")
    # of the matrix in reverse order, the lower factor is this one's upper factor
    reverse = np.arange(len(hessian))[::-1] if order is None else order[::-1]
    dtype = np.float64 if len(hessian) <= _FLOAT64_COLUMNS else np.float32
    mean = float(np.mean(diagonal, dtype=np.float64)) or 1.0
    for attempt in range(_DAMPING_TRIES):
        lower: Any = hessian[np.ix_(reverse, reverse)].astype(dtype, copy=False)
        lower.reshape(-1)[:: len(lower) + 1] += damping * mean * 10.0**attempt
        try:
            _cholesky_in_place(lower)
            break
        except np.linalg.LinAlgError:
            continue
    else:
        raise InputError("the calibration statistics are not positive definite, even damped; use more calibration text")
    pivots = np.diagonal(lower).copy()
    lower /= pivots
    return lower.astype(np.float32, copy=False)[::-1, ::-1], pivots[::-1] ** 2


def _cholesky_in_place(matrix: np.ndarray) -> None:
    """The lower Cholesky factor over the matrix itself: NumPy's own makes two more copies of it."""
    size = len(matrix)
    for start in range(0, size, _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, size)
        if start:
            matrix[start:, start:stop] -= matrix[start:, :start] @ matrix[start:stop, :start].T
        corner = np.linalg.cholesky(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = corner
        matrix[stop:, start:stop] = matrix[stop:, start:stop] @ np.linalg.inv(corner).T
        matrix[start:stop, stop:] = 0


def work_bytes(num_rows: int, num_columns: int) -> int:
    """Most bytes that `Factor.of` and `sweep` hold beside weight, H and result.

    The factor and its float32 form; then the latter beside columns and errors (float32) and codes (twice).
    """
    squares = 12 if num_columns <= _FLOAT64_COLUMNS else 4
    return max(squares * num_columns**2, 4 * num_columns**2 + 10 * num_rows * num_columns)


@dataclass(frozen=True, slots=True)
class Factor:
    """The factor of one H, for all matrices that read the same inputs.

    order [cols]: the columns in the order they are worked; feedback and pivots are in that order, see `factor`.
    """

    order: np.ndarray
    feedback: np.ndarray
    pivots: np.ndarray

    @staticmethod
    def of(hessian: np.ndarray, damping: float = 0.01, activation_order: bool = False) -> Factor:
        """activation_order: columns with the largest inputs go first."""
        order = np.arange(len(hessian))
        if activation_order:
            order = np.argsort(-np.diagonal(hessian), kind="stable")
        return Factor(order, *factor(hessian, damping, order))

    def arranged(self) -> Factor:
        """The same for a weight whose columns were put in order beforehand, so that groups are of columns in order."""
        return Factor(np.arange(len(self.order)), self.feedback, self.pivots)


def factor_for(statistics: Statistics | None, num_columns: int, damping: float, activation_order: bool) -> Factor:
    """The factor of a layer's statistics, of H = I where there are none; InputError where they are of another layer."""
    if statistics is None:
        return Factor.of(np.eye(num_columns, dtype=np.float32), damping, activation_order)
    if statistics.hessian.shape != (num_columns, num_columns):
        raise InputError(f"statistics of {len(statistics.hessian)} inputs do not fit a matrix of {num_columns}")
    return statistics.factor(damping, activation_order)


def sweep(
    weight: np.ndarray, factored: Factor, quantizer: ColumnQuantizer, *, outliers: OutlierRule | None = None
) -> Packed:
    """Compress weight [rows, cols] under the H that was factored."""
    sweep_columns(weight, factored, quantizer, outliers=outliers)
    return quantizer.finish()


def sweep_columns(
    weight: np.ndarray, factored: Factor, quantizer: ColumnQuantizer, *, outliers: OutlierRule | None = None
) -> None:
    """Hand all columns of weight [rows, cols] to the quantizer, each after it took in the errors of those before it.

    Groups are those of neighbouring columns whatever the order, so that the stored form is the same. Worked out of
    order, a group's parameters come from the weights as given, as its columns no longer meet together.
    """
    columns = np.ascontiguousarray(np.asarray(weight, np.float32).T)
    order, feedback, pivots = factored.order, factored.feedback, factored.pivots
    in_order = bool((order == np.arange(len(columns))).all())
    if quantizer.span and not in_order:
        raise InputError("columns that are looked at together have to be worked in order")
    if not in_order:
        weights = np.empty_like(pivots)
        weights[order] = pivots
        for start in range(0, len(columns), quantizer.group):
            stop = start + quantizer.group
            quantizer.enter_group(start // quantizer.group, columns[start:stop], weights[start:stop])
    errors = np.empty_like(columns)
    for start in range(0, len(columns), quantizer.group):
        members = order[start : start + quantizer.group]
        stop = start + len(members)
        original = columns[members]
        # the factor is a reversed view, which BLAS does not take: one group's part is copied at a time
        taken_in = np.ascontiguousarray(feedback[:stop, start:stop].T)
        targets = original + taken_in[:, :start] @ errors[:start]
        if in_order:
            expected = _unrounded(original, targets, taken_in[:, start:stop]) if quantizer.foresees else targets
            quantizer.enter_group(start // quantizer.group, expected, pivots[start:stop])
            if not quantizer.inside:
                targets = expected
        _sweep_group(
            members,
            original,
            targets,
            taken_in[:, start:stop],
            errors[start:stop],
            quantizer,
            pivots[start:stop],
            outliers,
        )


def _unrounded(original: np.ndarray, targets: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """What a group's columns become when each takes in what those before it have moved by, and none is rounded.

    t_j = targets_j + sum over i < j of feedback_ji (original_i - t_i): a triangular system.
    """
    before = np.tril(feedback, -1)
    moved = before + np.eye(len(before), dtype=np.float32)
    return np.ascontiguousarray(np.linalg.solve(moved, targets + before @ original), np.float32)


def _sweep_group(
    members: np.ndarray,
    original: np.ndarray,
    targets: np.ndarray,
    feedback: np.ndarray,
    errors: np.ndarray,
    quantizer: ColumnQuantizer,
    pivots: np.ndarray,
    outliers: OutlierRule | None,
) -> None:
    """The columns of one group in turn; errors [members, rows] receives what each leaves behind.

    feedback [members, members]: row j weighs the errors that column j takes in.
    """
    for j, column in enumerate(members):
        if quantizer.span and j % quantizer.span == 0:
            together = slice(j, min(j + quantizer.span, len(members)))
            seen = targets[together] + feedback[together, :j] @ errors[:j]
            expected = _unrounded(original[together], seen, feedback[together, together])
            quantizer.enter_span(int(column), expected, pivots[together])
        if j and quantizer.inside:
            targets[j] += feedback[j, :j] @ errors[:j]
        rounded = quantizer.quantize(int(column), targets[j])
        if outliers is not None:
            kept = outliers.keep(int(column), targets[j], rounded, float(pivots[j]))
            if kept is not None:
                rounded = quantizer.store_exact(int(column), kept, targets[j], rounded)
        np.subtract(original[j], rounded, out=errors[j])
