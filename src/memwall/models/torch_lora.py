"""Low-rank adapters in torch: beside every adapted product y = x W^T stands scale * B (A dropout(x)).

Source: LoRA (Edward Hu, 2021, arXiv 2106.09685), section 4.1; initialisation as in PEFT: A uniform within 1 / sqrt(in)
(Kaiming with a = sqrt 5), B zero, so that training starts at the base. Numbers are float32; `factors` gives them under
PEFT's names for `models.lora.write_lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.lora import LoraWeights, tensor_name
from memwall.models.torch_decoder import TorchDecoder

Place = Callable[[tuple[int, ...]], Tensor]
"""Where the numbers of a trained tensor of that shape are to lie (zeros)."""


class LoraLinear(nn.Module):
    """A frozen product and what is trained beside it. lora_A [rank, in], lora_B [out, rank]."""

    def __init__(
        self, base: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float, place: Place
    ) -> None:
        """shape: (inputs, outputs) of the product."""
        super().__init__()
        self.base = base
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(place((rank, shape[0])))
        self.lora_B = nn.Parameter(place((shape[1], rank)))

    def start(self, generator: torch.Generator) -> None:
        """First values."""
        bound = self.lora_A.shape[1] ** -0.5
        with torch.no_grad():
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        kept = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        out: Tensor = self.base(x) + self.scale * self.low_rank(kept)
        return out

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        found = self.base.bias
        return found if isinstance(found, Tensor) else None

    def product(self, x: Tensor) -> Tensor:
        """The base's product without its bias."""
        out: Tensor = self.base(x)
        return out if self.bias is None else out - self.bias

    def transposed(self, y: Tensor) -> Tensor:
        """y [n, out] @ W, [n, in]: the base's gradient."""
        with torch.enable_grad():
            x = torch.zeros(len(y), self.lora_A.shape[1], requires_grad=True)
            return torch.autograd.grad(self.base(x), x, y.contiguous())[0]

    def low_rank(self, x: Tensor) -> Tensor:
        """What is added, less the scale. x [..., in] -> [..., out]."""
        return (x @ self.lora_A.T) @ self.lora_B.T

    def merged(self) -> tuple[Tensor, Tensor]:
        """A and B of a plain adapter that does the same."""
        return self.lora_A.detach(), self.lora_B.detach()

    def exported(self) -> dict[str, Tensor]:
        """All that is written, by PEFT's names behind `lora_`."""
        return dict(zip("AB", self.merged(), strict=True))

    def load(self, weights: LoraWeights, layer: int, target: str) -> None:
        """Begin from a saved adapter of the same rank, where that has this target."""
        factors = weights.factors(layer, target)
        if factors is None:
            return
        if factors[0].shape != tuple(self.lora_A.shape):
            raise InputError(f"{weights.path}: has rank {weights.rank}; set rank={weights.rank} to go on from it")
        with torch.no_grad():
            self.lora_A.copy_(torch.from_numpy(factors[0]))
            # the scale that it was trained with stays in the numbers
            self.lora_B.copy_(torch.from_numpy(factors[1] * (weights.scale / self.scale)))


class Adapted:
    """A decoder with an adapter in every target of every layer. Trained tensors come in a fixed order with names."""

    first_layer, trains_embedding = 0, False
    """What a step needs no gradient before."""

    def __init__(self, decoder: TorchDecoder, layers: dict[tuple[int, str], LoraLinear]) -> None:
        self.decoder = decoder
        self.layers = layers

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that is trained."""
        for (layer, target), module in self.layers.items():
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{layer}.{target}.{name}", parameter

    def factors(self) -> dict[str, np.ndarray]:
        """A and B of every target as float16, lengths as float32, under PEFT's names. InputError where a number has
        left that range.
        """
        found = {}
        for (layer, target), module in self.layers.items():
            for part, factor in module.exported().items():
                kept = factor.numpy().astype(np.float16 if part in ("A", "B") else np.float32)
                if not np.isfinite(kept).all():
                    raise InputError(f"the adapter of layer {layer} {target} outgrew float16: lower the learning rate")
                found[tensor_name(layer, target, part)] = kept
        return found

    def load(self, weights: LoraWeights) -> None:
        """Begin from a saved adapter of the same rank; targets that it lacks keep their start."""
        for (layer, target), module in self.layers.items():
            module.load(weights, layer, target)


def adapt(
    decoder: TorchDecoder,
    shapes: dict[str, tuple[int, int]],
    make: Callable[[nn.Module, tuple[int, int]], LoraLinear],
    *,
    seed: int = 0,
) -> Adapted:
    """Put an adapter beside every projection named in `shapes`, which has their (inputs, outputs)."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for index, layer in enumerate(decoder.model.layers):
        for target in shapes:
            owner = layer.self_attn if hasattr(layer.self_attn, target) else layer.mlp
            module = make(getattr(owner, target), shapes[target])
            module.start(generator)
            setattr(owner, target, module)
            layers[index, target] = module
    return Adapted(decoder, layers)
