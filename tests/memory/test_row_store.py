"""A store of rows against a dictionary: whatever comes and goes, what is held is what should be, without gaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import BudgetExceeded, InputError
from memwall.memory import Arena, Ledger
from memwall.memory.row_store import RowStore

KEYS, WIDE = 30, 24


def make(capacity: int, cap_bytes: int = 1 << 20) -> RowStore:
    return RowStore(Arena(cap_bytes, Ledger()), "rows", num_keys=KEYS, capacity=capacity, row_bytes=WIDE, side=2)


def fill(store: RowStore, places: np.ndarray, keys: np.ndarray) -> None:
    store.data[places] = keys[:, None]
    store.side[places] = keys[:, None]


def check(store: RowStore, truth: dict[int, int]) -> None:
    """truth: when each key that should be held was last used."""
    assert store.used == len(truth)
    held = store.keys[: store.used]
    assert sorted(held.tolist()) == sorted(truth)
    assert (store.data[: store.used] == held[:, None]).all()
    assert (store.side[: store.used] == held[:, None]).all()
    assert store.used_at[: store.used].tolist() == [truth[key] for key in held.tolist()]
    places = np.full(KEYS, -1)
    places[held] = np.arange(store.used)
    assert store.places.tolist() == places.tolist()


@settings(max_examples=80, deadline=None)
@given(
    capacity=st.integers(1, KEYS),
    wanted=st.lists(st.sets(st.integers(0, KEYS - 1)), max_size=12),
    window=st.integers(1, 4),
    exchanging=st.booleans(),
)
def test_windows_hold_what_a_dictionary_holds(
    capacity: int, wanted: list[set[int]], window: int, exchanging: bool
) -> None:
    store, truth = make(capacity), {}
    for now, keys in enumerate(wanted):
        some = np.array(sorted(keys)[:capacity], np.int64)
        missing = store.missing(some, now)
        assert missing.tolist() == [key for key in some.tolist() if key not in truth]
        truth |= {key: now for key in some.tolist() if key in truth}
        leaving = store.idle(now - window + 1)
        assert sorted(store.keys[leaving].tolist()) == sorted(k for k, at in truth.items() if at < now - window + 1)
        short = len(missing) - (capacity - store.used) - len(leaving)
        if short > 0:
            leaving = store.least_used(len(leaving) + short)
            kept = [at for i, at in enumerate(store.used_at[: store.used]) if i not in set(leaving.tolist())]
            assert not kept or min(kept) >= store.used_at[leaving].max()
        truth = {key: at for key, at in truth.items() if key not in set(store.keys[leaving].tolist())}
        if exchanging:
            places = store.exchange(leaving, missing, now)
        else:
            moved = store.moved_rows
            store.drop(leaving)
            assert store.moved_rows - moved <= len(leaving)
            places = store.append(missing, now)
        fill(store, places, missing)
        truth |= dict.fromkeys(missing.tolist(), now)
        check(store, truth)


def test_exchange_moves_only_the_difference() -> None:
    store = make(10)
    keys = np.arange(10)
    fill(store, store.append(keys, 0), keys)
    places = store.exchange(np.array([1, 3, 5]), np.array([20, 21, 22]), 1)
    assert places.tolist() == [1, 3, 5]
    assert store.moved_rows == 0
    fill(store, places, np.array([20, 21, 22]))
    places = store.exchange(np.array([0, 2, 9]), np.array([25]), 2)
    fill(store, places, np.array([25]))
    assert store.moved_rows == 1
    check(store, {20: 1, 21: 1, 22: 1, 25: 2, 4: 0, 6: 0, 7: 0, 8: 0})


def test_what_does_not_fit_changes_nothing() -> None:
    store = make(4)
    keys = np.array([1, 2, 3])
    fill(store, store.append(keys, 0), keys)
    with pytest.raises(InputError, match="room for 4"):
        store.append(np.array([5, 6]), 1)
    with pytest.raises(InputError, match="room for 4"):
        store.exchange(np.array([0]), np.array([5, 6, 7]), 1)
    check(store, {1: 0, 2: 0, 3: 0})


def test_bytes_are_those_of_the_arena_and_come_back() -> None:
    arena = Arena(1 << 20, Ledger())
    store = RowStore(arena, "rows", num_keys=300, capacity=20, row_bytes=1024, side=2)
    assert arena.used_bytes == RowStore.predict_bytes(num_keys=300, capacity=20, row_bytes=1024, side=2)
    assert store.data.ctypes.data % 4096 == 0
    store.release()
    assert arena.used_bytes == 0
    with pytest.raises(BudgetExceeded):
        make(KEYS, 64)
    with pytest.raises(InputError, match="above 0"):
        make(0)
