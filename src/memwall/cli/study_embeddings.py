"""`memwall study embeddings`: what every form of stored vectors costs in quality, on vectors of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, Threads
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.retrieve.embedding_storage import Form

Forms = Annotated[
    str | None,
    typer.Option(
        help="Forms between commas, such as float32,e4m3,pca:0.5+e4m3,umap:0.25+float32 (default: seven element types, "
        "with all dimensions and with 0.25 to 0.9 of them by pca).",
        metavar="LIST",
    ),
]

Out = Annotated[Path | None, typer.Option(help="Folder for study.json and frontier.png.", file_okay=False)]


def embeddings(
    vectors: Annotated[Path, typer.Argument(help="Vectors [n, d] in a .npy file.", metavar="VECTORS")],
    *,
    queries: Annotated[
        Path | None,
        typer.Option(help="Queries [q, d] in a .npy file (default: some of the vectors, taken out).", metavar="FILE"),
    ] = None,
    judged: Annotated[
        Path | None,
        typer.Option(
            help="With --queries: text file of judgements, a line `query vector` for each relevant pair, places from 0 "
            "(default: the ten nearest by float32 are relevant).",
            metavar="FILE",
        ),
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(help="Vectors (.npy) to learn maps and ranges from (default: those judged).", metavar="FILE"),
    ] = None,
    forms: Forms = None,
    out: Out = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare forms of stored vectors: bytes of a vector against nDCG@10, and the frontier that a choice is made from.

    `memwall index --memory 40MB --points OUT/study.json` chooses by it.
    """
    from memwall.cli.index import read_vectors
    from memwall.retrieve.embedding_storage import frontier
    from memwall.retrieve.ranking import Judged, measure, own_queries, read_judgements
    from memwall.studies import embedding_study

    if threads is not None:
        from memwall import kernels

        kernels.set_num_threads(threads)
    if out is not None:
        embedding_study.check()
    asked = _forms(forms, queries, judged)
    x = read_vectors(vectors)
    learned, name = (x, vectors.name) if fit is None else (read_vectors(fit), fit.name)
    told: dict[str, Any] = {"vectors": str(vectors), "count": len(x), "d": x.shape[1], "fitted_on": name}
    with progress_bar("study", quiet=quiet) as bar:
        if queries is None or judged is None:
            subject = own_queries(x)
        else:
            given = read_vectors(queries)
            subject = Judged(vectors=x, queries=given, relevant=read_judgements(judged, len(given), len(x)))
        points = [one.point for one in measure(asked, subject, learned, name=name, progress=bar.labelled)]
    if out is not None:
        for path in embedding_study.write(points, told, out):
            note(f"wrote {path}", quiet=quiet)
    if json:
        print_json(embedding_study.to_dict(points, told))
        return
    rows = embedding_study.rows(points, x.shape[1])
    typer.echo(format_table(embedding_study.COLUMNS, rows, right=frozenset({1, 2, 3, 4})))
    note(
        f"memwall: {len(subject.queries):,} queries against {len(subject.vectors):,} vectors; the frontier has "
        f"{len(frontier(points))} of {len(points)} forms (*)",
        quiet=quiet,
    )


def _forms(forms: str | None, queries: Path | None, judged: Path | None) -> list[Form]:
    """What is asked for; options that do not go together are refused."""
    from memwall.retrieve.embedding_storage import Form
    from memwall.retrieve.ranking import CANDIDATES

    if (queries is None) != (judged is None):
        raise InputError("--queries and --judged go together")
    asked = list(CANDIDATES) if forms is None else [Form.parse(text) for text in forms.split(",") if text.strip()]
    if not asked:
        raise InputError("--forms: name one at least, such as e4m3")
    return asked
