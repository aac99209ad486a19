"""Maps on disk: what was committed comes back, what was not is undone, and pairs of bins never serve twice."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit, InputError, MemwallError
from memwall.retrieve import oblivious_file
from memwall.retrieve.bolt import MapSettings
from memwall.retrieve.oblivious_file import MapFile, new_key, read_key
from memwall.retrieve.untrusted import Tampered

pytest.importorskip("cryptography", reason="maps are sealed with the extra `oblivious`")
KEY = bytes(range(32))
SHAPE = MapSettings(capacity=200, value_bytes=12)
ITEMS = {key: b"value %d" % key for key in range(150)}


def made(path: Path, **more: Any) -> Path:
    MapFile.create(path, SHAPE, KEY, ITEMS.items(), **more).close()
    return path


def everything(path: Path) -> dict[int, bytes]:
    with MapFile(path, KEY) as file:
        found = file.get(range(200))
    return {key: value for key, value in enumerate(found) if value is not None}


def names(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    path = made(tmp_path / "map")
    with MapFile(path, KEY) as file:
        assert file.put({3: b"", 170: b"x" * 12}) == [b"value 3", None]
        assert file.delete([4, 5]) == [b"value 4", b"value 5"]
        assert file.get([4, 3, 170, 6]) == [None, b"", b"x" * 12, b"value 6"]
    assert names(path) == ["pages-0", "state"]
    expected = {**ITEMS, 3: b"", 170: b"x" * 12}
    del expected[4], expected[5]
    assert everything(path) == expected
    assert [one.name for one in tmp_path.iterdir()] == ["map"]


def test_sizes_say_nothing_of_contents(tmp_path: Path) -> None:
    path, empty = made(tmp_path / "full"), tmp_path / "empty"
    MapFile.create(empty, SHAPE, KEY).close()
    everything(path)
    for name in ("state", "pages-0"):
        # generations are in the header: one digit here
        assert (path / name).stat().st_size == (empty / name).stat().st_size
    for file in path.iterdir():
        assert b"value" not in file.read_bytes().replace(b"value_bytes", b"")


def test_without_a_commit_all_is_undone_and_placed_anew(tmp_path: Path) -> None:
    path = made(tmp_path / "map")
    file = MapFile(path, KEY)
    page_key, table = file.map.pages.key, file.map.private.arrays["table"].copy()
    file.put({3: b"changed", 190: b"new"})
    file.close()
    assert "journal-0" in names(path)
    again = MapFile(path, KEY)
    assert again.recovered
    # what was read was seen: no pair of it, and no nonce, may come again
    assert again.map.pages.key != page_key
    assert not np.array_equal(again.map.private.arrays["table"], table)
    again.close()
    assert everything(path) == ITEMS
    assert names(path) == ["pages-1", "state"]


def crash(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """The (after + 1)-th call of a step of a commit or rebuild never happens."""
    calls, real = 0, getattr(os, name)

    def broken(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(oblivious_file.os, name, broken)


@pytest.mark.parametrize("step", ["fsync", "replace", "pread", "pwrite"])
@pytest.mark.parametrize("after", range(8))
def test_wherever_it_breaks_off_the_map_is_that_of_a_commit(
    step: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old, new = made(tmp_path / "map"), dict(ITEMS), {**ITEMS, 3: b"changed", 190: b"new"}
    with monkeypatch.context() as patch:
        crash(patch, step, after)
        file = None
        try:
            file = MapFile(path, KEY)
            file.put({3: b"changed", 190: b"new"})
            file.commit()
        except KeyboardInterrupt:
            pass
        if file is not None:
            file.close()
    found = everything(path)
    assert found in (old, new)
    assert everything(path) == found
    assert len(names(path)) == 2


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
@pytest.mark.parametrize("after", range(7))
def test_rebuilding_may_break_off_as_well(
    step: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "map")
    first = MapFile(path, KEY)
    first.put({3: b"changed"})
    first.close()
    with monkeypatch.context() as patch:
        crash(patch, step, after)
        with contextlib.suppress(KeyboardInterrupt):
            MapFile(path, KEY).close()
    assert everything(path) == ITEMS


def test_a_map_that_stopped_is_not_saved(tmp_path: Path) -> None:
    path = made(tmp_path / "map")
    file = MapFile(path, KEY)
    data = bytearray((path / "pages-0").read_bytes())
    (path / "pages-0").write_bytes(bytes(len(data)))
    with pytest.raises(Tampered):
        file.get(range(200))
    with pytest.raises(MemwallError, match="cannot be used"):
        file.commit()
    file.close()
    (path / "pages-0").write_bytes(data)
    assert everything(path) == ITEMS


def test_rebuilding_changes_its_shape(tmp_path: Path) -> None:
    path = made(tmp_path / "map")
    with MapFile(path, KEY) as file:
        with pytest.raises(DoesNotFit, match=r"full \(200 items"):
            file.put(dict.fromkeys(range(1000, 1100), b""))
        file.commit()
        file.rebuild(MapSettings(capacity=500, value_bytes=20, private_share=0.5))
        assert file.settings.capacity == 500
        file.put({2000: b"y" * 20})
        with pytest.raises(InputError, match="not committed"):
            file.rebuild()
    found = everything(path)
    assert {key: found[key] for key in ITEMS} == ITEMS
    with MapFile(path, KEY) as file:
        assert file.get([2000]) == [b"y" * 20]
        file.commit()
        with pytest.raises(InputError, match="has 20 bytes"):
            file.rebuild(MapSettings(capacity=500, value_bytes=12))


def test_a_copy_of_an_earlier_state_does_not_take_later_pages(tmp_path: Path) -> None:
    path = made(tmp_path / "map")
    state = (path / "state").read_bytes()
    everything(path)
    (path / "state").write_bytes(state)
    with pytest.raises(Tampered), MapFile(path, KEY) as file:
        file.get(range(200))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = made(tmp_path / "map")
    with MapFile(path, KEY), pytest.raises(InputError, match="another process"):
        MapFile(path, KEY)
    MapFile(path, KEY).close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-1], "its header speaks of"),
        (lambda data: data + b"x", "its header speaks of"),
        (lambda data: b"X" + data[1:], "no state"),
        (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "no state"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "file was changed"),
        (lambda data: data.replace(b'"capacity": 200', b'"capacity": 999'), "its header speaks of"),
        (lambda data: data.replace(b'"capacity": 200', b'"capacity": 2e2'), "capacity"),
        (lambda data: data.replace(b'"epoch": 0', b'"epoch": 1'), "file was changed"),
        (lambda data: data.replace(b'"epoch"', b'"eboch"'), "eboch"),
        (lambda data: b"", "no state"),
    ],
)
def test_states_that_are_none(change: Any, says: str, tmp_path: Path) -> None:
    path = made(tmp_path / "map")
    (path / "state").write_bytes(change((path / "state").read_bytes()))
    with pytest.raises(MemwallError, match=says):
        MapFile(path, KEY)
    assert not shutil.rmtree(path)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = made(tmp_path_factory.mktemp("states") / "map")
    return path, (path / "state").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 40), st.integers(1, 255), st.booleans())
def test_a_byte_that_differs_is_refused(states: tuple[Path, bytes], at: int, change: int, early: bool) -> None:
    """Anywhere, and in the header more often than its share is."""
    path, data = states
    changed = bytearray(data)
    changed[at % (300 if early else len(data))] ^= change
    (path / "state").write_bytes(changed)
    with pytest.raises(MemwallError):
        MapFile(path, KEY)


def test_keys_and_names(tmp_path: Path) -> None:
    key = new_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key
    assert (tmp_path / "key").stat().st_mode & 0o77 == 0
    with pytest.raises(FileExistsError):
        new_key(tmp_path / "key")
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(InputError, match="not a key of 32 bytes"):
        read_key(tmp_path / "short")
    path = made(tmp_path / "map")
    with pytest.raises(Tampered, match="key is another one"):
        MapFile(path, key)
    with pytest.raises(InputError, match="exists"):
        made(path)
    with pytest.raises(InputError, match="no oblivious map"):
        MapFile(tmp_path, KEY)
    with pytest.raises(InputError, match="has 13 bytes"):
        MapFile.create(tmp_path / "other", SHAPE, KEY, [(1, b"x" * 13)])
    with MapFile(path, KEY) as file:
        for wrong in (-1, 1 << 32, 1 << 70):
            with pytest.raises(InputError, match="whole number from 0"):
                file.get([wrong])
    assert not (tmp_path / "other").exists()
