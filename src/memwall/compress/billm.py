"""BiLLM: one bit a weight, two for the columns that matter, and bell-shaped weights split where that loses least.

Source: "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs" (Wei Huang, 2024, arXiv 2402.04291), section
3, algorithm 1; official code: github.com/Aaronhuang-778/BiLLM. As in "How Good Are Low-bit Quantized LLaMA3 Models?"
(W. Huang, 2024, arXiv 2404.14047).

Idea: in each block of 128 columns, those whose weights squared over U_jj^2 sum to most are binarized twice, the second
time what the first has left; how many (below 50) is searched. The other weights of a block look like a bell: they are
cut in a concentrated and a sparse set at the size, of 81 percentiles, that loses least, and each set has its own mean
and scale. What a block has lost is made up for by the columns after it.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.sign_mask` (`billm`).
Differs from the paper: columns are first put in the order of their inputs' sizes, as each one's place is stored anyway
(`--set order=identity`: not); later blocks take in the least that can be left of errors before them (`sweep`), which
the published code approximates; the searches look at no more than 512 rows; the split looks at |w| (`--set
split=scores`: at the score map, as the published code). `--set feedback=columns`, not in the paper, lets columns of a
block make up for one another too. True size: 2.9 bits, see the format.
Cost: that of GPTQ, and per block some 1,000 operations on 512 x 128 numbers; resident as GPTQ and 3 bytes a weight.
Holds when: rows are many beside 128 columns' parameters; below two bits, where rounding to levels collapses.
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
from memwall.formats.sign_mask import BLOCK, BillmCodec
from memwall.formats.sign_mask_fit import BillmBlock, billm_block, billm_pack, nearest_level

ORDERS = ("activation", "identity")
SPLITS = ("sizes", "scores")
FEEDBACKS = ("blocks", "columns")
NOMINAL_BITS = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Billm(WeightMethod):
    """order: of the columns before they are cut in blocks. split: what tells sparse weights from concentrated ones.
    feedback: who makes up for an error, the blocks after it or (not in the paper) the next columns already.
    """

    name: ClassVar[str] = "billm"
    needs_statistics: ClassVar[bool] = True
    default_bits: ClassVar[str] = "billm"

    order: str = "activation"
    split: str = "sizes"
    feedback: str = "blocks"

    def __post_init__(self) -> None:
        known_settings = (
            ("order", self.order, ORDERS), ("split", self.split, SPLITS), ("feedback", self.feedback, FEEDBACKS)
        )  # fmt: skip
        for what, found, known in known_settings:
            if found not in known:
                raise InputError(f"{what} {found!r}: choose one of {', '.join(known)}")

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if bits != NOMINAL_BITS:
            raise InputError(
                f"bits {bits:g}: billm makes 1.1 bits as its paper counts (2.9 with masks and scales): --bits 1.1"
            )
        return "billm"

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), BillmCodec):
            raise InputError(f"billm makes its own format, billm, not {spec}: leave --bits out")

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if not isinstance(form, BillmCodec):
            return kernels.encode(config.spec, weight)  # embedding and head keep more bits
        factored = sweep.factor_for(statistics, weight.shape[1], config.damping, self.order == "activation")
        columns = _Columns(form, factored.order, scores=self.split == "scores", inside=self.feedback == "columns")
        return sweep.sweep(np.asarray(weight[:, factored.order], np.float32), factored.arranged(), columns)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return sweep.work_bytes(num_rows, num_columns) + num_rows * (3 * num_columns + 24 * BLOCK)


class _Columns(sweep.ColumnQuantizer):
    """Blocks are worked whole when they are entered; `inside`: and each column then takes the nearest of its levels."""

    group = BLOCK
    foresees = True

    def __init__(self, form: BillmCodec, order: np.ndarray, *, scores: bool, inside: bool) -> None:
        self._form, self._order, self._scores, self.inside = form, order, scores, inside
        self._blocks: list[BillmBlock] = []
        self._decoded = np.empty(0, np.float32)
        self._places = np.empty(0, np.int64)

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        values = np.ascontiguousarray(columns.T)
        block = billm_block(values, weights, np.square(values) * weights if self._scores else None)
        self._decoded, block.values = block.values.T, np.empty(0, np.float32)
        self._places = np.argsort(block.order)
        self._blocks.append(block)

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        if not self.inside:
            return self._decoded[column % BLOCK]
        block, place = self._blocks[-1], self._places[column % BLOCK]
        code, decoded = nearest_level(values, block.params, salient=bool(place < block.num_salient))
        block.signs[:, place], block.masks[:, place] = code & 1, code >> 1
        return decoded

    def finish(self) -> Packed:
        return billm_pack(self._form, self._blocks, self._order)
