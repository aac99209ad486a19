"""What the search over splits tells: the plan, where its layers lie, and attainment over rates and limits.

Source: DistServe, arXiv 2401.09670, section 6.2 (attainment over the rate, and over the scale of both limits at one
rate); the map is that of section 4.2's low node-affinity placement.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memwall.hardware.units import GB
from memwall.simulate.distserve import Degrees, Plan, Progress, Search
from memwall.simulate.report import COLOURS

COLUMNS = ("prefill", "decode", "devices", "requests/s", "requests/s and device")
RATE_SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Of the rate that is planned for."""
SCALES = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
WIDTH, HEIGHT, MARGIN = 420, 260, 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Attainment at `rates` (all instances together) and at `scales` of both limits, of the split and of as many
    devices that do both (None where these hold no instance).
    """

    rates: tuple[float, ...]
    by_rate: tuple[float, ...]
    both_by_rate: tuple[float, ...] | None
    scales: tuple[float, ...]
    by_scale: tuple[float, ...]
    both_by_scale: tuple[float, ...] | None


def curves(search: Search, plan: Plan, rate: float, progress: Progress | None = None) -> Curves:
    """Simulates a plan at rates around the one that it is for, and at that one with other limits."""
    rates = tuple(rate * share for share in RATE_SHARES)
    limits = [search.limits.scaled(scale) for scale in SCALES]
    both = colocated(search, plan)
    by_rate: list[float] = []
    by_scale: list[float] = []
    both_by_rate: list[float] = []
    both_by_scale: list[float] = []
    asked = [(each, search.limits) for each in rates] + [(rate, each) for each in limits]
    for number, (each, limit) in enumerate(asked):
        mine, other = (by_rate, both_by_rate) if number < len(rates) else (by_scale, both_by_scale)
        mine.append(search.attained_by(plan, each, limit))
        if both is not None:
            other.append(search.attained_colocated(both[0], both[1], each, limit))
        if progress is not None:
            progress(number + 1, len(asked))
    return Curves(
        rates=rates, by_rate=tuple(by_rate), both_by_rate=tuple(both_by_rate) if both else None,
        scales=SCALES, by_scale=tuple(by_scale), both_by_scale=tuple(both_by_scale) if both else None,
    )  # fmt: skip


def colocated(search: Search, plan: Plan) -> tuple[Degrees, int] | None:
    """The narrowest instance that does both, as vLLM would run it, and how many of it the plan's devices hold."""
    options = sorted(search.degrees(plan.devices), key=lambda one: (one.devices, one.pipeline))
    return (options[0], plan.devices // options[0].devices) if options else None


def segment_map(plan: Plan, layers: int) -> list[dict[str, Any]]:
    """For each node of one copy of the plan: its layers, and which of the node's devices have which of them.

    Devices are numbered in the node, those of prefill first; a device's entry has its phase, layers and tensor rank.
    """
    found = []
    each = layers // plan.segments
    for node in range(plan.segments):
        devices: list[dict[str, Any]] = []
        for phase, degrees in (("prefill", plan.prefill), ("decode", plan.decode)):
            stages = degrees.pipeline // plan.segments
            for stage in range(stages):
                first = node * each + stage * each // stages
                last = node * each + (stage + 1) * each // stages - 1
                devices += [
                    {"device": len(devices) + rank, "phase": phase, "layers": [first, last], "rank": rank}
                    for rank in range(degrees.tensor)
                ]
        found.append({"node": node, "layers": [node * each, (node + 1) * each - 1], "devices": devices})
    return found


def cells(plan: Plan) -> list[str]:
    """A plan's line of the table."""
    return [
        _instances(plan.prefill, plan.prefill_instances),
        _instances(plan.decode, plan.decode_instances),
        str(plan.devices),
        f"{plan.goodput * plan.devices:.2f}",
        f"{plan.goodput:.3f}",
    ]


def _instances(degrees: Degrees, count: int) -> str:
    return f"{count} x (tensor {degrees.tensor}, pipeline {degrees.pipeline})"


def plan_dict(plan: Plan) -> dict[str, Any]:
    """For JSON."""

    def phase(degrees: Degrees, count: int) -> dict[str, int]:
        return {"tensor": degrees.tensor, "pipeline": degrees.pipeline, "instances": count}

    return {
        "prefill": phase(plan.prefill, plan.prefill_instances),
        "decode": phase(plan.decode, plan.decode_instances),
        "devices": plan.devices,
        "segments": plan.segments,
        "goodput_per_device": plan.goodput,
        "goodput": plan.goodput * plan.devices,
    }


def to_dict(
    search: Search, plans: Sequence[Plan], told: dict[str, Any], found: Curves, changes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """For JSON; told: what was planned for; changes: plans as the load shifted."""
    best = plans[0]
    return {
        "version": 1,
        "case": told,
        "plan": plan_dict(best),
        "runners_up": [plan_dict(plan) for plan in plans[1:]],
        "kv_bytes_per_token": search.model.kv_bytes_per_token,
        "segment_map": segment_map(best, search.model.layers) if best.segments > 1 else None,
        "attainment": {
            "target": search.limits.attainment,
            "over_rate": _rows("rate", found.rates, found.by_rate, found.both_by_rate),
            "over_limits": _rows("scale", found.scales, found.by_scale, found.both_by_scale),
        },
        "replanned": list(changes),
    }


def _rows(
    name: str, at: Sequence[float], split: Sequence[float], both: Sequence[float] | None
) -> list[dict[str, float | None]]:
    return [
        {name: x, "split": y, "colocated": None if both is None else both[place]}
        for place, (x, y) in enumerate(zip(at, split))
    ]


def page(told: dict[str, Any], everything: dict[str, Any], plans: Sequence[Plan], found: Curves) -> str:
    """HTML with the table, both curves and the map."""
    escape = html.escape
    title = f"{told['model']}: prefill and decode apart on {told['machine']}"
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells(plan)) + "</tr>" for plan in plans[:20])
    target = everything["attainment"]["target"]
    rates = chart("requests a second", found.rates, {"apart": found.by_rate, "both": found.both_by_rate}, target)
    limits = chart("scale of both limits", found.scales, {"apart": found.by_scale, "both": found.both_by_scale}, target)
    layers = everything["segment_map"]
    where = "" if layers is None else f"<h2>Layers by node</h2>{_map(layers)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>body{{font:14px system-ui;margin:2em;color:#222}}"
        "table{border-collapse:collapse}td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:left}"
        "</style></head><body>"
        f"<h1>{escape(title)}</h1><p>First token within {told['first_token_seconds']} s and "
        f"{told['per_token_seconds']} s per further token, for {target:.0%} of the requests; "
        f"{search_note(everything)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<h2>Share of requests within both limits</h2>{rates}{limits}{where}"
        f"<details><summary>JSON</summary><pre>{escape(json.dumps(everything, indent=1))}</pre></details></body></html>"
    )


