"""An index of lists around heads as one file: what a search keeps in memory, and pages of lists that it reads directly.

    metadata `memwall-spann`: JSON with version, element, d, count, heads, degree, metric, how lists are coded, model
    lists           uint8: header, records and lists as `list_file` has them; begins at a multiple of 4096 bytes
    text_ends, texts  of vectors that were made of texts, as in `vector_file`
    heads           [h, d] of the element
    head_ids, edges, pivots, pivot_ends, seeds  int32: places of heads, their graph
    checks          uint32 [h]: CRC-32 of each list, compared whenever a list is read
    dictionary      of compressed lists
    sha256          32 bytes: of the metadata, of header and records, and of all other tensors but texts and lists

Opening reads what stays in memory and nothing else: lists are read by searches, around the page cache. A reader checks
sizes against the file's, every place against the tables, and the digest before it searches.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter, build_header
from memwall.kernels.vector_search import ELEMENTS, VectorGraph
from memwall.memory.direct_reader import DirectReader
from memwall.retrieve.base import checked_vectors, unit
from memwall.retrieve.closure import Progress
from memwall.retrieve.list_file import (
    LIST_PAGE_BYTES,
    Directory,
    ListFormat,
    checksum,
    learned_dictionary,
    placed,
)
from memwall.retrieve.spann import Built, ListReader, SpannIndex, SpannMetric
from memwall.retrieve.vector_file import MOST_DIMENSIONS, Texts, text_arrays

KEY, VERSION = "memwall-spann", 1
_CHECKED_AT_ONCE = 8192
_RESIDENT = ("heads", "head_ids", "edges", "pivots", "pivot_ends", "seeds", "checks", "dictionary")
_DICTIONARY_BYTES, _LISTS_LEARNED = 1 << 16, 2000


@contextmanager
def prepared(x: np.ndarray, metric: SpannMetric, beside: Path, element: str | None = None) -> Iterator[np.ndarray]:
    """Vectors as they are stored: checked, of an element, and for cosines of length 1. Those that already are stay
    where they lie; others go to a file beside `beside` while they are needed: they may be more than memory holds.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise InputError(f"expected vectors [n, d], got shape {list(x.shape)}")
    whole = x.dtype.name in ("int8", "uint8")
    kind = element or (x.dtype.name if whole else "float32")
    if kind not in ELEMENTS:
        raise InputError(f"lists hold {', '.join(ELEMENTS)}; no {kind}")
    if kind in ("int8", "uint8") and (metric == "cosine" or kind != x.dtype.name):
        raise InputError(f"vectors of {kind} are searched as they are: give vectors of that type and --metric l2")
    pieces = range(0, len(x), _CHECKED_AT_ONCE)
    ready = x.dtype.name == kind and x.flags.c_contiguous
    for begin in pieces if not whole else ():
        part = checked_vectors(x[begin : begin + _CHECKED_AT_ONCE], None, "vectors", begin)
        if metric == "cosine":
            lengths = np.linalg.norm(part, axis=1)
            if (lengths == 0).any():
                at = begin + int(np.argmin(lengths))
                raise InputError(f"vector {at} is all zeros, which has no cosine: leave it out, or take --metric l2")
            ready &= bool(np.abs(lengths - 1).max(initial=0) < 1e-5)
    if ready:
        yield x
        return
    with tempfile.TemporaryFile(dir=beside.parent) as file:
        for begin in pieces:
            part = np.asarray(x[begin : begin + _CHECKED_AT_ONCE])
            part = part if whole else checked_vectors(part, None, "vectors", begin)
            (unit(part) if metric == "cosine" else part).astype(kind).tofile(file)
        file.flush()
        if not len(x):
            yield np.zeros(x.shape, kind)
            return
        yield np.memmap(file, kind, "r", shape=x.shape)


def write_spann(
    path: Path,
    built: Built,
    *,
    metric: SpannMetric,
    texts: Sequence[str] | None = None,
    model: str | None = None,
    machines: int = 0,
    progress: Progress | None = None,
) -> Directory:
    """Writes an index, which appears whole or not at all; gives where its lists lie. machines: that hold the lists of
    an index whose own are empty (`spann_shards`).
    """
    coded = _with_dictionary(built)
    lengths = built.lists.lengths
    nbytes = lengths * coded.entry_bytes
    if coded.compress:
        nbytes = np.array([len(_encoded(built, coded, at)) for at in range(len(lengths))], np.int64)
    directory = placed(
        lengths, nbytes, num_vectors=len(built.vectors), dimensions=built.vectors.shape[1],
        entry_bytes=coded.entry_bytes, compressed=coded.compress,
    )  # fmt: skip
    arrays = {
        "heads": built.graph.vectors, "head_ids": built.head_ids, "edges": built.graph.edges,
        "pivots": built.graph.pivots, "pivot_ends": built.graph.pivot_ends, "seeds": built.graph.seeds,
        "dictionary": np.frombuffer(coded.dictionary, np.uint8),
    }  # fmt: skip
    beside = {} if texts is None else text_arrays(texts)
    told = json.dumps(_told(built, coded, metric, model, machines), ensure_ascii=False)
    every = {**arrays, **beside, "checks": np.zeros(len(lengths), np.uint32), "sha256": np.zeros(32, np.uint8)}
    specs: list[tuple[str, Any, Sequence[int]]] = [("lists", np.uint8, (directory.total_bytes,))]
    specs += sorted(((n, a.dtype, a.shape) for n, a in every.items()), key=lambda one: -np.dtype(one[1]).itemsize)
    metadata = {KEY: told, "padding": ""}
    metadata["padding"] = " " * (-len(build_header(specs, metadata, as_given=True)[0]) % LIST_PAGE_BYTES)
    with SafetensorsWriter(path, specs, metadata, as_given=True) as writer:
        arrays["checks"] = _write_lists(writer, built, coded, directory, progress)
        for name, array in (arrays | beside).items():
            writer.write(name, array)
        writer.write("sha256", _digest(told, directory, arrays))
    return directory


