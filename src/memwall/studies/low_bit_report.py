"""How the low-bit study is shown: a table for the terminal, one self-contained HTML page, its plots as PNG, JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.hardware.system import write_whole
from memwall.hardware.units import format_bytes
from memwall.studies.kv_report import STYLE, check, drawn
from memwall.studies.low_bit_llama3_study import BASE, Row, Study
from memwall.studies.ptq_statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "LEGEND", "RIGHT", "check", "frontier", "lines", "remarks", "to_dict", "write"]

COLUMNS = (
    "method", "as its paper counts", "true bits", "mean bits", "file", "perplexity", "loss over float", "recall",
    "choice", "seconds", "front",
)  # fmt: skip
RIGHT = frozenset(range(1, len(COLUMNS)))
LEGEND = (
    "true bits: every byte of the linear layers as stored, scales, masks, orders and padding included, per weight; "
    "mean bits: with embedding and head. perplexity of held-out windows; loss over float: mean difference in nats per "
    "token, ± one standard error over windows. recall: facts hidden in a prompt; choice: the true one of four "
    "continuations has the largest likelihood (chance: 25 %), or the answers of the file given. seconds: of "
    "compressing. *: no other row has fewer true bits and less loss."
)
PLOTS = {
    "perplexity": "perplexity of held-out text",
    "recall": "right answers about hidden facts",
    "choice": "right choices",
}
"""File's name and measure -> the axis."""


def loss(row: Row) -> float:
    """Mean loss in nats per token."""
    return float(np.mean(row.figures["losses"]))


def measure(row: Row, name: str) -> float | None:
    """A plotted figure of a row."""
    if name == "perplexity":
        return math.exp(loss(row))
    value: float | None = row.figures[name]
    return value


def gap(study: Study, row: Row) -> Estimate | None:
    """Difference of losses to the float model's, window by window."""
    base = next(each for each in study.rows if each.name == BASE)
    return estimate((np.array(row.figures["losses"]) - np.array(base.figures["losses"]))[:, None])


def frontier(study: Study) -> set[str]:
    """Names of the rows that no other row beats in true bits and loss at once."""
    found = set()
    for row in study.measured:
        mine = row.figures["bits_per_weight"], loss(row)
        others = [(each.figures["bits_per_weight"], loss(each)) for each in study.measured if each is not row]
        if not any(bits <= mine[0] and lost <= mine[1] and (bits, lost) != mine for bits, lost in others):
            found.add(row.name)
    return found


def lines(study: Study) -> list[list[str]]:
    """The table's lines; rows of the front are starred."""
    front = frontier(study)
    return [_line(study, row, row.name in front) for row in study.measured]


def _line(study: Study, row: Row, starred: bool) -> list[str]:
    figures, apart = row.figures, None if row.name == BASE else gap(study, row)
    shown = "-" if apart is None else f"{apart.mean:+.4f}"
    return [
        row.name,
        f"{row.nominal:g}",
        f"{figures['bits_per_weight']:.3f}",
        f"{figures['mean_bits']:.3f}",
        format_bytes(figures["file_bytes"]),
        f"{math.exp(loss(row)):.2f}",
        shown if apart is None or apart.error is None else f"{shown} ±{apart.error:.4f}",
        *("-" if figures[name] is None else f"{figures[name]:.0%}" for name in ("recall", "choice")),
        f"{figures['compress_seconds']:.1f}",
        "*" if starred else "",
    ]


def remarks(study: Study) -> list[str]:
    """Which row to take at each number of bits, and what was left out."""
    found = []
    for bits in sorted({math.ceil(row.figures["bits_per_weight"]) for row in study.measured if row.name != BASE}):
        fits = [row for row in study.measured if row.name != BASE and row.figures["bits_per_weight"] <= bits]
        best = min(fits, key=loss)
        apart = gap(study, best)
        lost = "" if apart is None else f", {apart.mean:+.4f} nats over float"
        found.append(f"within {bits} true bits: {best.name} ({best.figures['bits_per_weight']:.2f} bits{lost})")
    return found + [f"left out: {row.name}: {row.skipped}" for row in study.rows if row.skipped]


