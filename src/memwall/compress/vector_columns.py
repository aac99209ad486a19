"""Columns that are coded vector by vector, for the compensated sweep; and what their codebooks are learned from.

A vector is some consecutive rows of one column, so the sweep may go on column by column: each is rounded to the nearest
centroids after it took in the errors of all before it. (Inside a column an error costs the same in every row, so the
nearest in plain distance is the best.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwall.compress.kmeans import quick_kmeans, sample
from memwall.compress.sweep import ColumnQuantizer
from memwall.formats import Packed
from memwall.formats.vector_parts import Coded, Part, checked_halves, vectors_of
from memwall.formats.vptq import VptqCodec, pack
from memwall.kernels.nearest import Nearest

# more points per centroid hardly change it; they would only take longer
POINTS_PER_CENTROID = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How codebooks are learned: see `kmeans`."""

    init: str = "sampled"
    iterations: int = 100
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """Codebooks of one part, float16 [books, k, vector]; a residual one where there are two stages."""

    main: np.ndarray
    residual: np.ndarray | None = None


def learned(part: Part, values: np.ndarray, weights: np.ndarray, bits: int, training: Training) -> np.ndarray:
    """All codebooks, float16 [books, 2^bits, vector], from values [rows, places] by weighted k-means.

    weights [places]: what a squared error in each place costs.
    """
    books = np.zeros((part.books(len(values)), 1 << bits, part.vector), np.float16)
    for book in range(len(books)):
        block, group = divmod(book, part.groups)
        vectors = vectors_of(part, values, group)[part.in_block(block, len(values))]
        points = vectors.reshape(-1, part.vector)
        if not len(points):
            continue
        costs = np.broadcast_to(weights[part.members(group)], vectors.shape[:2]).reshape(-1)
        taken = sample(len(points), POINTS_PER_CENTROID << bits, training.seed)
        found = quick_kmeans(
            points[taken],
            1 << bits,
            weights=costs[taken],
            init=training.init,
            iterations=training.iterations,
            seed=training.seed + book,
        )
        books[book] = checked_halves(found.centroids, "a centroid")
    return books


class VectorColumns(ColumnQuantizer):
    """Columns of a layout with given codebooks, already in the order that they are stored in.

    books: of the outlier columns (None without) and of the rest. norm: scale and offset by place, float16 [2, cols].
    left: what a first stage leaves of each value as it was when it was rounded, [rows, cols] in units of the codebooks,
    kept where `keep_left`.
    """

    group = 128  # columns whose errors are handed on together

    def __init__(
        self,
        form: VptqCodec,
        shape: tuple[int, int],
        books: Sequence[Books | None],
        *,
        order: np.ndarray | None = None,
        norm: np.ndarray | None = None,
        keep_left: bool = False,
    ) -> None:
        self.form, self.shape = form, shape
        self.order, self.norm = order, norm
        self.books = list(books)
        self.parts = form.parts(shape[1])
        self.codes = [
            None if part is None else np.zeros((part.vector_rows(shape[0]), part.columns), np.uint32)
            for part in self.parts
        ]
        self.left = np.zeros(shape, np.float32) if keep_left else None
        self._scales = None if norm is None else norm.astype(np.float32)
        self._near: dict[tuple[int, int, bool], Nearest] = {}

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        """Codebooks are learned before the sweep."""

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        index = 0 if self.parts[0] is not None and column < self.parts[0].columns else 1
        part, books, codes = self.parts[index], self.books[index], self.codes[index]
        assert part is not None
        assert books is not None
        assert codes is not None
        # members of a group are [group * columns // groups, ...): this is the one that holds the place
        place = column - part.first
        group = ((place + 1) * part.groups - 1) // part.columns
        if self._scales is not None:
            values = (values - self._scales[1, column]) / self._scales[0, column]
        vectors = np.zeros((len(codes), part.vector), np.float32)
        vectors.reshape(-1)[: len(values)] = values
        found = np.empty_like(vectors)
        for block in range(part.blocks(len(values))):
            rows = part.in_block(block, len(values))
            book, wanted = block * part.groups + group, vectors[rows]
            labels = self._nearest(index, book, books.main).labels(wanted)
            found[rows] = books.main[book, labels]
            codes[rows, place] = labels
            if books.residual is not None:
                labels = self._nearest(index, book, books.residual, residual=True).labels(wanted - found[rows])
                found[rows] += books.residual[book, labels].astype(np.float32)
                codes[rows, place] |= labels.astype(np.uint32) << np.uint32(part.main_bits)
        decoded = found.reshape(-1)[: len(values)]
        if self.left is not None:
            self.left[:, column] = values - decoded
        if self._scales is not None:
            decoded = decoded * self._scales[0, column] + self._scales[1, column]
        return decoded

    def _nearest(self, index: int, book: int, books: np.ndarray, *, residual: bool = False) -> Nearest:
        key = (index, book, residual)
        if key not in self._near:
            self._near[key] = Nearest(books[book].astype(np.float32))
        return self._near[key]

    def coded(self) -> list[Coded | None]:
        """Codes and codebooks of both parts."""
        return [
            None if codes is None or books is None else Coded(codes=codes, main=books.main, residual=books.residual)
            for codes, books in zip(self.codes, self.books, strict=True)
        ]

    def finish(self) -> Packed:
        outliers, rest = self.coded()
        assert rest is not None
        return pack(self.form, self.shape, rest, outliers=outliers, order=self.order, norm=self.norm)
