"""Streams of bits: what goes in comes out, and bits lie where the text says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.formats.streams import pack_stream, stream_words, unpack_stream


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 32), st.integers(0, 4), st.integers(0, 140), st.integers(0, 2**32 - 1))
def test_round_trip(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), np.uint32)
    packed = pack_stream(codes, bits)
    assert packed.shape == (rows, stream_words(count, bits))
    assert packed.dtype == np.uint32
    np.testing.assert_array_equal(unpack_stream(packed, count, bits), codes)
    behind = np.concatenate([packed, np.full((rows, 3), 0xFFFFFFFF, np.uint32)], axis=1)
    np.testing.assert_array_equal(unpack_stream(behind, count, bits), codes)


@pytest.mark.parametrize("bits", [1, 5, 12, 13, 24, 25, 31, 32])
def test_bits_lie_where_the_text_says(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 37), np.uint32)
    for row, packed in zip(codes, pack_stream(codes, bits), strict=True):
        whole = sum(int(code) << (bits * i) for i, code in enumerate(row))
        words = [whole >> (32 * i) & 0xFFFFFFFF for i in range(len(packed))]
        assert packed.tolist() == words
