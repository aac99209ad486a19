"""`memwall study efficiency`: memory, compute, latency, throughput, energy and compression of techniques, ranked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, ModelOrDemo, Quiet, Threads
from memwall.cli.printing import format_table, note, print_json, progress_bar

if TYPE_CHECKING:
    from memwall.studies.efficiency_sizes import Sizes
    from memwall.studies.efficientllm import Study

DEMO = "demo"
MOST_STEPS, MOST_SEEDS, MOST_CONTEXT = 1_000_000, 100, 2**20

Axes = Annotated[
    str | None,
    typer.Option(help="Axes between commas: attention,positions,experts,precision,peft (default: all).",
                 metavar="LIST"),
]  # fmt: skip
Techniques = Annotated[
    str | None, typer.Option(help="Techniques between commas, such as mha,mla,moe,int4 (default: all).", metavar="LIST")
]
Text = Annotated[
    Path | None,
    typer.Option(help="Text (UTF-8): nine tenths to train on, the rest to judge on (default: bundled texts)."),
]
Steps = Annotated[
    int | None, typer.Option(help="Measured training steps of each model.", min=1, max=MOST_STEPS, show_default=False)
]
Seeds = Annotated[int | None, typer.Option(help="Trainings of each model.", min=1, max=MOST_SEEDS, show_default=False)]
Context = Annotated[
    int | None, typer.Option(help="Tokens in the caches before decoding.", min=1, max=MOST_CONTEXT, show_default=False)
]
Interval = Annotated[
    float | None, typer.Option(help="Seconds between samples, for training and decoding alike.", show_default=False)
]
Score = Annotated[
    str | None,
    typer.Option(help="Weights of metrics in score and front (default: quality=1,amu=1,al=1).", metavar="LIST"),
]


def efficiency(
    model: ModelOrDemo = DEMO,
    *,
    axes: Axes = None,
    techniques: Techniques = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small models, one seed: under a minute.")] = False,
    steps: Steps = None,
    seeds: Seeds = None,
    context: Context = None,
    dt: Interval = None,
    score: Score = None,
    text: Text = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for study.html, study.json, plots and the records.", file_okay=False),
    ] = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank techniques by memory, compute use, latency, throughput, energy and compression, with quality beside them.

    Attention variants, positional encodings and experts are trained small here and decode through their caches; MODEL
    is run in several precisions; fine-tuning methods adapt one model. A sampler in the background meters every run; a
    run is a record on disk, tables are made of records, and a study that was stopped goes on where it was.
    """
    from memwall.studies import efficiency_report
    from memwall.studies.efficiency_rank import parse_weights
    from memwall.studies.efficiency_sizes import FULL, QUICK, select

    chosen = select(_names("--axes", axes), _names("--techniques", techniques))
    weights = None if score is None else parse_weights(score)
    asked: dict[str, Any] = {
        "steps": steps, "seeds": seeds, "context": context, "training_dt_s": dt, "inference_dt_s": dt,
    }  # fmt: skip
    sizes = replace(QUICK if quick else FULL, **{name: value for name, value in asked.items() if value is not None})
    if out is not None:
        efficiency_report.check()
    study = _run(model, chosen, sizes, text, out, threads, quiet)
    if out is not None:
        for path in efficiency_report.write(study, out, weights):
            note(f"wrote {path}", quiet=quiet)
    if json:
        print_json(efficiency_report.to_dict(study, weights))
    else:
        _show(study, weights, quiet=quiet)


def _run(
    model: str, axes: dict[str, tuple[str, ...]], sizes: Sizes, text: Path | None, out: Path | None,
    threads: int | None, quiet: bool,
) -> Study:  # fmt: skip
    from memwall.claims import describe_machine
    from memwall.hardware.system import cache_directory
    from memwall.models import model_directory
    from memwall.studies.efficientllm import study_efficiency

    train, held_out = _texts(text)
    with progress_bar("study", quiet=quiet) as bar:
        return study_efficiency(
            model_directory(model),
            model,
            axes=axes,
            sizes=sizes,
            text=train,
            held_out=held_out,
            store=(out or cache_directory() / "studies") / "records",
            threads=threads,
            machine=describe_machine(),
            progress=bar.labelled,
        )


def _show(study: Study, weights: dict[str, float] | None, *, quiet: bool) -> None:
    from memwall.studies.efficiency_report import COLUMNS, LEGEND, RIGHT, groups, lines, remarks, title

    for key, rows in groups(study, weights).items():
        typer.echo(title(key, rows))
        typer.echo(format_table(COLUMNS, lines(rows), right=RIGHT))
        typer.echo()
    for remark in remarks(study, weights):
        typer.echo(remark)
    note("\n" + LEGEND, quiet=quiet)


def _texts(path: Path | None) -> tuple[bytes, bytes]:
    """Text to train on and text to judge on."""
    from memwall.compress.calibration import BUNDLED_TEXT
    from memwall.engine.quality import read_text
    from memwall.plan.choose import held_out_text

    if path is None:
        return BUNDLED_TEXT.read_bytes(), held_out_text().encode()
    text = read_text(path)
    cut = 9 * len(text) // 10
    return text[:cut].encode(), text[cut:].encode()


def _names(option: str, text: str | None) -> list[str] | None:
    from memwall.errors import InputError

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{option} {text!r} names none")
    return names
