"""`memwall study ptq-impact`: weight formats under temperature, top-k and length, of one model or several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from memwall.cli.command import AsJson, Debug, Quiet, Threads, complete_model
from memwall.cli.printing import format_table, note, print_json, progress_bar

if TYPE_CHECKING:
    from memwall.studies.ptq_impact_study import Grid, Study

DEMO = "demo"
MOST_SEEDS, MOST_NUMBERS, MOST_TOP_K = 1000, 100, 2**24
LEAST_TEMPERATURE = 0.01
"""At zero all but one token are impossible, and a divergence says nothing; `--top-k 1` takes the likeliest."""
_Number = TypeVar("_Number", int, float)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="Directory of a Hugging Face model, ORG/NAME of one in the Hub's cache, or `demo` (the default). Several "
        "are studied one by one and held side by side.",
        metavar="[MODEL]...",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Formats between commas: bf16,int8,nf4,nf4-dq,fp4,fp4-dq (the default) and any that --weights takes.",
        metavar="LIST",
    ),
]
Temperatures = Annotated[
    str | None,
    typer.Option(help="Temperatures from 0.01 up, between commas (default: 0.1 to 1.0 and 1.2).", metavar="LIST"),
]
TopKs = Annotated[
    str | None, typer.Option("--top-k", help="Top-k values between commas (default: 1,10,50,200).", metavar="LIST")
]
Lengths = Annotated[
    str | None,
    typer.Option(help="Values of max new tokens between commas (default: 50,100,250,500,1000).", metavar="LIST"),
]
Tokens = Annotated[
    int | None, typer.Option(help="New tokens of a text where temperature or top-k is varied (default: 100).", min=2)
]
Seeds = Annotated[int | None, typer.Option(help="Seeds of every cell (default: 5).", min=1, max=MOST_SEEDS)]
Prompts = Annotated[Path | None, typer.Option(help="Text file with a prompt a line (default: ten bundled ones).")]
Memory = Annotated[
    str | None, typer.Option(help="Advise for this many bytes, such as 12MB (default: for each format's).")
]
Peer = Annotated[
    Path | None,
    typer.Option(help="Python with transformers and bitsandbytes to compare with (default: this one).", metavar="PATH"),
]


def ptq_impact(
    models: Models = None,
    *,
    formats: Formats = None,
    temperatures: Temperatures = None,
    top_k: TopKs = None,
    lengths: Lengths = None,
    tokens: Tokens = None,
    seeds: Seeds = None,
    prompts: Prompts = None,
    product: Annotated[bool, typer.Option("--product", help="Every temperature with every top-k.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: minutes.")] = False,
    memory: Memory = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for study.html, study.json, plots and the finished cells.", file_okay=False),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text, UTF-8 (default: the bundled one).")] = None,
    peer_python: Peer = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Leave bitsandbytes out.")] = False,
    no_costs: Annotated[bool, typer.Option("--no-costs", help="Do not measure bytes and time.")] = False,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare weight formats under temperature, top-k and max new tokens: quality of texts, speed, memory.

    All formats continue the same prompts with the same random numbers, and the bfloat16 model judges their texts.
    Differences come with their errors, the questions of the published study with answers, and temperatures and bytes
    with the format to take. Every finished cell is kept, so a study that was stopped goes on where it was.
    """
    from memwall.claims import describe_machine
    from memwall.errors import InputError
    from memwall.studies import ptq_across, ptq_report

    memory_bytes = None if memory is None else _memory(memory, costs=not no_costs)
    if peer_python is not None and not peer_python.is_file():
        raise InputError(f"--peer-python {peer_python}: there is no such file; give a Python's path")
    grid = _grid(quick, temperatures, top_k, lengths, tokens, seeds, product)
    names = models or [DEMO]
    ptq_across.folder_names(names)
    if out is not None:
        ptq_report.check()
    studies = [
        _run(
            model, formats, grid, prompts, out, text, not no_costs, None if no_peers else peer_python or _this(),
            threads, quiet, describe_machine(),
        )
        for model in names
    ]  # fmt: skip
    if out is not None:
        alone = len(studies) == 1
        made = (
            ptq_report.write(studies[0], out, memory_bytes) if alone else ptq_across.write(studies, out, memory_bytes)
        )
        for path in made:
            note(f"wrote {path}", quiet=quiet)
    if json:
        from memwall.studies.ptq_answers import to_dict

        print_json(to_dict(studies[0]) if len(studies) == 1 else ptq_across.whole(studies))
        return
    _show(studies, memory_bytes, quiet)


