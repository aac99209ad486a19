"""Lists around heads: exactness with all lists, pages and rounds counted, pruning by hand, files, and bad input."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.formats.safetensors_file import SafetensorsFile
from memwall.retrieve.base import unit
from memwall.retrieve.closure import ClosureSettings
from memwall.retrieve.head_tree import HeadSettings
from memwall.retrieve.list_file import LIST_PAGE_BYTES, stored_bytes
from memwall.retrieve.spann import SearchSettings, SpannSettings, build, head_bytes, surviving, whole_ranges
from memwall.retrieve.spann_file import SpannFile, is_spann, prepared, write_spann
from memwall.retrieve.vector_file import write_vectors
from tests.retrieve.test_embedding_storage import fitted, vectors
from tests.retrieve.test_head_tree import drawn, squared

ALL = SearchSettings(lists=1 << 20, ratio=float("inf"), budget=1 << 20)


def written(path: Path, x: np.ndarray, metric: str = "l2", element: str | None = None, **changes: object) -> SpannFile:
    settings = SpannSettings(**changes)  # type: ignore[arg-type]
    with prepared(x, metric, path, element) as held:  # type: ignore[arg-type]
        write_spann(path, build(held, settings), metric=metric)  # type: ignore[arg-type]
    return SpannFile(path)


def exact(x: np.ndarray, asked: np.ndarray, top: int) -> np.ndarray:
    return squared(asked, x).argsort(axis=1, kind="stable")[:, :top]


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {}),
        ("float32", {"ids_last": True}),
        ("float32", {"delta": True, "ids_last": True}),
        ("float32", {"delta": True, "compress": True}),
        ("float16", {"ids_last": True}),
        ("int8", {}),
        ("uint8", {"delta": True}),
        ("uint8", {"delta": True, "compress": True, "ids_last": True}),
    ],
)
def test_all_lists_give_the_exact_answer_and_nothing_twice(tmp_path: Path, dtype: str, changes: dict) -> None:
    if changes.get("compress"):
        pytest.importorskip("zstandard")
    x = drawn(1200, 19, dtype=dtype)
    asked = x[5:1200:97].astype(np.float32) + 0.01
    file = written(tmp_path / "i", x, element=dtype, page_limit=None, **changes)
    hits, reads = file.vectors.search_counted(asked, 15, ALL)
    best = np.sort(squared(asked, x), axis=1)[:, :15]
    np.testing.assert_allclose(-hits.scores, best, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == 15 for row in hits.ids.tolist())
    np.testing.assert_allclose(np.take_along_axis(squared(asked, x), hits.ids, axis=1), best, rtol=1e-4, atol=1e-4)
    assert (reads.compared == 1200 - len(file.vectors.head_ids)).all()  # each once, however many lists hold it
    assert (reads.rounds == 1).all()
    file.close()


def test_heads_are_results_and_never_in_lists(tmp_path: Path) -> None:
    x = drawn(800)
    with prepared(x, "l2", tmp_path / "i") as held:
        built = build(held, SpannSettings())
    assert not set(built.head_ids.tolist()) & set(built.lists.members.tolist())
    assert built.lists.orphans == 0
    assert set(built.lists.members.tolist()) | set(built.head_ids.tolist()) == set(range(800))
    file = written(tmp_path / "i", x)
    heads = file.vectors.head_ids
    hits, _ = file.vectors.search_counted(x[heads], 1)
    np.testing.assert_array_equal(hits.ids[:, 0], heads)


def test_pages_are_distinct_and_as_many_as_bytes_need(tmp_path: Path) -> None:
    x = drawn(3000)
    file = written(tmp_path / "i", x, heads=HeadSettings(share=0.1))
    rows = file.lists.directory.records
    sizes = stored_bytes(rows, file.lists.format.entry_bytes)
    assert (rows["pages"] == -(-sizes // LIST_PAGE_BYTES)).all()
    asked = file.vectors.queries(x[:40])
    for settings in (SearchSettings(lists=1), SearchSettings(lists=20, ratio=np.inf), SearchSettings(lists=8, ratio=2)):
        reader = file.lists.reader
        before = reader.stats.read_bytes, reader.stats.batches
        _, reads = file.vectors.search_counted(x[:40], 5, settings)
        for at, (heads, _, survive) in enumerate(file.vectors.near_lists(asked, 5, settings)):
            chosen = heads[survive]
            touched = {
                page for one in chosen for page in range(rows["page"][one], rows["page"][one] + rows["pages"][one])
            }
            assert reads.pages[at] == len(touched)
            assert reads.lists[at] == len(chosen) <= settings.lists
            assert reads.pages[at] <= rows["pages"][chosen].sum()
        assert reader.stats.read_bytes - before[0] == reads.nbytes.sum()
        assert reader.stats.batches - before[1] == reads.rounds.sum() <= 40
        assert reads.rounds.max() == 1


def test_ranges_are_joined_where_lists_share_pages() -> None:
    begins, ends, group = whole_ranges(np.array([9, 2, 3, 4, 20]), np.array([1, 2, 1, 3, 2]))
    assert begins.tolist() == [2, 9, 20]
    assert ends.tolist() == [7, 10, 22]
    assert group.tolist() == [1, 0, 0, 0, 2]


def test_pruning_is_by_squared_distances() -> None:
    """Heads at 1, 2 and 2.9 from the query, squared 1, 4, 8.41: a ratio of 8 keeps two; of plain distances, all."""
    apart = np.array([[1, 4, 8.41], [0.5, 4.0, 4.1], [0, 1e-9, 1]], np.float32)
    assert surviving(apart, 8, 1e-6).tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert surviving(apart, float("inf"), 0).all()
    assert surviving(np.array([[2, np.inf]], np.float32), float("inf"), 0).tolist() == [[True, False]]


def test_easy_queries_read_few_lists(tmp_path: Path) -> None:
    x = drawn(4000, seed=4)
    file = written(tmp_path / "i", x)
    far = np.float32(np.random.default_rng(1).standard_normal((20, 24)) * 3)
    settings = SearchSettings(lists=64, ratio=2, unpruned=0)
    easy = file.vectors.search_counted(x[file.vectors.head_ids[:20]] + np.float32(0.01), 1, settings)[1].lists
    hard = file.vectors.search_counted(far, 1, settings)[1].lists
    assert easy.mean() < hard.mean() / 4
    every = SearchSettings(lists=64, ratio=2, unpruned=1)  # what is so near a head prunes nothing
    on_heads = x[file.vectors.head_ids[:20]]
    assert (file.vectors.search_counted(on_heads, 1, every)[1].lists == 64).all()


def test_cosines_are_of_vectors_brought_to_length_one(tmp_path: Path) -> None:
    x, asked = drawn(700) * 3, drawn(9, seed=5)
    file = written(tmp_path / "i", x, "cosine", page_limit=None)
    hits = file.vectors.search_counted(asked, 6, ALL)[0]
    cosines = unit(asked) @ unit(x).T
    np.testing.assert_allclose(hits.scores, -np.sort(-cosines, axis=1)[:, :6], atol=1e-5)
    assert file.vectors.search(asked, 3).ids.shape == (9, 3)
    with pytest.raises(InputError, match="query 1 is all zeros"):
        file.vectors.search(asked * [[1], [0], *[[1]] * 7], 3)
    assert file.vectors.search_counted(asked, 700, ALL)[0].ids.min() == 0
    more = file.vectors.search_counted(asked, 710, ALL)[0]
    assert (more.ids[:, 700:] == -1).all()
    assert np.isneginf(more.scores[:, 700:]).all()


def test_a_cut_is_told(tmp_path: Path) -> None:
    x = drawn(2000)
    with prepared(x, "l2", tmp_path / "i") as held:
        built = build(held, SpannSettings(heads=HeadSettings(share=0.02), page_limit=1))
    assert built.lists.lengths.max() == 4096 // (24 * 4 + 4)
    assert built.lists.cut > 0
    members = np.concatenate([built.lists[at] for at in range(len(built.lists.ends))])
    assert built.lists.orphans == 2000 - len(np.union1d(members, built.head_ids))


def test_resident_bytes_are_what_was_said(tmp_path: Path) -> None:
    for changes in ({}, {"degree": 8}):
        file = written(tmp_path / "i", drawn(2000), **changes)
        held = file.vectors
        per_head = held.resident_bytes / len(held.head_ids)
        assert per_head <= head_bytes(24 * 4, changes.get("degree", 32)) + 1
        assert per_head >= head_bytes(24 * 4, changes.get("degree", 32)) - 8
        assert held.nbytes == held.resident_bytes + file.lists.directory.total_bytes


def test_few_vectors(tmp_path: Path) -> None:
    for count in (1, 2, 9, 40):
        x = drawn(count, 6)
        file = written(tmp_path / f"i{count}", x)
        hits = file.vectors.search_counted(x, 3, ALL)[0]
        assert hits.ids[:, 0].tolist() == list(range(count))


def test_vectors_that_are_ready_are_not_copied(tmp_path: Path) -> None:
    x = unit(drawn(50))
    with prepared(x, "cosine", tmp_path / "i") as held:
        assert held is x
    with prepared(x.astype(np.float64), "cosine", tmp_path / "i") as held:
        np.testing.assert_array_equal(held, unit(x.astype(np.float32)))
    assert list(tmp_path.iterdir()) == []
    for bad, metric, says in (
        (np.zeros((3, 4), np.uint8), "cosine", "--metric l2"),
        (np.full((3, 4), np.nan, np.float32), "l2", "NaN"),
        (np.zeros(3, np.float32), "l2", "expected vectors"),
        (np.eye(3, dtype=np.float32) * [[1], [0], [1]], "cosine", "vector 1 is all zeros"),
    ):
        with pytest.raises(InputError, match=says), prepared(bad, metric, tmp_path / "i"):  # type: ignore[arg-type]
            pass
    with pytest.raises(InputError, match="no e4m3"), prepared(x, "l2", tmp_path / "i", "e4m3"):
        pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SpannSettings(page_limit=0), "holds nothing"),
        (lambda: SpannSettings(degree=0), "degree"),
        (lambda: SpannSettings(budget=10), "budget"),
        (lambda: SearchSettings(lists=0), "0 lists"),
        (lambda: SearchSettings(lists=64, budget=32), "budget"),
        (lambda: SearchSettings(ratio=0.5), "ratio"),
        (lambda: SearchSettings(ratio=float("nan")), "ratio"),
        (lambda: SearchSettings(unpruned=-1), "unpruned"),
        (lambda: SpannSettings(closure=ClosureSettings(candidates=2000, replicas=3)), "candidates"),
    ],
)
def test_bad_settings(make: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()  # type: ignore[operator]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_file_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "i"
    file = written(path, drawn(600))
    assert is_spann(path)
    start = file._file.info("lists").start
    assert start % LIST_PAGE_BYTES == 0
    file.close()
    whole = path.read_bytes()
    told = SafetensorsFile(path)
    edges, lists = told.info("edges").start, file.lists.first_byte
    told.close()

    def with_byte(at: int, value: int) -> None:
        changed = bytearray(whole)
        changed[at] ^= value
        path.write_bytes(changed)

    with_byte(edges + 3, 0x40)
    with pytest.raises(InputError, match="digest"):
        SpannFile(path)
    with pytest.raises(InputError, match="tensor edges has numbers outside"):
        SpannFile(path, verify=False)
    with_byte(lists + 6, 1)  # in a list: found when it is read
    opened = SpannFile(path)
    with pytest.raises(InputError, match="checksum differs"):
        opened.vectors.search_counted(drawn(3), 5, ALL)
    with_byte(lists + 3, 0x7F)  # an id that is no vector's, and nobody checks
    with pytest.raises(InputError, match="past 599"):
        SpannFile(path, verify=False).vectors.search_counted(drawn(3), 5, ALL)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="file"):
        SpannFile(path)
    write_vectors(path, fitted("e4m3"), vectors(50))
    assert not is_spann(path)
    with pytest.raises(InputError, match="holds no lists around heads"):
        SpannFile(path)


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i"
    written(path, drawn(300)).close()
    whole = path.read_bytes()
    for before, after, says in (
        ('\\"count\\": 300', '\\"count\\": 299', "header"),
        ('\\"element\\": \\"float32\\"', '\\"element\\": \\"float99\\"', "element"),
        ('\\"version\\": 1', '\\"version\\": 7', "version"),
        ('\\"metric\\": \\"l2\\"', '\\"metric\\": \\"l3\\"', "metric"),
    ):
        assert before.encode() in whole
        path.write_bytes(whole.replace(before.encode(), after.encode()))
        with pytest.raises(InputError, match=says):
            SpannFile(path, verify=False)


def test_builds_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        written(tmp_path / name, drawn(500)).close()
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    header = json.loads(SafetensorsFile(tmp_path / "a").metadata["memwall-spann"])
    assert (header["count"], header["d"], header["element"]) == (500, 24, "float32")
