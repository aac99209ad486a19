"""The best centroids for indices that stay as they are: least squares under the whole of H.

With indices fixed, weights are linear in the centroids: W' = sum of what their vectors fetch. So the output error
trace((W - W') H (W - W')^T) is a quadratic of all centroids together, of all codebooks and stages, and conjugate
gradients lower it. A row of vectors fetches the same entries for each of its rows, so the quadratic's matrix is one for
all coordinates of centroids: the sum over rows of vectors of A^T H A, A choosing an entry for each column. It is made
once, natively (`selection_gram`), where it is small beside the weights; a step then costs entries^2 * vector, where
without it (`_Plain`) a step is one product with H, and a sum of the result by index.

Source: centroid fine-tuning of "VPTQ" (Yifei Liu, 2024, arXiv 2409.17066), section 4.3, there by gradient steps; the
same look-up gradient is that of "eDKM" (Minsik Cho, 2023, arXiv 2309.00964).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from memwall import _native
from memwall.compress.base import Statistics
from memwall.compress.vector_columns import Books, VectorColumns
from memwall.formats.vector_parts import Part, checked_halves

Values = list[np.ndarray]
"""An array [books, count, vector] per stage, such as the centroids."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """One codebook array and where its centroids are fetched to."""

    part: Part
    books: np.ndarray
    """[rows of vectors or 1, columns]: codebook of each vector."""
    labels: np.ndarray
    """[rows of vectors, columns], within a codebook."""
    num_books: int
    count: int

    @property
    def slots(self) -> np.ndarray:
        """[rows of vectors, columns]: entries of all codebooks, numbered."""
        return np.asarray(self.books * self.count + self.labels)

    def fetched(self, books: np.ndarray, rows: int) -> np.ndarray:
        """books [books, count, vector] -> [rows, columns] float32."""
        found = books[self.books, self.labels]
        return found.transpose(0, 2, 1).reshape(len(self.labels) * self.part.vector, -1)[:rows]

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """The transposed map: [rows, columns] -> sums by centroid, float64 [books, count, vector]."""
        padded = np.zeros((len(self.labels) * self.part.vector, values.shape[1]), np.float32)
        padded[: len(values)] = values
        slots = self.slots.reshape(-1)
        sums = np.empty((self.part.vector, self.num_books * self.count))
        for lane in range(self.part.vector):
            sums[lane] = np.bincount(slots, padded[lane :: self.part.vector].reshape(-1), sums.shape[1])
        return sums.T.reshape(self.num_books, self.count, self.part.vector)


def fitted(
    columns: VectorColumns, ordered: np.ndarray, statistics: Statistics, order: np.ndarray, damping: float, steps: int
) -> tuple[list[Books | None], float]:
    """Codebooks of `columns` after at most `steps` of conjugate gradients, those it has where they lose less; and what
    is lost with them.

    ordered [rows, cols]: the weights as they are stored. The damped H is meant, as in the sweep: it keeps centroids
    that hardly any input reaches where they are.
    """
    stages, books = _stages(columns), _flat(columns.books)
    hessian = statistics.hessian[np.ix_(order, order)].astype(np.float32)
    hessian.reshape(-1)[:: len(hessian) + 1] += damping * float(hessian.diagonal().mean(dtype=np.float64)) or 1.0
    target = ordered
    if columns.norm is not None:  # in units of the codebooks
        scale, offset = columns.norm.astype(np.float32)
        target = (ordered - offset) / scale
        hessian *= scale * scale[:, None]
    plain = _Plain(stages, hessian, len(ordered))
    difference = target - plain.looked_up(books)
    product = difference @ hessian
    lost = float(np.einsum("ij,ij->", product, difference, dtype=np.float64))
    left = plain.gathered(product)
    del difference, product
    weights = np.broadcast_to(hessian.diagonal(), ordered.shape)
    shares = [np.maximum(each, 1e-30) for each in plain.gathered(weights)]
    times = _form(plain, hessian)
    found = [book.astype(np.float64) for book in books]
    _lower(found, [each.copy() for each in left], shares, times, steps)
    halves = [checked_halves(each, "a fitted centroid") for each in found]
    moved = [half.astype(np.float64) - book for half, book in zip(halves, books, strict=True)]
    # a quadratic: from what was lost, the slope there and the form alone
    now = lost - 2 * _dot(left, moved) + _dot(moved, times(moved))
    return (_unflat(columns.books, halves), now) if now < lost else (columns.books, lost)


def _lower(found: Values, left: Values, shares: Values, times: Callable[[Values], Values], steps: int) -> None:
    """Conjugate gradients on `found`, preconditioned by the diagonal `shares`; left: the slope at the start."""
    toward = [each / share for each, share in zip(left, shares, strict=True)]
    size = _dot(left, toward)
    least = 1e-12 * size  # products are float32: what is left below that is noise, which steps would blow up
    for _ in range(steps):
        if size <= least:
            break
        image = times(toward)
        length = size / max(_dot(toward, image), 1e-300)
        for index, (step, moved) in enumerate(zip(toward, image, strict=True)):
            found[index] += length * step
            left[index] -= length * moved
        scaled = [each / share for each, share in zip(left, shares, strict=True)]
        before, size = size, _dot(left, scaled)
        toward = [each + size / before * step for each, step in zip(scaled, toward, strict=True)]


@dataclass(frozen=True, slots=True)
class _Plain:
    """The form without its matrix."""

    stages: list[_Stage]
    hessian: np.ndarray
    rows: int

    def looked_up(self, values: Values) -> np.ndarray:
        """What vectors fetch, float32 [rows, columns]."""
        found = np.zeros((self.rows, len(self.hessian)), np.float32)
        for stage, book in zip(self.stages, values, strict=True):
            place = slice(stage.part.first, stage.part.first + stage.part.columns)
            found[:, place] += stage.fetched(book.astype(np.float32), self.rows)
        return found

    def gathered(self, values: np.ndarray) -> Values:
        """The transposed map."""
        return [s.gathered(values[:, s.part.first : s.part.first + s.part.columns]) for s in self.stages]

    def times(self, values: Values) -> Values:
        return self.gathered(self.looked_up(values) @ self.hessian)


def _form(plain: _Plain, hessian: np.ndarray) -> Callable[[Values], Values]:
    """The form with its matrix where that is no larger than what the weights would take, else without."""
    part, rows = plain.stages[0].part, plain.rows
    entries = sum(stage.part.groups * stage.count for stage in plain.stages)  # of a block of rows
    room = 16 * rows * len(hessian) + 4 * hessian.size  # what products with H held for every step
    if part.columns != len(hessian) or 4 * part.blocks(rows) * entries**2 > room:
        return plain.times
    return _Gram(plain.stages, hessian, rows).times


class _Gram:
    """The form by its matrix, one for each block of rows that has codebooks of its own. All columns are of one part.

    A last vector that ends past the last row has fewer coordinates than the others: it is multiplied apart.
    """

    def __init__(self, stages: list[_Stage], hessian: np.ndarray, rows: int) -> None:
        self._stages, self._hessian = stages, hessian
        part = stages[0].part
        self._groups, self._over = part.groups, rows % part.vector
        whole = rows // part.vector
        self._grams = []
        for block in range(part.blocks(rows)):
            lines = part.in_block(block, rows)
            lines = slice(lines.start, min(lines.stop, whole))
            first, slots = 0, []
            for stage in stages:
                own = stage.slots[lines] - block * part.groups * stage.count
                slots.append(own + first)
                first += part.groups * stage.count
            gram = np.empty((first, first), np.float32)
            _native.selection_gram(np.ascontiguousarray(slots, np.int32), hessian, gram)
            self._grams.append(gram)

    def times(self, values: Values) -> Values:
        found = [np.empty_like(each) for each in values]
        for block, gram in enumerate(self._grams):
            books = slice(block * self._groups, (block + 1) * self._groups)
            pieces = [each[books].reshape(-1, each.shape[2]) for each in values]
            product, first = gram @ np.concatenate(pieces).astype(np.float32), 0
            for each, piece in zip(found, pieces, strict=True):
                each[books] = product[first : first + len(piece)].reshape(each[books].shape)
                first += len(piece)
        if self._over:
            slots = [stage.slots[-1] for stage in self._stages]
            flat = [each.reshape(-1, each.shape[2])[:, : self._over] for each in values]
            image = self._hessian @ sum(each[slot] for each, slot in zip(flat, slots, strict=True))
            for each, slot in zip(found, slots, strict=True):
                np.add.at(each.reshape(-1, each.shape[2])[:, : self._over], slot, image)
        return found


def _dot(left: Values, right: Values) -> float:
    return float(sum(np.vdot(one, other) for one, other in zip(left, right, strict=True)))


def _stages(columns: VectorColumns) -> list[_Stage]:
    found = []
    for part, books, codes in zip(columns.parts, columns.books, columns.codes, strict=True):
        if part is None or books is None or codes is None:
            continue
        rows = columns.shape[0]
        numbers = part.book_of(rows), part.books(rows)
        low = (codes & np.uint32((1 << part.main_bits) - 1)).astype(np.int64)
        found.append(_Stage(part, numbers[0], low, numbers[1], 1 << part.main_bits))
        if books.residual is not None:
            high = (codes >> np.uint32(part.main_bits)).astype(np.int64)
            found.append(_Stage(part, numbers[0], high, numbers[1], 1 << part.residual_bits))
    return found


def _flat(books: list[Books | None]) -> Values:
    return [each for pair in books if pair is not None for each in (pair.main, pair.residual) if each is not None]


def _unflat(books: list[Books | None], values: Values) -> list[Books | None]:
    left = iter(values)
    return [
        None if pair is None else replace(
            pair, main=next(left), residual=None if pair.residual is None else next(left)
        )
        for pair in books
    ]  # fmt: skip
