"""`memwall index --spann` and `memwall search` on what it writes: lists on disk, heads in memory, pages counted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.printing import note, print_json, progress_bar
from memwall.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    import numpy as np

    from memwall.retrieve.spann import Built, Reads, SearchSettings, SpannSettings
    from memwall.retrieve.spann_file import SpannFile

Spann = Annotated[
    bool,
    typer.Option(
        "--spann",
        help="Lists on disk around heads in memory: searches read the lists of near heads only. With --memory, heads "
        "and their graph fit in so many bytes.",
    ),
]
HeadShare = Annotated[
    float | None, typer.Option("--heads", help="With --spann: share of vectors in memory (default: 0.16).", metavar="X")
]
Replicas = Annotated[
    int | None, typer.Option(help="With --spann: lists that a vector may be in (default: 8).", metavar="N")
]
ListPages = Annotated[
    int | None, typer.Option(help="With --spann: pages of 4096 bytes of a list (default: 12).", metavar="N")
]
Packed = Annotated[
    bool, typer.Option("--packed", help="With --spann: lists packed with Zstandard, as differences from their heads.")
]
Machines = Annotated[
    int | None,
    typer.Option(
        help="With --spann: as many files of lists beside OUT (OUT.0, OUT.1, ...), each for a machine; a query asks "
        "those that hold lists it needs.",
        metavar="N",
        min=1,
        max=1024,
    ),
]
MostLists = Annotated[
    int | None,
    typer.Option("--lists", help="Of an index made with --spann: lists read at most (default: 32).", metavar="N"),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Of such an index: lists are read up to so many times the nearest head's squared distance (default: 8).",
        metavar="X",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """What `memwall index --spann` was told."""

    heads: float | None
    replicas: int | None
    list_pages: int | None
    packed: bool
    machines: int | None

    def refuse(self) -> None:
        """Without --spann they mean nothing."""
        given = {"--heads": self.heads, "--replicas": self.replicas, "--list-pages": self.list_pages,
                 "--packed": self.packed or None, "--machines": self.machines}  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name} goes with --spann")

    def settings(self, count: int, vector_bytes: int, memory: str | None) -> SpannSettings:
        from memwall.hardware.units import format_bytes, parse_bytes
        from memwall.retrieve.closure import ClosureSettings
        from memwall.retrieve.head_tree import HeadSettings
        from memwall.retrieve.spann import SpannSettings, head_bytes

        if memory is not None and self.heads is not None:
            raise InputError("--memory says how many heads there may be: leave out --heads, or --memory")
        most = None
        if memory is not None:
            each = head_bytes(vector_bytes, SpannSettings().degree, packed=self.packed)
            most = parse_bytes(memory) // each
            if most < 1:
                raise DoesNotFit(f"--memory {memory}: a head takes {format_bytes(each)}, and there must be one")
        share = HeadSettings().share if self.heads is None else self.heads
        share = share if most is None else min(max(most / max(count, 1), 1e-9), share)
        closure = ClosureSettings() if self.replicas is None else ClosureSettings(replicas=self.replicas)
        pages = SpannSettings().page_limit if self.list_pages is None else self.list_pages
        return SpannSettings(heads=HeadSettings(share=share, most=most), closure=closure, page_limit=pages,
                             delta=self.packed, compress=self.packed)  # fmt: skip


def index_spann(
    out: Path,
    vectors: np.ndarray,
    options: IndexOptions,
    *,
    element: str | None,
    metric: str,
    memory: str | None,
    texts: list[str] | None,
    model: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Builds and writes, and says what came of it."""
    from memwall.hardware.units import format_bytes
    from memwall.retrieve.spann import build
    from memwall.retrieve.spann_file import SpannFile, prepared, write_spann
    from memwall.retrieve.spann_shards import owners, write_shards

    if metric not in ("cosine", "l2"):
        raise InputError(f"--metric {metric}: lists are read by distance; choose cosine or l2")
    if not len(vectors):
        raise InputError("no vectors to index: give one at least")
    known: Any = metric
    began = time.perf_counter()
    with prepared(vectors, known, out, element) as held:
        settings = options.settings(len(held), held.shape[1] * held.dtype.itemsize, memory)
        with progress_bar("lists", quiet=quiet) as bar:
            built = build(held, settings, bar.counted)
        with progress_bar("write", quiet=quiet) as bar:
            if options.machines is None:
                write_spann(out, built, metric=known, texts=texts, model=model, progress=bar.counted)
                made = []
            else:
                owner = owners(built.graph.vectors, options.machines)
                made = write_shards(out, built, owner, metric=known, texts=texts, model=model, progress=bar.counted)
    told = _told(SpannFile(out), [SpannFile(path) for path in made], built, time.perf_counter() - began)
    if json:
        print_json(told)
        return
    typer.echo(
        f"{out}  {told['count']:,} vectors, {told['heads']:,} of them heads: {format_bytes(told['resident_bytes'])} in "
        f"memory, {format_bytes(told['list_bytes'])} of lists on disk"
    )
    cut = f"; {told['cut']:,} entries cut, {told['orphans']:,} vectors in no list" if told["cut"] else ""
    note(
        f"memwall: a vector is in {told['replicas']:.2f} lists, a list holds {told['mean_list']:.1f} vectors "
        f"on average and {told['longest_list']} at most{cut}",
        quiet=quiet,
    )


