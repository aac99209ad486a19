"""An analysis of long contexts as tables, as plain data for JSON, and as a picture (SVG) of costs over contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from memwall.hardware.units import GIB, format_bytes, format_flop_rate, format_rate, format_seconds
from memwall.simulate.context_methods import Gain, order
from memwall.simulate.context_model import Peak
from memwall.simulate.context_sessions import Served
from memwall.simulate.long_context_peak_analysis import HARDWARE, MEANINGS, METRICS, SYMBOLS, Analysis, Metric

HOUR = 3600
LABELS: Mapping[Metric, str] = {
    "users": "users in memory", "prefill": "prefill", "answer": "answer, one user", "switch": "user switch",
    "sessions": "sessions/h",
}  # fmt: skip
RANK_COLUMNS = ("method", "KV held", "users", "prefill", "answer", "switch", "sessions")
PANEL, HEIGHT, MARGIN = 230, 180, 46
COLOUR = "#2f6db3"


def short(value: float) -> str:
    """Three digits, or all of a large number's."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def hourly(sessions_per_s: float) -> str:
    """Sessions an hour."""
    return short(sessions_per_s * HOUR)


def columns(analyses: Sequence[Analysis]) -> list[str]:
    """Heads of the table."""
    return ["", *(f"{one.workload.context:,.0f} tokens" for one in analyses)]


def rows(analyses: Sequence[Analysis], simulated: Mapping[str, Sequence[Served | None]]) -> list[list[str]]:
    """Lines of the table: each figure, and how many times the first context's it is."""

    def line(label: str, values: Sequence[float], text: Any) -> list[str]:
        first = values[0]
        return [label, *(f"{text(v)} ({short(v / first)}x)" if first and v else f"{text(v)}" for v in values)]

    found = [
        line("KV of a user", [one.kv_bytes for one in analyses], lambda v: f"{format_bytes(v)} = {v / GIB:.3g} GiB"),
        line(LABELS["users"], [one.users for one in analyses], lambda v: f"{v:,.0f}"),
        line(LABELS["prefill"], [one.prefill for one in analyses], format_seconds),
        line(LABELS["answer"], [one.answer for one in analyses], format_seconds),
        line(
            "answer, users in memory", [one.answer_seconds(one.batch) if one.batch else 0.0 for one in analyses],
            lambda v: format_seconds(v) if v else "-",
        ),
        line(LABELS["switch"], [one.switch for one in analyses], format_seconds),
        line("sessions/h, side by side", [one.sessions for one in analyses], hourly),
        line("sessions/h, in turn", [one.sessions_in_turn for one in analyses], hourly),
    ]  # fmt: skip
    for name, served in simulated.items():
        found.append(line(f"simulated, {name}", [one.sessions_per_s if one else 0.0 for one in served], hourly))
    return found


def bottlenecks(analysis: Analysis) -> list[list[str]]:
    """A line per metric: what binds it, and how it changes (in per cent) with one per cent more of each number."""
    found = []
    for metric in METRICS:
        bound = analysis.bottleneck(metric)
        pulls = [f"{analysis.elasticity(metric, symbol):+.2f}" for symbol in SYMBOLS]
        found.append([LABELS[metric], MEANINGS[bound] if bound else "does not fit", *pulls])
    return found


BOTTLENECK_COLUMNS = ("metric", "bound by", *(MEANINGS[symbol] for symbol in SYMBOLS))
SWEEP_COLUMNS = ("machine", "devices", "context", "users", "prefill", "answer", "switch", "sessions/h")


def sweep(analyses: Sequence[Analysis], peaks: Sequence[Peak]) -> list[Analysis]:
    """The same workloads on other devices."""
    return [replace(one, peak=peak) for peak in peaks for one in analyses]


