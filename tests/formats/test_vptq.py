"""VPTQ's stored form: specs, layouts under a bound of bits, bytes, and decoding against a slow reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.vector_parts import Coded
from memwall.formats.vptq import VptqCodec, check, pack, unpack
from tests.kernels.codebooks import random_codebooks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 16), st.integers(1, 8), st.integers(0, 8), st.integers(0, 5), st.sampled_from([0, 10, 333]),
    st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 50), st.integers(0, 999),
)  # fmt: skip
def test_unpacked_is_what_was_packed_and_decodes_as_a_slow_reference(
    vector: int, main: int, residual: int, groups: int, permille: int, ordered: bool, norm: bool, rows: int, cols: int,
    seed: int,
) -> None:  # fmt: skip
    form = VptqCodec(
        vector=vector, codebook=1 << main, residual=1 << residual if residual else 0, groups=groups,
        outlier_permille=permille, outlier_vector=3 if permille else 0, outlier_codebook=8 if permille else 0,
        ordered=ordered, norm=norm,
    )  # fmt: skip
    packed = random_codebooks(form.spec, (rows, cols), seed)
    assert packed.nbytes == codec(packed.spec).nbytes((rows, cols)) == form.stored_bits(rows, cols) // 8
    outliers, rest = unpack(packed)
    again = pack(form, (rows, cols), rest, outliers=outliers, order=packed.buffers.get("order"),
                 norm=packed.buffers.get("scale_and_offset"))  # fmt: skip
    assert all(np.array_equal(again.buffers[name], each) for name, each in packed.buffers.items())
    values = codec(packed.spec).decode(packed)
    random = np.random.default_rng(seed)
    for _ in range(20):
        row, place = int(random.integers(rows)), int(random.integers(cols))
        column = int(packed.buffers["order"][place]) if ordered else place
        assert values[row, column] == slow(form, packed, row, place)


def slow(form: VptqCodec, packed: Packed, row: int, place: int) -> np.float32:
    outliers, rest = form.parts(packed.shape[1])
    inside = outliers is not None and place < outliers.columns
    part = outliers if inside else rest
    assert part is not None
    coded = unpack(packed)[0 if inside else 1]
    assert coded is not None
    group = next(g for g in range(part.groups) if part.members(g).start <= place < part.members(g).stop)
    vector, lane = divmod(row, part.vector)
    code = int(coded.codes[vector, place - part.first])
    value = np.float32(coded.main[group, code & ((1 << part.main_bits) - 1), lane])
    if coded.residual is not None:
        value += np.float32(coded.residual[group, code >> part.main_bits, lane])
    if form.norm:
        scale, offset = packed.buffers["scale_and_offset"][:, place].astype(np.float32)
        value = value * scale + offset
    return np.float32(value)


def test_streams_are_those_of_the_text() -> None:
    """Word = residual index << log2 k | index, lowest bits first, per group and row of vectors."""
    form = VptqCodec.parse("vptq-v2-k4096-r4096-g2")
    codes = np.array([[1, 2, 3, 4, 5]] * 2, np.uint32) | np.uint32(7 << 12)
    books = [np.zeros((2, 4096, 2), np.float16) for _ in range(2)]
    packed = pack(form, (4, 5), Coded(codes=codes, main=books[0], residual=books[1]))
    streams = packed.buffers["indices"][:-16].reshape(2, 2, 3)
    code = [(7 << 12) + n for n in range(1, 6)]
    assert int(streams[0, 0, 0]) == (code[0] | code[1] << 24) & 0xFFFFFFFF
    assert int(streams[1, 1, 0]) == (code[2] | code[3] << 24) & 0xFFFFFFFF  # groups [0, 2) and [2, 5)


def test_outlier_columns_take_up_what_does_not_divide() -> None:
    outliers, rest = VptqCodec.parse("vptq-v8-k256-g4-o10v4k64").parts(1001)
    assert outliers is not None
    assert (outliers.columns, rest.columns, rest.first) == (13, 988, 13)
    assert {rest.members(g).stop - rest.members(g).start for g in range(4)} == {247}
    _, rest = VptqCodec.parse("vptq-v8-k256-g4").parts(1001)
    assert sum(rest.members(g).stop - rest.members(g).start for g in range(4)) == 1001


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(1.5, 6), st.integers(64, 3000), st.integers(64, 3000))
def test_a_bound_of_bits_is_kept(bits: float, rows: int, cols: int) -> None:
    coder = VptqCodec(bits=round(bits, 2), ordered=True)
    form = coder.laid_out((rows, cols))
    assert form.bits == 0
    assert form == codec(form.spec)
    used = 8 * coder.nbytes((rows, cols)) / (rows * cols)
    assert used == form.stored_bits(rows, cols) / (rows * cols) <= coder.bits
    if rows * cols > 1 << 18:
        assert used > 0.85 * coder.bits  # and nearly used up


def test_what_is_given_stays() -> None:
    form = codec("vptq3-v8-r1-g2-o10v4k64-ordered-norm")
    assert isinstance(form, VptqCodec)
    found = form.laid_out((4096, 4096))
    assert (found.vector, found.residual, found.groups, found.outlier_codebook) == (8, 0, 2, 64)
    assert found.ordered
    assert found.norm
    assert replace(found, codebook=0, bits=3, residual=1) == form


def test_encoding_many_alike_vectors_loses_nothing() -> None:
    few = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16).astype(np.float32)
    weight = few[np.random.default_rng(1).integers(0, 4, (20, 30))].transpose(0, 2, 1).reshape(120, 30)
    packed = codec("vptq-v6-k1024").encode(weight)
    np.testing.assert_array_equal(codec(packed.spec).decode(packed), weight)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("vptq", "how long vectors are"),
        ("vptq-k256", "how long vectors are"),
        ("vptq-v17-k256", "1 to 16"),
        ("vptq-v8-k100", "power of two"),
        ("vptq-v8-k131072", "power of two"),
        ("vptq-v8-k1", "power of two"),
        ("vptq0.1", "0.5 to 8 bits"),
        ("vptq-v8-k256-o600v4k16", "500 thousandths"),
        ("vptq-v8-k256-o10v0k16", "codebook of their own"),
        ("vptq-v8-k256-g9999", "4096 groups"),
        ("vptq8x256", "write vptq2.25"),
    ],
)
def test_specs_that_are_none(spec: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        codec(spec)


def test_bits_too_few_for_a_matrix() -> None:
    with pytest.raises(InputError, match=r"16 x 16 takes at least \d"):
        codec("vptq2").nbytes((16, 16))
    with pytest.raises(InputError, match="takes at least 8"):
        codec("vptq2-v1-k256").nbytes((512, 512))


@pytest.mark.parametrize("spec", ["vptq-v4-k16", "vptq-v4-k16-norm"])
def test_numbers_that_do_not_fit(spec: str) -> None:
    weight = np.ones((8, 8), np.float32)
    for wrong in (np.nan, np.inf, 1e6):
        weight[3, 3] = wrong
        with pytest.raises(InputError, match=r"NaN|float16"):
            codec(spec).encode(weight)


def test_an_order_that_is_none_is_refused() -> None:
    packed = random_codebooks("vptq-v4-k16-ordered", (8, 8), 0)
    packed.buffers["order"][0] = packed.buffers["order"][1]
    with pytest.raises(InputError, match="each column once"):
        check(packed)
