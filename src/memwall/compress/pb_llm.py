"""PB-LLM: a tenth of the weights keep eight bits, all others one.

Source: "PB-LLM: Partially Binarized Large Language Models" (Yuzhang Shang, 2023, arXiv 2310.00034), sections 3.2 and
3.3; official code: github.com/hahnyuan/PB-LLM (gptq_pb). As in "How Good Are Low-bit Quantized LLaMA3 Models?" (W.
Huang, 2024, arXiv 2404.14047).

Idea: binary weights alone ruin a model, but most of the damage is done by few weights. In each block of 128 columns the
weights that would cost most, w^2 / U_jj^2, are rounded to 8 bits per row; the others become mean +- scale, with the
scale that is best for their signs, their mean size. Columns are rounded in turn and make up for those before them.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.sign_mask` (`pbllm-s{permille}`).
Differs from the paper: means and scales are over the weights that are binarized; `--set means=published` takes, as the
published code does, all columns with salient ones as zeros, `weighted` weighs columns by what their errors cost. Bits
are named as the paper counts, 8 * share + 1 - share: 1.7 has 10 % salient weights, 2 has 14.3 %.
True size: 2.25 + 8 * share, see the format. Its training (section 3.4) is not here.
Cost: that of GPTQ; resident as GPTQ and 2 bytes a weight.
Holds when: as GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.sign_mask import BLOCK, Bits, PbLlmCodec
from memwall.formats.sign_mask_fit import byte_codes, pb_block, row_steps

SCORES = ("hessian", "magnitude")
MEANS = ("counted", "published", "weighted")
WIDE_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PbLlm(WeightMethod):
    """score: what makes a weight salient, what it would cost or how large it is. means: see the module's text."""

    name: ClassVar[str] = "pb-llm"
    needs_statistics: ClassVar[bool] = True
    default_bits: ClassVar[str] = "1.7"

    score: str = "hessian"
    means: str = "counted"

    def __post_init__(self) -> None:
        for what, found, known in (("score", self.score, SCORES), ("means", self.means, MEANS)):
            if found not in known:
                raise InputError(f"{what} {found!r}: choose one of {', '.join(known)}")

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if not 1 <= bits <= WIDE_BITS:
            raise InputError(f"bits {bits:g}: pb-llm takes 1 to 8 bits as its paper counts, such as --bits 1.7")
        return f"pbllm-s{round(1000 * (bits - 1) / (WIDE_BITS - 1))}"

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), PbLlmCodec):
            raise InputError(f"pb-llm makes its own formats such as pbllm-s100, not {spec}: give --bits 1.7")

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if not isinstance(form, PbLlmCodec):
            return kernels.encode(config.spec, weight)  # embedding and head keep more bits
        factored = sweep.factor_for(statistics, weight.shape[1], config.damping, False)
        columns = _Columns(form, np.asarray(weight, np.float32), hessian=self.score == "hessian", means=self.means)
        return sweep.sweep(weight, factored, columns)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return sweep.work_bytes(num_rows, num_columns) + 6 * num_rows * num_columns


class _Columns(sweep.ColumnQuantizer):
    """One sign, or eight bits where the block's mask says so."""

    group = BLOCK
    foresees = True

    def __init__(self, form: PbLlmCodec, weight: np.ndarray, *, hessian: bool, means: str) -> None:
        rows, columns = weight.shape
        self._form, self._hessian, self._means = form, hessian, means
        self._steps = row_steps(weight)
        self._signs, self._masks = (np.empty((columns, rows), bool) for _ in range(2))
        self._codes = np.empty((columns, rows), np.uint8)
        self._params = np.empty((-(-columns // BLOCK), rows, 2), np.float32)

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        values = np.ascontiguousarray(columns.T)
        scores = np.square(values) * weights if self._hessian else np.abs(values)
        mask, self._params[index] = pb_block(self._form, values, scores, means=self._means, weights=weights)
        self._masks[index * BLOCK : index * BLOCK + len(columns)] = mask.T

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        mean, scale = self._params[column // BLOCK].T
        signs, mask = values >= mean, self._masks[column]
        codes = byte_codes(values[:, None], self._steps)[:, 0]
        self._signs[column], self._codes[column] = signs, codes
        step, zero = self._steps.T
        return np.where(mask, step * (codes.astype(np.float32) - zero), np.where(signs, mean + scale, mean - scale))

    def finish(self) -> Packed:
        bits = Bits(signs=self._signs.T, masks=self._masks.T, params=self._params.transpose(1, 0, 2))
        return self._form.pack(bits, self._codes.T, self._steps)
