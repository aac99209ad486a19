"""GPTQ: round column by column, and let the columns still to come make up for the error.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Elias Frantar, 2022,
arXiv 2210.17323), sections 3 and 4, algorithm 1; official code: github.com/IST-DASLab/gptq. The equal form used here
is LDLQ of "QuIP" (Jerry Chee, 2023, arXiv 2307.13304), section 3.

Idea: rounding moves a layer's outputs. Inputs are correlated, so the same outputs can be had from other columns; each
column is rounded after it has taken in the errors of those before it, weighted by the Cholesky factor of H = X^T X.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of an integer codec; codes and scales are what is
swept, so what is stored is what was measured.
Differs from the paper: no inverse is formed (`sweep`); an input that never fires keeps its rounded weight instead of
zero. With activation order the groups stay neighbours and their scales come from the weights as given ("static groups"
of later code), unless the form has an order of columns (`ordered-int4-g64`, or the setting `act_order`): then columns
are stored as they are worked, and groups and their scales are those of the official code's `--act-order`.
Cost: cols^3 / 3 operations for the factor and rows * cols^2 for the feedback; resident beside weight and H,
max(12 cols^2, 4 cols^2 + 10 rows * cols) bytes (4 cols^2 instead of 12 above 4,096 columns).
Holds when: the calibration text has more tokens than the layer has inputs and resembles what the model will read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec
from memwall.formats.ordered import OrderedCodec

LEAST_SHRINK = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(WeightMethod):
    """The compensated sweep over integer columns.

    shrinks: how many ranges are tried for each scale, from the full one down to a quarter, by what errors cost: 76 are
    those of the GPTQ that comes with MARLIN (arXiv 2408.11743), with a damping of 0.1; 1 is the full range alone.
    act_order: columns are stored in the order in which they are rounded, those with the largest inputs first, so that
    groups are of columns that are alike in that; inputs are gathered at run time.
    """

    name: ClassVar[str] = "gptq"
    needs_statistics: ClassVar[bool] = True

    shrinks: int = 1
    act_order: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.shrinks <= 1000:
            raise InputError(f"shrinks is {self.shrinks}; it must be from 1 to 1000, such as 76")

    def form(self, bits: float | str) -> str | None:
        if not self.act_order:
            return codec(bits).spec if isinstance(bits, str) else None
        found = codec(bits) if isinstance(bits, str) else None
        if isinstance(found, IntegerCodec):
            found = OrderedCodec(inner=found)
        if not isinstance(found, OrderedCodec):
            raise InputError(f"bits {bits}: act_order makes one form of all matrices: give --bits int4 or int4-g128")
        return found.spec

    def check(self, spec: str) -> None:
        _integers(spec)

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        coder = _integers(config.spec)
        num_rows, num_columns = weight.shape
        if statistics is None:
            statistics = Statistics.identity(num_columns)
        if statistics.hessian.shape != (num_columns, num_columns):
            raise InputError(f"statistics of {len(statistics.hessian)} inputs do not fit a matrix of {num_columns}")
        tried = np.linspace(1, LEAST_SHRINK, self.shrinks) if self.shrinks > 1 else None
        columns = sweep.IntegerColumns(coder, num_rows, num_columns, tried)
        form = codec(config.spec)
        if not isinstance(form, OrderedCodec):
            return sweep.sweep(weight, statistics.factor(config.damping, config.activation_order), columns)
        factored = statistics.factor(config.damping, True)
        # taken by columns, as the sweep holds them: it makes no further copy
        ordered = np.take(np.asarray(weight, np.float32).T, factored.order, axis=0).T
        return form.around(sweep.sweep(ordered, factored.arranged(), columns), factored.order)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return sweep.work_bytes(num_rows, num_columns)


def _integers(spec: str) -> IntegerCodec:
    coder = codec(spec)
    if isinstance(coder, OrderedCodec):
        return coder.inner
    if not isinstance(coder, IntegerCodec):
        raise InputError(f"gptq makes integer formats such as int4-g64, not {spec}: add --method rtn")
    return coder
