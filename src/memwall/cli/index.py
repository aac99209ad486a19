"""`memwall index`: vectors on disk in few bytes, in lists around some of them, or in a tree that tenants share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, Threads, add_command, complete_model
from memwall.cli.printing import note, print_json, progress_bar
from memwall.cli.spann import (
    HeadShare,
    IndexOptions,
    ListPages,
    Machines,
    Packed,
    Replicas,
    Spann,
    index_spann,
)
from memwall.cli.tenants import index_tenants
from memwall.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from memwall.retrieve.embedding_storage import Fitted, Form, Metric, Point

CODECS = (
    "float32", "float16", "bfloat16", "e4m3", "e5m2", "int8", "int8-paper", "e2m1", "e2m1-vector", "e2m1-dimension",
    "binary", "signs",
)  # fmt: skip
DEFAULT_CODEC, DEMO = "e4m3", "demo"


def register(app: typer.Typer) -> None:
    add_command(app, "index", index)


Codec = Annotated[
    str | None,
    typer.Option(
        help=f"Element type: {', '.join(CODECS)} (default: {DEFAULT_CODEC}).",
        metavar="TYPE",
        autocompletion=lambda: list(CODECS),
    ),
]
Reduce = Annotated[
    str | None,
    typer.Option(
        help="Fewer dimensions first: pca, kernel-pca, projection or autoencoder, with a fraction of them or how many, "
        "such as pca:0.5 or pca:192.",
        metavar="MAP",
    ),
]
Fit = Annotated[
    Path | None,
    typer.Option(
        "--fit", help="Vectors (.npy) that maps and ranges are learned from (default: those indexed).", metavar="FILE"
    ),
]
Room = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Bytes that the index may take, such as 40MB, tables included: the best form that fits is measured on "
        "vectors of your own, or read from --points, and taken.",
        metavar="BYTES",
    ),
]
Points = Annotated[
    Path | None,
    typer.Option(help="With --memory: study.json of `memwall study embeddings` to choose by.", metavar="FILE"),
]
EmbeddingModel = Annotated[
    str | None,
    typer.Option(
        help="Model that makes vectors of texts (default: demo).", metavar="MODEL", autocompletion=complete_model
    ),
]
MetricName = Annotated[
    str,
    typer.Option(
        help="What scores are: cosine or inner (products); with --spann or --tenants cosine or l2 (squared distances, "
        "negative).",
        metavar="METRIC",
    ),
]
Tenants = Annotated[
    Path | None,
    typer.Option(
        help="Who may read what: a line for each vector with the names of its tenants, its owner first. Makes one "
        "index that all of them share; no other may find the vector.",
        metavar="FILE",
    ),
]


def index(
    vectors: Annotated[
        Path,
        typer.Argument(
            help="Vectors [n, d] in a .npy file, or a text file with a text a line, of which a model makes vectors.",
            metavar="VECTORS",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="OUT", dir_okay=False)],
    *,
    codec: Codec = None,
    reduce: Reduce = None,
    memory: Room = None,
    points: Points = None,
    fit: Fit = None,
    metric: MetricName = "cosine",
    spann: Spann = False,
    heads: HeadShare = None,
    replicas: Replicas = None,
    list_pages: ListPages = None,
    packed: Packed = False,
    machines: Machines = None,
    model: EmbeddingModel = None,
    tenants: Tenants = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Store vectors in few bytes: fewer dimensions, fewer bits of each, or whatever keeps most quality in --memory.

    A file of vectors is read a piece at a time; the index appears whole or not at all. `memwall search` reads it.
    """
    lists = IndexOptions(heads=heads, replicas=replicas, list_pages=list_pages, packed=packed, machines=machines)
    if tenants is not None:
        if spann:
            raise InputError("--spann and --tenants are two kinds of index: give one of them")
        lists.refuse()
        if any(one is not None for one in (codec, reduce, memory, points, fit)):
            raise InputError("--tenants keeps vectors as float32: leave out --codec, --reduce, --memory and --fit")
        x, texts, made_by = _vectors(vectors, model, threads, quiet)
        index_tenants(x, out, tenants, metric, texts=texts, model=made_by, json=json, quiet=quiet)
        return
    from memwall.hardware.units import format_bytes
    from memwall.retrieve.embedding_storage import Fitted
    from memwall.retrieve.vector_file import write_vectors

    if spann:
        _only_lists(reduce=reduce, points=points, fit=fit)
        x, texts, made_by = _vectors(vectors, model, threads, quiet)
        index_spann(out, x, lists, element=codec, metric=metric, memory=memory, texts=texts, model=made_by, json=json,
                    quiet=quiet)  # fmt: skip
        return
    lists.refuse()
    known: Metric = _metric(metric)
    if points is not None and memory is None:
        raise InputError("--points goes with --memory, for which a form is chosen by them")
    form = None if memory is not None else _form(codec, reduce)
    if form is None and (codec is not None or reduce is not None):
        raise InputError("--memory chooses the form: leave out --codec and --reduce, or give them without --memory")
    x, texts, made_by = _vectors(vectors, model, threads, quiet)
    learned, name = (x, vectors.name) if fit is None else (read_vectors(fit), fit.name)
    chosen = None
    if form is None:
        assert memory is not None
        form, chosen = _choose(memory, points, x, learned, name, known, quiet)
    fitted = Fitted.fit(form, learned, name=name, metric=known)
    if fitted.d != x.shape[1]:
        raise InputError(f"--fit {fit}: vectors have {fitted.d} dimensions, those of {vectors} {x.shape[1]}")
    began = time.perf_counter()
    with progress_bar("index", quiet=quiet) as bar:
        write_vectors(out, fitted, x, texts=texts, model=made_by, progress=bar.counted)
    told = _told(out, fitted, time.perf_counter() - began, chosen)
    if json:
        print_json(told)
        return
    typer.echo(f"{out}  {told['count']:,} vectors as {told['form']}, {format_bytes(told['file_bytes'])}")
    note(_sentence(told), quiet=quiet)


