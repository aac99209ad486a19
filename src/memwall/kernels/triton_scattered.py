"""GPU attention of queries at scattered positions, in Triton: what a prompt of kept chunks needs (`kv.cache_craft`).

Idea: as in a prompt's attention a program owns a block of queries and walks over tiles of keys with a running softmax;
but each query has a position of its own, which says where its keys end. All query heads of a key-value head share a
tile of keys, and a program stops at its last query's position.

Shapes: q [T, H, D], k, v [S, Hkv, D] float16 or float32, positions [T] ascending int64; out [T, H, D] float32.
Cost: T / block times the keys are read. Holds when: D is a power of two from 16 on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memwall.kernels.triton_softmax import fold_tile

ROWS = 64  # query tokens times the heads that share a key-value head
KEYS = 64


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, positions, out, num_tokens, length, num_kv_heads, scale, window,
    SHARED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    kv_head, block = tl.program_id(0), tl.program_id(1)
    row, channel, slot = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    token = block * TOKENS + row // SHARED
    live = (token < num_tokens) & (row < TOKENS * SHARED)
    position = tl.load(positions + token, mask=live, other=-1)
    first_token = block * TOKENS
    lowest = tl.load(positions + first_token) - window + 1
    begin = tl.maximum(lowest, 0) // KEYS * KEYS
    end = tl.minimum(tl.max(position, axis=0) + 1, length)
    place = (token * num_kv_heads * SHARED + kv_head * SHARED + row % SHARED)[:, None] * DIM + channel[None, :]
    query = tl.load(q + place, mask=live[:, None], other=0.0)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    held = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + slot
        there = key < end
        at = (key * num_kv_heads + kv_head)[:, None] * DIM + channel[None, :]
        keys = tl.load(k + at, mask=there[:, None], other=0.0)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window) & there[None, :]
        values = tl.load(v + at, mask=there[:, None], other=0.0)
        peak, total, held = fold_tile(query, keys, values, seen, scale, peak, total, held)
    held = held / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + place, held, mask=live[:, None])


def attend_scattered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of q at ascending `positions` over the keys up to each, the last `window` of them where given."""
    num_tokens, num_heads, dim = q.shape
    length, num_kv_heads = k.shape[:2]
    shared = num_heads // num_kv_heads
    if dim & (dim - 1) or dim < 16 or num_heads % num_kv_heads or shared > ROWS:
        raise ValueError(
            f"{num_heads} heads of {dim} over {num_kv_heads}: D a power of two from 16 on, H / Hkv <= {ROWS}"
        )
    if len(positions) != num_tokens or v.shape != k.shape:
        raise ValueError(f"{len(positions)} positions for {num_tokens} queries, keys {k.shape}, values {v.shape}")
    out = torch.empty(num_tokens, num_heads, dim, dtype=torch.float32, device=q.device)
    tokens = ROWS // shared
    if num_tokens:
        _attend[(num_kv_heads, triton.cdiv(num_tokens, tokens))](
            q.to(k.dtype).contiguous(), k.contiguous(), v.contiguous(), positions.contiguous(), out, num_tokens, length,
            num_kv_heads, scale, length + 1 if window is None else window,
            SHARED=shared, TOKENS=tokens, ROWS=ROWS, KEYS=KEYS, DIM=dim,
        )  # fmt: skip
    return out
