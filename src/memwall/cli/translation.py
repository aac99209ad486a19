"""`memwall simulate translation`: what page walks cost a trace, and what spares them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.simulate.access_traces import Trace
    from memwall.simulate.victima import Machine, Result

SHOWN = "radix,pom-tlb,victima,tlb-64k"
DEFAULT_KERNELS = "random,xsbench,kv-pages"


def translation(
    traces: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of accesses: text with `r 0x7f00 3` a line (kind, address, instructions before it), or .npy. "
            "Without any, --kernels.",
            metavar="TRACE...",
            show_default=False,
        ),
    ] = None,
    *,
    kernels: Annotated[
        str | None,
        typer.Option(
            help="Kernels whose accesses are recorded, between commas, or `all`: random, random-4g, bfs, pagerank, "
            f"embeddings, xsbench, kv-pages (these five also as -small), stream, mixed (default: {DEFAULT_KERNELS}).",
            metavar="NAMES",
        ),
    ] = None,
    accesses: Annotated[
        str, typer.Option(help="Accesses of a kernel, and the most of a file, such as 2m.", metavar="COUNT")
    ] = "2m",
    variants: Annotated[
        str,
        typer.Option(
            help="Between commas, or `all`; gains are beside the first. radix walks page tables, victima parks "
            "translations in the L2 cache (-all without the predictor, -srrip without its replacement, -walks and "
            "-evictions with one way in), pom-tlb keeps 64K in memory; ideal ones: tlb-2k to tlb-128k, l3tlb-15 to 40.",
            metavar="NAMES",
        ),
    ] = SHOWN,
    virtualised: Annotated[
        bool, typer.Option("--virtualised", help="In a virtual machine: each step of a walk is translated, too.")
    ] = False,
    large_pages: Annotated[float, typer.Option(help="Share of 2 MiB regions that are one page.")] = 0.3,
    scattered: Annotated[bool, typer.Option("--scattered", help="Neighbouring pages lie far apart in memory.")] = False,
    l2: Annotated[str, typer.Option(help="L2 cache: 1MiB, 2MiB, 4MiB or 8MiB.", metavar="BYTES")] = "2MiB",
    l3: Annotated[str, typer.Option(help="L3 cache of the core, 11 ways.", metavar="BYTES")] = "1408KiB",
    memory_latency: Annotated[float, typer.Option(help="Of memory, nanoseconds.", min=1, max=10_000)] = 45,
    memory_rate: Annotated[str, typer.Option(help="Of memory, for this core.")] = "57.6GB/s",
    walkers: Annotated[int, typer.Option(help="Walks at once; real cores have 2 to 4.", min=1, max=64)] = 50,
    warm: Annotated[float, typer.Option(help="Share of a trace that fills caches and does not count.")] = 0.25,
    save: Annotated[
        Path | None, typer.Option(help="Write the only kernel's accesses (.npy), to be read again.", metavar="FILE")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw where cycles go (SVG).", metavar="FILE")] = None,
    seed: Annotated[int, typer.Option(help="Seed of kernels and of page sizes.", min=0)] = 0,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Simulate the address translation of a core: page walks, and what larger TLBs, one in memory, or Victima spare.

    Walks go through the caches that data use. IPC is modelled; walk and TLB miss are mean cycles.
    """
    from memwall.hardware.system import write_whole
    from memwall.hardware.units import parse_count
    from memwall.simulate import victima_report as reports
    from memwall.simulate.access_traces import save_trace
    from memwall.simulate.nano_report import check_picture

    if plot is not None:
        check_picture(plot)
    names = _names("--variants", variants)
    machine = replace(
        _machine(l2, l3, memory_latency, memory_rate), walkers=walkers, virtualised=virtualised,
        large_pages=large_pages, scattered=scattered, seed=seed,
    )  # fmt: skip
    sources = _sources(traces or [], kernels, parse_count(accesses), seed, save)
    runs: list[list[Result]] = []
    with progress_bar("translation", quiet=quiet) as bar:
        for number, make in enumerate(sources):
            trace = make()
            if save is not None:
                save_trace(save, trace)
                note(f"memwall: wrote {save}", quiet=quiet)
            runs.append(_run(trace, names, machine, warm, number, len(sources), bar))
    if plot is not None:
        write_whole(plot, reports.picture(runs))
        note(f"memwall: wrote {plot}", quiet=quiet)
    means = {
        one.variant: reports.mean_gain([run[at] for run in runs], [run[0] for run in runs])
        for at, one in enumerate(runs[0])
    }
    if json:
        print_json({
            "settings": machine.fields(), "warm": warm, "mean_gains": means,
            "runs": [{**one.to_dict(), "gain": reports.gain(one, run[0])} for run in runs for one in run],
        })  # fmt: skip
        return
    rows = [reports.cells(one, run[0]) for run in runs for one in run]
    typer.echo(format_table(reports.COLUMNS, rows, right=frozenset(range(2, len(reports.COLUMNS)))))
    if len(names) > 1:
        told = ", ".join(f"{name} {value:+.1%}" for name, value in list(means.items())[1:])
        typer.echo(f"\nbeside {names[0]}, geometric mean of {len(runs)} traces: {told}")


