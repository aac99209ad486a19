"""`memwall map`, `memwall simulate oblivious-map`: values, traces of what the host saw, bad input."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="maps are sealed with the extra `oblivious`")


@pytest.fixture
def made(memwall: Callable, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "pairs.txt").write_text("1\tone\n2\tzwei drei\n3\t\n", encoding="utf-8")
    paths = tmp_path / "users.map", tmp_path / "users.key"
    done = memwall("map", "create", paths[0], "--capacity", "1000", "--value-bytes", "20", "--key", paths[1],
                   "--from", tmp_path / "pairs.txt")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "3 of 1,000 items" in done.stdout
    assert "new key" in done.stderr
    return paths


def test_a_round(memwall: Callable, made: tuple[Path, Path], tmp_path: Path) -> None:
    path, key = made
    done = memwall("map", "put", path, "7", "seven", "--key", key)
    assert (done.exit_code, done.stdout) == (0, "1 put, 1 of them new\n")
    done = memwall("map", "get", path, "7", "2", "5", "--key", key)
    assert done.stdout == "7\tseven\n2\tzwei drei\n"
    assert "1 of 3 keys are not there" in done.stderr
    told = json.loads(memwall("map", "get", path, "3", "5", "--key", key, "--json").stdout)
    assert told["values"] == [{"key": 3, "found": True, "value": ""}, {"key": 5, "found": False}]
    assert told["visible_bytes"] == (told["pages_read"] + told["pages_written"]) * told["page_bytes"]
    told = json.loads(memwall("map", "delete", path, "7", "--key", key, "--json").stdout)
    assert told["deleted"] == [{"key": 7, "found": True, "value": "seven"}]
    (tmp_path / "more.txt").write_text("8\teight\n1\tONE\n", encoding="utf-8")
    told = json.loads(memwall("map", "put", path, "--from", tmp_path / "more.txt", "--key", key, "--json").stdout)
    assert (told["put"], told["new"]) == (2, 1)
    assert memwall("map", "get", path, "1", "7", "8", "--key", key).stdout == "1\tONE\n8\teight\n"


def test_values_that_are_no_text(memwall: Callable, made: tuple[Path, Path]) -> None:
    from memwall.retrieve.oblivious_file import MapFile, read_key

    path, key = made
    with MapFile(path, read_key(key)) as file:
        file.put({9: b"\xff\x00"})
    told = json.loads(memwall("map", "get", path, "9", "--key", key, "--json").stdout)
    assert base64.b64decode(told["values"][0]["base64"]) == b"\xff\x00"


def test_the_trace_is_what_the_host_saw(memwall: Callable, made: tuple[Path, Path], tmp_path: Path) -> None:
    path, key = made
    out = tmp_path / "trace.csv"
    told = json.loads(memwall("map", "get", path, "1", "99", "--key", key, "--trace", out, "--json").stdout)
    lines = [line.split(",") for line in out.read_text().splitlines()]
    assert lines[0] == ["op", "page", "bytes"]
    reads, writes = ([int(page) for op, page, _ in lines[1:] if op == what] for what in ("read", "write"))
    assert reads == writes
    assert len(reads) == told["pages_read"] <= 4
    assert {size for _, _, size in lines[1:]} == {str(told["page_bytes"])}


def test_info_and_rebuild(memwall: Callable, made: tuple[Path, Path]) -> None:
    path, key = made
    told = json.loads(memwall("map", "info", path, "--key", key, "--json").stdout)
    assert (told["items"], told["capacity"], told["value_bytes"], told["private_bins"]) == (3, 1000, 20, 25)
    assert sum(told["private_bytes"].values()) == told["private_bytes_together"]
    assert told["host_bytes"] == sum(one.stat().st_size for one in path.glob("pages-*"))
    done = memwall("map", "rebuild", path, "--capacity", "2000", "--private-share", "0.5", "--key", key)
    assert "3 of 2,000 items" in done.stdout
    assert memwall("map", "get", path, "1", "--key", key).stdout == "1\tone\n"
    assert memwall("map", "rebuild", path, "--capacity", "4", "--key", key).exit_code == 0
    memwall("map", "put", path, "50", "x", "--key", key)
    done = memwall("map", "put", path, "51", "x", "--key", key)
    assert done.exit_code == 1
    assert "full (4 items): 1 of 1 keys are not in, 51 first" in done.stderr


def test_what_was_broken_off_is_told(memwall: Callable, made: tuple[Path, Path]) -> None:
    from memwall.retrieve.oblivious_file import MapFile, read_key

    path, key = made
    file = MapFile(path, read_key(key))
    file.put({1: b"lost"})
    file.close()
    done = memwall("map", "get", path, "1", "--key", key)
    assert done.stdout == "1\tone\n"
    assert "undone" in done.stderr


def test_memory_chooses_the_share(memwall: Callable, tmp_path: Path) -> None:
    key = tmp_path / "key"
    create = ["map", "create", tmp_path / "a", "--capacity", "5000", "--key", key]
    told = json.loads(memwall(*create, "--memory", "500kB", "--json").stdout)
    assert 300_000 < told["private_bytes_together"] <= 500_000
    done = memwall(*create[:2], tmp_path / "b", *create[3:], "--memory", "100kB")
    assert done.exit_code == 1
    assert "slots_per_item 1.25" in done.stderr
    done = memwall(*create[:2], tmp_path / "b", *create[3:], "--memory", "1MB", "--private-share", "0.5")
    assert done.exit_code == 2
    assert [one.name for one in tmp_path.iterdir() if one.name not in ("a", "key")] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["put", "MAP", "1"], "one key and one value"),
        (["put", "MAP"], "--from with a file"),
        (["put", "MAP", "x", "y"], "KEY 'x': a whole number"),
        (["put", "MAP", "4294967296", "y"], "a whole number from 0 to 4,294,967,295"),
        (["put", "MAP", "1", "y" * 21], "has 21 bytes; this map's have at most 20"),
        (["put", "MAP", "--from", "BAD"], "line 2: no tab"),
        (["get", "MAP", "4294967296"], "whole number from 0"),
        (["get", "OTHER", "1"], "no oblivious map"),
        (["rebuild", "MAP", "--memory", "1MB", "--private-share", "0.1"], "leave out --private-share"),
        (["create", "MAP", "--capacity", "10"], "exists"),
        (["create", "OTHER", "--capacity", "10", "--value-bytes", "2", "--from", "PAIRS"], "has 3 bytes"),
    ],
)
def test_bad_input(arguments: list[str], says: str, memwall: Callable, made: tuple[Path, Path], tmp_path: Path) -> None:
    path, key = made
    (tmp_path / "bad.txt").write_text("1\tone\n2 two\n")
    names = {"MAP": path, "OTHER": tmp_path / "other", "BAD": tmp_path / "bad.txt", "PAIRS": tmp_path / "pairs.txt"}
    done = memwall("map", *[names.get(one, one) for one in arguments], "--key", key)
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (tmp_path / "other").exists()
    assert memwall("map", "get", path, "1", "--key", key).stdout == "1\tone\n"


def test_keys_are_read_as_keys(memwall: Callable, made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short")
    done = memwall("map", "get", made[0], "1", "--key", tmp_path / "key")
    assert (done.exit_code, "not a key of 32 bytes" in done.stderr) == (2, True)
    done = memwall("map", "get", made[0], "1", "--key", tmp_path / "nothing")
    assert done.exit_code == 2


def test_simulate(memwall: Callable) -> None:
    arguments = ["simulate", "oblivious-map", "--items", "64k", "--accesses", "100000"]
    done = memwall(*arguments)
    assert done.exit_code == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["0.01", "0.2", "0.5"]
    assert "tree-map" in done.stderr
    told = json.loads(memwall(*arguments, "--private", "0.2,1", "--json").stdout)
    assert told["items"] == 65536
    assert [one["hold"] for one in told["maps"]] == [True, True]
    assert told["maps"][1]["bytes_per_access"] == 0
    assert told["maps"][0]["private_bytes"]["position map"] == told["maps"][0]["paper_bytes"]["position map"]
    assert told["rivals_bytes_per_access"]["tree-map"] > 100 * told["maps"][0]["bytes_per_access"]
    for wrong in (["--private", "x"], ["--private", "2"], ["--items", "3"], ["--items", "x"]):
        assert memwall(*arguments, *wrong).exit_code == 2
