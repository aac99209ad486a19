"""Differentiable clustering of weights to a palette, worked out over the distinct 16-bit values instead of all weights.

Source: DKM (Minsik Cho, ICLR 2022, arXiv 2108.12659) for the soft k-means; "eDKM: An Efficient and Accurate Train-time
Weight Clustering for Large Language Models" (Minsik Cho, 2023, arXiv 2309.00964), section 2.2, for uniquification.

Idea: weights w, palette c. A few rounds of

    a_ij = softmax_j(-(w_i - c_j)^2 / tau), at least `least`;    c_j = sum_i a_ij w_i / sum_i a_ij

and then w~_i = sum_j a_ij c_j, with a of the last round and the new c. Equal weights have equal rows of a, and 16-bit
weights have at most 65,536 values, so everything is done once per value u that occurs, n_u times:
c_j = sum_u n_u a_uj u / sum_u n_u a_uj. For the gradient of weight i, with g its own and G_u the sum of g over all
weights of value u: w~_i depends on w_i by its own row (g_i P_u, P_u = sum_j c_j da_uj/du) and all w~ depend on it by
every round's c (Q_u, the same for all weights of a value). So dL/dw_i = g_i P_u + Q_u.

Units and shapes: weights [any] of float16 or bfloat16 (others work too, without the saving); centroids [k]; tau in
squared weights. U values occur, at most 65,536.
Cost: forward and backward take rounds * U * k operations and a few over all weights; kept for backward are the 16-bit
weights themselves (their bits are the index of their row) and k numbers a round. Unrolled in plain torch (`unrolled`)
it is several maps of weights * k numbers a round.
Differs from the paper: its hooks store tables and rebuild maps of all weights to replay the graph; here no such map is
ever made. A round's change of c, not of inertia, ends the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from memwall.errors import InputError

HALF_TYPES = (torch.float16, torch.bfloat16)
NUM_HALVES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Softness:
    """tau: how soft, in squared weights. rounds: at most so many; they end when no centroid moves by more than epsilon.
    least: no share is smaller, so that no cluster is ever empty.
    """

    tau: float
    rounds: int = 3
    epsilon: float = 0.0
    least: float = 1e-7

    def __post_init__(self) -> None:
        if not 0 < self.tau < float("inf") or self.rounds < 1 or self.epsilon < 0 or not 0 <= self.least < 1:
            raise InputError(
                f"tau {self.tau:g}, rounds {self.rounds}, epsilon {self.epsilon:g}, least {self.least:g}: tau must be "
                "positive, rounds at least 1, epsilon at least 0, least between 0 and 1"
            )


def distinct(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values that occur [U] (float32, or the wider type of `weights`), how often [U] of that type, and the place among
    them of every weight, integers [weights.numel()]. 16-bit weights are counted by their bits; minus zero is one more
    value.
    """
    flat = weights.detach().reshape(-1)
    if flat.dtype not in HALF_TYPES:
        values, index, counts = torch.unique(flat, return_inverse=True, return_counts=True)
        return values, counts.to(values.dtype), index
    bits = flat.view(torch.int16).to(torch.int32).bitwise_and_(NUM_HALVES - 1)
    counts = torch.bincount(bits, minlength=NUM_HALVES)
    places = torch.nonzero(counts).flatten()
    signed = torch.where(places >= NUM_HALVES // 2, places - NUM_HALVES, places)  # int16 has no other way in
    values = signed.to(torch.int16).view(flat.dtype).float()
    rank = torch.empty(NUM_HALVES, dtype=torch.int32, device=flat.device)
    rank[places] = torch.arange(len(places), dtype=torch.int32, device=flat.device)
    return values, counts[places].float(), rank.index_select(0, bits)


def _shares(values: Tensor, centroids: Tensor, softness: Softness) -> tuple[Tensor, Tensor]:
    """Soft assignment [k, U] before and after the clamp: values run last, as loops over them are the long ones."""
    free = torch.softmax((values - centroids[:, None]).square_().mul_(-1 / softness.tau), dim=0)
    return free, free.clamp(min=softness.least)


def _rounds(values: Tensor, counts: Tensor, centroids: Tensor, softness: Softness) -> list[Tensor]:
    """The palette before the first round and after each [k]."""
    path = [centroids]
    for _ in range(softness.rounds):
        shares = _shares(values, path[-1], softness)[1].mul_(counts)
        path.append((shares @ values) / shares.sum(1))
        if float((path[-1] - path[-2]).abs().max()) <= softness.epsilon:
            break
    return path


class _Cluster(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, given: Tensor, centroids: Tensor, softness: Softness, half: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        weights = given if half is None else given.to(half)
        values, counts, index = distinct(weights)
        path = _rounds(values, counts, centroids.to(values.dtype), softness)
        table = path[-1] @ _shares(values, path[-2], softness)[1]
        context.softness, context.dtype = softness, given.dtype
        context.save_for_backward(weights, torch.stack(path))
        context.mark_non_differentiable(path[-1])
        return table.index_select(0, index).view(weights.shape), path[-1]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weights, path = context.saved_tensors
        softness = context.softness
        values, counts, index = distinct(weights)
        own = gradients[0].reshape(-1).to(values.dtype)
        summed = torch.zeros_like(values).index_add_(0, index, own)
        last = path[-1]
        shared = torch.zeros_like(values)
        direct = torch.zeros_like(values)
        after = None  # gradient of the loss in the palette after the round that is looked at
        for before, made in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
            free, clamped = _shares(values, before, softness)
            passes = free >= softness.least
            apart = values - before[:, None]
            pull = torch.zeros_like(free)  # gradient in the exponents, summed over the weights of a value
            if after is None:
                after = clamped @ summed
                exponents = _through_softmax(free, passes * last[:, None])
                direct = (exponents * apart).sum(0) * (-2 / softness.tau)
                pull = exponents * summed
            weight = after / (clamped @ counts)
            exponents = _through_softmax(free, passes * (values - made[:, None]) * weight[:, None])
            shared += (exponents * apart).sum(0) * (-2 / softness.tau) + weight @ clamped
            pull += exponents * counts
            after = (pull * apart).sum(1) * (2 / softness.tau)
        found = own.mul(direct.index_select(0, index)).add_(shared.index_select(0, index))
        return found.view(weights.shape).to(context.dtype), None, None, None


def _through_softmax(shares: Tensor, gradient: Tensor) -> Tensor:
    return shares * (gradient - (shares * gradient).sum(0, keepdim=True))


def clustered(
    weights: Tensor, centroids: Tensor, softness: Softness, *, half: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Soft weights of the shape of `weights`, in float32 (or their wider type), and the palette after the rounds [k].

    Gradients go to `weights` through assignments and centroids of all rounds; the palette given is a constant. half:
    weights are rounded to this type first, their gradient is not (float32 weights that an optimizer moves).
    """
    soft, found = _Cluster.apply(weights, centroids, softness, half)
    return soft, found


def unrolled(weights: Tensor, centroids: Tensor, softness: Softness) -> tuple[Tensor, Tensor]:
    """The same in plain torch, as DKM has it: maps of weights * k numbers in the type of `weights`, kept for backward
    round by round. For tests, and to see what the saved tensors of such a graph take.
    """
    column = weights.reshape(-1, 1)
    palette = centroids.detach().to(weights.dtype)[:, None]
    for _ in range(softness.rounds):
        distance = (column - palette.T).pow(2)
        shares = torch.softmax(-distance / softness.tau, dim=1).clamp(min=softness.least)
        before, palette = palette, (shares.T @ column) / shares.sum(0)[:, None]
        if float((palette - before).detach().abs().max()) <= softness.epsilon:
            break
    return (shares @ palette).view(weights.shape), palette[:, 0].detach()


def split_duplicates(centroids: Tensor, gap: float) -> Tensor:
    """Sorted centroids [k]; those within `gap` of the one before move halfway to the next that is farther off.

    Where none is farther up, halfway down to the one below; where all are one, nothing moves.
    """
    found = centroids.detach().sort().values.clone()
    apart = torch.cat([found.new_tensor([True], dtype=torch.bool), found.diff() > gap])
    places = torch.nonzero(apart).flatten().tolist()
    if len(places) == len(found) or len(places) == 1:
        return found
    bounds = [*places, len(found)]
    kept = found[apart]
    for at, (start, stop) in enumerate(pairwise(bounds)):
        extra = stop - start - 1
        if extra:
            other = kept[at + 1] if at + 1 < len(kept) else kept[at - 1]
            steps = torch.arange(1, extra + 1, dtype=found.dtype, device=found.device) / (extra + 1)
            # one moves halfway, two to thirds, and so on: none of them shall coincide again
            found[start + 1 : stop] = kept[at] + (other - kept[at]) * steps
    return found.sort().values


def nearest(weights: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of every weight, int64 of the shape of `weights`; centroids [k] in order."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    return torch.bucketize(weights.detach().to(centroids.dtype), middles)
