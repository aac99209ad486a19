"""Fuzzing the readers of saved caches, of chunks and of the link: read or refused with InputError, in little memory."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kv
from memwall.errors import InputError
from memwall.formats.checked_json import Fields
from memwall.kv.cachegen import Chunk
from memwall.kv.cachegen_file import chunk_plan
from memwall.kv.link import ChunkServer, Index
from memwall.kv.saved import Origin, SavedCache, save, write
from memwall.memory import Arena, Ledger
from tests.fuzz.test_readers import as_bytes, bounded, changed, changed_bytes, documents, survives
from tests.kv.cachegen_cases import CACHE_SHAPE, MODEL, PROFILES, SHAPE, encode

ORIGIN = Origin(model=MODEL, weights="int4", specs={"x": "int4-g64"})


def fresh(policy: str = "kivi(2bit,group=16)") -> kv.KVCache:
    return kv.build(policy, CACHE_SHAPE, Arena(1 << 24, Ledger()), 200)


def saved_bytes(folder: Path) -> bytes:
    cache = fresh()
    rows = np.random.default_rng(0).standard_normal((150, 2, 16)).astype(np.float32)
    for layer in range(3):
        cache.append(layer, rows, rows, np.arange(150))
        cache.settle(layer)
    save(folder / "c", cache, list(range(150)), ORIGIN)
    return (folder / "c").read_bytes()


def exact_file(folder: Path) -> tuple[bytes, dict[str, Any]]:
    if not _FILE:
        data = saved_bytes(folder)
        with SavedCache(folder / "c") as file:
            _FILE.append((data, json.loads(file.file.metadata["content"])))
    return _FILE[0]


_FILE: list[tuple[bytes, dict[str, Any]]] = []
CHUNKS = {form: encode(30, form, own=form == "mean") for form in ("auto", "delta", "mean", "direct")}


def read(path: Path) -> None:
    with SavedCache(path) as file:
        file.verify()
        file.tokens()
        file.check_model(MODEL)
        cache = fresh()
        if file.policy is not None:
            assert file.restore(cache, min(file.num_tokens, 200)) <= 200
        else:
            chunk_plan(file.content, file)


@settings(bounded, max_examples=100)
@given(data=st.data())
def test_changed_files(data: st.DataObject, tmp_path: Path) -> None:
    original, _ = exact_file(tmp_path)
    path = tmp_path / "changed"
    path.write_bytes(data.draw(st.one_of(changed_bytes(original), st.binary(max_size=200))))
    survives(lambda: read(path))


@settings(bounded, max_examples=150)
@given(data=st.data())
def test_contents_that_lie_under_a_right_digest(data: st.DataObject, tmp_path: Path) -> None:
    original, content = exact_file(tmp_path)
    (tmp_path / "c").write_bytes(original)
    told = data.draw(st.one_of(changed(content), changed({"content": content}).map(lambda d: d.get("content"))))
    with SavedCache(tmp_path / "c") as file:
        arrays = {name: np.array(file.file.tensor(name)) for name in file.file.names() if name != "tokens"}
    write(tmp_path / "d", arrays, list(range(150)), ORIGIN, told)
    survives(lambda: read(tmp_path / "d"))


def open_chunk(data: bytes, form: str) -> None:
    chunk = Chunk(data, SHAPE, model=MODEL, profile=None if form == "mean" else PROFILES[form])
    for plane in range(SHAPE.planes):
        assert chunk.plane(plane).shape == (chunk.num_tokens, SHAPE.channels)


@settings(bounded, max_examples=100)
@given(data=st.data(), form=st.sampled_from(sorted(CHUNKS)))
def test_changed_chunks(data: st.DataObject, form: str) -> None:
    changed_chunk = data.draw(st.one_of(changed_bytes(CHUNKS[form]), st.binary(max_size=80)))
    survives(lambda: open_chunk(changed_chunk, form))


@settings(bounded, max_examples=250)
@given(data=st.data(), form=st.sampled_from(sorted(CHUNKS)))
def test_chunks_that_lie_under_a_right_checksum(data: st.DataObject, form: str) -> None:
    """Header or sections changed, and sealed again."""
    original = CHUNKS[form]
    (length,) = struct.unpack("<I", original[4:8])
    header, rest = original[8 : 8 + length], original[8 + length : -16]
    if data.draw(st.booleans()):
        header = as_bytes(data.draw(st.one_of(changed(json.loads(header)), documents)))
    else:
        rest = data.draw(changed_bytes(rest))
    body = b"MWCG" + struct.pack("<I", len(header)) + header + rest
    survives(lambda: open_chunk(body + hashlib.blake2b(body, digest_size=16).digest(), form))


INDEX = {
    "model": "m",
    "weights": "w",
    "weights_sha256": "s",
    "codec": "cachegen",
    "chunk_tokens": [1, 2, 3],
    "texts": ["a", "b", "c"],
    "sizes": {"1": [1, 2, 3], "3": [4, 5, 6]},
}


@bounded
@given(document=st.one_of(changed(INDEX), documents))
def test_indexes(document: Any) -> None:
    survives(lambda: Index.parse(as_bytes(document)).num_matching([1, 2, 3]))


@bounded
@given(document=st.one_of(changed({"chunk": 1, "level": 1}), changed({"chunk": 0, "text": True}), documents))
def test_requests(document: Any, tmp_path: Path) -> None:
    data = np.frombuffer(CHUNKS["auto"], np.uint8)
    arrays = {f"chunk.{i}.level.1": data for i in range(2)}
    if not (tmp_path / "s").exists():
        write(tmp_path / "s", arrays, list(range(60)), ORIGIN, {"codec": "cachegen", "chunk_tokens": [30, 30]})
    with SavedCache(tmp_path / "s") as saved:
        server = ChunkServer(saved)
        try:
            survives(lambda: server.reply(Fields(copy.deepcopy(document), "x")) if isinstance(document, dict) else None)
        finally:
            server.close()


def test_a_declared_giant_allocates_nothing(tmp_path: Path) -> None:
    """Facts of 2^39 tokens, and a chunk of 65,536 tokens in a kilobyte."""
    cache = fresh()
    facts = {"tokens": 2**39, "coded_keys": 2**39, "coded_values": 2**39}
    write(tmp_path / "g", cache.dump()[0], [1], ORIGIN, {"policy": cache.policy, "facts": facts})
    survives(lambda: read(tmp_path / "g"))
    original = CHUNKS["auto"]
    (length,) = struct.unpack("<I", original[4:8])
    header = as_bytes({**json.loads(original[8 : 8 + length]), "tokens": 65536, "scales": [2**40] * 6})
    body = b"MWCG" + struct.pack("<I", len(header)) + header + original[8 + length : -16]

    def opened() -> None:
        try:
            open_chunk(body + hashlib.blake2b(body, digest_size=16).digest(), "auto")
        except InputError:
            return
        raise AssertionError("a chunk of 65,536 tokens in a kilobyte was taken")

    survives(opened)
