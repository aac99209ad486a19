"""Products with stacks of sign blocks against the decoded matrix, on sizes that divide by nothing, on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kernels
from memwall.formats import Packed, codec
from memwall.formats.bitstack import Block, first_blocks, pack_block
from memwall.kernels import reference
from tests.kernels.test_linear import activations, assert_close, product

SHAPES = [(1, 1), (16, 64), (37, 100), (50, 17), (129, 544), (600, 71), (3, 260), (65, 8)]


def stacked(rows: int, cols: int, rank: int, blocks: int, seed: int = 0) -> Packed:
    """Blocks of random signs and factors: nothing that a decomposition would happen to make easy."""
    random = np.random.default_rng(seed)
    made = [
        Block(
            positive=random.random((rows, cols)) < 0.5,
            left=random.standard_normal((rows, rank)).astype(np.float16),
            right=random.standard_normal((cols, rank)).astype(np.float16),
        )
        for _ in range(blocks)
    ]
    buffers = {f"block{i}": pack_block(block) for i, block in enumerate(made)}
    return Packed(spec=f"bitstack-r{rank}-b{blocks}", shape=(rows, cols), buffers=buffers)


def size_of_terms(packed: Packed) -> torch.Tensor:
    """What bounds the rounding of a product: magnitudes of the blocks, and of the ranks in them, added up."""
    rank = int(packed.spec.split("-")[1][1:])
    total = np.zeros(packed.shape, np.float32)
    for block in packed.buffers.values():
        halves = block[: 2 * rank * sum(packed.shape)].view(np.float16).astype(np.float32)
        left, right = np.split(np.abs(halves), [rank * packed.shape[0]])
        total += left.reshape(-1, rank) @ right.reshape(-1, rank).T
    return torch.from_numpy(total)


@pytest.mark.parametrize(("rank", "blocks"), [(16, 2), (1, 16), (3, 1), (20, 2), (64, 1)])
def test_products(rank: int, blocks: int, isa: str) -> None:
    for shape in SHAPES:
        packed = stacked(*shape, rank, blocks)
        matrix, weight = kernels.matrix(packed), torch.from_numpy(codec(packed.spec).decode(packed))
        assert (matrix.rows, matrix.cols, matrix.nbytes) == (*shape, packed.nbytes)
        for tokens in (1, 4, 5, 21):
            x = torch.from_numpy(activations(tokens, shape[1]))
            want = reference.linear(x, weight)
            assert_close(product(x.numpy(), matrix), want, x, size_of_terms(packed))


def test_exact_products_are_the_same(isa: str) -> None:
    packed = stacked(37, 100, 4, 3)
    matrix = kernels.matrix(packed)
    for tokens in (1, 6):
        x = activations(tokens, 100)
        np.testing.assert_array_equal(product(x, matrix, exact=True), product(x, matrix))


def test_threads_change_nothing(isa: str, threads: int) -> None:
    packed = stacked(300, 200, 16, 2)
    x = activations(1, 200)
    found = product(x, kernels.matrix(packed))
    kernels.set_num_threads(1)
    np.testing.assert_array_equal(found, product(x, kernels.matrix(packed)))


def test_beside_other_forms(isa: str) -> None:
    """One call, one input, several forms."""
    random = np.random.default_rng(1)
    stack, dense = stacked(70, 96, 2, 3), random.standard_normal((40, 96), np.float32)
    packed = codec("int4-g32").encode(dense)
    for tokens in (1, 9):
        x = activations(tokens, 96)
        outs = [np.empty((tokens, rows), np.float32) for rows in (70, 40)]
        kernels.linear(x, [kernels.matrix(stack), kernels.matrix(packed)], outs)
        np.testing.assert_array_equal(outs[0], product(x, kernels.matrix(stack)))
        np.testing.assert_array_equal(outs[1], product(x, kernels.matrix(packed)))


def test_rows_are_decoded() -> None:
    packed = stacked(50, 70, 5, 3)
    found = np.empty((50, 70), np.float32)
    kernels.gather_rows(kernels.matrix(packed), np.arange(50), found)
    np.testing.assert_allclose(found, codec(packed.spec).decode(packed), rtol=1e-4, atol=1e-5)


def test_bias_and_accumulation(isa: str) -> None:
    packed = stacked(70, 33, 2, 2)
    matrix, x = kernels.matrix(packed), activations(1, 33)
    out, bias = np.ones((1, 70), np.float32), np.arange(70, dtype=np.float32)
    kernels.linear(x, [matrix], [out], accumulate=True, biases=[bias])
    np.testing.assert_allclose(out - 1 - bias, product(x, matrix), atol=1e-3)


def test_wrong_sizes_are_refused() -> None:
    packed = stacked(8, 8, 2, 2)
    short = Packed(spec=packed.spec, shape=(8, 9), buffers=packed.buffers)
    with pytest.raises(ValueError, match="another size"):
        kernels.matrix(short)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 140), cols=st.integers(1, 150), rank=st.integers(1, 18), blocks=st.integers(1, 4),
    tokens=st.integers(1, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(rows: int, cols: int, rank: int, blocks: int, tokens: int, seed: int) -> None:
    packed = stacked(rows, cols, rank, blocks, seed)
    count = 1 + seed % blocks
    part = first_blocks(packed, count)
    assert part.nbytes * blocks == packed.nbytes * count
    x, weight = torch.from_numpy(activations(tokens, cols)), torch.from_numpy(codec(part.spec).decode(part))
    assert_close(product(x.numpy(), kernels.matrix(part)), reference.linear(x, weight), x, size_of_terms(part))
