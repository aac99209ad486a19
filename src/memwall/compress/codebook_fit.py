"""The best centroids for indices that stay as they are: least squares under the whole of H.

With indices fixed, weights are linear in the centroids: W' = sum of what their vectors fetch. So the output error
trace((W - W') H (W - W')^T) is a quadratic of all centroids together, of all codebooks and stages, and conjugate
gradients lower it without ever forming its matrix: a step is one product with H, and a sum of the result by index.

Source: centroid fine-tuning of "VPTQ" (Yifei Liu, 2024, arXiv 2409.17066), section 4.3, there by gradient steps; the
same look-up gradient is that of "eDKM" (Minsik Cho, 2023, arXiv 2309.00964).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from memwall.compress.base import Statistics
from memwall.compress.vector_columns import Books, VectorColumns
from memwall.formats.vector_parts import Part, checked_halves


@dataclass(frozen=True, slots=True)
class _Stage:
    """One codebook array and where its centroids are fetched to."""

    part: Part
    groups: np.ndarray
    """[columns]: group of each place of the part."""
    labels: np.ndarray
    """[rows of vectors, columns], within a group's codebook."""
    count: int

    def fetched(self, books: np.ndarray, rows: int) -> np.ndarray:
        """books [groups, count, vector] -> [rows, columns] float32."""
        found = books[self.groups, self.labels]
        return found.transpose(0, 2, 1).reshape(len(self.labels) * self.part.vector, -1)[:rows]

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """The transposed map: [rows, columns] -> sums by centroid, float64 [groups, count, vector]."""
        padded = np.zeros((len(self.labels) * self.part.vector, values.shape[1]), np.float32)
        padded[: len(values)] = values
        slots = (self.groups * self.count + self.labels).reshape(-1)
        sums = np.empty((self.part.vector, self.part.groups * self.count))
        for lane in range(self.part.vector):
            sums[lane] = np.bincount(slots, padded[lane :: self.part.vector].reshape(-1), sums.shape[1])
        return sums.T.reshape(self.part.groups, self.count, self.part.vector)


def fitted(
    columns: VectorColumns, ordered: np.ndarray, statistics: Statistics, order: np.ndarray, damping: float, steps: int
) -> list[Books | None]:
    """Codebooks of `columns` after at most `steps` of conjugate gradients; those it has where they lose less.

    ordered [rows, cols]: the weights as they are stored. The damped H is meant, as in the sweep: it keeps centroids
    that hardly any input reaches where they are.
    """
    stages, books = _stages(columns), _flat(columns.books)
    hessian = statistics.hessian[np.ix_(order, order)].astype(np.float32)
    hessian.reshape(-1)[:: len(hessian) + 1] += damping * float(hessian.diagonal().mean(dtype=np.float64)) or 1.0
    scale = None if columns.norm is None else columns.norm.astype(np.float32)
    target = ordered if scale is None else ordered - scale[1]

    def looked_up(values: list[np.ndarray]) -> np.ndarray:
        found = np.zeros(ordered.shape, np.float32)
        for stage, book in zip(stages, values, strict=True):
            place = slice(stage.part.first, stage.part.first + stage.part.columns)
            found[:, place] += stage.fetched(book.astype(np.float32), len(ordered))
        return found if scale is None else found * scale[0]

    def gathered(values: np.ndarray) -> list[np.ndarray]:
        if scale is not None:
            values = values * scale[0]
        return [s.gathered(values[:, s.part.first : s.part.first + s.part.columns]) for s in stages]

    def loss(values: list[np.ndarray]) -> float:
        difference = target - looked_up(values)
        return float(np.einsum("ij,ij->", difference @ hessian, difference, dtype=np.float64))

    weights = hessian.diagonal() if scale is None else hessian.diagonal() * np.square(scale[0])
    shares = [
        np.maximum(s.gathered(np.broadcast_to(weights[s.part.first : s.part.first + s.part.columns],
                                              (len(ordered), s.part.columns))), 1e-30)
        for s in stages
    ]  # fmt: skip
    left = gathered((target - looked_up(books)) @ hessian)
    found = [book.astype(np.float64) for book in books]
    toward = [each / share for each, share in zip(left, shares, strict=True)]
    size = _dot(left, toward)
    least = 1e-12 * size  # products are float32: what is left below that is noise, which steps would blow up
    for _ in range(steps):
        if size <= least:
            break
        image = gathered(looked_up(toward) @ hessian)
        length = size / max(_dot(toward, image), 1e-300)
        for index, (step, moved) in enumerate(zip(toward, image, strict=True)):
            found[index] += length * step
            left[index] = left[index] - length * moved
        scaled = [each / share for each, share in zip(left, shares, strict=True)]
        before, size = size, _dot(left, scaled)
        toward = [each + size / before * step for each, step in zip(scaled, toward, strict=True)]
    halves = [checked_halves(each, "a fitted centroid") for each in found]
    return _unflat(columns.books, halves) if loss(halves) < loss(books) else columns.books


def _dot(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return float(sum(np.vdot(one, other) for one, other in zip(left, right, strict=True)))


def _stages(columns: VectorColumns) -> list[_Stage]:
    found = []
    for part, books, codes in zip(columns.parts, columns.books, columns.codes, strict=True):
        if part is None or books is None or codes is None:
            continue
        sizes = [part.members(group).stop - part.members(group).start for group in range(part.groups)]
        groups = np.repeat(np.arange(part.groups), sizes)
        low = (codes & np.uint32((1 << part.main_bits) - 1)).astype(np.int64)
        found.append(_Stage(part, groups, low, 1 << part.main_bits))
        if books.residual is not None:
            high = (codes >> np.uint32(part.main_bits)).astype(np.int64)
            found.append(_Stage(part, groups, high, 1 << part.residual_bits))
    return found


def _flat(books: list[Books | None]) -> list[np.ndarray]:
    return [each for pair in books if pair is not None for each in (pair.main, pair.residual) if each is not None]


def _unflat(books: list[Books | None], values: list[np.ndarray]) -> list[Books | None]:
    left = iter(values)
    return [
        None if pair is None else replace(
            pair, main=next(left), residual=None if pair.residual is None else next(left)
        )
        for pair in books
    ]  # fmt: skip
