"""`memwall evidence`: run the experiment behind a system's claims."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import print_json, progress_bar
from memwall.errors import InputError
from memwall.systems import System, all_systems, find_system


def register(app: typer.Typer) -> None:
    add_command(app, "evidence", evidence)


def _complete_slug(incomplete: str) -> list[str]:
    return [
        system.slug
        for system in all_systems()
        if system.slug.startswith(incomplete) and system.evidence_path is not None
    ]


def evidence(
    slug: Annotated[
        str,
        typer.Argument(
            help="A system of `memwall systems`, such as kivi.", metavar="SLUG", autocompletion=_complete_slug
        ),
    ],
    *,
    quick: Annotated[bool, typer.Option("--quick", help="A version that ends within a minute on two cores.")] = False,
    data: Annotated[Path | None, typer.Option(help="Run on other data of the same kind.", metavar="PATH")] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a system's experiment and print, per claim, what was measured, what was required, and pass or fail.

    Exit status 1 when a claim fails. Claims that need absent hardware are reported as not run, never as passed.
    """
    system = find_system(slug)
    experiment = load_experiment(system)
    from memwall.claims import run_evidence

    with progress_bar(f"evidence for {system.name}", quiet=quiet) as bar:
        report = run_evidence(slug, experiment, quick=quick, data=data, progress=bar.labelled)
    if json:
        print_json(report.to_dict())
    else:
        typer.echo(report.to_table())
    if report.failed:
        raise typer.Exit(1)


def load_experiment(system: System) -> ModuleType:
    """The module that holds a system's experiment, from the package or from the source checkout beside it."""
    path = system.evidence_path
    if path is None:
        with_evidence = [other.slug for other in all_systems() if other.evidence_path is not None]
        available = ", ".join(with_evidence) or "none so far"
        raise InputError(f"{system.slug} has no evidence yet (its state is {system.state}); available: {available}")
    name = f"memwall._evidence.{system.file_stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name, so it must be known before its code runs
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
