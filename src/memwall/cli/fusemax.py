"""`memwall simulate fusemax`: attention on an accelerator with two arrays, five ways; `memwall simulate cascade`:
passes, buffers and work of a kernel that is written as a cascade of Einsums.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, complete_model
from memwall.cli.printing import format_table, note, print_json
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.simulate.einsum_cascade import Cascade
    from memwall.simulate.fusemax import Accelerator
    from memwall.simulate.fusemax_workloads import Workload

MOST_CASCADE_BYTES = 1 << 16


def fusemax(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models: BERT, TrXL, T5, XLM, directories of models, or `demo` (default: the published four).",
            metavar="MODEL",
            autocompletion=complete_model,
        ),
    ] = None,
    *,
    tokens: Annotated[
        str, typer.Option(help="Lengths between commas, such as 1k,64k; as many queries as keys.")
    ] = "1k,4k,16k,64k,256k,1M",
    designs: Annotated[
        str, typer.Option(help="Designs between commas: unfused, flat, cascade, architecture, binding (FuseMax).")
    ] = "unfused,flat,cascade,architecture,binding",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1, max=65536)] = 64,
    array: Annotated[int, typer.Option(help="Rows and columns of the matrix array.", min=1, max=65536)] = 256,
    buffer: Annotated[
        str | None, typer.Option(help="Buffer of every design (default: 16 MiB of those that need no more, else 32).")
    ] = None,
    dram: Annotated[str, typer.Option(help="Rate of DRAM.")] = "400GiB/s",
    clock: Annotated[float, typer.Option(help="Clock in MHz.", min=1, max=100_000)] = 940.0,
    means: Annotated[bool, typer.Option("--means", help="Print the means over models and lengths alone.")] = False,
    schedule: Annotated[
        bool, typer.Option("--schedule", help="Print what both arrays do for a tile, of the first model and length.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw how both arrays are used, of the first model and length (SVG).", metavar="FILE"),
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Price attention on an accelerator with a matrix and a vector array: time, use, traffic, energy, area.

    The one-pass cascade on arrays that share softmax's work (FuseMax) beside FLAT, unfused attention, and the steps
    between them. Speed-ups and ratios are over FLAT; `layer` adds the products around attention.
    """
    from memwall.hardware.system import write_whole
    from memwall.hardware.units import MB, parse_bytes, parse_count, parse_rate
    from memwall.simulate import fusemax_report as reports
    from memwall.simulate.fusemax import DESIGNS, Accelerator
    from memwall.simulate.fusemax_workloads import price_workload
    from memwall.simulate.nano_report import check_picture

    if plot is not None:
        check_picture(plot)
    machine = Accelerator(
        array=array, clock_hz=clock * MB, dram_bytes_per_s=parse_rate(dram),
        buffer_bytes=None if buffer is None else parse_bytes(buffer),
    )  # fmt: skip
    chosen = [name.strip() for name in designs.split(",")]
    unknown = [name for name in chosen if name not in DESIGNS]
    if unknown:
        raise InputError(f"--designs {unknown[0]}: they are {', '.join(DESIGNS)}")
    lengths = [parse_count(text) for text in tokens.split(",")]
    workloads = [_workload(name, batch) for name in models or ("BERT", "TrXL", "T5", "XLM")]
    told = reports.report(workloads, lengths, chosen, machine)
    runs = [price_workload(name, workloads[0], lengths[0], machine) for name in chosen]
    if schedule or json:
        told["schedules"] = {run.design.name: reports.tile_schedule(run) for run in runs}
    if plot is not None:
        title = f"{workloads[0].name}, {lengths[0]:,} tokens: a tile of {array} queries x {array} keys"
        write_whole(plot, reports.picture(runs, title))
        note(f"memwall: wrote {plot}", quiet=quiet)
    if json:
        print_json({"machine": _machine(machine), **told})
        return
    if not means and not schedule:
        rows = [reports.cells(one) for one in told["points"]]
        typer.echo(format_table(reports.COLUMNS, rows, right=frozenset((1, 3, *range(5, 14)))) + "\n")
    if schedule:
        for run in runs:
            typer.echo(f"{run.design.name}: {run.design.what}")
            typer.echo(format_table(reports.SCHEDULE_COLUMNS, reports.schedule_cells(run), right=frozenset((1, 4))))
            typer.echo("")
        return
    rows = [reports.mean_cells(one) for one in told["means"]]
    typer.echo(format_table(reports.MEAN_COLUMNS, rows, right=frozenset(range(1, 6))))


def _machine(machine: Accelerator) -> dict[str, Any]:
    return {"array": machine.array, "clock_hz": machine.clock_hz, "dram_bytes_per_s": machine.dram_bytes_per_s,
            "buffer_bytes": machine.buffer_bytes, "word_bytes": machine.word_bytes}  # fmt: skip


