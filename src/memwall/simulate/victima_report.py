"""What `memwall simulate translation` tells: its table, and a picture (SVG) of where cycles go, a bar a variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from memwall.hardware.units import MIB
from memwall.simulate.victima import Result

COLUMNS = (
    "trace", "variant", "IPC", "gain", "TLB misses/kilo", "walks/kilo", "walk", "TLB miss", "background",
    "data misses/kilo", "reach",
)  # fmt: skip
COLOURS = {"instructions": "#4c78a8", "data": "#f58518", "translation": "#e45756"}
WIDTH, BAR, LEFT, RIGHT = 760, 18, 190, 60


def gain(result: Result, base: Result) -> float:
    """How much less time: cycles an instruction of the base by those here, less 1."""
    return result.instructions_per_cycle / base.instructions_per_cycle - 1


def mean_gain(results: Sequence[Result], bases: Sequence[Result]) -> float:
    """Geometric, over traces."""
    return math.exp(statistics.fmean(math.log1p(gain(*pair)) for pair in zip(results, bases, strict=True))) - 1


def cells(result: Result, base: Result) -> list[str]:
    """A line of the table; gains are beside `base`, a run of the same trace."""
    reach = f"{result.reach_bytes / MIB:,.0f} MiB" if result["block_inserts"] or result.reach_bytes else ""
    return [
        result.trace, result.variant, f"{result.instructions_per_cycle:.3f}",
        "" if result is base else f"{gain(result, base):+.1%}", f"{result.per_kilo('second_tlb_misses'):.2f}",
        f"{result.per_kilo('walks'):.2f}", f"{result.share('walk_cycles', 'walks'):.0f}",
        f"{result.share('second_tlb_miss_cycles', 'second_tlb_misses'):.0f}",
        f"{result.per_kilo('background_walks'):.2f}", f"{result.per_kilo('second_misses_data'):.2f}", reach,
    ]  # fmt: skip


def picture(runs: Sequence[Sequence[Result]]) -> str:
    """Cycles by 1,000 instructions: of instructions at full width, of data, of translation that stalls them."""
    bars = [(result, _parts(result)) for run in runs for result in run]
    most = max(sum(parts.values()) for _, parts in bars)
    height = 40 + (BAR + 4) * len(bars) + 12 * len(runs)
    drawn, y = [], 34.0
    for at, (name, colour) in enumerate(COLOURS.items()):
        drawn.append(f'<rect x="{LEFT + 130 * at}" y="8" width="12" height="12" fill="{colour}"/>')
        drawn.append(f'<text x="{LEFT + 130 * at + 18}" y="18">{name}</text>')
    trace = bars[0][0].trace
    for result, parts in bars:
        y += 12 if result.trace != trace else 0
        trace = result.trace
        drawn.append(
            f'<text x="{LEFT - 8}" y="{y + 13:.0f}" text-anchor="end">{escape(trace)}: {escape(result.variant)}</text>'
        )
        x = float(LEFT)
        for name, cycles in parts.items():
            width = (WIDTH - LEFT - RIGHT) * cycles / most
            drawn.append(
                f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[name]}">'
                f"<title>{name}: {cycles:,.0f} cycles in 1,000 instructions</title></rect>"
            )
            x += width
        drawn.append(f'<text x="{x + 4:.1f}" y="{y + 13:.0f}">{sum(parts.values()):,.0f}</text>')
        y += BAR + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>\n'
    )


def _parts(result: Result) -> dict[str, float]:
    kilo = 1000 / max(result["instructions"], 1) / result.width
    data, translation = kilo * result["data_stall_slots"], kilo * result["translation_stall_slots"]
    return {"instructions": kilo * result["slots"] - data - translation, "data": data, "translation": translation}
