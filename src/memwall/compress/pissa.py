"""PiSSA: adapters that begin as the strongest part of each weight, so that training moves what matters most.

Source: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models" (Fanxu Meng, 2024,
arXiv 2404.02948), section 3; the result is written as PEFT converts it to plain LoRA.

Idea: W = U S V^T. B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T are trained, and the rest of W stays as it is. So nothing
changes at the start, and gradients are large from the first step, where LoRA's A has none.
Units and shapes: y = (W - s B0 A0) x + s B A dropout(x) with s B0 A0 the first r terms of W, A [rank, in], B [out,
rank]; result: a plain adapter of rank 2 r that adds s (B A - B0 A0), by stacking.
Differs from the paper: the rest of W is not made, let alone packed: W x - s B0 (A0 x) is the same product, over any
base, which needs no second copy and starts from exactly no change. So what a packed base lost it has lost (the paper
packs the rest alone, which is a little nearer). Singular vectors come from subspace iteration over products with the
packed base (`sweeps` of them; PEFT's `pissa_niter_16` does so too); exact where rank + 8 reaches the narrower side.
Cost: A0 and B0 beside LoRA's 16 bytes per adapter weight, 4 each; the result has twice the rank.
Holds when: rank is at most 256, and at most the narrower side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memwall.compress.lora import Lora
from memwall.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memwall.models.lora import LoraWeights
    from memwall.models.torch_lora import LoraLinear, Place

MORE_VECTORS = 8
"""Carried beside the wanted ones while they are found."""


@dataclass(frozen=True, kw_only=True)
class Pissa(Lora):
    """alpha is the rank's default, a scale of 1, as the paper has it. sweeps: of the subspace iteration."""

    name: ClassVar[str] = "pissa"
    most_rank: ClassVar[int] = 256
    stacked: ClassVar[int] = 2

    alpha: float = 8.0
    sweeps: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 0 or self.sweeps < 1:
            raise InputError(f"settings alpha={self.alpha:g}, sweeps={self.sweeps}: both must be above 0")

    def linear(self, base: nn.Module, shape: tuple[int, int], place: Place) -> LoraLinear:
        if self.rank > min(shape):
            raise InputError(f"setting rank={self.rank}: a weight of {shape[1]} x {shape[0]} has {min(shape)} at most")
        return _pissa_linear(self.sweeps)(base, shape, self.rank, self.scale, self.dropout, place)

    def held_shapes(self, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(self.rank, shape[0]), (shape[1], self.rank)]


def _pissa_linear(sweeps: int) -> type[LoraLinear]:
    """The class below needs torch, which only training imports."""
    import torch

    from memwall.models.torch_lora import LoraLinear

    class PissaLinear(LoraLinear):
        """An adapter with its own first values taken off."""

        def __init__(
            self, base: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float, place: Place
        ) -> None:
            super().__init__(base, shape, rank, scale, dropout, place)
            self.first_a, self.first_b = place((rank, shape[0])), place((shape[1], rank))

        def start(self, generator: torch.Generator) -> None:
            rank, inputs = self.lora_A.shape
            left, values, right = principal(self, rank, inputs, sweeps, generator)
            root = (values / self.scale).sqrt()
            with torch.no_grad():
                # rounded as they will be written, so that the result starts from no change too
                self.first_a.copy_((root[:, None] * right).half())
                self.first_b.copy_((left * root).half())
                self.lora_A.copy_(self.first_a)
                self.lora_B.copy_(self.first_b)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - self.scale * ((x @ self.first_a.T) @ self.first_b.T)

        def merged(self) -> tuple[Tensor, Tensor]:
            a, b = super().merged()
            return torch.cat([a, self.first_a]), torch.cat([b, -self.first_b], dim=1)

        def load(self, weights: LoraWeights, layer: int, target: str) -> None:
            raise InputError(
                "method pissa starts from the base's own singular vectors; to go on from an adapter take --method lora"
            )

    return PissaLinear


def principal(
    layer: LoraLinear, rank: int, inputs: int, sweeps: int, generator: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` terms of the layer's W: U [out, rank], S [rank], V^T [rank, in], by subspace iteration."""
    import torch

    outputs = len(layer.lora_B)
    width = min(rank + MORE_VECTORS, inputs, outputs)
    assert isinstance(generator, torch.Generator)
    with torch.no_grad():
        right = torch.randn(width, inputs, generator=generator)
        left = torch.linalg.qr(layer.product(right).T)[0]
    for _ in range(sweeps):
        right = torch.linalg.qr(layer.transposed(left.T).T)[0].T
        with torch.no_grad():
            left = torch.linalg.qr(layer.product(right.contiguous()).T)[0]
    small = layer.transposed(left.T)
    inner, values, vectors = torch.linalg.svd(small, full_matrices=False)
    return (left @ inner)[:, :rank], values[:rank], vectors[:rank]
