"""How the efficiency study is shown: a table a group, one self-contained HTML page, its plots as PNG, JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memwall.hardware.system import write_whole
from memwall.hardware.units import format_bytes, format_seconds
from memwall.studies.efficiency_rank import BY_NAME, DEFAULT_WEIGHTS, METRICS, Row, ranked
from memwall.studies.efficiency_records import Record
from memwall.studies.efficiency_sizes import ATTENTION, BASELINES
from memwall.studies.efficientllm import Study
from memwall.studies.kv_report import STYLE, check, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "LEGEND", "RIGHT", "check", "groups", "lines", "remarks", "title", "to_dict", "write"]

COLUMNS = (
    "technique", "parameters", "loss", "over baseline", "AMU", "of it the model's", "PCU", "AL", "throughput", "AEC",
    "J/token", "MCR", "KV/token", "score", "front",
)  # fmt: skip
RIGHT = frozenset(range(1, len(COLUMNS)))
LEGEND = (
    "In brackets: rank in the group, 1 is best. parameters: those that are trained, where not all are. "
    "loss: nats per token of held-out windows, the mean over seeds; over "
    "baseline: paired by window and seed, ± one standard error. AMU: mean resident bytes of the process; of it the "
    "model's: without what was there before. PCU: mean use of all processors. AL: mean time of a step (training) or "
    "token. throughput: TT tokens, ST samples per second and parameter; IT tokens per second. AEC: mean watts. MCR: "
    "bytes ratio times exp(loss difference). KV/token: growth of real caches. score: weighed metrics between the "
    "group's worst (0) and best (1). *: no other row is as good in all weighed metrics."
)
OTHERS_WARNED = 0.1
"""Share of the machine that other processes may take before a remark is made."""


def groups(study: Study, weights: Mapping[str, float] | None = None) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by what they are ranked with."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in ranked(study.records, weights):
        found.setdefault(row.key, []).append(row)
    return found


def title(key: tuple[str, str, str], rows: Sequence[Row]) -> str:
    """Of a group's table: what it is, and where watts come from."""
    sources = {record.metrics.power_source for row in rows for record in row.records}
    return f"{key[0]}, {key[1]}, {key[2]} (energy: {', '.join(sorted(sources))})"


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """A group's table."""
    return [_line(row) for row in rows]


def _line(row: Row) -> list[str]:
    own = [record.metrics.amu_own_bytes for record in row.records]
    joules = [record.metrics.joules_per_token for record in row.records]
    return [
        row.technique,
        _parameters(row.records[0]),
        _cell(row, "quality", lambda value: f"{value:.4f}"),
        _gap(row),
        _cell(row, "amu", lambda value: format_bytes(int(value))),
        "-" if None in own else format_bytes(int(sum(filter(None, own)) / len(own))),
        _cell(row, "pcu", lambda value: f"{value:.0%}"),
        _cell(row, "al", format_seconds),
        _cell(row, "throughput", lambda value: f"{value:.3g}"),
        _cell(row, "aec", lambda value: f"{value:.2f} W"),
        f"{sum(joules) / len(joules):.2e}",
        _cell(row, "mcr", lambda value: f"{value:.2f}"),
        _figure(row.figure("kv_bytes_per_token_more")),
        "-" if row.score is None else f"{row.score:.2f}",
        "*" if row.front else "",
    ]


def _parameters(record: Record) -> str:
    trained = record.num_trainable
    whole = f"{record.num_parameters:,}"
    return whole if trained in (None, record.num_parameters) else f"{trained:,} of {whole}"


def _cell(row: Row, name: str, shown: Any) -> str:
    if name not in row.values:
        return "-"
    rank = f" ({row.ranks[name]})" if name in row.ranks else ""
    return f"{shown(row.values[name])}{rank}"


def _gap(row: Row) -> str:
    if row.gap is None:
        return "-"
    error = "" if row.gap.error is None else f" ±{row.gap.error:.4f}"
    return f"{row.gap.mean:+.4f}{error}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} B"


def remarks(study: Study, weights: Mapping[str, float] | None = None) -> list[str]:
    """Per group: who is best in what, whether losses can be told apart; what disturbed or was left out."""
    found = []
    for key, rows in groups(study, weights).items():
        label = f"{key[0]}, {key[2]}"
        firsts = [
            f"{metric.name} {', '.join(row.technique for row in rows if row.ranks[metric.name] == 1)}"
            for metric in METRICS
            if metric.name in rows[0].ranks
        ]
        if len(rows) > 1:
            found.append(f"{label}: first in {'; '.join(firsts)}")
            apart = [row.technique for row in rows if row.gap is not None and not (row.gap.above or row.gap.below)]
            if apart:
                found.append(f"{label}: losses of {', '.join(apart)} are not separable from {BASELINES[key[0]]}'s")
        disturbed = [row.technique for row in rows if (row.figure("others") or 0) > OTHERS_WARNED]
        if disturbed:
            most = max(row.figure("others") or 0 for row in rows)
            found.append(f"{label}: other processes took up to {most:.0%} of the machine: times mean little")
        if any(len(row.records) == 1 for row in rows) and key[0] == ATTENTION:
            found.append(f"{label}: one seed: differences between trainings are not in the errors")
    if study.records and all(record.metrics.power_source == "modelled" for record in study.records):
        found.append("watts and joules are modelled from declared operations and bytes: no counter can be read here")
    return found + [f"left out: {what}" for what in study.left_out]


