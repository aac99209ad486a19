"""Products with sign-and-mask weights against the decoded matrix, on sizes that divide by nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.sign_mask import BillmCodec, Bits, PbLlmCodec
from memwall.kernels import reference
from tests.kernels.test_linear import activations, assert_close, product

SHAPES = [(1, 1), (16, 128), (37, 100), (50, 17), (129, 544), (40, 300)]
SPECS = ["billm", "pbllm-s100", "pbllm-s0", "pbllm-s1000", "pbllm-s500"]


def masked(rows: int, cols: int, spec: str, seed: int = 0) -> Packed:
    """Random bits and parameters: every count of salient columns, whatever a fit would have given."""
    random = np.random.default_rng(seed)
    form = codec(spec)
    if isinstance(form, PbLlmCodec):
        return form.encode(random.standard_t(3, (rows, cols)).astype(np.float32))
    assert isinstance(form, BillmCodec)
    signs, masks = random.random((2, rows, cols)) < 0.4
    params = random.standard_normal((rows, -(-cols // 128), 7)).astype(np.float32)
    salient = np.array([random.integers(0, min(50, block.stop - block.start) + 1) for block in form.blocks(cols)])
    return form.pack(Bits(signs=signs, masks=masks, params=params), salient, random.permutation(cols))


def decoded(packed: Packed) -> torch.Tensor:
    return torch.from_numpy(codec(packed.spec).decode(packed))


@pytest.mark.parametrize("spec", SPECS)
def test_one_token_with_rounded_activations(spec: str, isa: str) -> None:
    for seed, (rows, cols) in enumerate(SHAPES):
        packed = masked(rows, cols, spec, seed)
        weight, x = decoded(packed), torch.from_numpy(activations(1, cols))
        order = packed.buffers["order"].astype(np.int64) if "order" in packed.buffers else np.arange(cols)
        rounded = torch.empty_like(x)
        rounded[:, order] = reference.round_activations(x[:, order], 128)
        # parameters may nearly cancel in a weight, and steps are worth up to 255 of theirs
        size = weight.abs() + (8.0 if spec == "billm" else float(weight.abs().max()))
        assert_close(product(x.numpy(), kernels.matrix(packed)), reference.linear(rounded, weight), rounded, size)


@pytest.mark.parametrize("spec", SPECS)
def test_several_tokens_and_exact_products(spec: str, isa: str) -> None:
    for seed, (rows, cols) in enumerate(SHAPES):
        packed = masked(rows, cols, spec, seed)
        matrix, weight = kernels.matrix(packed), decoded(packed)
        for tokens, exact in ((1, True), (2, False), (9, True), (33, False)):
            x = torch.from_numpy(activations(tokens, cols))
            assert_close(product(x.numpy(), matrix, exact=exact), reference.linear(x, weight), x, weight)


@pytest.mark.parametrize("spec", SPECS)
def test_decoding_is_that_of_the_codec_bit_for_bit(spec: str, isa: str) -> None:
    """By rows, and through the panel: a product with the unit matrix adds zeros only."""
    packed = masked(50, 170, spec)
    weight, matrix = codec(spec).decode(packed), kernels.matrix(packed)
    found = np.empty((50, 170), np.float32)
    kernels.gather_rows(matrix, np.arange(50), found)
    np.testing.assert_array_equal(found, weight)
    np.testing.assert_array_equal(product(np.eye(170, dtype=np.float32), matrix, exact=True).numpy().T, weight)


def test_matrices_of_other_orders_and_forms_share_a_call(threads: int) -> None:
    x = torch.from_numpy(activations(5, 160))
    specs = ["billm", "spqr3-ordered", "pbllm-s100", "int4-g64", "billm", "float32", "pbllm-s143", "spqr3", "int4-g128"]
    dense = np.random.default_rng(0).standard_normal((33, 160), np.float32)
    parts = [
        masked(40 + i, 160, s, i) if s[:2] in ("bi", "pb") else codec(s).encode(dense) for i, s in enumerate(specs)
    ]
    matrices = [kernels.matrix(part) for part in parts]
    outs = [np.empty((5, part.shape[0]), np.float32) for part in parts]
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


def test_more_than_65536_columns() -> None:
    packed = masked(3, 65_700, "billm")
    assert packed.buffers["order"].dtype == np.uint32
    x = torch.from_numpy(activations(2, 65_700))
    assert_close(product(x.numpy(), kernels.matrix(packed)), reference.linear(x, decoded(packed)), x, decoded(packed))


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_held_are_those_of_the_form_and_scratch_is_predicted(spec: str) -> None:
    packed = masked(100, 700, spec)
    assert kernels.matrix(packed).nbytes == packed.nbytes == codec(spec).nbytes((100, 700))
    assert kernels.roundings(spec) == ((2, 1) if spec == "billm" else (2,))
    assert kernels.roundings(spec, exact=True) == ((1,) if spec == "billm" else ())
    panels = kernels.predict_scratch_bytes(64, 700, group=0)
    assert kernels.predict_scratch_bytes(64, 700, group=2) - panels == 768 + 64  # one token's codes, scales and sums


def test_indices_that_point_outside_are_refused() -> None:
    for spec, name, spoil, complaint in (
        ("billm", "order", lambda b: b.__setitem__(0, b[1]), "does not name each column once"),
        ("billm", "salient", lambda b: b.__setitem__(0, 129), "more columns than a block"),
        ("pbllm-s100", "starts", lambda b: b.__setitem__((0, 0), 7), "do not go with the mask"),
        ("pbllm-s100", "codes", lambda b: b.__setitem__((0, 0, 0, 0), b[0, 0, 0, 0] ^ 2), "do not go with the mask"),
    ):
        packed = masked(20, 40, spec)
        buffers = {key: buffer.copy() for key, buffer in packed.buffers.items()}
        spoil(buffers[name])
        with pytest.raises(InputError, match=complaint):
            kernels.matrix(Packed(spec=packed.spec, shape=packed.shape, buffers=buffers))