def _only_lists(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name} does not go with --spann, whose lists hold vectors as they are")


def _told(out: Path, fitted: Fitted, seconds: float, chosen: Point | None) -> dict[str, Any]:
    """What was written, as `--json` prints it."""
    from memwall.retrieve.vector_file import VectorFile

    file = VectorFile(out, verify=False)
    held, on = file.vectors, fitted.fitted_on
    return {
        "index": str(out), "form": str(fitted.form), "metric": fitted.metric, "count": held.count, "d": fitted.d,
        "m": fitted.m, "vector_bytes": fitted.vector_bytes, "table_bytes": fitted.table_bytes,
        "file_bytes": file.nbytes, "text_bytes": 0 if file.texts is None else file.texts.nbytes,
        "times_smaller": fitted.ratio,
        "overhead_bytes_per_vector": (file.nbytes - held.count * fitted.vector_bytes) / max(held.count, 1),
        "zero_share": held.zero_share(), "seconds": seconds,
        "fitted_on": None if on is None else {"name": on.name, "count": on.count, "sha256": on.sha256},
        "quality": None if chosen is None else chosen.quality,
    }  # fmt: skip


def _sentence(told: dict[str, Any]) -> str:
    learned = told["fitted_on"]
    return (
        f"memwall: {told['vector_bytes']} bytes a vector, {told['times_smaller']:.3g} times smaller than float32, and "
        f"{told['overhead_bytes_per_vector']:.1f} for tables, header and texts; {told['zero_share']:.1%} of the "
        "numbers are stored as zero"
        + ("" if learned is None else f"; learned from {learned['count']:,} vectors of {learned['name']}")
        + ("" if told["quality"] is None else f"; nDCG@10 {told['quality']:.4f} where it was measured")
    )


def _form(codec: str | None, reduce: str | None) -> Form:
    from memwall.retrieve.embedding_storage import Form
    from memwall.retrieve.reducers import REDUCERS

    form = Form.of(codec or DEFAULT_CODEC, reduce or "")
    if form.kind is not None and not REDUCERS[form.kind].stored:
        raise InputError(
            f"--reduce {reduce}: its map cannot be stored; take pca, kernel-pca, projection or autoencoder"
        )
    return form


def _metric(text: str) -> Any:
    if text not in ("cosine", "inner"):
        raise InputError(f"--metric {text}: choose cosine or inner")
    return text


def read_vectors(path: Path) -> np.ndarray:
    """Vectors of a .npy file, mapped; InputError for what is none."""
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy file of numbers: {str(error)[:160]}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.shape[1] == 0:
        shape = list(getattr(found, "shape", []))
        raise InputError(f"{path}: expected vectors [n, d], got {f'shape {shape}' if shape else 'several arrays'}")
    return found


def _vectors(
    path: Path, model: str | None, threads: int | None, quiet: bool
) -> tuple[np.ndarray, list[str] | None, str | None]:
    """Vectors, and where a model made them of texts, the texts and its name."""
    if threads is not None:
        from memwall import kernels

        kernels.set_num_threads(threads)
    if path.suffix == ".npy":
        if model is not None:
            raise InputError(f"--model makes vectors of texts; {path} has vectors already")
        return read_vectors(path), None, None
    from memwall.engine.quality import read_text

    texts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text; give a text a line, or vectors in a .npy file")
    return embedded(texts, model or DEMO, quiet), texts, model or DEMO


def embedded(texts: list[str], model: str, quiet: bool) -> np.ndarray:
    """Vectors of texts by a model."""
    from memwall.engine.embedding import TextEmbedder
    from memwall.models import model_directory

    embedder = TextEmbedder(model_directory(model))
    try:
        with progress_bar(f"vectors by {model}", quiet=quiet) as bar:
            return embedder.embed(texts, bar.counted)
    finally:
        embedder.close()


def _choose(
    memory: str, points: Path | None, x: np.ndarray, learned: np.ndarray, name: str, metric: Metric, quiet: bool
) -> tuple[Form, Point]:
    """The best form that fits: of points that were measured, or that are measured now."""
    from memwall.hardware.units import parse_bytes
    from memwall.retrieve.embedding_storage import Form, choose
    from memwall.retrieve.ranking import CANDIDATES, measure, own_queries, read_points

    capacity = parse_bytes(memory)
    if points is not None:
        found = read_points(points)
    else:
        forms = [form for form in CANDIDATES if metric == "cosine" or form.codec != "signs"]
        with progress_bar("measure", quiet=quiet) as bar:
            judged = own_queries(x)
            found = [
                one.point for one in measure(forms, judged, learned, name=name, metric=metric, progress=bar.labelled)
            ]
    best = choose(capacity, len(x), found)
    return Form.parse(best.form), best
