"""Element types of stored vectors: their numbers against independent casts, their rows against decoded ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memwall.errors import InputError
from memwall.retrieve.base import unit
from memwall.retrieve.vector_codecs import VECTOR_CODECS, VectorCodec, stored_arrays, vector_codec

CASTS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


def vectors(count: int, m: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((count, m)).astype(np.float32))


def decoded(one: VectorCodec, x: np.ndarray, tables: dict[str, np.ndarray] | None = None) -> np.ndarray:
    tables = one.tables(x) if tables is None else tables
    return one.decode(one.encode(x, tables), x.shape[1], tables)


@pytest.mark.parametrize("name", CASTS)
def test_a_million_numbers_are_cast_as_ml_dtypes_casts_them(name: str) -> None:
    draw = np.random.default_rng(1)
    exponents = np.ldexp(1.0, draw.integers(-20, 9, 1_000_000))
    x = (draw.standard_normal(1_000_000) * exponents).astype(np.float32).reshape(1000, 1000)
    x = x.clip(-LARGEST.get(name, 6e4), LARGEST.get(name, 6e4))
    np.testing.assert_array_equal(decoded(vector_codec(name), x), x.astype(CASTS[name]).astype(np.float32))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_every_code_comes_back_and_ties_go_to_even(name: str) -> None:
    codes = np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)
    values = codes.view(CASTS[name]).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    np.testing.assert_array_equal(decoded(vector_codec(name), values[None])[0], values)
    halves = ((values[1:] + values[:-1]) / 2)[None]
    np.testing.assert_array_equal(decoded(vector_codec(name), halves), halves.astype(CASTS[name]).astype(np.float32))
    over = np.float32([[LARGEST[name] * 4, -LARGEST[name] * 4]])
    assert decoded(vector_codec(name), over).tolist() == [[LARGEST[name], -LARGEST[name]]]


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("float32", 1),
        ("float16", 2),
        ("bfloat16", 2),
        ("e4m3", 4),
        ("e5m2", 4),
        ("int8", 4),
        ("int8-paper", 4),
        ("e2m1", 8),
        ("e2m1-dimension", 8),
        ("binary", 32),
        ("signs", 32),
    ],
)
def test_bytes_are_exactly_so_many_times_fewer(name: str, times: int) -> None:
    x = vectors(10, 384)
    one = vector_codec(name)
    stored = one.encode(x, one.tables(x))
    assert sum(array.nbytes for array in stored.values()) * times == x.nbytes
    assert one.vector_bytes(384) * 10 == x.nbytes // times


@pytest.mark.parametrize("name", VECTOR_CODECS)
@pytest.mark.parametrize("m", [1, 3, 16, 37, 96])
def test_scores_are_those_of_decoded_rows(name: str, m: int) -> None:
    one, x = vector_codec(name), vectors(29, m)
    tables = one.tables(x)
    stored = one.encode(x, tables)
    assert {key: (array.shape, array.dtype) for key, array in stored.items()} == stored_arrays(one, 29, m)
    assert {key: table.shape for key, table in tables.items()} == one.table_shapes(m)
    held = np.float64(one.decode(stored, m, tables))
    for count in (1, 4):
        asked = decoded(one, vectors(count, m, 5), tables)
        products = np.float64(unit(asked)) @ held.T
        lengths = np.linalg.norm(held, axis=1)
        cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
        np.testing.assert_allclose(one.scores(stored, m, tables, unit(asked), cosine=True), cosines, atol=2e-5)
        if not one.only_cosine:
            found = one.scores(stored, m, tables, unit(asked), cosine=False)
            np.testing.assert_allclose(found, products, rtol=1e-4, atol=2e-5)


def test_fair_integers_clip_and_round() -> None:
    one = vector_codec("int8")
    tables = {"least": np.float32([-1, 0]), "largest": np.float32([1, 0])}
    x = np.float32([[-5, 3], [5, 0], [0.5 / 255, 0], [-1 + 2 * 2.6 / 255, 0]])
    stored = one.encode(x, tables)["rows"]
    assert stored[:, 0].tolist() == [0, 255, 128, 3]
    assert stored[:, 1].tolist() == [0] * 4  # a dimension that was always the same
    np.testing.assert_allclose(one.decode({"rows": stored}, 2, tables)[:2], [[-1, 0], [1, 0]], atol=1e-6)


def test_the_papers_integers_count_towards_zero_and_wrap() -> None:
    one = vector_codec("int8-paper")
    tables = {"least": np.float32([0]), "largest": np.float32([255])}
    x = np.float32([[0.99], [254.99], [255], [256.5], [-0.5], [-1.5], [600]])
    codes = one.encode(x, tables)["rows"][:, 0].tolist()
    assert codes == [0, 254, 255, 0, 0, 255, 600 - 512]
    assert one.decode(one.encode(x, tables), 1, tables)[:, 0].tolist() == codes  # bare codes are what is scored


def test_bits_are_what_lies_above_zero() -> None:
    x = np.float32([[0.0, -0.0, 1e-30, -1e-30, 2, -2, 3, 4, 5]])
    stored = vector_codec("binary").encode(x, {})
    assert stored["rows"].tolist() == [[0b11010100, 1]]
    assert decoded(vector_codec("binary"), x).tolist() == [[0, 0, 1, 0, 1, 0, 1, 1, 1]]
    assert decoded(vector_codec("signs"), x).tolist() == [[-1, -1, 1, -1, 1, -1, 1, 1, 1]]


def test_four_bits_need_a_scale() -> None:
    x = vectors(500, 384)
    lost = {
        name: float((decoded(vector_codec(name), x) == 0).mean()) for name in ("e2m1", "e2m1-vector", "e2m1-dimension")
    }
    assert lost["e2m1"] > 0.99
    assert lost["e2m1-vector"] < 0.2
    assert lost["e2m1-dimension"] < 0.2
    best = decoded(vector_codec("e2m1-vector"), x)
    np.testing.assert_allclose(np.abs(best).max(axis=1), np.abs(x).max(axis=1), rtol=1e-3)


finite = st.floats(-100, 100, width=32)


@settings(max_examples=60, deadline=None)
@given(
    x=arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 40)), elements=finite),
    name=st.sampled_from(sorted(VECTOR_CODECS)),
)
def test_any_vectors_keep_their_shape_and_stay_finite(x: np.ndarray, name: str) -> None:
    one = vector_codec(name)
    tables = (
        one.tables(x)
        if len(x)
        else {key: np.zeros(shape, np.float32) for key, shape in one.table_shapes(x.shape[1]).items()}
    )
    stored = one.encode(x, tables)
    assert stored["rows"].shape == (len(x), one.row_bytes(x.shape[1]))
    found = one.decode(stored, x.shape[1], tables)
    assert found.shape == x.shape
    assert np.isfinite(found).all()
    again = one.encode(found, tables)
    if name not in ("int8-paper", "e2m1-vector"):  # bare codes are no vectors; a scale that was rounded moves again
        np.testing.assert_array_equal(one.decode(again, x.shape[1], tables), found)


def test_unknown_types_are_named() -> None:
    with pytest.raises(InputError, match=r"no element type 'int4'; there are float32.*e2m1-dimension"):
        vector_codec("int4")
