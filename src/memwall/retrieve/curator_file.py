"""A shared index of many tenants as a file: one safetensors file, whose vectors are searched where they lie in it.

    metadata `memwall-tenants`: JSON with version, d, count, metric, settings, tenants (their names, by number),
    next_label, model (of texts)
    vectors         float32 [count, d], of length 1 with the metric `cosine`
    labels, owners, leaves   int64, int32 (-1: no owner), int32 [count]
    access, access_ends      uint32: numbers of the tenants that may read each vector, rising; int64 [count]: their ends
    centroids, spreads, parents   float32 [nodes, d], [nodes], int32 [nodes]: the tree, level by level
    filters                  uint64 [nodes that are no leaves, words]
    list_nodes, list_tenants, list_ends, list_ids   of each short list int32, int32, int64; uint32 places of vectors
    texts, text_ends, sha256   as in `vector_file`

A reader takes nothing on trust: sizes are checked before anything is made of them, and the tree is rebuilt and checked
as a whole: that each short list names just what its tenant may read there, and that every permission leads to its
vector once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.retrieve.cluster_tree import ClusterTree, TreeShape
from memwall.retrieve.curator import METRICS, MOST_TENANTS, Curator, CuratorSettings
from memwall.retrieve.vector_file import (
    DIGEST,
    MOST_DIMENSIONS,
    MOST_VECTORS,
    Texts,
    digest_of,
    text_arrays,
    verify_digest,
)

KEY, VERSION = "memwall-tenants", 1
_AT_ONCE = 1 << 13
_KINDS = {
    "vectors": np.float32, "labels": np.int64, "owners": np.int32, "leaves": np.int32, "access": np.uint32,
    "access_ends": np.int64, "centroids": np.float32, "spreads": np.float32, "parents": np.int32,
    "filters": np.uint64,
    "list_nodes": np.int32, "list_tenants": np.int32, "list_ends": np.int64, "list_ids": np.uint32, DIGEST: np.uint8,
}  # fmt: skip
_TEXT_KINDS = {"texts": np.uint8, "text_ends": np.int64}


def write_curator(
    path: Path,
    index: Curator,
    *,
    text: Callable[[int], str] | None = None,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """The file appears whole or not at all. text: of a label, where vectors were made of texts; model: by what."""
    held = index.tree.state()
    labels = held["labels"]
    held["filters"] = held["filters"].reshape(-1, index.settings.filter_words)
    held |= {name: getattr(index.clusters, name) for name in ClusterTree.__slots__}
    if text is not None:
        held |= text_arrays([text(label) for label in labels.tolist()])
    settings = dataclasses.asdict(index.settings)
    told: dict[str, Any] = {"version": VERSION, "d": index.dimensions, "count": len(labels), "metric": index.metric,
                            "settings": settings, "tenants": index.tenants, "next_label": index.next_label}  # fmt: skip
    header = json.dumps(told if model is None else {**told, "model": model}, ensure_ascii=False)
    digests = {name: hashlib.sha256(np.ascontiguousarray(array).data) for name, array in held.items()}
    digests["vectors"] = hashlib.sha256()
    specs = [(name, array.dtype, array.shape) for name, array in held.items()]
    specs += [("vectors", np.dtype(np.float32), (len(labels), index.dimensions)), (DIGEST, np.dtype(np.uint8), (32,))]
    with SafetensorsWriter(path, specs, {KEY: header}) as writer:
        for name, array in held.items():
            writer.write(name, array)
        for start in range(0, len(labels), _AT_ONCE):
            part = index.vectors(labels[start : start + _AT_ONCE])
            writer.write("vectors", part)
            digests["vectors"].update(part.data)
            if progress is not None:
                progress(start + len(part), len(labels))
        writer.write(DIGEST, digest_of(header, {name: one.digest() for name, one in digests.items()}))


def holds_tenants(path: Path) -> bool:
    """Whether a file is one of these, by its metadata alone; InputError for what is no safetensors file."""
    with SafetensorsFile(path) as file:
        return KEY in file.metadata


class CuratorFile:
    """An opened file. index: its vectors lie in the file until they change; model: None where there is none."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """verify: also compare the digest, for which the whole file is read."""
        self.path, self._file = path, SafetensorsFile(path)
        text = self._file.metadata.get(KEY)
        if text is None:
            raise InputError(f"{path}: holds no tenants of memwall (`memwall index --tenants` writes such files)")
        fields = Fields(checked_json.parse(text.encode(), f"{path}: {KEY}", max_depth=4), f"{path}: {KEY}")
        fields.only("version", "d", "count", "metric", "settings", "tenants", "next_label", "model")
        if fields.integer("version", 1, 1 << 16) != VERSION:
            raise fields.error("version", fields.values["version"], f"{VERSION}, the one this memwall reads")
        d, count = fields.integer("d", 1, MOST_DIMENSIONS), fields.integer("count", 0, MOST_VECTORS)
        metric: Any = fields.text("metric", choices=METRICS)
        settings, tenants = _settings(fields), fields.items("tenants", MOST_TENANTS)
        self.model = fields.text("model") if fields.has("model") else None
        self._check(d, count, settings.filter_words)
        if verify:
            verify_digest(self._file, text)
        self.index = self._index(settings, metric, tenants)
        self.index.next_label = fields.integer("next_label", 0, 1 << 62)
        self.labels = np.array(self._file.tensor("labels"))
        if len(self.labels) and self.labels.max() >= self.index.next_label:
            raise InputError(f"{path}: next_label {self.index.next_label} is not above all labels")
        self._order = np.argsort(self.labels, kind="stable")
        self._texts = self._read_texts() if "texts" in self._file else None

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._file.nbytes

    @property
    def text(self) -> Callable[[int], str] | None:
        """The text of a label that is in the file, where vectors were made of texts."""
        texts = self._texts
        if texts is None:
            return None

        def of(label: int) -> str:
            place = int(self._order[np.searchsorted(self.labels, label, sorter=self._order)])
            return str(texts[place])

        return of

    def _check(self, d: int, count: int, words: int) -> None:
        held = set(self._file.names())
        wanted = _KINDS | (_TEXT_KINDS if "texts" in held else {})
        if held != set(wanted):
            names = ", ".join(map(checked_json.shown, sorted(held ^ set(wanted))[:4]))
            raise InputError(f"{self.path}: tensors that are missing or unknown: {names}")
        shapes = {name: self._file.info(name).shape for name in wanted}
        nodes = shapes["parents"][0] if shapes["parents"] else 0
        inner = shapes["filters"][0] if shapes["filters"] else 0  # which must be right when the tree is restored
        lists = shapes["list_nodes"][0] if shapes["list_nodes"] else 0
        expected: dict[str, tuple[int, ...]] = {
            "vectors": (count, d), "centroids": (nodes, d), "spreads": (nodes,), "parents": (nodes,),
            "filters": (inner, words), "list_nodes": (lists,), "list_tenants": (lists,), "list_ends": (lists,),
            DIGEST: (32,),
        }  # fmt: skip
        expected |= dict.fromkeys(("labels", "owners", "leaves", "access_ends", "text_ends"), (count,))
        for name, kind in wanted.items():
            shape, dtype = expected.get(name, shapes[name]), np.dtype(kind)
            if shapes[name] != shape or len(shape) == 0 or self._file.info(name).numpy_dtype != dtype:
                raise InputError(
                    f"{self.path}: tensor {name} is {self._file.info(name).dtype}{list(shapes[name])}; its header and "
                    f"the others say {dtype}{list(shape)}"
                )

    def _index(self, settings: CuratorSettings, metric: Any, tenants: list[Any]) -> Curator:
        held = {name: np.array(self._file.tensor(name)) for name in _KINDS if name not in ("vectors", DIGEST)}
        for name in ("centroids", "spreads"):
            if not np.isfinite(held[name]).all():
                raise InputError(f"{self.path}: tensor {name} has NaN or infinite numbers")
        clusters = ClusterTree(**{name: held.pop(name) for name in ClusterTree.__slots__})
        index = Curator(clusters, settings, metric)
        seen: set[str] = set()
        for name in tenants:
            if not isinstance(name, str) or name in seen:
                raise InputError(f"{self.path}: tenants are different names, got {checked_json.shown(name)}")
            seen.add(name)
            index.add_tenant(name)
        named = [held[name] for name in ("access", "owners", "list_tenants")]
        most = max((int(array.max()) for array in named if len(array)), default=-1)
        if most >= len(tenants):
            raise InputError(f"{self.path}: names tenant {most}, but there are {len(tenants)}")
        filters = held.pop("filters").reshape(-1)
        try:
            index.tree.restore(self._file.tensor("vectors"), filters=filters, **held)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from None
        return index

    def _read_texts(self) -> Texts:
        ends, blob = np.array(self._file.tensor("text_ends")), self._file.tensor("texts")
        if blob.ndim != 1 or (len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(blob))):
            raise InputError(f"{self.path}: text_ends do not divide the {len(blob):,} bytes of texts")
        return Texts(blob, ends)


def _settings(fields: Fields) -> CuratorSettings:
    found = fields.mapping("settings")
    inner = Fields(found, f"{fields.source}: settings")
    names = [field.name for field in dataclasses.fields(CuratorSettings)]
    inner.only(*names)
    shape = Fields(inner.mapping("shape"), f"{fields.source}: settings: shape")
    shape.only(*(field.name for field in dataclasses.fields(TreeShape)))
    numbers = {field.name: shape.integer(field.name, 0, 1 << 31) for field in dataclasses.fields(TreeShape)}
    wholes = {name: inner.integer(name, 1, 1 << 31) for name in names if name not in ("shape", "filter_error")}
    try:
        return CuratorSettings(
            shape=TreeShape(**numbers), filter_error=inner.number("filter_error", 1e-6, 0.5), **wholes
        )
    except InputError as error:
        raise InputError(f"{inner.source}: {error}") from None
