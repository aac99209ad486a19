"""The room's seam: an index of vectors is asked with float32 queries and names the best, whatever it holds them as.

Ids are places, counted from 0 in the order in which vectors were given. A higher score is better; equal scores go by
id, so that one index always gives one answer.

Units and shapes: queries [q, d] float32; ids [q, top] int64, -1 where an index holds fewer vectors than were asked for;
scores [q, top] float32, -infinity there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """The best of each query, best first."""

    ids: np.ndarray
    scores: np.ndarray


class VectorIndex(ABC):
    """What can be searched."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Vectors held."""

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Of the vectors as they are given, d."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that a search of all vectors reads, tables included."""

    @abstractmethod
    def search(self, queries: np.ndarray, top: int) -> Hits:
        """The `top` best of each query; InputError for queries of another dimension or with NaN."""


class Best:
    """The best of what was seen so far, for indexes that score a piece of their vectors at a time."""

    def __init__(self, num_queries: int, top: int) -> None:
        if top < 1:
            raise InputError(f"top is {top}: ask for one vector at least")
        self.ids = np.full((num_queries, top), -1, np.int64)
        self.scores = np.full((num_queries, top), -np.inf, np.float32)

    def add(self, scores: np.ndarray, ids: np.ndarray) -> None:
        """scores [q, n] of the vectors `ids` [n], none of which was seen before."""
        top = self.ids.shape[1]
        for query, row in enumerate(scores):
            found = np.flatnonzero(row >= self.scores[query, -1])
            if len(found) > 4 * top:
                least = np.partition(row[found], -top)[-top]
                found = found[row[found] >= least]
            if not len(found):
                continue
            candidates = np.concatenate([self.scores[query], row[found]])
            names = np.concatenate([self.ids[query], ids[found]])
            order = np.lexsort((names, -candidates))[:top]
            self.scores[query], self.ids[query] = candidates[order], names[order]

    def hits(self) -> Hits:
        return Hits(ids=self.ids, scores=self.scores)


def checked_vectors(vectors: np.ndarray, dimensions: int | None, what: str, first: int = 0) -> np.ndarray:
    """[n, d] as float32; InputError for another shape, and for NaN and infinities. first: place of the first one."""
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise InputError(f"{what}: expected vectors [n, d], got shape {list(vectors.shape)}")
    if vectors.dtype.kind not in "fiu" and vectors.dtype.name != "bfloat16":
        raise InputError(f"{what}: expected real numbers, got an array of {vectors.dtype}")
    if dimensions is not None and vectors.shape[1] != dimensions:
        raise InputError(f"{what}: vectors have {vectors.shape[1]} dimensions; expected {dimensions}")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(vectors, np.float32)
    if not np.isfinite(found).all():
        place = first + int(np.argmin(np.isfinite(found).all(axis=1)))
        raise InputError(f"{what}: vector {place} has NaN or infinite numbers")
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d] divided by their lengths; vectors of zeros stay what they are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
