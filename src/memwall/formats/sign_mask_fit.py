"""How blocks of sign-and-mask weights are fitted: shared by the codecs' own encoding and by the compensated sweeps.

Everything is for one block: values [rows, n] float32 with n at most 128 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwall.formats.base import Packed
from memwall.formats.sign_mask import (
    BLOCK,
    MOST_SALIENT,
    BillmCodec,
    Bits,
    PbLlmCodec,
    as_half,
    billm_values,
    binarized,
)

PERCENTILES = np.linspace(0.1, 0.9, 81)
SEARCH_ROWS = 512
"""Rows that stand for all where a block's split is searched: it is one number for all of them."""
_TOP = 255


@dataclass(slots=True, kw_only=True)
class BillmBlock:
    """order [n]: columns with salient ones first; the rest is in that order, but values: what the block decodes to."""

    order: np.ndarray
    num_salient: int
    signs: np.ndarray
    masks: np.ndarray
    params: np.ndarray
    values: np.ndarray


def billm_block(values: np.ndarray, weights: np.ndarray, scores: np.ndarray | None = None) -> BillmBlock:
    """Salient columns, the split of the others, and all parameters.

    weights [n]: what a squared error of a column costs; salient columns are sought in the order of what theirs could
    cost. The searches themselves count plain errors, as columns of a block do not make up for one another.
    scores [rows, n]: what the split looks at in place of |value| (the published code's score map).
    """
    sampled = np.unique(np.linspace(0, len(values) - 1, min(len(values), SEARCH_ROWS)).astype(np.int64))
    some = values[sampled]
    by_score = np.argsort(-(np.square(some).sum(axis=0) * weights), kind="stable")
    count = _salient_count(some, by_score)
    salient = np.zeros(values.shape[1], bool)
    salient[by_score[:count]] = True
    sizes = np.abs(values) if scores is None else scores
    threshold = _threshold(some[:, ~salient], sizes[sampled][:, ~salient])
    masks, params = sizes > threshold, np.zeros((len(values), 7), np.float32)
    for start, members in ((0, ~masks & ~salient), (2, masks & ~salient)):
        params[:, start], params[:, start + 1] = binarized(values, members)
    signs = values >= np.where(masks, params[:, 2:3], params[:, :1])
    if count:
        signs[:, salient], masks[:, salient], params[:, 4:] = _residual(values[:, salient])
    params = as_half(params, "billm").astype(np.float32)
    order = np.concatenate([np.flatnonzero(salient), np.flatnonzero(~salient)])
    return BillmBlock(
        order=order, num_salient=count, signs=signs[:, order], masks=masks[:, order], params=params,
        values=billm_values(signs, masks, params, salient),
    )  # fmt: skip


def _residual(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two signs of columns [rows, k], and mean, first and second scale [rows, 3]: the means of both steps are one."""
    every = np.ones(values.shape, bool)
    mean, first = binarized(values, every)
    above = values >= mean[:, None]
    left = values - (mean[:, None] + np.where(above, first[:, None], -first[:, None]))
    second_mean, second = binarized(left, every)
    return above, left >= second_mean[:, None], np.stack([mean + second_mean, first, second], axis=1)


def _salient_count(values: np.ndarray, by_score: np.ndarray) -> int:
    """How many of the columns with the largest scores are salient: all counts below `MOST_SALIENT` are tried.

    The others count with two signs too, which is about what their split will lose: with one, more columns would always
    look better than fewer.
    """
    best, least = 0, _residual_cost(values)
    for count in range(1, min(MOST_SALIENT, values.shape[1])):
        cost = _residual_cost(values[:, by_score[:count]]) + _residual_cost(values[:, by_score[count:]])
        if cost < least:
            best, least = count, cost
    return best


def _residual_cost(values: np.ndarray) -> float:
    """Squared error that two signs leave of these columns."""
    left = values - values.mean(axis=1, keepdims=True)
    for _ in range(2):
        left = np.abs(left)
        left -= left.mean(axis=1, keepdims=True)
    return float(np.square(left).sum())


def _threshold(values: np.ndarray, sizes: np.ndarray) -> float:
    """The size that splits these columns at the least squared error, of 81 percentiles."""
    if not values.size:
        return 0.0
    best, least = 0.0, np.inf
    for threshold in np.quantile(sizes, PERCENTILES):
        far, cost = sizes > threshold, 0.0
        for members in (far, ~far):
            count = np.maximum(members.sum(axis=1, keepdims=True), 1)
            away = np.abs(values - (members * values).sum(axis=1, keepdims=True) / count) * members
            cost += float(np.square(away).sum() - (np.square(away.sum(axis=1, keepdims=True)) / count).sum())
        if cost < least:
            best, least = float(threshold), cost
    return best


def nearest_level(values: np.ndarray, params: np.ndarray, *, salient: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [rows] (sign + 2 * mask) of the nearest of a column's four levels, and the levels [rows]."""
    codes = np.arange(4)
    signs, masks = np.broadcast_to(codes & 1 == 1, (len(values), 4)), np.broadcast_to(codes >> 1 == 1, (len(values), 4))
    levels = billm_values(signs, masks, params, np.full(4, salient))
    nearest = np.abs(levels - values[:, None]).argmin(axis=1)
    return nearest.astype(np.uint8), levels[np.arange(len(values)), nearest]


def billm_pack(form: BillmCodec, blocks: Sequence[BillmBlock], order: np.ndarray) -> Packed:
    """Blocks side by side; order [cols]: the column of the matrix at each place that blocks were taken from."""
    places = np.concatenate([index * BLOCK + block.order for index, block in enumerate(blocks)])
    bits = Bits(
        signs=np.concatenate([block.signs for block in blocks], axis=1),
        masks=np.concatenate([block.masks for block in blocks], axis=1),
        params=np.stack([block.params for block in blocks], axis=1),
    )
    return form.pack(bits, np.array([block.num_salient for block in blocks]), order[places])


# -- PB-LLM ------------------------------------------------------------------------------------------------------------


def row_steps(values: np.ndarray) -> np.ndarray:
    """Step and zero [rows, 2] float32 of 8-bit codes from a row's least to its largest value."""
    low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
    step = (high - low) / np.float32(_TOP)
    return np.stack([step, np.rint(-low / np.where(step == 0, np.float32(1), step))], axis=1).astype(np.float32)


def byte_codes(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """8-bit codes uint8 of values [rows, n] in steps [rows, 2]."""
    step, zero = steps[:, :1], steps[:, 1:]
    return np.clip(np.rint(values / np.where(step == 0, np.float32(1), step)) + zero, 0, _TOP).astype(np.uint8)


def pb_block(
    form: PbLlmCodec,
    values: np.ndarray,
    scores: np.ndarray,
    *,
    means: str = "counted",
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask [rows, n] of the salient weights, those with the largest scores, and params [rows, 2] of the others.

    means: over the others alike (`counted`) or by what an error in their column costs, weights [n] (`weighted`), or as
    in the published code over all columns with salient ones as zeros (`published`).
    """
    count = form.num_salient(*values.shape)
    mask = np.zeros(values.size, bool)
    if count:
        mask[np.argpartition(-scores, count - 1, axis=None)[:count]] = True
    salient = mask.reshape(values.shape)
    if means == "published":
        mean, scale = binarized(np.where(salient, np.float32(0), values), np.ones(salient.shape, bool))
    else:
        mean, scale = binarized(values, ~salient, weights if means == "weighted" else None)
    return salient, as_half(np.stack([mean, scale], axis=1), form.spec).astype(np.float32)
