"""`memwall systems`: the table of published systems and how far each has come."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, add_command
from memwall.cli.printing import format_table, note, print_json
from memwall.systems import FAMILIES, STATES, select_systems


def register(app: typer.Typer) -> None:
    add_command(app, "systems", systems)


def systems(
    *,
    family: Annotated[
        str | None,
        typer.Option(help=f"Only this family: {', '.join(FAMILIES)}.", autocompletion=lambda: list(FAMILIES)),
    ] = None,
    state: Annotated[
        str | None, typer.Option(help=f"Only this state: {', '.join(STATES)}.", autocompletion=lambda: list(STATES))
    ] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the published systems: family, state (works, partial, missing) and home module.

    A system works when its mechanism is whole, a verb reaches it, and its evidence passes: see `memwall evidence`.
    """
    selected = select_systems(family=family, state=state)
    if json:
        print_json([system.to_json() for system in selected])
        return
    rows = [(system.slug, system.name, system.family, system.state, system.module or "-") for system in selected]
    typer.echo(format_table(("slug", "name", "family", "state", "module"), rows))
    counts = Counter(system.state for system in selected)
    note(f"\n{len(selected)} systems: " + ", ".join(f"{counts[state]} {state}" for state in STATES))
