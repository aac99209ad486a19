"""The oblivious map: answers against a dictionary, what the host sees, and what a toy would get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit, InputError, MemwallError
from memwall.retrieve.bolt import (
    COUNTS,
    DELETE,
    FULL,
    GET,
    PUT,
    MapOverflow,
    MapSettings,
    ObliviousMap,
    PrivateStore,
    largest_share,
)
from memwall.retrieve.untrusted import READ, WRITE, HostMemory, Tampered

pytest.importorskip("cryptography", reason="pages are sealed with the extra `oblivious`")
KEY = bytes(range(32))
SMALL = MapSettings(capacity=256, value_bytes=5)


def seeded(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def made(settings: MapSettings = SMALL, keys: int = 0, seed: int = 1, logged: bool = True) -> ObliviousMap:
    store = HostMemory(settings.num_pages, settings.page_bytes, logged=logged)
    found = ObliviousMap(settings, store, KEY, entropy=seeded(seed))
    numbers = np.arange(keys, dtype=np.uint32)
    values = [value_of(key, settings.value_bytes) for key in range(keys)]
    found.fill(numbers, np.array(values, np.uint8).reshape(keys, settings.value_bytes))
    store.trace.clear()
    return found


def value_of(key: int, size: int = 5) -> list[int]:
    return [(key * 37 + at) % 251 for at in range(size)]


def reference(told: dict[int, bytes], op: int, key: int, value: bytes, capacity: int) -> tuple[int, bytes]:
    """What one command answers, by a dictionary."""
    before = told.get(key)
    if op == PUT:
        if before is None and len(told) == capacity:
            return FULL, bytes(len(value))
        told[key] = value
    elif op == DELETE:
        told.pop(key, None)
    return int(before is not None), before if before is not None else bytes(len(value))


def check_state(found: ObliviousMap) -> None:
    """Counts, lists and loads agree with one another and with the items."""
    private, settings = found.private, found.settings
    keys, _ = found.items()
    bins = [private.core.where(int(key)) for key in keys]
    assert None not in bins
    assert np.bincount(bins, minlength=settings.bins).tolist() == private.arrays["loads"].tolist()  # type: ignore[arg-type]
    used = settings.frames - private.count("free_frames")
    assert used == private.count("private_items") + private.count("pending")
    assert private.count("private_items") == sum(one < settings.private_bins for one in bins)  # type: ignore[operator]
    assert len(set(keys.tolist())) == len(keys) == len(found)


COMMAND = st.tuples(st.sampled_from([GET, PUT, DELETE]), st.integers(0, 40), st.binary(min_size=3, max_size=3))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(COMMAND, max_size=30), max_size=6),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.integers(0, 20),
    st.integers(0, 1 << 30),
)
def test_it_answers_as_a_dictionary_does(
    batches: list[list[tuple[int, int, bytes]]], share: float, filled: int, seed: int
) -> None:
    shape = MapSettings(capacity=24, value_bytes=3, bin_items=4, private_share=share, page_slots=24)
    found = made(shape, filled, seed)
    told = {key: bytes(value_of(key, 3)) for key in range(filled)}
    for batch in batches:
        values = np.frombuffer(b"".join(value for _, _, value in batch), np.uint8).reshape(-1, 3)
        ops, keys = (np.array([one[at] for one in batch], np.uint32) for at in (0, 1))
        replies = found.access(ops, keys, values)
        expected = [reference(told, *command, 24) for command in batch]
        assert list(zip(replies.statuses.tolist(), map(bytes, replies.values), strict=True)) == expected
        check_state(found)
    keys, values = found.items()
    assert dict(zip(keys.tolist(), map(bytes, values), strict=True)) == told


@pytest.mark.parametrize("slots", [1.25, 4.0])
def test_long_runs(slots: float) -> None:
    shape = MapSettings(capacity=3000, value_bytes=8, slots_per_item=slots)
    found, told = made(shape, 2900), {key: bytes(value_of(key, 8)) for key in range(2900)}
    draw = np.random.default_rng(3)
    for size in (1, 700, 4097, 3, 3000):
        ops, keys = draw.choice([GET, PUT, DELETE], size, p=[0.5, 0.3, 0.2]), draw.zipf(1.2, size) % (1 << 32)
        values = draw.integers(0, 256, (size, 8), np.uint8)
        replies = found.access(ops, keys, values)
        for at in range(size):
            status, value = reference(told, int(ops[at]), int(keys[at]), values[at].tobytes(), 3000)
            assert (int(replies.statuses[at]), replies.values[at].tobytes()) == (status, value)
    check_state(found)
    assert found.private.count("accesses") == 1 + 700 + 4097 + 3 + 3000


def test_single_commands() -> None:
    found = made(keys=3)
    assert found.get(2) == bytes(value_of(2))
    assert found.get(9) is None
    assert found.put(9, b"12345") is None
    assert found.put(9, b"54321") == b"12345"
    assert found.delete(9) == b"54321"
    assert (found.get(9), found.delete(9), len(found)) == (None, None, 3)


def test_a_full_map_says_so_and_goes_on() -> None:
    shape = MapSettings(capacity=8, value_bytes=5)
    found = made(shape, 8)
    before = found.pages.store.trace.reads
    with pytest.raises(DoesNotFit, match="full: 8 items"):
        found.put(100, b"abcde")
    assert found.pages.store.trace.reads > before  # it costs an access all the same
    assert found.put(3, b"abcde") == bytes(value_of(3))
    found.delete(0)
    assert found.put(100, b"abcde") is None


# ---- what the host sees ---------------------------------------------------------------------------------------------

SEQUENCES: dict[str, Callable[[int], np.ndarray]] = {
    "one key": lambda count: np.full(count, 7),
    "in order": lambda count: np.arange(count) % 256,
    "absent": lambda count: 1000 + np.arange(count),
}


@pytest.mark.parametrize("op", [GET, PUT, DELETE])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_pages_are_drawn_evenly_whatever_is_asked(sequence: str, op: int) -> None:
    shape = MapSettings(capacity=256, value_bytes=5, private_share=0.25)
    found, count = made(shape, 256), 3000
    keys = SEQUENCES[sequence](count)
    for key in keys:
        found.access(np.array([op]), np.array([key]), np.zeros((1, 5), np.uint8))
    ops, pages = found.pages.store.trace.arrays()
    # per access: pages read, then the same ones written
    per_access = [part for _, part in found.pages.store.trace.log or []]
    for reads, writes in zip(per_access[::2], per_access[1::2], strict=True):
        assert reads.tolist() == writes.tolist()
        assert len(set(reads.tolist())) == len(reads) <= 2
    assert (ops == READ).sum() == (ops == WRITE).sum()
    seen = pages[ops == READ]
    # 24 pages of 32 bins: chi-square has 23 degrees of freedom; 60 is beyond 1 in 30,000
    expected = len(seen) / 24
    assert ((np.bincount(seen, minlength=24) - expected) ** 2 / expected).sum() < 60
    numbers = np.bincount([len(reads) for reads in per_access[::2]], minlength=3) / count
    exact = np.array([8 * 7, 2 * 8 * 24, 24 * 23]) / (32 * 31)
    assert np.abs(numbers - exact).max() < 4 * math.sqrt(0.25 / count)
    lag = np.corrcoef(seen[:-2], seen[2:])[0, 1]
    assert abs(lag) < 4 / math.sqrt(len(seen))


def test_which_commands_they_are_cannot_be_seen() -> None:
    """Under the same draws, traces of gets, puts and deletes of a key that is there are equal page by page until the
    private state differs, and always as long.
    """
    traces = []
    for op in (GET, PUT):
        found = made(keys=256, seed=5)
        found.access(np.full(400, op), np.arange(400) % 256, np.ones((400, 5), np.uint8))
        traces.append(found.pages.store.trace.arrays())
    np.testing.assert_array_equal(traces[0][0], traces[1][0])
    np.testing.assert_array_equal(traces[0][1], traces[1][1])


def test_a_pair_is_used_once() -> None:
    """One key again and again: its next pages were drawn for this access alone."""
    found = made(MapSettings(capacity=4096, value_bytes=5), 4096)
    pairs = []
    for _ in range(60):
        entry = next(
            one for one in found.private.arrays["table"].reshape(-1, 3) if one[0] == 7 and one[1] != 0xFFFFFFFF
        )
        pairs.append((int(entry[1]) & 0x7FFFFFFF, int(entry[2])))
        found.pages.store.trace.clear()
        found.get(7)
        ops, pages = found.pages.store.trace.arrays()
        first = found.settings.private_bins
        assert pages[ops == READ].tolist() == [one - first for one in pairs[-1] if one >= first]
    assert len(set(pairs)) == 60
    assert all(one != two for one, two in pairs)


def test_new_items_wait_and_are_not_written_to_their_page() -> None:
    found = made(MapSettings(capacity=4096, value_bytes=5, private_share=0.0), 1000)
    store = found.pages.store
    assert isinstance(store, HostMemory)
    for key in range(5000, 5040):
        before = store.data.copy()
        store.trace.clear()
        found.put(key, b"abcde")
        changed = np.flatnonzero((store.data != before).any(axis=1))
        ops, pages = store.trace.arrays()
        assert sorted(pages[ops == WRITE].tolist()) == changed.tolist() == sorted(pages[ops == READ].tolist())
    assert found.private.count("pending") > 30


def test_a_batch_reads_each_page_once_and_its_size_does_not_depend_on_repeats() -> None:
    sizes = []
    for keys in (np.full(200, 7), np.arange(200)):
        found = made(keys=256, seed=9)
        found.access(np.zeros(200), keys)
        ops, pages = found.pages.store.trace.arrays()
        reads = pages[ops == READ]
        assert len(set(reads.tolist())) == len(reads)
        assert len(found.pages.store.trace.log or []) == 2
        sizes.append(len(reads))
    assert sizes == [26, 26]  # all pages of this map: 200 commands touch each


def test_all_pages_are_written_once_at_first() -> None:
    store = HostMemory(SMALL.num_pages, SMALL.page_bytes, logged=True)
    ObliviousMap(SMALL, store, KEY).fill(np.arange(100), np.ones((100, 5), np.uint8))
    ops, pages = store.trace.arrays()
    assert (ops == WRITE).all()
    assert pages.tolist() == list(range(SMALL.num_pages))


# ---- overflow and damage -------------------------------------------------------------------------------------------


def test_pages_that_overflow_stop_the_map() -> None:
    shape = replace(SMALL, page_slots=9)
    found = made(shape, 200)
    ops = np.concatenate([np.full(56, PUT), np.zeros(2000)])
    keys = np.concatenate([np.arange(200, 256), np.arange(2000) % 256])
    with pytest.raises(MapOverflow, match="more than 9 items"):
        found.access(ops, keys, np.zeros((2056, 5), np.uint8))
    with pytest.raises(MemwallError, match="cannot be used: a page would hold"):
        found.get(1)
    with pytest.raises(MapOverflow):
        made(replace(shape, page_slots=8), 256)


def test_a_changed_page_stops_the_map() -> None:
    found = made(MapSettings(capacity=256, value_bytes=5, private_share=0.0), 256)
    found.pages.store.data[:, 3] ^= 1  # type: ignore[attr-defined]
    with pytest.raises(Tampered):
        found.get(1)
    with pytest.raises(MemwallError, match="broken off"):
        found.get(1)


def test_it_must_be_filled_once() -> None:
    store = HostMemory(SMALL.num_pages, SMALL.page_bytes)
    found = ObliviousMap(SMALL, store, KEY)
    with pytest.raises(MemwallError, match="call fill"):
        found.get(1)
    found.fill()
    found.put(1, b"abcde")
    with pytest.raises(InputError, match="has been used"):
        found.fill()


# ---- sizes and settings --------------------------------------------------------------------------------------------


def test_bounds_are_those_that_the_paper_prints() -> None:
    paper = MapSettings(capacity=1 << 20)
    assert (paper.bins, paper.private_bins, paper.slots) == (131072, 26214, 13)
    assert paper.load_bound == pytest.approx(13.32, abs=0.005)
    assert paper.private_bound == pytest.approx(217_743, abs=3)
    assert paper.pending_bound == pytest.approx(78_977, abs=3)
    assert paper.private_bound + paper.pending_bound == pytest.approx(296_720, abs=3)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_bytes_are_those_of_the_buffers(share: float) -> None:
    shape = MapSettings(capacity=5000, value_bytes=33, private_share=share)
    private, store = PrivateStore(shape), HostMemory(shape.num_pages, shape.page_bytes)
    assert sum(shape.private_bytes().values()) == private.nbytes
    assert shape.host_bytes == store.data.nbytes
    told, model = shape.private_bytes(), shape.model_bytes()
    assert told["position map"] == model["position map"] == 5000 * 48 == private.arrays["table"].nbytes
    assert told["reverse index"] == model["reverse index"] == private.arrays["heads"].nbytes
    assert private.arrays["counts"].size == len(COUNTS)


def test_the_largest_share_that_fits() -> None:
    shape = MapSettings(capacity=10_000, value_bytes=100)
    found = largest_share(shape, 900_000)
    assert 0 < found.private_share < 1
    assert sum(found.private_bytes().values()) <= 900_000
    assert sum(replace(found, private_share=found.private_share + 0.001).private_bytes().values()) > 900_000
    assert largest_share(shape, 1 << 30).private_share == 1
    with pytest.raises(DoesNotFit, match=r"needs .* bytes of private memory"):
        largest_share(shape, 100_000)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"capacity": 3}, "capacity 3: from 4"),
        ({"value_bytes": 0}, "value_bytes 0"),
        ({"bin_items": 25}, "bin_items 25: from 1 to 24"),
        ({"private_share": 1.5}, "private_share 1.5"),
        ({"private_share": math.nan}, "private_share nan"),
        ({"slots_per_item": 1.0}, "slots_per_item 1: from 1.25"),
        ({"page_slots": 33}, "page_slots 33"),
    ],
)
def test_settings_are_checked(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        MapSettings(**{"capacity": 100, **wrong})  # type: ignore[arg-type]


def test_bad_commands() -> None:
    found = made(keys=3)
    one = np.zeros((1, 5), np.uint8)
    with pytest.raises(InputError, match="PUT brings a value"):
        found.access(np.array([PUT]), np.array([1]))
    with pytest.raises(InputError, match=r"expected uint8\[1, 5\]"):
        found.access(np.array([PUT]), np.array([1]), one[:, :4])
    with pytest.raises(InputError, match="one for each of 1 keys"):
        found.access(np.array([7]), np.array([1]), one)
    for keys in (np.array([-1]), np.array([1 << 32]), np.array([1.5]), np.zeros((1, 1), int)):
        with pytest.raises(InputError, match="keys"):
            found.access(np.array([GET]), keys)
    with pytest.raises(InputError, match="store has 3 pages"):
        ObliviousMap(SMALL, HostMemory(3, 100), KEY)
    assert found.get(1) == bytes(value_of(1))


@pytest.mark.parametrize(("keys", "says"), [(np.array([1, 1]), "comes twice"), (np.arange(300), "holds 256")])
def test_bad_first_items(keys: np.ndarray, says: str) -> None:
    store = HostMemory(SMALL.num_pages, SMALL.page_bytes)
    with pytest.raises((InputError, DoesNotFit), match=says):
        ObliviousMap(SMALL, store, KEY).fill(keys, np.zeros((len(keys), 5), np.uint8))
