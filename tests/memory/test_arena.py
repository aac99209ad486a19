from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.memory import Arena, Ledger, Region
from memwall.memory.arena import SMALL_BYTES

PAGE = 4096


def make(cap_bytes: int = 50_000_000) -> tuple[Arena, Ledger]:
    ledger = Ledger()
    return Arena(cap_bytes, ledger), ledger


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 7), (1000, 1000), 12])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, ml_dtypes.bfloat16])
def test_arrays_are_aligned_zeroed_and_on_the_ledger(shape: tuple[int, ...] | int, dtype: type) -> None:
    arena, ledger = make()
    array = arena.allocate("weights", shape, dtype)
    assert array.shape == ((shape,) if isinstance(shape, int) else shape)
    assert array.dtype == dtype
    assert not array.size or array.ctypes.data % 64 == 0
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert not array.any()
    array[...] = 1
    assert array.nbytes <= ledger.owned("weights") == arena.used_bytes
    arena.free(array)
    assert arena.used_bytes == ledger.total() == 0


def test_two_empty_arrays_can_both_be_freed() -> None:
    arena, _ = make()
    first, second = arena.allocate("a", 0, np.int8), arena.allocate("b", 0, np.int8)
    arena.free(first)
    arena.free(second)
    assert arena.used_bytes == 0


def test_refusal_comes_before_the_cap_and_changes_nothing() -> None:
    arena, ledger = make(1_000_000)
    kept = arena.allocate("weights", 800_000, np.uint8)
    used = arena.used_bytes
    for size in (200_000, 199_999, 10**15):
        with pytest.raises(BudgetExceeded) as caught:
            arena.allocate("kv", size, np.uint8)
        assert caught.value.owner == "kv"
        assert caught.value.free_bytes == 1_000_000 - used
    assert arena.used_bytes == used == ledger.total()
    assert [row.owner for row in ledger.rows()] == ["weights"]
    arena.free(kept)


def test_of_several_arrays_all_are_held_or_none() -> None:
    arena, ledger = make(100_000)
    with pytest.raises(BudgetExceeded):
        arena.allocate_all("a", {"one": ((40_000,), np.uint8), "two": ((10, 8000), np.float32)})
    assert arena.used_bytes == ledger.total() == 0
    held = arena.allocate_all("a", {"one": ((40_000,), np.uint8), "two": ((10, 30), np.float32)})
    assert {name: (array.shape, array.dtype) for name, array in held.items()} == {
        "one": ((40_000,), np.uint8),
        "two": ((10, 30), np.float32),
    }
    for array in held.values():
        arena.free(array)
    assert arena.used_bytes == 0


def test_freeing_twice_or_a_stranger_is_refused() -> None:
    arena, _ = make()
    array = arena.allocate("a", 100_000, np.float32)
    arena.free(array)
    for stranger in (array, np.zeros(4)):
        with pytest.raises(ValueError, match="not allocated from this arena"):
            arena.free(stranger)


def test_a_stale_view_reads_zeros_instead_of_crashing() -> None:
    arena, _ = make()
    array = arena.allocate("a", 100_000, np.float32)
    array[:] = 3
    arena.free(array)
    assert array.sum() == 0


def test_scratch_is_freed_when_the_block_fails() -> None:
    arena, _ = make()

    def fail() -> None:
        with arena.scratch("activations", 100_000, np.float32) as array:
            assert arena.used_bytes >= array.nbytes
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert arena.used_bytes == 0


def test_cap_moves_but_not_below_use() -> None:
    arena, _ = make(1_000_000)
    array = arena.allocate("a", 500_000, np.uint8)
    with pytest.raises(DoesNotFit, match=r"400,000.*503,808"):
        arena.set_cap(400_000)
    arena.set_cap(arena.used_bytes)
    assert arena.free_bytes == 0
    with pytest.raises(BudgetExceeded):
        arena.allocate("b", 1, np.uint8)
    arena.set_cap(2_000_000)
    arena.allocate("b", 1_000_000, np.uint8)
    arena.free(array)
    with pytest.raises(InputError):
        arena.set_cap(0)
    with pytest.raises(InputError):
        Arena(-1, Ledger())


def test_charges_count_against_the_cap() -> None:
    arena, ledger = make(1000)
    charge = arena.charge("weights/mapped", 600)
    with pytest.raises(BudgetExceeded):
        arena.charge("kv", 401)
    with pytest.raises(BudgetExceeded):
        charge.resize(1001)
    assert (charge.nbytes, arena.used_bytes, ledger.total("ram")) == (600, 600, 600)
    charge.resize(1000)
    charge.release()
    assert (arena.used_bytes, arena.peak_bytes) == (0, 1000)


