"""Files of stored vectors: what is written comes back, and what was changed is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from memwall.errors import InputError
from memwall.retrieve.embedding_storage import Fitted, Form, StoredVectors
from memwall.retrieve.vector_codecs import VECTOR_CODECS
from memwall.retrieve.vector_file import KEY, VectorFile, write_vectors
from tests.retrieve.test_embedding_storage import vectors

FORMS = [*VECTOR_CODECS, "pca:0.5+e4m3", "kernel-pca:8+int8", "projection:0.25+signs"]
X, OTHERS, ASKED = vectors(150, seed=1), vectors(80, seed=2), vectors(4, seed=3)


def written(path: Path, form: str, **more: object) -> Fitted:
    fitted = Fitted.fit(Form.parse(form), OTHERS, name="others.npy")
    write_vectors(path, fitted, X, **more)  # type: ignore[arg-type]
    return fitted


def header_bytes(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_comes_back(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.vectors"
    fitted = written(path, form)
    file = VectorFile(path)
    found, expected = file.vectors, StoredVectors.of(fitted, X)
    for name, array in expected.stored.items():
        np.testing.assert_array_equal(found.stored[name], array)
    np.testing.assert_array_equal(found.search(ASKED, 9).ids, expected.search(ASKED, 9).ids)
    assert (found.fitted.form, found.fitted.fitted_on) == (fitted.form, fitted.fitted_on)
    assert (file.texts, file.model) == (None, None)
    # the file is its rows, its tables, a digest and a header: nothing else
    rows = 150 * fitted.vector_bytes
    assert path.stat().st_size == file.nbytes == header_bytes(path) + rows + fitted.table_bytes + 32
    assert [other.name for other in tmp_path.iterdir()] == ["x.vectors"]


def test_other_libraries_read_it(tmp_path: Path) -> None:
    written(tmp_path / "x", "float16")
    assert load_file(tmp_path / "x")["rows"].tobytes() == X.astype(np.float16).tobytes()


def test_the_header_names_what_was_fitted(tmp_path: Path) -> None:
    fitted = written(tmp_path / "x", "pca:0.5+int8")
    told = json.loads(VectorFile(tmp_path / "x")._file.metadata[KEY])
    assert told["fitted_on"] == {"name": "others.npy", "count": 80, "seed": 42, "sha256": fitted.fitted_on.sha256}  # type: ignore[union-attr]
    assert (told["d"], told["m"], told["codec"], told["count"]) == (32, 16, "int8", 150)


def test_texts_travel_with_their_vectors(tmp_path: Path) -> None:
    texts = [f"text {number} ä" * (number % 3) for number in range(150)]
    written(tmp_path / "x", "e4m3", texts=texts, model="demo")
    file = VectorFile(tmp_path / "x")
    assert file.model == "demo"
    assert file.texts is not None
    assert list(file.texts) == texts
    assert file.texts[3:5] == texts[3:5]
    with pytest.raises(IndexError):
        file.texts[150]


def test_no_vectors(tmp_path: Path) -> None:
    fitted = Fitted.fit(Form.parse("pca:0.5+e4m3"), OTHERS, name="others")
    write_vectors(tmp_path / "x", fitted, X[:0])
    assert (VectorFile(tmp_path / "x").vectors.search(ASKED, 3).ids == -1).all()


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    written(path, "pca:0.5+e4m3")
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="digest differs"):
        VectorFile(path)
    assert VectorFile(path, verify=False).vectors.count == 150
    text = bytes(data).replace(b'\\"metric\\": \\"cosine\\"', b'\\"metric\\": \\"inner\\" ')
    assert text != bytes(data)
    path.write_bytes(text)
    with pytest.raises(InputError, match="digest differs"):  # the header is sealed too
        VectorFile(path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"m": 16', '"m": 17', "m must be 16, which pca:0.5"),
        ('"d": 32', '"d": 30', "m must be 15"),
        ('"count": 150', '"count": 151', "tensor rows is uint8"),
        ('"codec": "e4m3"', '"codec": "e4m4"', "codec must be one of"),
        ('"codec": "e4m3"', '"codec": "e2m1"', "tensor rows is uint8"),
        ('"kind": "pca"', '"kind": "umap"', "kind must be one of"),
        ('"size": 0.5', '"size": 1.5', "size must be"),
        ('"size": 0.5', '"size": 999', "size must be"),
        ('"version": 1', '"version": 2', "version must be 1"),
        ('"metric": "cosine"', '"metric": "l2"', "metric must be one of"),
    ],
)
def test_headers_that_do_not_add_up(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    written(path, "pca:0.5+e4m3")
    data, stop = path.read_bytes(), header_bytes(path)
    told = json.loads(data[8:stop])
    assert old in told["__metadata__"][KEY]
    told["__metadata__"][KEY] = (
        told["__metadata__"][KEY].replace(old, new, 1)
        if "count" not in old
        else (told["__metadata__"][KEY].replace(old, new))
    )
    text = json.dumps(told, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[stop:])
    with pytest.raises(InputError, match=says):
        VectorFile(path, verify=False)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    from memwall.models import DEMO_DIRECTORY

    with pytest.raises(InputError, match="holds no vectors of memwall"):
        VectorFile(DEMO_DIRECTORY / "model.safetensors")
    (tmp_path / "x").write_bytes(b"short")
    with pytest.raises(InputError, match="too few"):
        VectorFile(tmp_path / "x")
    path = tmp_path / "y"
    written(path, "e4m3")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="out of range"):
        VectorFile(path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    written(path, "e4m3")
    before = path.read_bytes()
    bad = np.array(X)
    bad[140, 3] = np.nan
    with pytest.raises(InputError, match="vector 140 has NaN"):
        write_vectors(path, Fitted.fit(Form.parse("e4m3"), OTHERS, name="others"), bad)
    assert path.read_bytes() == before
    assert [other.name for other in tmp_path.iterdir()] == ["x"]
