"""Frozen packed products in autograd: the gradients of a dense layer, and no float copy of a weight."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.formats import codec
from memwall.kernels.torch_frozen import FrozenEmbedding, FrozenLinear, input_gradient, slab_rows

SPECS = ("int2-g64-asym", "int3-g32-asym", "int4-g64", "int8-g128", "nf4-dq", "irnf4", "e2m1", "float16", "float32")


def pair(spec: str, rows: int, columns: int) -> tuple[kernels.Matrix, torch.Tensor]:
    """A packed matrix and the floats that it decodes to."""
    packed = kernels.encode(spec, np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32))
    return kernels.matrix(packed), torch.from_numpy(codec(spec).decode(packed).astype(np.float32))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(7, 48, 96), (33, 100, 200), (1, 16, 64)])
def test_output_and_gradient_are_those_of_a_dense_layer(spec: str, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    matrix, dense = pair(spec, rows, columns)
    random = torch.Generator().manual_seed(1)
    bias = torch.randn(rows, generator=random)
    x = torch.randn(2, tokens, columns, generator=random, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    y, expected = FrozenLinear(matrix, bias)(x), torch.nn.functional.linear(again, dense, bias)
    slope = torch.randn(expected.shape, generator=random)
    y.backward(slope)
    expected.backward(slope)
    assert again.grad is not None
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-4)


def test_gradient_in_several_slabs() -> None:
    matrix, dense = pair("int2-g64-asym", 1000, 1024)
    assert slab_rows(matrix) < 1000
    slope = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(input_gradient(slope, matrix), slope @ dense, rtol=1e-5, atol=1e-3)


def test_gradient_against_finite_differences() -> None:
    matrix, _ = pair("int3-g32-asym", 24, 64)
    layer = FrozenLinear(matrix)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(3, 64, generator=random, requires_grad=True)
    along = torch.randn(3, 64, generator=random)
    layer(x).square().sum().backward()
    assert x.grad is not None
    step = 1e-2
    ends = [layer(x.detach() + sign * step * along).double().square().sum().item() for sign in (1, -1)]
    assert (x.grad * along).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)


def test_nothing_is_saved_for_the_way_back() -> None:
    """Autograd keeps neither the input nor a weight, and no tensor of the weight's shape is alive after a pass."""
    matrix = pair("int4-g64", 96, 160)[0]
    layer = FrozenLinear(matrix)
    saved: list[torch.Tensor] = []
    x = torch.ones(4, 160, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not saved
    y.sum().backward()
    gc.collect()
    shapes = [tuple(each.shape) for each in gc.get_objects() if type(each) is torch.Tensor]
    assert (96, 160) not in shapes
    assert (160, 96) not in shapes


def test_embedding() -> None:
    matrix, dense = pair("int4-g64", 50, 64)
    ids = torch.tensor([[3, 49], [0, 3]])
    torch.testing.assert_close(FrozenEmbedding(matrix)(ids), dense[ids])
