"""`memwall index --tenants`, `search --tenant`, `memwall tenants`: who finds what, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.test_embedding_storage import vectors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x = vectors(300, seed=1)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "q.npy", x[:4])
    lines = ["ann, bob" if place % 2 else "bob" if place % 3 else "" for place in range(300)]
    (tmp_path / "who.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "short.txt").write_text("ann\n")
    (tmp_path / "bad.txt").write_text("a=b\n" * 300)
    (tmp_path / "notes.txt").write_text("The river rose.\n\nBread is baked.\nA ship sails.\n")
    (tmp_path / "notes-who.txt").write_text("ann\nbob\nann bob\n")
    return tmp_path


def made(memwall: Callable, folder: Path, *more: str) -> dict:
    done = memwall("index", folder / "x.npy", folder / "i", "--tenants", folder / "who.txt", "--json", *more)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def found(memwall: Callable, folder: Path, tenant: str, *more: str) -> dict:
    done = memwall("search", folder / "i", folder / "q.npy", "--tenant", tenant, "--json", *more)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_each_finds_its_own(memwall: Callable, folder: Path) -> None:
    told = made(memwall, folder)
    assert (told["count"], told["tenants"], told["permissions"]) == (300, 2, 150 + 250)
    assert told["file_bytes"] == (folder / "i").stat().st_size
    assert told["vector_bytes"] == 300 * 32 * 4
    ann, bob = (found(memwall, folder, name, "--top", "3") for name in ("ann", "bob"))
    assert (ann["readable"], bob["readable"]) == (150, 250)
    first = [[one["hits"][0]["id"] for one in each["results"]] for each in (ann, bob)]
    assert first[0][1::2] == [1, 3]
    assert first[1][1:] == [1, 2, 3]
    assert first[1][0] != 0  # that one nobody may read
    assert all(hit["id"] % 2 for one in ann["results"] for hit in one["hits"])
    assert ann["work_per_query"]["vector_distances"] <= 150
    few = found(memwall, folder, "bob", "--scan", "2", "--top", "1")
    assert few["work_per_query"]["vector_distances"] < ann["work_per_query"]["vector_distances"]
    done = memwall("search", folder / "i", folder / "q.npy", "--tenant", "ann", "--unchecked")
    assert "of the 150 vectors that ann may read" in done.stderr


def test_distances_instead_of_cosines(memwall: Callable, folder: Path) -> None:
    made(memwall, folder, "--metric", "l2")
    hit = found(memwall, folder, "ann")["results"][1]["hits"][0]
    assert (hit["id"], hit["score"]) == (1, 0)


def test_permissions_change(memwall: Callable, folder: Path) -> None:
    made(memwall, folder)
    done = memwall("tenants", folder / "i")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[2].split() == ["ann", "150", "50.0%"]
    done = memwall(
        "tenants", folder / "i", "--grant", "cy:0,2-5", "--grant", "ann:0", "--revoke", "bob:all", "--delete", "1,7",
        "--json",
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert (told["granted"], told["revoked"], told["deleted"]) == (6, 250, 2)
    assert told["readable"] == {"ann": 149, "bob": 0, "cy": 5}
    assert found(memwall, folder, "bob")["results"][0]["hits"] == []
    assert {hit["id"] for hit in found(memwall, folder, "cy", "--top", "9")["results"][0]["hits"]} == {0, 2, 3, 4, 5}
    done = memwall("tenants", folder / "i", "--delete", "3", "--by", "ann")
    assert done.exit_code == 0, done.stderr
    before = (folder / "i").read_bytes()
    done = memwall("tenants", folder / "i", "--delete", "2", "--by", "ann")  # it is bob's
    assert done.exit_code == 2
    assert "does not own vector 2" in done.stderr
    assert (folder / "i").read_bytes() == before


def test_texts_have_tenants(memwall: Callable, folder: Path) -> None:
    done = memwall("index", folder / "notes.txt", folder / "i", "--tenants", folder / "notes-who.txt")
    assert done.exit_code == 0, done.stderr
    assert "3 vectors for 2 tenants, 4 permissions" in done.stdout
    done = memwall("search", folder / "i", "Bread is baked.", "--tenant", "bob", "--json")
    assert json.loads(done.stdout)["results"][0]["hits"][0]["text"] == "Bread is baked."
    done = memwall("search", folder / "i", "Bread is baked.", "--tenant", "ann", "--json")
    texts = [hit["text"] for hit in json.loads(done.stdout)["results"][0]["hits"]]
    assert sorted(texts) == ["A ship sails.", "The river rose."]
    assert memwall("tenants", folder / "i", "--delete", "0").exit_code == 0
    done = memwall("search", folder / "i", "A ship sails.", "--tenant", "ann")
    assert "A ship sails." in done.stdout
    assert "river" not in done.stdout


BAD = [
    (["index", "x.npy", "j", "--tenants", "short.txt"], "1 lines for 300 vectors"),
    (["index", "x.npy", "j", "--tenants", "bad.txt"], "names no tenant"),
    (["index", "x.npy", "j", "--tenants", "none"], "none"),
    (["index", "x.npy", "j", "--tenants", "who.txt", "--codec", "e4m3"], "leave out --codec"),
    (["index", "x.npy", "j", "--tenants", "who.txt", "--metric", "inner"], "cosine or l2"),
    (["search", "i", "q.npy"], "say with --tenant who asks"),
    (["search", "i", "q.npy", "--tenant", "amn"], "did you mean ann?"),
    (["search", "i", "a text", "--tenant", "ann"], "queries are vectors too"),
    (["search", "plain", "q.npy", "--tenant", "ann"], "has no tenants"),
    (["tenants", "plain"], "holds no tenants of memwall"),
    (["tenants", "i", "--grant", "ann"], "write a name, a colon"),
    (["tenants", "i", "--grant", "ann:1-x"], "is no number of a vector"),
    (["tenants", "i", "--grant", "ann:9-3"], "goes nowhere"),
    (["tenants", "i", "--grant", "ann:300"], "no vector 300"),
    (["tenants", "i", "--grant", "ann:all"], "is no number of a vector"),
    (["tenants", "i", "--revoke", "cy:1"], "no tenant 'cy'"),
    (["tenants", "i", "--by", "ann"], "--by goes with --delete"),
]


def test_bad_input(memwall: Callable, folder: Path) -> None:
    made(memwall, folder)
    memwall("index", folder / "x.npy", folder / "plain")
    before = (folder / "i").read_bytes()
    names = {path.name for path in folder.iterdir()} | {"j", "none"}
    for arguments, says in BAD:
        done = memwall(*(folder / word if word in names else word for word in arguments))
        assert done.exit_code == 2, (arguments, done.stdout)
        assert says in done.stderr
        assert not (folder / "j").exists()
        assert (folder / "i").read_bytes() == before
