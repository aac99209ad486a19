"""How a cache study is shown: a table for the terminal, one self-contained HTML page, and its plots as PNG files."""

from __future__ import annotations

import html
import importlib.util
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memwall.errors import MissingDependency
from memwall.hardware.system import write_whole
from memwall.hardware.units import format_bytes
from memwall.studies import kv_advice
from memwall.studies.kv_study import RESIDENT, Row, Study, frontier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "method", "policy", "library", "text bytes", "KL nats", "perplexity", "recall bytes", "recall", "later",
    "talk bytes", "talk", "ms/token", "resident",
)  # fmt: skip
RIGHT = frozenset(range(3, len(COLUMNS)))
LEGEND = (
    "Bytes are those of the cache where a task fills it most, over those of float16. text: held-out text decoded "
    "through the cache (KL nats, perplexity). recall: the question at the prompt's end is answered; later: the other "
    "facts, asked afterwards. talk: questions about a conversation whose topics return. resident: growth of a process "
    "that holds several such caches, and that over what its ledger says. *: no other row has fewer bytes and less "
    "divergence on text."
)
ADVICE = (
    "By goal: the policy whose bytes, as really held in that task, meet the budget, and that answers most, or strays "
    "least (nats)."
)
PLOTS = {
    "text": ("kl_nats", "KL to the float32 cache, nats per token"),
    "recall": ("recall", "right answers, asked at the prompt's end"),
    "later": ("later", "right answers, asked in later turns"),
    "talk": ("talk", "right answers about a conversation"),
}
"""File's name -> the figure and its axis."""
_TASKS = {"later": "recall"}


def cells(row: Row) -> list[str]:
    """One line of the table."""
    resident, ledger = row.get(RESIDENT, "resident_bytes"), row.get(RESIDENT, "ledger_bytes")
    seconds = row.get("text", "step_seconds")
    return [
        row.method,
        row.policy or "-",
        row.library,
        _share(row, "text"),
        _number(row.get("text", "kl_nats"), ".4f"),
        _number(row.get("text", "perplexity"), ".2f"),
        _share(row, "recall"),
        *(_number(row.get("recall", name), ".0%") for name in ("recall", "later")),
        _share(row, "talk"),
        _number(row.get("talk", "talk"), ".0%"),
        _number(seconds and 1000 * seconds, ".1f"),
        "-" if not ledger else f"{format_bytes(resident)} ({resident / ledger:.3f})",
    ]


def _share(row: Row, task: str) -> str:
    """Bytes held in a task over those of float16."""
    return _number(kv_advice.share(row, task), ".3f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def lines(study: Study) -> list[list[str]]:
    """The table's lines; rows of the frontier are starred."""
    best = {id(row) for row in frontier(study.rows)}
    found = []
    for row in study.rows:
        if row.figures:
            line = cells(row)
            found.append([f"{line[0]} *" if id(row) in best else line[0], *line[1:]])
    return found


def remarks(study: Study) -> list[str]:
    """What was left out and why, and what else is to know of a row."""
    found = []
    for row in study.rows:
        name = row.policy or row.method if row.budget is None else f"{row.method} at {row.budget:g}"
        if row.skipped:
            found.append(f"skipped: {name}: {row.skipped}")
        elif row.note:
            found.append(f"{row.policy}: {row.note}")
    return list(dict.fromkeys(found))


def check() -> None:
    """Refuses plots that could not be drawn, before the minutes that measuring takes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("matplotlib", "plot")


def write(study: Study, folder: Path) -> list[Path]:
    """study.json, study.html and one PNG a plot; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: plot(study, name) for name in PLOTS if any(_points(study, name))}
    made = {"study.json": (json.dumps(study.to_dict(), indent=1, allow_nan=False) + "\n").encode()}
    pages = {}
    for name, figure in figures.items():
        made[f"{name}.png"] = drawn(figure, "png")
        pages[name] = drawn(figure, "svg").decode()
    made["study.html"] = page(study, pages).encode()
    for name, content in made.items():
        write_whole(folder / name, content)
    return [folder / name for name in made]


