"""The study of stored vectors: bytes of a vector against nDCG@10, as a table and a plot with the frontier."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memwall.errors import MissingDependency
from memwall.hardware.system import write_whole
from memwall.retrieve.embedding_storage import Point, frontier
from memwall.retrieve.ranking import points_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ["form", "bytes", "times smaller", "nDCG@10", "change", "frontier"]


def rows(points: Sequence[Point], d: int) -> list[list[str]]:
    """Fewest bytes first; `change` is against float32 where that was measured, `frontier` says who is not beaten."""
    best = {one.form for one in frontier(points)}
    whole = next((one.quality for one in points if one.form == "float32"), None)
    return [
        [
            one.form,
            f"{one.vector_bytes:g}",
            f"{4 * d / one.vector_bytes:.3g}",
            f"{one.quality:.4f}",
            "" if not whole else f"{one.quality / whole - 1:+.2%}",
            "*" if one.form in best else "",
        ]
        for one in sorted(points, key=lambda one: (one.vector_bytes, -one.quality))
    ]


def to_dict(points: Sequence[Point], told: dict[str, Any]) -> dict[str, Any]:
    """As `--json` prints it, and as `memwall index --points` reads it."""
    return {**told, "points": points_dict(points), "frontier": [one.form for one in frontier(points)]}


def check() -> None:
    """Refuses a plot that could not be drawn, before the minutes that measuring takes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("matplotlib", "plot")


def write(points: Sequence[Point], told: dict[str, Any], folder: Path) -> list[Path]:
    """study.json and frontier.png; each appears whole or not at all."""
    from memwall.studies.kv_report import drawn

    folder.mkdir(parents=True, exist_ok=True)
    made = {"study.json": (json.dumps(to_dict(points, told), indent=1, allow_nan=False) + "\n").encode(),
            "frontier.png": drawn(plot(points), "png")}  # fmt: skip
    for name, content in made.items():
        write_whole(folder / name, content)
    return [folder / name for name in made]


def plot(points: Sequence[Point]) -> Figure:
    """Bytes of a vector, in powers of two, against quality: a line for each reduction, the frontier in black."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[Point]] = {}
    for one in points:
        groups.setdefault(one.form.rpartition("+")[0] or "all dimensions", []).append(one)
    for name, group in groups.items():
        axes.plot([one.vector_bytes for one in group], [one.quality for one in group], "o", label=name, alpha=0.8)
    best = frontier(points)
    axes.plot([one.vector_bytes for one in best], [one.quality for one in best], "k-", linewidth=1, label="frontier")
    for one in best:
        place = (one.vector_bytes, one.quality)
        axes.annotate(one.form, place, (4, -9), textcoords="offset points", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, place: f"{size:g}")
    axes.set_xlabel("bytes of a vector")
    axes.set_ylabel("nDCG@10")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
