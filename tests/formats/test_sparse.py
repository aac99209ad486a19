"""Two of every four weights: what is kept, how many bytes it takes, and that damage is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.sparse import (
    Kept,
    SparseCodec,
    check,
    gather_kept,
    kept_columns,
    largest_pairs,
    positions_of,
    scatter_kept,
)


def random_parts(form: SparseCodec, rows: int, columns: int, seed: int) -> Kept:
    """Codes, positions and parameters that no fit would have given."""
    random = np.random.default_rng(seed)
    kept = kept_columns(columns)
    order = np.argsort(random.random((rows, kept // 2, 4)), axis=-1)[..., :2]
    groups = (rows, form.num_groups(columns))
    return Kept(
        codes=random.integers(0, 1 << form.bits, (rows, kept)).astype(np.uint8),
        positions=np.sort(order, axis=-1).reshape(rows, kept).astype(np.uint8),
        scales=random.standard_normal(groups).astype(np.float16),
        zeros=None if form.symmetric else random.integers(0, 1 << form.bits, groups).astype(np.uint8),
    )


@given(
    st.integers(2, 8), st.sampled_from([64, 128, 256]), st.booleans(), st.integers(1, 40), st.integers(1, 300),
    st.integers(0, 99),
)  # fmt: skip
def test_parts_come_back(bits: int, group: int, symmetric: bool, rows: int, columns: int, seed: int) -> None:
    form = SparseCodec(bits=bits, group=group, symmetric=symmetric)
    parts = random_parts(form, rows, columns, seed)
    packed = form.pack(parts, columns)
    check(packed)
    again = form.unpack(packed)
    np.testing.assert_array_equal(again.codes, parts.codes)
    np.testing.assert_array_equal(again.positions, parts.positions)
    np.testing.assert_array_equal(again.scales, parts.scales)
    if parts.zeros is not None:
        np.testing.assert_array_equal(again.zeros, parts.zeros)
    # value by value, in plain words
    values = form.decode(packed)
    for row, kept in ((0, 0), (rows - 1, parts.codes.shape[1] - 1)):
        column = kept // 2 * 4 + int(parts.positions[row, kept])
        zero = form.zero_code if parts.zeros is None else int(parts.zeros[row, column // group])
        if column < columns:
            expected = np.float32(parts.scales[row, column // group]) * (int(parts.codes[row, kept]) - zero)
            assert values[row, column] == expected
    assert (values != 0).sum() <= rows * parts.codes.shape[1]


def test_two_largest_of_four_are_kept() -> None:
    values = np.array([[1, -4, 2, 3, 5, 5, 5, 5, 0, 0, 0, 0, -1, 2]], np.float32)
    mask = largest_pairs(np.abs(values))
    expected = [[0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))
    positions = positions_of(mask)
    np.testing.assert_array_equal(positions, [[1, 3, 0, 1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(gather_kept(values, positions), [[-4, 3, 5, 5, 0, 0, -1, 2]])
    np.testing.assert_array_equal(
        scatter_kept(gather_kept(values, positions), positions, 14), np.where(mask, values, np.float32(0))
    )
    # a four with less than two keeps others beside it, in order
    np.testing.assert_array_equal(positions_of(np.array([[0, 0, 0, 1, 0, 0, 0, 0]], bool)), [[0, 3, 0, 1]])
    with pytest.raises(InputError, match="may be kept, not more"):
        positions_of(np.ones((1, 4), bool))


def test_three_bits_per_weight_of_the_matrix() -> None:
    """The card's figure: 2 + 1 bits for 4-bit codes, and a float16 per group."""
    weight = np.random.default_rng(0).standard_normal((256, 1024), np.float32)
    assert codec("sparse4").encode(weight).bits_per_value == 3 + 16 / 128
    assert codec("sparse2-g128").encode(weight).bits_per_value == 2 + 16 / 128
    assert codec("sparse8-g256-asym").encode(weight).bits_per_value == 5 + 24 / 256
    assert 16 / 3.1 < 16 / codec("sparse4-g256").encode(weight).bits_per_value < 16 / 3


def test_error_falls_with_bits_and_groups_keep_their_scales() -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((40, 512), np.float32) * np.repeat([1e-3, 1, 100, 1], 128).astype(np.float32)
    pruned = np.where(largest_pairs(np.abs(weight)), weight, 0)
    for asym in ("", "-asym"):
        errors = []
        for bits in range(2, 9):
            form = codec(f"sparse{bits}{asym}")
            decoded = form.decode(form.encode(weight))
            assert ((decoded != 0) <= (pruned != 0)).all()
            errors.append([float(np.square(part).sum()) for part in np.split(decoded - pruned, 4, axis=1)])
        assert (np.diff(np.array(errors), axis=0) < 0).all()


@given(st.integers(0, 2**16 - 1))
def test_damaged_positions_are_refused(word: int) -> None:
    form = codec("sparse4-g64")
    assert isinstance(form, SparseCodec)
    packed = form.encode(np.random.default_rng(0).standard_normal((16, 64), np.float32))
    buffers = {name: buffer.copy() for name, buffer in packed.buffers.items()}
    buffers["codes"][0, 0, 0, 256:258] = word & 255, word >> 8
    damaged = Packed(spec=packed.spec, shape=packed.shape, buffers=buffers)
    pairs = [((word >> s) & 3, (word >> (8 + s)) & 3) for s in (0, 2, 4, 6)]
    if all(first < second for first, second in pairs):
        check(damaged)
    else:
        with pytest.raises(InputError, match="positions of a pair must rise"):
            check(damaged)


@pytest.mark.parametrize("spec", ["sparse1", "sparse9", "sparse4-g32", "sparse4-g96", "sparse", "sparse4-rows"])
def test_what_it_is_not(spec: str) -> None:
    with pytest.raises(InputError, match="sparse"):
        codec(spec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_cannot_be_held(bad: float) -> None:
    weight = np.ones((3, 8), np.float32)
    weight[1, 2] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        codec("sparse4").encode(weight)
    with pytest.raises(InputError, match="overflows float16"):
        codec("sparse4").encode(np.full((1, 4), 1e9, np.float32))
