"""Mamba and Mamba-2 in torch, for training and as the reference of the CPU engine: every operation is differentiable.

Source: Mamba-2's scan in chunks, "Transformers are SSMs" (Tri Dao, 2024, arXiv 2405.21060), section 6: inside a chunk
it is a masked product of C and B, between chunks a recurrence over one state each. Mamba-1: "Mamba: Linear-Time
Sequence Modeling" (Albert Gu, 2023, arXiv 2312.00752), section 3, token by token.

Shapes: tokens [B, T]; x [B, T, H, P]; dt [B, T, H]; B and C [B, T, G, N].
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import HEAD, ModelConfig
from memwall.models.ssm_config import SsmConfig
from memwall.models.torch_decoder import Norm, _read


def chunked_scan(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk_tokens: int) -> Tensor:
    """y [B, T, H, P] of h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, from a state of zeros; decay: A."""
    num_tokens, heads = x.shape[1], x.shape[2]
    repeats = heads // b.shape[2]
    b, c = (part.repeat_interleave(repeats, dim=2) for part in (b, c))
    size = min(chunk_tokens, num_tokens)
    padding = -num_tokens % size
    x, b, c = (functional.pad(part, (0, 0, 0, 0, 0, padding)) for part in (x, b, c))
    dt = functional.pad(dt, (0, 0, 0, padding))
    x, dt, b, c = (part.unflatten(1, (-1, size)) for part in (x, dt, b, c))
    total = (dt * decay).cumsum(2)  # [B, chunks, size, H]: log of what is left of a chunk's first state
    driven = x * dt[..., None]
    between = total[:, :, :, None] - total[:, :, None]  # of token s at token t
    mask = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    kept = between.masked_fill(~mask[None, None, :, :, None], -math.inf).exp()
    inside = torch.einsum("bkthn,bkshn->bktsh", c, b) * kept
    y = torch.einsum("bktsh,bkshp->bkthp", inside, driven)
    made = torch.einsum("bkshn,bksh,bkshp->bkhpn", b, (total[:, :, -1:] - total).exp(), driven)
    state, before = torch.zeros_like(made[:, 0]), []
    for chunk in range(made.shape[1]):
        before.append(state)
        state = state * total[:, chunk, -1].exp()[..., None, None] + made[:, chunk]
    y = y + torch.einsum("bkthn,bkhpn,bkth->bkthp", c, torch.stack(before, 1), total.exp())
    return y.flatten(1, 2)[:, :num_tokens]


def stepwise_scan(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba-1: x, dt [B, T, E], decay [E, N], b and c [B, T, N] -> y [B, T, E], from a state of zeros."""
    state = x.new_zeros(x.shape[0], x.shape[2], decay.shape[1])
    out = []
    for t in range(x.shape[1]):
        state = state * (dt[:, t, :, None] * decay).exp() + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        out.append((state * c[:, t, None]).sum(-1))
    return torch.stack(out, 1)


