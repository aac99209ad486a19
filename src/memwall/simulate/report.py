"""How a search over plans is shown: a table for the terminal, and one self-contained HTML page with plots."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memwall.errors import InputError
from memwall.hardware.system import write_whole
from memwall.hardware.units import format_bytes
from memwall.simulate.apex import Result, Search

COLUMNS = (
    "plan", "weights", "total s", "tokens/s", "first token s", "per token ms", "p95 between ms", "completion s",
    "in time", "weights/device", "MFU", "MBU", "idle", "kJ", "J/token",
)  # fmt: skip
COLOURS = ("#2f6db3", "#d98324", "#5a9e5f", "#8a6bb1", "#b0413e", "#8c8c8c", "#4aa3a2", "#c4a000", "#7f5f3f", "#555555")
WIDTH, ROW_HEIGHT, LABEL_WIDTH = 860, 22, 300


_MEANINGS = {"latency": "latency", "time": "time", "energy": "energy", "slo": "share of requests that are late"}


def cells(result: Result) -> list[str]:
    """A plan's line of the table."""
    one = result.figures
    joules = ["-", "-"]
    if one.joules is not None and one.joules_per_token is not None:
        joules = [f"{one.joules / 1000:,.1f}", f"{one.joules_per_token:.2f}"]
    clock = "" if result.clock == 1.0 else f" at {result.clock:.0%} clock"
    return [
        result.plan.name + clock,
        result.weights,
        f"{one.seconds:,.2f}",
        f"{one.output_tokens_per_s:,.0f}",
        f"{one.first_token['mean']:.3f}",
        f"{1e3 * one.per_token.get('mean', 0.0):.2f}",
        f"{1e3 * one.between_tokens.get('p95', 0.0):.2f}",
        f"{one.completion['mean']:.2f}",
        f"{one.both_met:.0%}",
        format_bytes(result.room.parameter_bytes),
        f"{one.mfu or 0.0:.1%}",
        f"{one.mbu or 0.0:.1%}",
        f"{one.idle_share or 0.0:.0%}",
        *joules,
    ]


def remarks(search: Search) -> list[str]:
    """What the table does not say: where the times come from, what was left out, what the search gains."""
    best = search.best
    told = ", ".join(f"{share:.0%} {source}" for source, share in sorted(best.sources.items(), key=lambda one: -one[1]))
    found = [f"times of {best.plan.name}: {told}"]
    if search.heuristic is not None and best.worth(search.goal) > 0:
        ratio = search.heuristic.worth(search.goal) / best.worth(search.goal)
        found.append(
            f"the usual plan without a search is {search.heuristic.plan.name}: "
            f"{ratio:.2f} times the best's {_MEANINGS[search.goal]}"
        )
    if search.given_up:
        found.append(f"{len(search.given_up)} plans were given up, being far slower")
    if search.misfits:
        found.append(f"{len(search.misfits)} plans do not fit the devices' memory")
    return found


def to_dict(search: Search, case: dict[str, Any]) -> dict[str, Any]:
    """For JSON; case: what was planned for."""
    return {
        "version": 1,
        "case": case,
        "goal": search.goal,
        "best": search.best.to_dict(),
        "runners_up": [one.to_dict() for one in search.results[1:]],
        "given_up": [plan.name for plan in search.given_up],
        "do_not_fit": [plan.name for plan in search.misfits],
        "heuristic": None if search.heuristic is None else search.heuristic.plan.name,
        "remarks": remarks(search),
    }


def check_page(path: Path) -> None:
    """Refuses a page that could not be written, before the minutes that a search takes."""
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: {path.parent} is not a directory")


def write_page(search: Search, case: dict[str, Any], path: Path) -> Path:
    """The page."""
    return write_text(page(search, case), path)


def write_text(text: str, path: Path) -> Path:
    """A page; it appears whole or not at all."""
    check_page(path)
    write_whole(path, text)
    return path


def page(search: Search, case: dict[str, Any]) -> str:
    """HTML with a table, total times by operator, and latency against throughput."""
    escape = html.escape
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(one)) + "</tr>" for one in search.results
    )
    notes = "".join(f"<li>{escape(text)}</li>" for text in remarks(search))
    title = f"{case['model']} on {case['devices']} x {case['machine']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>body{{font:14px system-ui;margin:2em;color:#222}}"
        "table{border-collapse:collapse}td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right}"
        "td:first-child,th:first-child{text-align:left}tr:first-child td{font-weight:600}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>Plans by {escape(search.goal)}, the best first; {case['requests']} requests, "
        f"weights {escape(case['weights'])}.</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<ul>{notes}</ul><h2>Seconds by operator</h2>{_bars(search.results[:12])}"
        f"<h2>Time per token against throughput</h2>{_scatter(search.results)}"
        f"<details><summary>JSON</summary><pre>{escape(json.dumps(to_dict(search, case), indent=1))}</pre></details>"
        "</body></html>"
    )


def _bars(results: Sequence[Result]) -> str:
    """Stacked bars: where the time of a plan's iterations goes."""
    names = sorted({name for one in results for name in one.seconds_by_operator})
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    most = max(sum(one.seconds_by_operator.values()) for one in results) or 1.0
    parts, height = [], ROW_HEIGHT * (len(results) + len(names) // 6 + 2)
    for row, one in enumerate(results):
        x, y = float(LABEL_WIDTH), row * ROW_HEIGHT
        parts.append(f'<text x="0" y="{y + 15}">{html.escape(one.plan.name)}</text>')
        for name, seconds in sorted(one.seconds_by_operator.items()):
            width = seconds / most * (WIDTH - LABEL_WIDTH)
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{ROW_HEIGHT - 6}" fill="{colours[name]}">'
                f"<title>{html.escape(name)}: {seconds:.3g} s</title></rect>"
            )
            x += width
    for place, name in enumerate(names):
        x, y = 140.0 * (place % 6), (len(results) + 1 + place // 6) * ROW_HEIGHT
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 10}">{html.escape(name)}</text>')
    return f'<svg width="{WIDTH}" height="{height}" font-size="12" role="img">{"".join(parts)}</svg>'


def _scatter(results: Sequence[Result]) -> str:
    """A point for each plan."""
    points = [(one.figures.output_tokens_per_s, 1e3 * one.figures.per_token.get("mean", 0.0)) for one in results]
    most_x, most_y = (max(axis) * 1.05 or 1.0 for axis in zip(*points))
    parts = [
        '<line x1="50" y1="270" x2="850" y2="270" stroke="#888"/>',
        '<line x1="50" y1="10" x2="50" y2="270" stroke="#888"/>',
        f'<text x="850" y="288" text-anchor="end">tokens/s, to {most_x:,.0f}</text>',
        f'<text x="56" y="20">ms per token, to {most_y:,.1f}</text>',
    ]
    for one, (x, y) in zip(results, points):
        at_x, at_y = 50 + 800 * x / most_x, 270 - 260 * y / most_y
        parts.append(
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" fill="{COLOURS[0 if one is results[0] else 1]}">'
            f"<title>{html.escape(one.plan.name)}: {x:,.0f} tokens/s, {y:.2f} ms</title></circle>"
        )
    return f'<svg width="{WIDTH}" height="300" font-size="12" role="img">{"".join(parts)}</svg>'
