"""Schedules of attention carried out on a fast memory: real numbers, and every word that moves.

They are the plans of `attention_io_complexity`, which has the sources; `execute` runs one, or one of the user's own.
Arrays are float32: q [batch, heads, tokens, d], k and v [batch, kv_heads, keys, d], out as q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memwall.simulate.attention_io_complexity import Plan, Tile, optimality_gap
from memwall.simulate.attention_shape import Attention
from memwall.simulate.fast_memory import Block, FastMemory, Memory


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One KV head and the query heads that share it, in slow memory: q, out [rows, d], k, v [keys, d].

    Row r is of token r // group. most, sums [rows, 1]: of the softmax, before any key -inf and 0.
    """

    shape: Attention
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray = field(init=False)
    most: np.ndarray = field(init=False)
    sums: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", np.zeros_like(self.q))
        object.__setattr__(self, "most", np.full((len(self.q), 1), -np.inf, np.float32))
        object.__setattr__(self, "sums", np.zeros((len(self.q), 1), np.float32))

    @property
    def scale(self) -> np.float32:
        """1 / sqrt(d)."""
        return np.float32(1 / math.sqrt(self.shape.head_size))

    def seen(self, row: int) -> int:
        """Keys that a row sees."""
        return int(self.shape.seen(np.array(row)))

    def first_row(self, key: int) -> int:
        """The first row that sees a key."""
        return int(self.shape.first_row(np.array(key)))

    def hide(self, scores: np.ndarray, rows: slice, columns: slice) -> None:
        """Sets what the mask hides to -inf."""
        if self.shape.causal:
            seen = self.shape.seen(np.arange(rows.start, rows.stop))
            scores[np.arange(columns.start, columns.stop) >= seen[:, None]] = -np.inf


Schedule = Callable[[Memory, Problem], None]
"""Leaves the attention of a problem in its `out`."""


def blocks(start: int, stop: int, step: int) -> Iterator[slice]:
    """start to stop in pieces, the last one shorter."""
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


# ---- whole rows: M from d^2 on -------------------------------------------------------------------------------------


def _gather(memory: Memory, problem: Problem, rows: slice, keys: slice, held: list[Block]) -> None:
    """One step of the online softmax. held: q, k, v, and what is kept: out (not divided by the sum), most, sums."""
    q, k, v, out, most, sums = held
    scores = memory.create((rows.stop - rows.start, keys.stop - keys.start))
    memory.multiply(scores, q, k, turned_b=True)
    memory.touch(scores)
    scores.array[...] *= problem.scale
    problem.hide(scores.array, rows, keys)
    memory.touch(most, sums, out)
    now = np.maximum(most.array, scores.array.max(axis=1, keepdims=True))
    less = np.exp(most.array - now)
    most.array[...] = now
    np.exp(scores.array - now, out=scores.array)
    sums.array[...] = sums.array * less + scores.array.sum(axis=1, keepdims=True)
    out.array[...] *= less
    memory.multiply(out, scores, v)
    memory.evict(scores)


def kv_outer(memory: Memory, problem: Problem, plan: Plan) -> None:
    """A block of keys and values stays, all rows that see it pass, with what they have gathered (FlashAttention)."""
    (tile,) = plan.tiles
    for keys in blocks(0, len(problem.k), tile.columns):
        k, v = memory.load(problem.k[keys]), memory.load(problem.v[keys])
        for rows in blocks(problem.first_row(keys.start), len(problem.q), tile.rows):
            q, out = memory.load(problem.q[rows]), memory.load(problem.out[rows])
            most, sums = memory.load(problem.most[rows]), memory.load(problem.sums[rows])
            out.array[...] *= sums.array  # in slow memory it is divided already
            _gather(memory, problem, rows, keys, [q, k, v, out, most, sums])
            out.array[...] /= sums.array
            for block, place in ((out, problem.out), (most, problem.most), (sums, problem.sums)):
                memory.store(block, place[rows])
            memory.evict(q, out, most, sums)
        memory.evict(k, v)