def search_note(everything: dict[str, Any]) -> str:
    """What moves between the phases, in words."""
    nbytes = everything["kv_bytes_per_token"] * 1000
    return f"{nbytes / GB:.3f} GB of keys and values are handed over for 1,000 tokens of a prompt."


def chart(label: str, at: Sequence[float], lines: dict[str, Sequence[float] | None], target: float) -> str:
    """Shares over something, as lines; the target is a dashed one."""
    most = max(at) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + (WIDTH - MARGIN - 12) * x / most, 12 + (HEIGHT - MARGIN - 12) * (1 - y)

    (left, bottom), (right, top) = place(0, 0), place(most, 1)
    parts = [
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888"/>',
        f'<path d="M{left} {place(0, target)[1]:.1f}H{right}" stroke="#888" stroke-dasharray="4"/>',
        f'<text x="{right}" y="{bottom + 30}" text-anchor="end">{html.escape(label)}</text>',
    ]
    parts += [f'<text x="{place(x, 0)[0]:.0f}" y="{bottom + 14}" text-anchor="middle">{x:.3g}</text>' for x in at]
    parts += [f'<text x="4" y="{place(0, y)[1] + 4:.0f}">{y:.0%}</text>' for y in (0.0, 0.5, 1.0)]
    for number, (name, values) in enumerate(lines.items()):
        if values is None:
            continue
        dots = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, y) for x, y in zip(at, values)))
        colour = COLOURS[number]
        parts.append(f'<polyline points="{dots}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right - 60}" y="{top + 16 * (number + 1)}" fill="{colour}">{html.escape(name)}</text>')
    return f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="11" role="img">{"".join(parts)}</svg>'


def _map(nodes: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>node {one['node']}</td><td>{device['device']}</td><td>{device['phase']}</td>"
        f"<td>{device['layers'][0]} to {device['layers'][1]}</td><td>{device['rank']}</td></tr>"
        for one in nodes
        for device in one["devices"]
    )
    return f"<table><tr><th></th><th>device</th><th>phase</th><th>layers</th><th>tensor rank</th></tr>{rows}</table>"
