"""What the map is compared with answers rightly too, and moves the bytes it says."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import DoesNotFit, InputError
from memwall.retrieve.path_oram import OramArray, Scan, TreeMap, rival_bytes
from memwall.retrieve.untrusted import READ, WRITE

pytest.importorskip("cryptography", reason="pages are sealed with the extra `oblivious`")


def values(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 8), np.uint8)


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("count", [1, 5, 3000])
def test_an_array(count: int, recursive: bool, tmp_path: Path) -> None:
    told = [row.tobytes() for row in values(count)]
    found = OramArray(values(count), tmp_path, recursive=recursive)
    assert len(found.orams) == (2 if recursive and count > 1024 else 1)
    for oram in found.orams:
        oram.store.trace.clear()
    draw = np.random.default_rng(2)
    for _ in range(400):
        key = int(draw.integers(count))
        if draw.random() < 0.5:
            told[key] = draw.bytes(8)
            found.put(key, told[key])
        else:
            assert found.get(key) == told[key]
    assert found.visible_bytes == 400 * found.bytes_per_access
    assert all(int(oram.stash_count[0]) < 100 for oram in found.orams)
    with pytest.raises(InputError, match="places"):
        found.get(count)
    found.close()


def test_paths_are_read_and_written_whole() -> None:
    found = OramArray(values(1000))
    store = found.orams[0].store
    store.trace.log = []
    for _ in range(50):
        found.get(3)
    log = store.trace.log
    assert [op for op, _ in log] == [READ, WRITE] * 50
    leaves = []
    for (_, reads), (_, writes) in zip(log[::2], log[1::2], strict=True):
        assert reads.tolist() == writes.tolist()
        assert reads[0] == 0
        assert all((after - 1) // 2 == before for before, after in itertools.pairwise(reads))
        leaves.append(int(reads[-1]))
    assert len(set(leaves)) > 40  # another path each time


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_a_tree_map(count: int) -> None:
    draw = np.random.default_rng(3)
    keys = draw.choice(1000, count, replace=False).astype(np.uint32)
    told = {int(key): row.tobytes() for key, row in zip(keys, values(count), strict=True)}
    found = TreeMap(keys, values(count), 400)
    found.oram.store.trace.clear()
    for _ in range(500):
        key, kind = int(draw.integers(1000)), draw.random()
        before = told.get(key)
        if kind < 0.4 and found.count < 390:
            told[key] = draw.bytes(8)
            assert found.put(key, told[key]) == before
        elif kind < 0.5:
            told.pop(key, None)
            assert found.delete(key) == before
        else:
            assert found.get(key) == before
    assert found.visible_bytes == 500 * found.bytes_per_access
    assert found.root[2] <= found.deepest
    assert int(found.oram.stash_count[0]) < 200


def test_keys_in_order_keep_the_tree_balanced() -> None:
    found = TreeMap(np.zeros(0, np.uint32), values(0), 256)
    for key in range(256):
        found.put(key, bytes(8))
    assert found.root[2] <= 10  # 1.44 log2 258 = 11.5; an unbalanced one has 256
    assert [found.get(key) for key in (0, 255, 256)] == [bytes(8), bytes(8), None]
    with pytest.raises(DoesNotFit, match="full"):
        found.put(1000, bytes(8))
    assert found.get(128) == bytes(8)


def test_a_scan(tmp_path: Path) -> None:
    keys = np.arange(0, 200, 2, dtype=np.uint32)
    found = Scan(keys, values(100), tmp_path / "scan", rows=30)
    found.store.trace.clear()
    assert found.access(4) == values(100)[2].tobytes()
    assert found.access(4, b"12345678") == values(100)[2].tobytes()
    assert found.access(4) == b"12345678"
    assert (found.access(0), found.access(3)) == (values(100)[0].tobytes(), None)
    assert found.visible_bytes == 5 * found.bytes_per_access
    found.close()


def test_the_forecast_is_what_they_move() -> None:
    told = rival_bytes(3000, 8)
    array, recursive = OramArray(values(3000)), OramArray(values(3000), recursive=True)
    tree = TreeMap(np.arange(3000, dtype=np.uint32), values(3000), 3000)
    scan = Scan(np.arange(3000, dtype=np.uint32), values(3000))
    assert told == {
        "path-oram": array.bytes_per_access,
        "path-oram-recursive": recursive.bytes_per_access,
        "tree-map": tree.bytes_per_access,
        "scan": scan.bytes_per_access,
    }
