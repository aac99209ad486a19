"""`memwall kernel`: the product for any weight type of 1 to 8 bits as a tile program: cost, source, check, speed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import format_table, note, print_json
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.kernels.tile_program import TileProgram
    from memwall.kernels.tilus import Config

PROGRAMS = ("matmul", "direct", "matvec")
LANGUAGES = ("listing", "cpp", "cuda", "triton")
MOST_SIDE = 1 << 17


def register(app: typer.Typer) -> None:
    add_command(app, "kernel", kernel)


def _complete_type(incomplete: str) -> list[str]:
    from memwall.kernels.tile_types import PUBLISHED

    return [name for name in PUBLISHED if name.startswith(incomplete)]


def kernel(
    dtype: Annotated[
        str,
        typer.Argument(
            help="Type of the weights: i1 to i8, u1 to u8, or a float such as f6e3m2.",
            metavar="TYPE",
            autocompletion=_complete_type,
        ),
    ],
    *,
    program: Annotated[
        str,
        typer.Option(
            help="matmul (stages in shared memory), direct (without; what Triton takes) or matvec (few tokens, "
            "float32; what a CPU takes).",
            metavar="NAME",
        ),
    ] = "matmul",
    shape: Annotated[str, typer.Option(help="Inputs x outputs of the weights.", metavar="KxN")] = "4096x4096",
    tokens: Annotated[int, typer.Option(help="Tokens multiplied together.", min=1, max=4096)] = 1,
    group: Annotated[int, typer.Option(help="Weights along the inputs that share a scale.", min=16)] = 128,
    stages: Annotated[int, typer.Option(help="matmul: tiles of k under way in shared memory.", min=2, max=8)] = 3,
    split_k: Annotated[int, typer.Option(help="matmul: blocks that share an output tile.", min=1, max=64)] = 1,
    emit: Annotated[
        str | None, typer.Option(help="Print the source: listing, cpp, cuda or triton.", metavar="LANGUAGE")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --emit: write it to this file.", metavar="FILE")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run a small product byte by byte and compiled, and compare with the decoded weights."
        ),
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Compile matvec for this CPU, tune it, and time it beside memwall's own.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a product with weights of any type of 1 to 8 bits costs, and on demand its source, a check, its speed.

    One tile program serves all types (Tilus). Exit status 1 when the check finds a difference. --check and --measure
    need a C++ compiler.
    """
    from memwall.kernels.tilus import Config

    settings = Config(num_stages=stages, split_k=split_k)
    k, n = _parse_shape(shape)
    made = _program(program, dtype, tokens, n, k, group, settings)
    if out is not None and emit is None:
        raise InputError("--out is for --emit: say in which language")
    if emit is not None:
        text = _source(made, emit)
        _deliver(text, out, json=json, quiet=quiet, language=emit)
        return
    report: dict[str, Any] = {"type": dtype, "program": program, "k": k, "n": n, "tokens": tokens, "group": group}
    report["cost"] = _cost(made)
    if check:
        report["check"] = _check(dtype, group, settings)
    if measure:
        report["measure"] = _measure(dtype, min(tokens, 16), n, k, group)
    if json:
        print_json(report)
    else:
        _show(report, quiet=quiet)
    if any(not row["same"] for row in report.get("check", ())):
        raise typer.Exit(1)


def _parse_shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise InputError(f"--shape {text}: write inputs x outputs, such as 4096x4096")
    k, n = int(rows), int(columns)
    if not (0 < k <= MOST_SIDE and 0 < n <= MOST_SIDE):
        raise InputError(f"--shape {text}: sides of 1 to {MOST_SIDE:,}")
    return k, n


def _program(name: str, dtype: str, m: int, n: int, k: int, group: int, settings: Config) -> TileProgram:
    from memwall.kernels import tilus
    from memwall.kernels.tile_types import tile_type

    if name not in PROGRAMS:
        raise InputError(f"no program is called {name!r}; there are {', '.join(PROGRAMS)}")
    if not tile_type(dtype).narrow:
        raise InputError(f"{dtype} is no type of 1 to 8 bits: take i4, u3, f6e3m2 ...")
    if name == "matmul":
        return tilus.matmul_program(dtype, m, n, k, group=group, config=settings)
    make = tilus.direct_program if name == "direct" else tilus.matvec_program
    return make(dtype, m, n, k, group=group, config=settings)