def to_dict(study: Study) -> dict[str, Any]:
    """The JSON object, version first. Losses are nats per token."""
    front = frontier(study)
    rows = []
    for row in study.rows:
        held = dict(row.figures)
        if held:
            apart = None if row.name == BASE else gap(study, row)
            held |= {"perplexity": math.exp(loss(row)), "loss": loss(row), "gap": apart and asdict(apart)}
            held["front"] = row.name in front
        rows.append(
            {"name": row.name, "method": row.method, "nominal_bits": row.nominal, "skipped": row.skipped, **held}
        )
    return {
        "version": study.version, "model": study.model, "fingerprint": study.fingerprint, "machine": study.machine,
        "seconds": study.seconds, "sizes": asdict(study.sizes), "rows": rows, "remarks": remarks(study),
    }  # fmt: skip


def write(study: Study, folder: Path) -> list[Path]:
    """study.json, study.html and one PNG a plot; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"study.json": (json.dumps(to_dict(study), indent=1, allow_nan=False) + "\n").encode()}
    pages = {}
    for name, figure in _figures(study):
        made[f"{name}.png"] = drawn(figure, "png")
        pages[name] = drawn(figure, "svg").decode()
    made["study.html"] = page(study, pages).encode()
    for name, content in made.items():
        write_whole(folder / name, content)
    return [folder / name for name in made]


def _figures(study: Study) -> Iterator[tuple[str, Figure]]:
    for name, label in PLOTS.items():
        rows = [row for row in study.measured if measure(row, name) is not None]
        if len(rows) > 1:
            yield name, _plot(study, rows, name, label)


def _plot(study: Study, rows: list[Row], name: str, label: str) -> Figure:
    """A figure over true bits: a line a method, the float model's level, and the front where loss is shown."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(row.method for row in rows if row.name != BASE))
    for number, method in enumerate(methods):
        mine = sorted((row.figures["bits_per_weight"], measure(row, name)) for row in rows if row.method == method)
        axes.plot(*zip(*mine, strict=True), marker="osD^v<>pPX"[number % 10], color=f"C{number % 10}", label=method,
                  linewidth=1)  # fmt: skip
    base = next((row for row in rows if row.name == BASE), None)
    if base is not None:
        axes.axhline(measure(base, name) or 0, color="gray", linestyle="--", linewidth=1, label=BASE)
    if name == "perplexity":
        front = frontier(study)
        points = sorted((r.figures["bits_per_weight"], measure(r, name)) for r in rows if r.name in front - {BASE})
        if points:
            axes.step(*zip(*points, strict=True), where="post", color="black", alpha=0.35, linewidth=4, label="front")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, place: f"{value:g}")
    axes.set_xlabel("true bits per weight of the linear layers")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    return figure


def page(study: Study, plots: dict[str, str]) -> str:
    """One page without outside references."""
    escape, sizes = html.escape, study.sizes
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines(study))
    told = "".join(f"<li>{escape(text)}</li>" for text in remarks(study))
    facts = (
        f"{study.model}: at most {sizes.calibration:,} calibration tokens in sequences of {sizes.sequence_tokens}; "
        f"{sizes.windows} windows of {sizes.window_tokens} tokens, {sizes.prompts} prompts with facts, "
        f"{sizes.questions} choices; {study.machine}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>memwall study low-bit: {escape(study.model)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Weight compression of {escape(study.model)}</h1><p>{escape(facts)}</p>"
        f"<h2>Which to take</h2><ul>{told}</ul>{''.join(plots.values())}"
        f"<h2>All rows</h2><div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p>{escape(LEGEND)}</p><h2>As data</h2><details><summary>JSON, version {study.version}</summary>"
        f"<pre>{escape(json.dumps(to_dict(study), indent=1))}</pre></details></body></html>"
    )
