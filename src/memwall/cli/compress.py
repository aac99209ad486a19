"""`memwall compress`: write a compressed model that loads again bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Model, Quiet, Threads, add_command
from memwall.cli.printing import note, print_json, progress_bar


def register(app: typer.Typer) -> None:
    add_command(app, "compress", compress)


def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; it must not exist yet.", metavar="OUT")],
    *,
    bits: Annotated[
        float, typer.Option(help="Mean bits per weight over the matrices, scales included; 2.5 to 8.")
    ] = 4.25,
    method: Annotated[
        str, typer.Option(help="gptq (compensated rounding) or rtn (round to nearest).", metavar="METHOD")
    ] = "gptq",
    calibration: Annotated[
        Path | None, typer.Option(help="Text file to calibrate on (default: the bundled text).", dir_okay=False)
    ] = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into the new directory OUT: safetensors plus a manifest with checksums.

    A run that was interrupted goes on where it stopped when it is called again with the same settings.
    """
    from memwall.compress import compress_model
    from memwall.hardware.units import format_bytes
    from memwall.models import model_directory

    with progress_bar("compressing", quiet=quiet) as progress:
        result = compress_model(
            model_directory(model),
            out,
            bits=bits,
            method=method,
            calibration=calibration,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(result.to_dict())
        return
    note(
        f"{out}: {result.bits_per_weight:.2f} bits per weight, {format_bytes(result.nbytes)} "
        f"(was {format_bytes(result.source_bytes)}), {result.seconds:.0f} s",
        quiet=quiet,
    )
