"""`memwall hdl`: a system's hardware as Verilog, checked bit for bit, its cells counted, its cost on a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command, complete_model, complete_weights
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.simulate.xr_npe_array import UnitArray

DESIGNS = ("xr-npe",)


def register(app: typer.Typer) -> None:
    add_command(app, "hdl", hdl)


def hdl(
    design: Annotated[
        str, typer.Argument(help="The design: xr-npe.", metavar="DESIGN", autocompletion=lambda: list(DESIGNS))
    ],
    *,
    verilog: Annotated[Path | None, typer.Option(help="Write the unit as Verilog.", metavar="FILE")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the design and its gates with the number formats, bit for bit.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --check: all pairs of 8 bits on the gates only, not clock by clock.")
    ] = False,
    cells: Annotated[bool, typer.Option("--cells", help="Synthesise the unit with Yosys and count its cells.")] = False,
    quire_bits: Annotated[int, typer.Option(help="Bits of the accumulator: 16 to 256.", metavar="BITS")] = 128,
    model: Annotated[
        str | None,
        typer.Option(
            help="Cost of this model's products on an array of units: a directory or `demo`.",
            metavar="MODEL",
            autocompletion=complete_model,
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="With --model: formats of its matrices, of e2m1, posit4, posit8, or mixed by layer: xr-npe; saved for "
            "what `memwall compress` chose.",
            metavar="FORMAT",
            autocompletion=complete_weights,
        ),
    ] = "xr-npe",
    tokens: Annotated[int, typer.Option(help="With --model: tokens worked together.", min=1)] = 1,
    array: Annotated[str, typer.Option(help="Rows and columns of the array.", metavar="RxC")] = "8x8",
    axi_bytes: Annotated[int, typer.Option(help="Bytes that AXI moves in a cycle.", min=1)] = 16,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show a system's hardware: formats and blocks, and on demand Verilog, a bit-exact check, cells, a model's cost.

    Exit status 1 when the check finds a mismatch. Needs `pip install "memwall[hdl]"` for Verilog, check and cells.
    """
    from memwall.simulate import xr_npe_array

    if design not in DESIGNS:
        raise InputError(f"no design is called {design!r}; there is {', '.join(DESIGNS)}")
    if quick and not check:
        raise InputError("--quick is for --check")
    report: dict[str, Any] = {"design": design, "formats": xr_npe_array.table()}
    if verilog is not None:
        report["verilog"] = _write_verilog(verilog, quire_bits)
    if cells:
        report["cells"] = _cells(quire_bits)
    if check:
        report["check"] = _check(quire_bits, exhaustive=not quick, quiet=quiet)
    if model is not None:
        report["model"] = _model_cost(model, weights, tokens, _parse_array(array, axi_bytes))
    if json:
        print_json(report)
    else:
        _show(report, quiet=quiet)
    if any(row["mismatches"] for row in report.get("check", ())):
        raise typer.Exit(1)


def _parse_array(text: str, axi_bytes: int) -> UnitArray:
    from memwall.simulate.xr_npe_array import UnitArray

    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise InputError(f"--array {text}: write rows x columns, such as 8x8")
    return UnitArray(rows=int(rows), columns=int(columns), axi_bytes=axi_bytes)


def _require(quire_bits: int) -> None:
    """What every use of the design needs: a width that it can have, and Amaranth."""
    from memwall.formats.xr_npe import Quire
    from memwall.simulate.hdl import require_amaranth

    Quire(bits=quire_bits)
    require_amaranth()


def _unit(quire_bits: int) -> Any:
    _require(quire_bits)
    from memwall.simulate.xr_npe_hdl import MultiplyAdd

    return MultiplyAdd(quire_bits)


def _write_verilog(path: Path, quire_bits: int) -> dict[str, Any]:
    from memwall.hardware.system import write_whole
    from memwall.simulate.hdl import verilog

    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--verilog {path}: give the name of a file in a folder that exists")
    text = verilog(_unit(quire_bits), "xr_npe")
    write_whole(path, text)
    return {"file": str(path), "bytes": len(text.encode()), "lines": text.count("\n")}


