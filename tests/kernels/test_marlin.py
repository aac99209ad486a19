"""MARLIN's bytes against its published permutation, in other words; and the way from integers to half floats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.kernels import marlin

QUICK = settings(max_examples=30, deadline=None, derandomize=True)


def published_permutation() -> np.ndarray:
    """Of 1024 codes of four tiles, tile after tile: index by index, as the authors' repository lists them."""
    order = []
    for thread in range(32):
        column, pair = divmod(thread, 4)
        for word in range(4):
            rows = [2 * pair, 2 * pair + 1, 2 * pair + 8, 2 * pair + 9]
            values = [256 * word + 16 * row + column + 8 * block for block in (0, 1) for row in rows]
            order.extend(values[i] for i in (0, 2, 4, 6, 1, 3, 5, 7))
    return np.array(order)


def published_words(codes: np.ndarray) -> np.ndarray:
    size_k, size_n = codes.shape
    tiles = codes.reshape(size_k // 16, 16, size_n // 16, 16).transpose(0, 2, 1, 3).reshape(-1, 1024)
    nibbles = tiles[:, published_permutation()].astype(np.uint64).reshape(-1, 8)
    words = sum(nibbles[:, i] << np.uint64(4 * i) for i in range(8))
    return np.asarray(words).astype(np.uint32).view(np.int32).reshape(size_k // 16, 2 * size_n)


@QUICK
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 999))
def test_codes_are_packed_as_published_and_come_back(tiles: int, fragments: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (16 * tiles, 64 * fragments)).astype(np.uint8)
    words = marlin.pack_codes(codes)
    assert words.nbytes == codes.size // 2
    np.testing.assert_array_equal(words, published_words(codes))
    np.testing.assert_array_equal(marlin.unpack_codes(words), codes)


def test_one_thread_by_hand() -> None:
    """Thread 5 is column 1 and rows 2, 3, 10, 11; its third word is of the third tile."""
    codes = np.arange(16 * 64).reshape(16, 64) % 15
    word = int(marlin.pack_codes(codes.astype(np.uint8)).view(np.uint32)[0, 5 * 4 + 2])
    rows = (2, 3, 10, 11)
    v = [int(codes[row, 2 * 16 + 1 + 8 * block]) for block in (0, 1) for row in rows]
    assert [(word >> 4 * i) & 15 for i in range(8)] == [v[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert word & 0x000F000F == v[0] | v[1] << 16
    assert word & 0x00F000F0 == v[2] << 4 | v[3] << 20
    assert (word >> 8) & 0x000F000F == v[4] | v[5] << 16
    assert (word >> 8) & 0x00F000F0 == v[6] << 4 | v[7] << 20


def test_scales_are_permuted_as_published_and_come_back() -> None:
    scales = np.random.default_rng(0).random((3, 256)).astype(np.float16)
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    np.testing.assert_array_equal(
        marlin.permute_scales(scales), scales.reshape(-1, 64)[:, grouped].reshape(scales.shape)
    )
    np.testing.assert_array_equal(
        marlin.permute_scales(scales[:1]), scales[:1].reshape(-1, 32)[:, single].reshape(1, 256)
    )
    for part in (scales, scales[:1]):
        np.testing.assert_array_equal(marlin.restore_scales(marlin.permute_scales(part)), part)


def test_integers_become_half_floats_without_conversion() -> None:
    """All 16 codes at all eight places, bit for bit."""
    for nibble in range(8):
        words = (np.arange(16, dtype=np.uint32) << np.uint32(4 * nibble)).view(np.int32)
        found = marlin.dequantize_words(words)  # [16, block, (half, low)]
        low, block, half = nibble // 4, nibble // 2 % 2, nibble % 2
        np.testing.assert_array_equal(found[:, block, 2 * half + low], np.arange(-8, 8, dtype=np.float16))
        found[:, block, 2 * half + low] = -8
        assert (found == -8).all()  # all other places hold the code 0


@pytest.mark.parametrize(("spec", "bits"), [("int4-g128", 4.125), ("int4-g64", 4.25)])
def test_tiles_of_the_cpu_carry_over_and_back(spec: str, bits: float) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 384), np.float32)
    packed = codec(spec).encode(weight)
    held = marlin.from_packed(packed)
    assert held.shape == (384, 256)
    assert 8 * held.nbytes / weight.size == bits
    np.testing.assert_array_equal(marlin.decode(held).T, codec(spec).decode(packed))
    again = marlin.to_packed(held)
    assert again.spec == spec
    for name, buffer in packed.buffers.items():
        np.testing.assert_array_equal(again.buffers[name], buffer)


def test_one_group_of_all() -> None:
    random = np.random.default_rng(0)
    codes, scales = random.integers(0, 16, (256, 64)).astype(np.uint8), random.random((1, 64)).astype(np.float16)
    held = marlin.pack(codes, scales)
    assert held.group == 256
    assert held.nbytes == codes.size // 2 + 2 * 64
    packed = marlin.to_packed(held)
    assert packed.spec == "int4-g128"
    np.testing.assert_array_equal(codec(packed.spec).decode(packed).T, marlin.decode(held))


def test_what_it_does_not_pack() -> None:
    with pytest.raises(InputError, match="a multiple of 16 and N of 64"):
        marlin.pack_codes(np.zeros((24, 64), np.uint8))
    with pytest.raises(InputError, match="got a code of 16"):
        marlin.pack_codes(np.full((16, 64), 16, np.uint8))
    with pytest.raises(InputError, match="do not go with codes"):
        marlin.pack(np.zeros((32, 64), np.uint8), np.ones((3, 64), np.float16))
    for spec in ("int4-g128-asym", "int3-g128", "nf4"):
        with pytest.raises(InputError, match="is not MARLIN's"):
            marlin.from_packed(codec(spec).encode(np.ones((64, 128), np.float32)))
    with pytest.raises(InputError, match="whole one"):
        marlin.from_packed(codec("int4-g128").encode(np.ones((64, 96), np.float32)))
