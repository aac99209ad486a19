"""The GGUF reader: what it gives, and that nothing a file says makes it do more than refuse."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats.gguf_file import GgufFields, GgufFile


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def image(keys: list[bytes], tensors: list[bytes], data: bytes, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


KEYS = [
    key("general.architecture", 8, text("llama")),
    key("llama.block_count", 4, struct.pack("<I", 2)),
    key("llama.eps", 6, struct.pack("<f", 0.5)),
    key("yes", 7, b"\x01"),
    key("names", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
    key("counts", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
]
TENSORS = [info("one", (2, 3), 0, 0), info("two", (2, 32), 8, 32)]
DATA = np.arange(6, dtype="<f4").tobytes() + b"\0" * 8 + bytes(range(68))
GOOD = image(KEYS, TENSORS, DATA)


def opened(folder: Path, data: bytes) -> GgufFile:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def test_what_a_file_holds(tmp_path: Path) -> None:
    with opened(tmp_path, GOOD) as file:
        assert file.metadata["names"] == ["a", "bc"]
        assert file.metadata["counts"].tolist() == [1, -2, 3]
        one = file.info("one")
        assert (one.block.name, one.shape) == ("F32", (2, 3))
        np.testing.assert_array_equal(one.block.decode(file.raw("one")), np.arange(6).reshape(2, 3))
        assert file.raw("two").shape == (2, 1, 34)
        fields = GgufFields(file.metadata, "model.gguf")
        assert fields.integer(".block_count") == 2
        assert fields.number(".eps") == 0.5
        assert fields.flag("yes", False) is True
        assert list(fields.numbers("counts")) == [1, -2, 3]
        with pytest.raises(InputError, match=r"llama\.eps must be a whole number, got 0\.5"):
            fields.integer(".eps")
        with pytest.raises(InputError, match=r"llama\.none must be a number, got missing"):
            fields.number(".none")
        with pytest.raises(InputError, match="holds no tensor 'three'"):
            file.info("three")
        file.drop_pages()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (image(KEYS, TENSORS, DATA, version=1), "version 1"),
        (image(KEYS, TENSORS, DATA, version=3 << 24), "big-endian"),
        (GOOD[:-1], "beyond the end"),
        (GOOD[:100], "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "more than the file holds"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "more than the file holds"),
        (image([key("a", 8, struct.pack("<Q", 1 << 62))], [], b""), "name of"),
        (image([key("a", 9, struct.pack("<IQ", 4, 1 << 61))], [], b""), "more than the file holds"),
        (image([key("a", 77, b"\0" * 8)], [], b""), "unknown type"),
        (image([KEYS[3], KEYS[3]], [], b""), "twice"),
        (image(KEYS, [info("one", (2, 3), 99, 0)], DATA), "type 99"),
        (image(KEYS, [info("one", (2, 31), 8, 0)], DATA), "does not suit Q8_0"),
        (image(KEYS, [info("one", (2, 3), 0, 1)], DATA), "does not suit"),
        (image(KEYS, [info("one", (2, 3), 0, 0), info("two", (2, 3), 0, 0)], DATA), "overlap"),
        (image(KEYS, [info("one", (1 << 40, 1 << 30), 0, 0)], DATA), "absurd"),
        (image(KEYS, [info("one", (), 0, 0)], DATA), "0 dimensions"),
        (image([*KEYS, key("general.alignment", 4, struct.pack("<I", 3))], TENSORS, DATA), "power of two"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path, data)
    assert "model.gguf" in str(caught.value)


def test_arrays_of_arrays_end_somewhere(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 20 + struct.pack("<IQ", 0, 0)
    with pytest.raises(InputError, match="nested deeper"):
        opened(tmp_path, image([key("a", 9, nested)], [], b"\0" * 64))


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_no_byte_makes_it_fail(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    try:
        with opened(tmp_path_factory.getbasetemp(), bytes(data)) as file:
            for name in file.tensors:
                file.raw(name).sum()
    except InputError:
        pass