def _write_lists(
    writer: SafetensorsWriter, built: Built, coded: ListFormat, directory: Directory, progress: Progress | None
) -> np.ndarray:
    """In the order of their places; gives the checksums."""
    writer.write("lists", directory.to_bytes())
    rows = directory.records
    checks = np.full(len(rows), checksum(b""), np.uint32)
    order = np.lexsort((rows["place"], rows["page"]))
    now = 0
    for done, at in enumerate(order.tolist(), 1):
        if rows["count"][at]:
            stored = _encoded(built, coded, at)
            checks[at] = checksum(stored)
            start = int(rows["page"][at]) * LIST_PAGE_BYTES + int(rows["place"][at])
            writer.write("lists", bytes(start - now) + stored)
            now = start + len(stored)
        if progress is not None and done % 1024 == 0:
            progress(done, len(order))
    writer.write("lists", bytes(directory.total_bytes - directory.first_page * LIST_PAGE_BYTES - now))
    return checks


def _encoded(built: Built, coded: ListFormat, at: int) -> bytes:
    members = built.lists[at]
    return coded.encode(members, built.vectors[members], built.graph.vectors[at]) if len(members) else b""


def _with_dictionary(built: Built) -> ListFormat:
    coded = built.format
    if not coded.compress:
        return coded
    plain = replace(coded, compress=False)
    step = max(len(built.lists.ends) // _LISTS_LEARNED, 1)
    some = [_encoded(built, plain, at) for at in range(0, len(built.lists.ends), step)]
    return replace(coded, dictionary=learned_dictionary(some, _DICTIONARY_BYTES))


def _told(built: Built, coded: ListFormat, metric: SpannMetric, model: str | None, machines: int) -> dict[str, Any]:
    told = {
        "version": VERSION, "element": coded.dtype.name, "d": coded.dimensions, "count": len(built.vectors),
        "heads": len(built.head_ids), "degree": built.settings.degree, "metric": metric, "ids_last": coded.ids_last,
        "delta": coded.delta, "compress": coded.compress,
    }  # fmt: skip
    return told | ({} if model is None else {"model": model}) | ({"machines": machines} if machines else {})


def _digest(told: str, directory: Directory, arrays: dict[str, np.ndarray]) -> np.ndarray:
    whole = hashlib.sha256(told.encode())
    whole.update(directory.to_bytes())
    for name in _RESIDENT:
        whole.update(np.ascontiguousarray(arrays[name]).data)
    return np.frombuffer(whole.digest(), np.uint8)


def is_spann(path: Path) -> bool:
    """Whether a file is such an index; InputError where it is no safetensors file."""
    with SafetensorsFile(path) as file:
        return KEY in file.metadata


class SpannFile:
    """An opened index. vectors: what is searched; texts, model: None where there are none. machines: that hold its
    lists, 0 where it holds them itself.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """verify: compare the digest of what is resident, and the checksum of every list that is read."""
        self.path, self._file = path, SafetensorsFile(path)
        text = self._file.metadata.get(KEY)
        if text is None:
            raise InputError(f"{path}: holds no lists around heads (`memwall index --spann` writes such files)")
        fields = Fields(checked_json.parse(text.encode(), f"{path}: {KEY}", max_depth=4), f"{path}: {KEY}")
        coded, count, heads, degree, metric = _read_header(fields)
        self.model = fields.text("model") if fields.has("model") else None
        self.machines = fields.integer("machines", 0, 1 << 16, 0)
        arrays = self._resident(coded, heads, degree)
        start = self._file.info("lists").start
        if self._file.info("lists").dtype != "U8" or start % LIST_PAGE_BYTES:
            raise InputError(f"{path}: its lists are no bytes from a multiple of {LIST_PAGE_BYTES} on (at {start})")
        coded = replace(coded, dictionary=arrays["dictionary"].tobytes())
        directory = Directory.parse(self._file.alone("lists"), coded.entry_bytes, coded.compress, f"{path}: lists")
        if (len(directory.records), directory.num_vectors, directory.dimensions) != (heads, count, coded.dimensions):
            raise InputError(
                f"{path}: lists tell of {len(directory.records)} lists of {directory.num_vectors} vectors of "
                f"{directory.dimensions}, its header of {heads}, {count} and {coded.dimensions}"
            )
        if verify and not np.array_equal(_digest(text, directory, arrays), self._file.tensor("sha256")):
            raise InputError(f"{path}: its bytes are not those that were written (the digest differs)")
        self._check(arrays, count, heads)
        self.texts = self._texts(count) if "texts" in self._file else None
        graph = VectorGraph(*(arrays[name] for name in ("heads", "edges", "pivots", "pivot_ends", "seeds")))
        self.lists = ListReader(
            DirectReader(path), start + directory.first_page * LIST_PAGE_BYTES, directory, coded,
            arrays["checks"] if verify else None,
        )  # fmt: skip
        self.vectors = SpannIndex(lists=self.lists, graph=graph, head_ids=arrays["head_ids"], metric=metric)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._file.nbytes

    def close(self) -> None:
        self.lists.reader.close()
        self._file.close()

    def _resident(self, coded: ListFormat, heads: int, degree: int) -> dict[str, np.ndarray]:
        """Copies of what stays in memory: no page of the file is kept for it."""
        number = np.dtype(np.int32)
        wanted: dict[str, tuple[tuple[int, ...] | None, np.dtype[Any]]] = {
            "heads": ((heads, coded.dimensions), coded.dtype), "head_ids": ((heads,), number),
            "edges": ((heads, degree), number), "pivots": (None, number), "pivot_ends": (None, number),
            "seeds": (None, number), "checks": ((heads,), np.dtype(np.uint32)),
            "dictionary": (None, np.dtype(np.uint8)), "sha256": ((32,), np.dtype(np.uint8)),
        }  # fmt: skip
        for name, (shape, dtype) in wanted.items():
            info = self._file.info(name)
            if info.numpy_dtype != dtype or (info.shape != shape if shape else len(info.shape) != 1):
                raise InputError(
                    f"{self.path}: tensor {name} is {info.numpy_dtype}{list(info.shape)}; its header says "
                    f"{dtype}{list(shape) if shape else '[n]'}"
                )
        others = set(self._file.names()) - set(wanted) - {"lists", "texts", "text_ends"}
        if others:
            raise InputError(f"{self.path}: unknown tensors {', '.join(map(checked_json.shown, sorted(others)[:4]))}")
        return {name: np.array(self._file.alone(name)) for name in _RESIDENT}

    def _check(self, arrays: dict[str, np.ndarray], count: int, heads: int) -> None:
        """Every place that a search goes to."""
        bounds = {"head_ids": (0, count), "edges": (-1, heads), "pivots": (0, heads), "seeds": (0, heads),
                  "pivot_ends": (0, len(arrays["seeds"]) + 1)}  # fmt: skip
        for name, (low, high) in bounds.items():
            if arrays[name].size and not (low <= arrays[name].min() and arrays[name].max() < high):
                raise InputError(f"{self.path}: tensor {name} has numbers outside of {low} to {high - 1}")
        if len(arrays["pivots"]) != len(arrays["pivot_ends"]) or (np.diff(arrays["pivot_ends"]) < 0).any():
            raise InputError(f"{self.path}: pivot_ends do not divide the seeds among the pivots")
        if heads and not len(arrays["pivots"]):
            raise InputError(f"{self.path}: has no pivots for searches to begin at")
        if arrays["heads"].dtype.kind == "f" and not np.isfinite(arrays["heads"]).all():
            raise InputError(f"{self.path}: tensor heads has NaN or infinite numbers")

    def _texts(self, count: int) -> Texts:
        ends, blob = np.array(self._file.tensor("text_ends")), self._file.tensor("texts")
        fine = ends.shape == (count,) and ends.dtype == np.int64 and blob.dtype == np.uint8 and blob.ndim == 1
        if not fine or (count and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(blob))):
            raise InputError(f"{self.path}: text_ends do not divide the {blob.size:,} bytes of texts")
        return Texts(blob, ends)


def _read_header(fields: Fields) -> tuple[ListFormat, int, int, int, SpannMetric]:
    fields.only(
        "version", "element", "d", "count", "heads", "degree", "metric", "ids_last", "delta", "compress", "model",
        "machines",
    )  # fmt: skip
    if fields.integer("version", 1, 1 << 16) != VERSION:
        raise fields.error("version", fields.values["version"], f"{VERSION}, the one this memwall reads")
    count = fields.integer("count", 0, (1 << 31) - 1)
    coded = ListFormat(
        dtype=np.dtype(fields.text("element", choices=ELEMENTS)), dimensions=fields.integer("d", 1, MOST_DIMENSIONS),
        ids_last=fields.flag("ids_last", False), delta=fields.flag("delta", False),
        compress=fields.flag("compress", False),
    )  # fmt: skip
    metric: Any = fields.text("metric", choices=get_args(SpannMetric))
    return coded, count, fields.integer("heads", 0, max(count, 1)), fields.integer("degree", 1, 1024), metric
