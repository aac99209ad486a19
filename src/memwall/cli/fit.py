"""`memwall fit`: let a cache policy learn what it needs of a model, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Model, Quiet, Threads, add_command, complete_kv
from memwall.cli.printing import note, print_json, progress_bar


def register(app: typer.Typer) -> None:
    add_command(app, "fit", fit)


def complete_learner(incomplete: str) -> list[str]:
    """Shell completion of POLICY: cache policies, the codec of saved caches that is fitted, reuse of chunks."""
    return [*complete_kv(incomplete), *(name for name in ("cachegen", "cache-craft") if name.startswith(incomplete))]


def fit(
    model: Model,
    policy: Annotated[
        str,
        typer.Argument(
            help="What learns from the model: a cache policy as --kv takes it, cachegen or cache-craft.",
            metavar="POLICY",
            autocompletion=complete_learner,
        ),
    ],
    *,
    text: Annotated[
        Path | None, typer.Option(help="Text file (UTF-8) to learn on (default: the bundled one).", metavar="FILE")
    ] = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit a cache policy that learns to MODEL; every later run of that model with it finds the result."""
    from memwall.compress.calibration import read_text
    from memwall.kv.fitted import fit as learn
    from memwall.models import model_directory

    words = read_text(text) if text is not None else None
    with progress_bar("fitting", quiet=quiet) as bar:
        paths = learn(policy, model_directory(model), text=words, threads=threads, progress=bar.staged)
    if json:
        print_json({"policy": policy, "files": [str(path) for path in paths]})
        return
    for path in paths:
        note(f"{path}: {path.stat().st_size:,} bytes", quiet=quiet)