def _source(program: TileProgram, language: str) -> str:
    if language == "listing":
        from memwall.kernels.tile_program import listing

        return listing(program)
    if language == "cpp":
        from memwall import kernels
        from memwall.kernels.tile_build import LANES
        from memwall.kernels.tile_cpp import emit as cpp

        return cpp(program, LANES.get(str(kernels.isa()), 4))
    if language == "cuda":
        from memwall.kernels.tile_cuda import emit as cuda

        return cuda(program)
    if language == "triton":
        from memwall.kernels.tile_triton_source import emit as triton

        return triton(program)
    raise InputError(f"no source in {language!r}; there are {', '.join(LANGUAGES)}")


def _deliver(text: str, out: Path | None, *, json: bool, quiet: bool, language: str) -> None:
    if out is not None:
        from memwall.hardware.system import write_whole

        if out.is_dir() or not out.parent.is_dir():
            raise InputError(f"--out {out}: give the name of a file in a folder that exists")
        write_whole(out, text)
        note(f"wrote {out}: {text.count(chr(10)):,} lines", quiet=quiet)
        text = "" if not json else text
    if json:
        print_json({"language": language, "source": text})
    elif out is None:
        typer.echo(text)


def _cost(program: TileProgram) -> dict[str, Any]:
    from memwall.kernels.tile_cost import cost

    found = cost(program)
    return {**asdict(found), "conflicts": found.conflicts, "sectors": found.sectors}


def _check(dtype: str, group: int, settings: Config) -> list[dict[str, Any]]:
    from memwall.kernels.tilus_check import check

    return [asdict(row) for row in check(dtype, group=group, config=settings)]


def _measure(dtype: str, tokens: int, n: int, k: int, group: int) -> dict[str, Any]:
    from memwall.claims import describe_machine
    from memwall.kernels.tilus_check import measure

    return {**measure(dtype, tokens, n, k, group=group), "machine": describe_machine()}


def _show(report: dict[str, Any], *, quiet: bool) -> None:
    found = report["cost"]
    rows = [
        (a["op"], a["memory"], f"{a['times']:,}", f"{a['tile_bytes']:,}", str(a["vector_bytes"]), f"{a['requests']:,}",
         f"{a['sectors']:,}", f"{a['conflicts']:,}")
        for a in found["accesses"]
    ]  # fmt: skip
    headers = ("instruction", "memory", "times", "bytes", "vector", "requests", "sectors", "conflicts")
    typer.echo(format_table(headers, rows, right=frozenset(range(2, 8))))
    read = ", ".join(f"{name} {size:,}" for name, size in found["read_bytes"].items())
    typer.echo(f"\nbytes read: {read}")
    typer.echo(
        f"registers of tiles {found['registers']}, shared bytes {found['shared_bytes']:,}, "
        f"bank conflicts {found['conflicts']:,}, sectors {found['sectors']:,}"
    )
    note("model of a GPU, counted from layouts; nothing was run", quiet=quiet)
    if "check" in report:
        typer.echo()
        lines = [(r["what"], "same" if r["same"] else "different", f"{r['error']:.2g}") for r in report["check"]]
        typer.echo(format_table(("checked", "result", "largest error"), lines, right=frozenset({2})))
    if "measure" in report:
        from memwall.hardware.units import GB

        typer.echo()
        timed = [
            (r["kernel"], f"{1e6 * r['seconds']:,.0f}", f"{r['bytes']:,}", f"{r['bytes'] / r['seconds'] / GB:.1f}")
            for r in report["measure"]["rows"]
        ]
        typer.echo(format_table(("kernel", "us", "bytes", "GB/s"), timed, right=frozenset({1, 2, 3})))
        note(f"measured on {report['measure']['machine']}", quiet=quiet)
