"""Low-rank additions to products for a batch of several adapters, whose rows lie in pages of a shared pool.

y += scale * B (A x): x [tokens, in], A [rank, in], B [out, rank]. A row of A, or of B transposed, takes whole units of
`unit_bytes`; a page holds `units_per_block` units of every layer, and any page may hold any of them. Ranks differ from
adapter to adapter and nothing is padded to the largest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwall import _native
from memwall._native import LoraAdapter, Program

__all__ = ["TARGETS", "LoraBatch", "LoraRoom", "PagedLora", "linear_products"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections that an adapter may change; their places here are those of the native code."""
MOST_TOGETHER = 3
"""Projections of one input that are worked in one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRoom:
    """How pages are cut: a block of `units_per_block` units of `unit_bytes` for each layer, layers in a row."""

    num_layers: int
    unit_bytes: int
    units_per_block: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.num_layers * self.unit_bytes * self.units_per_block

    def row_units(self, width: int, itemsize: int) -> int:
        """Units of one row of `width` numbers."""
        return -(-width * itemsize // self.unit_bytes)

    def pages(self, units: int) -> int:
        """Pages that so many units of each layer take."""
        return -(-units // self.units_per_block)


def lora_table(room: LoraRoom, form: str, shapes: dict[str, tuple[int, int, int]]) -> tuple[np.ndarray, int]:
    """Where an adapter's parts lie among its units: int64 [targets, 4] of (rank, inputs, outputs, first unit), rows of
    A from there and those of B transposed behind them; and all its units. shapes: by target, (rank, inputs, outputs).
    """
    itemsize = 4 if form == "float32" else 2
    table, units = np.zeros((len(TARGETS), 4), np.int64), 0
    for name, (rank, inputs, outputs) in shapes.items():
        table[TARGETS.index(name)] = (rank, inputs, outputs, units)
        units += rank * (room.row_units(inputs, itemsize) + room.row_units(outputs, itemsize))
    return table, units


class PagedLora:
    """One adapter's shape, and where it lies. shapes: by target, (rank, inputs, outputs)."""

    def __init__(self, room: LoraRoom, form: str, scale: float, shapes: dict[str, tuple[int, int, int]]) -> None:
        self.room = room
        self.form = form
        table, self.units = lora_table(room, form, shapes)
        self.native: LoraAdapter = _native.lora_adapter(form, scale, table)
        self.row_bytes = 0
        """Held outside the pages, see `lengthen`."""

    @property
    def num_pages(self) -> int:
        """Pages it takes."""
        return self.room.pages(self.units)

    def place(self, pages: Sequence[int]) -> None:
        """The pages it lies in from now on."""
        self.native.set_pages(np.asarray(pages, np.int32))

    def lengthen(self, target: str, rows: np.ndarray) -> None:
        """Once all is added to an output y of `target`, it becomes y + rows[layer, 0] * y + rows[layer, 1] (DoRA).

        rows: float32 [layers, 2, outputs], copied.
        """
        self.native.set_rows(TARGETS.index(target), np.ascontiguousarray(rows, np.float32))
        self.row_bytes += rows.size * np.dtype(np.float32).itemsize

    def fetch(self, pool: np.ndarray, file: int, stored: str, offsets: np.ndarray) -> int:
        """Reads the tensors of an open file into the pages; bytes read. Other threads run meanwhile.

        pool: uint8 [pages, page bytes]. stored: the file's numbers; float32 may become float16. offsets: int64
        [layers, targets, 2], bytes where A and B begin, -1 for zeros. OSError when the file cannot be read.
        """
        room = self.room
        done = self.native.fetch(
            pool, room.num_layers, room.unit_bytes, room.units_per_block, file, stored, np.ascontiguousarray(offsets)
        )
        if done < 0:
            number = int(-1 - done)
            raise OSError(number or errno.EIO, os.strerror(number or errno.EIO))
        return int(done)


class LoraBatch:
    """Which rows of the batch at hand belong to which adapter, and the products with them.

    scratch: float32 [rows, 3 * largest rank]; rows are the most that one call works on.
    """

    def __init__(self, room: LoraRoom, scratch: np.ndarray) -> None:
        self.room = room
        self._native = _native.LoraBatch(scratch)
        self.lengthens = False
        """Whether products are to be complete before they are added to anything: an adapter at hand lengthens them."""

    @property
    def multiplies(self) -> int:
        """Multiplications done since the start: each row's own rank times widths, and nothing for padding."""
        return int(self._native.multiplies)

    @property
    def calls(self) -> int:
        """Calls that had something to add."""
        return int(self._native.calls)

    def assign(self, pool: np.ndarray, segments: Sequence[tuple[int, int, PagedLora]]) -> None:
        """Rows [first, first + count) of the next batches belong to an adapter; the others to none.

        pool: uint8 [pages, page bytes], all pages that are resident.
        """
        room = self.room
        found = [(first, count, adapter.native) for first, count, adapter in segments]
        self._native.assign(pool, room.num_layers, room.unit_bytes, room.units_per_block, found)
        self.lengthens = any(adapter.row_bytes > 0 for _, _, adapter in segments)

    def clear(self) -> None:
        """No row belongs to an adapter."""
        self._native.clear()
        self.lengthens = False

    def add(
        self, layer: int, first_row: int, x: np.ndarray, targets: Sequence[int], outs: Sequence[np.ndarray]
    ) -> None:
        """outs[i] [n, out] += what the adapters add for x [n, in]; x begins at row `first_row` of the batch.

        targets: places in `TARGETS`, at most three. All float32, C-contiguous.
        """
        _native.add_lora(self._native, layer, first_row, x, list(targets), outs)

    def record(
        self, program: Program, layer: int, x: np.ndarray, targets: Sequence[int], outs: Sequence[np.ndarray]
    ) -> None:
        """The same call kept in a program: it reads who is in the batch when it runs."""
        program.add_lora(self._native, layer, 0, x, list(targets), outs)


def linear_products() -> int:
    """Products with weight matrices since the process began."""
    return int(_native.linear_products())
