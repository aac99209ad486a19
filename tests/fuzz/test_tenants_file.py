"""Fuzzing the reader of shared indexes: read or refused with InputError, and no foreign vector is ever found."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.retrieve.cluster_tree import TreeShape
from memwall.retrieve.curator import Curator, CuratorSettings
from memwall.retrieve.curator_file import KEY, CuratorFile, write_curator
from tests.fuzz.test_readers import as_bytes, bounded, changed, changed_bytes, documents, survives

TINY = CuratorSettings(
    shape=TreeShape(branching=2, least_branching=2, points_per_centroid=2), max_list=2, filter_capacity=8
)
TENANTS = ("a", "b", "c")


def read(path: Path, verify: bool = True) -> None:
    index = CuratorFile(path, verify=verify).index
    assert index.tree.check() == ""
    for name in index.tenants:
        mine = index.readable(name).tolist()
        assert all(name in index.readers(label) for label in mine)
        found = index.search(np.ones((1, index.dimensions), np.float32), 3, name).ids[0].tolist()
        assert {label for label in found if label >= 0} <= set(mine)


@functools.cache
def file_bytes(folder: Path) -> bytes:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((20, 4)).astype(np.float32)
    index = Curator.train(x, TINY)
    index.add(x, readers=[[name for name in TENANTS if draw.random() < 0.5] for _ in x])
    write_curator(folder / "good", index)
    return (folder / "good").read_bytes()


def test_the_good_file_is_read(tmp_path: Path) -> None:
    file_bytes(tmp_path)
    read(tmp_path / "good")


@settings(bounded, max_examples=40)
@given(data=st.data())
def test_changed_files(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(data.draw(st.one_of(changed_bytes(file_bytes(tmp_path)), st.binary(max_size=200))))
    survives(lambda: read(path))


@settings(bounded, max_examples=80)
@given(data=st.data())
def test_contents_that_are_not_sealed(data: st.DataObject, tmp_path: Path) -> None:
    """A header or some numbers changed, and the digest not looked at."""
    path = tmp_path / "x"
    path.write_bytes(file_bytes(tmp_path))
    with SafetensorsFile(path) as file:
        held = {name: np.array(file.tensor(name)) for name in file.names()}
        told = json.loads(file.metadata[KEY])
    if data.draw(st.booleans()):
        told = data.draw(st.one_of(changed(told), documents))
    else:
        name = data.draw(st.sampled_from(sorted(set(held) - {"sha256"})))
        flat = held[name].reshape(-1).view(np.uint8)
        for _ in range(data.draw(st.integers(1, 3))):
            flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    metadata = {KEY: as_bytes(told).decode("utf-8", "replace")}
    with SafetensorsWriter(path, [(n, a.dtype, a.shape) for n, a in held.items()], metadata) as writer:
        for name, array in held.items():
            writer.write(name, array)
    survives(lambda: read(path, verify=False))
