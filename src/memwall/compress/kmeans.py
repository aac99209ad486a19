"""Weighted k-means: the one that all methods with codebooks share.

Minimises sum over points of weight * |point - nearest centroid|^2 by Lloyd's rounds. A centroid without points (or with
points of no weight) is moved to the point that costs most, so no round ever raises the sum. The search for the nearest
centroid is compiled and holds nothing of the size points x centroids. `quick_kmeans` comes as far in a third of the
work: it begins with a part of the points, and steps go beyond the means (`relax`), as a centroid goes on the way it
went while points still change clusters.

Source: S. Lloyd, "Least squares quantization in PCM", 1982; D. Arthur and S. Vassilvitskii, "k-means++: the advantages
of careful seeding", 2007, for the spread start, here with weights. Points on a line have a best clustering that can be
had (`on_a_line`): its clusters are neighbours, so a table of the best ends of 1, 2, ... clusters finds it; W. Fisher,
"On grouping for maximum homogeneity", 1958.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.kernels.nearest import Nearest

INITS = ("sampled", "spread")
# a spread start looks at every point once per centroid: so many points per centroid are enough for it
_SPREAD_POINTS = 16
# the table takes the square of the points: more of them are first brought together with their neighbours
_LINE_POINTS = 1024
_PLAIN_ROUNDS = 3
"""At the end, where steps go beyond the means before."""
_FEW_POINTS, _LAST_ROUNDS, _RELAX = 32, 20, 0.9
"""Of `quick_kmeans`: points a centroid that it begins with, rounds over all points, steps beyond the means."""
_SHORT_RUNS = 64
"""Into so many runs the numbers of one of many lines are brought together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """What k-means found.

    centroids [k, size] float32; labels [n] int32: the nearest of each point; losses: the weighted sum of squared
    distances after each round, never rising, the last one that of `centroids` and `labels`.
    """

    centroids: np.ndarray
    labels: np.ndarray
    losses: tuple[float, ...]


def kmeans(
    points: np.ndarray,
    num_clusters: int,
    *,
    weights: np.ndarray | None = None,
    init: str | np.ndarray = "sampled",
    iterations: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
    relax: float = 0.0,
) -> Clusters:
    """Cluster points [n, size] float32, n at least 1.

    weights [n], at least 0: what a squared distance costs; None: all alike. init: `sampled` points (likelier the more
    they weigh), `spread` ones (k-means++), or centroids [k, size]. tolerance: stops when a round gains less than this
    share of the loss. relax: how far beyond the means steps go, in parts of the step; the last rounds go to the means,
    and so does one after a round that raised the loss. With no more points than clusters each point is a centroid;
    those left over repeat the last.
    InputError for no points, clusters, or finite numbers.
    """
    points = np.ascontiguousarray(points, np.float32)
    if points.ndim != 2 or not len(points) or num_clusters < 1:
        raise InputError(f"k-means needs points and clusters, got {list(points.shape)} and {num_clusters}")
    weights = np.ones(len(points)) if weights is None else np.asarray(weights, np.float64)
    if not np.isfinite(points).all() or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError("k-means needs finite points and weights of 0 or more; are the model's weights damaged?")
    if not weights.any():
        weights = np.ones(len(points))
    random = np.random.default_rng(seed)
    if not isinstance(init, str):
        centroids = np.array(init, np.float32)
    elif len(points) <= num_clusters:
        centroids = points[np.minimum(np.arange(num_clusters), len(points) - 1)]
    elif init == "spread":
        centroids = _spread(points, num_clusters, weights, random)
    else:
        centroids = points[_drawn(weights, num_clusters, random)]
    best: Clusters | None = None
    means, beyond = centroids, False
    for index in range(max(iterations, 1)):
        labels = Nearest(centroids).labels(points)
        missed = points - centroids[labels]
        costs = np.einsum("nd,nd->n", missed, missed, dtype=np.float64) * weights
        loss = float(costs.sum())
        if best is not None and loss > best.losses[-1]:
            if not beyond:
                break  # rounding to float32 is all that is left to gain
            centroids, beyond = means, False
            continue
        losses = (*(best.losses if best else ()), loss)
        gained = best is None or best.losses[-1] - loss > tolerance * best.losses[-1]
        best = Clusters(centroids=centroids, labels=labels, losses=losses)
        if not gained or loss == 0:
            break
        means, held = _means(points, weights, labels, costs, centroids)
        beyond = relax > 0 and index < iterations - _PLAIN_ROUNDS
        centroids = np.where(held[:, None], means + np.float32(relax) * (means - centroids), means) if beyond else means
    assert best is not None
    return best