def q_outer(memory: Memory, problem: Problem, plan: Plan) -> None:
    """A block of rows stays, all keys and values that it sees pass; out is written once (FlashAttention-2)."""
    (tile,) = plan.tiles
    for rows in blocks(0, len(problem.q), tile.rows):
        q, out = memory.load(problem.q[rows]), memory.create(problem.q[rows].shape)
        most, sums = memory.create((rows.stop - rows.start, 1)), memory.create((rows.stop - rows.start, 1))
        most.array[...] = -np.inf
        for keys in blocks(0, problem.seen(rows.stop - 1), tile.columns):
            k, v = memory.load(problem.k[keys]), memory.load(problem.v[keys])
            _gather(memory, problem, rows, keys, [q, k, v, out, most, sums])
            memory.evict(k, v)
        memory.touch(out)
        out.array[...] /= sums.array
        memory.store(out, problem.out[rows])
        memory.evict(q, out, most, sums)


# ---- tiles of products: M below d^2 --------------------------------------------------------------------------------


def accumulate(
    memory: Memory,
    out: Block,
    a: np.ndarray,
    b: np.ndarray,
    depth: int,
    prepare: Callable[[Block, slice], None] | None = None,
    *,
    turned_a: bool = False,
    turned_b: bool = False,
) -> None:
    """out += a b, these in slow memory, `depth` at a time. turned: stored the other way round. prepare: done to pieces
    of a.
    """
    for part in blocks(0, a.shape[0] if turned_a else a.shape[1], depth):
        left = memory.load(a[part] if turned_a else a[:, part])
        right = memory.load(b[:, part] if turned_b else b[part])
        if prepare is not None:
            prepare(left, part)
        memory.multiply(out, left, right, turned_a=turned_a, turned_b=turned_b)
        memory.evict(left, right)


def _widen(memory: Memory, scores: Block, most: Block, sums: Block) -> None:
    """Takes scores into maxima and sums."""
    memory.touch(scores, written=False)
    memory.touch(most, sums)
    now = np.maximum(most.array, scores.array.max(axis=1, keepdims=True))
    sums.array[...] *= np.exp(most.array - now)
    sums.array[...] += np.exp(scores.array - now).sum(axis=1, keepdims=True)
    most.array[...] = now


def phases(memory: Memory, problem: Problem, plan: Plan) -> None:
    """Scores, softmax and output by tiles; see `Plan` for the ways of the softmax."""
    scores = np.zeros((len(problem.q), len(problem.k)), np.float32)
    _scores_phase(memory, problem, plan, scores)
    if plan.softmax != "folded":
        _softmax_phase(memory, problem, plan, scores)
    tile = plan.tiles[1]
    for rows in blocks(0, len(problem.q), tile.rows):
        seen = problem.seen(rows.stop - 1)
        for columns in blocks(0, problem.out.shape[1], tile.columns):
            _output_tile(memory, problem, plan, scores[rows, :seen], rows, columns)


def _scores_phase(memory: Memory, problem: Problem, plan: Plan, scores: np.ndarray) -> None:
    tile, folded = plan.tiles[0], plan.softmax == "folded"
    for rows in blocks(0, len(problem.q), tile.rows):
        kept = [memory.create((rows.stop - rows.start, 1)) for _ in range(2)] if folded else []
        if kept:
            kept[0].array[...] = -np.inf
        for columns in blocks(0, problem.seen(rows.stop - 1), tile.columns):
            made = memory.create((rows.stop - rows.start, columns.stop - columns.start))
            accumulate(memory, made, problem.q[rows], problem.k[columns], tile.depth, turned_b=True)
            memory.touch(made)
            made.array[...] *= problem.scale
            problem.hide(made.array, rows, columns)
            if kept:
                _widen(memory, made, kept[0], kept[1])
            memory.store(made, scores[rows, columns])
            memory.evict(made)
        for block, place in zip(kept, (problem.most, problem.sums), strict=False):
            memory.store(block, place[rows])
            memory.evict(block)


def _softmax_phase(memory: Memory, problem: Problem, plan: Plan, scores: np.ndarray) -> None:
    tile = plan.tiles[0]
    for rows in blocks(0, len(problem.q), tile.rows):
        most, sums = (memory.create((rows.stop - rows.start, 1)) for _ in range(2))
        most.array[...] = -np.inf
        seen = problem.seen(rows.stop - 1)
        for columns in blocks(0, seen, tile.columns):
            part = memory.load(scores[rows, columns])
            _widen(memory, part, most, sums)
            memory.evict(part)
        for columns in blocks(0, seen if plan.softmax == "sweeps" else 0, tile.columns):
            part = memory.load(scores[rows, columns])
            memory.touch(part)
            part.array[...] = np.exp(part.array - most.array) / sums.array
            memory.store(part, scores[rows, columns])
            memory.evict(part)
        if plan.softmax == "lazy":
            memory.store(most, problem.most[rows])
            memory.store(sums, problem.sums[rows])
        memory.evict(most, sums)


