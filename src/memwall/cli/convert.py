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
    """
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
