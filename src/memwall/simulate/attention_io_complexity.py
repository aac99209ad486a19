"""The least traffic of exact attention for a fast memory of M words, and the schedule and tiles that come near it.

Source: The I/O Complexity of Attention, or How Optimal is Flash Attention?, Saha and Ye 2024, arXiv 2402.07443 (ICML
2024): both regimes and that FlashAttention is optimal in the large one, whatever the algorithm. Schedules of that one:
FlashAttention (Dao 2022, algorithm 1) and FlashAttention-2 (Dao 2023). Word counts and constants were derived here.

Idea: N tokens with heads of d numbers. From M = d^2 on, blocks of whole rows of Q, K and V are best, and N^2 d^2 / M
words must move; below it a d x d tile does not fit, both products are tiled as matrix products are, and it is
N^2 d / sqrt(M). At M = d^2 both are N^2. Inputs and output, 4 N d words, are the floor.

    schedule      words of one head, N a multiple of all tiles                        leading term
    kv-outer      2 N d + N / B_c (3 N d + 4 N)              B_c = M / 4 d            12 N^2 d^2 / M
    q-outer       2 N d + N / B_r 2 N d                      B_r about M / 2 d        4 N^2 d^2 / M
    unfused       4 N^2 d / t + 4 N^2 + N d                  t = sqrt(M / 3)          4 sqrt(3) N^2 d / sqrt(M)
    three-phase   4 N^2 d / t + N^2 + 4 N + N d, or so       t about sqrt(M)          4 N^2 d / sqrt(M)

kv-outer is FlashAttention, q-outer FlashAttention-2 with the tallest row blocks that fit. unfused writes scores and
probabilities, with square tiles; three-phase writes scores alone, keeps the softmax's maxima and sums while it makes
them, and turns scores into probabilities as they are loaded for the second product.

Units: words, one number each; M, and all counts, which are exact (partial blocks, statistics) and equal to what
`attention_schedules` moves through `fast_memory`. Query heads that share a KV head are rows of one problem; batch and
KV heads are problems of their own.

Differs from the paper: it states orders; constants are this file's. FlashAttention's B_c = M / 4 d leaves no room for
scores and statistics unless row blocks are cut, as they are here. `lower_bound` is proven at the function for
executions that evaluate every product q_ik k_jk; the paper's bound against any algorithm, fast matrix products too, is
taken with the constant 1/8 (`any_algorithm_bound`), which is not proven here.

Cost: microseconds to milliseconds a plan; causal counts take memory for a number per token and KV head.

Holds when: softmax(Q K^T) V is computed exactly. Traffic of instructions, and of caches that share lines, is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.simulate.attention_shape import Attention

SCHEDULES = ("kv-outer", "q-outer", "three-phase", "unfused")


# ---- bounds --------------------------------------------------------------------------------------------------------


def regime(shape: Attention, fast_words: int) -> str:
    """`small` below M = d^2, `large` from there on, `floor` where inputs and output are most of the bound."""
    if _order(shape, fast_words) < shape.compulsory:
        return "floor"
    return "large" if fast_words >= shape.head_size**2 else "small"


def io_star(shape: Attention, fast_words: int) -> float:
    """The paper's order with constant 1: the larger of the floor and N^2 d^2 / M, below M = d^2 N^2 d / sqrt(M).

    N^2 stands for the scores that the mask leaves. It is what gaps are told against, and no bound by itself.
    """
    return max(float(shape.compulsory), _order(shape, fast_words))


def _order(shape: Attention, fast_words: int) -> float:
    scores, size = shape.problems * shape.scores, shape.head_size
    return scores * size**2 / fast_words if fast_words >= size**2 else scores * size / math.sqrt(fast_words)


def lower_bound(shape: Attention, fast_words: int) -> int:
    """Words that no execution which evaluates each product q_ik k_jk can do without.

    Cut an execution where M words more have moved. In such an epoch at most 2 M words of Q and K are at hand (M held,
    M moved), q and k of them. A score whose d products all fall in it has its whole rows among them: at most q k / d^2
    <= (M / d)^2 scores, so M^2 / d products. Of any other score a partial sum is held at one of the epoch's ends or
    moved: at most 3 M, and by Loomis and Whitney at most sqrt(q k 3 M) <= sqrt(3) M^1.5 products. So there are
    scores d / (M^2 / d + sqrt(3) M^1.5) epochs at least, and all but the last have moved M words. It holds with
    recomputation too: of each score the products of one evaluation count.
    """
    most = fast_words**2 / shape.head_size + math.sqrt(3) * fast_words**1.5
    epochs = math.ceil(shape.problems * shape.scores * shape.head_size / most) - 1
    return max(shape.compulsory, fast_words * epochs, math.ceil(any_algorithm_bound(shape, fast_words)))


def any_algorithm_bound(shape: Attention, fast_words: int) -> float:
    """N^2 d^2 / 8 M from M = d^2 on: the paper's bound, for fast matrix products too, with a cautious constant."""
    return _order(shape, fast_words) / 8 if fast_words >= shape.head_size**2 else 0.0


