"""Classic eviction: LFD is the least that exhaustive search finds; policies keep to slots and to cases by hand."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.memory.cache_policy import Bag, Lfu, Lru, Marker, Store, count_faults, least_faults, next_accesses
from memwall.memory.succinct_paging import NAMES, make_policy

SEQUENCES = st.lists(st.integers(0, 7), min_size=1, max_size=60)


def exhaustive(keys: list[int], slots: int) -> int:
    """The least number of faults, by trying every victim."""

    @cache
    def least(at: int, held: frozenset[int]) -> int:
        if at == len(keys):
            return 0
        if keys[at] in held:
            return least(at + 1, held)
        if len(held) < slots:
            return 1 + least(at + 1, held | {keys[at]})
        return 1 + min(least(at + 1, (held - {victim}) | {keys[at]}) for victim in held)

    return least(0, frozenset())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4))
def test_lfd_is_the_least_there_is(keys: list[int], slots: int) -> None:
    assert least_faults(keys, slots) == exhaustive(keys, slots)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 6), st.integers(0, 3))
def test_every_policy_keeps_to_its_slots_and_has_no_fewer_faults_than_lfd(
    keys: list[int], slots: int, seed: int
) -> None:
    nexts = next_accesses(keys)
    for name in NAMES:
        policy = make_policy(name, slots, seed)
        hints = nexts if policy.hint == "arrival" else [(key + at) % 2 for at, key in enumerate(keys)]
        store = Store(policy)
        for key, hint in zip(keys, hints, strict=True):
            held = set(store.held) | {key}
            assert held >= set(store.access(key, hint)), name  # only what is there can leave
        assert least_faults(keys, slots) <= store.faults <= len(keys), name


def test_who_leaves_by_hand() -> None:
    for policy, victims in (
        (Lru(2), [[], [], [], ["b"]]),
        (make_policy("fifo", 2), [[], [], [], ["a"]]),
        (Lfu(2), [[], [], [], ["b"]]),
    ):
        assert [list(policy.on_access(key)) for key in "abac"] == victims
    assert next_accesses("abac") == [2, 4, 4, 4]


def test_a_mark_saves_until_all_have_one() -> None:
    for seed in range(20):
        policy = Marker(3, seed)
        for key in "abc":
            assert not policy.on_access(key)
        first = policy.on_access("d")  # all were marked, so all lost it
        assert policy.phases == 2
        second = policy.on_access("e")
        assert not {*first, *second} & {"d", "e"}


def test_sizes_and_slots_are_checked() -> None:
    with pytest.raises(InputError, match="0 slots"):
        Lru(0)
    with pytest.raises(InputError, match="one slot, not of 2"):
        Lru(3).on_access("a", 2)
    with pytest.raises(InputError, match="did you mean mark0"):
        make_policy("mark", 3)
    with pytest.raises(InputError, match="there are lru, fifo"):
        make_policy("zzzzzz", 3)


def test_a_bag_draws_all_alike_and_forgets() -> None:
    from random import Random

    rng, drawn = Random(0), dict.fromkeys(range(5), 0)
    for _ in range(5000):
        bag = Bag(list(range(5)))
        bag.discard(3)
        bag.add(3)
        bag.add(3)
        drawn[bag.draw(rng)] += 1
        assert len(bag) == 4
    assert min(drawn.values()) > 880


def test_a_policy_that_holds_too_much_is_found_out() -> None:
    class Keeps(Lru):
        def _access(self, key: object, hint: int) -> tuple[()]:
            return ()

    with pytest.raises(AssertionError, match="3 keys stay in 2"):
        count_faults(Keeps(2), "abc")
