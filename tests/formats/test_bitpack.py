"""Bit packing: every width, odd lengths, both layouts, and the tile layout byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.formats import bitpack

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@QUICK
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_rows_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), np.uint8)
    stream = bitpack.pack_rows(codes, bits)
    assert stream.dtype == np.uint8
    assert stream.shape == (rows, bitpack.row_bytes(columns, bits))
    np.testing.assert_array_equal(bitpack.unpack_rows(stream, columns, bits), codes)
    tensor = bitpack.pack_rows(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(tensor.numpy(), stream)
    np.testing.assert_array_equal(bitpack.unpack_rows(tensor, columns, bits).numpy(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_a_little_endian_bit_stream(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 13, np.uint8)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    expected = np.frombuffer(number.to_bytes(bitpack.row_bytes(13, bits), "little"), np.uint8)
    np.testing.assert_array_equal(bitpack.pack_rows(codes, bits), expected)


@QUICK
@given(
    st.integers(2, 8), st.integers(1, 3), st.sampled_from([32, 64, 128]), st.integers(1, 3), st.integers(0, 2**32 - 1)
)
def test_tiles_round_trip(bits: int, row_tiles: int, group: int, groups: int, seed: int) -> None:
    shape = (16 * row_tiles, group * groups)
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape, np.uint8)
    packed = bitpack.pack_tiles(codes, bits, group)
    assert packed.shape == (row_tiles, groups, group // 32, 64 * bits)
    assert packed.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(bitpack.unpack_tiles(packed, bits, group), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_tile_bytes_follow_the_written_layout(bits: int) -> None:
    """A slow reference: every code looked up plane by plane where the layout's text says it is."""
    group = 64
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (32, 128), np.uint8)
    packed = bitpack.pack_tiles(codes, bits, group)
    for row, column in np.random.default_rng(0).integers(0, (32, 128), (200, 2)):
        unit, block = (column % group) // 32, (column % 32) // 4
        found, low = 0, 0
        for width in bitpack.PLANES[bits]:
            vector, i = divmod(block, 8 // width)
            byte = packed[row // 16, column // group, unit, (low + vector) * 64 + 4 * (row % 16) + column % 4]
            found |= ((int(byte) >> (width * i)) & ((1 << width) - 1)) << low
            low += width
        assert found == codes[row, column]
