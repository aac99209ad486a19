"""`memwall convert`: a GGUF file, or a folder in GPTQ's or AWQ's form, as a compressed model of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import note, print_json, progress_bar


def register(app: typer.Typer) -> None:
    add_command(app, "convert", convert)


def convert(
    source: Annotated[
        Path, typer.Argument(help="A GGUF file, or a model folder in GPTQ's or AWQ's form.", metavar="SOURCE")
    ],
    out: Annotated[
        Path, typer.Argument(help="Directory to write; it must not exist yet (see --force).", metavar="OUT")
    ],
    *,
    stream_neurons: Annotated[
        bool,
        typer.Option(
            "--stream-neurons",
            help="Of a model with a ReLU feed-forward: put its neurons in a file of which `memwall run` reads those "
            "that a token wakes, and train what predicts them.",
        ),
    ] = False,
    rank: Annotated[int, typer.Option(help="With --stream-neurons: of the predictors.", min=1)] = 64,
    missed: Annotated[
        float, typer.Option(help="With --stream-neurons: share of active neurons that predictors may miss.")
    ] = 0.03,
    text: Annotated[
        Path | None,
        typer.Option(help="With --stream-neurons: what predictors are trained on (default: bundled).", metavar="FILE"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with a tokenizer.json, where the source's own cannot be read.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing compressed model, and forget an unfinished run.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a model that others have quantized: its codes are carried over, not rounded again, where a form fits.

    GGUF: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K; Q6_K becomes 8-bit integers. GPTQ: 2, 3, 4 and 8
    bits. AWQ: 4 bits.

    With --stream-neurons SOURCE is a folder in float16, bfloat16 or float32, and OUT a model of the same weights.
    """
    if stream_neurons:
        _stream_neurons(source, out, rank=rank, missed=missed, text=text, json=json, quiet=quiet)
        return
    from memwall.compress.convert import convert as work

    with progress_bar("converting", quiet=quiet) as bar:
        report = work(source, out, tokenizer=tokenizer, progress=bar.counted, force=force)
    if json:
        print_json(report.to_dict())
        return
    from memwall.hardware.units import format_bytes

    file, was, peak = map(format_bytes, (report.file_bytes, report.source_bytes, report.peak_resident_bytes))
    anew = f"{100 * report.rounded_weights / report.weights:.1f} % of the weights rounded anew"
    sizes = f"{report.bits_per_weight:.2f} bits per weight, {file} (was {was}), {anew}"
    note(f"{out}: {sizes}, {report.seconds:.1f} s, peak resident {peak}", quiet=quiet)


def _stream_neurons(
    source: Path, out: Path, *, rank: int, missed: float, text: Path | None, json: bool, quiet: bool
) -> None:
    from memwall.engine.neuron_file import make_flash_model
    from memwall.engine.neuron_predictors import Training
    from memwall.hardware.units import format_bytes
    from memwall.models import model_directory

    with progress_bar("converting", quiet=quiet) as bar:
        report = make_flash_model(
            model_directory(source), out, text=text, training=Training(rank=rank, missed=missed), progress=bar.labelled
        )
    judged = [
        {name: getattr(each, name) for name in ("active", "predicted", "recall", "precision", "missed_weight")}
        for each in report.judged
    ]
    if json:
        sizes = ("neuron_bytes", "resident_bytes", "predictor_bytes", "num_tokens")
        held = [list(rows) for rows in report.layout.held]
        print_json({**{name: getattr(report, name) for name in sizes}, "layers": judged, "held_rows": held})
        return

    def mean(name: str) -> float:
        return sum(each[name] for each in judged) / len(judged)

    note(
        f"{out}: {format_bytes(report.neuron_bytes)} of neurons to stream, {format_bytes(report.resident_bytes)} that "
        f"stay ({format_bytes(report.predictor_bytes)} of them predictors); {mean('active'):.1%} of the neurons are "
        f"active, {mean('predicted'):.1%} predicted, {mean('recall'):.1%} of the active ones found",
        quiet=quiet,
    )