# ---- plans ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What stays, rows x columns, and how much passes it at a time."""

    rows: int
    columns: int
    depth: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A schedule with its tiles. Of kv-outer and q-outer one: rows of Q by keys. Of the others two: of the scores, rows
    by keys, and of what comes out, rows by numbers of the head.

    softmax: `folded` into the first product, `lazy` (a sweep for maxima and sums), or `sweeps` (one more that writes
    probabilities); kv-outer and q-outer have it inside.
    """

    schedule: str
    tiles: tuple[Tile, ...]
    softmax: str = "online"


def make_plan(shape: Attention, fast_words: int, schedule: str, *, step: int = 1) -> Plan:
    """A schedule with the best tiles that fit. step: tiles of products are so many numbers of a row wide, or some times
    as many, and so many deep, as lines of a cache want it.

    InputError for an unknown schedule; DoesNotFit that names the least words where no tile fits.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"no schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    if schedule == "kv-outer":
        return Plan(schedule=schedule, tiles=(_key_blocks(shape, fast_words),))
    if schedule == "q-outer":
        return Plan(schedule=schedule, tiles=(_row_blocks(shape, fast_words),))
    kept = 0 if shape.backward or schedule == "unfused" else 2
    if fast_words < 3 + kept:
        raise DoesNotFit(f"{fast_words} words: {schedule} needs {3 + kept} at least")
    if schedule == "unfused":
        side = math.isqrt(fast_words // 3)
        side = side // step * step or side
        square = Tile(rows=side, columns=side, depth=side)
        return Plan(schedule=schedule, tiles=(square, square), softmax="sweeps")
    rows, keys, size = shape.rows, shape.num_keys, shape.head_size
    tiles = [_product_tile(rows, size, keys, fast_words, kept, step)]
    tiles.append(_product_tile(rows, keys, size, fast_words, kept, step))
    return Plan(schedule=schedule, tiles=tuple(tiles), softmax="folded")


def plans(shape: Attention, fast_words: int, *, step: int = 1) -> dict[str, Plan]:
    """All schedules that this memory has room for."""
    found = {}
    for name in SCHEDULES:
        try:
            found[name] = make_plan(shape, fast_words, name, step=step)
        except DoesNotFit:
            continue
    if not found:
        raise DoesNotFit(f"{fast_words} words of fast memory: no schedule works in fewer than 3")
    return found


def choose(shape: Attention, fast_words: int) -> Plan:
    """The plan that moves fewest words: q-outer from about M = d^2 on, three-phase below."""
    return min(plans(shape, fast_words).values(), key=lambda plan: count_words(shape, plan))


def optimality_gap(shape: Attention, fast_words: int, words: float) -> float:
    """Words that a schedule moved, by `io_star`."""
    return words / io_star(shape, fast_words)


def _key_blocks(shape: Attention, words: int) -> Tile:
    """FlashAttention's B_c = M / 4 d, and as many rows as then fit, d at most. For gradients, where K, V and theirs
    stay, as many keys as fit beside a row.
    """
    size = shape.head_size
    streams, kept = (3 * size + 2, 4 * size) if shape.backward else (2 * size + 2, 2 * size)
    scores = 2 if shape.backward else 1
    least = kept + streams + scores
    if words < least:
        raise DoesNotFit(f"{words:,} words: kv-outer with heads of {size} needs {least:,} at least")
    most = (words - streams) // (kept + scores)
    keys = min(most if shape.backward else max(1, words // (4 * size)), most, shape.num_keys)
    rows = min((words - keys * kept) // (streams + scores * keys), size, shape.rows)
    return Tile(rows=rows, columns=keys, depth=size)


def _row_blocks(shape: Attention, words: int) -> Tile:
    """Fewest row blocks, all about as tall, and the key blocks that then fit."""
    if shape.backward:
        raise DoesNotFit("q-outer has no gradients here: kv-outer and three-phase do")
    size = shape.head_size
    least = 4 * size + 3
    if words < least:
        raise DoesNotFit(f"{words:,} words: q-outer with heads of {size} needs {least:,} at least")
    most = (words - 2 * size) // (2 * size + 3)
    rows = math.ceil(shape.rows / math.ceil(shape.rows / most))
    keys = (words - rows * (2 * size + 2)) // (2 * size + rows)
    return Tile(rows=rows, columns=min(keys, shape.num_keys), depth=size)


def _product_tile(rows: int, depth: int, columns: int, words: int, kept: int, step: int) -> Tile:
    """The tile for out[rows, columns], summed over depth, that moves fewest words. kept: words held for each row."""
    parts = np.unique(np.geomspace(1, columns, 400).astype(np.int64))
    wide = np.unique(np.minimum(-(-columns // (parts * step)) * step, columns))
    step = min(step, depth)
    tall = np.minimum((words - step * wide) // (wide + step + kept), rows)
    fits = tall >= 1
    if not fits.any():
        raise DoesNotFit(f"{words:,} words: no tile {step} deep and {wide[0]} wide fits")
    wide, tall = wide[fits], tall[fits]
    moved = rows * depth * -(-columns // wide) + depth * columns * -(-rows // tall)
    best = int(np.argmin(moved))
    width, height = int(wide[best]), math.ceil(rows / math.ceil(rows / int(tall[best])))
    deep = (words - height * (width + kept)) // (height + width)
    return Tile(rows=height, columns=width, depth=min(int(deep) // step * step, depth))


# ---- counts --------------------------------------------------------------------------------------------------------


def count_words(shape: Attention, plan: Plan) -> int:
    """Words that a plan moves, all problems: exactly what the executor counts."""
    count = (_GRADIENTS if shape.backward else _COUNTS)[plan.schedule]
    return shape.problems * count(shape, plan)


def words_needed(shape: Attention, plan: Plan) -> int:
    """The fast memory that a plan needs, and with a word less is refused; under a causal mask, which may cut every
    block short, what is enough.
    """
    rows, keys, size = shape.rows, shape.num_keys, shape.head_size
    if plan.softmax == "online":
        tall, wide = min(plan.tiles[0].rows, rows), min(plan.tiles[0].columns, keys)
        if shape.backward:
            return 4 * wide * size + tall * (3 * size + 2 + 2 * wide)
        return 2 * wide * size + tall * (2 * size + 2 + wide)
    extents = ((rows, keys, size), (rows, size, keys))
    if shape.backward:
        return max(_needed(plan.tiles[0], *extents[0], 0), _gradient_words_needed(shape, plan))
    kept = (2 if plan.softmax == "folded" else 0, 0 if plan.softmax == "sweeps" else 2)
    tiles = [_needed(tile, *extent, more) for tile, extent, more in zip(plan.tiles, extents, kept, strict=True)]
    swept = min(plan.tiles[0].rows, rows) * (min(plan.tiles[0].columns, keys) + 2)
    return max(*tiles, 0 if plan.softmax == "folded" else swept)


def _needed(tile: Tile, rows: int, columns: int, depth: int, kept: int) -> int:
    tall, wide, deep = min(tile.rows, rows), min(tile.columns, columns), min(tile.depth, depth)
    return tall * wide + (tall + wide) * deep + kept * tall


def _gradient_words_needed(shape: Attention, plan: Plan) -> int:
    rows, keys, size = shape.rows, shape.num_keys, shape.head_size
    scores, out = plan.tiles
    tall, wide = min(scores.rows, rows), min(scores.columns, keys)
    return max(tall * wide + wide + 1, _needed(out, rows, size, keys, 0), _needed(out, keys, size, rows, 0))


def _row_ends(shape: Attention, tile_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(heights, keys seen) of the blocks of rows."""
    starts = np.arange(0, shape.rows, tile_rows, dtype=np.int64)
    ends = np.minimum(starts + tile_rows, shape.rows)
    return ends - starts, shape.seen(ends - 1)


def _key_outer_words(shape: Attention, plan: Plan) -> int:
    starts = np.arange(0, shape.num_keys, plan.tiles[0].columns, dtype=np.int64)
    passing = int((shape.rows - shape.first_row(starts)).sum())
    return 2 * shape.num_keys * shape.head_size + passing * (3 * shape.head_size + 4)


def _row_outer_words(shape: Attention, plan: Plan) -> int:
    _, seen = _row_ends(shape, plan.tiles[0].rows)
    return 2 * shape.rows * shape.head_size + 2 * shape.head_size * int(seen.sum())


def _phases_words(shape: Attention, plan: Plan) -> int:
    scores, out = plan.tiles
    size = shape.head_size
    heights, seen = _row_ends(shape, scores.rows)
    made = int((heights * seen).sum())
    words = int((heights * size * -(-seen // scores.columns) + seen * size).sum()) + made
    if plan.softmax == "sweeps":
        words += 3 * made
    elif plan.softmax == "lazy":
        words += made
    if plan.softmax != "sweeps":  # maxima and sums are written, and read with each tile that comes out
        words += 2 * shape.rows * (1 + -(-size // out.columns))
    heights, seen = _row_ends(shape, out.rows)
    return words + int((heights * seen * -(-size // out.columns) + seen * size).sum()) + shape.rows * size


def _key_outer_gradient_words(shape: Attention, plan: Plan) -> int:
    starts = np.arange(0, shape.num_keys, plan.tiles[0].columns, dtype=np.int64)
    passing = int((shape.rows - shape.first_row(starts)).sum())
    size = shape.head_size
    return 4 * shape.num_keys * size + passing * (4 * size + 2) + shape.rows * (2 * size + 1)


def _phases_gradient_words(shape: Attention, plan: Plan) -> int:
    scores, out = plan.tiles
    rows, keys, size = shape.rows, shape.num_keys, shape.head_size
    heights, seen = _row_ends(shape, scores.rows)
    across = -(-seen // scores.columns)
    once = int((heights * size * across + seen * size + heights * seen + heights * across).sum())
    words = 2 * once + int((heights * seen).sum()) + rows * (2 * size + 1)
    heights, seen = _row_ends(shape, out.rows)
    panels = -(-size // out.columns)
    words += int((heights * seen * panels + seen * size).sum()) + rows * size
    starts = np.arange(0, keys, out.rows, dtype=np.int64)
    widths, passing = np.minimum(starts + out.rows, keys) - starts, rows - shape.first_row(starts)
    return words + 2 * (int((widths * passing * panels + passing * size).sum()) + keys * size)


_COUNTS: dict[str, Callable[[Attention, Plan], int]] = {
    "kv-outer": _key_outer_words,
    "q-outer": _row_outer_words,
    "three-phase": _phases_words,
    "unfused": _phases_words,
}
_GRADIENTS: dict[str, Callable[[Attention, Plan], int]] = {
    "kv-outer": _key_outer_gradient_words,
    "three-phase": _phases_gradient_words,
    "unfused": _phases_gradient_words,
}


def crossing(shape: Attention, first: str, second: str) -> int:
    """The least M from which `first` moves no more words than `second`, by halves between 16 words and all inputs."""
    low, high = 16, 4 * (shape.rows + shape.num_keys) * shape.head_size

    def ahead(words: int) -> bool:
        try:
            one = count_words(shape, make_plan(shape, words, first))
        except DoesNotFit:
            return False
        return one <= count_words(shape, make_plan(shape, words, second))

    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (low, middle) if ahead(middle) else (middle, high)
    return high
