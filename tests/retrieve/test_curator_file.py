"""Files of shared indexes: what is written comes back and may change, and what does not add up is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.retrieve.curator import Curator
from memwall.retrieve.curator_file import KEY, CuratorFile, holds_tenants, write_curator
from memwall.retrieve.vector_file import DIGEST, VectorFile
from tests.retrieve.test_curator import SMALL, X, grown


def changed_file(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Writes a file again with other arrays or another header; its digest is that of before."""
    with SafetensorsFile(path) as file:
        held = {name: np.array(file.tensor(name)) for name in file.names()}
        told = json.loads(file.metadata[KEY])
    change(held, told)
    specs = [(name, array.dtype, array.shape) for name, array in held.items()]
    with SafetensorsWriter(path, specs, {KEY: json.dumps(told)}) as writer:
        for name, array in held.items():
            writer.write(name, array)


def same(a: Curator, b: Curator, asked: np.ndarray = X[:9]) -> None:
    assert (a.tenants, a.settings, a.metric, a.next_label) == (b.tenants, b.settings, b.metric, b.next_label)
    for name in a.tenants:
        assert a.readable(name).tolist() == b.readable(name).tolist()
        np.testing.assert_array_equal(a.search(asked, 4, name).ids, b.search(asked, 4, name).ids)
    for name, array in a.tree.state().items():
        np.testing.assert_array_equal(array, b.tree.state()[name])


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path, index = tmp_path / "x", grown(SMALL)
    index.delete(index.readable("t1")[::2])
    index.add(X[:3], owner="t2")
    told: list[tuple[int, int]] = []
    write_curator(path, index, progress=lambda done, whole: told.append((done, whole)))
    assert told == [(index.count, index.count)]
    assert holds_tenants(path)
    file = CuratorFile(path)
    same(file.index, index)
    assert (file.model, file.text) == (None, None)
    assert file.nbytes == path.stat().st_size
    assert [other.name for other in tmp_path.iterdir()] == ["x"]
    assert file.index.tree.check() == ""


def test_vectors_stay_in_the_file_until_slots_are_used_again(tmp_path: Path) -> None:
    path, x = tmp_path / "x", np.random.default_rng(0).standard_normal((33_000, 64)).astype(np.float32)
    index = Curator.train(x[:500], metric="l2")
    index.grant(index.add(x), "a")
    write_curator(path, index)
    found = CuratorFile(path).index
    assert found.bytes()["mapped"] == 4 * 8192 * 64 * 4  # all but the last piece, which has room
    before = path.read_bytes()
    found.delete([5])
    new = found.add(x[:1] + 1, owner="a")
    assert found.bytes()["mapped"] == 3 * 8192 * 64 * 4
    assert found.search(x[:1] + 1, 1, "a").ids.tolist() == [new.tolist()]
    assert path.read_bytes() == before
    write_curator(path, found)  # over the file that it lies in
    same(CuratorFile(path).index, found, x[:9])
    assert found.tree.check() == ""


def test_texts_go_with_their_vectors(tmp_path: Path) -> None:
    path, index = tmp_path / "x", grown(SMALL)
    write_curator(path, index, text=lambda label: f"text {label} ä", model="demo")
    file = CuratorFile(path)
    assert file.model == "demo"
    file.index.delete([0, 3, 4])
    write_curator(path, file.index, text=file.text, model=file.model)
    file = CuratorFile(path)
    assert file.text is not None
    assert [file.text(label) for label in (1, 5, 399)] == ["text 1 ä", "text 5 ä", "text 399 ä"]


