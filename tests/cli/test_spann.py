"""`memwall index --spann` and `search` on what it writes: pages, memory that is kept to, machines, texts, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memwall.retrieve.base import unit
from tests.retrieve.test_head_tree import drawn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", drawn(3000))
    np.save(tmp_path / "q.npy", drawn(3000)[:4])
    np.save(tmp_path / "bytes.npy", drawn(800, dtype="uint8"))
    np.save(tmp_path / "none.npy", np.zeros((0, 3), np.float32))
    (tmp_path / "notes.txt").write_text("The river rose in the spring.\n\ndef add(a, b): return a\nBread is baked.\n")
    return tmp_path


def told(done: object) -> dict:
    assert done.exit_code == 0, done.stderr  # type: ignore[attr-defined]
    found: dict = json.loads(done.stdout)  # type: ignore[attr-defined]
    return found


def test_lists_are_written_and_read(memwall: Callable, folder: Path) -> None:
    made = told(memwall("index", folder / "x.npy", folder / "i", "--spann", "--json"))
    assert (made["form"], made["count"], made["d"], made["element"]) == ("spann", 3000, 24, "float32")
    assert made["file_bytes"] == (folder / "i").stat().st_size
    assert 0.12 < made["heads"] / 3000 < 0.2
    found = told(memwall("search", folder / "i", folder / "q.npy", "--top", "3", "--json"))
    assert [one["hits"][0]["id"] for one in found["results"]] == [0, 1, 2, 3]
    x = unit(drawn(3000))
    assert [one["hits"][1]["score"] for one in found["results"]] == pytest.approx(
        (-np.sort(-(x[:4] @ x.T), axis=1)[:, 1]).tolist(), abs=1e-3
    )
    reads = found["reads"]
    assert reads["rounds"] == 1
    assert reads["read_bytes"] == [4096 * pages for pages in reads["pages"]]
    assert max(reads["lists"]) <= 32
    fewer = told(memwall("search", folder / "i", folder / "q.npy", "--lists", "2", "--ratio", "1.5", "--json"))["reads"]
    assert max(fewer["lists"]) <= 2
    done = memwall("index", folder / "x.npy", folder / "i", "--spann", "--list-pages", "1", "--heads", "0.02")
    assert "entries cut" in done.stderr
    assert "in memory" in done.stdout
    done = memwall("search", folder / "i", folder / "q.npy", "--unchecked")
    assert "pages" in done.stderr
    assert "1 round" in done.stderr
    assert done.stdout.splitlines()[2].split()[:3] == ["0", "1", "0"]


def test_memory_bounds_what_is_resident(memwall: Callable, folder: Path) -> None:
    for memory, limit in (("40kB", 40_000), ("100kB", 100_000)):
        made = told(memwall("index", folder / "x.npy", folder / "i", "--spann", "--memory", memory, "--json"))
        assert 0.8 * limit < made["resident_bytes"] <= limit
    done = memwall("index", folder / "x.npy", folder / "j", "--spann", "--memory", "100")
    assert done.exit_code == 1
    assert "there must be one" in done.stderr
    assert not (folder / "j").exists()


def test_bytes_half_precision_and_packed_lists(memwall: Callable, folder: Path) -> None:
    made = told(memwall("index", folder / "bytes.npy", folder / "i", "--spann", "--metric", "l2", "--json"))
    assert made["element"] == "uint8"
    np.save(folder / "some.npy", drawn(800, dtype="uint8")[:2])
    found = told(memwall("search", folder / "i", folder / "some.npy", "--json"))
    assert [one["hits"][0]["score"] for one in found["results"]] == [0, 0]
    made = told(memwall("index", folder / "x.npy", folder / "i", "--spann", "--codec", "float16", "--json"))
    assert made["element"] == "float16"
    pytest.importorskip("zstandard")
    plain = told(memwall("index", folder / "bytes.npy", folder / "i", "--spann", "--metric", "l2", "--json"))
    packed = told(
        memwall("index", folder / "bytes.npy", folder / "j", "--spann", "--metric", "l2", "--packed", "--json")
    )
    assert packed["list_bytes"] < plain["list_bytes"]
    assert told(memwall("search", folder / "j", folder / "some.npy", "--json"))["results"][0]["hits"][0]["score"] == 0


def test_several_machines(memwall: Callable, folder: Path) -> None:
    made = told(memwall("index", folder / "x.npy", folder / "i", "--spann", "--machines", "2", "--json"))
    assert made["machines"] == [str(folder / "i.0"), str(folder / "i.1")]
    found = told(memwall("search", folder / "i", folder / "q.npy", "--json"))
    assert [one["hits"][0]["id"] for one in found["results"]] == [0, 1, 2, 3]
    assert all(1 <= one <= 2 for one in found["reads"]["machines"])
    assert "of 2 machines" in memwall("search", folder / "i", folder / "q.npy").stderr


def test_texts_are_found_by_texts(memwall: Callable, folder: Path) -> None:
    made = told(memwall("index", folder / "notes.txt", folder / "i", "--spann", "--json"))
    assert made["text_bytes"] > 0
    (one,) = told(memwall("search", folder / "i", "def add(a, b): return a", "--json"))["results"]
    assert one["hits"][0]["text"] == "def add(a, b): return a"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.npy", "--heads", "0.1"], "--heads goes with --spann"),
        (["x.npy", "--packed"], "--packed goes with --spann"),
        (["x.npy", "--machines", "2"], "--machines goes with --spann"),
        (["x.npy", "--spann", "--reduce", "pca:0.5"], "--reduce does not go with --spann"),
        (["x.npy", "--spann", "--metric", "inner"], "choose cosine or l2"),
        (["x.npy", "--metric", "l2"], "choose cosine or inner"),
        (["x.npy", "--spann", "--codec", "e4m3"], "no e4m3"),
        (["x.npy", "--spann", "--heads", "2"], "share above 0"),
        (["x.npy", "--spann", "--replicas", "0"], "replicas 0"),
        (["x.npy", "--spann", "--list-pages", "0"], "allow 1 at least"),
        (["x.npy", "--spann", "--heads", "0.1", "--memory", "1MB"], "leave out --heads"),
        (["none.npy", "--spann"], "no vectors"),
        (["bytes.npy", "--spann"], "--metric l2"),
    ],
)
def test_bad_input(memwall: Callable, folder: Path, arguments: list[str], says: str) -> None:
    done = memwall("index", folder / arguments[0], folder / "j", *arguments[1:])
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())
    assert not (folder / "j").exists()


def test_bad_searches(memwall: Callable, folder: Path) -> None:
    assert memwall("index", folder / "x.npy", folder / "plain").exit_code == 0
    done = memwall("search", folder / "plain", folder / "q.npy", "--lists", "3")
    assert done.exit_code == 2
    assert "made with --spann" in done.stderr
    assert memwall("index", folder / "x.npy", folder / "i", "--spann").exit_code == 0
    for arguments, says in ((["--ratio", "0.5"], "ratio"), (["--lists", "0"], "0 lists")):
        done = memwall("search", folder / "i", folder / "q.npy", *arguments)
        assert done.exit_code == 2
        assert says in done.stderr
    np.save(folder / "wide.npy", np.ones((2, 7), np.float32))
    assert "7 dimensions" in memwall("search", folder / "i", folder / "wide.npy").stderr
