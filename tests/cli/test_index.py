"""`memwall index`, `search` and `study embeddings`: files, tables, JSON, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.test_embedding_storage import vectors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", vectors(500, seed=1))
    np.save(tmp_path / "q.npy", vectors(500, seed=1)[:3])
    np.save(tmp_path / "other.npy", vectors(100, seed=2).astype(np.float64))
    np.save(tmp_path / "wide.npy", vectors(30, d=8))
    np.save(tmp_path / "flat.npy", np.ones(5))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    (tmp_path / "notes.txt").write_text("The river rose in the spring.\n\ndef add(a, b): return a\nBread is baked.\n")
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path


def test_vectors_are_stored_and_found(memwall: Callable, folder: Path) -> None:
    done = memwall(
        "index", folder / "x.npy", folder / "i", "--reduce", "pca:0.5", "--fit", folder / "other.npy", "--json"
    )
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["form"], told["vector_bytes"], told["times_smaller"]) == ("pca:0.5+e4m3", 16, 8)
    assert told["fitted_on"]["name"] == "other.npy"
    assert told["file_bytes"] == (folder / "i").stat().st_size
    done = memwall("search", folder / "i", folder / "q.npy", "--top", "4", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["hits"][0]["id"] for one in found["results"]] == [0, 1, 2]
    assert all(len(one["hits"]) == 4 for one in found["results"])
    done = memwall("search", folder / "i", folder / "q.npy", "--unchecked")
    assert "3 queries against 500 vectors" in done.stderr
    assert done.stdout.splitlines()[2].split()[:3] == ["0", "1", "0"]


def test_texts_are_found_by_texts(memwall: Callable, folder: Path) -> None:
    done = memwall("index", folder / "notes.txt", folder / "i")
    assert done.exit_code == 0, done.stderr
    assert "3 vectors as e4m3" in done.stdout
    done = memwall("search", folder / "i", "def add(a, b): return a", "--json")
    (one,) = json.loads(done.stdout)["results"]
    assert one["hits"][0]["text"] == "def add(a, b): return a"
    assert memwall("search", folder / "i", folder / "notes.txt", "--top", "1").exit_code == 0


def test_memory_chooses_the_form(memwall: Callable, folder: Path) -> None:
    chosen = {}
    for memory in ("100kB", "17kB", "9kB", "4000"):
        done = memwall("index", folder / "x.npy", folder / "i", "--memory", memory, "--json")
        assert done.exit_code == 0, done.stderr
        told = json.loads(done.stdout)
        limit = {"100kB": 100_000, "17kB": 17_000, "9kB": 9_000, "4000": 4000}[memory]
        assert told["count"] * told["vector_bytes"] + told["table_bytes"] <= limit
        chosen[memory] = (told["vector_bytes"], told["quality"])
    assert sorted(chosen.values(), reverse=True) == list(chosen.values())
    assert len(set(chosen.values())) == 4
    done = memwall("index", folder / "x.npy", folder / "j", "--memory", "1kB")
    assert done.exit_code == 1
    assert "the smallest form measured" in done.stderr
    assert not (folder / "j").exists()


def test_a_study_is_chosen_by(memwall: Callable, folder: Path) -> None:
    (folder / "judged").write_text("0 0\n1 1\n2 2\n")
    done = memwall(
        "study",
        "embeddings",
        folder / "x.npy",
        "--queries",
        folder / "q.npy",
        "--judged",
        folder / "judged",
        "--forms",
        "float32,e4m3,pca:0.5+e4m3,binary",
        "--out",
        folder / "out",
    )
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert rows["float32"][1:4] == ["128", "1", "1.0000"]
    assert rows["e4m3"][1] == "32"
    assert (folder / "out" / "frontier.png").read_bytes()[1:4] == b"PNG"
    points = folder / "out" / "study.json"
    done = memwall("index", folder / "x.npy", folder / "i", "--memory", "50kB", "--points", points, "--json")
    told = json.loads(done.stdout)
    best = {one["form"]: one["quality"] for one in json.loads(points.read_text())["points"]}
    assert told["quality"] == best[told["form"]]
    done = memwall("study", "embeddings", folder / "x.npy", "--forms", "float32,signs", "--json")
    assert json.loads(done.stdout)["frontier"] == ["signs", "float32"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["index", "x.npy", "i", "--codec", "int4"], "no element type 'int4'"),
        (["index", "x.npy", "i", "--reduce", "umap:0.5"], "cannot be stored"),
        (["index", "x.npy", "i", "--reduce", "pca:99"], "99 of 32 dimensions"),
        (["index", "x.npy", "i", "--metric", "l2"], "choose cosine or inner"),
        (["index", "x.npy", "i", "--metric", "inner", "--codec", "signs"], "take --metric cosine"),
        (["index", "x.npy", "i", "--memory", "1MB", "--codec", "e4m3"], "leave out --codec and --reduce"),
        (["index", "x.npy", "i", "--points", "p"], "--points goes with --memory"),
        (["index", "x.npy", "i", "--memory", "1g"], "1g"),
        (["index", "x.npy", "i", "--model", "demo"], "has vectors already"),
        (["index", "x.npy", "i", "--codec", "int8", "--fit", "wide.npy"], "8 dimensions, those of"),
        (["index", "flat.npy", "i"], "expected vectors [n, d], got shape [5]"),
        (["index", "text.npy", "i"], "real numbers"),
        (["index", "empty.txt", "i"], "holds no text"),
        (["index", "none.npy", "i"], "none.npy"),
        (["search", "x.npy", "q.npy"], "declares a header"),
        (["search", "none", "q.npy"], "none"),
        (["study", "embeddings", "x.npy", "--queries", "q.npy"], "--queries and --judged go together"),
        (["study", "embeddings", "x.npy", "--forms", ","], "name one at least"),
    ],
)
def test_bad_input(memwall: Callable, folder: Path, arguments: list[str], says: str) -> None:
    names = {path.name for path in folder.iterdir()} | {"i", "p", "none", "none.npy"}
    done = memwall(*(folder / word if word in names else word for word in arguments))
    assert done.exit_code == 2, done.stdout
    assert says in done.stderr
    assert not (folder / "i").exists()


def test_queries_must_go_with_the_index(memwall: Callable, folder: Path) -> None:
    memwall("index", folder / "x.npy", folder / "i")
    for queries, says in ((folder / "wide.npy", "8 dimensions; expected 32"), ("a text", "queries are vectors too")):
        done = memwall("search", folder / "i", queries)
        assert done.exit_code == 2
        assert says in done.stderr
    memwall("index", folder / "notes.txt", folder / "t")
    done = memwall("search", folder / "t", "a text", "--model", "elsewhere")
    assert done.exit_code == 2
    assert "made by the model 'demo'" in done.stderr


def test_searching_leaves_torch_alone(spawn: Callable, folder: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys; from memwall.cli import main; sys.argv = sys.argv[1:]\ntry:\n    main()\nexcept SystemExit as end:"
        "\n    assert not end.code\nassert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    )
    for arguments in (
        ["index", folder / "x.npy", folder / "i", "--reduce", "pca:0.5"],
        ["search", folder / "i", folder / "q.npy"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, "memwall", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
