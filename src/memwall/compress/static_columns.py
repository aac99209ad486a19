"""Columns of static formats for the compensated sweep: 8 bits, or 4 bits whose groups share what their row allows."""

from __future__ import annotations

import numpy as np

from memwall.compress.sweep import ColumnQuantizer
from memwall.formats import Packed
from memwall.formats.static8 import StaticCodec


class StaticColumns(ColumnQuantizer):
    """Row scales come from the weights as given; those of groups from the columns as they have become."""

    def __init__(self, coder: StaticCodec, weight: np.ndarray) -> None:
        num_rows, num_columns = weight.shape
        self.group = coder.group
        self._coder = coder
        self._channels = coder.fit_rows(weight)
        self._codes = np.empty((num_columns, num_rows), np.uint8)
        count = -(-num_columns // coder.group)
        self._groups = np.zeros((count, num_rows), np.float16) if coder.bits == 4 else None

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        if self._groups is not None:
            self._groups[index] = self._coder.fit_groups(columns.T, self._channels)

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        groups = None if self._groups is None else self._groups[column // self.group]
        codes = self._coder.quantize(values[:, None], self._channels, groups)
        self._codes[column] = codes[:, 0]
        rounded = self._coder.integers(codes, groups)[:, 0] * self._channels
        return np.asarray(rounded, np.float32)

    def finish(self) -> Packed:
        return self._coder.pack(np.ascontiguousarray(self._codes.T), self._channels, self._groups)
