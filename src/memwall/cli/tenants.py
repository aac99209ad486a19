"""`memwall index --tenants`, `search --tenant` and `memwall tenants`: one index that many tenants share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from memwall.retrieve.curator import Curator

_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)
_MOST_LABELS = 1 << 28


def register(app: typer.Typer) -> None:
    add_command(app, "tenants", tenants)


def read_tenants(path: Path, count: int) -> list[list[str]]:
    """Who may read each of `count` vectors: a line each, names between spaces or commas, the owner first."""
    from memwall.engine.quality import read_text

    lines = [line.replace(",", " ").split() for line in read_text(path).splitlines()]
    if len(lines) != count:
        raise InputError(
            f"--tenants {path}: has {len(lines):,} lines for {count:,} vectors; give a line for each, with the names "
            "of those who may read it (an empty line: nobody)"
        )
    return lines


def index_tenants(
    vectors: np.ndarray, out: Path, readers: Path, metric: str, *, texts: list[str] | None, model: str | None,
    json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Makes and writes the index, and says what it takes."""
    from memwall.hardware.units import format_bytes
    from memwall.retrieve.curator import METRICS, Curator
    from memwall.retrieve.curator_file import write_curator

    if metric not in METRICS:
        raise InputError(f"--metric {metric}: an index with tenants has {' or '.join(METRICS)}")
    names = read_tenants(readers, len(vectors))
    if not len(vectors):
        raise InputError("an index with tenants learns its tree from vectors, and there are none")
    began = time.perf_counter()
    known: Any = metric
    with progress_bar("tree", quiet=quiet) as bar:
        index = Curator.train(vectors, metric=known, progress=bar.counted)
    with progress_bar("index", quiet=quiet) as bar:
        index.add(vectors, readers=names, progress=bar.counted)
    with progress_bar("write", quiet=quiet) as bar:
        write_curator(out, index, text=None if texts is None else texts.__getitem__, model=model, progress=bar.counted)
    told = _told(out, index) | {"seconds": time.perf_counter() - began}
    if json:
        print_json(told)
        return
    typer.echo(
        f"{out}  {told['count']:,} vectors for {told['tenants']:,} tenants, {told['permissions']:,} permissions, "
        f"{format_bytes(told['file_bytes'])}"
    )
    note(
        f"memwall: beside the vectors {format_bytes(told['beside_bytes'])} in memory, "
        f"{told['beside_bytes'] / max(told['vector_bytes'], 1):.1%} of them",
        quiet=quiet,
    )


def _told(path: Path, index: Curator) -> dict[str, Any]:
    held = index.bytes()
    vectors = index.count * index.dimensions * 4
    return {
        "index": str(path), "count": index.count, "d": index.dimensions, "metric": index.metric,
        "tenants": len(index.tenants), "permissions": sum(index.of(name).count for name in index.tenants),
        "file_bytes": path.stat().st_size, "vector_bytes": vectors, "bytes": held,
        "beside_bytes": sum(held[part] for part in ("tree", "filters", "lists", "access", "labels")),
    }  # fmt: skip


def search_tenant(
    path: Path, tenant: str | None, top: int, scan: int | None, *, verify: bool,
    queries: Callable[[Any], tuple[np.ndarray, list[str] | None]],
) -> dict[str, Any]:  # fmt: skip
    """What `memwall search` prints of such an index. queries: vectors and texts of the queries, for an opened file."""
    from memwall.retrieve.curator import Effort
    from memwall.retrieve.curator_file import CuratorFile

    if tenant is None:
        raise InputError(f"{path}: is shared by tenants: say with --tenant who asks")
    file = CuratorFile(path, verify=verify)
    file.index.number(tenant)
    asked, texts = queries(file)
    began = time.perf_counter()
    hits, work = file.index.search_with_work(asked, top, tenant, Effort(scan_factor=scan))
    seconds = time.perf_counter() - began
    results = []
    for number, (ids, scores) in enumerate(zip(hits.ids.tolist(), hits.scores.tolist(), strict=True)):
        found = [
            {"id": one, "score": score} | ({} if file.text is None else {"text": file.text(one)})
            for one, score in zip(ids, scores, strict=True)
            if one >= 0
        ]
        results.append({"query": number if texts is None else texts[number], "hits": found})
    mean = {name: float(getattr(work, name).mean()) if len(asked) else 0.0 for name in work.__slots__}
    return {
        "index": str(path), "tenant": tenant, "readable": file.index.of(tenant).count, "count": file.index.count,
        "results": results, "seconds": seconds, "work_per_query": mean,
    }  # fmt: skip


