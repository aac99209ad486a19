"""Forms of stored vectors: order of the steps, exact search, bytes, frontier and choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit, InputError
from memwall.retrieve.base import Best, unit
from memwall.retrieve.embedding_storage import Fitted, Form, Point, StoredVectors, choose, frontier
from memwall.retrieve.vector_codecs import VECTOR_CODECS


def vectors(count: int, d: int = 32, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return unit((draw.standard_normal((count, d)) * np.linspace(2, 0.2, d)).astype(np.float32))


def fitted(form: str, metric: str = "cosine") -> Fitted:
    return Fitted.fit(Form.parse(form), vectors(200, seed=9), name="others", metric=metric)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["e4m3", "pca:0.5+e4m3", "projection:12+signs", "autoencoder:0.25+int8", "pca:1.0+float32"]
)
def test_forms_are_what_they_are_written_as(text: str) -> None:
    assert str(Form.parse(text)) == text
    assert Form.parse(str(Form.parse(text))) == Form.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4", "no element type"),
        ("svd:0.5+e4m3", "no reduction 'svd'"),
        ("pca+e4m3", "write a fraction"),
        ("pca:0+e4m3", "write a fraction"),
        ("pca:1.5+e4m3", "write a fraction"),
        ("pca:-1+e4m3", "write a fraction"),
    ],
)
def test_bad_forms(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Form.parse(text)


def test_dimensions_are_rounded_and_checked() -> None:
    assert [Form.parse(f"pca:{f}+e4m3").reduced(384) for f in (0.25, 0.5, 0.75, 0.9)] == [96, 192, 288, 346]
    with pytest.raises(InputError, match="0 of 1 dimensions"):
        Form.parse("pca:0.25+e4m3").reduced(1)
    with pytest.raises(InputError, match="400 of 384"):
        Form.parse("pca:400+e4m3").reduced(384)


def test_reduced_first_then_rounded_and_queries_too() -> None:
    """Rounding first gives other numbers; so does a query that is not reduced, which has not even the right shape."""
    one, x = fitted("pca:0.5+e4m3"), vectors(50)
    assert one.reducer is not None
    plain = fitted("e4m3")
    reduced_first = one.decode(one.encode(x))
    rounded = plain.codec.decode(plain.codec.encode(one.reducer.apply(x), {}), 16, {})
    np.testing.assert_array_equal(reduced_first, rounded)
    rounded_first = one.reducer.apply(plain.decode(plain.encode(x)))
    assert np.abs(reduced_first - rounded_first).max() > 1e-3
    np.testing.assert_allclose(one.queries(x[:3]), unit(reduced_first[:3]), atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "inner"])
@pytest.mark.parametrize("form", [*VECTOR_CODECS, "pca:0.5+e4m3", "projection:12+int8", "pca:0.25+e2m1-vector"])
def test_search_is_exact(form: str, metric: str) -> None:
    if metric == "inner" and VECTOR_CODECS[Form.parse(form).codec].only_cosine:
        with pytest.raises(InputError, match="take --metric cosine"):
            fitted(form, metric)
        return
    one, x, asked = fitted(form, metric), vectors(300, seed=1), vectors(7, seed=2)
    index = StoredVectors.of(one, x)
    held = one.decode(index.stored)
    scores = np.float64(one.queries(asked)) @ np.float64(unit(held) if metric == "cosine" else held).T
    hits = index.search(asked, 5)
    best = -np.sort(-scores, axis=1)[:, :5]
    np.testing.assert_allclose(hits.scores, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, hits.ids, axis=1), best, atol=1e-5)
    assert index.nbytes == 300 * one.vector_bytes + one.table_bytes


def test_inner_products_stand_for_cosines_after_reduction() -> None:
    """A map shortens vectors, and some more than others: without their length 1 the ranking would be another."""
    x, asked = vectors(400, seed=3), vectors(20, seed=4)
    inner, cosine = fitted("pca:0.25+float32", "inner"), fitted("pca:0.25+float32")
    assert inner.reducer is not None
    lengths = np.linalg.norm(inner.reducer.apply(x), axis=1)
    assert lengths.max() > 1.3 * lengths.min()
    np.testing.assert_allclose(np.linalg.norm(inner.reduce(x), axis=1), 1, atol=1e-5)
    same = StoredVectors.of(inner, x).search(asked, 10).ids == StoredVectors.of(cosine, x).search(asked, 10).ids
    assert same.mean() > 0.99


def test_a_header_says_what_was_fitted() -> None:
    one = fitted("pca:0.5+e4m3")
    assert one.fitted_on is not None
    assert (one.fitted_on.name, one.fitted_on.count) == ("others", 200)
    assert fitted("e4m3").fitted_on is None  # learned nothing
    assert fitted("int8").fitted_on is not None
    assert fitted("pca:0.5+e4m3").ratio == 8
    assert fitted("pca:0.25+e4m3").ratio == 16
    assert fitted("signs").ratio == 32


def test_chunks_and_threads_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    import memwall.retrieve.embedding_storage as module

    one, x, asked = fitted("e4m3"), vectors(5000, seed=5), vectors(3, seed=6)
    whole = StoredVectors.of(one, x).search(asked, 12)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 100)
    monkeypatch.setattr(module, "_QUERIES_AT_ONCE", 2)
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", 700)
    parts = StoredVectors.of(one, x).search(asked, 12)
    np.testing.assert_array_equal(whole.ids, parts.ids)


def test_few_or_no_vectors() -> None:
    one, asked = fitted("pca:0.5+e4m3"), vectors(2)
    hits = StoredVectors.of(one, vectors(3)).search(asked, 5)
    assert (hits.ids[:, 3:] == -1).all()
    assert np.isneginf(hits.scores[:, 3:]).all()
    empty = StoredVectors.of(one, vectors(0))
    assert empty.count == 0
    assert (empty.search(asked, 5).ids == -1).all()
    assert empty.search(asked[:0], 5).ids.shape == (0, 5)
    assert empty.zero_share() == 0


@pytest.mark.parametrize(
    ("queries", "says"),
    [
        (np.ones((2, 31), np.float32), "31 dimensions; expected 32"),
        (np.ones(32, np.float32), "expected vectors"),
        (np.full((1, 32), np.nan, np.float32), "vector 0 has NaN"),
        (np.full((1, 32), "a"), "real numbers"),
    ],
)
def test_bad_queries(queries: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says):
        StoredVectors.of(fitted("e4m3"), vectors(5)).search(queries, 3)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_best_of_pieces_are_the_best_of_all(data: st.DataObject) -> None:
    count, top = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 12))
    scores = np.float32(data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count)))  # many are equal
    order = np.array(data.draw(st.permutations(range(count))), np.int64)
    best, start = Best(1, top), 0
    while start < count:
        step = data.draw(st.integers(1, 30))
        part = order[start : start + step]
        best.add(scores[None, part], part)
        start += step
    expected = sorted(range(count), key=lambda one: (-scores[one], one))[:top]
    assert best.hits().ids[0].tolist() == expected + [-1] * (top - len(expected))


# ---- the choice ----------------------------------------------------------------------------------------------------

points_drawn = st.lists(
    st.builds(
        Point,
        form=st.sampled_from("abcdefgh"),
        vector_bytes=st.integers(1, 40),
        quality=st.integers(0, 20).map(lambda n: n / 20),
        table_bytes=st.integers(0, 500),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(points=points_drawn, n_vectors=st.integers(1, 100), capacity=st.integers(0, 6000))
def test_no_beaten_form_is_chosen(points: list[Point], n_vectors: int, capacity: int) -> None:
    best = frontier(points, n_vectors)
    for one in points:  # somebody on the frontier is no larger and no worse
        assert any(b.total_bytes(n_vectors) <= one.total_bytes(n_vectors) and b.quality >= one.quality for b in best)
    sizes = [one.total_bytes(n_vectors) for one in best]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    fitting = [one for one in points if one.total_bytes(n_vectors) <= capacity]
    if not fitting:
        with pytest.raises(DoesNotFit, match="the smallest form measured"):
            choose(capacity, n_vectors, points)
        return
    chosen = choose(capacity, n_vectors, points)
    assert chosen in fitting
    assert chosen.quality == max(one.quality for one in fitting)
    hull = frontier(points, n_vectors, convex=True)
    assert {id(one) for one in hull} <= {id(one) for one in best}
    slopes = [
        (b.quality - a.quality) / (b.total_bytes(n_vectors) - a.total_bytes(n_vectors))
        for a, b in itertools.pairwise(hull)
    ]
    assert all(a > b for a, b in itertools.pairwise(slopes))


def test_capacity_by_hand() -> None:
    points = [
        Point(form="float32", vector_bytes=1536, quality=0.6),
        Point(form="e4m3", vector_bytes=384, quality=0.599),
        Point(form="int8-paper", vector_bytes=384, quality=0.58),
        Point(form="pca:0.5+e4m3", vector_bytes=192, quality=0.59, table_bytes=300_000),
        Point(form="signs", vector_bytes=48, quality=0.4),
    ]
    chosen = [
        choose(capacity, 10_000, points).form for capacity in (16_000_000, 4_000_000, 2_500_000, 1_999_999, 480_000)
    ]
    assert chosen == ["float32", "e4m3", "pca:0.5+e4m3", "signs", "signs"]
    assert [one.form for one in frontier(points)] == ["signs", "pca:0.5+e4m3", "e4m3", "float32"]
    with pytest.raises(DoesNotFit, match=r"10,000 vectors do not fit 479.* kB.*signs, takes 480 kB"):
        choose(479_000, 10_000, points)
    with pytest.raises(InputError, match="no measured points"):
        choose(1, 1, [])
    with pytest.raises(InputError, match="0 vectors"):
        choose(1, 0, points)
