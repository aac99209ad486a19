"""Vectors in few bytes: fewer dimensions first, fewer bits of each second, and the best such form for a capacity.

Source: Optimization of embeddings storage for RAG systems using quantization and dimensionality reduction techniques,
2025, arXiv 2505.00105; code: github.com/Napuh/rag-embedding-storage-optimization.

Idea: a map from d to m dimensions is learned once, on one set of vectors, and applied to all others, queries too; what
comes out is rounded element by element, and scored by cosine of the rounded numbers. Every pair of a map and an element
type is a point of bytes against quality; of those that no other beats in both, the best that fits is taken.

Units and shapes: vectors [n, d] float32, reduced [n, m]; m = round(d * fraction). Bytes of a vector: m * bits / 8,
the last byte filled up, and 2 for a scale where there is one. Tables (mean and map, least and largest) are counted
apart: they do not grow with n.

Differs from the paper: vectors are stored, and scored as they are stored, in chunks of which no float32 copy is made;
the paper's code casts them back. The paper's integers are `int8-paper`; `int8` is clipped, rounded and mapped back.
4-bit floats have forms with a scale, without which most numbers of vectors of length 1 become zero. With the metric
`inner` reduced vectors are brought to length 1 again before they are rounded, as reducing shortens them.

Cost: n * bytes of a vector, and d * m * 4 for a linear map; a search reads all of it once.

Holds when: the vectors to be stored resemble those that the map was learned from, as far as its directions go.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import format_bytes
from memwall.retrieve.base import Best, Hits, VectorIndex, checked_vectors, unit
from memwall.retrieve.reducers import MOST_FITTED, REDUCERS, SEED, Reducer, sample
from memwall.retrieve.vector_codecs import VectorCodec, vector_codec

Metric = Literal["cosine", "inner"]
Progress = Callable[[int, int], None]
ENCODED_AT_ONCE = 8192
_SCORES_AT_ONCE = 1 << 20
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What becomes of a vector. kind: of `REDUCERS`, None for all dimensions; size: a fraction of d, or a count."""

    codec: str = "e4m3"
    kind: str | None = None
    size: float | int = 1.0

    @classmethod
    def parse(cls, text: str) -> Form:
        """`e4m3`, `pca:0.5+e4m3`, `pca:192+int8`; InputError for what is none."""
        reduce, _, name = text.strip().rpartition("+")
        return cls.of(name, reduce)

    @classmethod
    def of(cls, codec: str, reduce: str = "") -> Form:
        """The same of two texts; reduce: `pca:0.5`, or nothing."""
        vector_codec(codec)
        if reduce in ("", "none"):
            return cls(codec=codec)
        kind, _, size = reduce.partition(":")
        if kind not in REDUCERS:
            raise InputError(
                f"no reduction {kind!r}; there are {', '.join(REDUCERS)}, each with a size such as pca:0.5"
            )
        if re.fullmatch(r"0?\.[0-9]{1,6}|1\.0*", size) and float(size) > 0:
            return cls(codec=codec, kind=kind, size=float(size))
        if re.fullmatch(r"[1-9][0-9]{0,6}", size):
            return cls(codec=codec, kind=kind, size=int(size))
        raise InputError(f"{reduce}: write a fraction of the dimensions, {kind}:0.5, or how many, {kind}:192")

    def __str__(self) -> str:
        return self.codec if self.kind is None else f"{self.kind}:{self.size}+{self.codec}"

    def reduced(self, d: int) -> int:
        """m."""
        m = d if self.kind is None else self.size if isinstance(self.size, int) else round(d * self.size)
        if not 1 <= m <= d:
            raise InputError(f"{self}: {m} of {d} dimensions; at least 1 and at most {d} can be kept")
        return int(m)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Which vectors the map and the ranges were learned from."""

    name: str
    count: int
    sha256: str
    seed: int = SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A form with all it has learned. reducer: None where all dimensions stay. fitted_on: None where nothing is."""

    form: Form
    d: int
    metric: Metric = "cosine"
    reducer: Reducer | None = None
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    fitted_on: Provenance | None = None

    @classmethod
    def fit(
        cls,
        form: Form,
        x: np.ndarray,
        *,
        name: str,
        metric: Metric = "cosine",
        seed: int = SEED,
        reducer: Reducer | None = None,
    ) -> Fitted:
        """Learned from x, [n, d], of which `MOST_FITTED` at most are looked at. name: what x is, for the header.
        reducer: the form's, where it was learned from x before.
        """
        if metric == "inner" and vector_codec(form.codec).only_cosine:
            raise InputError(
                f"{form.codec} stores no numbers of which inner products mean anything; take --metric cosine"
            )
        x = checked_vectors(sample(x, MOST_FITTED, seed), None, name)
        m, one = form.reduced(x.shape[1]), vector_codec(form.codec)
        reducer = None if form.kind is None else reducer or _fit(form, x, m, seed)
        bare = cls(form=form, d=x.shape[1], metric=metric, reducer=reducer)
        if reducer is None and not one.fitted:
            return bare
        if not len(x):
            raise InputError(f"{form} learns from vectors, and {name} has none")
        tables = one.tables(bare.reduce(x)) if one.fitted else {}
        told = Provenance(name=name, count=len(x), sha256=hashlib.sha256(x.tobytes()).hexdigest(), seed=seed)
        return cls(form=form, d=x.shape[1], metric=metric, reducer=reducer, tables=tables, fitted_on=told)

    @property
    def codec(self) -> VectorCodec:
        return vector_codec(self.form.codec)

    @property
    def m(self) -> int:
        return self.form.reduced(self.d)

    @property
    def vector_bytes(self) -> int:
        """Of one vector."""
        return self.codec.vector_bytes(self.m)

    @property
    def table_bytes(self) -> int:
        """Of all vectors together."""
        return (self.reducer.nbytes if self.reducer else 0) + sum(table.nbytes for table in self.tables.values())

    @property
    def ratio(self) -> float:
        """How many times smaller than float32, tables apart."""
        return self.d * np.dtype(np.float32).itemsize / self.vector_bytes

    def reduce(self, x: np.ndarray) -> np.ndarray:
        """float32 [n, d] -> [n, m], of length 1 where inner products are to stand for cosines."""
        z = x if self.reducer is None else self.reducer.apply(x)
        return unit(z) if self.metric == "inner" else z

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [n, d] -> what is stored."""
        return self.codec.encode(self.reduce(x), self.tables)

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """What is stored -> float32 [n, m]."""
        return self.codec.decode(stored, self.m, self.tables)

    def queries(self, x: np.ndarray) -> np.ndarray:
        """Queries as vectors are scored with: reduced, rounded as vectors are, and of length 1."""
        return unit(self.decode(self.encode(checked_vectors(x, self.d, "queries"))))


def _fit(form: Form, x: np.ndarray, m: int, seed: int) -> Reducer:
    if form.kind in ("pca", "kernel-pca") and len(x) < 2:
        raise InputError(f"{form} learns directions from vectors; {len(x)} are too few")
    assert form.kind is not None
    return REDUCERS[form.kind].fit(x, m, seed)


class StoredVectors(VectorIndex):
    """Vectors in a form, searched exactly: every one is scored as it is stored."""

    def __init__(self, fitted: Fitted, stored: Mapping[str, np.ndarray]) -> None:
        """stored: what `fitted.encode` gave, or the same from a file."""
        self.fitted, self.stored = fitted, stored

    @classmethod
    def of(cls, fitted: Fitted, x: np.ndarray) -> StoredVectors:
        """Vectors [n, d], in memory."""
        parts = [fitted.encode(part) for _, part in pieces(fitted, x)] or [
            fitted.encode(np.zeros((0, fitted.d), np.float32))
        ]
        return cls(fitted, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    @property
    def count(self) -> int:
        return len(self.stored["rows"])

    @property
    def dimensions(self) -> int:
        return self.fitted.d

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.stored.values()) + self.fitted.table_bytes

    def zero_share(self, most: int = ENCODED_AT_ONCE) -> float:
        """Share of numbers that are stored as zero, in the first so many vectors."""
        held = self.fitted.decode({name: array[:most] for name, array in self.stored.items()})
        return float((held == 0).mean()) if held.size else 0.0

    def search(self, queries: np.ndarray, top: int, progress: Progress | None = None) -> Hits:
        asked = self.fitted.queries(queries)
        found = [self._search(asked[at : at + _QUERIES_AT_ONCE], top, progress)
                 for at in range(0, max(len(asked), 1), _QUERIES_AT_ONCE)]  # fmt: skip
        return Hits(
            ids=np.concatenate([one.ids for one in found]), scores=np.concatenate([one.scores for one in found])
        )

    def _search(self, asked: np.ndarray, top: int, progress: Progress | None) -> Hits:
        best, fitted = Best(len(asked), top), self.fitted
        step = max(_SCORES_AT_ONCE // max(len(asked), 1), 1024)
        for start in range(0, self.count, step):
            part = {name: array[start : start + step] for name, array in self.stored.items()}
            scores = fitted.codec.scores(part, fitted.m, fitted.tables, asked, cosine=fitted.metric == "cosine")
            best.add(scores, np.arange(start, start + scores.shape[1]))
            if progress is not None:
                progress(min(start + step, self.count), self.count)
        return best.hits()


def pieces(fitted: Fitted, x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first vector, float32 vectors) in order, checked, as many as are encoded at once."""
    for start in range(0, len(x), ENCODED_AT_ONCE):
        yield start, checked_vectors(x[start : start + ENCODED_AT_ONCE], fitted.d, "vectors", start)


