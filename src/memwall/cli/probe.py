"""`memwall probe`: measure this machine and remember the figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import format_table, note, print_json, progress_bar

if TYPE_CHECKING:
    from memwall.hardware import ProbeReport
    from memwall.plan.kernel_rates import Progress


def register(app: typer.Typer) -> None:
    add_command(app, "probe", probe)


def probe(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and shorter measurements: two seconds.")] = False,
    disk: Annotated[
        Path | None, typer.Option(help="Measure the disk that holds this folder (default: the cache's).", metavar="DIR")
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure memory bandwidth, disk and arithmetic of this machine, and keep the figures for plans.

    Unless --quick is given, also what the kernels make of them with the usual weight formats: plans predict speed from
    these figures, and measure themselves what is missing.
    """
    from memwall.hardware import probe as measure

    with progress_bar("measuring", quiet=quiet) as bar:
        report = measure(quick=quick, disk_directory=disk, progress=bar.labelled)
        if not quick:
            report = _with_kernels(report, bar.labelled)
    if json:
        print_json(report.to_json())
        return
    rows = [(row.group, row.setting, row.figure, row.typical) for row in report.rows()]
    typer.echo(format_table(("", "what", "best", "typical"), rows, right=frozenset({2, 3})))
    for remark in report.notes:
        note(remark, quiet=quiet)


def _with_kernels(report: ProbeReport, progress: Progress | None) -> ProbeReport:
    from dataclasses import replace

    from memwall.hardware import store_rates
    from memwall.plan.choose import default_threads
    from memwall.plan.kernel_rates import measure_usual

    rates = measure_usual(threads=default_threads(), progress=progress)
    store_rates(rates)
    return replace(report, rates={**report.rates, **rates})
