"""Pruning to two of every four weights inside the compensated sweep: which stay, and what the others become.

Sources: "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (Elias Frantar, 2023, arXiv
2301.00774), sections 3.3 (masks chosen as the sweep goes), 3.4 (n:m) and 3.5 (joint with quantization); official code:
github.com/IST-DASLab/sparsegpt. "A Simple and Effective Pruning Approach for Large Language Models" (Mingjie Sun, 2023,
arXiv 2306.11695), section 3: Wanda. "MARLIN" (Elias Frantar, 2024, arXiv 2408.11743), section 3.5.

Idea: removing a weight costs w^2 / U_jj^2 of a layer's squared error when all weights still to come make up for it, so
of every four neighbours the two of least cost go. Costs are those of the weights at that moment, after they took in the
errors of all before them; what stays is rounded at once, so that rounding and pruning are made up for together.

Units and shapes: columns [cols, rows] as the sweep hands them; masks bool [cols, rows].
Differs from the papers: SparseGPT prunes the whole matrix and then quantizes by the dense weights' ranges; here scales
come from the weights that are expected to stay, by masks that are foreseen when a group is entered.
"""

from __future__ import annotations

import numpy as np

from memwall.compress import sweep
from memwall.compress.base import Statistics
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.sparse import OF, Kept, SparseCodec, gather_kept, largest_pairs, positions_of

SCORES = ("hessian", "wanda", "magnitude")
DEFAULT_GROUP = 128


def fixed_mask(weight: np.ndarray, statistics: Statistics | None, score: str) -> np.ndarray | None:
    """Mask [cols, rows] of weight [rows, cols] for scores that are known beforehand; None for `hessian`, which is not.

    wanda: |w| times the norm of the weight's input over the calibration text; magnitude: |w|.
    """
    if score not in SCORES:
        raise InputError(f"score {score!r}: choose one of {', '.join(SCORES)}")
    if score == "hessian":
        return None
    scores = np.abs(np.asarray(weight, np.float32))
    if score == "wanda" and statistics is not None:
        scores *= np.sqrt(np.diagonal(statistics.hessian))
    return np.ascontiguousarray(largest_pairs(scores).T)


class PruningColumns(sweep.ColumnQuantizer):
    """Keeps two of every four weights as they are: what a matrix pruned in floats becomes.

    mask [cols, rows]: which stay, where that is known beforehand.
    """

    foresees = True
    span = OF

    def __init__(self, num_rows: int, num_columns: int, mask: np.ndarray | None = None, group: int = DEFAULT_GROUP):
        self.group = group
        self._chooses = mask is None
        self.mask = np.zeros((num_columns, num_rows), bool) if mask is None else mask
        if self.mask.shape != (num_columns, num_rows):
            raise InputError(f"a mask {list(self.mask.shape)} does not fit {[num_columns, num_rows]} columns and rows")
        self._values: np.ndarray | None = None

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        pass

    def expected_mask(self, index: int, columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Mask [rows, at most group] that a group is expected to get when it is entered."""
        first = index * self.group
        if not self._chooses:
            return self.mask[first : first + len(columns)].T
        return largest_pairs(np.square(columns.T) * weights)

    def enter_span(self, first: int, columns: np.ndarray, weights: np.ndarray) -> None:
        if self._chooses:
            self.mask[first : first + len(columns)] = largest_pairs(np.square(columns.T) * weights).T

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        if self._values is None:
            self._values = np.zeros(self.mask.shape, np.float32)
        self._values[column] = np.where(self.mask[column], values, np.float32(0))
        return self._values[column]

    def finish(self) -> Packed:
        """float32, zeros where pruned."""
        values = np.zeros(self.mask.shape, np.float32) if self._values is None else self._values
        return codec("float32").encode(np.ascontiguousarray(values.T))


class SparseColumns(PruningColumns):
    """Keeps two of every four weights as codes of `form`.

    shrinks [n]: factors of a group's range that are tried when its scale is found, by what errors cost; the range alone
    where None.
    """

    def __init__(
        self,
        form: SparseCodec,
        num_rows: int,
        num_columns: int,
        mask: np.ndarray | None = None,
        shrinks: np.ndarray | None = None,
    ) -> None:
        super().__init__(num_rows, num_columns, mask, form.group)
        self.form, self._shrinks = form, shrinks
        groups = form.num_groups(num_columns)
        self._codes = np.full(self.mask.shape, form.zero_code, np.uint8)
        self._scales = np.zeros((groups, num_rows), np.float16)
        self._zeros = np.full((groups, num_rows), form.zero_code, np.uint8)

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        kept = np.where(self.expected_mask(index, columns, weights), columns.T, np.float32(0))
        self._scales[index], self._zeros[index] = self.form.fit(kept, weights, self._shrinks)

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        scales, zeros = self._scales[column // self.group], self._zeros[column // self.group]
        codes = self.form.quantize(values[:, None], scales, zeros)[:, 0]
        self._codes[column] = codes = np.where(self.mask[column], codes, zeros)
        return self.form.dequantize(codes[:, None], scales, zeros)[:, 0]

    def finish(self) -> Packed:
        positions = positions_of(self.mask.T)
        parts = Kept(
            codes=gather_kept(np.ascontiguousarray(self._codes.T), positions),
            positions=positions,
            scales=self._scales.T,
            zeros=None if self.form.symmetric else self._zeros.T,
        )
        if len(self.mask) % OF:
            self._pad(parts)
        return self.form.pack(parts, len(self.mask))

    def _pad(self, parts: Kept) -> None:
        """What the last four lacks reads as zero."""
        past = parts.positions[:, -2:] >= len(self.mask) % OF
        parts.codes[:, -2:] = np.where(past, self._zeros[-1][:, None], parts.codes[:, -2:])
