"""How a plan is shown: tables for the terminal (rich) and one self-contained HTML page with a plot of quality
versus bytes (matplotlib).
"""

from __future__ import annotations

import html
import importlib.util
import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memwall.errors import InputError, MissingDependency
from memwall.hardware.system import write_whole
from memwall.hardware.units import format_bytes
from memwall.plan.base import Option, Plan, Quality

if TYPE_CHECKING:
    from rich.console import Group

_COLOURS = {"weights": "#2f6db3", "kv": "#d98324", "activations": "#5a9e5f", "kernels": "#8a6bb1", "runtime": "#8c8c8c"}
_OTHER_COLOUR = "#b0b0b0"


def table(plan: Plan, width: int) -> Group:
    """The plan as rich tables for a terminal of `width` columns: bytes by owner and tier, then the choice beside its
    runners-up.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = Table()
    for name in ("owner", "tier", "bytes"):
        rows.add_column(name, justify="right" if name == "bytes" else "left")
    for row in plan.rows:
        rows.add_row(row.owner, row.tier, format_bytes(row.nbytes))
    rows.add_section()
    for tier, peak in plan.peak_bytes.items():
        cap = plan.budget.get(tier)
        share = f" ({100 * peak / cap:.0f} % of {format_bytes(cap)})" if cap else ""
        rows.add_row("predicted peak", tier, format_bytes(peak) + share)
    cells = [
        [mark, *option_cells(one)] for mark, one in [("*", chosen_option(plan)), *(("", o) for o in plan.runners_up)]
    ]
    shown = _columns_that_fit(cells, width)
    left_out = [name for name in OPTION_COLUMNS if name not in shown]
    options = Table(title="options", title_justify="left", caption_justify="left")
    options.caption = f"left out in {width} columns: {', '.join(left_out)}" if left_out else None
    for name in shown:
        left = name in ("", "weights", "cache", "note")
        options.add_column(name, justify="left" if left else "right", no_wrap=name != "note", overflow="fold")
    places = [OPTION_COLUMNS.index(name) for name in shown]
    for cell in cells:
        options.add_row(*(cell[place] for place in places))
    lines = [Text(line) for line in (speed_line(plan), savings_line(plan)) if line]
    return Group(Text(f"{plan.model} on {plan.machine}"), rows, *lines, options, Text(plan.explanation))


def _columns_that_fit(cells: list[list[str]], width: int) -> list[str]:
    """Names of the columns that a table `width` wide shows whole; a note may be folded."""
    needs = {name: max(len(name), *(len(row[at]) for row in cells)) for at, name in enumerate(OPTION_COLUMNS)}
    needs["note"] = min(needs["note"], NOTE_WIDTH)
    shown = list(OPTION_COLUMNS)
    for name in DISPENSABLE_COLUMNS:
        if sum(needs[one] + 3 for one in shown) + 1 <= width:
            break
        shown.remove(name)
    return shown


NOTE_WIDTH = 16
DISPENSABLE_COLUMNS = ("context", "batch", "bits/value", "perplexity", "bits/weight", "note", "tokens/s")
"""Those of the options that narrow terminals are spared, in this order."""
OPTION_COLUMNS = (
    "",
    "weights",
    "bits/weight",
    "cache",
    "bits/value",
    "context",
    "batch",
    "peak",
    "tokens/s",
    "KL nats",
    "perplexity",
    "note",
)


def option_cells(option: Option) -> list[str]:
    """One line of the table of options, without its mark."""
    quality = option.quality
    return [
        option.choice.weights,
        f"{option.bits_per_weight:.2f}",
        option.choice.kv,
        f"{option.kv_bits_per_value:.2f}",
        str(option.choice.context),
        str(option.choice.batch),
        " ".join(f"{tier} {format_bytes(peak)}" for tier, peak in option.peak_bytes.items()),
        "-" if option.decode_tokens_per_s is None else f"{option.decode_tokens_per_s:.1f}",
        "-" if quality is None else f"{quality.kl_nats:.4f}",
        "-" if quality is None else f"{quality.perplexity:.2f}",
        option.note,
    ]


def chosen_option(plan: Plan) -> Option:
    """The plan's own choice in the form of its runners-up."""
    return Option(
        choice=plan.choice,
        peak_bytes=plan.peak_bytes,
        bits_per_weight=plan.bits_per_weight,
        kv_bits_per_value=plan.kv_bits_per_value,
        decode_tokens_per_s=plan.decode_tokens_per_s,
        quality=plan.quality,
        note="chosen",
    )


def speed_line(plan: Plan) -> str:
    """Predicted speeds in one line of text."""
    if plan.decode_tokens_per_s is None or plan.decode_tokens_per_s_at_start is None:
        return "speed: not predicted"
    text = (
        f"predicted decode {plan.decode_tokens_per_s:.1f} tokens/s at {plan.choice.context} tokens of context, "
        f"{plan.decode_tokens_per_s_at_start:.1f} at the start"
    )
    return text if plan.prefill_tokens_per_s is None else f"{text}; prefill {plan.prefill_tokens_per_s:.0f} tokens/s"


def savings_line(plan: Plan) -> str:
    """What each part of the cache policy saves, and all together; empty for a float16 cache."""
    if all(factor == 1 for factor in plan.kv_savings.values()):
        return ""
    parts = " x ".join(f"{part} {factor:.3f}" for part, factor in plan.kv_savings.items())
    whole = f" = {math.prod(plan.kv_savings.values()):.3f}" if len(plan.kv_savings) > 1 else ""
    return f"predicted cache, in float16's bytes: {parts}{whole}"


