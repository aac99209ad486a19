"""The torch form with packed weights: linear layers become Triton products on the tiles that the CPU engine reads."""

from __future__ import annotations

import torch

from memwall import kernels
from memwall.kernels.triton_linear import PackedLinear
from memwall.kernels.triton_marlin import MarlinLinear, fits
from memwall.models.precision import resolve
from memwall.models.torch_decoder import TorchDecoder

MARLIN_SPEC = "int4-g128"


def pack_linears(model: TorchDecoder, choice: str, device: str | torch.device = "cuda") -> int:
    """Replace the linear layers of `model` by packed ones, in the formats of `choice` (see `models.precision`).

    Layer by layer, so that at most one float weight lives beside the packed ones. The embedding table stays in floats
    (it is read by rows); a tied head is packed. Returns the bytes of the packed layers on the device.
    """
    specs = resolve(model.config, choice)
    packed_bytes = 0
    for name, layer in model.linears().items():
        spec = specs.get(name, specs["model.embed_tokens.weight"])  # a tied head has no tensor of its own
        if not spec.startswith("int"):
            continue
        assert isinstance(layer, torch.nn.Linear)
        weight = layer.weight.detach().to("cpu", torch.float32).numpy()
        packed = kernels.encode(spec, weight)
        bias = None if layer.bias is None else layer.bias.detach()
        # what MARLIN has tiles for takes its order; all else the tiles of the CPU
        whole = packed.spec == MARLIN_SPEC and layer.weight.dtype == torch.float16 and fits(packed.shape)
        model.replace_linear(name, (MarlinLinear if whole else PackedLinear)(packed, bias, device))
        packed_bytes += packed.nbytes
    return packed_bytes
