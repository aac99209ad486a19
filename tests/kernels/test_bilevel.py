"""Products with bilevel tiles and sparse outliers against the decoded matrix, on sizes that divide by nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.spqr import Outliers, pack, unpack
from memwall.kernels import reference
from tests.kernels.test_linear import activations, assert_close, product

SHAPES = [(1, 1), (16, 32), (37, 100), (50, 17), (129, 544), (40, 47)]


def bilevel(rows: int, cols: int, bits: int, *, share: float = 0.02, ordered: bool = True, seed: int = 0) -> Packed:
    """A matrix with outliers, some rows without any and one row of nothing else, in a random order of columns."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, cols), np.float32)
    parts = unpack(codec(f"spqr{bits}").encode(weight))
    kept = random.random((rows, cols)) < share
    if share:
        kept[0], kept[-1] = True, share == 1
        kept[0, 0] = True
    where = np.nonzero(kept)
    outliers = Outliers(rows=where[0], places=where[1], values=random.standard_normal(len(where[0])).astype(np.float16))
    order = random.permutation(cols) if ordered else None
    return pack(bits, replace(parts, outliers=outliers if len(where[0]) else None, order=order))


def decoded(packed: Packed) -> torch.Tensor:
    return torch.from_numpy(codec(packed.spec).decode(packed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("share", "ordered"), [(0.02, True), (0.0, False), (0.3, False), (0.0, True)])
def test_products_with_rounded_activations(bits: int, share: float, ordered: bool, isa: str) -> None:
    for (rows, cols), tokens in zip(SHAPES * 2, (1,) * len(SHAPES) + (2, 21, 9, 33, 8, 5), strict=True):
        packed = bilevel(rows, cols, bits, share=share, ordered=ordered)
        parts, weight = unpack(packed), decoded(packed)
        x = torch.from_numpy(activations(tokens, cols))
        order = np.arange(cols) if parts.order is None else parts.order
        rounded = torch.empty_like(x)
        rounded[:, order] = reference.round_activations(x[:, order], 16)  # outliers meet activations as they are
        dense = pack(bits, replace(parts, outliers=None))
        sparse = weight - decoded(dense)
        want = reference.linear(rounded, decoded(dense)) + reference.linear(x, sparse)
        assert_close(product(x.numpy(), kernels.matrix(packed)), want, x, decoded(dense).abs() + 8 + sparse.abs())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_exact_products(bits: int, isa: str) -> None:
    for rows, cols in SHAPES:
        packed = bilevel(rows, cols, bits)
        matrix, weight = kernels.matrix(packed), decoded(packed)
        for tokens in (1, 2, 9):
            x = torch.from_numpy(activations(tokens, cols))
            assert_close(product(x.numpy(), matrix, exact=True), reference.linear(x, weight), x, weight)


@pytest.mark.parametrize("ordered", [True, False])
def test_rows_are_decoded_bit_for_bit(ordered: bool) -> None:
    for bits in range(2, 9):
        packed = bilevel(50, 70, bits, ordered=ordered)
        found = np.empty((50, 70), np.float32)
        kernels.gather_rows(kernels.matrix(packed), np.arange(50), found)
        np.testing.assert_array_equal(found, codec(packed.spec).decode(packed))


def test_more_than_65536_columns(isa: str) -> None:
    packed = bilevel(3, 70_001, 3, share=0.001)
    assert packed.buffers["outlier_columns"].dtype == packed.buffers["order"].dtype == np.uint32
    assert int(packed.buffers["outlier_columns"].max()) > 65_536
    matrix, weight = kernels.matrix(packed), decoded(packed)
    for tokens in (1, 3):
        x = torch.from_numpy(activations(tokens, 70_001))
        want = reference.linear(x, weight)
        for exact, bound in ((True, 1e-4), (False, 2e-2)):
            error = (product(x.numpy(), matrix, exact=exact) - want).abs().max() / want.abs().max()
            assert error < bound


def test_matrices_of_other_orders_and_forms_share_a_call(threads: int) -> None:
    x = torch.from_numpy(activations(5, 160))
    parts = [bilevel(40 + i, 160, 3 + i % 2, seed=i % 3, ordered=i % 4 != 3) for i in range(7)]
    parts.insert(2, codec("int4-g64").encode(np.random.default_rng(0).standard_normal((33, 160), np.float32)))
    parts.append(codec("float32").encode(np.random.default_rng(0).standard_normal((70, 160), np.float32)))
    outs = [np.empty((5, part.shape[0]), np.float32) for part in parts]
    matrices = [kernels.matrix(part) for part in parts]
    kernels.linear(x.numpy(), matrices, outs, exact=True)
    for part, out in zip(parts, outs, strict=True):
        assert_close(torch.from_numpy(out), reference.linear(x, decoded(part)), x, decoded(part))
    alone, together = [], []
    for matrix in matrices:
        alone.append(product(x.numpy()[:1], matrix).numpy())
        together.append(np.empty((1, matrix.rows), np.float32))
    kernels.linear(x.numpy()[:1], matrices, together)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bytes_held_are_those_of_the_form_and_scratch_is_predicted() -> None:
    packed = bilevel(100, 700, 3)
    assert kernels.matrix(packed).nbytes == packed.nbytes == codec(packed.spec).nbytes(packed.shape)
    assert kernels.roundings("spqr3-ordered") == (16, 1)
    assert kernels.roundings("spqr3-ordered", exact=True) == (1,)
    panels = kernels.predict_scratch_bytes(64, 700, group=0)
    assert kernels.predict_scratch_bytes(64, 700, group=1) - panels == 64 * 700 * 4
    # codes, a scale and a sum per group, and the tokens by columns
    assert kernels.predict_scratch_bytes(64, 700, group=16) - panels == 64 * (704 + 8 * 44) + 64 * 700 * 4
    x, out = activations(64, 700), np.empty((64, 100), np.float32)
    kernels.linear(x, [kernels.matrix(packed)], [out])
    assert kernels.scratch_bytes() >= panels + 64 * (704 + 8 * 44) + 2 * 64 * 700 * 4


def test_indices_that_point_outside_are_refused() -> None:
    packed = bilevel(20, 40, 3)
    for name, spoil, complaint in (
        ("order", lambda b: b.__setitem__(0, b[1]), "does not name each column once"),
        ("row_offsets", lambda b: b.__setitem__(1, 60_000), "must rise"),
        ("outlier_columns", lambda b: b.__setitem__(3, 40), "stay inside"),
        ("outlier_columns", lambda b: b.__setitem__(2, b[1]), "rise within a row"),
    ):
        buffers = {key: buffer.copy() for key, buffer in packed.buffers.items()}
        spoil(buffers[name])
        with pytest.raises(InputError, match=complaint):
            kernels.matrix(Packed(spec=packed.spec, shape=packed.shape, buffers=buffers))
