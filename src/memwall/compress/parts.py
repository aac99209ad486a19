"""A model cut in the parts that a compressed folder has a file for: the embedding, each layer, and what comes after."""

from __future__ import annotations

from dataclasses import dataclass

from memwall.models.config import EMBEDDING, ModelConfig, TensorSpec
from memwall.models.precision import is_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The tensors of one file: the embedding, one layer, or what comes after the layers."""

    tensors: tuple[TensorSpec, ...]
    layer: int | None = None

    @property
    def matrices(self) -> list[TensorSpec]:
        return [tensor for tensor in self.tensors if is_matrix(tensor)]


def parts_of(config: ModelConfig) -> list[Part]:
    """The parts in the order in which they are made."""
    tensors = config.tensors()
    layers = [
        Part(tensors=tuple(t for t in tensors if t.layer == layer), layer=layer) for layer in range(config.num_layers)
    ]
    first = Part(tensors=tuple(t for t in tensors if t.name == EMBEDDING))
    last = Part(tensors=tuple(t for t in tensors if t.layer is None and t.name != EMBEDDING))
    return [first, *layers, last]