def quick_kmeans(
    points: np.ndarray, num_clusters: int, *, weights: np.ndarray, init: str = "sampled", iterations: int = 100,
    seed: int = 0,
) -> Clusters:  # fmt: skip
    """As `kmeans`: most rounds over some 32 points a centroid, then some over all. Its loss is that of `kmeans` within
    the chance of a start (0.997 to 1.001 times, of 256 points a centroid in five dimensions, measured).
    """
    start: str | np.ndarray = init
    if len(points) > 2 * _FEW_POINTS * num_clusters:
        taken = sample(len(points), _FEW_POINTS * num_clusters, seed)
        few = kmeans(
            points[taken],
            num_clusters,
            weights=weights[taken],
            init=init,
            iterations=iterations,
            seed=seed,
            relax=_RELAX,
        )
        start, iterations = few.centroids, min(iterations, _LAST_ROUNDS)
    return kmeans(points, num_clusters, weights=weights, init=start, iterations=iterations, seed=seed, relax=_RELAX)


def on_a_line(values: np.ndarray, weights: np.ndarray, num_clusters: int) -> np.ndarray:
    """Centres of the clusters of numbers [n], n at least 1, with the least squared error: [num_clusters] rising.

    values: in order. weights [n]: above 0. The best there is for up to 1,024 numbers; of more, neighbours of about
    equal weight are clustered as one, which `kmeans` from there makes good. With too few the last is repeated.
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if len(values) > _LINE_POINTS:
        share = np.cumsum(weights) - weights / 2
        place = np.minimum((share * (_LINE_POINTS / weights.sum())).astype(np.int64), _LINE_POINTS - 1)
        starts = np.flatnonzero(np.diff(place, prepend=-1))
        values = np.add.reduceat(values * weights, starts) / np.add.reduceat(weights, starts)
        weights = np.add.reduceat(weights, starts)
    middle = float(values @ weights / weights.sum())  # about which sums of squares cancel least
    values = values - middle
    moments = [np.concatenate([[0.0], np.cumsum(weights * values**power)]) for power in range(3)]
    count, sums, squares = (moment[None, :] - moment[:, None] for moment in moments)  # [from, to)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(count > 0, np.maximum(squares - sums**2 / count, 0), np.inf)
        centre = sums / count
    best, cuts = error[0], []
    for _ in range(min(num_clusters, len(values)) - 1):
        totals = best[:, None] + error
        cuts.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    stop, centres = len(values), []
    for cut in reversed(cuts):
        centres.append(centre[cut[stop], stop])
        stop = int(cut[stop])
    found = np.array([centre[0, stop], *reversed(centres)]) + middle
    return np.pad(found, (0, num_clusters - len(found)), mode="edge").astype(np.float32)


def on_lines(lines: np.ndarray, num_clusters: int, *, rounds: int = 100) -> np.ndarray:
    """Centres of clusters of many short lines of numbers at once: [lines, n] -> [lines, num_clusters] float32, rising.

    Each begins with the best clusters of 64 runs of its numbers in order (as `on_a_line`), and Lloyd's rounds go on
    from there until no border moves. With fewer numbers than clusters the last is repeated.
    """
    values = np.sort(np.asarray(lines, np.float64), axis=1)
    if not np.isfinite(values).all():
        raise InputError("k-means needs finite points; are the model's weights damaged?")
    count, size = values.shape
    sums = np.concatenate([np.zeros((count, 1)), np.cumsum(values, axis=1)], axis=1)
    bounds = np.linspace(0, size, min(_SHORT_RUNS, size) + 1).astype(np.int64)
    found = np.concatenate(
        [_best_runs(values[at : at + 256], bounds, num_clusters) for at in range(0, max(count, 1), 256)]
    )
    # all lines as one: a line's numbers lie above those of the line before it
    low = values[:, :1]
    span = float((values[:, -1:] - low).max(initial=0)) + 1.0
    shifts = 2 * span * np.arange(count)[:, None]
    flat = (values - low + shifts).reshape(-1)
    starts = size * np.arange(count)[:, None]
    last = None
    for _ in range(rounds):
        middles = np.clip((found[:, 1:] + found[:, :-1]) / 2 - low, -0.5, span) + shifts
        inner = np.searchsorted(flat, middles.reshape(-1)).reshape(middles.shape) - starts
        if last is not None and np.array_equal(inner, last):
            break
        last = inner
        ends = np.concatenate([np.zeros((count, 1), np.int64), inner, np.full((count, 1), size)], axis=1)
        held = np.diff(ends, axis=1)
        means = np.diff(np.take_along_axis(sums, ends, axis=1), axis=1) / np.maximum(held, 1)
        found = np.maximum.accumulate(np.where(held > 0, means, found), axis=1)
    return found.astype(np.float32)


def _best_runs(values: np.ndarray, bounds: np.ndarray, num_clusters: int) -> np.ndarray:
    """Centres of the best clusters of runs [bounds[i], bounds[i + 1]) of numbers in order, line by line."""
    runs = len(bounds) - 1
    centred = values - values.mean(axis=1, keepdims=True)
    moments = []
    for power in (1, 2):
        whole = np.concatenate([np.zeros((len(values), 1)), np.cumsum(centred**power, axis=1)], axis=1)[:, bounds]
        moments.append(whole[:, None, :] - whole[:, :, None])  # [line, from, to)
    held = (bounds[None, :] - bounds[:, None]).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(held > 0, np.maximum(moments[1] - moments[0] ** 2 / held, 0), np.inf)
        centre = moments[0] / held
    best, cuts = error[:, 0], []
    for _ in range(min(num_clusters, runs) - 1):
        totals = best[:, :, None] + error
        cuts.append(totals.argmin(axis=1))
        best = totals.min(axis=1)
    line, stop = np.arange(len(values)), np.full(len(values), runs)
    centres = []
    for cut in reversed(cuts):
        start = cut[line, stop]
        centres.append(centre[line, start, stop])
        stop = start
    centres.append(centre[line, 0, stop])
    found = np.stack(centres[::-1], axis=1) + values.mean(axis=1, keepdims=True)
    return np.pad(found, ((0, 0), (0, num_clusters - found.shape[1])), mode="edge")


def sample(count: int, most: int, seed: int = 0) -> np.ndarray | slice:
    """Which of `count` points to cluster where more than `most` would only take longer."""
    if count <= most:
        return slice(None)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _means(
    points: np.ndarray, weights: np.ndarray, labels: np.ndarray, costs: np.ndarray, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means of the clusters, and which have weight; those without move to the points that cost most."""
    count, size = before.shape
    held = np.bincount(labels, weights, count)
    means = np.empty((count, size))
    for d in range(size):
        means[:, d] = np.bincount(labels, weights * points[:, d], count)
    full = held > 0
    means[full] /= held[full, None]
    empty = np.flatnonzero(~full)
    means[empty] = before[empty]
    if len(empty):
        costly = np.argsort(-costs, kind="stable")[: len(empty)]
        means[empty[: len(costly)]] = points[costly]
    return means.astype(np.float32), full


def _drawn(weights: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """So many different points, drawn one after the other by their weights; those without weight come last."""
    with np.errstate(divide="ignore"):
        keys = np.log(weights) + random.gumbel(size=len(weights))
    return np.argsort(-keys, kind="stable")[:count]


def _spread(points: np.ndarray, count: int, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """k-means++: each next centroid is drawn by what a point costs with those before it."""
    chosen = sample(len(points), _SPREAD_POINTS * count, int(random.integers(1 << 31)))
    points, weights = points[chosen], weights[chosen]
    if not weights.any():
        weights = np.ones(len(points))
    centroids = np.empty((count, points.shape[1]), np.float32)
    nearest = np.full(len(points), np.inf)
    costs = weights
    for index in range(count):
        sums = np.cumsum(costs)
        total = sums[-1] if sums[-1] > 0 else 0.0
        drawn = int(np.searchsorted(sums, random.random() * total, side="right")) if total else index % len(points)
        centroids[index] = points[min(drawn, len(points) - 1)]
        np.minimum(nearest, np.square(points - centroids[index]).sum(axis=1, dtype=np.float64), out=nearest)
        costs = weights * nearest
    return centroids
