"""Stored vectors as a file: one safetensors file with a header that says what the bytes mean and where they come from.

    metadata `memwall-vectors`: JSON with version, codec, reduction (kind and size), d, m, count, metric, fitted_on
    (name, count, SHA-256 and seed of what the map and ranges were learned from), model (of texts)
    rows            uint8 [count, bytes of a row]
    scales          float16 [count], of element types with a scale a vector
    tables.NAME     float32: least and largest, or steps, of each dimension
    reducer.NAME    float32: mean and map, or the encoder's layers
    texts, text_ends  UTF-8 of all texts, and where each ends (int64 [count]), of vectors that were made of texts
    sha256          32 bytes: of the metadata, and of the SHA-256 of every other tensor in the order of their names

A reader takes nothing on trust: sizes are checked against the file's before anything is made of them, every shape
against the header's numbers, the digest against the bytes. Rows stay in the file, mapped: a search reads them there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.retrieve.embedding_storage import Fitted, Form, Progress, Provenance, StoredVectors, pieces
from memwall.retrieve.reducers import REDUCERS
from memwall.retrieve.vector_codecs import VECTOR_CODECS, stored_arrays

KEY, VERSION = "memwall-vectors", 1
DIGEST = "sha256"
MOST_DIMENSIONS, MOST_VECTORS = 1 << 20, 1 << 40
_HASHED_AT_ONCE = 1 << 24

Spec = tuple[tuple[int, ...], "np.dtype[Any]"]


def write_vectors(
    path: Path,
    fitted: Fitted,
    x: np.ndarray,
    *,
    texts: Sequence[str] | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Encodes vectors [n, d] a piece at a time into a file, which appears whole or not at all.

    texts: what the vectors were made of, one each; model: by what.
    """
    if fitted.reducer is not None and not fitted.reducer.stored:
        fitted.reducer.tables()  # says why
    told = json.dumps(_told(fitted, len(x), model), ensure_ascii=False)
    tables = _tables(fitted) | ({} if texts is None else text_arrays(texts))
    rows = stored_arrays(fitted.codec, len(x), fitted.m)
    digests = {name: hashlib.sha256(np.ascontiguousarray(table).data) for name, table in tables.items()}
    digests |= {name: hashlib.sha256() for name in rows}
    specs = [(name, dtype, shape) for name, (shape, dtype) in rows.items()]
    specs += [(name, table.dtype, table.shape) for name, table in tables.items()]
    with SafetensorsWriter(path, [*specs, (DIGEST, np.uint8, (32,))], {KEY: told}) as writer:
        for name, table in tables.items():
            writer.write(name, table)
        for start, part in pieces(fitted, x):
            for name, array in fitted.encode(part).items():
                writer.write(name, array)
                digests[name].update(np.ascontiguousarray(array).data)
            if progress is not None:
                progress(start + len(part), len(x))
        writer.write(DIGEST, digest_of(told, {name: one.digest() for name, one in digests.items()}))


class VectorFile:
    """An opened file. vectors: what is searched, lying in the file; texts and model: None where there are none."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """verify: also compare the digest, for which the whole file is read."""
        self.path, self._file = path, SafetensorsFile(path)
        text = self._file.metadata.get(KEY)
        if text is None:
            raise InputError(f"{path}: holds no vectors of memwall (`memwall index` writes such files)")
        fields = Fields(checked_json.parse(text.encode(), f"{path}: {KEY}", max_depth=4), f"{path}: {KEY}")
        form, d, count, self._fitted_on = _read_header(fields)
        m = form.reduced(d)
        if fields.integer("m", 1, MOST_DIMENSIONS) != m:
            raise fields.error("m", fields.values["m"], f"{m}, which {form} makes of {d}")
        one, kind = VECTOR_CODECS[form.codec], None if form.kind is None else REDUCERS[form.kind]
        wanted: dict[str, Spec] = dict(stored_arrays(one, count, m))
        for prefix, shapes in (("tables", one.table_shapes(m)), ("reducer", kind.shapes(d, m) if kind else {})):
            wanted |= {f"{prefix}.{name}": (shape, np.dtype(np.float32)) for name, shape in shapes.items()}
        wanted[DIGEST] = ((32,), np.dtype(np.uint8))
        self._check(wanted, count)
        if verify:
            verify_digest(self._file, text)
        tables = {name: self._table("tables", name) for name in one.table_shapes(m)}
        reducer = None
        if kind is not None:
            reducer = kind.of_tables({name: self._table("reducer", name) for name in kind.shapes(d, m)})
        metric: Any = fields.text("metric", choices=("cosine", "inner"))
        if metric == "inner" and one.only_cosine:
            raise InputError(f"{path}: {form.codec} is scored by cosine only")
        fitted = Fitted(form=form, d=d, metric=metric, reducer=reducer, tables=tables, fitted_on=self._fitted_on)
        stored = {name: self._file.tensor(name) for name in stored_arrays(one, count, m)}
        self.vectors = StoredVectors(fitted, stored)
        self.model = fields.text("model") if fields.has("model") else None
        self.texts = self._texts() if "texts" in self._file else None

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._file.nbytes

    def _check(self, wanted: Mapping[str, Spec], count: int) -> None:
        for name, (shape, dtype) in wanted.items():
            info = self._file.info(name)
            if info.shape != shape or info.numpy_dtype != dtype:
                raise InputError(
                    f"{self.path}: tensor {name} is {info.numpy_dtype}{list(info.shape)}; its header says "
                    f"{dtype}{list(shape)}"
                )
        others = set(self._file.names()) - set(wanted)
        if others and others != {"texts", "text_ends"}:
            raise InputError(f"{self.path}: unknown tensors {', '.join(map(checked_json.shown, sorted(others)[:4]))}")
        if others:
            ends, texts = self._file.info("text_ends"), self._file.info("texts")
            if ends.shape != (count,) or ends.dtype != "I64" or texts.dtype != "U8" or len(texts.shape) != 1:
                raise InputError(f"{self.path}: texts and text_ends are not bytes and {count} places in them")

    def _table(self, prefix: str, name: str) -> np.ndarray:
        table = np.array(self._file.tensor(f"{prefix}.{name}"))
        if not np.isfinite(table).all():
            raise InputError(f"{self.path}: tensor {prefix}.{name} has NaN or infinite numbers")
        return table

    def _texts(self) -> Texts:
        ends = np.array(self._file.tensor("text_ends"))
        blob = self._file.tensor("texts")
        if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(blob)):
            raise InputError(f"{self.path}: text_ends do not divide the {len(blob):,} bytes of texts")
        return Texts(blob, ends)


class Texts(Sequence[str]):
    """Texts in one array of bytes, decoded one by one."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self._blob, self._ends = blob, ends

    @property
    def nbytes(self) -> int:
        return len(self._blob)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        start = int(self._ends[place - 1]) if place else 0
        return self._blob[start : int(self._ends[place])].tobytes().decode("utf-8", errors="replace")


