"""nDCG@10, measuring forms, and the files of points and judgements."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from memwall.errors import InputError
from memwall.retrieve.embedding_storage import Form, Point
from memwall.retrieve.ranking import (
    Judged,
    measure,
    ndcg,
    own_queries,
    points_dict,
    read_judgements,
    read_points,
)
from tests.retrieve.test_embedding_storage import vectors


def test_ndcg_by_hand() -> None:
    ids = np.array([[5, 1, 2], [1, 5, 2], [1, 2, 5], [1, 2, 3], [7, 8, -1]])
    assert ndcg(ids, [{5}] * 4 + [{7, 8}]).tolist() == pytest.approx([1, 1 / math.log2(3), 0.5, 0, 1])
    assert ndcg(ids[:1], [set()]).tolist() == [0]
    some = ndcg(np.array([[9, 4, 7]]), [{4, 7, 30}])[0]
    assert some == pytest.approx((1 / math.log2(3) + 0.5) / (1 + 1 / math.log2(3) + 0.5))


def test_ndcg_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    scores, truth = draw.random((40, 25)), draw.random((40, 25)) < 0.2
    truth[:, 0] |= ~truth.any(axis=1)
    ids = np.argsort(-scores, axis=1)[:, :10]
    ours = ndcg(ids, [set(np.flatnonzero(row)) for row in truth])
    assert ours.mean() == pytest.approx(ndcg_score(truth, scores, k=10))


def test_every_form_on_the_same_queries() -> None:
    x, queries = vectors(600, seed=1), vectors(600, seed=1)[:50] + 0.6 * vectors(50, seed=2)
    judged = Judged(vectors=x, queries=queries.astype(np.float32), relevant=[{at} for at in range(50)])
    told: list[str] = []
    names = ["float32", "pca:0.5+float32", "pca:0.5+e4m3", "signs"]
    found = measure(
        [Form.parse(name) for name in names],
        judged,
        vectors(300, seed=7),
        name="others",
        progress=lambda done, whole, what: told.append(what),
    )
    assert told == names
    quality = {one.point.form: one.point.quality for one in found}
    assert quality["float32"] > 0.8
    assert quality["float32"] >= quality["pca:0.5+e4m3"] > quality["signs"]
    assert found[2].point.vector_bytes == 16
    assert found[2].point.table_bytes == 4 * (32 * 16 + 32)
    assert found[0].ndcg.shape == (50,)
    with pytest.raises(InputError, match="give one each"):
        Judged(vectors=x, queries=queries, relevant=[{1}])


def test_own_queries_are_taken_out() -> None:
    x = vectors(400, seed=3)
    judged = own_queries(x)
    assert len(judged.vectors) + len(judged.queries) == 400
    assert all(len(wanted) == 10 for wanted in judged.relevant)
    assert not ({row.tobytes() for row in judged.queries} & {row.tobytes() for row in judged.vectors})
    (whole,) = measure([Form.parse("float32")], judged, x, name="x")
    assert whole.point.quality == 1
    with pytest.raises(InputError, match="too few to measure on"):
        own_queries(x[:19])


def test_points_as_a_file(tmp_path: Path) -> None:
    points = [
        Point(form="pca:0.5+e4m3", vector_bytes=192, quality=0.5, table_bytes=7),
        Point(form="signs", vector_bytes=48, quality=0.25),
    ]
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"points": points_dict(points), "more": 1}))
    assert read_points(path) == points
    for entry, says in (
        ({"form": "int4"}, "no element type"),
        ({"form": "e4m3", "vector_bytes": -1}, "vector_bytes must be"),
        (3, "expected an object"),
    ):
        path.write_text(json.dumps({"points": [entry]}))
        with pytest.raises(InputError, match=says):
            read_points(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        read_points(path)


def test_judgements(tmp_path: Path) -> None:
    path = tmp_path / "judged.tsv"
    path.write_text("0\t5\t1\n\n1 2\n0 3\n")
    assert read_judgements(path, 2, 6) == [{5, 3}, {2}]
    for text, says in (
        ("0 6\n1 1", "line 1: there are 2 queries and 6 vectors"),
        ("0 a", "line 1: expected the places"),
        ("0 1", "query 1 has no relevant"),
        ("-1 2", "expected the places"),
        ("1", "expected the places"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            read_judgements(path, 2, 6)
    with pytest.raises(InputError, match="cannot be read"):
        read_judgements(tmp_path / "none", 2, 6)
