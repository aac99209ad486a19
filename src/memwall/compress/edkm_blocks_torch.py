"""Differentiable clustering of many short pieces of weights at once, each to a palette of its own. Needs torch.

Source: as `edkm_torch`, whose rounds and gradients these are; palettes of groups of rows are those of the official
code's `granularity=per_grouped_channel` (github.com/apple/coremltools).

Idea: a palette of some rows has some thousand weights, hardly two of them alike, so there is nothing to win by working
out each value once. All pieces go through one round together; a run of them at a time, and what a run needs for the way
back is made again there, so that no map of all weights is ever held.

Units and shapes: weights [pieces, n], palettes [pieces, k]; tau and epsilon [pieces].
Cost: forward and backward take rounds * k operations a weight and more than a dozen passes over maps of `RUN_VALUES`
numbers; kept for backward are the 16-bit weights and k numbers a piece and round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RUN_VALUES = 1 << 21
"""Numbers of a map that are worked on at once."""


def clustered_pieces(
    weights: Tensor,
    palettes: Tensor,
    tau: Tensor,
    epsilon: Tensor,
    *,
    rounds: int = 3,
    least: float = 1e-7,
    half: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft weights [pieces, n] and the palettes after the rounds [pieces, k]; as `edkm_torch.clustered` for each piece.

    Gradients go to `weights`; the palettes given are constants. A run of pieces ends its rounds when none of their
    entries moves by more than epsilon. half: the type that weights are rounded to first.
    """
    soft, found = _Pieces.apply(weights, palettes, tau, epsilon, rounds, least, half)
    return soft, found


def _shares(values: Tensor, palettes: Tensor, tau: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Soft assignments [pieces, k, n] before and after the clamp."""
    free = torch.softmax((values[:, None] - palettes[:, :, None]).square_().div_(-tau[:, None, None]), dim=1)
    return free, free.clamp(min=least)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, given: Tensor, palettes: Tensor, tau: Tensor, epsilon: Tensor, rounds: int, least: float,
        half: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weights = given if half is None else given.to(half)
        soft = torch.empty(given.shape, dtype=palettes.dtype, device=given.device)
        found, paths = torch.empty_like(palettes), []
        for run in _runs(weights, palettes):
            values, path = weights[run].to(palettes.dtype), [palettes[run]]
            for _ in range(rounds):
                shares = _shares(values, path[-1], tau[run], least)[1]
                path.append((shares @ values[:, :, None])[:, :, 0] / shares.sum(2))
                if bool(((path[-1] - path[-2]).abs().amax(1) <= epsilon[run]).all()):
                    break
            soft[run] = (path[-1][:, None] @ shares)[:, 0]
            found[run] = path[-1]
            paths.append(torch.stack(path))
        context.least, context.dtype = least, given.dtype
        context.save_for_backward(weights, tau, *paths)
        context.mark_non_differentiable(found)
        return soft, found

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, tau, *paths = context.saved_tensors
        made = torch.empty(weights.shape, dtype=context.dtype, device=weights.device)
        for run, path in zip(_runs(weights, paths[0][0]), paths, strict=True):
            made[run] = _slope(weights[run].to(path.dtype), path, tau[run], context.least, gradients[0][run])
        return made, None, None, None, None, None, None


def _slope(values: Tensor, path: Tensor, tau: Tensor, least: float, own: Tensor) -> Tensor:
    """Gradient in the values of one run, `own` being that in its soft weights; path [rounds + 1, pieces, k]."""
    own = own.to(values.dtype)
    total, after, last = torch.zeros_like(values), None, path[-1]
    for number in range(len(path) - 1, 0, -1):
        before, made = path[number - 1], path[number]
        free, clamped = _shares(values, before, tau, least)
        passes, apart = free >= least, values[:, None] - before[:, :, None]
        pull = torch.zeros_like(free)  # gradient in the exponents
        if after is None:
            after = (clamped @ own[:, :, None])[:, :, 0]
            pull = _through_softmax(free, passes * last[:, :, None] * own[:, None])
        weight = after / clamped.sum(2)
        pull = pull + _through_softmax(free, passes * (values[:, None] - made[:, :, None]) * weight[:, :, None])
        moved = (pull * apart).div_(tau[:, None, None])
        total += moved.sum(1).mul_(-2) + (weight[:, None] @ clamped)[:, 0]
        after = moved.sum(2).mul_(2)
    return total


def _through_softmax(shares: Tensor, gradient: Tensor) -> Tensor:
    return shares * (gradient - (shares * gradient).sum(1, keepdim=True))


def _runs(weights: Tensor, palettes: Tensor) -> list[slice]:
    pieces, each = len(weights), max(weights.shape[1] * palettes.shape[1], 1)
    step = max(RUN_VALUES // each, 1)
    return [slice(at, min(at + step, pieces)) for at in range(0, pieces, step)]
