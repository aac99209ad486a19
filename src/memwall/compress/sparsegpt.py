"""SparseGPT with MARLIN's rounding: two of every four weights pruned and the others rounded in one compensated sweep.

Source: "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models" (Elias Frantar, 2024,
arXiv 2408.11743), section 3.5 (Sparse-MARLIN); pruning is that of SparseGPT (Elias Frantar, 2023, arXiv 2301.00774).

Idea: see `pruning`. 4-bit codes and 2-bit positions of half of the weights are 3 bits per weight, so products that wait
for memory take three quarters of the time of dense 4-bit ones.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.sparse`.
Differs from the paper: see `pruning`; the clip search of MARLIN's own GPTQ (76 factors from 1 down to 0.25) is over
symmetric and asymmetric ranges alike.
Cost: that of GPTQ, a solve of 4 by 4 per four columns, and `shrinks` roundings of each group.
Holds when: half of the weights can be spared, which larger models bear better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.gptq import Gptq
from memwall.compress.pruning import SCORES, SparseColumns, fixed_mask
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec
from memwall.formats.sparse import DEFAULT_GROUP, SparseCodec

SHRINKS = 76
LEAST_SHRINK = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGpt(WeightMethod):
    """score: what makes a weight stay, see `pruning`. compensate: whether others make up for what is lost.

    shrinks: how many ranges are tried for a scale, from the full one down to a quarter; 1 for the full one alone.
    """

    name: ClassVar[str] = "sparsegpt"
    needs_statistics: ClassVar[bool] = True
    default_bits: ClassVar[str] = "4"

    score: str = "hessian"
    compensate: bool = True
    shrinks: int = SHRINKS

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise InputError(f"score {self.score!r}: choose one of {', '.join(SCORES)}")
        if not 1 <= self.shrinks <= 1000:
            raise InputError(f"shrinks is {self.shrinks}; it must be from 1 to 1000, such as {SHRINKS}")

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if bits != int(bits) or not 2 <= bits <= 8:
            raise InputError(f"bits {bits:g}: sparsegpt takes whole bits of a kept weight, 2 to 8, such as --bits 4")
        return f"sparse{int(bits)}-g{DEFAULT_GROUP}"

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), SparseCodec):
            raise InputError(f"sparsegpt makes formats such as sparse4-g128, not {spec}: give --bits 4")

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if not isinstance(form, SparseCodec):  # embedding and head are not pruned
            swept = isinstance(form, IntegerCodec) and statistics is not None
            return Gptq().compress(weight, statistics, config) if swept else kernels.encode(config.spec, weight)
        rows, columns = weight.shape
        known = statistics if self.compensate else None
        factored = sweep.factor_for(known, columns, config.damping, False)
        mask = fixed_mask(weight, statistics, self.score)
        tried = np.linspace(1, LEAST_SHRINK, self.shrinks) if self.shrinks > 1 else None
        return sweep.sweep(weight, factored, SparseColumns(form, rows, columns, mask, tried))

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        # masks and codes, and for packing codes and positions as numbers that index
        return sweep.work_bytes(num_rows, num_columns) + 12 * num_rows * num_columns
