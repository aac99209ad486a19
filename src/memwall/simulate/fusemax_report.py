"""What `memwall simulate fusemax` tells: a line for each model, length and design, means, a schedule, and a picture of
how both arrays are used (SVG).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from statistics import fmean
from typing import Any

from memwall.hardware.units import format_bytes, format_seconds
from memwall.simulate.attention_io_complexity import lower_bound
from memwall.simulate.attention_shape import Attention
from memwall.simulate.fusemax import BASELINE, DESIGNS, Accelerator, Design, Run, flat_tiles, query_tiles
from memwall.simulate.fusemax_energy import areas, attention_energy, layer_energy
from memwall.simulate.fusemax_workloads import Workload, layer_seconds, price_workload

COLUMNS = (
    "model", "tokens", "design", "time", "limit", "matrix", "vector", "DRAM", "times bound", "energy", "speed-up",
    "energy ratio", "layer", "layer energy",
)  # fmt: skip
MEAN_COLUMNS = ("design", "speed-up", "energy ratio", "layer", "layer energy", "area mm2")
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
WIDTH, LANE, LEFT, TOP = 1000, 22, 150, 30


def point(workload: Workload, tokens: int, run: Run, base: Run) -> dict[str, Any]:
    """A run beside the baseline's, as `--json` prints it."""
    energy, other = attention_energy(run), attention_energy(base)
    least = run.machine.word_bytes * least_words(run)
    shared = flat_tiles(run.design, run.shape, run.machine)[0] if run.design.streams == "rows" else None
    if run.design.streams == "once":
        shared = query_tiles(run.design, run.shape, run.machine)
    return {
        "model": workload.name, "tokens": tokens, "design": run.design.name, "seconds": run.seconds,
        "cycles": run.compute_cycles, "memory_bound": run.memory_bound, "utilisation": run.utilisation,
        "vector_utilisation": run.vector_utilisation, "einsum_cycles": dict(run.einsums), "shares": dict(run.shares),
        "query_tiles": shared, "traffic_bytes": run.traffic_bytes, "least_bytes": least,
        "times_bound": run.traffic_bytes / least,
        "energy_j": {"dram": energy.dram, "buffer": energy.buffer, "registers": energy.registers,
                     "arithmetic": energy.arithmetic, "total": energy.total},
        "speed_up": base.seconds / run.seconds, "energy_ratio": energy.total / other.total,
        "layer_seconds": layer_seconds(run, workload, tokens),
        "layer_speed_up": layer_seconds(base, workload, tokens) / layer_seconds(run, workload, tokens),
        "layer_energy_ratio": layer_energy(run, workload, tokens).total / layer_energy(base, workload, tokens).total,
    }  # fmt: skip