def _names(option: str, text: str) -> list[str]:
    from memwall.simulate.access_kernels import KERNELS
    from memwall.simulate.victima import VARIANTS

    table = list(VARIANTS if option == "--variants" else KERNELS)
    names = table if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in table:
            raise InputError(f"{option} {name}: it is one of {', '.join(table)}")
    if not names:
        raise InputError(f"{option}: name one at least, or all")
    return list(dict.fromkeys(names))


def _machine(l2: str, l3: str, memory_latency: float, memory_rate: str) -> Machine:
    from memwall.hardware.units import GB, Seconds, parse_bytes, parse_rate
    from memwall.simulate.core_model import SECOND_CYCLES, CoreModel
    from memwall.simulate.victima import Machine

    core = CoreModel(memory_seconds=Seconds(memory_latency / GB), memory_bytes_per_s=parse_rate(memory_rate))
    second = parse_bytes(l2)
    if second not in SECOND_CYCLES:
        raise InputError(f"--l2 {l2}: its latency is known for 1MiB, 2MiB, 4MiB and 8MiB")
    core = replace(
        core,
        second=replace(core.second, num_bytes=second, cycles=SECOND_CYCLES[second]),
        third=replace(core.third, num_bytes=parse_bytes(l3)),
    )
    return Machine(core=core)


def _sources(files: list[Path], kernels: str | None, accesses: int, seed: int, save: Path | None) -> list[Any]:
    """What makes each trace; files and names are checked before the first runs."""
    from functools import partial

    from memwall.simulate.access_kernels import kernel_trace
    from memwall.simulate.access_traces import read_trace

    if files and kernels is not None:
        raise InputError("--kernels stands in for files of traces; give one of both")
    if not 1 <= accesses <= 1 << 28:
        raise InputError(f"--accesses {accesses:,}: give from 1 to {1 << 28:,}")
    if files:
        if save is not None:
            raise InputError("--save writes a kernel's accesses; the files are there already")
        read = [read_trace(path, accesses) for path in files]
        return [lambda trace=trace: trace for trace in read]
    names = _names("--kernels", kernels or DEFAULT_KERNELS)
    if save is not None and (len(names) != 1 or save.suffix != ".npy" or not save.parent.is_dir()):
        raise InputError(f"--save {save}: name one kernel, and a file that ends in .npy in a folder that is there")
    return [partial(kernel_trace, name, accesses, seed) for name in names]


def _run(
    trace: Trace, names: list[str], machine: Machine, warm: float, number: int, whole: int, bar: Any
) -> list[Result]:
    from memwall.simulate.victima import simulate, variant

    found: list[Result] = []
    for at, name in enumerate(names):

        def tell(done: int, of: int, at: int = at, name: str = name) -> None:
            if bar.labelled is not None:
                share = (number * len(names) + at) * 1000 + done * 1000 // of
                bar.labelled(share, whole * len(names) * 1000, f"{trace.name}: {name}")

        found.append(simulate(trace, variant(name, machine), name=name, warm=warm, progress=tell))
    return found