def sweep_row(analysis: Analysis) -> list[str]:
    """A line of the sweep's table."""
    peak, fits = analysis.peak, analysis.users >= 1
    return [
        peak.name, str(peak.devices), f"{analysis.workload.context:,.0f}",
        f"{analysis.users:,.0f}" if fits else f"0; takes {analysis.least_devices}",
        format_seconds(analysis.prefill), format_seconds(analysis.answer), format_seconds(analysis.switch),
        hourly(analysis.sessions),
    ]  # fmt: skip


def gain_row(gain: Gain) -> list[str]:
    """A line of the ranking."""
    told = [f"{short(gain.gains[metric])}x" for metric in METRICS]
    return [gain.methods, f"{gain.effect.held:.3g}", *told]


def shape_text(analysis: Analysis) -> str:
    """Which numbers the model was counted with."""
    model, peak = analysis.model, analysis.peak
    layers, width = model.prefill_attention or (model.layers, model.attention_width)
    count = f"{peak.devices} x " if peak.devices > 1 else ""
    return (
        f"{model.name}: weights {format_bytes(round(analysis.weight_bytes))}, {model.token_bytes:,.0f} B of keys and "
        f"values a token, attention {layers} layers x {width}{', causal' if model.causal else ', not causal'}; "
        f"{count}{peak.name}: {format_bytes(round(peak.memory_bytes))}, {format_flop_rate(peak.flop_per_s)}, "
        f"{format_rate(peak.bytes_per_s)}, link {format_rate(peak.link_bytes_per_s)}"
    )


def limits_text(analysis: Analysis) -> str:
    """Critical batch and the context at which keys and values weigh as much as the weights."""
    turning = analysis.turning_batch
    told = "at no batch" if math.isinf(turning) else f"from {turning:,.0f} on"
    return (
        f"arithmetic binds a step from {analysis.critical_batch:,.0f} tokens on where there is no context, at "
        f"{analysis.workload.context:,.0f} tokens of context {told}; keys and values weigh as much as the weights at "
        f"{analysis.balance_context:,.0f} tokens"
    )


