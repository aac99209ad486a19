"""How a format study is shown: a table and answers for the terminal, one self-contained HTML page, plots as PNG."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall.hardware.system import write_whole
from memwall.hardware.units import format_bytes
from memwall.studies.kv_report import STYLE, check, drawn
from memwall.studies.ptq_answers import (
    advice,
    answers,
    at_default,
    curves,
    heldout,
    heldout_gap,
    sensitivity_of,
    tables_of,
    to_dict,
)
from memwall.studies.ptq_impact_study import TEMPERATURE, TOP_K, Row, Study
from memwall.studies.ptq_models import BASE
from memwall.studies.ptq_statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "LEGEND", "RIGHT", "check", "lines", "remarks", "write"]

COLUMNS = (
    "format", "library", "bits", "weights", "ledger", "resident", "perplexity", "gap nats", "KL nats", "top-1",
    "text ppl", "repeated", "differs at", "tokens/s", "float", "over bf16", "prompt/s",
)  # fmt: skip
RIGHT = frozenset(range(2, len(COLUMNS)))
LEGEND = (
    "bits: per weight of the linear layers, in real buffers. ledger: weights, cache and work space; resident: growth "
    "of a process, and that over its ledger. perplexity, gap: of held-out text, and the loss over bfloat16's. KL, "
    f"top-1: along bfloat16's own texts at temperature {TEMPERATURE:g}. text ppl: of the format's own texts there, by "
    "the bfloat16 model; repeated: share of 4-grams that came before; differs at: first token that is not bfloat16's. "
    "tokens/s: as `memwall run` decodes, after the first token; float: in float arithmetic, as texts were made; over "
    "bf16: time of a step over bfloat16's, in turns. ± is one standard error."
)
PLOTS = {
    "perplexity": ("loss", "perplexity of texts under bfloat16"),
    "kl": ("kl", "KL to bfloat16 along its own texts, nats per token"),
    "difference": ("first_difference", "tokens before a text leaves bfloat16's"),
    "repetition": ("repeated_4grams", "share of repeated 4-grams"),
}
"""File's name -> measure over temperature and the axis."""
SETTINGS = {"top_k": "top-k", "length": "max new tokens"}


def lines(study: Study) -> list[list[str]]:
    """The table's lines."""
    return [_line(study, row) for row in study.rows if row.heldout or row.costs]