def least_words(run: Run) -> int:
    """Words that no schedule of this attention can do without, through a buffer of this size (`lower_bound`)."""
    shape = run.shape
    size = max(shape.key_size, shape.value_size)
    held = run.design.buffer_bytes if run.machine.buffer_bytes is None else run.machine.buffer_bytes
    work = Attention(tokens=shape.rows, keys=shape.keys, head_size=size, batch=shape.problems)
    return lower_bound(work, held // run.machine.word_bytes)


def report(
    workloads: Iterable[Workload], lengths: Sequence[int], designs: Sequence[str], machine: Accelerator
) -> dict[str, Any]:
    """All points, and arithmetic means over them by design."""
    points = []
    for workload in workloads:
        for tokens in lengths:
            base = price_workload(BASELINE, workload, tokens, machine)
            points += [point(workload, tokens, price_workload(name, workload, tokens, machine), base)
                       for name in designs]  # fmt: skip
    return {"points": points, "means": [_mean(name, points, machine) for name in designs]}


def _mean(name: str, points: list[dict[str, Any]], machine: Accelerator) -> dict[str, Any]:
    own = [one for one in points if one["design"] == name]
    kinds = ("speed_up", "energy_ratio", "layer_speed_up", "layer_energy_ratio")
    return {"design": name, **{kind: fmean(one[kind] for one in own) for kind in kinds},
            "area_mm2": areas(DESIGNS[name], machine)}  # fmt: skip


def cells(one: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        one["model"], f"{one['tokens']:,}", one["design"], format_seconds(one["seconds"]),
        "DRAM" if one["memory_bound"] else "arrays", f"{one['utilisation']:.1%}", f"{one['vector_utilisation']:.1%}",
        format_bytes(one["traffic_bytes"]), f"{one['times_bound']:.2f}", f"{one['energy_j']['total']:.3g} J",
        f"{one['speed_up']:.2f}", f"{one['energy_ratio']:.2f}", f"{one['layer_speed_up']:.2f}",
        f"{one['layer_energy_ratio']:.2f}",
    ]  # fmt: skip


def mean_cells(one: dict[str, Any]) -> list[str]:
    """A line of the table of means."""
    return [
        one["design"], f"{one['speed_up']:.3f}", f"{one['energy_ratio']:.3f}", f"{one['layer_speed_up']:.3f}",
        f"{one['layer_energy_ratio']:.3f}", f"{sum(one['area_mm2'].values()):.0f}",
    ]  # fmt: skip


# ---- schedule ------------------------------------------------------------------------------------------------------


def tile_schedule(run: Run) -> list[dict[str, Any]]:
    """What both arrays do for a tile of R queries and R keys, in cycles, phase by phase: all of the run's work over its
    tiles. Of interleaved designs the first phase takes its vector work from the tile before.
    """
    sizes = run.shape.sizes(run.machine.array)
    tiles = run.shape.problems * (sizes["p"] // run.machine.array) * sizes["m1"]
    found, start = [], 0.0
    for phase, (matrix, vector, drain) in zip(run.design.phases, run.phases, strict=True):
        start += drain / tiles
        length = max(matrix, vector) / tiles
        found.append({
            "start": start, "cycles": length, "drain": drain / tiles,
            "matrix": {name: run.einsums[name] / tiles for name in phase.matrix},
            "vector": {name: run.einsums[name] / tiles for name in phase.vector},
        })  # fmt: skip
        start += length
    return found


def schedule_cells(run: Run) -> list[list[str]]:
    """A line for each phase of a tile."""
    rows = []
    for number, phase in enumerate(tile_schedule(run), 1):
        sides = [", ".join(f"{name} {cycles:,.1f}" for name, cycles in phase[side].items()) or "idle"
                 for side in ("matrix", "vector")]  # fmt: skip
        drain = [f"{phase['drain']:,.1f}" if phase["drain"] else ""]
        rows.append([str(number), *drain, *sides, f"{phase['cycles']:,.1f}"])
    return rows


SCHEDULE_COLUMNS = ("phase", "drain", "matrix array", "vector array", "cycles")


def picture(runs: Sequence[Run], title: str) -> str:
    """Both arrays of each design over a tile's cycles, idle time white, all on one scale."""
    spans = [[(phase["start"], phase) for phase in tile_schedule(run)] for run in runs]
    ends = [max(start + phase["cycles"] for start, phase in span) for span in spans]
    scale = (WIDTH - LEFT - 20) / max(ends)
    names = list(dict.fromkeys(name for run in runs for phase in run.design.phases
                               for name in (*phase.matrix, *phase.vector)))  # fmt: skip
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    height = TOP + len(runs) * (2 * LANE + 22) + 20
    parts = [f'<text x="10" y="18" font-size="14">{escape(title)}</text>']
    for number, (run, span, end) in enumerate(zip(runs, spans, ends, strict=True)):
        y = TOP + number * (2 * LANE + 22)
        parts.append(_label(run.design, y, end))
        for side, top in (("matrix", y), ("vector", y + LANE)):
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{scale * end:.1f}" height="{LANE - 3}" fill="#fff" '
                         'stroke="#999"/>')  # fmt: skip
            for start, phase in span:
                parts += _bars(phase[side], LEFT + scale * start, top, scale, colour)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui" '
        f'font-size="10"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _label(design: Design, y: int, end: float) -> str:
    return (
        f'<text x="8" y="{y + 12}" font-size="12">{escape(design.name)}</text>'
        f'<text x="{LEFT - 6}" y="{y + 12}" text-anchor="end" fill="#666">matrix</text>'
        f'<text x="{LEFT - 6}" y="{y + LANE + 12}" text-anchor="end" fill="#666">vector</text>'
        f'<text x="8" y="{y + LANE + 12}" fill="#666">{end:,.0f} cycles</text>'
    )


def _bars(side: dict[str, float], x: float, top: int, scale: float, colour: dict[str, str]) -> list[str]:
    parts = []
    for name, cycles in side.items():
        width = scale * cycles
        text = f'<text x="{x + 2:.1f}" y="{top + 13}" fill="#fff">{name}</text>' if width > 6 * len(name) + 4 else ""
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{max(width, 0.3):.1f}" height="{LANE - 3}" fill="{colour[name]}">'
            f"<title>{name}: {cycles:,.1f} cycles</title></rect>{text}"
        )
        x += width
    return parts
