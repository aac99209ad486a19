"""Products with two of every four weights against the decoded matrix, on sizes that divide by nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.sparse import SparseCodec
from memwall.kernels import reference
from tests.formats.test_sparse import random_parts
from tests.kernels.test_linear import activations, assert_close, product

SHAPES = [(1, 1), (16, 128), (37, 100), (50, 17), (129, 544), (40, 300)]
SPECS = ["sparse2-g64", "sparse4-g128", "sparse8-g256", "sparse3-g128-asym", "sparse4-g64-asym", "sparse7-g256-asym"]


def sparse(rows: int, cols: int, spec: str, seed: int = 0) -> Packed:
    form = codec(spec)
    assert isinstance(form, SparseCodec)
    return form.pack(random_parts(form, rows, cols, seed), cols)


def decoded(packed: Packed) -> torch.Tensor:
    return torch.from_numpy(codec(packed.spec).decode(packed))


@pytest.mark.parametrize("spec", SPECS)
def test_products_with_rounded_activations(spec: str, isa: str) -> None:
    form = codec(spec)
    assert isinstance(form, SparseCodec)
    for seed, (rows, cols) in enumerate(SHAPES):
        packed = sparse(rows, cols, spec, seed)
        matrix, weight = kernels.matrix(packed), decoded(packed)
        # many tokens take the code of zero for what is pruned, and take its sums off again
        size = weight.abs() + float(np.abs(packed.buffers["scales"]).max()) * (1 << form.bits)
        for tokens in (1, 2, 9, 33):
            x = torch.from_numpy(activations(tokens, cols))
            rounded = reference.round_activations(x, form.group)
            assert_close(product(x.numpy(), matrix), reference.linear(rounded, weight), rounded, size)


@pytest.mark.parametrize("spec", SPECS)
def test_exact_products(spec: str, isa: str) -> None:
    for seed, (rows, cols) in enumerate(SHAPES):
        packed = sparse(rows, cols, spec, seed)
        for tokens in (1, 9):
            x = torch.from_numpy(activations(tokens, cols))
            found = product(x.numpy(), kernels.matrix(packed), exact=True)
            assert_close(found, reference.linear(x, decoded(packed)), x, decoded(packed))


@pytest.mark.parametrize("spec", SPECS)
def test_decoding_is_that_of_the_codec_bit_for_bit(spec: str, isa: str) -> None:
    """By rows, and through the panel: a product with the unit matrix adds zeros only."""
    packed = sparse(50, 170, spec)
    weight, matrix = codec(spec).decode(packed), kernels.matrix(packed)
    found = np.empty((50, 170), np.float32)
    kernels.gather_rows(matrix, np.arange(50), found)
    np.testing.assert_array_equal(found, weight)
    np.testing.assert_array_equal(product(np.eye(170, dtype=np.float32), matrix, exact=True).numpy().T, weight)


def test_forms_of_other_groups_share_a_call(threads: int) -> None:
    x = torch.from_numpy(activations(5, 260))
    specs = ["sparse4-g256", "int4-g64", "sparse2-g64-asym", "float32", "int4-g128", "sparse4-g128", "int4-g32"]
    dense = np.random.default_rng(0).standard_normal((33, 260), np.float32)
    parts = [sparse(40 + i, 260, s, i) if s[:2] == "sp" else codec(s).encode(dense) for i, s in enumerate(specs)]
    matrices = [kernels.matrix(part) for part in parts]
    for tokens in (1, 5):
        outs = [np.empty((tokens, part.shape[0]), np.float32) for part in parts]
        kernels.linear(x.numpy()[:tokens], matrices, outs)
        for matrix, out in zip(matrices, outs, strict=True):
            np.testing.assert_array_equal(out, product(x.numpy()[:tokens], matrix).numpy())


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_held_are_those_of_the_form_and_scratch_is_predicted(spec: str) -> None:
    packed = sparse(100, 700, spec)
    form = codec(spec)
    assert isinstance(form, SparseCodec)
    assert kernels.matrix(packed).nbytes == packed.nbytes == form.nbytes((100, 700))
    assert kernels.roundings(spec) == (form.group,)
    assert kernels.roundings(spec, exact=True) == ()


def test_damaged_positions_and_wrong_shapes_are_refused() -> None:
    packed = sparse(20, 64, "sparse4-g64")
    buffers = {key: buffer.copy() for key, buffer in packed.buffers.items()}
    buffers["codes"][1, 0, 0, 256:258] = 255
    with pytest.raises(InputError, match="positions of a pair must rise"):
        kernels.matrix(Packed(spec=packed.spec, shape=packed.shape, buffers=buffers))
    with pytest.raises(ValueError, match="another shape"):
        kernels.matrix(Packed(spec=packed.spec, shape=(20, 65), buffers=packed.buffers))