def _line(study: Study, row: Row) -> list[str]:
    costs, loss = row.costs, heldout(row)
    gap = None if row is study.base else heldout_gap(row, study.base)
    tables = at_default(study, row)
    found = {name: estimate(table) for name, table in tables.items()}
    text = found.get("loss")
    resident, ledger = costs.get("resident_bytes"), costs.get("ledger_bytes")
    return [
        row.format,
        row.library,
        _number(costs.get("bits_per_weight"), ".3f"),
        format_bytes(costs["weight_bytes"]) if costs else "-",
        "-" if ledger is None else format_bytes(ledger),
        "-" if not ledger or resident is None else f"{format_bytes(resident)} ({resident / ledger:.3f})",
        "-" if loss is None else f"{math.exp(loss.mean):.2f}",
        _with_error(gap, "+.4f"),
        _with_error(found.get("kl"), ".4f"),
        _number(_mean(found.get("top1_agreement")), ".1%"),
        "-" if text is None else f"{math.exp(text.mean):.2f}",
        _number(_mean(found.get("repeated_4grams")), ".1%"),
        _with_error(found.get("first_difference"), ".1f", 1),
        *(
            _number(costs.get(name), form)
            for name, form in (
                ("decode_tokens_per_s", ".0f"), ("float_tokens_per_s", ".0f"), ("time_over_bf16", ".2f"),
                ("prefill_tokens_per_s", ".0f"),
            )
        ),
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(one: Estimate | None) -> float | None:
    return None if one is None else one.mean


def _with_error(one: Estimate | None, form: str, places: int = 4) -> str:
    if one is None:
        return "-"
    return format(one.mean, form) if one.error is None else f"{one.mean:{form}} ±{one.error:.{places}f}"


def remarks(study: Study, memory_bytes: int | None = None) -> list[str]:
    """Answers, sensitivities that stand out, advice, and what was left out."""
    found = [f"{one.verdict}: {one.question} ({one.figures})" for one in answers(study)]
    for one in sensitivity_of(study):
        if one.flagged:
            found.append(
                f"flagged: {one.format} in {one.window}: slope {one.slope.mean:+.3f}, "
                f"{_with_error(one.excess, '+.3f', 3)} over bfloat16's"
            )
    for told in advice(study, memory_bytes):
        taken = told.format or "nothing"
        found.append(f"temperature in {told.window}, {format_bytes(told.memory_bytes)}: {taken}: {told.reason}")
    skipped = [f"skipped: {row.library} {row.format}: {row.skipped}" for row in study.rows if row.skipped]
    return found + list(dict.fromkeys(skipped))


def write(study: Study, folder: Path, memory_bytes: int | None = None) -> list[Path]:
    """study.json, study.html and one PNG a plot; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"study.json": (json.dumps(to_dict(study), indent=1, allow_nan=False) + "\n").encode()}
    pages = {}
    for name, figure in _figures(study):
        made[f"{name}.png"] = drawn(figure, "png")
        pages[name] = drawn(figure, "svg").decode()
    made["study.html"] = page(study, pages, memory_bytes).encode()
    for name, content in made.items():
        write_whole(folder / name, content)
    return [folder / name for name in made]


def _figures(study: Study) -> Iterator[tuple[str, Figure]]:
    for name, (measure, label) in PLOTS.items():
        found = {form: dict(tables) for form, tables in curves(study, measure).items()}
        if name in ("kl", "difference"):
            found.pop(BASE, None)  # zero, and the whole length, by what they are
        if any(len(tables) > 1 for tables in found.values()):
            yield name, _plot(found, "temperature", label, losses=measure == "loss")
    for name, label in SETTINGS.items():
        varied = _over(study, name)
        if any(len(tables) > 1 for tables in varied.values()):
            yield name, _plot(varied, label, "perplexity of texts under bfloat16", losses=True, logarithmic=True)
    if all(row.costs for row in study.own):
        yield "costs", _costs(study)


def _over(study: Study, name: str) -> dict[str, dict[float, np.ndarray]]:
    """format -> top-k or length -> losses, the temperature fixed."""
    found: dict[str, dict[float, np.ndarray]] = {}
    for row in study.own:
        mine = found.setdefault(row.format, {})
        for (temperature, top_k), texts in row.texts.items():
            if temperature != TEMPERATURE:
                continue
            if name == "top_k" and top_k in study.grid.top_ks:
                mine[top_k] = tables_of(study, texts, study.grid.tokens)["loss"]
            elif name == "length" and top_k == TOP_K:
                mine |= {length: tables_of(study, texts, length)["loss"] for length in study.grid.lengths}
    return found


def _plot(
    found: dict[str, dict[float, np.ndarray]], across: str, label: str, *, losses: bool, logarithmic: bool = False
) -> Figure:
    """One line a format with its 95 % band."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    shown = np.exp if losses else np.asarray
    for number, (form, tables) in enumerate(found.items()):
        points = [(x, one) for x, table in sorted(tables.items()) if (one := estimate(table)) is not None]
        places = [x for x, _ in points]
        axes.plot(places, shown([one.mean for _, one in points]), marker="osD^v<>pPX"[number % 10], label=form,
                  color=f"C{number % 10}")  # fmt: skip
        if all(one.low is not None for _, one in points):
            low, high = (shown([getattr(one, side) for _, one in points]) for side in ("low", "high"))
            axes.fill_between(places, low, high, color=f"C{number % 10}", alpha=0.12, linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _costs(study: Study) -> Figure:
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(row for row in study.rows if row.costs):
        own = row.library == "memwall"
        x, y = row.costs["weight_bytes"], row.costs["decode_tokens_per_s"]
        axes.scatter(x, y, color=f"C{number % 10}", marker="o" if own else "x")
        axes.annotate(row.format if own else f"{row.format}, {row.library}", (x, y), fontsize=8,
                      xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axes.set_xlabel("bytes of the weights")
    axes.set_ylabel("tokens per second")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, place: format_bytes(int(value)))
    axes.grid(alpha=0.3)
    return figure


def page(study: Study, plots: dict[str, str], memory_bytes: int | None = None) -> str:
    """One page without outside references."""
    escape, grid = html.escape, study.grid
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines(study))
    told = "".join(f"<li>{escape(text)}</li>" for text in remarks(study, memory_bytes))
    drawings = "".join(plots.values())
    facts = (
        f"{study.model}: {len(study.prompts)} prompts, {grid.seeds} seeds, {grid.tokens} new tokens; {grid.windows} "
        f"windows of {grid.window_tokens} tokens of held-out text; {study.machine}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>memwall study ptq-impact: {escape(study.model)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Weight formats of {escape(study.model)}</h1><p>{escape(facts)}</p>"
        f"<h2>Answers, and which format to take</h2><ul>{told}</ul>{drawings}"
        f"<h2>All formats</h2><div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p>{escape(LEGEND)}</p><h2>As data</h2><details><summary>JSON, version {study.version}</summary>"
        f"<pre>{escape(json.dumps(to_dict(study), indent=1))}</pre></details></body></html>"
    )
