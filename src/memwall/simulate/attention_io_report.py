"""What `memwall simulate attention-io` tells: rows of its tables, JSON, and a picture (SVG) of words over M."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.hardware.units import format_bytes, format_rate, format_seconds
from memwall.simulate.attention_io_complexity import (
    SCHEDULES,
    Plan,
    choose,
    count_words,
    io_star,
    lower_bound,
    optimality_gap,
    plans,
    regime,
    words_needed,
)
from memwall.simulate.attention_levels import Hierarchy
from memwall.simulate.attention_schedules import execute, reference
from memwall.simulate.attention_shape import Attention
from memwall.simulate.memory_trace import LINE_WORDS, POLICIES, cache_traffic, trace

PLAN_COLUMNS = ("schedule", "tiles", "words", "bytes", "gap", "times bound", "needs")
LEVEL_COLUMNS = ("tier", "words it holds", "regime", "schedule", "least words", "words", "rate", "least", "time")
MOST_STEPS = 1 << 20
"""Blocks that `executed` and `traced` move, about: some seconds' worth."""
MOST_TOUCHES = 1 << 23
COLOURS = {"kv-outer": "#4c78a8", "q-outer": "#f58518", "three-phase": "#54a24b", "unfused": "#b279a2"}
WIDTH, HEIGHT, MARGIN = 640, 420, 60


def told_tiles(plan: Plan) -> str:
    """Tiles in words."""
    if plan.softmax == "online":
        return f"{plan.tiles[0].rows} rows x {plan.tiles[0].columns} keys"
    scores, out = plan.tiles
    return f"scores {scores.rows}x{scores.columns}x{scores.depth}, out {out.rows}x{out.columns}x{out.depth}"


def report(shape: Attention, fast_words: int, word_bytes: int) -> dict[str, Any]:
    """Bounds and all schedules of one fast memory, as `--json` prints it."""
    found, least = plans(shape, fast_words), lower_bound(shape, fast_words)
    best = choose(shape, fast_words)
    rows = []
    for name, plan in found.items():
        words = count_words(shape, plan)
        rows.append({
            "schedule": name, "chosen": plan == best, "softmax": plan.softmax,
            "tiles": [{"rows": tile.rows, "columns": tile.columns, "depth": tile.depth} for tile in plan.tiles],
            "told": told_tiles(plan), "words": words, "bytes": words * word_bytes,
            "gap": optimality_gap(shape, fast_words, words), "times_bound": words / least,
            "words_needed": words_needed(shape, plan),
        })  # fmt: skip
    return {
        "fast_words": fast_words, "regime": regime(shape, fast_words), "order_words": io_star(shape, fast_words),
        "least_words": least, "compulsory_words": shape.compulsory, "crossover_words": shape.head_size**2,
        "schedules": rows,
    }  # fmt: skip


def plan_cells(told: dict[str, Any]) -> list[list[str]]:
    """A line for each schedule, the chosen one with a star."""
    return [
        [
            row["schedule"] + (" *" if row["chosen"] else ""), row["told"], f"{row['words']:,}",
            format_bytes(row["bytes"]), f"{row['gap']:.2f}", f"{row['times_bound']:.2f}", f"{row['words_needed']:,}",
        ]
        for row in told["schedules"]
    ]  # fmt: skip


def level_cells(found: Hierarchy) -> list[list[str]]:
    """A line for each level, and one for the arithmetic."""
    rows = [
        [
            f"{one.tier} over {one.below}", f"{one.fast_words:,}" + (f" of each of {one.count}" * (one.count > 1)),
            one.regime, one.plan.schedule, f"{one.least_words:,}", f"{one.words:,}", format_rate(one.bytes_per_s),
            format_seconds(one.least_seconds), format_seconds(one.seconds),
        ]
        for one in found.levels
    ]  # fmt: skip
    arithmetic = format_seconds(found.compute_seconds)
    return [*rows, [f"arithmetic of {found.unit}", *[""] * 6, arithmetic, arithmetic]]