# ---- the choice ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measured form. quality: such as the mean nDCG@10; table_bytes: beside the vectors, whatever their number."""

    form: str
    vector_bytes: float
    quality: float
    table_bytes: int = 0

    def total_bytes(self, n_vectors: int) -> float:
        return n_vectors * self.vector_bytes + self.table_bytes


def frontier(points: Sequence[Point], n_vectors: int | None = None, *, convex: bool = False) -> list[Point]:
    """Points that no other beats in bytes and quality, fewest bytes first.

    n_vectors: count tables too, as so many vectors share them; None: bytes of a vector alone. convex: only those on the
    upper left hull, which mixtures of two others do not beat either.
    """
    size = {id(one): one.vector_bytes if n_vectors is None else one.total_bytes(n_vectors) for one in points}
    kept: list[Point] = []
    for one in sorted(points, key=lambda one: (size[id(one)], -one.quality, one.form)):
        if kept and one.quality <= kept[-1].quality:
            continue
        while convex and len(kept) > 1 and _below(kept[-2], kept[-1], one, size):
            kept.pop()
        kept.append(one)
    return kept


def _below(first: Point, middle: Point, last: Point, size: Mapping[int, float]) -> bool:
    """Whether the middle one lies on the line between the others or under it."""
    width, part = size[id(last)] - size[id(first)], size[id(middle)] - size[id(first)]
    return (middle.quality - first.quality) * width <= (last.quality - first.quality) * part


def choose(capacity_bytes: int, n_vectors: int, points: Sequence[Point]) -> Point:
    """The best of the measured forms in which so many vectors, tables included, take no more than the capacity.

    DoesNotFit, naming the smallest, where none does.
    """
    if n_vectors < 1:
        raise InputError(f"{n_vectors} vectors: there must be one at least")
    best = frontier(points, n_vectors)
    if not best:
        raise InputError("there are no measured points to choose from")
    fitting = [one for one in best if one.total_bytes(n_vectors) <= capacity_bytes]
    if not fitting:
        least = best[0]
        taken = format_bytes(int(least.total_bytes(n_vectors)))
        raise DoesNotFit(
            f"{n_vectors:,} vectors do not fit {format_bytes(capacity_bytes)}: the smallest form measured, "
            f"{least.form}, takes {taken}"
        )
    return fitting[-1]
