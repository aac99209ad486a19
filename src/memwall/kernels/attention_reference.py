"""Attention in plain torch, float32: what the compiled kernels are checked against. Imported by tests only."""

from __future__ import annotations

import torch

from memwall.kernels.attention import VALUE_BLOCK_TOKENS


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    first_position: int,
    window: int | None = None,
    key_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, D], stats [T, H, 2]) of q [T, H, D] over k, v [S, Hkv, D]; see `attention.attend_float`."""
    rep = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(rep, dim=1) for x in (k, v))
    own = first_position + torch.arange(q.shape[0])[:, None]
    other = key_start + torch.arange(k.shape[0])[None, :]
    seen = other <= own
    if window is not None:
        seen &= other > own - window
    logits = torch.einsum("thd,shd->hts", q.float() * scale, k).masked_fill(~seen, -torch.inf)
    peak = logits.amax(-1) if k.shape[0] else torch.full(logits.shape[:2], -torch.inf)
    weights = torch.where(seen, torch.exp(logits - torch.where(peak.isinf(), 0.0, peak)[..., None]), 0.0)
    total = weights.sum(-1)
    out = torch.einsum("hts,shd->thd", weights, v) / torch.where(total > 0, total, 1.0).T[..., None]
    return out, torch.stack([peak.T, total.T], dim=-1)


def kivi_quantize(x: torch.Tensor, bits: int, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and minima of groups that run along `axis`, whole: one scale and minimum per line.

    Both are rounded to half precision before the codes are computed.
    """
    levels = 2**bits - 1
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale, minimum = ((high - low) / levels).half().float(), low.half().float()
    safe = torch.where(scale > 0, scale, 1.0)
    codes = torch.where(scale > 0, ((x - minimum) / safe).clamp(0, levels).round(), 0.0)
    return codes, scale, minimum


def kivi_round_trip(x: torch.Tensor, bits: int, group: int, *, along_tokens: bool) -> torch.Tensor:
    """x [n, Hkv, D] as a cache of these bits gives it back; n whole groups when they run along tokens."""
    n, heads, dim = x.shape
    grouped = x.view(n // group, group, heads, dim) if along_tokens else x.view(n, heads, dim // group, group)
    codes, scale, minimum = kivi_quantize(grouped.float(), bits, 1 if along_tokens else 3)
    return (codes * scale + minimum).view(n, heads, dim)


def kivi_unpack(blocks: torch.Tensor, bits: int, group: int, heads: int, dim: int, *, keys: bool) -> torch.Tensor:
    """Codes [n, Hkv, D] out of the bytes of key or value blocks, one bit at a time."""
    tokens = group if keys else VALUE_BLOCK_TOKENS
    lanes, lines = (tokens, dim) if keys else (dim, tokens)  # codes of one lane are packed along the lines
    code_words = sum(-(-lines * w // 32) * lanes for w in planes(bits))
    scale_bytes = 4 * dim if keys else 4 * dim // group * tokens
    rows = blocks.reshape(-1, heads, 4 * code_words + scale_bytes)[..., : 4 * code_words].contiguous()
    words = rows.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    codes = torch.zeros(*words.shape[:2], lines, lanes, dtype=torch.int64)
    start = shift = 0
    for width in planes(bits):
        for line in range(lines):
            word = start + line * width // 32 * lanes
            codes[:, :, line] |= (words[..., word : word + lanes] >> (line * width % 32) & (2**width - 1)) << shift
        start += -(-lines * width // 32) * lanes
        shift += width
    return codes.permute((0, 3, 1, 2) if keys else (0, 2, 1, 3)).reshape(-1, heads, dim)


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes that codes are cut in, low bits first."""
    return (2, 1) if bits == 3 else (bits,)
