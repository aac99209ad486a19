"""SpQR: tiny groups whose scales are quantized too, and the few weights that would cost most kept beside the codes.

Source: "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression" (Tim Dettmers, 2023, arXiv
2306.03078), sections 3 and 4, algorithm 1; official code: github.com/Vahe1994/SpQR (Apache-2.0).

Idea: most of a layer's error at 3 or 4 bits comes from single weights. A weight is an outlier where rounding it costs
more than `outlier_threshold` of what a weight of the layer costs on average: an outlier is stored at 16 bits and no
longer stretches its group's range. Whether it would is asked beforehand, by leaving each member of a group out in turn.
Scales and zeros of 16 rows are rounded before the group's codes are chosen, so the sweep makes up for that error too.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.spqr`.
Differs from the paper: see `formats.spqr`; an outlier's error is that of its 16-bit form, not zero; leaving a member
out is worked out for the two that hold the range, as for all others the range stays and only their own error goes.
Cost: that of GPTQ, and per group of 16 columns some 40 operations on rows x 16 numbers; resident beside weight and H,
max(12 cols^2, 4 cols^2 + 16 rows * cols) bytes (4 cols^2 instead of 12 above 4,096 columns).
Holds when: as GPTQ; with few rows the row offsets, 32 bits a row, are felt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.errors import InputError
from memwall.formats import Packed, codec, spqr
from memwall.formats.bitpack import TILE_ROWS
from memwall.formats.spqr import GROUP, Outliers, Parts, SpqrCodec

ORDERS = ("activation", "identity", "spearman")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spqr(WeightMethod):
    """The compensated sweep over bilevel groups with outliers.

    outlier_threshold: cost above which a weight is an outlier, in parts of the layer's mean (0: all weights are).
    simplified: no leaving out, outliers are found when their column is rounded. order: of the columns, by falling
    size of their inputs (`activation`), as they are (`identity`), or each beside the one whose weights rank most alike
    (`spearman`).
    """

    name: ClassVar[str] = "spqr"
    needs_statistics: ClassVar[bool] = True
    # section 5: percdamp 1.0 in the recipe for near-lossless models (0.01 is the code's default)
    damping: ClassVar[float] = 1.0
    default_bits: ClassVar[str] = "4"

    outlier_threshold: float = 0.2
    simplified: bool = False
    order: str = "activation"

    def __post_init__(self) -> None:
        if not (self.outlier_threshold >= 0 and math.isfinite(self.outlier_threshold)):
            raise InputError(f"outlier_threshold is {self.outlier_threshold:g}; it must be 0 or more, such as 0.2")
        if self.order not in ORDERS:
            raise InputError(f"order {self.order!r}: choose one of {', '.join(ORDERS)}")

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            found = codec(bits)
            if not isinstance(found, SpqrCodec):
                return found.spec
            bits = found.bits
        if bits != int(bits) or not 2 <= bits <= 8:
            raise InputError(
                f"bits {bits:g}: spqr takes whole bits per code, --bits 3 or 4 (2 to 8); scales add 0.63, outliers some"
            )
        return f"spqr{int(bits)}" + ("" if self.order == "identity" else "-ordered")

    def check(self, spec: str) -> None:
        _form(spec)

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        if not isinstance(codec(config.spec), SpqrCodec):
            return kernels.encode(config.spec, weight)  # embedding and head stay floats
        num_rows, num_columns = weight.shape
        if statistics is None:
            statistics = Statistics.identity(num_columns)
        if statistics.hessian.shape != (num_columns, num_columns):
            raise InputError(f"statistics of {len(statistics.hessian)} inputs do not fit a matrix of {num_columns}")
        factored = self.factor(weight, statistics, config.damping)
        ordered = np.asarray(weight[:, factored.order], np.float32)
        ordered[:, statistics.hessian.diagonal()[factored.order] == 0] = 0  # what never fires has no say in the ranges
        limit = self.outlier_threshold * mean_cost(ordered, factored.pivots)
        columns = SpqrColumns(_form(config.spec).bits, num_rows, num_columns, None if self.simplified else limit)
        columns.order = None if self.order == "identity" else factored.order
        return sweep.sweep(ordered, factored.arranged(), columns, outliers=Costly(limit))

    def factor(self, weight: np.ndarray, statistics: Statistics, damping: float) -> sweep.Factor:
        """H's factor with the columns in their order."""
        if self.order != "spearman":
            return statistics.factor(damping, self.order == "activation")
        order = alike_order(weight, int(np.argmax(statistics.hessian.diagonal())))
        return sweep.Factor(order, *sweep.factor(statistics.hessian, damping, order))

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        ranks = 8 * num_columns**2 if self.order == "spearman" else 0
        return sweep.work_bytes(num_rows, num_columns) + 6 * num_rows * num_columns + ranks


