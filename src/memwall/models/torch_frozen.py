"""The torch form over weights that the CPU engine loaded: what is frozen stays packed where it lies, in one copy.

For fine-tuning: only what is added to such a model has gradients.
"""

from __future__ import annotations

import torch
from torch import nn

from memwall.kernels.torch_frozen import FrozenEmbedding, FrozenLinear
from memwall.models.config import EMBEDDING, ModelConfig
from memwall.models.rope import inverse_frequencies
from memwall.models.torch_decoder import TorchDecoder
from memwall.models.weights import Weights


def frozen_decoder(config: ModelConfig, weights: Weights) -> TorchDecoder:
    """A decoder over `weights`, whose buffers it refers to: release them only after its last use. float32, CPU."""
    with torch.device("meta"):
        decoder = TorchDecoder(config)
    vectors = {name: torch.from_numpy(vector) for name, vector in weights.vectors.items()}
    for name in decoder.linears():
        bias = vectors.pop(name.removesuffix("weight") + "bias", None)
        decoder.replace_linear(name, FrozenLinear(weights.matrices[name], bias))
    decoder.model.embed_tokens = FrozenEmbedding(weights.matrices[EMBEDDING])
    for name, vector in vectors.items():
        owner, _, field = name.rpartition(".")
        setattr(decoder.get_submodule(owner), field, nn.Parameter(vector, requires_grad=False))
    frequencies = torch.from_numpy(inverse_frequencies(config.rope, config.head_dim).copy())
    decoder.register_buffer("inv_freq", frequencies, persistent=False)
    return decoder.eval()
