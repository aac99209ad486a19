"""Columns coded by vectors of rows: where the vectors of a part of a matrix lie, and what their codes stand for.

`formats.vptq` stores such parts; methods that learn codebooks work on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.formats.streams import stream_words

INDEX_TAIL, BOOK_TAIL = 16, 16
"""Words behind the indices and halves behind a codebook, which vectors read past the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some neighbouring places, in groups that have a codebook each, or one per group and `block` rows.

    block: rows that share codebooks, a multiple of `vector`; 0: all. Codebooks are numbered block by block.
    """

    first: int
    columns: int
    groups: int
    vector: int
    main_bits: int
    residual_bits: int
    block: int = 0

    @property
    def bits(self) -> int:
        """Of an index."""
        return self.main_bits + self.residual_bits

    def members(self, group: int) -> slice:
        """Places of a group."""
        begin, end = (self.first + each * self.columns // self.groups for each in (group, group + 1))
        return slice(begin, end)

    def vector_rows(self, num_rows: int) -> int:
        return -(-num_rows // self.vector)

    def blocks(self, num_rows: int) -> int:
        """Runs of rows that have codebooks of their own."""
        return -(-num_rows // self.block) if self.block else 1

    def books(self, num_rows: int) -> int:
        """Codebooks of a stage."""
        return self.blocks(num_rows) * self.groups

    def in_block(self, block: int, num_rows: int) -> slice:
        """Rows of vectors of a block."""
        each = self.block // self.vector
        return slice(block * each, (block + 1) * each) if self.block else slice(0, self.vector_rows(num_rows))

    def book_of(self, num_rows: int) -> np.ndarray:
        """The codebook of each vector, int64 [rows of vectors, columns], or [1, columns] where all rows share them."""
        sizes = [self.members(group).stop - self.members(group).start for group in range(self.groups)]
        group = np.repeat(np.arange(self.groups), sizes)[None]
        if not self.block:
            return group
        block = np.arange(self.vector_rows(num_rows)) // (self.block // self.vector)
        return np.asarray(block[:, None] * self.groups + group)

    @property
    def words(self) -> int:
        """32-bit words of a stream."""
        return stream_words(-(-self.columns // self.groups), self.bits)

    def stored_bits(self, num_rows: int) -> int:
        each = (1 << self.main_bits) + (1 << self.residual_bits if self.residual_bits else 0)
        numbers = self.books(num_rows) * self.vector * each
        tails = 32 * INDEX_TAIL + 16 * BOOK_TAIL * (2 if self.residual_bits else 1)
        return 32 * self.groups * self.vector_rows(num_rows) * self.words + 16 * numbers + tails


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A part's content. codes uint32 [rows of vectors, columns]; main, residual float16 [books, k, vector]."""

    codes: np.ndarray
    main: np.ndarray
    residual: np.ndarray | None = None


def checked_halves(values: np.ndarray, what: str) -> np.ndarray:
    """float16, without minus zero; InputError where numbers do not fit."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16) + np.float16(0)
    if not np.isfinite(halves).all():
        raise InputError(f"vptq: {what} is NaN, infinite or beyond float16 (65504); leave this matrix as it is")
    return halves


def vectors_of(part: Part, values: np.ndarray, group: int) -> np.ndarray:
    """Vectors [rows of vectors, columns of the group, vector] of values [rows, all places], zeros past the last row."""
    members = values[:, part.members(group)]
    short = part.vector_rows(len(members)) * part.vector - len(members)
    padded = np.concatenate([members, np.zeros((short, members.shape[1]), members.dtype)]) if short else members
    return padded.reshape(part.vector_rows(len(members)), part.vector, members.shape[1]).transpose(0, 2, 1)


def looked_up(part: Part, coded: Coded, rows: int) -> np.ndarray:
    """What a part's codes stand for, float32 [rows, columns]."""
    main, book = coded.main.astype(np.float32), part.book_of(rows)
    values = main[book, (coded.codes & np.uint32((1 << part.main_bits) - 1)).astype(np.int64)]
    if coded.residual is not None:
        values += coded.residual.astype(np.float32)[book, (coded.codes >> np.uint32(part.main_bits)).astype(np.int64)]
    return np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(len(values) * part.vector, part.columns)[:rows]
