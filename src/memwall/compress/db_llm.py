"""DB-LLM: two-bit weights as two binary matrices whose scales are free, learned from the float model's predictions.

Source: "DB-LLM: Accurate Dual-Binarization for Efficient LLMs" (Hong Chen, 2024, arXiv 2402.11960), sections 3.2
(flexible dual binarization) and 3.3 (deviation-aware distillation), from the formulas of "How Good Are Low-bit
Quantized LLaMA3 Models?" (W. Huang, 2024, arXiv 2404.14047); no code is published.

Idea: w = a1 b1 + a2 b2 with b in {0, 1} keeps the shape of two-bit integers and lets both scales go where they lose
least. The scales then learn to predict as the float model does, on text that it has written itself; tokens at which it
is unsure count more, as those are where a two-bit model errs.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.db_llm` (`dual2-g128`).
Differs from the paper: bits and scales start from the compensated sweep instead of plain rounding, and training moves
the scales alone (`db_llm_tuning`): the paper also trains the weights straight through the rounding. The exponent of the
entropy and the schedule are not published; they are settings here.
Cost: that of GPTQ, and per group some 300 operations on rows x 128 numbers; tuning, some passes of the model in torch
over `tokens` of text, with both models in memory.
Holds when: two bits; with tuning, where text of the model's own making resembles what it will read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall import kernels
from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, Trained, WeightMethod
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.bitpack import TILE_ROWS, pack_tiles
from memwall.formats.db_llm import DualBinaryCodec, dual_scales, nearest

if TYPE_CHECKING:
    from memwall.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DbLlm(WeightMethod):
    """Scales and bits of every matrix by the sweep, then scales by training (see `db_llm_tuning.Recipe`).

    tokens: of text that the float model writes to train on, 0 for no training; passes over them; rate at first; gamma:
    how much tokens count at which the float model is unsure.
    """

    name: ClassVar[str] = "db-llm"
    needs_statistics: ClassVar[bool] = True
    default_bits: ClassVar[str] = "dual2-g128"

    tokens: int = 0
    passes: int = 4
    rate: float = 0.01
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for what in ("tokens", "passes", "rate", "gamma"):
            if not 0 <= getattr(self, what) < 1e12:
                raise InputError(f"{what} is {getattr(self, what):g}; it must be 0 or more")

    @property
    def trains(self) -> bool:
        return self.tokens > 0

    def train(
        self, checkpoint: Checkpoint, tokens: np.ndarray, made: Mapping[str, Packed], progress: Trained
    ) -> dict[str, Packed]:
        from memwall.compress.db_llm_tuning import Recipe, tune

        recipe = Recipe(tokens=self.tokens, passes=self.passes, rate=self.rate, gamma=self.gamma)
        return tune(checkpoint.directory, made, recipe, progress)

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if bits != 2:
            raise InputError(f"bits {bits:g}: db-llm makes 2-bit codes (2.25 bits with scales): --bits 2, or dual2-g64")
        return "dual2-g128"

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), DualBinaryCodec):
            raise InputError(f"db-llm makes its own formats such as dual2-g128, not {spec}: give --bits 2")

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if not isinstance(form, DualBinaryCodec):
            return kernels.encode(config.spec, weight)  # embedding and head keep more bits
        factored = sweep.factor_for(statistics, weight.shape[1], config.damping, config.activation_order)
        return sweep.sweep(weight, factored, _Columns(form, *weight.shape))

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return sweep.work_bytes(num_rows, num_columns) + num_rows * 128 * 24


class _Columns(sweep.ColumnQuantizer):
    """The nearest of a group's four levels."""

    foresees = True

    def __init__(self, form: DualBinaryCodec, rows: int, columns: int) -> None:
        self._form, self.group = form, form.group
        groups = form.num_groups(columns)
        self._codes = np.empty((columns, rows), np.uint8)
        self._scales = np.zeros((2, groups, rows), np.float32)

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        found = dual_scales(np.ascontiguousarray(columns.T))
        for scales, each in zip(self._scales, found, strict=True):
            scales[index] = self._form.store.rounded(each, self._form.spec)

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        first, second = self._scales[:, column // self.group]
        codes = self._codes[column] = nearest(values, first, second)
        return first * (codes & 1) + second * (codes >> 1)

    def finish(self) -> Packed:
        columns, rows = self._codes.shape
        groups = self._scales.shape[1]
        padded = np.zeros((-(-rows // TILE_ROWS) * TILE_ROWS, groups * self.group), np.uint8)
        padded[:rows, :columns] = self._codes.T
        buffers = {"codes": pack_tiles(padded, self._form.bits, self.group)}
        buffers |= self._form.scale_tiles((self._scales[0].T, self._scales[1].T))
        return Packed(spec=self._form.spec, shape=(rows, columns), buffers=buffers)