def to_dict(study: Study, weights: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The JSON object, version first: ranked rows, and the records that they are made of."""
    rows = [
        {
            "axis": row.axis, "group": row.group, "stage": row.stage, "technique": row.technique,
            "seeds": [record.seed for record in row.records], "values": row.values, "errors": row.errors,
            "ranks": row.ranks, "gap": row.gap and asdict(row.gap), "score": row.score, "front": row.front,
        }
        for row in ranked(study.records, weights)
    ]  # fmt: skip
    return {
        "version": study.version, "machine": study.machine, "seconds": study.seconds, "sizes": study.sizes.to_dict(),
        "weights": dict(DEFAULT_WEIGHTS if weights is None else weights), "rows": rows,
        "remarks": remarks(study, weights), "left_out": list(study.left_out),
        "records": [record.to_dict() for record in study.records],
    }  # fmt: skip


def write(study: Study, folder: Path, weights: Mapping[str, float] | None = None) -> list[Path]:
    """study.json, study.html and one PNG a plot; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"study.json": (json.dumps(to_dict(study, weights), indent=1, allow_nan=False) + "\n").encode()}
    pages = {}
    for name, figure in _figures(study, weights):
        made[f"{name}.png"] = drawn(figure, "png")
        pages[name] = drawn(figure, "svg").decode()
    made["study.html"] = page(study, pages, weights).encode()
    for name, content in made.items():
        write_whole(folder / name, content)
    return [folder / name for name in made]


def _figures(study: Study, weights: Mapping[str, float] | None) -> Iterator[tuple[str, Figure]]:
    for key, rows in groups(study, weights).items():
        if len(rows) > 1 and all("quality" in row.values for row in rows):
            yield f"{key[0]}-{key[2]}", _front_plot(key, rows)
        yield f"{key[0]}-{key[2]}-series", _series_plot(key, rows)


def _front_plot(key: tuple[str, str, str], rows: Sequence[Row]) -> Figure:
    """Quality over memory and over latency, a point a technique."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(9, 4), layout="constrained")
    figure.suptitle(", ".join(key))
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("amu", "al"), strict=True):
        for number, row in enumerate(rows):
            x, y = row.values[name], math.exp(row.values["quality"])
            axes.scatter(x, y, color=f"C{number % 10}", marker="*" if row.front else "o", s=80 if row.front else 30)
            axes.annotate(row.technique, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
        axes.set_xlabel(BY_NAME[name].label)
        axes.grid(alpha=0.3)
        axes.margins(0.15)
        axes.tick_params(axis="x", labelrotation=20)
        if name == "amu":
            axes.set_ylabel("perplexity of held-out text")
            axes.xaxis.set_major_formatter(lambda value, place: format_bytes(int(value)))
        else:
            axes.xaxis.set_major_formatter(lambda value, place: format_seconds(max(value, 0)))
    return figure


def _series_plot(key: tuple[str, str, str], rows: Sequence[Row]) -> Figure:
    """Memory and processor use over time: the raw samples of each technique's first run."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(f"{', '.join(key)}: samples of the first runs")
    memory, use = figure.subplots(1, 2)
    for number, row in enumerate(rows):
        series, color = row.records[0].series, f"C{number % 10}"
        share = [at / series.seconds for at in series.times_s]
        memory.plot(share, series.memory_bytes, color=color, linewidth=1, label=row.technique)
        use.plot(share[1:], series.utilisation[1:], color=color, linewidth=1)
    memory.legend(fontsize=8, ncols=2)
    memory.yaxis.set_major_formatter(lambda value, place: format_bytes(int(value)))
    for axes, label in ((memory, "resident bytes"), (use, "use of the processors")):
        axes.set_xlabel("share of the stretch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    return figure


def page(study: Study, plots: Mapping[str, str], weights: Mapping[str, float] | None = None) -> str:
    """One page without outside references."""
    escape, sizes = html.escape, study.sizes
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    tables = ""
    for key, rows in groups(study, weights).items():
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines(rows))
        plot, samples = (plots.get(f"{key[0]}-{key[2]}{more}", "") for more in ("", "-series"))
        tables += (
            f"<h2>{escape(title(key, rows))}</h2>{plot}<div class=wide><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>{samples}"
        )
    told = "".join(f"<li>{escape(text)}</li>" for text in remarks(study, weights))
    facts = (
        f"{sizes.steps} steps of {sizes.batch} x {sizes.tokens} bytes of text, {sizes.seeds} seeds; decoding with "
        f"{sizes.context:,} tokens before; {study.machine}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>memwall study efficiency</title><style>{STYLE}</style></head><body>"
        f"<h1>Efficiency of techniques</h1><p>{escape(facts)}</p><h2>What it shows</h2><ul>{told}</ul>{tables}"
        f"<p>{escape(LEGEND)}</p>"
        f"<h2>As data</h2><details><summary>JSON, version {study.version}</summary>"
        f"<pre>{escape(json.dumps(to_dict(study, weights), indent=1))}</pre></details></body></html>"
    )
