"""`memwall search`: the nearest vectors of an index, whichever kind it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, Threads, add_command
from memwall.cli.index import DEMO, EmbeddingModel, embedded, read_vectors
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.cli.spann import MostLists, Ratio, reads_sentence, reads_told, search_settings
from memwall.cli.tenants import search_tenant
from memwall.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from memwall.retrieve.base import Hits
    from memwall.retrieve.curator_file import CuratorFile
    from memwall.retrieve.spann import SearchSettings
    from memwall.retrieve.spann_file import SpannFile
    from memwall.retrieve.vector_file import VectorFile


def register(app: typer.Typer) -> None:
    add_command(app, "search", search)


Tenant = Annotated[
    str | None, typer.Option(help="Who asks, of an index with tenants: what it may read is searched.", metavar="NAME")
]
Scan = Annotated[
    int | None,
    typer.Option(help="With --tenant: vectors compared at most for each of --top (default: 256).", min=1, max=1 << 20),
]


def search(
    path: Annotated[Path, typer.Argument(help="What `memwall index` wrote.", metavar="INDEX")],
    queries: Annotated[
        str,
        typer.Argument(
            help="Queries [q, d] in a .npy file; of an index of texts also a text, or a .txt file with one a line.",
            metavar="QUERIES",
        ),
    ],
    *,
    top: Annotated[int, typer.Option(help="How many of the nearest.", min=1, max=10_000)] = 10,
    lists: MostLists = None,
    ratio: Ratio = None,
    tenant: Tenant = None,
    scan: Scan = None,
    model: EmbeddingModel = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Do not compare the file's digest, for which all of it is read.")
    ] = False,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The nearest vectors of an index to each query, by scores of all of them as they are stored.

    The file is mapped, and no decoded copy is made: what a search holds is about the file's size. Of an index made with
    --spann only heads are held, and the lists of near heads are read.
    """
    from memwall.memory import peak_resident_bytes
    from memwall.retrieve.curator_file import holds_tenants
    from memwall.retrieve.spann_file import is_spann
    from memwall.retrieve.vector_file import VectorFile

    if threads is not None:
        from memwall import kernels

        kernels.set_num_threads(threads)
    lists_kept, tenants_kept = is_spann(path), holds_tenants(path)
    if not lists_kept and (lists is not None or ratio is not None):
        raise InputError(f"--lists and --ratio are of indexes made with --spann; {path} is none")
    if not tenants_kept and (tenant is not None or scan is not None):
        raise InputError(f"{path}: has no tenants (`memwall index --tenants` makes such an index)")
    if lists_kept:
        _search_lists(path, queries, top, search_settings(lists, ratio), model, not unchecked, json, quiet)
        return
    if tenants_kept:
        _search_tenant(path, queries, tenant, top, scan, model, verify=not unchecked, json=json, quiet=quiet)
        return
    file = VectorFile(path, verify=not unchecked)
    asked, texts = _queries(queries, file, model, quiet)
    began = time.perf_counter()
    with progress_bar("search", quiet=quiet) as bar:
        hits = file.vectors.search(asked, top, bar.counted)
    seconds = time.perf_counter() - began
    results = _results(hits, file, texts)
    if json:
        print_json({"index": str(path), "form": str(file.vectors.fitted.form), "results": results, "seconds": seconds,
                    "index_bytes": file.vectors.nbytes, "peak_resident_bytes": peak_resident_bytes()})  # fmt: skip
        return
    _show(results, with_text=file.texts is not None)
    note(_rate(file, len(asked), seconds), quiet=quiet)


