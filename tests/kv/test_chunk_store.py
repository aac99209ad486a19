"""The store of kept chunks: what stays, on which tier, and what is said of files that cannot be used."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memwall import kv
from memwall.errors import InputError
from memwall.formats.safetensors_file import SafetensorsFile
from memwall.kv.cache_craft import CraftSettings, chunk_id
from memwall.kv.chunk_file import ChunkFile
from memwall.kv.chunk_store import STATE, ChunkStore
from memwall.memory import Arena, Ledger
from tests.kv.chunk_cases import ORIGIN, SETTINGS, SHAPE, TOKENS, new_store, rows_of, write_chunk

ROW_BYTES = 2 * SHAPE.num_layers * TOKENS * SHAPE.row_values * 2


def layer_of(store: ChunkStore, name: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    variant = store[name]
    keys = np.empty((variant.context.num_tokens, SHAPE.num_kv_heads, SHAPE.head_dim), np.float16)
    values = np.empty_like(keys)
    store.read_layer(variant, layer, keys, values)
    return keys, values


def test_a_chunk_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_chunk(tmp_path, 100, "ab")
    with new_store(tmp_path) as store:
        assert len(store) == 1
        (context,) = store.variants(chunk_id(np.arange(100, 100 + TOKENS))).values()
        assert context.predecessors == (chunk_id([ord("a")]), chunk_id([ord("b")]))
        assert context.inter.tolist() == [1.0, 2.0]
        for layer in range(SHAPE.num_layers):
            for mine, want in zip(layer_of(store, path.stem, layer), rows_of(range(100, 100 + TOKENS), layer)):
                np.testing.assert_array_equal(mine, want)


def test_scores_outlive_a_run_and_the_cheap_to_repair_is_worth_more(tmp_path: Path) -> None:
    cheap, dear = write_chunk(tmp_path, 100).stem, write_chunk(tmp_path, 200).stem
    with new_store(tmp_path) as store:
        store.begin_request()
        store.unpin(store.use(cheap, 0.1))
        store.unpin(store.use(dear, 0.9))
        assert store.score(store[cheap]) > store.score(store[dear]) > 1
        before = store.score(store[cheap])
    with new_store(tmp_path) as store:
        assert store.clock == 1
        assert store.score(store[cheap]) == pytest.approx(before)
        store.begin_request()
        assert store.score(store[cheap]) < before


@pytest.mark.parametrize("by_value", [True, False])
def test_the_least_valuable_leaves_first(tmp_path: Path, by_value: bool) -> None:
    names = [write_chunk(tmp_path, first).stem for first in (100, 200, 300)]
    size = (tmp_path / f"{names[0]}.chunk").stat().st_size
    with new_store(tmp_path, disk_bytes=3 * size, by_value=by_value) as store:
        for name, overhead in ((names[0], 0.05), (names[1], 1.0), (names[2], 0.5)):
            store.begin_request()
            store.unpin(store.use(name, overhead))
        store.begin_request()
        store.add(write_chunk(tmp_path, 400))
        gone = names[1] if by_value else names[0]  # by use, the oldest
        assert gone not in store
        assert not (tmp_path / f"{gone}.chunk").exists()
        assert len(store) == 3
        assert store.disk_used_bytes <= 3 * size


def test_a_chunk_in_use_does_not_leave(tmp_path: Path) -> None:
    first = write_chunk(tmp_path, 100).stem
    with new_store(tmp_path, replace(SETTINGS, chunks=1, variants=1)) as store:
        variant = store.use(first, 1.0)
        other = store.add(write_chunk(tmp_path, 200))
        assert {first, other.file.name} <= {v.file.name for v in (store[first], store[other.file.name])}
        store.unpin(variant)
        store.add(write_chunk(tmp_path, 300))
        assert len(store) == 1


def test_variants_of_one_chunk_are_bounded(tmp_path: Path) -> None:
    with new_store(tmp_path, replace(SETTINGS, variants=2)) as store:
        for names in ("a", "b", "c"):
            store.begin_request()
            store.add(write_chunk(tmp_path, 100, names))
        kept = store.variants(chunk_id(np.arange(100, 100 + TOKENS))).values()
        assert {context.predecessors for context in kept} == {(chunk_id([ord(name)]),) for name in "bc"}
        assert len(list(tmp_path.glob("*.chunk"))) == 2


def test_memory_takes_what_is_worth_more(tmp_path: Path) -> None:
    names = [write_chunk(tmp_path, first).stem for first in (100, 200, 300)]
    with new_store(tmp_path, ram_bytes=2 * ROW_BYTES) as store:
        for name, overhead in zip(names, (1.0, 0.5, 0.1)):
            store.unpin(store.use(name, overhead))
        for name in names:
            assert store.admit(store[name])
            for layer in range(SHAPE.num_layers):
                layer_of(store, name, layer)
        assert [store[name].resident for name in names] == [False, True, True]
        assert store.ram_used_bytes == 2 * ROW_BYTES
        assert store.arena.used_bytes >= 2 * ROW_BYTES
        assert not store.admit(store[names[0]])  # worth less than what is there
        for name, first in zip(names[1:], (200, 300)):
            os.truncate(tmp_path / f"{name}.chunk", 10)  # memory serves it, the file is not read
            np.testing.assert_array_equal(layer_of(store, name, 1)[0], rows_of(range(first, first + TOKENS), 1)[0])
    assert store.arena.used_bytes == 0


def test_preloading_fills_memory_in_the_background(tmp_path: Path) -> None:
    names = [write_chunk(tmp_path, first).stem for first in (100, 200)]
    with new_store(tmp_path, ram_bytes=1 << 20, rate_bytes_per_s=5e6) as store:
        store.preload([*names, "gone"])
        store.wait_preload()
        assert all(store[name].resident and not store[name].pins for name in names)
        assert store.load_bytes_per_s is not None
        assert store.load_bytes_per_s < 1e8  # through the emulated disk


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = write_chunk(tmp_path, 100, "a")
    data = path.read_bytes()

    def refused(changed: bytes, says: str) -> None:
        path.write_bytes(changed)
        with pytest.raises(InputError, match=says) as caught:
            new_store(tmp_path)
        assert str(path) in str(caught.value)

    refused(data[:100], "truncated|few")
    refused(data[:-10], "bytes")
    refused(b"nothing of the kind" * 10, "header")
    refused(data.replace(b"memwall-chunk", b"memwall-chonk"), "not a kept chunk")
    refused(data.replace(b"a" * 64, b"b" * 64), "another model")
    path.write_bytes(data)
    with SafetensorsFile(path) as file:
        inter, rows = file.info("inter").start, file.info("keys.1").start
    refused(data[:inter] + bytes(8) + data[inter + 8 :], "altered")
    changed = bytearray(data)
    changed[rows] ^= 1
    path.write_bytes(changed)
    with new_store(tmp_path) as store:  # rows are looked at when they are read
        layer_of(store, path.stem, 0)
        with pytest.raises(InputError, match=r"keys of layer 1 differ") as caught:
            layer_of(store, path.stem, 1)
        assert str(path) in str(caught.value)
    path.write_bytes(data)
    path.rename(tmp_path / ("0" * 32 + ".chunk"))
    with pytest.raises(InputError, match="should be called"):
        new_store(tmp_path)


def test_another_shape_or_other_weights_are_refused(tmp_path: Path) -> None:
    path = write_chunk(tmp_path, 100)
    arena = Arena(1 << 20, Ledger())
    with pytest.raises(InputError, match="int4"):
        ChunkStore(tmp_path, replace(ORIGIN, specs={"x": "int8"}), SHAPE, arena, SETTINGS)
    with pytest.raises(InputError, match="arrays"):
        ChunkFile(path, ORIGIN, kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16))


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="chunk-store"):
        new_store(tmp_path / "file")
    with pytest.raises(InputError, match="chunk-store"):
        new_store(tmp_path / "none" / "deeper")
    with new_store(tmp_path / "made"), pytest.raises(InputError, match="another run"):
        new_store(tmp_path / "made")
    new_store(tmp_path / "made").close()


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    name = write_chunk(tmp_path, 100).stem
    new_store(tmp_path).close()
    state = json.loads((tmp_path / STATE).read_text())
    for change in ({"format": "x"}, {"clock": -1}, {"scores": {name: {"score": "high"}}}, {"scores": [1]}):
        (tmp_path / STATE).write_text(json.dumps({**state, **change}))
        with pytest.raises(InputError, match="scores"):
            new_store(tmp_path)
    (tmp_path / STATE).write_text("{")
    with pytest.raises(InputError, match="scores"):
        new_store(tmp_path)


def test_a_chunk_larger_than_the_store_is_not_kept(tmp_path: Path) -> None:
    with new_store(tmp_path, disk_bytes=1000) as store:
        assert store.writer(np.arange(TOKENS), (), ()) is None
        assert "not kept" in store.notes[0]
    assert not list(tmp_path.glob("*.chunk"))


def test_a_full_disk_costs_the_chunk_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with new_store(tmp_path) as store:
        monkeypatch.setattr(os, "posix_fallocate", full)
        assert store.writer(np.arange(TOKENS), (), ()) is None
        assert "too little left" in store.notes[0]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("partial")]


def test_settings_bound_the_number_of_chunks(tmp_path: Path) -> None:
    with new_store(tmp_path, CraftSettings(chunks=2, variants=1)) as store:
        for first in (100, 200, 300):
            store.begin_request()
            store.add(write_chunk(tmp_path, first))
        assert len(store) == 2
