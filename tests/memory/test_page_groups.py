"""Groups of pages: no page has two owners, none is lost, neighbours merge, and owners get few long runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.memory import Arena, Ledger, OutOfPages, PagePool
from memwall.memory.page_groups import LowestFirst, PageGroups, paired_runs, runs_of

PAGE = 4096
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["take", "anonymous", "give", "close", "limit"]), st.integers(0, 5), st.integers(0, 30)),
    max_size=120,
)


def check(groups: PageGroups, limit: int, used: set[int]) -> None:
    """Every page is in use, in a free run or in a tail, and in one of them only; no two free runs touch."""
    runs, tails = groups.runs(), list(groups.tails().values())
    places = [page for start, length in (*runs, *tails) for page in range(start, start + length)]
    assert sorted([*places, *used]) == list(range(limit))
    assert groups.num_free == len(places)
    assert all(one + length < other for (one, length), (other, _) in itertools.pairwise(runs))
    assert sorted(groups._sizes) == groups._sizes == sorted((length, start) for start, length in runs)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(1, 70))
def test_no_page_has_two_owners_and_none_is_lost(actions: list[tuple[str, int, int]], group_pages: int) -> None:
    limit, held = 60, {owner: [] for owner in range(7)}
    groups = PageGroups(limit, group_pages)
    for action, owner, count in actions:
        used = {page for pages in held.values() for page in pages}
        if action in ("take", "anonymous"):
            who = owner if action == "take" else 6
            if count > limit - len(used):
                with pytest.raises(ValueError, match="are free"):
                    groups.take(count, who)
                continue
            taken = groups.take(count, who if action == "take" else None)
            assert len(taken) == count
            assert used.isdisjoint(taken)
            held[who] += taken
        elif action == "give":
            gone, held[owner] = held[owner][count:], held[owner][:count]
            groups.give(gone)
        elif action == "close":
            groups.give(held[owner])
            held[owner] = []
            groups.close(owner)
            assert owner not in groups.tails()
        else:
            limit = max(limit - count if count % 2 else limit + count, max(used, default=-1) + 1, 1)
            groups.reset(limit, used)
        check(groups, limit, {page for pages in held.values() for page in pages})
    for owner, pages in held.items():
        groups.give(pages)
        groups.close(owner)
    assert groups.runs() == [(0, limit)]  # all freed: one run again


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_the_lowest_first_loses_none_either(actions: list[tuple[str, int, int]]) -> None:
    limit, used = 60, set()
    free = LowestFirst(limit)
    for action, _, count in actions:
        if action in ("take", "anonymous") and count <= free.num_free:
            taken = free.take(count)
            assert taken == sorted(set(range(limit)) - used)[:count]
            used |= set(taken)
        elif action == "give":
            gone = sorted(used)[count:]
            free.give(gone)
            used -= set(gone)
        elif action == "limit":
            limit = max(limit - count if count % 2 else limit + count, max(used, default=-1) + 1)
            free.reset(limit, used)
        assert free.num_free == limit - len(used)


def test_an_owner_fills_its_group_before_it_takes_another() -> None:
    groups = PageGroups(100, 8)
    assert groups.take(3, "a") == [0, 1, 2]
    assert groups.take(3, "b") == [8, 9, 10]
    assert groups.take(5, "a") == [3, 4, 5, 6, 7]
    assert groups.tails() == {"b": (11, 5)}
    assert groups.take(2, "a") == [16, 17]  # behind its last page lies b's group
    assert groups.take(5, "b") == [11, 12, 13, 14, 15]
    groups.give([16, 17])
    groups.close("a")
    assert groups.take(1, "b") == [16]  # in place now


def test_without_a_free_run_half_of_the_longest_tail_is_split_off() -> None:
    groups = PageGroups(20, 10)
    groups.take(2, "a")
    groups.take(6, "b")
    assert groups.tails() == {"a": (2, 8), "b": (16, 4)}
    assert groups.take(1, "c") == [6]
    assert groups.tails() == {"a": (2, 4), "b": (16, 4), "c": (7, 3)}
    assert len(groups.take(11)) == 11  # nothing is refused while a page is free
    assert groups.num_free == 0


def test_runs_are_what_lies_in_a_line_at_both_ends() -> None:
    assert runs_of([3, 4, 5, 9, 8]) == [(3, 3), (9, 1), (8, 1)]
    assert paired_runs([3, 4, 5, 9, 10], [0, 1, 7, 8, 9]) == [(3, 0, 2), (5, 7, 1), (9, 8, 2)]
    assert paired_runs([], []) == []


def test_a_pool_of_groups_keeps_its_cap_and_its_contents() -> None:
    arena = Arena(40 * PAGE, Ledger())
    pool = PagePool("kv/pages", page_bytes=PAGE, most_pages=64, limit_pages=40, arena=arena, group_pages=8)
    one, other = pool.take("kv", 12, owner=1), pool.take("kv", 12, owner=2)
    assert len(runs_of(one)) <= 2
    for page in (*one, *other):
        pool.page(page)[:] = page
    assert all(int(value) == one[0] + at // PAGE for at, value in enumerate(pool.run(one[0], 8)))
    pool.drop(one)
    pool.close(1)
    with pytest.raises(OutOfPages):
        pool.take("kv", 29, owner=3)
    moves = pool.set_limit(14)
    assert arena.used_bytes <= 14 * PAGE
    assert all(np.all(pool.page(moves.get(page, page)) == page) for page in other)
    assert pool.free_pages == 2
    more = pool.take("kv", 2, owner=2)
    assert set(more).isdisjoint(moves.get(page, page) for page in other)


def test_a_pool_of_groups_takes_nothing_where_the_arena_refuses() -> None:
    from memwall.errors import BudgetExceeded

    arena = Arena(4 * PAGE, Ledger())
    pool = PagePool("kv/pages", page_bytes=PAGE, most_pages=32, arena=arena, group_pages=4)
    held = pool.take("kv", 3, owner=1)
    with pytest.raises(BudgetExceeded):
        pool.take("kv", 3, owner=2)
    assert pool.used_pages == 3
    assert pool.free_pages == 29
    pool.set_limit(4)
    assert set(pool.take("kv", 1, owner=2)).isdisjoint(held)
