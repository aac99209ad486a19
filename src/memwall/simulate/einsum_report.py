"""What `memwall simulate cascade` tells: Einsums and their passes, what lies between, work, a check of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.simulate.attention_cascades import ATTENTION, TEXTS, cascade, pass_rank
from memwall.simulate.einsum_cascade import Cascade
from memwall.simulate.einsum_passes import fiber_cost, passes
from memwall.simulate.einsum_run import MOST_BYTES, run_cascade, sizes_of
from memwall.simulate.einsum_work import all_operations, operations

EINSUM_COLUMNS = ("pass", "Einsum", "operations a point")
LIST_COLUMNS = ("cascade", "rank", "passes", "sweeps", "held a row", "fetched again", "divisions a row")
USUAL = 4096
"""Points of the rank that passes are counted over, for the table of all cascades."""
TILE = 256
OTHER = {"p": 1, "e": 64, "f": 64, "n": 64, "i": 4}


def usual_sizes(one: Cascade) -> dict[str, int]:
    """Sizes for a table: one row of queries, heads of 64, a long rank of 4096 in tiles of 256."""
    found = {rank: OTHER.get(rank, USUAL) for rank in one.ranks}
    for split in one.splits:
        found |= {split.whole: USUAL, split.inner: TILE, split.outer: USUAL // TILE}
    for axes in one.inputs.values():
        for rank in axes:
            found.setdefault(rank, OTHER.get(rank, USUAL))
    return found


def table() -> list[dict[str, Any]]:
    """Every cascade of `attention_cascades`: what it costs a row."""
    rows = []
    for name in TEXTS:
        one = cascade(name)
        rank, sizes = pass_rank(one), usual_sizes(one)
        found = passes(one, rank)
        cost = None if found.growth else fiber_cost(one, rank, sizes)
        rows.append({
            "cascade": name, "attention": name in ATTENTION, "rank": rank, "passes": found.count,
            "growth": found.growth, "grows_with": found.grows_with, "told": str(found), "sweeps": found.sweeps,
            "by_input": dict(found.by_input), "sizes": sizes,
            "held_words": None if cost is None else cost.held_words,
            "fetched_words": None if cost is None else cost.fetched_words,
            "divisions": all_operations(one, sizes)["divide"],
        })  # fmt: skip
    return rows


def table_cells(row: dict[str, Any]) -> list[str]:
    """A line of it."""
    words = ["all" if row[name] is None else f"{row[name]:,}" for name in ("held_words", "fetched_words")]
    return [row["cascade"], row["rank"], row["told"], str(row["sweeps"]), *words, f"{row['divisions']:,}"]


def describe(one: Cascade, rank: str | None, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Passes over a rank (None: the one of interest), of each Einsum, and what lies between them."""
    rank = pass_rank(one) if rank is None else rank
    found = passes(one, rank)
    ranks = dict.fromkeys((*one.ranks, *(split.whole for split in one.splits)))
    known = usual_sizes(one) | _with_tiles(one, sizes)
    told: dict[str, Any] = {
        "rank": rank, "passes": found.count, "growth": found.growth, "grows_with": found.grows_with,
        "told": str(found), "sweeps": found.sweeps, "by_input": dict(found.by_input),
        "by_rank": {each: str(passes(one, each)) for each in ranks},
        "inputs": {name: list(axes) for name, axes in one.inputs.items()}, "outputs": list(one.outputs),
        "sizes": known, "operations": dict(all_operations(one, known)), "held": [], "held_words": None,
        "fetched_words": None,
        "einsums": [
            {"text": str(each), "pass": found.by_einsum.get(each.name) if not each.starts else None,
             "operations": {} if each.starts else dict(operations(each))}
            for each in one.einsums
        ],
    }  # fmt: skip
    if not found.growth:
        cost = fiber_cost(one, rank, known)
        told["held"] = [{"tensor": each.tensor, "made": each.made, "used": each.used, "words": each.words}
                        for each in cost.held]  # fmt: skip
        told |= {"held_words": cost.held_words, "fetched_words": cost.fetched_words}
    return told


def einsum_cells(row: dict[str, Any]) -> list[str]:
    """A line of the table of Einsums."""
    work = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in row["operations"].items())
    return ["" if row["pass"] is None else str(row["pass"]), row["text"], work]


def _with_tiles(one: Cascade, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes that were given, and the numbers of tiles that follow."""
    unknown = [rank for rank in sizes if rank not in usual_sizes(one)]
    if unknown:
        raise InputError(f"--sizes: no rank {unknown[0]!r}; there are {', '.join(usual_sizes(one))}")
    found = dict(sizes)
    for split in one.splits:
        whole, inner = found.get(split.whole, USUAL), found.get(split.inner, TILE)
        found[split.outer] = -(-whole // inner)
    return found


def carried_out(one: Cascade, sizes: Mapping[str, int], seed: int, name: str | None) -> dict[str, Any]:
    """A cascade on normal numbers: what came out, and how far float32 is from float64; of attention, from softmax too.

    InputError where that would take more than `MOST_BYTES`.
    """
    known = usual_sizes(one) | {"p": 64, "m": 512, "d": 512} | dict(sizes)
    shapes = {each: tuple(known[rank] for rank in axes) for each, axes in one.inputs.items()}
    for each, shape in shapes.items():
        if 8 * math.prod(shape) > MOST_BYTES:
            raise InputError(f"--run: input {each} of {' x '.join(map(str, shape))} is too large; give smaller --sizes")
    draw = np.random.default_rng(seed)
    inputs = {each: draw.standard_normal(shape) for each, shape in shapes.items()}
    inputs = {each: np.abs(array) if not array.shape else array for each, array in inputs.items()}
    fixed = {rank for axes in one.inputs.values() for rank in axes} | {split.outer for split in one.splits}
    free = {rank: size for rank, size in known.items() if rank in one.ranks and rank not in fixed}
    exact = run_cascade(one, inputs, free)
    single = run_cascade(one, {each: array.astype(np.float32) for each, array in inputs.items()}, free)
    outputs = one.outputs or tuple(exact)
    told: dict[str, Any] = {
        "sizes": sizes_of(one, shapes, free),
        "outputs": {
            each: {"shape": list(exact[each].shape), "finite": bool(np.isfinite(exact[each]).all()),
                   "float32_error": float(np.abs(exact[each] - single[each]).max())}
            for each in outputs
        },
    }  # fmt: skip
    if name in ATTENTION:
        scores = inputs["Q"].T @ inputs["K"]
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        truth = weights @ inputs["V"].T / weights.sum(axis=1, keepdims=True)
        told["softmax_error"] = float(np.abs(exact["AV"].T - truth).max())
    return told
