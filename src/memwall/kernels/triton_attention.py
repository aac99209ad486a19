"""GPU attention over a KIVI-coded cache, in Triton: one decoded token against blocks that the CPU kernels wrote.

Source: KIVI (Liu 2024, arXiv 2402.02750), section 4, fused dequantization. Idea: a program owns one key-value head and
a run of token groups; it multiplies the queries by the group's channel scales once, takes the product with the codes,
and adds the sum of query times minimum, so the float keys never exist. All query heads of the group share one
unpacking. Runs are joined by their (maximum, sum, output), as flash decoding does.

Shapes: q [H, D]; blocks uint8 as `kernels.attention` lays them out (cpp/kivi.isa.cpp); exact rows [n, Hkv, D] float16.
Cost: reads every coded byte once. Holds when: bits are 2, 3, 4 or 8, D is a power of two, keys are coded at least as
far as values (KIVI's rule).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memwall.kernels.attention import VALUE_BLOCK_TOKENS, kivi_block_bytes

MIN_HEADS = 16  # the smallest tile of a tensor-core product
TARGET_RUNS = 64  # programs per key-value head in a long context: enough to fill a GPU


@triton.jit
def _codes(words, row, lane, place, row_length, live, BITS: tl.constexpr, PLACES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes number `place` (of PLACES) in planes of [PLACES * width / 32][row_length] words that begin at `row`."""
    if BITS == 3:  # a plane of two bits, then one of single bits
        low = tl.load(words + row + (place // 16) * row_length + lane, mask=live, other=0)
        high = tl.load(words + row + (PLACES // 16 + place // 32) * row_length + lane, mask=live, other=0)
        code = ((low >> (2 * (place % 16))) & 3) + (((high >> (place % 32)) & 1) << 2)
    else:
        per_word: tl.constexpr = 32 // BITS
        word = tl.load(words + row + (place // per_word) * row_length + lane, mask=live, other=0)
        code = (word >> (BITS * (place % per_word))) & ((1 << BITS) - 1)
    return code.to(tl.float32)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, key_words, key_halves, value_words, value_halves, exact_keys, exact_values, outs, stats,
    length, coded_keys, coded_values, num_kv_heads, scale, groups_per_run,
    KEY_BYTES: tl.constexpr, KEY_CODE_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, VALUE_CODE_BYTES: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr, HEADS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    kv_head, run = tl.program_id(0), tl.program_id(1)
    head, channel, slot = tl.arange(0, HEADS), tl.arange(0, DIM), tl.arange(0, GROUP)
    real = head < SHARED
    query_row = (kv_head * SHARED + head)[:, None] * DIM + channel[None, :]
    query = tl.load(q + query_row, mask=real[:, None], other=0.0).to(tl.float32) * scale
    peak = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([HEADS, DIM], tl.float32)
    for step in range(groups_per_run):
        group = run * groups_per_run + step
        token = group * GROUP + slot
        live = token < length
        # keys [DIM, GROUP]: a group is coded whole or not at all
        block = (group * num_kv_heads + kv_head) * KEY_BYTES
        coded = channel * 0 + group * GROUP < coded_keys
        key_live = coded[:, None] & (slot >= 0)[None, :]
        code = _codes(key_words, block // 4, slot[None, :], channel[:, None], GROUP, key_live, BITS, DIM)
        half = (block + KEY_CODE_BYTES) // 2 + channel
        key_scale = tl.load(key_halves + half, mask=coded, other=0.0).to(tl.float32)
        key_low = tl.load(key_halves + half + DIM, mask=coded, other=0.0).to(tl.float32)
        logit = tl.dot(query * key_scale[None, :], code, input_precision="ieee")
        logit += tl.sum(query * key_low[None, :], axis=1)[:, None]
        exact_row = ((token - coded_keys) * num_kv_heads + kv_head)[None, :] * DIM + channel[:, None]
        exact = tl.load(exact_keys + exact_row, mask=(live & (token >= coded_keys))[None, :], other=0.0).to(tl.float32)
        logit += tl.dot(query, exact, input_precision="ieee")
        logit = tl.where(live[None, :], logit, -1e30)
        new_peak = tl.maximum(peak, tl.max(logit, axis=1))
        chance = tl.where(live[None, :], tl.exp(logit - new_peak[:, None]), 0.0)
        fade = tl.exp(peak - new_peak)
        total = total * fade + tl.sum(chance, axis=1)
        peak = new_peak
        # values: [GROUP, DIM]
        in_block = token % VALUE_BLOCK
        value_coded = (live & (token < coded_values))[:, None] & (channel >= 0)[None, :]
        block = ((token // VALUE_BLOCK) * num_kv_heads + kv_head)[:, None] * VALUE_BYTES
        place = in_block[:, None]
        code = _codes(value_words, block // 4, channel[None, :], place, DIM, value_coded, BITS, VALUE_BLOCK)
        half = (block + VALUE_CODE_BYTES) // 2 + (channel // GROUP)[None, :] * VALUE_BLOCK + place
        value = code * tl.load(value_halves + half, mask=value_coded, other=0.0).to(tl.float32)
        half += (DIM // GROUP) * VALUE_BLOCK  # the minima follow the scales
        value += tl.load(value_halves + half, mask=value_coded, other=0.0).to(tl.float32)
        exact_row = ((token - coded_values) * num_kv_heads + kv_head)[:, None] * DIM + channel[None, :]
        value_exact = (live & (token >= coded_values))[:, None] & (channel >= 0)[None, :]
        value += tl.load(exact_values + exact_row, mask=value_exact, other=0.0).to(tl.float32)
        out = out * fade[:, None] + tl.dot(chance, value, input_precision="ieee")
    row = (run * num_kv_heads + kv_head) * SHARED + head
    tl.store(outs + row[:, None] * DIM + channel[None, :], out, mask=real[:, None])
    tl.store(stats + row * 2, peak, mask=real)
    tl.store(stats + row * 2 + 1, total, mask=real)


def attend_kivi(
    q: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    coded_keys: int,
    coded_values: int,
    bits: int,
    group: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one token's queries [H, D] over the whole cache -> [H, D] float32, on the coded form.

    The first `coded_keys` keys and `coded_values` values come from the blocks (uint8, one dimension), the rest from the
    exact rows keys, values [n, Hkv, D], which start where those end.
    """
    num_heads, dim = q.shape
    num_kv_heads = keys.shape[1]
    length = coded_keys + keys.shape[0]
    if coded_values + values.shape[0] != length or coded_values > coded_keys or coded_keys % group:
        raise ValueError(
            f"keys and values disagree: {coded_keys} + {keys.shape[0]} tokens "
            f"against {coded_values} + {values.shape[0]}"
        )
    if dim & (dim - 1) or group & (group - 1) or group < MIN_HEADS:
        raise ValueError(f"head dimension {dim} and group {group}: powers of two, the group at least {MIN_HEADS}")
    shared = num_heads // num_kv_heads
    key_bytes, value_bytes = kivi_block_bytes(bits, group, dim)
    num_groups = triton.cdiv(length, group)
    per_run = max(triton.cdiv(num_groups, TARGET_RUNS), 1)
    runs = triton.cdiv(num_groups, per_run)
    outs = torch.empty(runs, num_heads, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(runs, num_heads, 2, dtype=torch.float32, device=q.device)
    _attend[(num_kv_heads, runs)](
        q.contiguous(), key_blocks.view(torch.int32), key_blocks.view(torch.float16), value_blocks.view(torch.int32),
        value_blocks.view(torch.float16), keys, values, outs, stats, length, coded_keys, coded_values, num_kv_heads,
        scale, per_run, KEY_BYTES=key_bytes, KEY_CODE_BYTES=key_bytes - 4 * dim, VALUE_BYTES=value_bytes,
        VALUE_CODE_BYTES=value_bytes - 4 * (dim // group) * VALUE_BLOCK_TOKENS, BITS=bits, GROUP=group, DIM=dim,
        SHARED=shared, HEADS=max(MIN_HEADS, triton.next_power_of_2(shared)), VALUE_BLOCK=VALUE_BLOCK_TOKENS,
    )  # fmt: skip
    peak = stats[..., 0].max(dim=0).values
    weight = torch.exp(stats[..., 0] - peak)
    total = (weight * stats[..., 1]).sum(dim=0)
    return (weight[..., None] * outs).sum(dim=0) / total[:, None]
