"""DoRA: the length of each row of an adapted weight is trained apart from its direction.

Source: "DoRA: Weight-Decomposed Low-Rank Adaptation" (Shih-Yang Liu, 2024, arXiv 2402.09353), sections 4.1 to 4.3;
names and rows as in PEFT (`use_dora`, `lora_magnitude_vector`).

Idea: full fine-tuning changes lengths and directions of weight vectors almost independently, LoRA only together. So
W' = m (W + s B A) / ||W + s B A|| row by row, m trained from ||W||. The norm counts as a constant in the gradient
(section 4.3), which saves most of its cost.
Units and shapes: m float32 [out]; y = (m / ||W + s B A||) (W x + s B A dropout(x)) + bias.
Differs from the paper: dropout takes inputs of B A alone. The norm is worked out without the adapted weight: ||w||^2 of
each row is kept, (W A^T) is one more product with the packed base, and the rest has the size of A and B.
Cost: 16 bytes per output more than LoRA, 4 for ||w||^2; a product of `rank` rows with the base in every pass, and the
product's outputs kept for the gradient of m.
Holds when: no row of W + s B A is zero. Run by `--lora` with the base packed (`models.dora`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from memwall.compress.lora import Lora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memwall.models.lora import LoraWeights
    from memwall.models.torch_lora import LoraLinear, Place


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """LoRA's settings with trained lengths."""

    name: ClassVar[str] = "dora"
    told: ClassVar[dict[str, Any]] = {"use_dora": True}

    def linear(self, base: nn.Module, shape: tuple[int, int], place: Place) -> LoraLinear:
        return _dora_linear()(base, shape, self.rank, self.scale, self.dropout, place)

    def extra_shapes(self, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(shape[1],)]

    def held_shapes(self, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(shape[1],)]

    def kept_values(self, shape: tuple[int, int]) -> int:
        return 2 * shape[1]  # W x + s B A x and what it is made of


def _dora_linear() -> type[LoraLinear]:
    """The class below needs torch, which only training imports."""
    import torch
    from torch import nn
    from torch.nn import functional

    from memwall.kernels.torch_frozen import row_squares
    from memwall.models.torch_lora import LoraLinear

    class DoraLinear(LoraLinear):
        """An adapter and the lengths of the adapted weight's rows."""

        def __init__(
            self, base: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float, place: Place
        ) -> None:
            super().__init__(base, shape, rank, scale, dropout, place)
            self.lora_magnitude_vector = nn.Parameter(place((shape[1],)))
            self.squares = place((shape[1],))

        def start(self, generator: torch.Generator) -> None:
            super().start(generator)
            with torch.no_grad():
                self.squares.copy_(row_squares(self.base))
                self.lora_magnitude_vector.copy_(self.squares.sqrt())

        def forward(self, x: Tensor) -> Tensor:
            kept = functional.dropout(x, self.dropout) if self.training and self.dropout else x
            whole = self.product(x) + self.scale * self.low_rank(kept)
            out = whole * (self.lora_magnitude_vector / self.lengths())
            return out if self.bias is None else out + self.bias

        @torch.no_grad()
        def lengths(self) -> Tensor:
            """||W + s B A|| of each row: (w + s b A)^2 = w^2 + 2 s b (A w) + s^2 b (A A^T) b."""
            a, b = self.lora_A, self.lora_B
            cross = (b * self.product(a).T).sum(1)
            own = ((b @ (a @ a.T)) * b).sum(1)
            return (self.squares + 2 * self.scale * cross + self.scale**2 * own).clamp_min(1e-30).sqrt()

        def exported(self) -> dict[str, Tensor]:
            return super().exported() | {"magnitude_vector": self.lora_magnitude_vector.detach()}

        def load(self, weights: LoraWeights, layer: int, target: str) -> None:
            super().load(weights, layer, target)
            magnitude = weights.magnitudes().get((layer, target)) if weights.dora else None
            with torch.no_grad():  # of a plain adapter the lengths that it gives
                self.lora_magnitude_vector.copy_(self.lengths() if magnitude is None else torch.from_numpy(magnitude))

    return DoraLinear