class GatedNorm(nn.Module):
    """y * silu(z), RMS-normed in each of `groups` parts."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y * functional.silu(z)).unflatten(-1, (self.groups, -1))
        normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.flatten(-2) * self.weight


class Mixer(nn.Module):
    """One layer's convolution, scan and gate between its products."""

    def __init__(self, ssm: SsmConfig, eps: float) -> None:
        super().__init__()
        self.ssm = ssm
        inner, taps = ssm.inner_size, ssm.conv_taps
        self.in_proj = nn.Linear(ssm.hidden_size, ssm.proj_size, bias=ssm.proj_bias)
        self.conv1d = nn.Conv1d(ssm.conv_size, ssm.conv_size, taps, groups=ssm.conv_size, bias=ssm.conv_bias)
        self.D = nn.Parameter(torch.ones(ssm.num_heads))
        if ssm.is_first:
            self.x_proj = nn.Linear(inner, ssm.dt_rank + 2 * ssm.state_size, bias=False)
            self.dt_proj = nn.Linear(ssm.dt_rank, inner)
            self.A_log = nn.Parameter(torch.zeros(inner, ssm.state_size))
        else:
            self.dt_bias = nn.Parameter(torch.zeros(ssm.num_heads))
            self.A_log = nn.Parameter(torch.zeros(ssm.num_heads))
            self.norm = GatedNorm(inner, eps, ssm.num_groups)
        self.out_proj = nn.Linear(inner, ssm.hidden_size, bias=ssm.proj_bias)

    def forward(self, u: Tensor) -> Tensor:
        ssm = self.ssm
        parts = dict(zip(ssm.proj_parts, self.in_proj(u).split(list(ssm.proj_parts.values()), -1)))
        into = parts["x"] if ssm.is_first else torch.cat([parts[name] for name in ("x", "b", "c")], -1)
        padded = functional.pad(into.transpose(1, 2), (ssm.conv_taps - 1, 0))
        conv = functional.silu(self.conv1d(padded)).transpose(1, 2)
        if ssm.is_first:
            low, b, c = self.x_proj(conv).split([ssm.dt_rank, ssm.state_size, ssm.state_size], -1)
            dt = functional.softplus(self.dt_proj(low))
            y = stepwise_scan(conv, dt, -self.A_log.exp(), b, c) + self.D * conv
            out: Tensor = self.out_proj(y * functional.silu(parts["z"]))
            return out
        x, b, c = conv.split([ssm.inner_size, ssm.bc_size, ssm.bc_size], -1)
        x = x.unflatten(-1, (ssm.num_heads, -1))
        b, c = (part.unflatten(-1, (ssm.num_groups, -1)) for part in (b, c))
        dt = functional.softplus(parts["dt"] + self.dt_bias).clamp(*ssm.dt_limits)
        y = chunked_scan(x, dt, -self.A_log.exp(), b, c, ssm.chunk_tokens) + self.D[:, None] * x
        made: Tensor = self.out_proj(self.norm(y.flatten(-2), parts["z"]))
        return made


class Layer(nn.Module):
    """Norm and mixer, added to the residual."""

    def __init__(self, config: ModelConfig, ssm: SsmConfig) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mixer = Mixer(ssm, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mixer(self.norm(x))
        return result


class Body(nn.Module):
    """All but the head; named so that parameters go by the names of `ModelConfig.tensors`."""

    def __init__(self, config: ModelConfig, ssm: SsmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.zeros(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config, ssm) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class TorchSsm(nn.Module):
    """A whole Mamba or Mamba-2 model. `TorchSsm(config).start(seed)` is one to train; `from_directory` reads one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.ssm is None or config.ssm.quantized is not None:
            raise InputError(f"{config.family}: this form is of Mamba models in floats")
        self.config = config
        self.model = Body(config, config.ssm)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def from_directory(directory: str | Path) -> TorchSsm:
        """Reads a folder's floats."""
        with Checkpoint(directory) as checkpoint:
            model = TorchSsm(checkpoint.config)
            state = {name: _read(checkpoint, name).float() for name in checkpoint.names()}
        if checkpoint.config.tie_word_embeddings:
            state[HEAD] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        return model

    def start(self, seed: int = 0) -> TorchSsm:
        """Numbers to begin training from: the usual ranges of decays (1 to 16) and time steps (0.001 to 0.1)."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in self.named_parameters():
                if tensor.dim() == 2 and not name.endswith("A_log"):
                    nn.init.normal_(tensor, std=0.02, generator=random)
                elif name.endswith("conv1d.weight"):
                    bound = tensor.shape[-1] ** -0.5
                    nn.init.uniform_(tensor, -bound, bound, generator=random)
                elif name.endswith("conv1d.bias"):
                    tensor.zero_()
                elif name.endswith("A_log"):
                    rows = torch.arange(1, tensor.shape[-1] + 1).float()
                    tensor.copy_(
                        rows.log()
                        if tensor.dim() == 2
                        else torch.empty_like(tensor).uniform_(1, 16, generator=random).log()
                    )
                elif name.endswith(("dt_bias", "dt_proj.bias")):
                    low, high = math.log(1e-3), math.log(1e-1)
                    step = torch.empty_like(tensor).uniform_(low, high, generator=random).exp()
                    tensor.copy_(step + torch.log(-torch.expm1(-step)))
            for parameter in self.parameters():
                parameter.requires_grad_(True)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        result: Tensor = self.lm_head(self.model.norm(x))
        return result
