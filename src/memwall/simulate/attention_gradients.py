"""The gradients of attention on a fast memory: `attention_schedules` of the backward pass, counted in the same way.

Source: FlashAttention, Dao 2022, algorithm 4 (kv-outer). The three phases become five tiled products: of probabilities
P = exp(q k^T - lse), of their gradients dS = P (dO v^T - D), and dv = P^T dO, dq = dS k, dk = dS^T q, where D is the
sum of dO times O along a row. P and dS are written to slow memory.

Arrays are float32: q, out, d_out [rows, d], k, v [keys, d], lse [rows, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from memwall.simulate.attention_io_complexity import Plan
from memwall.simulate.attention_schedules import Problem, accumulate, blocks
from memwall.simulate.attention_shape import Attention
from memwall.simulate.fast_memory import Block, FastMemory, Memory


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """One KV head in slow memory: what the forward pass left, the gradient of out, and where gradients go."""

    problem: Problem
    lse: np.ndarray
    d_out: np.ndarray
    dots: np.ndarray = field(init=False)
    """D, [rows, 1]."""
    d_q: np.ndarray = field(init=False)
    d_k: np.ndarray = field(init=False)
    d_v: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dots", np.zeros_like(self.lse))
        for name, like in (("d_q", self.problem.q), ("d_k", self.problem.k), ("d_v", self.problem.v)):
            object.__setattr__(self, name, np.zeros_like(like))


def _dots(memory: Memory, task: Gradients, tall: int, deep: int) -> None:
    for rows in blocks(0, len(task.lse), tall):
        dots = memory.create((rows.stop - rows.start, 1))
        for part in blocks(0, task.d_out.shape[1], deep):
            out, d_out = memory.load(task.problem.out[rows, part]), memory.load(task.d_out[rows, part])
            memory.touch(out, d_out, dots)
            dots.array[...] += (out.array * d_out.array).sum(axis=1, keepdims=True)
            memory.evict(out, d_out)
        memory.store(dots, task.dots[rows])
        memory.evict(dots)


def kv_outer(memory: Memory, task: Gradients, plan: Plan) -> None:
    """A block of keys and values stays with its gradients, rows pass with theirs."""
    problem, (tile,) = task.problem, plan.tiles
    _dots(memory, task, tile.rows, problem.q.shape[1])
    for keys in blocks(0, len(problem.k), tile.columns):
        k, v = memory.load(problem.k[keys]), memory.load(problem.v[keys])
        d_k, d_v = memory.create(problem.k[keys].shape), memory.create(problem.v[keys].shape)
        for rows in blocks(problem.first_row(keys.start), len(problem.q), tile.rows):
            q, d_out, d_q = (memory.load(each[rows]) for each in (problem.q, task.d_out, task.d_q))
            lse, dots = memory.load(task.lse[rows]), memory.load(task.dots[rows])
            weights, slopes = (memory.create((rows.stop - rows.start, keys.stop - keys.start)) for _ in range(2))
            memory.multiply(weights, q, k, turned_b=True)
            memory.touch(weights, lse)
            weights.array[...] *= problem.scale
            problem.hide(weights.array, rows, keys)
            np.exp(weights.array - lse.array, out=weights.array)
            memory.multiply(d_v, weights, d_out, turned_a=True)
            memory.multiply(slopes, d_out, v, turned_b=True)
            memory.touch(slopes, weights, dots)
            slopes.array[...] = weights.array * (slopes.array - dots.array) * problem.scale
            memory.multiply(d_q, slopes, k)
            memory.multiply(d_k, slopes, q, turned_a=True)
            memory.store(d_q, task.d_q[rows])
            memory.evict(q, d_out, d_q, lse, dots, weights, slopes)
        memory.store(d_k, task.d_k[keys])
        memory.store(d_v, task.d_v[keys])
        memory.evict(k, v, d_k, d_v)


def phases(memory: Memory, task: Gradients, plan: Plan) -> None:
    """Five tiled products."""
    problem, (tile, out) = task.problem, plan.tiles
    weights, slopes = (np.zeros((len(problem.q), len(problem.k)), np.float32) for _ in range(2))
    _dots(memory, task, 1, tile.depth)

    def to_weights(made: Block, rows: slice, keys: slice) -> None:
        memory.touch(made)
        made.array[...] *= problem.scale
        problem.hide(made.array, rows, keys)
        for row in range(rows.start, rows.stop):
            lse = memory.load(task.lse[row : row + 1])
            made.array[row - rows.start] = np.exp(made.array[row - rows.start] - lse.array[0])
            memory.evict(lse)

    def to_slopes(made: Block, rows: slice, keys: slice) -> None:
        memory.touch(made)
        for row in range(rows.start, rows.stop):
            dots, line = memory.load(task.dots[row : row + 1]), memory.load(weights[row, keys])
            made.array[row - rows.start] = line.array * (made.array[row - rows.start] - dots.array[0]) * problem.scale
            memory.evict(dots, line)

    for left, right, place, finish in (
        (problem.q, problem.k, weights, to_weights),
        (task.d_out, problem.v, slopes, to_slopes),
    ):
        for rows in blocks(0, len(problem.q), tile.rows):
            for keys in blocks(0, problem.seen(rows.stop - 1), tile.columns):
                made = memory.create((rows.stop - rows.start, keys.stop - keys.start))
                accumulate(memory, made, left[rows], right[keys], tile.depth, turned_b=True)
                finish(made, rows, keys)
                memory.store(made, place[rows, keys])
                memory.evict(made)
    for columns in blocks(0, problem.q.shape[1], out.columns):
        for rows in blocks(0, len(problem.q), out.rows):
            seen = problem.seen(rows.stop - 1)
            made = memory.create((rows.stop - rows.start, columns.stop - columns.start))
            accumulate(memory, made, slopes[rows, :seen], problem.k[:seen, columns], out.depth)
            memory.store(made, task.d_q[rows, columns])
            memory.evict(made)
        for keys in blocks(0, len(problem.k), out.rows):
            first = problem.first_row(keys.start)
            for left, right, place in ((weights, task.d_out, task.d_v), (slopes, problem.q, task.d_k)):
                made = memory.create((keys.stop - keys.start, columns.stop - columns.start))
                accumulate(memory, made, left[first:, keys], right[first:, columns], out.depth, turned_a=True)
                memory.store(made, place[keys, columns])
                memory.evict(made)


def execute_gradients(
    shape: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, fast_words: int, plan: Plan
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], FastMemory]:
    """(d_q, d_k, d_v), and the memory with what was moved, of one problem: q, d_out [rows, d], k, v [keys, d].

    The output and the logarithms of sums, which a forward pass would have left, are made beforehand and not counted.
    """
    problem = Problem(shape=shape, q=q, k=k, v=v)
    scores = q.astype(np.float64) @ k.T.astype(np.float64) / math.sqrt(shape.head_size)
    scores[np.arange(len(k)) >= shape.seen(np.arange(len(q)))[:, None]] = -np.inf
    most = scores.max(axis=1, keepdims=True)
    lse = most + np.log(np.exp(scores - most).sum(axis=1, keepdims=True))
    problem.out[...] = np.exp(scores - lse) @ v
    task, memory = Gradients(problem=problem, lse=lse.astype(np.float32), d_out=d_out), FastMemory(fast_words)
    (kv_outer if plan.schedule == "kv-outer" else phases)(memory, task, plan)
    assert memory.held == 0, "a schedule keeps blocks when it is done"
    return (task.d_q, task.d_k, task.d_v), memory
