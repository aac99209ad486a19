"""The compensated column sweep that GPTQ-like methods share.

Columns are rounded one after the other, and each takes in what the rounding of those before it did to the outputs.
With E = W - Q and H = R R^T, R upper triangular, the squared output error is |E R|^2, and its column j is

    R_jj * (e_j + sum over i < j of e_i R_ij / R_jj)

so the best that column j can do, whatever comes later, is to round w_j + sum over i < j of e_i R_ij / R_jj. This is
the form of GPTQ's update that needs one Cholesky factor and no inverse (GPTQ's U is R's inverse: U_jj = 1 / R_jj);
the sums over earlier groups are one matrix product per group, at its entry, which is also when the group's scales are
found from the compensated weights. With H = I the sums are exactly zero, and what is left is rounding to nearest, bit
for bit.

What a column becomes is up to a `ColumnQuantizer`; which of its entries are kept exact, and so leave no error behind,
is up to an `OutlierRule`. Arrays are held column by column ([cols, rows]), so that a column is contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from memwall.errors import InputError
from memwall.formats import Packed
from memwall.formats.integer import IntegerCodec

# above this the factor is made in float32: the damping is far above its rounding, and float64 would take gigabytes
_FLOAT64_COLUMNS = 4096
_DAMPING_TRIES = 6


class ColumnQuantizer(ABC):
    """Rounds columns and keeps their codes. `group` columns share parameters that are found at the group's entry."""

    group: int

    @abstractmethod
    def enter_group(self, index: int, columns: np.ndarray) -> None:
        """Find the parameters of group `index` from its compensated columns [at most group, rows] float32."""

    @abstractmethod
    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        """Round column `column`, values [rows] float32; returns what it decodes to. Its group was entered before."""

    @abstractmethod
    def finish(self) -> Packed:
        """All codes and parameters, once every column is done."""


class OutlierRule(Protocol):
    """Chooses entries that are stored beside the codes at full precision."""

    def keep(self, column: int, values: np.ndarray, rounded: np.ndarray, weight: float) -> np.ndarray | None:
        """Mask [rows] of entries to keep exact, None for none; an entry costs error^2 * weight (which is R_jj^2)."""


