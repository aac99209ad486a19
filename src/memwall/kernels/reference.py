"""Each kernel in plain torch and float32 (float64 where sums are long): what the fast paths are tested against."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [tokens, cols] @ weight [rows, cols].T + bias, summed in float64."""
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).float()


def round_activations(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [tokens, cols] after rounding to 8-bit integers, one scale (largest magnitude / 127) per group of columns."""
    padding = -x.shape[-1] % group
    groups = torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, group))
    peak = groups.abs().amax(-1, keepdim=True)
    codes = torch.round(groups * torch.where(peak > 0, 127.0 / peak, 0.0))
    return (codes * (peak / 127.0)).flatten(-2)[..., : x.shape[-1]]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [rows, width] scaled to unit mean square, times weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x [rows, width] without its mean, scaled to unit variance, times weight plus bias."""
    wide = x.double() - x.double().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight + bias).float()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, width] with its first 2 * cos.shape[1] numbers per head rotated in pairs (i, i + half)."""
    half = cos.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


def gelu(x: torch.Tensor, *, near: bool) -> torch.Tensor:
    """x times the share of a normal distribution below x, or what tanh makes of it."""
    return torch.nn.functional.gelu(x.double(), approximate="tanh" if near else "none").float()