def test_no_vectors(tmp_path: Path) -> None:
    index = Curator.train(X, SMALL)
    index.add_tenant("a")
    write_curator(tmp_path / "x", index)
    found = CuratorFile(tmp_path / "x").index
    assert found.search(X[:1], 2, "a").ids.tolist() == [[-1, -1]]
    found.grant(found.add(X[:2]), "a")
    assert found.readable("a").tolist() == [0, 1]


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_curator(path, grown(SMALL))
    data = path.read_bytes()
    for place in (len(data) // 2, len(data) - 40):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(InputError, match="digest differs"):
            CuratorFile(path)


def moved(name: str, place: int, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(held: dict[str, Any], told: dict[str, Any]) -> None:
        held[name][place] = value

    return change


def header(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(held: dict[str, Any], told: dict[str, Any]) -> None:
        told[name] = value

    return change


def foreign(held: dict[str, Any], told: dict[str, Any]) -> None:
    """A short list that leads its tenant to a vector it may not read."""
    starts = np.concatenate([[0], held["access_ends"][:-1]])
    tenant, node = held["list_tenants"][0], held["list_nodes"][0]
    for place, (start, end) in enumerate(zip(starts, held["access_ends"], strict=True)):
        above = held["leaves"][place]
        while above > node:
            above = held["parents"][above]
        if above == node and tenant not in held["access"][start:end]:
            held["list_ids"][0] = place
            return
    raise AssertionError("no such vector")


def blind(held: dict[str, Any], told: dict[str, Any]) -> None:
    held["filters"][:] = 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (foreign, "names a vector that its tenant may not read"),
        (blind, "a filter does not know a tenant"),
        (moved("list_ids", 0, 10**6), "names no vector"),
        (moved("list_nodes", 0, 10**6), "a node or a tenant that is none"),
        (moved("list_nodes", 0, -1), "a node or a tenant that is none"),
        (moved("list_ends", 0, 0), "ends of short lists do not rise"),
        (moved("access_ends", 3, -1), "ends of permissions do not rise"),
        (moved("access", -1, 99), "names tenant 99, but there are 6"),
        (moved("leaves", 0, 0), "a node that is no leaf"),
        (moved("leaves", 0, 10**6), "a node that is no leaf"),
        (moved("labels", 1, 0), "two vectors have one label"),
        (moved("labels", 1, -5), "a label or an owner that is none"),
        (moved("labels", 1, 10**6), "next_label 400 is not above"),
        (moved("owners", 1, -2), "a label or an owner that is none"),
        (moved("parents", 1, 1), "no tree of clusters"),
        (moved("centroids", 0, np.nan), "NaN"),
        (lambda held, told: held.update(list_ids=np.delete(held["list_ids"], 0)), "short lists end elsewhere"),
        (lambda held, told: held.update(filters=held["filters"][:, 1:].copy()), "tensor filters is"),
        (lambda held, told: held.update(access=held["access"].astype(np.int64)), "tensor access is"),
        (lambda held, told: held.update(more=held["access"]), "missing or unknown: 'more'"),
        (lambda held, told: held.pop("owners"), "missing or unknown: 'owners'"),
        (header("version", 2), "version must be 1"),
        (header("count", 401), "tensor vectors is"),
        (header("d", 31), "tensor vectors is"),
        (header("metric", "dot"), "metric must be one of"),
        (header("tenants", ["a"] * 6), "different names"),
        (header("tenants", ["a", "b", "c", "d", "e", 3]), "different names"),
        (header("tenants", ["a"]), "but there are 1"),
        (lambda held, told: told["settings"].update(max_list=0), "max_list must be"),
        (lambda held, told: told["settings"].update(max_list=1), "empty or too long"),
        (lambda held, told: told["settings"]["shape"].update(branching=1), "branching is 1"),
        (lambda held, told: told["settings"].pop("scan_factor"), "scan_factor must be"),
        (header("other", 2), "unknown field"),
    ],
)
def test_what_does_not_add_up(change: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_curator(path, grown(SMALL))
    changed_file(path, change)
    with pytest.raises(InputError, match=says):
        CuratorFile(path, verify=False)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    from memwall.models import DEMO_DIRECTORY

    assert not holds_tenants(DEMO_DIRECTORY / "model.safetensors")
    with pytest.raises(InputError, match="holds no tenants of memwall"):
        CuratorFile(DEMO_DIRECTORY / "model.safetensors")
    write_curator(tmp_path / "x", grown(SMALL))
    with pytest.raises(InputError, match="holds no vectors of memwall"):
        VectorFile(tmp_path / "x")
    with SafetensorsFile(tmp_path / "x") as file:
        assert file.info(DIGEST).shape == (32,)
