"""IR-QLoRA: adapters with an elastic connection over a NormalFloat base, and codes calibrated for the most information.

Source: "Accurate LoRA-Finetuning Quantization of LLMs via Information Retention" (Haotong Qin, 2024, arXiv 2402.05445),
sections 3.2 and 3.3; settings as in "How Good Are Low-bit Quantized LLaMA3 Models?" (Wei Huang, 2024, arXiv
2404.14047); official code: htqin/IR-QLoRA, irlora.py, utils.py.

Idea: (a) what a block of 4-bit codes tells is at most their entropy, so each block of 64 weights is shifted, before it
is coded, by the constant near its median that makes the code frequencies most even. (b) A low-rank path passes r
numbers; a connection without weights of its own goes along it: the mean of each of r parts of the input is added to
what A gives, each of the r numbers, repeated, to what B gives, with one trained factor each.
Units and shapes: y = W^ x + (alpha / rank) (B + b2 R) (A + b1 P) dropout(x); P [rank, in] averages consecutive inputs,
R [out, rank] repeats; b1, b2 scalars that start at 0.
Differs from the paper: both connections are linear, so they are trained as above and written merged into A and B: the
result is a plain adapter. Where rank does not divide a width, parts differ by one. Shifts: see `formats.shifted`.
Cost: the base has 4.254 bits per weight, 0.127 of them for shifts. Two numbers per product more than QLoRA, and A and B
once more while a layer is worked.
Holds when: rank is at most the narrowest width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall.compress.qlora import QLora
from memwall.compress.rtn import RoundToNearest
from memwall.errors import InputError
from memwall.formats.shifted import SPEC

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memwall.models.torch_lora import LoraLinear, Place


@dataclass(frozen=True, kw_only=True)
class IrQLora(QLora):
    """QLoRA's settings with the elastic connection, over the calibrated base."""

    name: ClassVar[str] = "ir-qlora"
    base: ClassVar[str] = SPEC

    def linear(self, base: nn.Module, shape: tuple[int, int], place: Place) -> LoraLinear:
        if self.rank > min(shape):
            raise InputError(f"setting rank={self.rank}: the elastic connection wants at most {min(shape)} here")
        return _elastic_linear()(base, shape, self.rank, self.scale, self.dropout, place)

    def extra_shapes(self, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(1,), (1,)]


def _elastic_linear() -> type[LoraLinear]:
    """The class below needs torch, which only training imports."""
    import torch
    from torch import nn

    from memwall.models.torch_lora import LoraLinear

    class ElasticLora(LoraLinear):
        """An adapter whose factors have the connections added."""

        def __init__(
            self, base: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float, place: Place
        ) -> None:
            super().__init__(base, shape, rank, scale, dropout, place)
            self.beta_in, self.beta_out = nn.Parameter(place((1,))), nn.Parameter(place((1,)))

        def factors(self) -> tuple[Tensor, Tensor]:
            """A + b1 P and B + b2 R."""
            rank, inputs = self.lora_A.shape
            means = torch.from_numpy(averaging(rank, inputs))
            repeats = torch.from_numpy(parts(rank, len(self.lora_B))).T
            return self.lora_A + self.beta_in * means, self.lora_B + self.beta_out * repeats

        def low_rank(self, x: Tensor) -> Tensor:
            a, b = self.factors()
            return (x @ a.T) @ b.T

        def merged(self) -> tuple[Tensor, Tensor]:
            a, b = self.factors()
            return a.detach(), b.detach().contiguous()

    return ElasticLora


def parts(rank: int, width: int) -> np.ndarray:
    """float32 [rank, width], 1 where a column lies in the part of that row: consecutive, as equal as can be."""
    found = np.zeros((rank, width), np.float32)
    found[np.arange(width) * rank // width, np.arange(width)] = 1
    return found


def averaging(rank: int, width: int) -> np.ndarray:
    """float32 [rank, width]: the mean of each part."""
    found = parts(rank, width)
    found /= found.sum(axis=1, keepdims=True)
    return found


# -- information calibration: the base ---------------------------------------------------------------------------------


class InformationCalibrated(RoundToNearest):
    """Every matrix in shifted NormalFloat (`formats.shifted`); there is one width."""

    name: ClassVar[str] = "ir-qlora"
    default_bits: ClassVar[str] = SPEC

    def form(self, bits: float | str) -> str | None:
        if bits in (SPEC, 4, 4.25):
            return SPEC
        raise InputError(f"bits {bits}: ir-qlora makes {SPEC}, 4.25 bits per weight; leave out --bits")

    def check(self, spec: str) -> None:
        if spec != SPEC:
            raise InputError(f"ir-qlora makes {SPEC}, not {spec}")
