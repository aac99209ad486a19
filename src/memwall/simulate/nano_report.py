"""A pipeline of nano-operations as JSON, as rows of a table, and as a picture (SVG) of two layers."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from memwall.engine.nano_schedule import RESOURCES, Schedule
from memwall.errors import InputError
from memwall.hardware.units import GB
from memwall.simulate.nano_costs import Bound, Row
from memwall.simulate.nano_search import Found

ROW_COLUMNS = ("operation", "class", "GFLOP", "GB", "compute ms", "memory ms", "network ms")
PLACED_COLUMNS = ("operation", "tokens", "stream", "R", "start ms", "ms")
COLORS = {"compute": "#4c78a8", "memory": "#f58518", "network": "#54a24b"}
WIDTH, LANE, LEFT = 1200, 34, 80


def row_cells(row: Row) -> list[str]:
    """A line of the operation table."""
    times = (row.compute_seconds, row.memory_seconds, row.network_seconds)
    moved = row.nbytes or row.link_bytes
    return [row.name, row.resource, f"{row.flop / GB:,.1f}", f"{moved / GB:,.1f}"] + [f"{1e3 * t:.2f}" for t in times]


def placed_cells(schedule: Schedule) -> list[list[str]]:
    """A line for each nano-operation."""
    return [
        [
            one.operation.name, f"{one.operation.first}-{one.operation.end}", one.operation.resource,
            f"{one.share:.2f}", f"{1e3 * one.start:.3f}", f"{1e3 * one.seconds:.3f}",
        ]
        for one in schedule.placed
    ]  # fmt: skip


def to_dict(told: dict[str, Any], rows: list[Row], bound: Bound, found: Found | None) -> dict[str, Any]:
    """For programs. Seconds, bytes and FLOP; operations of all layers, the pipeline of one."""
    made: dict[str, Any] = {
        **told,
        "operations": [
            {
                "name": row.name, "class": row.resource, "flop": row.flop, "bytes": row.nbytes,
                "link_bytes": row.link_bytes, "compute_seconds": row.compute_seconds,
                "memory_seconds": row.memory_seconds, "network_seconds": row.network_seconds,
            }
            for row in rows
        ],
        "memory_seconds": bound.memory, "compute_seconds": bound.compute, "network_seconds": bound.network,
        "ratio": bound.ratio, "limit": bound.limit, "optimal_tokens_per_s": bound.optimal_tokens_per_s,
    }  # fmt: skip
    if found is not None:
        made["pipeline"] = {
            "placement": found.placement, "sequential_seconds": found.sequential,
            "parts_only_seconds": found.parts_only, "seconds": found.simulated, "gain": found.gain,
            "structures_tried": found.tried, "schedule": found.schedule.to_dict(),
        }  # fmt: skip
    return made


def check_picture(path: Path) -> None:
    """InputError where no picture can be written."""
    if path.suffix != ".svg":
        raise InputError(f"--plot {path}: pictures are SVG; give a name that ends in .svg")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: {path.parent} is not a directory")


def picture(schedule: Schedule) -> str:
    """Two layers of a pipeline, a line per stream; what belongs to the second is lighter."""
    whole = max(one.end for one in schedule.placed) + schedule.period
    scale = (WIDTH - LEFT - 10) / whole
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{3 * LANE + 40}" '
        'font-family="sans-serif" font-size="10">'
    ]
    for at, name in enumerate(RESOURCES):
        parts.append(f'<text x="4" y="{20 + at * LANE + LANE / 2}" font-size="13">{name}</text>')
    for layer, opacity in ((0, 1.0), (1, 0.45)):
        for one in schedule.placed:
            x = LEFT + scale * (one.start + layer * schedule.period)
            y, width = 10 + RESOURCES.index(one.operation.resource) * LANE, scale * one.seconds
            label = escape(f"{one.operation.key} layer {layer}, R {one.share:.2f}, {1e3 * one.seconds:.3f} ms")
            parts.append(
                f'<g opacity="{opacity}"><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 6}" '
                f'fill="{COLORS[one.operation.resource]}" stroke="white"><title>{label}</title></rect>'
                + (f'<text x="{x + 2:.1f}" y="{y + 17}" fill="white">{one.operation.name}</text>' if width > 34 else "")
                + "</g>"
            )
    end = LEFT + scale * schedule.period
    parts.append(
        f'<line x1="{end:.1f}" x2="{end:.1f}" y1="4" y2="{3 * LANE + 10}" stroke="black" stroke-dasharray="4"/>'
    )
    parts.append(
        f'<text x="{end + 4:.1f}" y="{3 * LANE + 28}" font-size="12">{1e3 * schedule.period:.3f} ms a layer</text>'
    )
    return "\n".join([*parts, "</svg>\n"])
