"""`memwall tune`: fine-tune an adapter over a packed base, inside a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Memory, Model, Quiet, Threads, add_command, complete_weights
from memwall.cli.compress import parse_settings
from memwall.cli.printing import note, print_json, progress_bar
from memwall.cli.run import parse_budget

METHODS = ("qlora", "ir-qlora", "int2-1", "lora", "lora-plus", "rslora", "dora", "pissa", "freeze", "full")


def register(app: typer.Typer) -> None:
    add_command(app, "tune", tune)


def tune(
    model: Model,
    data: Annotated[Path, typer.Argument(help="Text file (UTF-8) to learn from.", metavar="DATA")],
    out: Annotated[
        Path,
        typer.Argument(help="Directory of the adapter to write; it must not exist yet (see --force).", metavar="OUT"),
    ],
    *,
    method: Annotated[
        str,
        typer.Option(
            help="qlora (adapters over 4-bit NormalFloat with scales quantized twice), ir-qlora (the same with an "
            "elastic connection), int2-1 (over integers; with --teacher a correction of what they lost), lora, "
            "lora-plus, rslora, dora or pissa (adapters over any base), freeze (the last layers themselves) or full "
            "(all weights).",
            metavar="METHOD",
            autocompletion=lambda: list(METHODS),
        ),
    ] = "qlora",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Form of the base, as `memwall run` takes it (default: a compressed MODEL's own, else the method's).",
            metavar="FORMAT",
            autocompletion=complete_weights,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="The float model whose answers are learned, to undo what MODEL's form lost."),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option("--lora", help="An adapter to go on from (a directory in PEFT's form).")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the method, such as rank=16 or steps=200; may be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    memory: Memory = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing adapter, and forget an unfinished run.")
    ] = False,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune MODEL on the text DATA and write an adapter in PEFT's form to OUT, for `memwall run MODEL --lora OUT`.

    The base stays packed and as it is; only the adapter is trained. The methods freeze and full train weights of the
    model itself and write a model to OUT. A run that was interrupted goes on after the last
    saved step when it is called again with the same settings.
    """
    from memwall.compress.tune import tune_model
    from memwall.models import model_directory

    if threads is not None:
        from memwall import kernels

        kernels.set_num_threads(threads)
    budget = parse_budget(memory, None)
    with progress_bar("tuning", quiet=quiet) as bar:
        report = tune_model(
            model_directory(model),
            data,
            out,
            method=method,
            options=parse_settings(setting or []),
            weights=weights,
            teacher=None if teacher is None else model_directory(teacher),
            lora=lora,
            budget_bytes=budget.ram if budget is not None else None,
            progress=bar.labelled,
            force=force,
        )
    if json:
        print_json(report.to_dict())
        return
    from memwall.hardware.units import format_bytes

    losses = [each["held_out"] for each in report.history if "held_out" in each]
    moved = f"held-out loss {losses[0]:.4f} to {losses[-1]:.4f}, " if losses else ""
    size, peak = format_bytes(report.adapter_bytes), format_bytes(report.peak_resident_bytes)
    what = "adapter" if report.targets else "model"
    steps = f"{report.steps} steps" + (f" (from {report.resumed_from})" if report.resumed_from else "")
    note(f"{out}: {steps}, {moved}{what} {size}, {report.seconds:.0f} s, peak resident {peak}", quiet=quiet)
    note(f"run it with: {report.run_with}", quiet=quiet)
