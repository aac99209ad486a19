"""Fuzzing the reader of kept chunks and of the store's scores: read or refused with InputError, in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.kv.cache_craft import chunk_id
from memwall.kv.chunk_file import ChunkFile, _check, variant_name
from memwall.kv.chunk_store import STATE
from tests.fuzz.test_readers import as_bytes, bounded, changed, changed_bytes, documents, survives
from tests.kv.chunk_cases import ORIGIN, SHAPE, new_store, write_chunk


def read(path: Path) -> None:
    file = ChunkFile(path, ORIGIN, SHAPE)
    assert 0.5 <= file.context.impact <= 1
    assert 0 <= file.context.overhead(file.context.predecessors[:1], file.context.lengths[:1], 1.0) <= 1
    keys = np.empty((file.context.num_tokens, SHAPE.num_kv_heads, SHAPE.head_dim), np.float16)
    for layer in range(SHAPE.num_layers):
        file.read_layer(layer, keys, np.empty_like(keys))
    file.close()


def chunk_bytes(folder: Path) -> tuple[Path, bytes]:
    path = write_chunk(folder, 100, "ab")
    return path, path.read_bytes()


@settings(bounded, max_examples=100)
@given(data=st.data())
def test_changed_files(data: st.DataObject, tmp_path: Path) -> None:
    path, original = chunk_bytes(tmp_path)
    path.write_bytes(data.draw(st.one_of(changed_bytes(original), st.binary(max_size=200))))
    survives(lambda: read(path))


@settings(bounded, max_examples=150)
@given(data=st.data())
def test_contents_that_lie_under_a_right_digest(data: st.DataObject, tmp_path: Path) -> None:
    """Predecessors, statistics and tokens changed, and sealed again under the right name."""
    path, _ = chunk_bytes(tmp_path)
    with SafetensorsFile(path) as file:
        arrays = {name: np.array(file.tensor(name)) for name in file.names()}
        metadata = dict(file.metadata)
    content = json.loads(metadata["content"])
    told = data.draw(st.one_of(changed(content), documents))
    metadata["content"] = as_bytes(told).decode("utf-8", "replace")
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["inter", "intra", "token_inter"]))
        arrays[name][0] = data.draw(st.floats(width=32))
    small = {name: array for name, array in arrays.items() if "." not in name and name != "check"}
    arrays["check"] = _check(metadata, small)
    names = told.get("predecessors") if isinstance(told, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        path = path.with_name(f"{variant_name(ORIGIN, chunk_id(arrays['tokens']), names)}.chunk")
    with SafetensorsWriter(path, [(n, a.dtype, a.shape) for n, a in arrays.items()], metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    survives(lambda: read(path))


@settings(bounded, max_examples=100)
@given(data=st.data())
def test_scores(data: st.DataObject, tmp_path: Path) -> None:
    chunk_bytes(tmp_path)
    (tmp_path / STATE).unlink(missing_ok=True)  # of the example before
    new_store(tmp_path).close()
    state = json.loads((tmp_path / STATE).read_text())
    (tmp_path / STATE).write_bytes(as_bytes(data.draw(st.one_of(changed(state), documents))))
    survives(lambda: new_store(tmp_path).close())


def test_the_good_file_is_read(tmp_path: Path) -> None:
    path, _ = chunk_bytes(tmp_path)
    read(path)
