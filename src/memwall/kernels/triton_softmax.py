"""The running softmax of GPU attention, in Triton: what a tile of keys adds to what the tiles before it gave."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_tile(query, keys, values, seen, scale, peak, total, held):  # type: ignore[no-untyped-def]
    """(peak, total, held) with a tile: query [ROWS, DIM], keys and values [KEYS, DIM], seen [ROWS, KEYS]; held [ROWS,
    DIM] is the sum of values weighted by exp(logit - peak), total that of the weights.
    """
    logit = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    logit = tl.where(seen, logit, -1e30)
    new_peak = tl.maximum(peak, tl.max(logit, axis=1))
    chance = tl.where(seen, tl.exp(logit - new_peak[:, None]), 0.0)
    fade = tl.exp(peak - new_peak)
    total = total * fade + tl.sum(chance, axis=1)
    held = held * fade[:, None] + tl.dot(chance.to(values.dtype), values, input_precision="ieee")
    return new_peak, total, held
