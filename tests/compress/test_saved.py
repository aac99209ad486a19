"""Work directories: locks, leftovers, full disks, places that must not be overwritten; damaged results refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.compress import saved
from memwall.compress.model import compress_model
from memwall.compress.saved import WorkDirectory, check_disk, check_output, read_part
from memwall.errors import DoesNotFit, InputError
from memwall.formats import codec
from memwall.models import Checkpoint
from tests.compress.tiny_model import make_model

SETTINGS = {"bits": 4}


def write_part(work: WorkDirectory, file: str = "model-00001-of-00002.safetensors") -> np.ndarray:
    weight = np.random.default_rng(0).standard_normal((20, 70), np.float32)
    bias = np.arange(3, dtype=np.float16)
    with work.writer(file, {"w": ("int3-g32-asym", weight.shape), "b": ("float16", bias.shape)}) as writer:
        writer.write("b", codec("float16").encode(bias))
        writer.write("w", codec("int3-g32-asym").encode(weight))
    return weight


def test_parts_are_kept_and_read_back(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "out", SETTINGS) as work:
        weight = write_part(work)
        work.set_specs({"w": "int3-g32-asym"})
    (tmp_path / "out.partial" / ".model-2.safetensors.77.partial").write_bytes(b"half")
    (tmp_path / "out.partial" / "model-00002-of-00002.safetensors").write_bytes(b"unknown to the journal")
    with WorkDirectory(tmp_path / "out", SETTINGS) as work:
        assert [part.file for part in work.parts] == ["model-00001-of-00002.safetensors"]
        assert work.specs == {"w": "int3-g32-asym"}
        part = read_part(work.path / work.parts[0].file)
        coder = codec("int3-g32-asym")
        np.testing.assert_array_equal(coder.decode(part["w"]), coder.decode(coder.encode(weight)))
        assert part["b"].spec == "float16"
        assert len(list(work.path.iterdir())) == 3  # part, journal, lock


def test_a_failed_part_leaves_nothing(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "out", SETTINGS) as work:
        with pytest.raises(KeyboardInterrupt), work.writer("a.safetensors", {"b": ("float16", (3,))}):
            raise KeyboardInterrupt
        with pytest.raises(InputError, match="incomplete"), work.writer("a.safetensors", {"b": ("float16", (3,))}):
            pass
        assert not work.parts
        assert {path.name for path in work.path.iterdir()} == {saved.JOURNAL_NAME, saved.LOCK_NAME}


@pytest.mark.parametrize(("notes", "left"), [({}, []), ({"measured": 1.5}, ["out.partial"])])
def test_a_run_that_made_nothing_leaves_nothing(tmp_path: Path, notes: dict[str, float], left: list[str]) -> None:
    def run() -> None:
        with WorkDirectory(tmp_path / "out", SETTINGS) as work:
            work.set_specs({"a": "int4"})
            for name, value in notes.items():
                work.note(name, value)
            raise InputError("of no use")

    with pytest.raises(InputError, match="of no use"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == left


def test_two_runs_cannot_write_at_once(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "out", SETTINGS):
        with pytest.raises(InputError, match="another run is writing"):
            WorkDirectory(tmp_path / "out", SETTINGS)
        with pytest.raises(InputError, match="another run is writing"):
            WorkDirectory(tmp_path / "out", SETTINGS, force=True)
    WorkDirectory(tmp_path / "out", SETTINGS).close()


def test_places_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("")
    for force in (False, True):
        with pytest.raises(InputError, match="is a file"):
            check_output(tmp_path / "file", force=force)
        with pytest.raises(InputError, match="no such folder"):
            check_output(tmp_path / "none" / "out", force=force)
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path / "folder", force=False)
    with pytest.raises(InputError, match="is not a compressed model"):
        check_output(tmp_path / "folder", force=True)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("")
    with pytest.raises(InputError, match="is in the way"):
        WorkDirectory(tmp_path / "out", SETTINGS, force=True)
    assert (tmp_path / "out.partial" / "precious").exists()


@pytest.mark.parametrize("journal", [b"{", b"[]", b'{"settings": {"bits": 4}, "parts": [{"file": "../x"}]}'])
def test_a_damaged_journal(tmp_path: Path, journal: bytes) -> None:
    with WorkDirectory(tmp_path / "out", SETTINGS) as work:
        write_part(work)
    (tmp_path / "out.partial" / saved.JOURNAL_NAME).write_bytes(journal)
    if b"parts" not in journal:
        with pytest.raises(InputError, match=saved.JOURNAL_NAME):
            WorkDirectory(tmp_path / "out", SETTINGS)
    with WorkDirectory(tmp_path / "out", SETTINGS, force=True) as work:
        assert not work.parts


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DoesNotFit, match=r"needs 1,152,921,504,606,846,976 bytes of disk"):
        check_disk(tmp_path, 1 << 60)

    def no_room(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with WorkDirectory(tmp_path / "out", SETTINGS) as work:
        write_part(work)
        monkeypatch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(DoesNotFit, match=r"b\.safetensors: needs [\d,]+ bytes of disk"):
            write_part(work, "b.safetensors")
        monkeypatch.undo()

        def no_sync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", no_sync)
        with pytest.raises(DoesNotFit, match="the disk is full"):
            work.set_specs({})
        monkeypatch.undo()
    with WorkDirectory(tmp_path / "out", SETTINGS) as work:
        assert len(work.parts) == 1


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-1]
    else:
        data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model-00003-of-00005.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["truncated", "tampered"])
def test_damaged_results_are_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    compress_model(make_model(tmp_path / "model"), tmp_path / "out", bits="int4", method="rtn")
    damage(tmp_path / "out" / name, how)

    def open_and_verify() -> Any:
        with Checkpoint(tmp_path / "out") as checkpoint:
            checkpoint.verify(digests=True)

    with pytest.raises(InputError, match=name):
        open_and_verify()
