"""QuIP: turn weights and inputs until no direction stands out, then round with feedback.

Source: "QuIP: 2-Bit Quantization of Large Language Models With Guarantees" (Jerry Chee, 2023, arXiv 2307.13304),
algorithms 1 to 4; official code: github.com/Cornell-RelaxML/QuIP. As in "How Good Are Low-bit Quantized LLaMA3
Models?" (W. Huang, 2024, arXiv 2404.14047).

Idea: rounding hurts where a few weights are large or a few inputs matter most. Columns are scaled so that weights and
inputs share the spread, then both sides of the matrix are turned by random orthogonal matrices; what was in few
numbers is then in all. LDLQ, which is the compensated sweep, rounds the turned weights by the turned statistics;
activations are turned at run time and results are turned back.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.quip`.
Differs from the paper: columns go first to last, which is the paper's order with H reversed and after a random turn the
same; the scaling's factors are float16 and weights are scaled by those; turns as `formats.quip` has them.
Cost: cols^3 / 3 operations for each matrix' own factor, rows * cols^2 for the feedback and for each greedy pass;
resident beside weight and H, 12 cols^2 + 18 rows * cols bytes.
Holds when: two bits, where formats with scales per group have no room for outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.transforms import Turn
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.quip import GROUP, RANGE, QuipCodec

TRANSFORMS = ("orthogonal", "hadamard")
_LEAST_SHARE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Quip(WeightMethod):
    """turns: what turns are made of. spread: outer levels in root mean squares. greedy: passes over the columns after
    the sweep. seed: of the turns, the same for all matrices.
    """

    name: ClassVar[str] = "quip"
    needs_statistics: ClassVar[bool] = True
    default_bits: ClassVar[str] = "2"

    turns: str = "orthogonal"
    spread: float = RANGE
    greedy: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.turns not in TRANSFORMS:
            raise InputError(f"turns {self.turns!r}: choose one of {', '.join(TRANSFORMS)}")
        if not 0 < self.spread < 100:
            raise InputError(f"spread is {self.spread:g}; it must be positive, such as {RANGE}")
        if self.greedy < 0 or self.seed < 0:
            raise InputError("greedy and seed must be 0 or more")

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if bits not in range(2, 9):
            raise InputError(f"bits {bits:g}: quip takes whole bits, --bits 2, 3 or 4 (2 to 8)")
        return f"quip{int(bits)}" + ("-hadamard" if self.turns == "hadamard" else "")

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), QuipCodec):
            raise InputError(f"quip makes its own formats quip2 to quip8, not {spec}: give --bits 2")

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if not isinstance(form, QuipCodec):
            return kernels.encode(config.spec, weight)  # embedding and head keep more bits
        if statistics is None:
            statistics = Statistics.identity(weight.shape[1])
        if statistics.hessian.shape != (weight.shape[1], weight.shape[1]):
            raise InputError(f"statistics of {len(statistics.hessian)} inputs do not fit a matrix of {weight.shape[1]}")
        values = np.asarray(weight, np.float32)
        shrink = column_factors(values, statistics.hessian)
        scaled = shrink.astype(np.float32)
        rows, cols = (Turn(each) for each in form.turns(values.shape, self.seed))
        turned = rows.read(cols.read(values / scaled).T).T
        hessian = cols.read(cols.read(statistics.hessian * scaled * scaled[:, None]).T)
        columns = _Columns(form, turned, self.spread)
        factored = sweep.Factor.of(hessian, config.damping)
        sweep.sweep(turned, factored, columns)
        for _ in range(self.greedy):
            columns.improve(turned, hessian)
        return form.pack(columns.codes.T, shrink, columns.scale, self.seed)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return sweep.work_bytes(num_rows, num_columns) + 8 * num_columns**2 + 8 * num_rows * num_columns


def column_factors(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """What inputs are multiplied by, and weights divided: ((W^T W)_cc / H_cc)^(1/4), about one on average; float16."""
    inputs, weights = np.diagonal(hessian).astype(np.float64), np.square(weight, dtype=np.float64).sum(axis=0)
    inputs, weights = (np.maximum(each, _LEAST_SHARE * (each.mean() or 1.0)) for each in (inputs, weights))
    found = (weights / inputs) ** 0.25
    return np.asarray(found / np.exp(np.log(found).mean()), np.float16)


class _Columns(sweep.ColumnQuantizer):
    """Levels of one scale for the whole matrix."""

    group = GROUP

    def __init__(self, form: QuipCodec, turned: np.ndarray, spread: float) -> None:
        self._form = form
        self.scale = form.scale_of(turned, spread)
        self.codes = np.empty(turned.shape[::-1], np.uint8)

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        """Nothing is shared by a group."""

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        self.codes[column] = self._form.quantize(values, self.scale)
        return self._decoded(self.codes[column])

    def _decoded(self, codes: np.ndarray) -> np.ndarray:
        return np.asarray(np.float32(self.scale) * self._form.levels.decode(codes), np.float32)

    def improve(self, turned: np.ndarray, hessian: np.ndarray) -> None:
        """Each column in turn to what is best while all others stay; the error can only fall."""
        errors = turned - self._decoded(self.codes).T
        for column in range(len(self.codes)):
            weight = hessian[column, column]
            if weight <= 0:
                continue
            before = self._decoded(self.codes[column])
            self.codes[column] = self._form.quantize(before + errors @ hessian[:, column] / weight, self.scale)
            errors[:, column] += before - self._decoded(self.codes[column])

    def finish(self) -> Packed:
        """The codes so far; passes may follow."""
        return self._form.pack(self.codes.T, np.ones(len(self.codes), np.float16), self.scale, 0)