def _memory(text: str, *, costs: bool) -> int:
    """Bytes that a format must fit in. costs: whether bytes are measured."""
    from memwall.errors import InputError
    from memwall.hardware.units import parse_bytes

    if (found := parse_bytes(text)) == 0:
        raise InputError(f"--memory {text}: no format fits in nothing; give bytes, such as 11.5GB")
    if not costs:
        raise InputError("--memory asks which format fits, which needs bytes measured: leave out --no-costs")
    return found


def _show(studies: list[Study], memory_bytes: int | None, quiet: bool) -> None:
    from memwall.studies import ptq_across, ptq_report

    for study in studies:
        if len(studies) > 1:
            typer.echo(f"{study.model}\n")
        typer.echo(format_table(ptq_report.COLUMNS, ptq_report.lines(study), right=ptq_report.RIGHT))
        typer.echo()
        for remark in ptq_report.remarks(study, memory_bytes):
            typer.echo(remark)
        if len(studies) > 1:
            typer.echo()
    if len(studies) > 1:
        typer.echo(f"All {len(studies)} models\n")
        for one in ptq_across.across(studies):
            typer.echo(one.told)
    note("\n" + ptq_report.LEGEND, quiet=quiet)


def _this() -> Path:
    import sys

    return Path(sys.executable)


def _run(
    model: str, formats: str | None, grid: Grid, prompts: Path | None, out: Path | None, text: Path | None,
    costs: bool, python: Path | None, threads: int | None, quiet: bool, machine: str,
) -> Study:  # fmt: skip
    from memwall import kernels
    from memwall.engine.quality import read_text
    from memwall.hardware.system import cache_directory
    from memwall.models import model_directory
    from memwall.plan.choose import held_out_text
    from memwall.studies.ptq_impact_study import QUICK, QUICK_PROMPTS, study_ptq
    from memwall.studies.ptq_models import FORMATS, PROMPTS

    few = QUICK_PROMPTS if grid.windows == QUICK.windows else len(PROMPTS)
    asked = PROMPTS[:few] if prompts is None else _lines(prompts, read_text(prompts))
    names = list(FORMATS) if formats is None else _names(formats)
    if threads is not None:
        kernels.set_num_threads(threads)
    with progress_bar("study", quiet=quiet) as bar:
        return study_ptq(
            model_directory(model),
            model,
            formats=names,
            grid=grid,
            prompts=asked,
            text=held_out_text() if text is None else read_text(text),
            store=(out or cache_directory() / "studies") / "cells",
            costs=costs,
            peer_python=None if python is None else str(python),
            machine=machine,
            progress=bar.labelled,
        )


def _grid(
    quick: bool, temperatures: str | None, top_ks: str | None, lengths: str | None, tokens: int | None,
    seeds: int | None, product: bool,
) -> Grid:  # fmt: skip
    from memwall.studies.ptq_impact_study import FULL, QUICK

    grid = QUICK if quick else FULL
    return replace(
        grid,
        temperatures=_numbers("--temperatures", temperatures, float, LEAST_TEMPERATURE, 100) or grid.temperatures,
        top_ks=_numbers("--top-k", top_ks, int, 1, MOST_TOP_K) or grid.top_ks,
        lengths=_numbers("--lengths", lengths, int, 2, 10**6) or grid.lengths,
        tokens=tokens or grid.tokens,
        seeds=seeds or grid.seeds,
        product=product,
    )


def _numbers(
    option: str, text: str | None, kind: Callable[[str], _Number], least: float, most: float
) -> tuple[_Number, ...]:
    """Numbers between commas, in order; nothing where nothing was asked."""
    from memwall.errors import InputError

    if text is None:
        return ()
    try:
        found = sorted({kind(part) for part in text.split(",") if part.strip()})
    except ValueError:
        found = []
    if not found or len(found) > MOST_NUMBERS or not all(least <= number <= most for number in found):
        form = "numbers" if kind is float else "whole numbers"
        raise InputError(f"{option} {text!r}: must be 1 to {MOST_NUMBERS} {form} from {least:g} to {most:g} "
                         f"between commas")  # fmt: skip
    return tuple(found)


def _names(text: str) -> list[str]:
    from memwall.errors import InputError
    from memwall.studies.ptq_models import FORMATS

    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--formats {text!r} names none; known: {', '.join(FORMATS)}, and what --weights takes")
    return names


def _lines(path: Path, text: str) -> list[str]:
    from memwall.errors import InputError

    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not 0 < len(found) <= MOST_SEEDS:
        raise InputError(f"{path}: has {len(found)} prompts; give 1 to {MOST_SEEDS}, one a line")
    return found