class IntegerColumns(ColumnQuantizer):
    """Columns of the group-wise integer codec, with the arithmetic of `IntegerCodec.quantize`."""

    def __init__(self, codec: IntegerCodec, num_rows: int, num_columns: int) -> None:
        self.codec = codec
        self.group = codec.group
        num_groups = codec.num_groups(num_columns)
        self._codes = np.empty((num_columns, num_rows), np.uint8)
        self._scales = np.zeros((num_groups, num_rows), np.float16)
        self._mins = None if codec.symmetric else np.zeros((num_groups, num_rows), np.float16)
        self._entered = -1

    def enter_group(self, index: int, columns: np.ndarray) -> None:
        scales, mins = self.codec.fit(columns.T)
        self._scales[index] = scales
        if self._mins is not None:
            self._mins[index] = mins
        self._entered = -1

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        if self._entered != column // self.group:
            self._use(column // self.group)
        shifted = values if self._min is None else values - self._min
        codes = np.rint(shifted / self._divisor)
        if self._min is None:
            codes += self.codec.zero_code
        np.clip(codes, 0.0, (1 << self.codec.bits) - 1, out=codes)
        if self._has_zero:
            codes[self._zero] = self.codec.zero_code
        self._codes[column] = codes
        if self._min is None:
            codes -= self.codec.zero_code
            codes *= self._scale
        else:
            codes *= self._scale
            codes += self._min
        return codes

    def _use(self, index: int) -> None:
        """float32 copies of one group's parameters, made once for its columns."""
        self._entered = index
        self._scale = self._scales[index].astype(np.float32)
        self._min = None if self._mins is None else self._mins[index].astype(np.float32)
        self._zero = self._scale == 0
        self._has_zero = bool(self._zero.any())
        self._divisor = np.where(self._zero, np.float32(1), self._scale)

    def finish(self) -> Packed:
        mins = None if self._mins is None else self._mins.T
        return self.codec.pack(np.ascontiguousarray(self._codes.T), self._scales.T, mins)


def factor(hessian: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """H + damping * mean(diag H) I = R R^T, R upper triangular -> feedback R_ij / R_jj [cols, cols] float32, R_jj^2.

    An input that is always zero leaves an empty row and column, which the damping fills: its weights are just rounded.
    Where H is too close to singular for its precision the damping grows tenfold until the factor exists.
    """
    if not np.isfinite(hessian).all():
        raise InputError("the calibration statistics hold NaN or infinite values; are the model's weights damaged?")
    # of the matrix in reverse order, the lower factor is this one's upper factor
    reverse: Any = hessian[::-1, ::-1].astype(np.float64 if len(hessian) <= _FLOAT64_COLUMNS else np.float32)
    mean = float(np.mean(np.diagonal(reverse), dtype=np.float64)) or 1.0
    diagonal = reverse.reshape(-1)[:: len(reverse) + 1]
    added = 0.0
    for attempt in range(_DAMPING_TRIES):
        wanted = damping * mean * 10.0**attempt
        diagonal += wanted - added
        added = wanted
        try:
            lower = np.linalg.cholesky(reverse)
            break
        except np.linalg.LinAlgError:
            continue
    else:
        raise InputError("the calibration statistics are not positive definite, even damped; use more calibration text")
    del reverse, diagonal
    upper = lower[::-1, ::-1]
    pivots = np.diagonal(upper).copy()
    upper /= pivots
    return np.ascontiguousarray(upper, np.float32), pivots**2


def work_bytes(num_rows: int, num_columns: int) -> int:
    """Most bytes that `sweep` holds beside weight, H and result.

    Three squares while the factor is made; then the feedback beside columns and errors (float32) and codes.
    """
    itemsize = 8 if num_columns <= _FLOAT64_COLUMNS else 4
    matrices = 9 * num_rows * num_columns
    return max(3 * itemsize * num_columns**2 + 4 * num_rows * num_columns, 4 * num_columns**2 + matrices)


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
            hessian = hessian[np.ix_(order, order)]
        return Factor(order, *factor(hessian, damping))


def sweep(
    weight: np.ndarray, factored: Factor, quantizer: ColumnQuantizer, *, outliers: OutlierRule | None = None
) -> Packed:
    """Compress weight [rows, cols] under the H that was factored.

    Groups are those of neighbouring columns whatever the order, so that the stored form is the same. Worked out of
    order, a group's parameters come from the weights as given, as its columns no longer meet together.
    """
    columns = np.ascontiguousarray(np.asarray(weight, np.float32).T)
    order, feedback, pivots = factored.order, factored.feedback, factored.pivots
    in_order = bool((order == np.arange(len(columns))).all())
    if not in_order:
        for start in range(0, len(columns), quantizer.group):
            quantizer.enter_group(start // quantizer.group, columns[start : start + quantizer.group])
    errors = np.empty_like(columns)
    for start in range(0, len(columns), quantizer.group):
        members = order[start : start + quantizer.group]
        stop = start + len(members)
        original = columns[members]
        targets = original + feedback[:start, start:stop].T @ errors[:start]
        if in_order:
            quantizer.enter_group(start // quantizer.group, targets)
        _sweep_group(
            members,
            original,
            targets,
            feedback[start:stop, start:stop],
            errors[start:stop],
            quantizer,
            None if outliers is None else (outliers, pivots[start:stop]),
        )
    return quantizer.finish()


def _sweep_group(
    members: np.ndarray,
    original: np.ndarray,
    targets: np.ndarray,
    feedback: np.ndarray,
    errors: np.ndarray,
    quantizer: ColumnQuantizer,
    outliers: tuple[OutlierRule, np.ndarray] | None,
) -> None:
    """The columns of one group in turn; errors [members, rows] receives what each leaves behind."""
    for j, column in enumerate(members):
        if j:
            targets[j] += feedback[:j, j] @ errors[:j]
        rounded = quantizer.quantize(int(column), targets[j])
        if outliers is not None:
            rule, pivots = outliers
            kept = rule.keep(int(column), targets[j], rounded, float(pivots[j]))
            if kept is not None:
                rounded = np.where(kept, targets[j], rounded)
        np.subtract(original[j], rounded, out=errors[j])