def _points(study: Study, name: str) -> Iterator[tuple[Row, float, float]]:
    """(row, bytes over float16's, figure) of one plot."""
    task, figure = _TASKS.get(name, name), PLOTS[name][0]
    for row in study.rows:
        value, held = row.get(task, figure), row.get(task, "kv_bytes")
        if value is not None and held:
            yield row, held / row.get(task, "float16_bytes"), value


Point = tuple[Row, float, float]


def best_of_each_size(points: list[Point], *, lower: bool) -> list[Point]:
    """Of (row, bytes, figure) those that are better than all smaller ones, the smallest first. lower: is better."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each[1], each[2] if lower else -each[2])):
        if not found or (point[2] < found[-1][2] if lower else point[2] > found[-1][2]):
            found.append(point)
    return found


def plot(study: Study, name: str) -> Figure:
    """One figure of quality against real bytes: a line a method, peers dashed, the best for each size named."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    methods: dict[str, list[tuple[float, float]]] = {}
    own: dict[str, bool] = {}
    for row, held, value in _points(study, name):
        methods.setdefault(row.method, []).append((held, value))
        own[row.method] = row.library == "memwall"
    markers = "osD^v<>pPX*hd"
    for number, (method, points) in enumerate(methods.items()):
        shares, values = zip(*sorted(points))
        axes.plot(
            shares, values, marker=markers[number % len(markers)], label=method, color=f"C{number % 10}",
            linestyle="-" if own[method] else "--", alpha=0.9,
        )  # fmt: skip
    best = best_of_each_size(list(_points(study, name)), lower=name == "text")
    axes.plot(
        [held for _, held, _ in best], [value for _, _, value in best], "k:", linewidth=1.2, label="best for its size"
    )
    for row, held, value in best:
        axes.annotate(row.policy, (held, value), (4, 5), textcoords="offset points", fontsize=7)
    axes.set_xlabel("bytes of the cache over those of float16")
    axes.set_ylabel(PLOTS[name][1])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda share, place: f"{share:g}")
    if name == "text":
        axes.set_yscale("symlog", linthresh=1e-3)  # exact caches lose nothing, which a logarithm does not show
        axes.set_ylim(0, 2 * max(value for _, _, value in _points(study, name)) + 1e-4)
    else:
        axes.set_ylim(-0.03, 1.03)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return figure


def drawn(figure: Figure, kind: str) -> bytes:
    """A figure as PNG, or as the svg element of a page."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "memwall", "svg.fonttype": "none"}):
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    drawn = buffer.getvalue()
    return drawn[drawn.index(b"<svg") :] if kind == "svg" else drawn


def page(study: Study, plots: dict[str, str]) -> str:
    """One page without outside references."""
    escape = html.escape
    said = "".join(f"<li>{escape(text)}</li>" for text in kv_advice.sentences(study))
    left = "".join(f"<li>{escape(text)}</li>" for text in remarks(study))
    drawn = "".join(f"<h2>{escape(PLOTS[name][1])}</h2>{svg}" for name, svg in plots.items())
    sizes = study.sizes
    facts = (
        f"{study.model}, weights {study.weights}; {sizes.windows} windows of {sizes.prompt_tokens} + "
        f"{sizes.decoded_tokens} tokens, {sizes.tries} prompts of {sizes.recall_tokens} tokens, {sizes.dialogues} "
        f"conversations; {study.machine}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>memwall study kv: {escape(study.model)}</title><style>{STYLE}</style></head><body>"
        f"<h1>KV caches of {escape(study.model)}</h1><h2>Which to take</h2><ul>{said}</ul>"
        f"{_table(kv_advice.COLUMNS, kv_advice.table(study))}<p>{escape(ADVICE)}</p>{drawn}"
        f"<h2>All cells</h2>{_table(COLUMNS, lines(study))}"
        f"<p>{escape(LEGEND)} {escape(facts)}</p>{f'<h2>Left out, and notes</h2><ul>{left}</ul>' if left else ''}"
        f"<h2>As data</h2><details><summary>JSON, version {study.version}</summary>"
        f"<pre>{escape(json.dumps(study.to_dict(), indent=1))}</pre></details></body></html>"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}"
    "td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}"
    ".wide{overflow:auto}svg{max-width:100%;height:auto;background:#fff}"
    "pre{overflow:auto;background:#f6f6f6;padding:1rem}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#333}"
    "pre{background:#222}}"
)
