"""Pages of lists: best fit against the bound, records, forms of a list, and headers that lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.retrieve.list_file import LIST_PAGE_BYTES, Directory, ListFormat, learned_dictionary, placed


def directory_of(nbytes: list[int], compressed: bool = True) -> Directory:
    sizes = np.array(nbytes, np.int64)
    counts = np.minimum(sizes, 50) if compressed else sizes // 20
    return placed(counts, sizes, num_vectors=1000, dimensions=4, entry_bytes=20, compressed=compressed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 5 * LIST_PAGE_BYTES), st.just(LIST_PAGE_BYTES))))
def test_no_list_touches_a_page_too_many(nbytes: list[int]) -> None:
    found = directory_of(nbytes)
    rows, taken = found.records, set()
    for at, size in enumerate(nbytes):
        start = int(rows["page"][at]) * LIST_PAGE_BYTES + int(rows["place"][at])
        touched = {byte // LIST_PAGE_BYTES for byte in (start, start + max(size - 1, 0))}
        span = max(touched) - min(touched) + 1 if size else 0
        assert span == rows["pages"][at] == -(-size // LIST_PAGE_BYTES)
        mine = set(range(start, start + size))
        assert not mine & taken
        taken |= mine
    assert found.total_bytes % LIST_PAGE_BYTES == 0
    # no more than a page each would take, and where all are small, at most twice what they hold
    assert found.total_bytes // LIST_PAGE_BYTES <= found.first_page + sum(
        -(-size // LIST_PAGE_BYTES) for size in nbytes
    )


def test_best_fit_by_hand() -> None:
    """The largest excess first, then what fills its page best; a list of whole pages begins at one."""
    found = directory_of([1000, 3000, LIST_PAGE_BYTES, 2000, LIST_PAGE_BYTES + 90])
    assert found.records["place"].tolist() == [3000, 0, 0, 0, 4000]
    assert found.records["page"].tolist() == [0, 0, 3, 2, 0]
    assert found.records["pages"].tolist() == [1, 1, 1, 1, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 900), max_size=40), st.booleans())
def test_a_directory_is_read_as_it_was_written(counts: list[int], compressed: bool) -> None:
    written = directory_of([20 * count for count in counts], compressed)
    whole = np.frombuffer(written.to_bytes().ljust(written.total_bytes, b"\0"), np.uint8)
    found = Directory.parse(whole, 20, compressed, "file")
    np.testing.assert_array_equal(found.records, written.records)
    assert (found.num_vectors, found.dimensions, found.total_bytes) == (1000, 4, written.total_bytes)
    assert written.records.dtype.itemsize == (20 if compressed else 12)
    with pytest.raises(InputError, match="file"):
        Directory.parse(whole[: len(whole) - 1], 20, compressed, "file")


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 16 + 12 * 6 - 1), st.integers(1, 255))
def test_a_directory_that_lies_is_refused_or_harmless(place: int, change: int) -> None:
    written = directory_of([400, 5000, 0, 8200, 60, 4096 * 2 + 100], compressed=False)
    whole = np.frombuffer(written.to_bytes().ljust(written.total_bytes, b"\0"), np.uint8).copy()
    whole[place] ^= change
    try:
        found = Directory.parse(whole, 20, False, "file")
    except InputError:
        return
    ends = (found.records["page"].astype(np.int64) + found.first_page) * LIST_PAGE_BYTES + found.records["place"]
    assert (ends + found.nbytes <= len(whole)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
@pytest.mark.parametrize("ids_last", [False, True])
@pytest.mark.parametrize("form", ["plain", "delta", "packed"])
def test_a_list_is_read_as_it_was_written(dtype: str, ids_last: bool, form: str) -> None:
    if form == "packed":
        pytest.importorskip("zstandard")
    draw = np.random.default_rng(1)
    x = (draw.standard_normal((37, 9)) * 30).astype(dtype)
    head, ids = x[0], draw.permutation(1000)[:37].astype(np.int32)
    made = [ListFormat(dtype=np.dtype(dtype), dimensions=9).encode(ids, x + i, head) for i in range(60)]
    dictionary = learned_dictionary(made, 2000) if form == "packed" else b""
    one = ListFormat(
        dtype=np.dtype(dtype), dimensions=9, ids_last=ids_last, delta=form != "plain", compress=form == "packed",
        dictionary=dictionary,
    )  # fmt: skip
    stored = one.encode(ids, x, head)
    plain = one.decode(stored, 37, head)
    np.testing.assert_array_equal(one.vectors(plain, 37).view(f"u{x.itemsize}"), x.view(f"u{x.itemsize}"))
    np.testing.assert_array_equal(one.ids(plain, 37), ids)
    assert form == "packed" or len(stored) == 37 * (9 * x.itemsize + 4)
    with pytest.raises(InputError, match="list"):
        one.decode(stored[:-1], 37, head)
    with pytest.raises(InputError, match="list"):
        one.decode(stored, 36, head)


def test_ids_stand_before_each_vector_or_behind_all() -> None:
    x, ids = np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([7, 258], np.int32)
    mixed = ListFormat(dtype=np.dtype(np.uint8), dimensions=3)
    assert mixed.encode(ids, x, x[0]) == bytes([7, 0, 0, 0, 0, 1, 2, 2, 1, 0, 0, 3, 4, 5])
    apart = ListFormat(dtype=np.dtype(np.uint8), dimensions=3, ids_last=True)
    assert apart.encode(ids, x, x[0]) == bytes([0, 1, 2, 3, 4, 5, 7, 0, 0, 0, 2, 1, 0, 0])


def test_bounds_on_lengths() -> None:
    sift = ListFormat(dtype=np.dtype(np.uint8), dimensions=128)
    assert sift.longest(3) == 3 * 4096 // 132 == 93
    assert ListFormat(dtype=np.dtype(np.float32), dimensions=128).longest(12) == 95
    with pytest.raises(InputError, match="takes 2; allow so many"):
        ListFormat(dtype=np.dtype(np.float32), dimensions=1536).longest(1)
    with pytest.raises(InputError, match="too long"):
        directory_of([(1 << 16) * LIST_PAGE_BYTES])
