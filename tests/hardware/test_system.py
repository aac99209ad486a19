from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from memwall.hardware import system


def test_description_of_this_machine_makes_sense() -> None:
    found = system.describe_system()
    assert found.processor
    assert found.num_processors >= 1
    assert found.memory_bytes > 100_000_000
    assert 0 < system.available_memory_bytes() <= found.memory_bytes * 2
    assert [cache.level for cache in found.caches] == sorted({cache.level for cache in found.caches})
    assert found.last_cache_bytes > 0
    assert len(set(system.processor_order())) == len(system.processor_order())


def test_small_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system.write_whole(tmp_path / "a", b"old")
    for raised, told in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left"), OSError)):

        def broken(descriptor: int, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(told) as caught:
            system.write_whole(tmp_path / "a", "new")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}
        if isinstance(caught.value, OSError):
            assert caught.value.filename == str(tmp_path / "a")
    monkeypatch.undo()
    system.write_whole(tmp_path / "a", "caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    assert (tmp_path / "a").read_bytes() == b"caf\xc3\xa9"
    with pytest.raises(FileNotFoundError, match="none/b"):
        system.write_whole(tmp_path / "none" / "b", b"")


def test_cache_directory_follows_the_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert system.cache_directory() == tmp_path / "memwall"
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert system.cache_directory() == Path.home() / ".cache" / "memwall"


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0-3,8,10-11", 7), ("", 1), ("x", 1)])
def test_processor_lists_are_counted(text: str, count: int) -> None:
    assert system._count_list(text) == count


def test_file_systems_are_told_apart(tmp_path: Path) -> None:
    assert isinstance(system.file_system(tmp_path), str)
    assert system.file_system(tmp_path / "absent") == ""
    assert system.is_in_memory("tmpfs")
    assert not system.is_in_memory("ext4")
    assert system.is_remote("nfs4")
