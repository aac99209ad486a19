"""The safetensors reader refuses every header that does not add up; the writer leaves a whole file or none."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from memwall.errors import DoesNotFit, InputError
from memwall.formats.safetensors_file import DTYPES, SafetensorsFile, SafetensorsWriter, dtype_name


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "scalar": np.array(4, np.int64),
        "none": np.zeros((0, 4), np.float16),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "np"})
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        assert sorted(file.names()) == sorted(tensors)
        assert file.metadata == {"format": "np"}
        for name, expected in tensors.items():
            found = file.tensor(name)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()
            assert file.info(name).nbytes == expected.nbytes
            assert not found.flags.writeable or found.size == 0


def test_arrays_outlive_close_and_dropped_pages(tmp_path: Path) -> None:
    values = np.arange(100_000, dtype=np.float32)
    save_file({"x": values}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    view = file.tensor("x")
    assert view.sum() == values.sum()
    file.drop_pages("x")
    file.drop_pages()
    file.close()
    np.testing.assert_array_equal(view, values)
    with pytest.raises(ValueError, match="closed"):
        file.tensor("x")


@pytest.mark.parametrize(("most_bytes", "multiple", "counts"), [(1, 1, [1] * 7), (40, 2, [4, 3]), (1 << 20, 4, [7])])
def test_pieces_are_the_tensor_under_maps_of_their_own(
    tmp_path: Path, most_bytes: int, multiple: int, counts: list[int]
) -> None:
    x = np.arange(7 * 5, dtype=np.float16).reshape(7, 5)
    tensors = {"w": x, "v": np.ones(3, np.float32), "empty": np.empty((0, 4), np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        pieces = list(file.pieces("w", most_bytes, multiple))
        assert [len(rows) for _, rows in pieces] == counts
        assert [first for first, _ in pieces] == [sum(counts[:i]) for i in range(len(counts))]
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in pieces]), x)
        assert not pieces[0][1].flags.writeable
        assert [rows.shape for _, rows in file.pieces("empty", 64)] == [(0, 4)]
    np.testing.assert_array_equal(pieces[0][1], x[: counts[0]])  # a map lives as long as its array


def test_drop_pages_lowers_the_resident_set(tmp_path: Path) -> None:
    def resident_file_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    values = np.ones(8_000_000, np.float32)
    save_file({"x": values}, tmp_path / "m.safetensors")
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        before = resident_file_bytes()
        view = file.tensor("x")
        assert view.sum() == len(values)
        read = resident_file_bytes()
        file.drop_pages("x")
        after = resident_file_bytes()
        del view
    assert read - before > 0.9 * values.nbytes
    assert after - before < 0.1 * values.nbytes


BAD_HEADERS = {
    "unknown dtype": {"x": entry(dtype="F4")},
    "needs 8 bytes": {"x": entry(shape=[2])},
    "out of range": {"x": entry(offsets=[0, 8], shape=[2])},
    "whole numbers": {"x": entry(shape=[-1])},
    "the shape must": {"x": entry(shape=[2**62, 2**62])},
    "span 4": {"x": entry(shape=[2**47, 2**47, 2**47])},
    "absurd shape": {"x": entry(shape=[0, 2**47, 2**47], offsets=[0, 0]), "y": entry()},
    "overlaps": {"x": entry(dtype="U8", shape=[3], offsets=[0, 3]), "y": entry(dtype="U8", shape=[2], offsets=[2, 4])},
    "leaves a gap": {
        "x": entry(dtype="U8", shape=[1], offsets=[0, 1]),
        "y": entry(dtype="U8", shape=[1], offsets=[3, 4]),
    },
    "belong to none": {"x": entry(dtype="U8", shape=[3], offsets=[0, 3])},
    "exactly dtype": {"x": {"dtype": "F32", "shape": [1]}},
    "two whole numbers": {"x": entry(offsets=[0])},
    "__metadata__": {"__metadata__": {"a": 1}, "x": entry()},
}


@pytest.mark.parametrize("message", BAD_HEADERS)
def test_bad_headers_are_refused_by_name(tmp_path: Path, message: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", BAD_HEADERS[message], b"\0" * 4)
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value)


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    cases = [
        (b"", "too few"),
        (b"\0\0\0", "too few"),
        ((2**63).to_bytes(8, "little"), "most allowed"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated"),
        ((4).to_bytes(8, "little") + b"[  ]", "no JSON object"),
        ((0).to_bytes(8, "little"), "no JSON object"),
        ((3).to_bytes(8, "little") + b"{x}", "broken JSON"),
        ((4).to_bytes(8, "little") + b'{"\xff"', "UTF-8"),
    ]
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            SafetensorsFile(path)
    with pytest.raises(InputError, match="cannot be read"):
        SafetensorsFile(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        SafetensorsFile(tmp_path)


def test_repeated_keys_deep_nesting_and_bracket_floods_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    one = json.dumps(entry())
    for header, message in [
        (f'{{"x":{one},"x":{one}}}'.encode(), "twice"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper"),
        (b'{"x":[' + b"[]," * 100_000 + b"[]]}", "only brackets"),
        (b'{"x":' + b"9" * 10_000 + b"}", "broken JSON"),
        (b'{"x":NaN}', "NaN"),
    ]:
        raw_file(path, header, b"\0" * 4)
        with pytest.raises(InputError, match=message):
            SafetensorsFile(path)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6
    ),
    seed=st.integers(0, 99),
)
def test_written_files_read_back_and_are_aligned(tmp_path_factory: pytest.TempPathFactory, tensors, seed) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("w") / "m.safetensors"
    specs = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    contents = {}
    with SafetensorsWriter(path, specs, {"made": "here"}) as writer:
        for name, dtype, shape in rng.permutation(np.array(specs, dtype=object)):
            size = int(np.prod(shape)) * DTYPES[dtype].itemsize
            contents[name] = rng.integers(0, 2, size, dtype=np.uint8).tobytes()
            cut = int(rng.integers(0, size + 1))
            writer.write(name, contents[name][:cut])
            writer.write(name, contents[name][cut:])
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert os.listdir(path.parent) == [path.name]
    with SafetensorsFile(path) as file:
        assert file.metadata == {"made": "here"}
        for name, dtype, shape in specs:
            assert file.tensor(name).tobytes() == contents[name]
            assert file.info(name).shape == shape
            assert dtype_name(file.tensor(name).dtype) == dtype
            alignment = np.gcd(len(contents[name]), 64) if contents[name] else 1
            assert file.info(name).start % alignment == 0


def test_the_safetensors_library_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    with SafetensorsWriter(tmp_path / "m.safetensors", [("x", np.float16, (3, 4))]) as writer:
        writer.write("x", values[:2])
        writer.write("x", values[2:])
    np.testing.assert_array_equal(load_file(tmp_path / "m.safetensors")["x"], values)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_older_file_and_no_other(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"older")

    def interrupted() -> None:
        with SafetensorsWriter(path, [("x", "U8", (4,))]) as writer:
            writer.write("x", b"ab")
            raise kind

    with pytest.raises(kind):
        interrupted()
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert path.read_bytes() == b"older"


def test_a_writer_that_is_forgotten_leaves_nothing(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "m.safetensors", [("x", "U8", (4,))])
    assert len(os.listdir(tmp_path)) == 1
    del writer
    gc.collect()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with SafetensorsWriter(tmp_path / "m.safetensors", [("x", "U8", (4000,))]) as writer:
            writer.write("x", b"a" * 4000)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DoesNotFit, match=r"m\.safetensors: needs 4,\d\d\d bytes"):
        write()
    assert os.listdir(tmp_path) == []


def test_the_writer_refuses_what_was_not_declared(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    writer = SafetensorsWriter(path, [("x", "F32", (2,))])
    with pytest.raises(InputError, match="not declared"):
        writer.write("y", b"")
    with pytest.raises(InputError, match="declared F32"):
        writer.write("x", np.zeros(2, np.float64))
    with pytest.raises(InputError, match="more than its 8 bytes"):
        writer.write("x", b"a" * 9)
    with pytest.raises(InputError, match="incomplete"):
        writer.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="same name"):
        SafetensorsWriter(path, [("x", "U8", (2,)), ("x", "U8", (2,))])
    with pytest.raises(InputError, match="cannot be written"):
        SafetensorsWriter(tmp_path / "absent" / "m.safetensors", [("x", "U8", (2,))])
    with pytest.raises(InputError, match="no place"):
        SafetensorsWriter(path, [("x", np.complex128, (2,))])