def _output_tile(memory: Memory, problem: Problem, plan: Plan, scores: np.ndarray, rows: slice, columns: slice) -> None:
    kept: list[Block] = []
    if plan.softmax != "sweeps":
        kept = [memory.load(problem.most[rows]), memory.load(problem.sums[rows])]

    def soften(part: Block, keys: slice) -> None:
        memory.touch(part, written=False)  # on its way to the product
        problem.hide(part.array, rows, keys)  # blocks of rows are not those of the scores: some were never made
        part.array[...] = np.exp(part.array - kept[0].array) / kept[1].array

    out = memory.create((rows.stop - rows.start, columns.stop - columns.start))
    values = problem.v[: scores.shape[1], columns]
    accumulate(memory, out, scores, values, plan.tiles[1].depth, soften if kept else None)
    memory.store(out, problem.out[rows, columns])
    memory.evict(out, *kept)


# ---- running -------------------------------------------------------------------------------------------------------

_SCHEDULES: dict[str, Callable[[Memory, Problem, Plan], None]] = {
    "kv-outer": kv_outer,
    "q-outer": q_outer,
    "three-phase": phases,
    "unfused": phases,
}


def schedule_of(plan: Plan) -> Schedule:
    """The schedule of a plan, ready to run."""
    return lambda memory, problem: _SCHEDULES[plan.schedule](memory, problem, plan)


def problems(shape: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Iterator[tuple[Problem, Any]]:
    """Problems one after another, each with the place of its heads in q; arrays as `execute` takes them."""
    for place in np.ndindex(shape.batch, shape.kv_heads):
        heads = np.s_[place[0], place[1] * shape.group : (place[1] + 1) * shape.group]
        rows = np.ascontiguousarray(q[heads].transpose(1, 0, 2)).reshape(shape.rows, shape.head_size)
        yield Problem(shape=shape, q=rows, k=np.ascontiguousarray(k[place]), v=np.ascontiguousarray(v[place])), heads


def execute(
    shape: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray, fast_words: int, schedule: Plan | Schedule
) -> tuple[np.ndarray, FastMemory]:
    """out, and the memory with what was moved. schedule: a plan, or a function of one's own (see `Schedule`).

    Raises FastMemoryFull where a schedule wants more than fast_words.
    """
    memory, out = FastMemory(fast_words), np.empty_like(q)
    run = schedule_of(schedule) if isinstance(schedule, Plan) else schedule
    for problem, heads in problems(shape, q, k, v):
        run(memory, problem)
        out[heads] = problem.out.reshape(shape.tokens, shape.group, shape.head_size).transpose(1, 0, 2)
        assert memory.held == 0, "a schedule keeps blocks when it is done"
    return out, memory


def reference(shape: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The attention of `execute`'s arrays in float64."""
    keys, values = (np.repeat(each.astype(np.float64), shape.group, axis=1) for each in (k, v))
    scores = q.astype(np.float64) @ keys.swapaxes(-1, -2) / math.sqrt(shape.head_size)
    seen = shape.seen(np.arange(shape.tokens) * shape.group)
    scores[..., np.arange(shape.num_keys) >= seen[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def measured_gap(shape: Attention, fast_words: int, schedule: Schedule, seed: int = 0) -> tuple[float, float]:
    """(words by `io_star`, largest error) of a schedule of one's own, run on normal numbers."""
    draw = np.random.default_rng(seed)
    q = draw.standard_normal((shape.batch, shape.heads, shape.tokens, shape.head_size), np.float32)
    k, v = (
        draw.standard_normal((shape.batch, shape.kv_heads, shape.num_keys, shape.head_size), np.float32)
        for _ in range(2)
    )
    out, memory = execute(shape, q, k, v, fast_words, schedule)
    error = float(np.abs(out - reference(shape, q, k, v)).max())
    return optimality_gap(shape, fast_words, memory.moved), error


def square_tiles(fast_words: int, softmax: str = "sweeps") -> Plan:
    """The three phases with tiles of sqrt(M / 3), and any way of the softmax, 2 rows' words less where it is kept."""
    side = math.isqrt(fast_words // 3)
    while side > 1 and softmax != "sweeps" and 3 * side * side + 2 * side > fast_words:
        side -= 1
    tile = Tile(rows=side, columns=side, depth=side)
    return Plan(schedule="three-phase", tiles=(tile, tile), softmax=softmax)
