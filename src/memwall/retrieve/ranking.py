"""What a form of stored vectors costs in quality: nDCG@10 of its ranking, on judged queries or on vectors' own.

nDCG@10 of a query: the sum of 1 / log2(place + 1) over relevant vectors among the first ten, over the largest such sum.
Without judgements the ten nearest by the float32 vectors count as relevant: the figure then says how much of that
ranking is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.retrieve.embedding_storage import Fitted, Form, Metric, Point, StoredVectors
from memwall.retrieve.reducers import SEED, Reducer, sample

Progress = Callable[[int, int, str], None]
TOP = 10
FRACTIONS = (0.25, 0.5, 0.75, 0.9)
"""Of the dimensions, as the paper tries them."""
CANDIDATES = tuple(
    Form.of(codec, reduce)
    for reduce in ("", *(f"pca:{fraction}" for fraction in FRACTIONS))
    for codec in ("float32", "float16", "e4m3", "int8", "e2m1-dimension", "e2m1-vector", "signs")
)
"""What is measured where nothing else is asked for: of types of equal size the ones that one would want."""
MOST_MEASURED, MOST_QUERIES = 20_000, 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Vectors [n, d] and queries [q, d]; relevant: for each query, places of vectors."""

    vectors: np.ndarray
    queries: np.ndarray
    relevant: Sequence[Collection[int]]

    def __post_init__(self) -> None:
        if len(self.queries) != len(self.relevant) or not len(self.queries):
            raise InputError(f"{len(self.queries)} queries and judgements of {len(self.relevant)}: give one each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A form, and nDCG@10 of each query."""

    point: Point
    ndcg: np.ndarray


def ndcg(ids: np.ndarray, relevant: Sequence[Collection[int]]) -> np.ndarray:
    """float64 [q] of rankings [q, places]; 0 for a query with nothing relevant."""
    gains = (1 / np.log2(np.arange(2, ids.shape[1] + 2))).tolist()
    found = np.zeros(len(ids))
    for query, (row, wanted) in enumerate(zip(ids.tolist(), relevant, strict=True)):
        if wanted:
            got = sum(gain for gain, one in zip(gains, row, strict=True) if one in wanted)
            found[query] = got / sum(gains[: len(wanted)])
    return found


def measure(
    forms: Sequence[Form],
    judged: Judged,
    fitted_on: np.ndarray,
    *,
    name: str,
    metric: Metric = "cosine",
    seed: int = SEED,
    reducers: dict[tuple[str, float | int], Reducer] | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Every form on the same queries. fitted_on, `name`: what maps and ranges are learned from.

    reducers: maps that were learned from it before, by kind and size; those that are learned now come to them.
    """
    reducers = {} if reducers is None else reducers
    measured = []
    for at, form in enumerate(forms):
        if progress is not None:
            progress(at, len(forms), str(form))
        key = (form.kind or "", form.size)
        fitted = Fitted.fit(form, fitted_on, name=name, metric=metric, seed=seed, reducer=reducers.get(key))
        if fitted.reducer is not None:
            reducers[key] = fitted.reducer
        hits = StoredVectors.of(fitted, judged.vectors).search(judged.queries, TOP)
        found = ndcg(hits.ids, judged.relevant)
        table_bytes = fitted.table_bytes if fitted.reducer is None or fitted.reducer.stored else 0
        point = Point(
            form=str(form), vector_bytes=fitted.vector_bytes, quality=float(found.mean()), table_bytes=table_bytes
        )
        measured.append(Measured(point=point, ndcg=found))
    return measured


def own_queries(x: np.ndarray, seed: int = SEED) -> Judged:
    """Some of the vectors as queries, taken out of the others, and for each the ten nearest of those as relevant."""
    if len(x) < 2 * TOP:
        raise InputError(
            f"{len(x)} vectors are too few to measure on: {2 * TOP} at least, or give queries and judgements"
        )
    x = sample(x, MOST_MEASURED + MOST_QUERIES, seed)
    asked = np.zeros(len(x), bool)
    asked[np.random.default_rng(seed).choice(len(x), min(MOST_QUERIES, len(x) // 10 + 1), replace=False)] = True
    vectors, queries = np.array(x[~asked], np.float32), np.array(x[asked], np.float32)
    exact = StoredVectors.of(Fitted.fit(Form(codec="float32"), vectors, name="vectors"), vectors)
    relevant = [set(row) for row in exact.search(queries, TOP).ids.tolist()]
    return Judged(vectors=vectors, queries=queries, relevant=relevant)


# ---- measured points as a file -------------------------------------------------------------------------------------

MOST_POINTS, _MOST_BYTES = 10_000, 1 << 32


def points_dict(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points as JSON has them."""
    return [
        {"form": one.form, "vector_bytes": one.vector_bytes, "table_bytes": one.table_bytes, "quality": one.quality}
        for one in points
    ]


def read_points(path: Path) -> list[Point]:
    """Points of a study.json that `memwall study embeddings` wrote; InputError for what is none."""
    found = []
    for number, entry in enumerate(Fields(checked_json.read(path), str(path)).items("points", MOST_POINTS)):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: point {number}: expected an object")
        fields = Fields(entry, f"{path}: point {number}")
        point = Point(
            form=str(Form.parse(fields.text("form"))),
            vector_bytes=fields.number("vector_bytes", 0, _MOST_BYTES),
            table_bytes=fields.integer("table_bytes", 0, 1 << 40),
            quality=fields.number("quality", 0, 1),
        )
        found.append(point)
    return found


def read_judgements(path: Path, num_queries: int, num_vectors: int) -> list[set[int]]:
    """Lines `query vector` (places from 0, between tabs or spaces; further columns are left alone) -> for each query
    the relevant vectors. InputError for a place that is not there, and for queries without any.
    """
    found: list[set[int]] = [set() for _ in range(num_queries)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) < 2 or not all(word.isascii() and word.isdecimal() and len(word) < 13 for word in words[:2]):
            raise InputError(
                f"{path}: line {number}: expected the places of a query and of a vector, got {line[:60]!r}"
            )
        query, vector = int(words[0]), int(words[1])
        if query >= num_queries or vector >= num_vectors:
            raise InputError(f"{path}: line {number}: there are {num_queries:,} queries and {num_vectors:,} vectors")
        found[query].add(vector)
    bare = next((query for query, wanted in enumerate(found) if not wanted), None)
    if bare is not None:
        raise InputError(f"{path}: query {bare} has no relevant vector")
    return found
