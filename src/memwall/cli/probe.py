"""`memwall probe`: measure this machine and remember the figures."""

from __future__ import annotations

from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import print_json, progress_bar


def register(app: typer.Typer) -> None:
    add_command(app, "probe", probe)


def probe(
    *,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again even when figures are cached.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and shorter measurements.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure memory bandwidth, disk and arithmetic of this machine; plans use the cached figures."""
    from memwall.hardware import probe as measure

    with progress_bar("measuring this machine", quiet=quiet) as progress:
        report = measure(refresh=refresh, quick=quick, progress=progress)
    if json:
        print_json(report.to_dict())
    else:
        typer.echo(report.describe())
