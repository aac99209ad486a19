"""`memwall compress`: write a compressed model that loads again bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Memory, Model, Quiet, Threads, add_command
from memwall.cli.printing import note, print_json, progress_bar
from memwall.cli.run import parse_budget
from memwall.errors import InputError

METHOD_NAMES = (
    "gptq", "rtn", "awq", "smoothquant", "spqr", "vptq", "edkm", "billm", "pb-llm", "db-llm", "ir-qlora", "quip",
    "bitstack", "sparsegpt", "accllm", "comet", "xr-npe", "quamba2",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    add_command(app, "compress", compress)


def compress(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="Directory to write; it must not exist yet (see --force).", metavar="OUT")
    ],
    *,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Mean bits per weight over the matrices, scales included, such as 3.5; or one format, such as int4; "
            "for spqr, quip and edkm the bits of a code, such as 3; for pb-llm as its paper counts, 1.7 or 2; for vptq "
            "the most bits of any matrix, codebooks included. Default: 4.25; awq int4-g128-asym, smoothquant int8, "
            "spqr 4, vptq 2.25, edkm 3, billm 1.1, pb-llm 1.7, db-llm and quip 2, sparsegpt 4 of each weight that "
            "stays (3.13 in all), accllm 2 of each (2.19), comet comet-g128, xr-npe the bytes of 18 % of the layers in "
            "8 bits, quamba2 w4a16 (it makes w8a8, w4a8, w4a16 and w4ax).",
            metavar="BITS",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="What all files of OUT may take together, such as 1.31GB, in place of --bits: hit within 1 % and "
            "under, by widths mixed over the matrices or, with bitstack, by the most valuable blocks.",
            metavar="SIZE",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="gptq (compensated rounding), rtn (round to nearest), awq (scaled and clipped by activations), "
            "smoothquant (activations' outliers moved to weights), spqr (two-level scales, sparse outliers), "
            "vptq (codebooks of vectors, for about 2 bits), edkm (a palette per matrix, trained; needs torch), "
            "billm (signs, salient columns twice), pb-llm (signs, "
            "salient weights in 8 bits), db-llm (two binary matrices), ir-qlora (NF4 of shifted blocks, for tuning), "
            "quip (turned at random, one scale), bitstack (blocks of signs and low rank, of which any number can be "
            "loaded), sparsegpt (two of every four weights pruned, the others rounded), accllm (the same at 2 "
            "bits, trained), comet (4-bit weights, activations in 4 and 8 bits: W4A4KV4), xr-npe (4-bit "
            "floats, 4 and 8-bit posits by layer; needs torch) or, for Mamba, quamba2 (activations and "
            "state in 8 bits too).",
            metavar="METHOD",
            autocompletion=lambda: list(METHOD_NAMES),
        ),
    ] = "gptq",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the method, such as outlier_threshold=0.1; may be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file to calibrate on (default: the bundled text).")
    ] = None,
    group: Annotated[int, typer.Option(help="Columns that share a scale: 32, 64 or 128.")] = 64,
    jobs: Annotated[
        int,
        typer.Option(
            help="Matrices to compress at once, where memory allows; worth it for methods whose matrices take long "
            "(vptq, spqr, billm, quip). The result does not depend on it. bitstack and quamba2 take one at a time.",
            min=1,
            max=256,
        ),
    ] = 1,
    memory: Memory = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing compressed model, and forget an unfinished run.")
    ] = False,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into the new directory OUT: safetensors plus a manifest with checksums.

    A run that was interrupted goes on where it stopped when it is called again with the same settings.
    """
    from memwall.compress.job_plan import Tuning
    from memwall.compress.model import compress_model
    from memwall.hardware.units import format_bytes, parse_bytes
    from memwall.models import model_directory

    if bits is not None and size is not None:
        raise InputError(f"--bits {bits} and --size {size} are both given: leave one of them out")
    if threads is not None:
        from memwall import kernels

        kernels.set_num_threads(threads)
    budget = parse_budget(memory, None)
    with progress_bar("compressing", quiet=quiet) as bar:
        report = compress_model(
            model_directory(model),
            out,
            bits=None if bits is None else parse_bits(bits),
            size_bytes=None if size is None else parse_bytes(size),
            method=method,
            options=parse_settings(setting or []),
            calibration_text=calibration,
            group=group,
            budget_bytes=budget.ram if budget is not None else None,
            progress=bar.staged,
            force=force,
            tuning=Tuning(jobs=jobs),
        )
    if json:
        print_json(report.to_dict())
        return
    file, was, peak = map(format_bytes, (report.file_bytes, report.source_bytes, report.peak_resident_bytes))
    sizes = f"{report.bits_per_weight:.2f} bits per weight, {file} (was {was})"
    asked = "" if size is None else f", {report.folder_bytes:,} bytes in all of {size} asked"
    note(f"{out}: {sizes}{asked}, {report.seconds:.0f} s, peak resident {peak}", quiet=quiet)


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs; dashes in names count as underscores."""
    parts = [pair.partition("=") for pair in pairs]
    for name, equals, value in parts:
        if not (name and equals and value):
            raise InputError(f"--set {name}{equals}{value}: write NAME=VALUE, such as outlier_threshold=0.1")
    return {name.replace("-", "_"): value for name, _, value in parts}


def parse_bits(text: str) -> float | str:
    """A mean number of bits, or a format as it stands."""
    try:
        return float(text)
    except ValueError:
        return text
