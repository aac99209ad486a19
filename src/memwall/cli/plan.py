"""`memwall plan`: what fits a budget, what it costs in quality, and why it was chosen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.command import KV, AsJson, BudgetOption, Debug, Memory, Model, Quiet, Threads, Weights, add_command
from memwall.cli.printing import note, progress_bar
from memwall.cli.run import parse_budget, parse_context
from memwall.cli.w4a4kv4 import settled
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.plan import Plan

PIPE_WIDTH = 200


def register(app: typer.Typer) -> None:
    add_command(app, "plan", plan)


def _complete_machine(incomplete: str) -> list[str]:
    from memwall.hardware import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


Context = Annotated[
    str | None, typer.Option(help="Tokens the cache must hold, such as 32k (default: the most that is sensible).")
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the context that come as the prompt, which some caches prune (default: up to 512).", min=1
    ),
]
NoMeasure = Annotated[
    bool, typer.Option("--no-measure", help="Read headers only; do not measure quality on held-out text.")
]
SearchKv = Annotated[
    bool,
    typer.Option(
        "--search-kv",
        help="Consider caches that prune, thin and rebuild too, alone and joined, and those fitted to the model; "
        "measures what may win, which takes minutes the first time.",
    ),
]
MachineName = Annotated[
    str | None,
    typer.Option(
        help="Plan for another machine: a preset's name or a TOML file (default: this one).",
        metavar="MACHINE",
        autocompletion=_complete_machine,
    ),
]


def plan(
    model: Model,
    *,
    memory: Memory = None,
    budget: BudgetOption = None,
    weights: Weights = "auto",
    kv: KV = "auto",
    context: Context = None,
    prompt_tokens: PromptTokens = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    max_kl: Annotated[
        float | None, typer.Option(help="Most divergence from the float model accepted, in nats per token.")
    ] = None,
    no_measure: NoMeasure = False,
    search_kv: SearchKv = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a report with a plot of quality against bytes.", dir_okay=False)
    ] = None,
    machine: MachineName = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what fits: bytes per owner and tier, predicted speed, measured quality, and the runners-up.

    With --weights and --kv given it answers for exactly these settings. Exit status 1 when nothing fits.
    """
    from memwall.models import model_directory
    from memwall.plan import check_html, make_plan, write_html

    if html is not None:
        check_html(html)
    tokens = _checked_context(context, prompt_tokens)
    weights, cache = settled(model, weights, kv)
    with progress_bar("measuring caches" if search_kv else "measuring quality", quiet=quiet) as bar:
        made = make_plan(
            model_directory(model),
            budget=parse_budget(memory, budget),
            weights=weights,
            kv=cache or kv,
            context=tokens,
            prompt_tokens=prompt_tokens,
            batch=batch,
            threads=threads,
            machine=machine,
            max_kl=max_kl,
            measure=not no_measure,
            measure_all=html is not None and not no_measure,
            search_kv=search_kv,
            profile=True,
            config_only=True,
            progress=bar.counted, tell=_told(quiet=quiet),
        )  # fmt: skip
    if html is not None:
        write_html(made, html)
        note(f"wrote {html}", quiet=quiet)
    if json:
        typer.echo(made.to_json(indent=2))
    else:
        _show(made)
    if not made.fits:
        raise typer.Exit(1)


def _checked_context(context: str | None, prompt_tokens: int | None) -> int | None:
    tokens = parse_context(context)
    if tokens is not None and prompt_tokens is not None and prompt_tokens > tokens:
        raise InputError(f"--prompt-tokens {prompt_tokens} is more than the --context of {tokens} that it is a part of")
    return tokens


def _told(*, quiet: bool) -> Callable[[str], None] | None:
    """Where no bar is shown, a line before each measurement: the first one of a large model takes minutes."""
    if sys.stderr.isatty():
        return None
    return lambda what: note(f"memwall: measuring {what} (--no-measure leaves it out)", quiet=quiet)


def _show(plan: Plan) -> None:
    from rich.console import Console

    from memwall.plan.report import table

    # in a pipe or a file lines are not folded
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    with console.capture() as shown:  # rich by itself ends with status 1 where a pipe is closed
        console.print(table(plan, console.width))
    typer.echo(shown.get(), nl=False)