def _read_header(fields: Fields) -> tuple[Form, int, int, Provenance | None]:
    fields.only("version", "codec", "reduction", "d", "m", "count", "metric", "fitted_on", "model")
    if fields.integer("version", 1, 1 << 16) != VERSION:
        raise fields.error("version", fields.values["version"], f"{VERSION}, the one this memwall reads")
    d = fields.integer("d", 1, MOST_DIMENSIONS)
    form = Form(codec=fields.text("codec", choices=tuple(VECTOR_CODECS)))
    if fields.has("reduction"):
        inner = Fields(fields.mapping("reduction"), f"{fields.source}: reduction")
        inner.only("kind", "size")
        kind = inner.text("kind", choices=tuple(name for name, one in REDUCERS.items() if one.stored))
        size = inner.values.get("size")
        given = inner.integer("size", 1, d) if type(size) is int else inner.number("size", 1e-6, 1)
        form = Form(codec=form.codec, kind=kind, size=given)
    told = None
    if fields.has("fitted_on"):
        inner = Fields(fields.mapping("fitted_on"), f"{fields.source}: fitted_on")
        inner.only("name", "count", "sha256", "seed")
        told = Provenance(
            name=inner.text("name"),
            count=inner.integer("count", 1, MOST_VECTORS),
            sha256=inner.text("sha256"),
            seed=inner.integer("seed", 0, 1 << 62),
        )
    return form, d, fields.integer("count", 0, MOST_VECTORS), told


def _told(fitted: Fitted, count: int, model: str | None) -> dict[str, Any]:
    """The header."""
    form = fitted.form
    told: dict[str, Any] = {"version": VERSION, "codec": form.codec, "d": fitted.d, "m": fitted.m, "count": count,
                            "metric": fitted.metric}  # fmt: skip
    if form.kind is not None:
        told["reduction"] = {"kind": form.kind, "size": form.size}
    if fitted.fitted_on is not None:
        told["fitted_on"] = dataclasses.asdict(fitted.fitted_on)
    return told if model is None else {**told, "model": model}


def _tables(fitted: Fitted) -> dict[str, np.ndarray]:
    found = {f"tables.{name}": np.ascontiguousarray(table, np.float32) for name, table in fitted.tables.items()}
    reducer = {} if fitted.reducer is None else fitted.reducer.tables()
    return found | {f"reducer.{name}": table for name, table in reducer.items()}


def text_arrays(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors `texts` and `text_ends` of a file."""
    parts = [text.encode("utf-8", errors="surrogatepass") for text in texts]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {"texts": np.frombuffer(b"".join(parts), np.uint8), "text_ends": ends}


def verify_digest(file: SafetensorsFile, told: str) -> None:
    """InputError where a file's bytes are not those that were sealed with its metadata `told`; reads all of it."""
    found = {}
    for name in file.names():
        if name != DIGEST:
            digest, flat = hashlib.sha256(), file.tensor(name).reshape(-1).view(np.uint8)
            for start in range(0, len(flat), _HASHED_AT_ONCE):
                digest.update(flat[start : start + _HASHED_AT_ONCE].data)
            found[name] = digest.digest()
    if not np.array_equal(digest_of(told, found), file.tensor(DIGEST)):
        raise InputError(f"{file.path}: its bytes are not those that were written (the digest differs)")


def digest_of(told: str, digests: Mapping[str, bytes]) -> np.ndarray:
    """What seals a file: of its metadata, and of each other tensor's SHA-256 by name."""
    whole = hashlib.sha256(told.encode())
    for name in sorted(digests):
        whole.update(digests[name])
    return np.frombuffer(whole.digest(), np.uint8)