def test_a_region_grows_in_place_and_gives_pages_back() -> None:
    arena, ledger = make()
    region = arena.reserve("kv", 10**10)  # far more than the cap: address space is free
    assert arena.used_bytes == 0
    region.commit(100)
    first = region.array(25, np.float32)
    first[:] = 7
    region.commit(20_000_000)
    assert region.committed_bytes == arena.used_bytes == ledger.owned("kv") == -(-20_000_000 // PAGE) * PAGE
    whole = region.array((2_500_000,), np.float64)
    assert whole.ctypes.data == first.ctypes.data
    assert (first == 7).all()
    assert not whole[13:].any()
    whole[:] = 1
    region.commit(5)  # smaller than what is committed: nothing to do
    region.shrink(PAGE)
    assert arena.used_bytes == PAGE
    region.commit(2 * PAGE)
    assert not region.array((PAGE,), np.uint8, PAGE).any()  # new pages are zero again
    with pytest.raises(BudgetExceeded):
        region.commit(60_000_000)
    assert region.committed_bytes == 2 * PAGE
    region.release()
    region.release()
    assert arena.used_bytes == 0
    with pytest.raises(ValueError, match="released"):
        region.commit(1)


def test_region_arguments_are_checked() -> None:
    arena, _ = make()
    region = arena.reserve("kv", 100_000)
    region.commit(5000)
    for call in (
        lambda: region.commit(100_001),
        lambda: region.commit(-1),
        lambda: region.shrink(-1),
        lambda: region.array(3000, np.float32),
        lambda: region.array(4, np.float32, 2),
        lambda: region.array(4, np.float32, -4),
        lambda: arena.reserve("kv", 0),
        lambda: arena.allocate("kv", (-1, 5), np.uint8),
        lambda: arena.charge("kv", -1),
    ):
        with pytest.raises(ValueError, match="kv"):
            call()


STEPS = st.lists(
    st.tuples(st.sampled_from(["allocate", "free", "commit", "shrink", "charge", "cap"]), st.integers(0, 3 * 10**6)),
    max_size=40,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS, st.integers(1, 6 * 10**6))
def test_random_walk_never_crosses_the_cap(steps: list[tuple[str, int]], cap_bytes: int) -> None:
    ledger = Ledger()
    arena = Arena(cap_bytes, ledger)
    arrays: list[np.ndarray] = []
    region: Region = arena.reserve("kv", 3 * 10**6)
    charge = arena.charge("mapped", 0)
    for verb, size in steps:
        before = arena.used_bytes
        try:
            if verb == "allocate":
                arrays.append(arena.allocate(f"a{size % 3}", size // (size % 50 + 1), np.uint8))
            elif verb == "free" and arrays:
                arena.free(arrays.pop(size % len(arrays)))
            elif verb == "commit":
                region.commit(size)
            elif verb == "shrink":
                region.shrink(size)
            elif verb == "charge":
                charge.resize(size)
            elif verb == "cap":
                arena.set_cap(size + 1)
        except DoesNotFit:
            assert arena.used_bytes == before
        assert 0 <= arena.used_bytes <= arena.cap_bytes
        assert arena.used_bytes == ledger.total() == sum(row.nbytes for row in ledger.rows())
        assert arena.used_bytes <= arena.peak_bytes
    held = sum(
        max(-(-array.nbytes // 64) * 64, 64) if array.nbytes < SMALL_BYTES else -(-array.nbytes // PAGE) * PAGE
        for array in arrays
    )
    assert arena.used_bytes == held + region.committed_bytes + charge.nbytes


def test_threads_share_a_cap() -> None:
    arena, ledger = make(2_000_000)
    refused = []

    def work() -> None:
        for _ in range(50):
            try:
                arena.free(arena.allocate("a", 900_000, np.uint8))
            except BudgetExceeded:
                refused.append(1)
            assert arena.used_bytes <= arena.cap_bytes

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arena.used_bytes == ledger.total() == 0
    assert arena.peak_bytes <= 2_000_000


def test_arenas_of_other_tiers_share_the_ledger_and_have_caps_of_their_own() -> None:
    ledger = Ledger()
    arena = Arena(1000, ledger, other_caps={"disk": 4096})
    assert arena.beside("ram") is arena
    disk = arena.beside("disk")
    assert arena.beside("disk") is disk
    charge = disk.charge("file", 4096)
    with pytest.raises(BudgetExceeded, match="on disk"):
        charge.resize(4097)
    arena.beside("net").charge("copy", 1 << 50)  # no cap was given
    assert (ledger.total("disk"), ledger.total("ram"), arena.used_bytes) == (4096, 0, 0)


def test_an_array_over_a_whole_range_stays_where_it_is_while_it_is_committed() -> None:
    arena = Arena(1 << 20, Ledger())
    region = arena.reserve("kv", 100_000)
    whole = region.whole((100, 250), np.float32)
    region.commit(50_000)
    assert (whole[:50] == 0).all()
    region.array((50, 250), np.float32)[:] = 3
    assert (whole[:50] == 3).all()
    assert arena.used_bytes == -(-50_000 // PAGE) * PAGE
    with pytest.raises(ValueError, match="larger than"):
        region.whole((101, 250), np.float32)