def _told(file: SpannFile, machines: list[SpannFile], built: Built, seconds: float) -> dict[str, Any]:
    """machines: files with its lists, none where it holds them itself."""
    lengths = built.lists.lengths
    held, with_lists = file.vectors, machines or [file]
    return {
        "index": str(file.path), "form": "spann", "metric": held.metric, "count": held.count, "d": held.dimensions,
        "element": file.lists.format.dtype.name, "heads": len(held.head_ids), "resident_bytes": held.resident_bytes,
        "list_bytes": sum(one.lists.directory.total_bytes for one in with_lists),
        "file_bytes": file.nbytes + sum(one.nbytes for one in machines),
        "machines": [str(one.path) for one in machines],
        "text_bytes": 0 if file.texts is None else file.texts.nbytes, "mean_list": float(lengths.mean()),
        "longest_list": int(lengths.max()), "replicas": len(built.lists.members) / max(held.count - len(lengths), 1),
        "cut": built.lists.cut, "orphans": built.lists.orphans, "seconds": seconds,
    }  # fmt: skip


# ---- search --------------------------------------------------------------------------------------------------------


def search_settings(lists: int | None, ratio: float | None) -> SearchSettings:
    """Of what was told, and defaults; the budget grows with the lists."""
    from memwall.retrieve.spann import SearchSettings

    plain = SearchSettings()
    most = plain.lists if lists is None else lists
    return SearchSettings(lists=most, ratio=plain.ratio if ratio is None else ratio, budget=max(plain.budget, most))


def reads_told(file: SpannFile, reads: Reads) -> dict[str, Any]:
    """Of all queries, for `--json`."""
    reader = file.lists.reader
    machines = {} if reads.machines is None else {"machines": reads.machines.tolist()}
    return machines | {
        "pages": reads.pages.tolist(), "lists": reads.lists.tolist(), "read_bytes": reads.nbytes.tolist(),
        "rounds": int(reads.rounds.max(initial=0)), "compared": reads.compared.tolist(), "direct": reader.direct,
        "resident_bytes": file.vectors.resident_bytes,
    }  # fmt: skip


def reads_sentence(file: SpannFile, reads: Reads, seconds: float) -> str:
    from memwall.hardware.units import format_bytes, format_seconds

    count, held = max(len(reads.pages), 1), file.vectors
    asked = "" if reads.machines is None else f" from {reads.machines.sum() / count:.1f} of {file.machines} machines"
    how = "" if file.lists.reader.direct else f"; {file.lists.reader.note}"
    return (
        f"memwall: {len(reads.pages)} queries against {held.count:,} vectors in {format_seconds(seconds)}; a query "
        f"read {reads.lists.sum() / count:.1f} lists, {reads.pages.sum() / count:.1f} pages{asked} "
        f"({format_bytes(int(reads.nbytes.sum() / count))}) in {int(reads.rounds.max(initial=0))} round; "
        f"{format_bytes(held.resident_bytes)} of {format_bytes(file.nbytes)} are in memory{how}"
    )
