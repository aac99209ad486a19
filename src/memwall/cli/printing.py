"""Tables and JSON for the terminal, and the progress bar of long jobs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporters:
    """One progress bar in the forms that rooms call: (done, whole), (stage, done, whole), (done, whole, what)."""

    counted: Callable[[int, int], None]
    staged: Callable[[str, int, int], None]
    labelled: Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """No progress: what rooms take as being left alone."""

    counted: None = None
    staged: None = None
    labelled: None = None


def print_json(value: Any) -> None:
    """One JSON value on standard output; numbers that JSON lacks (infinity) are an error rather than invalid text."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> str:
    """Columns as wide as their widest cell, those in `right` aligned to the right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]

    def render(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([render(lines[0]), "  ".join("-" * width for width in widths), *map(render, lines[1:])])


def note(text: str = "", *, quiet: bool = False) -> None:
    """A line for the person at the terminal, on standard error so that standard output holds results only."""
    if not quiet:
        typer.echo(text, err=True)


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Reporters | Silence]:
    """A bar on standard error while a terminal is there to show it."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield Silence()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    # rich itself honours NO_COLOR
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def show(done: int, whole: int, what: str) -> None:
            bar.update(task, completed=done, total=whole, description=what)

        yield Reporters(
            counted=lambda done, whole: show(done, whole, label),
            staged=lambda stage, done, whole: show(done, whole, f"{label}: {stage}"),
            labelled=lambda done, whole, what: show(done, whole, f"{label}: {what}"),
        )
