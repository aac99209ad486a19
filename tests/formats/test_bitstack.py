"""Blocks of signs and low-rank magnitudes: bytes, signs of any shape, and errors that never grow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.bitstack import (
    BitStackCodec,
    Block,
    block_bytes,
    blocks_of,
    first_blocks,
    pack_block,
    top_factors,
    unpack_block,
)

shapes = st.tuples(st.integers(1, 70), st.integers(1, 150))


def sample(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, rank=st.integers(1, 20), seed=st.integers(0, 999))
def test_a_block_survives_its_bytes(shape: tuple[int, int], rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    factors = (random.standard_normal((size, rank)).astype(np.float16) for size in shape)
    left, right = factors
    block = Block(positive=random.random(shape) < 0.5, left=left, right=right)
    data = pack_block(block)
    assert data.dtype == np.uint8
    assert len(data) == block_bytes(shape, rank) == shape[0] * -(-shape[1] // 8) + 2 * rank * sum(shape)
    again = unpack_block(data, shape, rank)
    for name in ("positive", "left", "right"):
        np.testing.assert_array_equal(getattr(again, name), getattr(block, name))


def test_bytes_by_hand() -> None:
    """Two rows of 67 columns: a panel of 64 and one of 3; the first column is the lowest bit."""
    positive = np.zeros((2, 67), bool)
    positive[0, 0] = positive[1, 63] = positive[1, 66] = True
    block = Block(positive=positive, left=np.ones((2, 1), np.float16), right=np.full((67, 1), 2, np.float16))
    data = pack_block(block)
    assert data[:4].tobytes() == np.ones(2, np.float16).tobytes()
    signs = data[4 + 134 :]
    assert signs[:16].tolist() == [1, *[0] * 7, *[0] * 7, 128]
    assert signs[16:].tolist() == [0, 0b100]
    decoded = block.decode()
    assert decoded[0, 0] == decoded[1, 66] == 2
    assert decoded[0, 1] == -2


@pytest.mark.parametrize(("rows", "columns", "rank"), [(4096, 4096, 16), (14336, 4096, 16)])
def test_the_papers_sizes(rows: int, columns: int, rank: int) -> None:
    nbytes = codec(f"bitstack-r{rank}-b3").nbytes((rows, columns))
    assert nbytes == 3 * (rows * columns // 8 + 2 * rank * (rows + columns))
    assert codec("bitstack-r16-b1").nbytes((4096, 4096)) == 2 * 1024**2 + 256 * 1024


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes, rank=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from([1e-8, 1e-3, 1.0, 1e3]),
    zeros=st.floats(0, 1),
)  # fmt: skip
def test_more_blocks_never_lose_more(shape: tuple[int, int], rank: int, seed: int, scale: float, zeros: float) -> None:
    weight = sample(shape, seed) * np.float32(scale)
    weight[np.random.default_rng(seed).random(shape) < zeros] = 0
    form = BitStackCodec(rank=rank, blocks=16)
    packed = form.encode(weight)
    size = float(np.linalg.norm(weight))
    last = size
    for count in range(1, 17):
        part = first_blocks(packed, count)
        error = float(np.linalg.norm(codec(part.spec).decode(part) - weight))
        assert error <= last + 1e-6 * size
        last = error


def test_magnitudes_are_closer_to_low_rank_than_the_matrix() -> None:
    """Absolute value decomposition against singular vectors of the signed matrix in as many bytes."""
    weight, rank = sample((256, 192)), 2
    sizes = block_bytes(weight.shape, rank)
    signed_rank = sizes // (2 * sum(weight.shape))
    left, right = top_factors(weight, signed_rank)
    (block,) = blocks_of(weight, rank, 1)
    assert np.linalg.norm(weight - block.decode()) < 0.8 * np.linalg.norm(weight - left @ right.T)


def test_the_iteration_finds_what_a_full_svd_does() -> None:
    magnitudes = np.abs(sample((300, 170)))
    u, sizes, v = np.linalg.svd(magnitudes, full_matrices=False)
    best = np.linalg.norm(magnitudes - (u[:, :16] * sizes[:16]) @ v[:16])
    left, right = top_factors(magnitudes, 16)
    assert np.linalg.norm(magnitudes - left @ right.T) < 1.005 * best
    # the root of the singular values on both sides: neither factor runs out of float16
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=0), rtol=1e-3)


def test_a_matrix_of_one_size_of_numbers_is_exact() -> None:
    """Signs times a constant have rank one magnitudes: one block holds them, whatever the signs."""
    weight = np.where(sample((40, 30)) < 0, -0.5, 0.5).astype(np.float32)
    packed = codec("bitstack-r1-b2").encode(weight)
    np.testing.assert_allclose(codec(packed.spec).decode(packed), weight, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    weight = sample((8, 8))
    weight[3, 4] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        codec("bitstack-r1-b1").encode(weight)


def test_numbers_too_large_are_refused() -> None:
    with pytest.raises(InputError, match="overflow"):
        codec("bitstack-r1-b1").encode(np.full((64, 64), 1e12, np.float32))


@pytest.mark.parametrize("spec", ["bitstack-r0-b1", "bitstack-r65-b1", "bitstack-r1-b0", "bitstack-r1-b17"])
def test_specs_out_of_range(spec: str) -> None:
    with pytest.raises(InputError):
        codec(spec)
    assert codec("bitstack").spec == "bitstack-r16-b16"