def executed(shape: Attention, fast_words: int, seed: int, *, traced: bool = False) -> list[dict[str, Any]]:
    """Every schedule carried out on normal numbers: words counted and the largest error against float64; traced: with
    what caches of as many words would move of the same numbers, LRU and Belady.

    InputError where that would take minutes, or for gradients.
    """
    _check_size(shape, fast_words, traced=traced)
    draw = np.random.default_rng(seed)
    heads, size = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}, shape.head_size
    q, k, v = (
        draw.standard_normal((shape.batch, heads[name], shape.tokens if name == "q" else shape.num_keys, size), "f4")
        for name in heads
    )
    truth, found = reference(shape, q, k, v), []
    for name, plan in plans(shape, fast_words).items():
        out, memory = execute(shape, q, k, v, fast_words, plan)
        row: dict[str, Any] = {
            "schedule": name, "counted": memory.moved, "loaded": memory.loaded, "stored": memory.stored,
            "peak": memory.peak, "error": float(np.abs(out - truth).max()),
        }  # fmt: skip
        if traced:
            touched = trace(shape, q, k, v, plan).touches()
            for policy in POLICIES:
                row[policy] = cache_traffic(touched, max(1, fast_words // LINE_WORDS), policy).words
        found.append(row)
    return found


def _check_size(shape: Attention, fast_words: int, *, traced: bool) -> None:
    if shape.backward:
        raise InputError("--execute and --trace carry out the forward pass: leave --backward out")
    scores = shape.problems * shape.scores
    side = min(math.sqrt(fast_words / 3), shape.rows, shape.num_keys)
    steps = 2 * scores / side**2 * max(1.0, shape.head_size / side)
    touches = scores * shape.head_size / 4 if traced else 0
    over = max(steps / MOST_STEPS, touches / MOST_TOUCHES)
    if over > 1:
        option, less = "--trace" if traced else "--execute", int(shape.tokens / math.sqrt(over))
        raise InputError(f"{option} would take minutes: --tokens {max(less, 1)} or less works, or leave it out")


def picture(shape: Attention, marked: int | None = None) -> str:
    """Words of every schedule and the bounds over M, both axes logarithmic."""
    most = max(8 * shape.rows * shape.head_size, 4 * shape.head_size**2, 256)
    capacities = sorted({int(16 * (most / 16) ** (step / 60)) for step in range(61)})
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in SCHEDULES}
    bounds = [(float(m), float(lower_bound(shape, m))) for m in capacities]
    orders = [(float(m), io_star(shape, m)) for m in capacities]
    for m in capacities:
        for name, plan in plans(shape, m).items():
            lines[name].append((float(m), float(count_words(shape, plan))))
    every = [y for line in (*lines.values(), bounds, orders) for _, y in line]
    axes = _Axes(capacities[0], capacities[-1], min(every), max(every))
    parts = [axes.frame("words of fast memory", "words moved")]
    parts.append(axes.upright(shape.head_size**2, "d²"))
    if marked is not None and capacities[0] <= marked <= capacities[-1]:
        parts.append(axes.upright(marked, "M"))
    drawn = [("lower bound", bounds, "#888", "4"), ("order", orders, "#222", "1 3")]
    drawn += [(name, line, COLOURS[name], "") for name, line in lines.items() if line]
    for number, (name, line, colour, dashes) in enumerate(drawn):
        parts.append(axes.line(line, colour, dashes))
        y = MARGIN / 2 + 16 * number
        parts.append(f'<text x="{WIDTH - 150}" y="{y:.0f}" fill="{colour}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


class _Axes:
    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.x, self.y = (math.log2(left), math.log2(right)), (math.log2(low), math.log2(high) + 0.1)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log2(y) - self.y[0]) / (self.y[1] - self.y[0])
        return MARGIN + across * (WIDTH - MARGIN - 10), (HEIGHT - MARGIN) - up * (HEIGHT - MARGIN - 10)

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashes: str) -> str:
        told = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        return f'<polyline points="{told}" fill="none" stroke="{colour}" stroke-dasharray="{dashes}"/>'

    def upright(self, x: float, label: str) -> str:
        at = self.place(x, 2 ** self.y[0])[0]
        return (
            f'<path d="M{at:.1f} 10V{HEIGHT - MARGIN}" stroke="#ccc"/>'
            f'<text x="{at + 3:.1f}" y="20" fill="#666">{escape(label)}</text>'
        )

    def frame(self, across: str, up: str) -> str:
        parts = [f'<path d="M{MARGIN} 10V{HEIGHT - MARGIN}H{WIDTH - 10}" fill="none" stroke="#888"/>']
        for power in range(math.ceil(self.x[0]), int(self.x[1]) + 1, 2):
            x = self.place(2.0**power, 2 ** self.y[0])[0]
            parts.append(f'<text x="{x:.0f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">2^{power}</text>')
        for power in range(math.ceil(self.y[0]), int(self.y[1]) + 1, 2):
            y = self.place(2 ** self.x[0], 2.0**power)[1]
            parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.0f}" text-anchor="end">2^{power}</text>')
        parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 18}" text-anchor="middle">{escape(across)}</text>')
        parts.append(f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})">{escape(up)}</text>')
        return "".join(parts)