def to_dict(
    analyses: Sequence[Analysis], simulated: Mapping[str, Sequence[Served | None]], swept: Sequence[Analysis],
    stack: Sequence[Gain], ranked: Sequence[Gain], left_out: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """For programs; units in the names."""
    first = analyses[0]
    layers, width = first.model.prefill_attention or (first.model.layers, first.model.attention_width)
    contexts = [context_dict(one, first) for one in analyses]
    for name, served in simulated.items():
        for context, one in zip(contexts, served, strict=True):
            key = f"simulated_{name.replace(' ', '_')}"
            context[key] = None if one is None else {
                "sessions_per_s": one.sessions_per_s, "sessions": one.sessions, "swaps_per_session": one.swaps,
            }  # fmt: skip
    return {
        "version": 1,
        "model": {
            "name": first.model.name, "weight_bytes": first.weight_bytes, "kv_bytes_per_token": first.model.token_bytes,
            "attention": {"layers": layers, "width": width, "causal": first.model.causal},
        },
        "device": peak_dict(first.peak),
        "critical_batch": first.critical_batch, "balance_context_tokens": first.balance_context,
        "contexts": contexts,
        "sweep": [{"device": peak_dict(one.peak), **figures(one)} for one in swept],
        "methods": [gain_dict(one) for one in stack],
        "ranking": {metric: order(ranked, metric) for metric in METRICS} if ranked else {},
        "ranked": [gain_dict(one) for one in ranked], "left_out": dict(left_out),
    }  # fmt: skip


def figures(analysis: Analysis) -> dict[str, Any]:
    """The figures of one context."""
    return {
        "context_tokens": analysis.workload.context, "kv_bytes": analysis.kv_bytes, "users": int(analysis.users),
        "prefill_seconds": analysis.prefill, "answer_seconds": analysis.answer,
        "answer_batch_seconds": analysis.answer_seconds(analysis.batch) if analysis.batch else None,
        "switch_seconds": analysis.switch, "sessions_per_s": analysis.sessions,
        "sessions_in_turn_per_s": analysis.sessions_in_turn,
    }  # fmt: skip


def context_dict(analysis: Analysis, first: Analysis) -> dict[str, Any]:
    """One context with its ratios to the first, bottlenecks and derivatives."""
    turning = analysis.turning_batch
    return {
        **figures(analysis),
        "ratio_to_first": {
            metric: analysis.value(metric) / first.value(metric) if first.value(metric) else None for metric in METRICS
        },
        "turning_batch": None if math.isinf(turning) else turning,
        "bottlenecks": {
            metric: {
                "bound_by": analysis.bottleneck(metric),
                "elasticity": {symbol: analysis.elasticity(metric, symbol) for symbol in SYMBOLS},
                "derivative": {symbol: analysis.derivative(metric, symbol) for symbol in SYMBOLS},
            }
            for metric in METRICS
        },
    }


def peak_dict(peak: Peak) -> dict[str, Any]:
    """A device as data; figures of one, and how many."""
    return {
        "name": peak.name, "devices": peak.devices, "memory_bytes": peak.memory_bytes, "flop_per_s": peak.flop_per_s,
        "bytes_per_s": peak.bytes_per_s, "link_bytes_per_s": peak.link_bytes_per_s, "shares": list(peak.shares),
    }  # fmt: skip


def gain_dict(gain: Gain) -> dict[str, Any]:
    """A method's gains, and what it multiplies."""
    one = gain.effect
    return {
        "methods": gain.methods, "context_tokens": gain.context, "gains": dict(gain.gains),
        "left": {
            "memory": one.held, "decode": one.read, "switch": one.switched, "prefill": one.prefill,
            "prefill_attention": one.attention, "weights": one.weights,
        },
        "step_flop": one.step_flop,
    }  # fmt: skip


def picture(analyses: Sequence[Analysis]) -> str:
    """Panels of the metrics over the context, both axes logarithmic, as one SVG."""
    width = MARGIN + len(METRICS) * PANEL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + 2 * MARGIN}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{MARGIN}" y="16" font-size="13">{escape(shape_text(analyses[0]))}</text>',
    ]
    for number, metric in enumerate(METRICS):
        points = [(one.workload.context, one.value(metric) * (HOUR if metric == "sessions" else 1)) for one in analyses]
        parts += _panel(MARGIN + number * PANEL, _title(analyses[-1], metric), [p for p in points if p[1] > 0])
    return "\n".join([*parts, "</svg>"])


def _title(analysis: Analysis, metric: Metric) -> str:
    bound = analysis.bottleneck(metric)
    unit = ", s" if metric in ("prefill", "answer", "switch") else ""
    return f"{LABELS[metric]}{unit} ({MEANINGS[bound] if bound in HARDWARE else 'does not fit'})"


def _panel(left: float, title: str, points: Sequence[tuple[float, float]]) -> list[str]:
    inner, top = PANEL - MARGIN, MARGIN
    parts = [
        f'<text x="{left}" y="{top - 8}">{escape(title)}</text>',
        f'<rect x="{left}" y="{top}" width="{inner}" height="{HEIGHT}" fill="none" stroke="#999"/>',
    ]
    if not points:
        return parts
    logs = [(math.log(x), math.log(y)) for x, y in points]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*logs, strict=True))
    wide, high = 0.8 * inner / ((x1 - x0) or 1), 0.75 * HEIGHT / ((y1 - y0) or 1)
    places = [(left + 0.1 * inner + wide * (x - x0), top + 0.9 * HEIGHT - high * (y - y0)) for x, y in logs]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOUR}" stroke-width="2"/>')
    for (x, y), (context, value) in zip(places, points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOUR}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y - 6:.1f}" text-anchor="middle">{value:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 14}" text-anchor="middle">{context:,.0f}</text>')
    return parts