# ---- changes -------------------------------------------------------------------------------------------------------

Pairs = Annotated[
    list[str] | None,
    typer.Option(help="Let NAME read vectors, such as team:3,10-19; may be given again.", metavar="NAME:IDS"),
]
Taken = Annotated[
    list[str] | None,
    typer.Option(help="No longer let NAME read vectors (NAME:all: any); may be given again.", metavar="NAME:IDS"),
]


def tenants(
    path: Annotated[Path, typer.Argument(help="What `memwall index --tenants` wrote.", metavar="INDEX")],
    *,
    grant: Pairs = None,
    revoke: Taken = None,
    delete: Annotated[
        str | None, typer.Option(help="Remove vectors for everybody, such as 3,10-19.", metavar="IDS")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="With --delete: the tenant who asks, who must own them (default: you run it).", metavar="NAME"
        ),
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Who may read how much of a shared index; with --grant, --revoke or --delete change that.

    Changes are made in this order: grants, revocations, deletions. The file is replaced whole, or not at all.
    """
    from memwall.retrieve.curator_file import CuratorFile, write_curator

    if by is not None and delete is None:
        raise InputError("--by goes with --delete: it says who asks for it")
    file = CuratorFile(path)
    index = file.index
    changed = {"granted": 0, "revoked": 0, "deleted": 0}
    for text in grant or []:
        name, labels = _pair(text, "--grant")
        changed["granted"] += index.grant(labels, name)
    for text in revoke or []:
        name, labels = _pair(text, "--revoke", index)
        changed["revoked"] += index.revoke(labels, name)
    if delete is not None:
        changed["deleted"] += index.delete(_ids(delete, f"--delete {delete}"), by=by)
    if grant or revoke or delete is not None:
        with progress_bar("write", quiet=quiet) as bar:
            write_curator(path, index, text=file.text, model=file.model, progress=bar.counted)
    counts = {name: index.of(name).count for name in index.tenants}
    if json:
        print_json({**_told(path, index), "readable": counts, **changed})
        return
    rows = [[name, f"{count:,}", f"{count / max(index.count, 1):.1%}"] for name, count in counts.items()]
    typer.echo(format_table(["tenant", "vectors", "share"], rows, right=frozenset({1, 2})))
    if any(changed.values()):
        note("memwall: " + ", ".join(f"{number:,} {name}" for name, number in changed.items()), quiet=quiet)


def _pair(text: str, option: str, index: Curator | None = None) -> tuple[str, np.ndarray]:
    name, colon, ids = text.partition(":")
    if not colon or not name:
        raise InputError(f"{option} {text}: write a name, a colon and numbers of vectors, such as team:3,10-19")
    if ids == "all" and index is not None:
        return name, index.readable(name)
    return name, _ids(ids, f"{option} {text}")


def _ids(text: str, what: str) -> np.ndarray:
    import numpy as np

    parts = []
    for one in text.split(","):
        match = _RANGE.fullmatch(one.strip())
        if match is None:
            raise InputError(f"{what}: {one.strip()[:40]!r} is no number of a vector and no range such as 10-19")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + _MOST_LABELS:
            raise InputError(f"{what}: {one.strip()} goes nowhere, or over more than {_MOST_LABELS:,} vectors")
        parts.append(np.arange(first, last + 1, dtype=np.int64))
    return np.unique(np.concatenate(parts))