def _form(spec: str) -> SpqrCodec:
    form = codec(spec)
    if not isinstance(form, SpqrCodec):
        raise InputError(f"spqr makes its own formats spqr2 to spqr8, not {spec}: give --bits 3 or 4")
    return form


def mean_cost(weight: np.ndarray, pivots: np.ndarray) -> float:
    """What a weight of the layer costs: the columns' variances over U_jj^2, their mean (one row: its own variance)."""
    variances = weight.var(axis=0, ddof=1, dtype=np.float64) if len(weight) > 1 else weight.var(dtype=np.float64)
    return float(np.mean(variances * pivots))


def alike_order(weight: np.ndarray, first: int) -> np.ndarray:
    """Columns in an order in which each is followed by the one, of those left, whose weights rank most alike."""
    ranks = np.argsort(np.argsort(weight, axis=0, kind="stable"), axis=0).astype(np.float32)
    ranks -= (len(weight) - 1) / 2  # all columns hold the same ranks, so their product is Spearman's but for a factor
    alike = ranks.T @ ranks
    order, left = [first], np.ones(weight.shape[1], bool)
    while left[order[-1]] and len(order) < weight.shape[1]:
        left[order[-1]] = False
        order.append(int(np.argmax(np.where(left, alike[order[-1]], -np.inf))))
    return np.array(order)


def leave_one_out(values: np.ndarray, weights: np.ndarray, bits: int) -> np.ndarray:
    """By how much a group's cost falls when a member is left out of it, for each member.

    values [rows, n] float32, weights [n] (1 / U_jj^2) -> float32 [rows, n]. Without one of its inner members a group
    keeps its range, so only their own cost goes; without the smallest or the largest the range is fitted anew.
    """
    scales, zeros = (each[:, None] for each in spqr.fit(values, bits))
    costs = _costs(values, scales, zeros, weights, bits)
    gains = costs.copy()
    if values.shape[1] == 1:
        return gains
    every, whole = np.arange(len(values)), costs.sum(axis=1)
    for extreme in (values.argmin(axis=1), values.argmax(axis=1)):
        others = values.copy()
        others[every, extreme] = values[every, extreme - 1]  # any other member: a double moves no extreme
        scales, zeros = (each[:, None] for each in spqr.fit(others, bits))
        left = _costs(others, scales, zeros, weights, bits)
        left[every, extreme] = 0
        gains[every, extreme] = whole - left.sum(axis=1)
    return gains


def _costs(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, weights: np.ndarray, bits: int) -> np.ndarray:
    rounded = spqr.dequantize(spqr.quantize(values, scales, zeros, bits), scales, zeros)
    rounded -= values
    rounded *= rounded
    rounded *= weights.astype(np.float32)
    return rounded


@dataclass(frozen=True, slots=True)
class Costly:
    """Keeps what costs more than `limit`."""

    limit: float

    def keep(self, column: int, values: np.ndarray, rounded: np.ndarray, weight: float) -> np.ndarray | None:
        kept = np.square(values - rounded) * np.float32(weight) > self.limit
        return kept if kept.any() else None