def _workload(name: str, batch: int) -> Workload:
    from dataclasses import replace

    from memwall.models import model_directory
    from memwall.models.config import ModelConfig
    from memwall.simulate.fusemax_workloads import PUBLISHED, Workload

    published = {each.lower(): workload for each, workload in PUBLISHED.items()}
    if name.lower() in published and not Path(name).is_dir():
        return replace(published[name.lower()], batch=batch)
    try:
        config = ModelConfig.from_directory(model_directory(name))
    except InputError as error:
        raise InputError(f"{error}; published models are {', '.join(PUBLISHED)}") from None
    return Workload.of(config, name, batch)


def cascade(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A cascade of `memwall simulate cascade`, or a file with one (default: list them all).",
            metavar="CASCADE",
        ),
    ] = None,
    *,
    rank: Annotated[
        str | None, typer.Option(help="Rank to count passes over (default: m, or the first that is reduced).")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes of ranks, such as m=4096,m0=256,p=1 (others: p 1, e and f 64).")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Carry it out on random numbers, in float32 and float64.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.", min=0)] = 0,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell how many passes a kernel needs over a rank, what it must hold between them, and what it computes.

    Passes are worked out from a cascade of Einsums, yours (a text file) or one of those that the verb lists.
    """
    from memwall.simulate import einsum_report as reports

    if name is None:
        if rank is not None or sizes is not None or run:
            raise InputError("--rank, --sizes and --run go with a cascade: name one, or a file")
        rows = reports.table()
        if json:
            print_json(rows)
            return
        cells = [reports.table_cells(row) for row in rows]
        typer.echo(format_table(reports.LIST_COLUMNS, cells, right=frozenset((2, 3, 4, 5, 6))))
        typer.echo("\na row: one p; m and d 4,096 in tiles of 256, heads of 64. Held between passes, or fetched again.")
        return
    one = _cascade(name)
    given = _sizes(sizes)
    told = {"cascade": name, "text": one.to_text(), **reports.describe(one, rank, given)}
    if run:
        told["run"] = reports.carried_out(one, given, seed, name)
    if json:
        print_json(told)
        return
    _tell(told)


def _tell(told: dict[str, Any]) -> None:
    from memwall.simulate import einsum_report as reports

    typer.echo(format_table(reports.EINSUM_COLUMNS, [reports.einsum_cells(row) for row in told["einsums"]]))
    inputs = ", ".join(f"{name} {count}" for name, count in told["by_input"].items()) or "no input has it"
    typer.echo(
        f"\npasses over {told['rank']}: {told['told']} (by input: {inputs}); sweeps of elements {told['sweeps']}"
    )
    typer.echo("by rank: " + ", ".join(f"{rank} {count}" for rank, count in told["by_rank"].items()))
    if told["held"]:
        held = ", ".join(
            f"{each['tensor']} (made in pass {each['made']}, used until {each['used']}, {each['words']:,} words)"
            for each in told["held"]
        )
        typer.echo(
            f"between passes: {held}; {told['held_words']:,} words held, or {told['fetched_words']:,} fetched again"
        )
    typer.echo("operations: " + ", ".join(f"{kind} {count:,}" for kind, count in told["operations"].items()))
    if "run" in told:
        for name, out in told["run"]["outputs"].items():
            shape = " x ".join(map(str, out["shape"]))
            typer.echo(f"run: {name} {shape}, {'finite' if out['finite'] else 'not finite'}, float32 off by "
                       f"{out['float32_error']:.1e}")  # fmt: skip
        if "softmax_error" in told["run"]:
            typer.echo(f"run: off softmax by {told['run']['softmax_error']:.1e}")


def _cascade(name: str) -> Cascade:
    from memwall.simulate.attention_cascades import TEXTS, cascade
    from memwall.simulate.einsum_text import parse_cascade

    path = Path(name)
    if name in TEXTS or not path.is_file():
        return cascade(name)
    if path.stat().st_size > MOST_CASCADE_BYTES:
        raise InputError(f"{name}: {path.stat().st_size:,} bytes; a cascade has {MOST_CASCADE_BYTES:,} at most")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text; give a file with a cascade") from None
    try:
        return parse_cascade(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _sizes(text: str | None) -> dict[str, int]:
    from memwall.hardware.units import parse_count

    found = {}
    for part in (text or "").split(",") if text else ():
        name, equals, size = part.strip().partition("=")
        if not equals or not name:
            raise InputError(f"--sizes {part.strip()!r}: write a rank and its size, such as m=4096")
        found[name.strip()] = parse_count(size)
        if not 1 <= found[name.strip()] <= 1 << 28:
            raise InputError(f"--sizes {part.strip()}: from 1 to {1 << 28:,}")
    return found
