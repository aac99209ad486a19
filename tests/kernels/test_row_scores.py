"""Scores of rows in few bits on every instruction set, against decoded rows in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from memwall.formats import codec
from memwall.formats.bitpack import pack_rows
from memwall.kernels.row_scores import bit_scores, padded, row_scores

COLUMNS = (1, 7, 16, 37, 96, 384)
MINIFLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def rows_of(form: str, count: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored rows and what they mean."""
    draw = np.random.default_rng(cols)
    x = draw.standard_normal((count, cols)).astype(np.float32)
    if form == "bytes":
        codes = draw.integers(0, 256, (count, cols), np.uint8)
        return codes, codes.astype(np.float64)
    if form in ("float32", "float16", "bfloat16"):
        held = x.astype({"bfloat16": ml_dtypes.bfloat16}.get(form, form))
        return np.ascontiguousarray(held).view(np.uint8).reshape(count, -1), held.astype(np.float64)
    packed = codec(f"{form}-raw").encode(x)
    return packed.buffers["codes"], np.float64(codec(packed.spec).decode(packed))


def expected(values: np.ndarray, queries: np.ndarray, cosine: bool) -> np.ndarray:
    scores = np.float64(queries) @ values.T
    lengths = np.linalg.norm(values, axis=1)
    return np.divide(scores, lengths, out=np.zeros_like(scores), where=lengths > 0) if cosine else scores


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "e4m3", "e5m2", "e2m1", "bytes"])
def test_scores(form: str, queries: int, cosine: bool, isa: str, threads: int) -> None:
    for cols in COLUMNS:
        rows, values = rows_of(form, 23, cols)
        asked = np.random.default_rng(1).standard_normal((queries, cols)).astype(np.float32)
        found = row_scores(form, cols, rows, padded(asked), cosine=cosine)
        np.testing.assert_allclose(
            found, expected(values, asked, cosine), rtol=2e-5, atol=2e-5 * (1 + 255 * 384**0.5 * (form == "bytes"))
        )


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("form", ["bytes", "e2m1"])
def test_steps_and_offsets(form: str, queries: int, isa: str) -> None:
    for cols in COLUMNS:
        rows, values = rows_of(form, 9, cols)
        draw = np.random.default_rng(2)
        step, offset = draw.random(cols).astype(np.float32) / 128, draw.standard_normal(cols).astype(np.float32)
        asked = draw.standard_normal((queries, cols)).astype(np.float32)
        for cosine in (True, False):
            found = row_scores(
                form, cols, rows, padded(asked), cosine=cosine, steps=padded(step), offsets=padded(offset)
            )
            np.testing.assert_allclose(found, expected(values * step + offset, asked, cosine), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", MINIFLOATS)
def test_every_code_of_eight_bits(form: str, isa: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(MINIFLOATS[form]).astype(np.float32)
    number = np.isfinite(values)
    for queries in (1, 2):
        found = row_scores(form, 1, codes[:, None], padded(np.ones((queries, 1), np.float32)), cosine=False)
        np.testing.assert_array_equal(found[0][number], values[number])


def test_every_code_of_four_bits(isa: str) -> None:
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    both = np.arange(256, dtype=np.uint8)[:, None]
    for column in (0, 1):
        one = padded(np.eye(2, dtype=np.float32)[column][None])
        np.testing.assert_array_equal(
            row_scores("e2m1", 2, both, one, cosine=False)[0], values[both[:, 0] >> 4 * column & 15]
        )


@pytest.mark.parametrize("signs", [True, False])
def test_bits(signs: bool, isa: str, threads: int) -> None:
    for cols in (1, 8, 63, 64, 65, 384, 1000):
        ones = np.random.default_rng(cols).integers(0, 2, (17, cols), np.uint8)
        values = 2.0 * ones - 1 if signs else np.float64(ones)
        lengths = np.linalg.norm(values, axis=1)
        cosines = np.divide(
            values @ values.T, lengths[:, None] * lengths, where=lengths[:, None] * lengths > 0, out=np.zeros((17, 17))
        )
        packed = np.ascontiguousarray(pack_rows(ones, 1))
        np.testing.assert_allclose(bit_scores(cols, packed, packed, signs=signs), cosines, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    queries = padded(np.ones((1, 20), np.float32))
    rows = np.zeros((3, 20), np.uint8)
    assert row_scores("e4m3", 20, rows, queries).tolist() == [[0, 0, 0]]  # a row of zeros has no direction
    assert row_scores("e4m3", 20, rows[:0], queries).shape == (1, 0)
    with pytest.raises(ValueError, match="do not take 20 bytes"):
        row_scores("e4m3", 19, rows, queries)
    with pytest.raises(ValueError, match="padded"):
        row_scores("e4m3", 20, rows, np.ones((1, 20), np.float32))
    with pytest.raises(ValueError, match="no form"):
        row_scores("int8", 20, rows, queries)
    with pytest.raises(ValueError, match="takes no steps"):
        row_scores("e4m3", 20, rows, queries, steps=queries[0], offsets=queries[0])
    with pytest.raises(ValueError, match="come together"):
        row_scores("bytes", 20, rows, queries, steps=queries[0])
    with pytest.raises(ValueError, match="a bit per column"):
        bit_scores(20, rows, rows, signs=True)