class SpqrColumns(sweep.ColumnQuantizer):
    """Columns in groups of 16 with two levels. limit: gain above which a member has no say in its group's range."""

    group = GROUP

    def __init__(self, bits: int, num_rows: int, num_columns: int, limit: float | None) -> None:
        self.bits = bits
        self.limit = limit
        self.order: np.ndarray | None = None
        groups = -(-num_columns // GROUP)
        self._codes = np.empty((num_columns, num_rows), np.uint8)
        self._scale_codes, self._zero_codes = (np.empty((groups, num_rows), np.uint8) for _ in range(2))
        self._second = np.empty((groups, -(-num_rows // TILE_ROWS), 4), np.float16)
        self._scales = self._zeros = np.empty(0, np.float32)
        self._kept: list[tuple[int, np.ndarray, np.ndarray]] = []

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        values = np.ascontiguousarray(columns.T)
        left_out = self.left_out(index, values, weights)
        if left_out is not None:
            # where all are, the mean of none is 0, which is as good as any
            means = np.where(left_out, 0, values).sum(axis=1) / np.maximum((~left_out).sum(axis=1), 1)
            values = np.where(left_out, means[:, None].astype(np.float32), values)
        scales, zeros = spqr.fit(values, self.bits)
        self.store_statistics(index, scales, zeros)

    def left_out(self, index: int, values: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
        """Members [rows, n] that have no say in the range of group `index`."""
        if self.limit is None:
            return None
        return leave_one_out(values, weights, self.bits) > self.limit

    def store_statistics(self, index: int, scales: np.ndarray, zeros: np.ndarray) -> None:
        """Round a group's scales and zeros [rows] to their codes; what these stand for is used from here on."""
        self._scale_codes[index], self._second[index, :, :2] = spqr.second_level(scales, self.bits, "scale")
        self._zero_codes[index], self._second[index, :, 2:] = spqr.second_level(zeros, self.bits, "zero")
        self._scales = spqr.second_values(self._scale_codes[index], self._second[index, :, :2])
        self._zeros = spqr.second_values(self._zero_codes[index], self._second[index, :, 2:])

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        codes = spqr.quantize(values, self._scales, self._zeros, self.bits)
        self._codes[column] = codes
        return spqr.dequantize(codes, self._scales, self._zeros)

    def store_exact(self, column: int, kept: np.ndarray, values: np.ndarray, rounded: np.ndarray) -> np.ndarray:
        codes = spqr.quantize(np.zeros(1, np.float32), self._scales[kept], self._zeros[kept], self.bits)
        self._codes[column, kept] = codes
        base = spqr.dequantize(codes, self._scales[kept], self._zeros[kept])
        with np.errstate(over="ignore"):
            missing = (values[kept] - base).astype(np.float16)
        if not np.isfinite(missing).all():
            raise InputError(f"spqr{self.bits}: an outlier of {np.abs(values[kept]).max():g} overflows float16 (65504)")
        self._kept.append((column, np.flatnonzero(kept), missing))
        rounded = rounded.copy()
        rounded[kept] = base + missing.astype(np.float32)
        return rounded

    def finish(self) -> Packed:
        outliers = None
        if self._kept:
            rows = np.concatenate([rows for _, rows, _ in self._kept])
            places = np.repeat([place for place, *_ in self._kept], [len(rows) for _, rows, _ in self._kept])
            by_row = np.lexsort((places, rows))
            values = np.concatenate([values for *_, values in self._kept])
            outliers = Outliers(rows=rows[by_row], places=places[by_row], values=values[by_row])
        parts = Parts(
            codes=self._codes.T, scale_codes=self._scale_codes.T, zero_codes=self._zero_codes.T,
            second=self._second.transpose(1, 0, 2), outliers=outliers, order=self.order,
        )  # fmt: skip
        return spqr.pack(self.bits, parts)
