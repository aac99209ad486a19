"""Products with codebooks against the decoded matrix, on sizes that divide by nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.kernels import reference
from tests.kernels.codebooks import random_codebooks, with_tails
from tests.kernels.test_linear import activations, assert_close, product

SHAPES = [(1, 1), (16, 32), (37, 100), (130, 17), (129, 544), (70, 333)]
SPECS = [
    "vptq-v1-k4",
    "vptq-v2-k16-g3-ordered",
    "vptq-v3-k64-norm",
    "vptq-v4-k256-ordered",
    "vptq-v4-k16-r32-g2",
    "vptq-v5-k2048-o100v16k2",
    "vptq-v6-k4096-o10v4k256-ordered-norm",
    "vptq-v7-k2-o300v5k512",
    "vptq-v8-k256-r256-g5-ordered",
    "vptq-v8-k65536",
    "vptq-v8-k8192-r65536-ordered",  # 29 bits, which no vector unpacks
    "vptq-v12-k4096-r4096-g2-o20v4k64-ordered",
    "vptq-v13-k512-norm",
    "vptq-v16-k4096-r8192",
    "vptq-v1-k8-g2-b1",
    "vptq-v1-k8-b16-ordered",
    "vptq-v2-k16-r8-b6-o100v4k8-ordered-norm",
]


def decoded(packed: Packed) -> torch.Tensor:
    return torch.from_numpy(codec(packed.spec).decode(packed))


@pytest.mark.parametrize("spec", SPECS)
def test_products(spec: str, isa: str) -> None:
    for (rows, cols), tokens in zip(SHAPES * 2, (1,) * len(SHAPES) + (2, 21, 9, 33, 8, 5), strict=True):
        packed = random_codebooks(spec, (rows, cols), rows)
        weight, x = decoded(packed), torch.from_numpy(activations(tokens, cols))
        # scaled columns are added up apart from their offsets, which may cancel
        size = weight.abs() + (8 if "norm" in spec else 0)
        for exact in (False, True):
            got = product(x.numpy(), kernels.matrix(packed), exact=exact)
            assert_close(got, reference.linear(x, weight), x, size)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_decode_bit_for_bit_and_no_dense_copy_is_held(spec: str) -> None:
    for rows, cols in SHAPES:
        packed = random_codebooks(spec, (rows, cols))
        matrix = kernels.matrix(packed)
        assert (matrix.rows, matrix.cols, matrix.spec) == (rows, cols, packed.spec)
        assert matrix.nbytes == packed.nbytes
        ids, out = np.arange(rows)[::-1], np.empty((rows, cols), np.float32)
        np.testing.assert_array_equal(kernels.gather_rows(matrix, ids, out), decoded(packed).numpy()[::-1])


@pytest.mark.parametrize("spec", ["vptq-v3-k8-r8", "vptq-v12-k16-o100v5k8"])
def test_what_stands_behind_the_end_is_not_used(spec: str, isa: str) -> None:
    packed = random_codebooks(spec, (39, 45))
    for tokens in (1, 5):
        x = activations(tokens, 45)
        want = product(x, kernels.matrix(with_tails(packed, 1.0)))
        np.testing.assert_array_equal(product(x, kernels.matrix(with_tails(packed, np.nan))), want)


def test_one_call_with_matrices_that_read_the_input_in_other_ways(isa: str, threads: int) -> None:
    specs = ["vptq-v8-k256-ordered", "int4-g64", "vptq-v8-k256-ordered", "vptq-v4-k16-norm", "spqr3", "float16"]
    packed = [
        random_codebooks(spec, (40, 64), seed) if spec.startswith("vptq")
        else codec(spec).encode(np.random.default_rng(seed).standard_normal((40, 64)).astype(np.float32))
        for seed, spec in enumerate(specs)
    ]  # fmt: skip
    matrices = [kernels.matrix(each) for each in packed]
    for tokens in (1, 7):
        x = activations(tokens, 64)
        apart = [product(x, matrix).numpy() for matrix in matrices]
        outs = [np.empty((tokens, 40), np.float32) for _ in matrices]
        kernels.linear(x, matrices, outs)
        for one, other in zip(apart, outs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_biases_and_sums(isa: str) -> None:
    packed = random_codebooks("vptq-v6-k64-norm", (50, 30))
    x, bias = activations(3, 30), np.random.default_rng(0).standard_normal(50).astype(np.float32)
    plain = product(x, kernels.matrix(packed)).numpy()
    out = np.ones((3, 50), np.float32)
    kernels.linear(x, [kernels.matrix(packed)], [out], accumulate=True, biases=[bias])
    np.testing.assert_allclose(out, plain + bias + 1, rtol=1e-5, atol=1e-4)


def test_scratch_is_what_was_predicted() -> None:
    assert kernels.roundings("vptq-v8-k256") == ()
    assert kernels.roundings("vptq-v8-k256-ordered") == kernels.roundings("vptq-v8-k256-norm", exact=True) == (1,)


def test_the_process_holds_the_stored_bytes_and_no_more() -> None:
    """A matrix of 134 MB in floats: what products add to the process is their scratch, as predicted."""
    program = """
import numpy as np
from memwall import kernels
from memwall.formats import codec
from memwall.memory import resident_bytes
from memwall.plan.profile import random_packed
shape, spec = (8192, 4096), "vptq-v8-k256-ordered"
pool = np.zeros(codec(spec).nbytes(shape) + 256, np.uint8)
small = random_packed(spec, (64, 64), pool, np.random.default_rng(0))
kernels.linear(np.ones((5, 64), np.float32), [kernels.matrix(small)], [np.empty((5, 64), np.float32)])
packed = random_packed(spec, shape, pool, np.random.default_rng(0))
inputs = [np.ones((tokens, shape[1]), np.float32) for tokens in (1, 40)]
outs = [np.zeros((len(x), shape[0]), np.float32) for x in inputs]
before = resident_bytes()
matrix = kernels.matrix(packed)
for x, out in zip(inputs, outs):
    kernels.linear(x, [matrix], [out])
grown = resident_bytes() - before
scratch = kernels.predict_scratch_bytes(40, shape[1], group=1)
assert kernels.scratch_bytes() == scratch, (kernels.scratch_bytes(), scratch)
assert matrix.nbytes == packed.nbytes < 0.13 * shape[0] * shape[1]
assert grown < scratch + (4 << 20), (grown, scratch)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_arrays_of_other_shapes_are_refused() -> None:
    packed = random_codebooks("vptq-v4-k16-r16-ordered", (8, 40))
    for name, buffer in packed.buffers.items():
        short = Packed(spec=packed.spec, shape=packed.shape, buffers={**packed.buffers, name: buffer[:-1]})
        with pytest.raises((ValueError, InputError)):
            kernels.matrix(short)
