"""Frozen packed matrices inside torch's autograd: the gradient passes through them, and no float copy of them exists.

Forward is the CPU engine's own product, which decodes a panel at a time; backward decodes a few rows at a time into one
slab and multiplies the gradient with it. Neither pass saves the input or any weight: what autograd keeps of such a
layer is a reference to the packed matrix. There is no gradient for the weights.

Source: "INT2.1: Towards Fine-Tunable Quantized LLMs with Error Correction through Low-Rank Adaptation" (Yuji Chai,
2023, arXiv 2306.08162), section 3.1 (EMEF).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memwall import kernels
from memwall.kernels import Matrix

SLAB_VALUES = 1 << 18
"""Weights that are decoded at once: one mebibyte, which stays in the cache."""


class _Product(torch.autograd.Function):
    """x [tokens, cols] float32 -> x W^T [tokens, rows]; the gradient of x is grad W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return product(x, matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return input_gradient(grads[0], ctx.matrix), None


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x [tokens, cols] @ W^T in float arithmetic, [tokens, rows] float32."""
    out = torch.empty(len(x), matrix.rows)
    if len(x):
        kernels.linear(x.detach().contiguous().numpy(), [matrix], [out.numpy()], exact=True)
    return out


def input_gradient(grad: Tensor, matrix: Matrix) -> Tensor:
    """grad [tokens, rows] @ W, [tokens, cols] float32; a slab of W's rows is decoded at a time."""
    grad = grad.detach()
    out = torch.zeros(len(grad), matrix.cols)
    step = slab_rows(matrix)
    slab = torch.empty(step, matrix.cols)
    for start in range(0, matrix.rows, step):
        stop = min(start + step, matrix.rows)
        rows = slab[: stop - start]
        kernels.gather_rows(matrix, np.arange(start, stop), rows.numpy())
        out.addmm_(grad[:, start:stop], rows)
    return out


def slab_rows(matrix: Matrix) -> int:
    """Rows decoded at once."""
    return max(min(SLAB_VALUES // max(matrix.cols, 1), matrix.rows), 1)


def row_squares(layer: nn.Module) -> Tensor:
    """Sum of squares of each row of a linear layer's weight, frozen or plain: float32 [out]."""
    if not isinstance(layer, FrozenLinear):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.detach().float().square().sum(1)
    matrix = layer.matrix
    out, step = torch.empty(matrix.rows), slab_rows(matrix)
    slab = torch.empty(step, matrix.cols)
    for start in range(0, matrix.rows, step):
        rows = slab[: min(step, matrix.rows - start)]
        kernels.gather_rows(matrix, np.arange(start, start + len(rows)), rows.numpy())
        out[start : start + len(rows)] = rows.square().sum(1)
    return out


class FrozenLinear(nn.Module):
    """A linear layer over a packed matrix that stays as it is. x [..., cols] float32 -> [..., rows]."""

    bias: Tensor | None

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = _Product.apply(x.reshape(-1, self.matrix.cols), self.matrix)
        out = flat.view(*x.shape[:-1], self.matrix.rows)
        return out if self.bias is None else out + self.bias


class FrozenEmbedding(nn.Module):
    """Rows of a packed table as float32. ids [...] -> [..., cols]."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        out = torch.empty(ids.numel(), self.matrix.cols)
        kernels.gather_rows(self.matrix, ids.reshape(-1).numpy(), out.numpy())
        return out.view(*ids.shape, self.matrix.cols)
