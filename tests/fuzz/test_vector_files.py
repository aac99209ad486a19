"""Fuzzing the reader of stored vectors: read or refused with InputError, in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.retrieve.embedding_storage import Fitted, Form
from memwall.retrieve.vector_file import KEY, VectorFile, write_vectors
from tests.fuzz.test_readers import as_bytes, bounded, changed, changed_bytes, survives

X = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)


def read(path: Path) -> None:
    file = VectorFile(path, verify=False)
    file.vectors.search(X[:2, : file.vectors.dimensions], 3) if file.vectors.dimensions <= 8 else None
    assert file.texts is None or len(list(file.texts)) == file.vectors.count


def original(folder: Path) -> tuple[Path, bytes]:
    path = folder / "x"
    fitted = Fitted.fit(Form.parse("pca:0.5+int8"), X, name="x")
    write_vectors(path, fitted, X, texts=[str(at) for at in range(40)], model="demo")
    return path, path.read_bytes()


@settings(bounded, max_examples=100)
@given(data=st.data())
def test_changed_files(data: st.DataObject, tmp_path: Path) -> None:
    path, before = original(tmp_path)
    path.write_bytes(data.draw(st.one_of(changed_bytes(before), st.binary(max_size=200))))
    survives(lambda: read(path))


@settings(bounded, max_examples=150)
@given(data=st.data())
def test_changed_headers(data: st.DataObject, tmp_path: Path) -> None:
    path, before = original(tmp_path)
    stop = 8 + int.from_bytes(before[:8], "little")
    told = json.loads(before[8:stop])
    inner = data.draw(changed(json.loads(told["__metadata__"][KEY])))
    told["__metadata__"][KEY] = as_bytes(inner).decode()
    text = as_bytes(told)
    path.write_bytes(len(text).to_bytes(8, "little") + text + before[stop:])
    survives(lambda: read(path))
