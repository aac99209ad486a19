"""Products with mixed activations: every bit as the integer reference has it, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memwall import _native, kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.comet import CometCodec
from memwall.kernels import comet
from memwall.kernels.tile_schedule import Schedule, Tile, balanced, equal_count, longest_first


def matrix_of(
    rows: int, cols: int, group: int, seed: int, *, gather: bool = False, alike: int | None = None
) -> tuple[Packed, kernels.Matrix]:
    """Weights with random widths of blocks, or all `alike`; every group has a code of -8 and all codes occur."""
    rng = np.random.default_rng(seed)
    form = CometCodec(group=group, gather=gather)
    blocks = form.blocks(cols)
    wide = rng.integers(0, 2, blocks) if alike is None else np.full(blocks, alike)
    form = replace(form, wide=int(wide.sum()))
    values = rng.standard_normal((rows, cols)).astype(np.float32) * 0.1
    packed = form.around(form.inner.encode(values), wide, rng.permutation(cols) if gather else None)
    return packed, kernels.matrix(packed)


def inputs(tokens: int, cols: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)
    x[:, :: max(cols // 3, 1)] *= 40
    x[-1] = 0
    return x


def product(x: np.ndarray, matrix: kernels.Matrix, **options: object) -> np.ndarray:
    out = np.empty((len(x), matrix.rows), np.float32)
    kernels.linear(x, [matrix], [out], **options)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("gather", [False, True])
def test_every_bit_of_the_reference(isa: str, threads: int, group: int, gather: bool) -> None:
    for case, (tokens, rows, cols) in enumerate(
        [(1, 33, 300), (1, 16, 128), (2, 50, 128), (7, 31, 129), (8, 64, 257), (9, 5, 31), (19, 100, 704), (3, 17, 1)]
    ):
        packed, matrix = matrix_of(rows, cols, group, case, gather=gather)
        x = inputs(tokens, cols, case)
        np.testing.assert_array_equal(product(x, matrix), comet.reference_product(packed, x))


@pytest.mark.parametrize("alike", [0, 1])
def test_largest_sums(isa: str, alike: int) -> None:
    """Codes of -8 against the largest activations of either sign: no sum of 16 bits may overflow."""
    form = CometCodec(group=128, wide=3 * alike)
    values = np.full((32, 384), 1.0, np.float32)
    packed = form.around(form.inner.encode(values), np.full(3, alike))
    codes, _, _ = form.inner.unpack(packed)
    assert (codes == 0).all()
    for sign in (1, -1):
        x = np.full((9, 384), 3.0 * sign, np.float32)
        for tokens in (1, 9):
            out = product(x[:tokens], kernels.matrix(packed))
            np.testing.assert_array_equal(out, comet.reference_product(packed, x[:tokens]))
            np.testing.assert_allclose(out, sign * 3.0 * 384, rtol=1e-6)


def test_all_bytes_of_weights(isa: str) -> None:
    """Every pair of codes that a byte can hold, in both places, against both widths."""
    low, high = np.divmod(np.arange(256), 16)
    columns = np.zeros((16, 256), np.uint8)
    for row in range(16):
        columns[row] = np.roll(np.where(np.arange(256) // 4 % 2, high, low), row)
    for alike in (0, 1):
        form = CometCodec(group=128, wide=2 * alike)
        inner = form.inner.pack(columns, np.full((16, 2), 0.5, np.float16))
        packed = form.around(inner, np.full(2, alike))
        x = inputs(5, 256, alike)
        np.testing.assert_array_equal(product(x, kernels.matrix(packed)), comet.reference_product(packed, x))


def test_widening_of_all_bytes(isa: str) -> None:
    packed = np.arange(256, dtype=np.uint8)
    found = comet.widen(packed).reshape(-1, 2, 4)
    for byte, (low, high) in enumerate(zip(found[:, 0].ravel(), found[:, 1].ravel(), strict=True)):
        signed = [nibble - 16 if nibble > 7 else nibble for nibble in (byte & 15, byte >> 4)]
        assert [low, high] == [16 * each for each in signed]


def test_activations_are_really_stored_in_4_and_8_bits(isa: str) -> None:
    packed, matrix = matrix_of(16, 300, 128, 4)
    wide = packed.buffers["wide"]
    x = inputs(6, 300, 5)
    held = comet.round_activations(matrix, x)
    assert held.codes.shape == (6, sum(128 if each else 64 for each in wide))
    codes, scales = comet.codes_of(x, 128, wide)
    np.testing.assert_array_equal(held.scales, scales)
    np.testing.assert_array_equal(held.sums, codes.sum(axis=-1))
    at = 0
    for block, each in enumerate(wide):
        if each:
            found = held.codes[:, at : at + 128]
        else:
            found = (comet.widen(held.codes[:, at : at + 64].ravel()) // 16).reshape(6, 128)
        np.testing.assert_array_equal(found, codes[:, block])
        at += 128 if each else 64
    assert held.nbytes < 6 * 300 * 2


def test_exact_products_and_rows(isa: str) -> None:
    packed, matrix = matrix_of(40, 200, 64, 7, gather=True)
    decoded = codec(packed.spec).decode(packed)
    x = inputs(5, 200, 8)
    np.testing.assert_allclose(product(x, matrix, exact=True), x @ decoded.T, rtol=1e-4, atol=1e-3)
    rows = np.empty((3, 200), np.float32)
    np.testing.assert_array_equal(kernels.gather_rows(matrix, np.array([39, 0, 7]), rows), decoded[[39, 0, 7]])
    assert matrix.nbytes == packed.nbytes - packed.buffers["scales"].nbytes + 4 * 3 * 16 * 2  # rows padded alike


def test_matrices_of_one_call_may_differ(isa: str) -> None:
    """Bias, accumulation, another width or order in the same call, other forms beside them."""
    x = inputs(10, 256, 1)
    made = [matrix_of(33, 256, 128, seed, gather=seed == 2, alike=seed % 2) for seed in range(3)]
    plain = codec("int8-g128").encode(np.eye(48, 256, dtype=np.float32))
    matrices = [made[0][1], made[1][1], kernels.matrix(plain), made[2][1], made[0][1]]
    outs = [np.ones((10, matrix.rows), np.float32) for matrix in matrices]
    bias = np.arange(33, dtype=np.float32)
    kernels.linear(x, matrices, outs, accumulate=True, biases=[bias, None, None, None, None])
    for out, packed in ((outs[1], made[1][0]), (outs[3], made[2][0])):
        np.testing.assert_array_equal(out, comet.reference_product(packed, x) + 1)
    np.testing.assert_array_equal(outs[0], comet.reference_product(made[0][0], x) + bias + 1)
    np.testing.assert_array_equal(outs[4], comet.reference_product(made[0][0], x) + 1)


def test_what_is_not_a_number_stays_none(isa: str) -> None:
    packed, matrix = matrix_of(16, 256, 128, 3)
    x = inputs(4, 256, 3)
    x[1, 5], x[2, 200] = np.nan, np.inf
    out = product(x, matrix)
    assert np.isnan(out[1:3]).all()
    np.testing.assert_array_equal(out, comet.reference_product(packed, x))
    assert np.isfinite(out[[0, 3]]).all()


def test_scratch_is_foreseen(isa: str) -> None:
    _, matrix = matrix_of(16, 4096, 128, 3, alike=1)
    before = kernels.scratch_bytes()
    product(np.ones((200, 4096), np.float32), matrix)
    rounding = kernels.roundings(matrix.spec)
    assert len(rounding) == 1
    assert kernels.scratch_bytes() <= max(before, kernels.predict_scratch_bytes(200, 4096, group=rounding[0]) + before)


def tiles_of(matrices: list[kernels.Matrix], group: int) -> list[Tile]:
    tiles = []
    for index, matrix in enumerate(matrices):
        blocks = -(-matrix.cols // group)
        for strip in range(-(-matrix.rows // comet.strip_rows())):
            tiles.append(Tile(cost=blocks, work=(index, strip, 0, blocks), parts=blocks))
    return tiles


@pytest.mark.parametrize("steal", [False, True])
def test_products_by_a_schedule(isa: str, threads: int, steal: bool) -> None:
    made = [matrix_of(100, 300, 128, 0), matrix_of(40, 128, 128, 1), matrix_of(64, 704, 128, 2, gather=True)]
    matrices = [matrix for _, matrix in made]
    xs = [inputs(11, matrix.cols, matrix.cols) for matrix in matrices]
    tiles = tiles_of(matrices, 128)
    for schedule in (equal_count(tiles, 2), longest_first(tiles, 3)):
        outs = [np.empty((11, matrix.rows), np.float32) for matrix in matrices]
        seconds = comet.linear_scheduled(xs, matrices, outs, schedule, steal=steal)
        assert len(seconds) == len(schedule.workers)
        for (packed, _), x, out in zip(made, xs, outs, strict=True):
            np.testing.assert_array_equal(out, comet.reference_product(packed, x))
    cut = [part for tile in tiles for part in tile.split(3)]
    outs = [np.empty((11, matrix.rows), np.float32) for matrix in matrices]
    comet.linear_scheduled(xs, matrices, outs, balanced(cut, 2), steal=steal)
    for (packed, _), x, out in zip(made, xs, outs, strict=True):
        np.testing.assert_allclose(out, comet.reference_product(packed, x), rtol=1e-4, atol=1e-4)


def test_bad_schedules() -> None:
    _, matrix = matrix_of(100, 300, 128, 0)
    x, out = inputs(2, 300, 0), np.empty((2, 100), np.float32)
    tiles = tiles_of([matrix], 128)
    for bad in (
        tiles[1:],
        [*tiles, tiles[0]],
        [replace(tiles[0], work=(0, 0, 0, 2)), *tiles[1:]],
        [*tiles, Tile(cost=1, work=(1, 0, 0, 1))],
    ):
        with pytest.raises(InputError, match="schedule"):
            comet.linear_scheduled([x], [matrix], [out], Schedule((tuple(bad),)), steal=False)
    other = kernels.matrix(codec("int4-g128").encode(np.ones((16, 300), np.float32)))
    with pytest.raises(ValueError, match="mixed"):
        _native.linear_scheduled([x], [other], [out], np.zeros((1, 4), np.int32), np.int32([0, 1]), False)
