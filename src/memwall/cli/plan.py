"""`memwall plan`: what fits a budget, what it costs in quality, and why it was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.command import KV, AsJson, BudgetOption, Debug, Memory, Model, Quiet, Threads, Weights, add_command
from memwall.cli.printing import format_table, note, progress_bar
from memwall.cli.run import parse_budget, parse_context

if TYPE_CHECKING:
    from memwall.plan import Option, Plan


def register(app: typer.Typer) -> None:
    add_command(app, "plan", plan)


def plan(
    model: Model,
    *,
    memory: Memory = None,
    budget: BudgetOption = None,
    weights: Weights = "auto",
    kv: KV = "auto",
    context: Annotated[
        str | None, typer.Option(help="Tokens the cache must hold, such as 32k (default: the most that is sensible).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    max_kl: Annotated[
        float | None, typer.Option(help="Most divergence from the float model accepted, in nats per token.")
    ] = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Read headers only; do not measure quality on held-out text.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a report with a plot of quality against bytes.", dir_okay=False)
    ] = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what fits: bytes per owner and tier, predicted speed, measured quality, and the runners-up.

    With --weights and --kv given it answers for exactly these settings. Exit status 1 when nothing fits.
    """
    from memwall.models import model_directory
    from memwall.plan import make_plan, write_html

    with progress_bar("measuring quality", quiet=quiet) as progress:
        made = make_plan(
            model_directory(model),
            budget=parse_budget(memory, budget),
            weights=weights,
            kv=kv,
            context=parse_context(context),
            batch=batch,
            threads=threads,
            max_kl=max_kl,
            measure=not no_measure,
            progress=progress,
        )
    if html is not None:
        write_html(made, html)
        note(f"wrote {html}", quiet=quiet)
    typer.echo(made.to_json(indent=2) if json else describe(made))
    if not made.fits:
        raise typer.Exit(1)


def describe(plan: Plan) -> str:
    """The plan for a person: rows, totals, speed, quality, reasons, runners-up."""
    from memwall.hardware.units import format_bytes

    rows = [(row.owner, row.tier, format_bytes(row.nbytes)) for row in plan.rows]
    for tier, peak in plan.peak_bytes.items():
        cap = plan.budget.get(tier)
        rows.append(("peak", tier, format_bytes(peak) + (f" of {format_bytes(cap)}" if cap else "")))
    choice = plan.choice
    lines = [
        f"{choice.weights} weights ({plan.bits_per_weight:.2f} bits each), {choice.kv} cache "
        f"({plan.kv_bits_per_value:.2f} bits per number), context {choice.context:,}, batch {choice.batch}",
        "",
        format_table(("owner", "tier", "bytes"), rows, right=frozenset({2})),
        "",
    ]
    if plan.decode_tokens_per_s is not None:
        lines.append(f"predicted decode speed {plan.decode_tokens_per_s:.1f} tokens/s on {plan.machine}")
    if plan.quality is not None:
        quality = plan.quality
        lines.append(
            f"measured on {quality.measured_on} ({quality.tokens:,} tokens): divergence from the float model "
            f"{quality.kl_nats:.4f} nats per token, perplexity {quality.perplexity:.2f}, "
            f"same first choice {quality.top1_agreement:.1%}"
        )
    lines.append(plan.explanation)
    if plan.runners_up:
        lines += ["", "runners-up", _options_table(plan.runners_up)]
    return "\n".join(lines)


def _options_table(options: tuple[Option, ...]) -> str:
    from memwall.hardware.units import format_bytes

    rows = [
        (
            option.choice.weights,
            option.choice.kv,
            f"{option.choice.context:,}",
            ", ".join(f"{tier} {format_bytes(peak)}" for tier, peak in option.peak_bytes.items()),
            "-" if option.decode_tokens_per_s is None else f"{option.decode_tokens_per_s:.1f}",
            "-" if option.quality is None else f"{option.quality.kl_nats:.4f}",
            option.note,
        )
        for option in options
    ]
    headers = ("weights", "cache", "context", "peak", "tokens/s", "nats", "why not")
    return format_table(headers, rows, right=frozenset({2, 4, 5}))
