"""Training a model's own weights: all of them (`full`), or those of the last layers while the rest is frozen
(`freeze`).

Source: the two plain ends of the fine-tuning axis of "EfficientLLM: Efficiency in Large Language Models" (2025, arXiv
2505.13840); freezing as in "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning" (Jaejun Lee, 2019,
arXiv 1911.03090).

Idea: nothing is added. What is trained is held in float32 where the engine's loader put it, and changed in place. The
way back ends at the first layer that is trained, so freezing saves time as well as memory.
Units and shapes: those of the model; the result is a model folder in the numbers of the original, not an adapter.
Differs from the papers: weights are trained in float32 and rounded once, at the end.
Cost: 16 bytes per trained weight (itself, gradient, two moments), 8 with `optimizer=paged`; of a frozen one its own.
Holds when: the base is a float model. `full` has the largest optimizer state of all methods by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memwall.compress.tuning import TuneMethod
from memwall.errors import InputError
from memwall.models.config import EMBEDDING, HEAD, ModelConfig, TensorSpec
from memwall.models.precision import FLOAT_CHOICES

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from memwall.models.torch_decoder import TorchDecoder
    from memwall.models.torch_lora import Adapted, Place
    from memwall.models.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Full(TuneMethod):
    """All weights, at the rate of EfficientLLM's example."""

    name: ClassVar[str] = "full"
    makes_adapter: ClassVar[bool] = False
    owner: ClassVar[str] = "trained"
    has_no: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "targets")

    batch: int = 8
    learning_rate: float = 1e-5

    def trained(self, config: ModelConfig) -> list[TensorSpec]:
        """What is trained."""
        return list(config.tensors())

    def trained_shapes(self, config: ModelConfig) -> list[tuple[int, ...]]:
        return [tensor.shape for tensor in self.trained(config)]

    def forms(self, config: ModelConfig, choice: str, specs: Mapping[str, str]) -> Mapping[str, str]:
        if choice not in FLOAT_CHOICES:
            raise InputError(
                f"method {self.name} trains weights themselves, which {choice!r} has packed: take a float model and "
                f"--weights {', '.join(FLOAT_CHOICES)}, or an adapter (--method lora)"
            )
        return {**specs, **{tensor.name: "float32" for tensor in self.trained(config)}}

    def fit(self, decoder: TorchDecoder, weights: Weights, place: Place) -> Adapted:
        return _made(decoder, weights, [t.name for t in self.trained(decoder.config)], self.first_layer(decoder.config))


@dataclass(frozen=True, kw_only=True)
class Freeze(Full):
    """layers: how many of the last ones are trained; two, as is common."""

    name: ClassVar[str] = "freeze"

    learning_rate: float = 1e-4
    layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise InputError(f"setting layers={self.layers}: must be 1 or more")

    def first_layer(self, config: ModelConfig) -> int:
        if self.layers > config.num_layers:
            raise InputError(f"setting layers={self.layers}: the model has {config.num_layers}")
        return config.num_layers - self.layers

    def trained(self, config: ModelConfig) -> list[TensorSpec]:
        names = tuple(f"model.layers.{index}." for index in range(self.first_layer(config), config.num_layers))
        return [tensor for tensor in config.tensors() if tensor.name.startswith(names)]


def _made(decoder: TorchDecoder, weights: Weights, names: list[str], first: int) -> Adapted:
    """Put the loaded numbers into plain layers that have gradients. Needs torch, which only training imports."""
    import torch
    from torch import nn

    from memwall.models.torch_lora import Adapted

    class Trained(Adapted):
        """A decoder some of whose own weights are trained."""

        def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
            super().__init__(decoder, {})
            self.first_layer, self.trains_embedding, self._parameters = first, EMBEDDING in parameters, parameters

        def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
            yield from self._parameters.items()

        def factors(self) -> dict[str, np.ndarray]:
            return {name: parameter.detach().numpy() for name, parameter in self._parameters.items()}

    found: dict[str, nn.Parameter] = {}
    for name in names:
        found[name] = nn.Parameter(torch.from_numpy(weights.arrays.get(name, weights.vectors.get(name))))
        owner, _, field = name.rpartition(".")
        module = decoder.get_submodule(owner)
        if name in weights.arrays:
            parent, _, child = owner.rpartition(".")
            plain = _plain(found[name], module, embedding=name == EMBEDDING)
            setattr(decoder.get_submodule(parent), child, plain)
        elif field == "bias":
            module.register_parameter("bias", None)
            module.bias = found[name]
        else:
            setattr(module, field, found[name])
    if HEAD not in found and EMBEDDING in found:
        decoder.add_module("lm_head", _plain(found[EMBEDDING], decoder.lm_head, embedding=False))
    return Trained(found)


def _plain(weight: nn.Parameter, frozen: nn.Module, *, embedding: bool) -> nn.Module:
    """The plain module over `weight`; a frozen one's bias stays until it is trained itself."""
    from torch import nn

    if embedding:
        table = nn.Embedding.from_pretrained(weight)
        table.weight = weight  # that very parameter, or a tied head's gradient would go elsewhere
        return table
    rows, cols = weight.shape
    module = nn.Linear(cols, rows, bias=False, device="meta")
    module.weight = weight
    bias = getattr(frozen, "bias", None)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module
