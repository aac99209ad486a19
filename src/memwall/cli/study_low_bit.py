"""`memwall study low-bit`: every method of weight compression at every width."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.command import AsJson, Debug, ModelOrDemo, Quiet, Threads
from memwall.cli.printing import format_table, note, print_json, progress_bar

if TYPE_CHECKING:
    from memwall.studies.low_bit_llama3_study import Study

DEMO = "demo"

MethodNames = Annotated[
    str | None,
    typer.Option(help="Methods of `memwall compress` between commas, such as gptq,quip,billm (default: all).",
                 metavar="LIST"),
]  # fmt: skip
Widths = Annotated[
    str | None,
    typer.Option("--bits", help="Only rows of these widths, as papers count them, such as 1.1,2,3.", metavar="LIST"),
]
Choices = Annotated[
    Path | None,
    typer.Option(help='Questions, a JSON object a line: {"context": ..., "choices": [...], "answer": 0} (default: how '
                 "the held-out text goes on)."),
]  # fmt: skip


def low_bit(
    model: ModelOrDemo = DEMO,
    *,
    methods: MethodNames = None,
    bits: Widths = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer methods and small samples: minutes.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for study.html, study.json, plots and the finished cells.", file_okay=False),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text, UTF-8 (default: the bundled one).")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file to calibrate on (default: the bundled text).")
    ] = None,
    choices: Choices = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods of weight compression at every width: true bits against perplexity, recall, choice accuracy.

    Every row is a model that was compressed, saved, and loaded as it is stored; bits count all of its bytes. Every
    finished cell is kept, so a study that was stopped goes on where it was, in the middle of a model too.
    """
    from memwall import kernels
    from memwall.claims import describe_machine
    from memwall.compress.calibration import read_text as read_calibration
    from memwall.engine.quality import read_text
    from memwall.hardware.system import cache_directory
    from memwall.models import model_directory
    from memwall.models.tokenizer import Tokenizer
    from memwall.plan.choose import held_out_text
    from memwall.studies import choice_task, low_bit_report
    from memwall.studies.low_bit_llama3_study import FULL, QUICK, select, study_low_bit

    variants = select(_names(methods), _numbers(bits), quick)
    if out is not None:
        low_bit_report.check()
    if calibration is not None:
        read_calibration(calibration)
    if threads is not None:
        kernels.set_num_threads(threads)
    directory = model_directory(model)
    questions = None
    if choices is not None:
        tokenizer = Tokenizer.from_directory(directory)
        questions = choice_task.from_file(choices, lambda words: tokenizer.encode(words, add_bos=False))
    with progress_bar("study", quiet=quiet) as bar:
        study = study_low_bit(
            directory,
            model,
            variants=variants,
            sizes=QUICK if quick else FULL,
            text=held_out_text() if text is None else read_text(text),
            store=(out or cache_directory() / "studies") / "cells",
            questions=questions,
            calibration=calibration,
            machine=describe_machine(),
            progress=bar.labelled,
        )
    if out is not None:
        for path in low_bit_report.write(study, out):
            note(f"wrote {path}", quiet=quiet)
    _show(study, as_json=json, quiet=quiet)


def _show(study: Study, *, as_json: bool, quiet: bool) -> None:
    from memwall.studies.low_bit_report import COLUMNS, LEGEND, RIGHT, lines, remarks, to_dict

    if as_json:
        print_json(to_dict(study))
        return
    typer.echo(format_table(COLUMNS, lines(study), right=RIGHT))
    typer.echo()
    for remark in remarks(study):
        typer.echo(remark)
    note("\n" + LEGEND, quiet=quiet)


def _names(text: str | None) -> list[str] | None:
    from memwall.errors import InputError

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--methods {text!r} names none; give such as gptq,quip,billm")
    return names


def _numbers(text: str | None) -> list[float] | None:
    from memwall.errors import InputError

    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise InputError(f"--bits {text!r}: give numbers between commas, such as 1.1,2,3")
    return found
