"""The command line: one file per verb, and `main` which turns errors into exit statuses.

Every verb imports what it needs when it is called, so that `memwall --help` starts without NumPy. Verbs are thin: they
parse, call a room, and print. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

from typing import Annotated

import typer

from memwall import __version__
from memwall.cli import (
    batch,
    bench,
    compress,
    convert,
    eval,
    evidence,
    fit,
    hdl,
    index,
    kernel,
    map,
    plan,
    probe,
    run,
    search,
    serve,
    simulate,
    stream,
    study,
    systems,
    tenants,
    tune,
)

app = typer.Typer(
    name="memwall",
    help="Run, serve, compress and plan AI models inside the memory you have, and see where every byte went.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 it does not fit or a claim fails, 2 bad input, 130 interrupted. "
    "GB = 10^9, GiB = 2^30.",
    # plain help: importing rich would double the time to first letter
    rich_markup_mode=None,
)

VERBS = (
    run, serve, batch, plan, compress, convert, tune, fit, stream, eval, index, search, tenants, map, study, simulate,
    hdl, kernel, probe, bench, systems, evidence,
)  # fmt: skip
for verb in VERBS:
    verb.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memwall {__version__}")
        raise typer.Exit


@app.callback()
def memwall(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Run, serve, compress and plan AI models inside the memory you have, and see where every byte went."""


def main() -> None:
    """Entry point of the `memwall` command."""
    app(prog_name="memwall")