def _cells(quire_bits: int) -> dict[str, Any]:
    from memwall.simulate.hdl import cell_counts

    return cell_counts(_unit(quire_bits), "xr_npe").to_dict()


def _check(quire_bits: int, *, exhaustive: bool, quiet: bool) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from memwall.simulate.xr_npe_check import check

    _require(quire_bits)
    with progress_bar("checking", quiet=quiet) as bar:
        return [asdict(row) for row in check(quire_bits=quire_bits, exhaustive=exhaustive, progress=bar.labelled)]


def _model_cost(model: str, weights: str, tokens: int, array: UnitArray) -> dict[str, Any]:
    from memwall.formats.xr_npe import lane_format
    from memwall.models import Checkpoint, ModelConfig, model_directory
    from memwall.models.precision import resolve
    from memwall.simulate.xr_npe_array import model_cost, total

    directory = model_directory(model)
    config = ModelConfig.from_directory(directory)
    with Checkpoint(directory, config) as checkpoint:
        specs = resolve(config, weights, checkpoint)
    matrices = [tensor for tensor in config.tensors() if tensor.role in ("linear", "expert")]
    shapes = {tensor.name: (tensor.shape[0], tensor.shape[1]) for tensor in matrices}
    formats = {name: lane_format(specs[name]) for name in shapes}
    wide = {name: lane_format("posit16") for name in shapes}
    rows = []
    for what, chosen in ((weights, formats), ("posit16_1", wide)):
        costs = model_cost(shapes, chosen, tokens, array)
        rows.append({"formats": what, **total(list(costs.values())).to_dict()})
    used = {name: sum(found.name == name for found in formats.values()) for name in {f.name for f in formats.values()}}
    return {"tokens": tokens, "matrices": dict(sorted(used.items())), "costs": rows}


def _show(report: dict[str, Any], *, quiet: bool) -> None:
    rows = [
        (
            row["format"],
            str(row["lanes"]),
            f"{row['blocks']} of 49",
            f"{row['utilisation']:.0%}",
            f"{1e12 * row['energy_per_product_j']:.2f}",
            f"{1e12 * row['energy_per_product_ungated_j']:.2f}",
        )
        for row in report["formats"]
    ]
    headers = ("format", "lanes", "blocks", "in use", "pJ a product", "without gating")
    typer.echo(format_table(headers, rows, right=frozenset(range(1, 6))))
    note("energy: the paper's 14 pJ of a unit, split by our gates (docs/number-formats.md)", quiet=quiet)
    if "verilog" in report:
        written = report["verilog"]
        note(f"wrote {written['file']}: {written['lines']:,} lines", quiet=quiet)
    if "cells" in report:
        found = report["cells"]
        most = ", ".join(f"{name.strip('$_')} {count:,}" for name, count in list(found["by_type"].items())[:6])
        typer.echo(f"\ncells: {found['total']:,}, of them {found['registers']:,} registers ({most}...)")
    if "check" in report:
        typer.echo()
        lines = [(r["model"], r["what"], f"{r['products']:,}", str(r["mismatches"])) for r in report["check"]]
        typer.echo(format_table(("checked", "what", "products", "mismatches"), lines, right=frozenset({2, 3})))
        for row in report["check"]:
            if row["first"]:
                note(f"{row['model']}, {row['what']}: {row['first']}", quiet=quiet)
    if "model" in report:
        _show_model(report["model"])


def _show_model(found: dict[str, Any]) -> None:
    used = ", ".join(f"{count} in {name}" for name, count in found["matrices"].items())
    typer.echo(f"\nproducts of {found['tokens']} tokens; matrices: {used}")
    lines = [
        (
            row["formats"],
            f"{row['cycles']:,}",
            f"{row['moved_bytes']:,}",
            f"{1e6 * row['energy_j']:.1f}",
            row["bound"],
        )
        for row in found["costs"]
    ]
    headers = ("formats", "cycles", "bytes over AXI", "energy, uJ", "bound by")
    typer.echo(format_table(headers, lines, right=frozenset({1, 2, 3})))