def check_html(path: str | os.PathLike[str]) -> None:
    """Refuses a report that could not be written, before the minutes that measuring takes."""
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: {target.parent} is not a directory")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("matplotlib", "plot")


def write_html(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write the page; the file appears whole or not at all. Raises MissingDependency before anything is written."""
    check_html(path)
    target = Path(path)
    write_whole(target, render_html(plan))
    return target


def render_html(plan: Plan) -> str:
    """One page without outside references: the choice, bytes per owner as bars, the plot and the options."""
    escape = html.escape
    options = [chosen_option(plan), *plan.runners_up]
    head = "".join(f"<th>{escape(name)}</th>" for name in OPTION_COLUMNS[1:])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in option_cells(one)) + "</tr>" for one in options
    )
    facts = _facts(plan)
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>memwall plan: {escape(plan.model)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Plan for {escape(plan.model)}</h1><p>{escape(plan.explanation)}</p><dl>{listed}</dl>"
        f"<h2>Bytes by owner</h2>{_bars(plan)}"
        f"<h2>Quality versus bytes</h2>{quality_plot(plan)}"
        f"<h2>Options</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<h2>As data</h2><details><summary>JSON, version {plan.version}</summary>"
        f"<pre>{escape(plan.to_json(indent=1))}</pre></details>"
        "</body></html>"
    )


def quality_plot(plan: Plan) -> str:
    """Inline SVG: each option at its predicted peak; measured loss where there is one, otherwise bits per weight."""
    import matplotlib
    from matplotlib.figure import Figure

    options = [chosen_option(plan), *plan.runners_up]
    tier = next(iter(plan.peak_bytes), "ram")
    measured: list[tuple[Option, Quality]] = [(one, one.quality) for one in options if one.quality is not None]
    if measured:
        label = "KL to the float model, nats per token"
        points = [(one, quality.kl_nats) for one, quality in measured]
    else:
        label = "bits per weight (loss not measured)"
        points = [(one, one.bits_per_weight) for one in options]
    with matplotlib.rc_context({"svg.hashsalt": "memwall", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        _scatter(axes, points, tier, chosen=options[0])
        if tier in plan.budget:
            axes.axvline(
                plan.budget[tier] / 1e6,
                color="#b03030",
                linestyle="--",
                label=f"budget {format_bytes(plan.budget[tier])}",
            )
        axes.set_xlabel(f"predicted peak on {tier}, MB (10^6 bytes)")
        axes.set_ylabel(label)
        if measured and all(value > 0 for _, value in points):
            axes.set_yscale("log")
        axes.margins(x=0.18)  # room for the last label
        axes.grid(alpha=0.3)
        axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _scatter(axes: Any, points: list[tuple[Option, float]], tier: str, *, chosen: Option) -> None:
    for option, value in points:
        best = option is chosen
        axes.scatter(
            option.peak_bytes.get(tier, 0) / 1e6,
            value,
            s=110 if best else 40,
            marker="*" if best else "o",
            color="#b03030" if best else "#2f6db3",
            label="chosen" if best else None,
        )
        axes.annotate(
            f"{option.choice.weights}, {option.choice.kv}",
            (option.peak_bytes.get(tier, 0) / 1e6, value),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8,
        )


def _facts(plan: Plan) -> dict[str, str]:
    choice, quality = plan.choice, plan.quality
    facts = {
        "machine": plan.machine,
        "budget": ", ".join(f"{tier} {format_bytes(cap)}" for tier, cap in plan.budget.items()) or "none asked",
        "predicted peak": ", ".join(f"{tier} {format_bytes(peak)}" for tier, peak in plan.peak_bytes.items()),
        "weights": f"{choice.weights} ({plan.bits_per_weight:.2f} bits per weight)",
        "cache": f"{choice.kv} ({plan.kv_bits_per_value:.2f} bits per value)",
        "context": f"{choice.context} tokens, batch {choice.batch}, {choice.threads} threads, {choice.device}",
        "cache savings": savings_line(plan) or "none: float16",
        "speed": speed_line(plan),
        "quality": "not measured",
        "fingerprint": plan.fingerprint,
    }
    if quality is not None:
        facts["quality"] = (
            f"KL {quality.kl_nats:.4f} nats, perplexity {quality.perplexity:.2f}, "
            f"same top token {100 * quality.top1_agreement:.1f} % ({quality.tokens} tokens of {quality.measured_on})"
        )
    return facts


def _bars(plan: Plan) -> str:
    widest = max([*plan.peak_bytes.values(), *plan.budget.values(), 1])
    lines = []
    for row in plan.rows:
        colour = _COLOURS.get(row.owner.partition("/")[0], _OTHER_COLOUR)
        width = 100 * row.nbytes / widest
        lines.append(
            f"<tr><td>{html.escape(row.owner)}</td><td>{html.escape(row.tier)}</td><td>{format_bytes(row.nbytes)}</td>"
            f'<td class="bar"><div style="width:{width:.2f}%;background:{colour}"></div></td></tr>'
        )
    return f'<table class="bars"><tbody>{"".join(lines)}</tbody></table>'


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}"
    "td,th{padding:.25rem .5rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}"
    ".bar{width:60%}.bar div{height:.9rem;min-width:1px}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}"
    "dt{color:#666}dd{margin:0}svg{max-width:100%;height:auto}pre{overflow:auto;background:#f6f6f6;padding:1rem}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#333}pre{background:#222}"
    "svg{background:#fff}}"
)
