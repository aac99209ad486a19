"""`memwall study`: comparisons of many methods on equal terms; `study kv` is that of KV caches, `study ptq-impact` of
weight formats, `study low-bit` of weight compression, `study efficiency` of techniques under one meter, `study
embeddings` of stored vectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.command import AsJson, Debug, ModelOrDemo, Quiet, Threads, add_command, complete_weights
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.cli.study_efficiency import efficiency
from memwall.cli.study_embeddings import embeddings
from memwall.cli.study_low_bit import low_bit
from memwall.cli.study_ptq import ptq_impact

if TYPE_CHECKING:
    from memwall.studies.kv_study import Study

DEMO = "demo"


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Compare many methods on equal terms: a table, plots of quality against real bytes, and JSON.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    add_command(group, "kv", kv)
    add_command(group, "ptq-impact", ptq_impact)
    add_command(group, "low-bit", low_bit)
    add_command(group, "efficiency", efficiency)
    add_command(group, "embeddings", embeddings)
    app.add_typer(group, name="study")


Methods = Annotated[
    str | None,
    typer.Option(
        help="Names and policies between commas, such as kivi,snapkv+kivi,'snapkv(0.25)+kivi(2bit)' (default: all).",
        metavar="LIST",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        help="Shares of a float16 cache's bytes that methods are set to meet (default: 0.5,0.25,0.125).", metavar="LIST"
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for study.html, study.json, plots and the finished cells (default: cells in the user's cache).",
        file_okay=False,
    ),
]
Text = Annotated[
    Path | None, typer.Option(help="Text file (UTF-8) to decode and to hide facts in (default: the bundled one).")
]
WeightsAsTheyAre = Annotated[
    str,
    typer.Option(
        help="Format of the weights, the same for all caches; float32 is the model itself.",
        metavar="FORMAT",
        autocompletion=complete_weights,
    ),
]


def kv(
    model: ModelOrDemo = DEMO,
    *,
    methods: Methods = None,
    budgets: Budgets = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer methods and small samples: under a minute.")] = False,
    out: Out = None,
    text: Text = None,
    weights: WeightsAsTheyAre = "float32",
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Leave other libraries out.")] = False,
    no_resident: Annotated[
        bool, typer.Option("--no-resident", help="Do not measure resident bytes in processes of their own.")
    ] = False,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare KV caches: every method at every budget of bytes, on text, recall of hidden facts, and conversation.

    Every finished cell is kept, so a study that was stopped goes on where it was. Methods that learn from the model use
    what `memwall fit` has stored, and are skipped with the command to run where nothing is. Quantized caches of
    transformers and presses of kvpress run in the same table where they are installed.
    """
    from memwall import kernels
    from memwall.claims import describe_machine
    from memwall.engine.quality import read_text
    from memwall.hardware.system import cache_directory
    from memwall.models import model_directory
    from memwall.plan.choose import held_out_text
    from memwall.studies import kv_methods, kv_tasks
    from memwall.studies.kv_report import check, write
    from memwall.studies.kv_study import study_kv

    names = list(kv_methods.QUICK if quick else kv_methods.METHODS)
    shares = list(kv_methods.QUICK_BUDGETS if quick else kv_methods.BUDGETS)
    names = names if methods is None else kv_methods.parse_methods(methods)
    shares = shares if budgets is None else kv_methods.parse_budgets(budgets)
    if out is not None:
        check()
    if threads is not None:
        kernels.set_num_threads(threads)
    with progress_bar("study", quiet=quiet) as bar:
        study = study_kv(
            model_directory(model),
            model,
            methods=names,
            budgets=shares,
            sizes=kv_tasks.QUICK if quick else kv_tasks.FULL,
            text=held_out_text() if text is None else read_text(text),
            store=(out or cache_directory() / "studies") / "cells",
            weights=weights,
            peers=not no_peers,
            resident=not no_resident,
            machine=describe_machine(),
            progress=bar.labelled,
        )
    if out is not None:
        for path in write(study, out):
            note(f"wrote {path}", quiet=quiet)
    if json:
        print_json(study.to_dict())
    else:
        _show(study, quiet=quiet)


def _show(study: Study, *, quiet: bool) -> None:
    from memwall.studies import kv_advice
    from memwall.studies.kv_report import ADVICE, COLUMNS, LEGEND, RIGHT, lines, remarks

    typer.echo(format_table(COLUMNS, lines(study), right=RIGHT) + "\n")
    if told := kv_advice.sentences(study):
        typer.echo("\n".join(told) + "\n")
        typer.echo(format_table(kv_advice.COLUMNS, kv_advice.table(study)))
        note("\n" + ADVICE, quiet=quiet)
    note("\n" + LEGEND, quiet=quiet)
    for text in remarks(study):
        note(text, quiet=quiet)