def _search_lists(
    path: Path,
    queries: str,
    top: int,
    settings: SearchSettings,
    model: str | None,
    verify: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Of an index made with --spann."""
    from memwall.memory import peak_resident_bytes
    from memwall.retrieve.spann_file import SpannFile
    from memwall.retrieve.spann_shards import ShardedIndex

    file = SpannFile(path, verify=verify)
    index = ShardedIndex.local(file, verify=verify) if file.machines else file.vectors
    asked, texts = _queries(queries, file, model, quiet)
    began = time.perf_counter()
    with progress_bar("search", quiet=quiet) as bar:
        hits, reads = index.search_counted(asked, top, settings, bar.counted)
    seconds = time.perf_counter() - began
    results = _results(hits, file, texts)
    if json:
        print_json({"index": str(path), "form": "spann", "results": results, "seconds": seconds,
                    "index_bytes": file.nbytes, "peak_resident_bytes": peak_resident_bytes(),
                    "reads": reads_told(file, reads)})  # fmt: skip
        return
    _show(results, with_text=file.texts is not None)
    note(reads_sentence(file, reads, seconds), quiet=quiet)


def _results(hits: Hits, file: VectorFile | SpannFile, texts: list[str] | None) -> list[dict[str, Any]]:
    results = []
    for number, (ids, scores) in enumerate(zip(hits.ids.tolist(), hits.scores.tolist(), strict=True)):
        found = [
            {"id": one, "score": score} | ({} if file.texts is None else {"text": file.texts[one]})
            for one, score in zip(ids, scores, strict=True)
            if one >= 0
        ]
        results.append({"query": number if texts is None else texts[number], "hits": found})
    return results


def _search_tenant(
    path: Path, queries: str, tenant: str | None, top: int, scan: int | None, model: str | None, *, verify: bool,
    json: bool, quiet: bool,
) -> None:  # fmt: skip
    from memwall.hardware.units import format_seconds
    from memwall.memory import peak_resident_bytes

    told = search_tenant(
        path, tenant, top, scan, verify=verify, queries=lambda file: _queries(queries, file, model, quiet)
    )
    if json:
        print_json({**told, "peak_resident_bytes": peak_resident_bytes()})
        return
    _show(told["results"], with_text=any("text" in hit for one in told["results"] for hit in one["hits"]))
    note(
        f"memwall: {len(told['results'])} queries in {format_seconds(told['seconds'])}, each compared with "
        f"{told['work_per_query']['vector_distances']:,.0f} of the {told['readable']:,} vectors that {tenant} may read",
        quiet=quiet,
    )


def _rate(file: VectorFile, count: int, seconds: float) -> str:
    from memwall.hardware.units import format_bytes, format_seconds

    held = file.vectors
    what = f"{held.count:,} vectors ({format_bytes(held.nbytes)} as {held.fitted.form})"
    return f"memwall: {count} queries against {what} in {format_seconds(seconds)}"


def _show(results: list[dict[str, Any]], *, with_text: bool) -> None:
    rows = [
        [
            str(one["query"])[:32],
            str(place),
            str(hit["id"]),
            f"{hit['score']:.4f}",
            *([hit["text"][:64]] if with_text else []),
        ]
        for one in results
        for place, hit in enumerate(one["hits"], 1)
    ]
    headers = ["query", "place", "id", "score", *(["text"] * with_text)]
    typer.echo(format_table(headers, rows, right=frozenset({1, 2, 3})))


def _queries(
    queries: str, file: VectorFile | SpannFile | CuratorFile, model: str | None, quiet: bool
) -> tuple[np.ndarray, list[str] | None]:
    """Vectors, and the texts that they were made of. The file's word on its model opens nothing: who asks names it."""
    if queries.endswith(".npy"):
        return read_vectors(Path(queries)), None
    if file.model is None:
        raise InputError(f"{file.path} was made of vectors, so queries are vectors too: give a .npy file")
    from memwall.formats.checked_json import shown

    if file.model != (model or DEMO):
        raise InputError(f"{file.path} was made by the model {shown(file.model)}: ask with --model and that one")
    from memwall.engine.quality import read_text

    texts = [line.strip() for line in read_text(Path(queries)).splitlines()] if queries.endswith(".txt") else [queries]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{queries!r}: holds no query")
    return embedded(texts, model or DEMO, quiet), texts
