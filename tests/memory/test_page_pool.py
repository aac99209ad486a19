"""The pool of pages: counts, pins, and a limit that moves while pages are in use."""

from __future__ import annotations

import random

import numpy as np
import pytest

from memwall.errors import BudgetExceeded, DoesNotFit
from memwall.memory import Arena, Ledger, OutOfPages, PagePool

PAGE = 4096


def pool(pages: int = 16, cap: int = 1 << 20) -> tuple[PagePool, Arena]:
    arena = Arena(cap, Ledger())
    return PagePool("kv/pages", page_bytes=PAGE, most_pages=pages, arena=arena), arena


def test_memory_is_taken_as_pages_are_and_given_back_when_the_limit_falls() -> None:
    pages, arena = pool()
    held = pages.take("kv", 5)
    assert arena.used_bytes == 5 * PAGE
    for page in held:
        pages.page(page)[:] = page + 1
    pages.drop(held[:3])
    assert arena.used_bytes == 5 * PAGE
    moves = pages.set_limit(2)
    assert arena.used_bytes == 2 * PAGE
    assert sorted(moves) == [3, 4]
    assert {int(pages.page(moves[old])[0]): set(pages.page(moves[old]).tolist()) for old in moves} == {4: {4}, 5: {5}}
    assert pages.free_pages == 0
    with pytest.raises(OutOfPages, match="0 of 2 are free"):
        pages.take("kv", 1)
    assert pages.set_limit(4) == {}
    assert len(pages.take("kv", 2)) == 2


def test_what_is_in_use_or_pinned_keeps_the_limit_up() -> None:
    pages, _ = pool()
    held = pages.take("adapter", 4)
    with pytest.raises(DoesNotFit, match="4 pages are in use; free 2 first"):
        pages.set_limit(2)
    pages.drop(held[:3])
    pages.pin(held[3:])
    with pytest.raises(DoesNotFit, match="pinned"):
        pages.set_limit(2)
    with pytest.raises(ValueError, match="pinned"):
        pages.drop(held[3:])
    pages.unpin(held[3:])
    assert pages.set_limit(2) == {3: 0}
    assert pages.usage() == {"adapter": 1}


def test_shared_pages_go_with_their_last_holder() -> None:
    pages, _ = pool()
    held = pages.take("kv", 2)
    pages.share(held)
    assert pages.drop(held) == []
    assert pages.used_pages == 2
    assert pages.drop(held) == held
    assert pages.used_pages == 0


def test_the_arena_refuses_before_a_page_is_handed_out() -> None:
    pages, arena = pool(cap=3 * PAGE)
    pages.take("kv", 2)
    with pytest.raises(BudgetExceeded):
        pages.take("kv", 2)
    assert pages.used_pages == 2
    assert arena.used_bytes <= arena.cap_bytes


def test_a_random_walk_keeps_contents_and_counts() -> None:
    pages, arena = pool(pages=24)
    walk, held, limit = random.Random(5), {}, 24
    for step in range(3000):
        if walk.random() < 0.5 and pages.free_pages:
            page = pages.take(walk.choice(["kv", "adapter"]), 1)[0]
            assert page not in held
            pages.page(page).view(np.int64)[0] = step
            held[page] = step
        elif held and walk.random() < 0.8:
            page = walk.choice(sorted(held))
            assert int(pages.page(page).view(np.int64)[0]) == held.pop(page)
            pages.drop([page])
        else:
            limit = walk.randint(max(len(held), 1), 24)
            moves = pages.set_limit(limit)
            held = {moves.get(page, page): stamp for page, stamp in held.items()}
            assert all(page < limit for page in held)
            assert arena.used_bytes <= limit * PAGE
        assert pages.used_pages == len(held)
        assert pages.free_pages == limit - len(held)
    assert all(int(pages.page(page).view(np.int64)[0]) == stamp for page, stamp in held.items())
