"""`memwall eval`: what a weight format or a cache costs in quality over a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import (
    AsJson,
    BudgetOption,
    Debug,
    Memory,
    Model,
    Quiet,
    Threads,
    add_command,
    complete_kv,
    complete_weights,
)
from memwall.cli.printing import print_json, progress_bar
from memwall.cli.run import parse_budget


def register(app: typer.Typer) -> None:
    add_command(app, "eval", evaluate)


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Argument(help="Text file (UTF-8) to measure on.", metavar="TEXT")],
    *,
    memory: Memory = None,
    budget: BudgetOption = None,
    weights: Annotated[
        str,
        typer.Option(
            help="Format of the weights; float32 is the model itself.",
            metavar="FORMAT",
            autocompletion=complete_weights,
        ),
    ] = "float32",
    kv: Annotated[
        str | None,
        typer.Option(
            help="Decode token by token through this cache (default: one pass without a cache).",
            metavar="POLICY",
            autocompletion=complete_kv,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many tokens of the text.", min=2)] = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity over a text file, and the divergence from the float model.

    Divergence (kl_nats) is the mean per token of KL(float model || this one); top1_agreement is how often both like the
    same token best.
    """
    from memwall.engine.quality import evaluate as measure
    from memwall.models import model_directory

    with progress_bar("evaluating", quiet=quiet) as bar:
        result = measure(
            model_directory(model),
            text,
            weights=weights,
            kv=kv,
            limit_tokens=limit,
            threads=threads,
            budget=parse_budget(memory, budget),
            progress=bar.counted,
        )
    keys = ("perplexity", "kl_nats", "top1_agreement", "tokens", "bits_per_weight", "kv_bits_per_value")
    figures = {key: getattr(result, key) for key in keys}
    if json:
        print_json(figures)
        return
    for key, value in figures.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        typer.echo(f"{key:18} {shown}")
