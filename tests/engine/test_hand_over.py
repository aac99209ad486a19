"""Who reads what from whom when both sides are cut differently: every byte once, in its place; tokens stay the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.hand_over import HandOver, Layout, Pull, parts_of, pulls_of
from memwall.errors import InputError
from memwall.memory import Arena, Ledger, PagePool

LAYOUT = Layout(layers=4, heads=4, head_bytes=16, page_tokens=16)


def pools(layout: Layout, degrees: tuple[int, int], pages: int) -> list[PagePool]:
    arena = Arena(1 << 30, Ledger())
    made = []
    for part in parts_of(layout, *degrees):
        pool = PagePool("kv", page_bytes=layout.page_bytes(part), most_pages=pages, arena=arena)
        pool.take("kv", pages)
        made.append(pool)
    return made


def fill(layout: Layout, degrees: tuple[int, int], held: list[PagePool], whole: np.ndarray) -> None:
    """whole: [pages, layers, 2, page_tokens, heads, head_dim]."""
    for pool, part in zip(held, parts_of(layout, *degrees), strict=True):
        own = whole[:, part.layers.start : part.layers.stop, :, :, part.heads.start : part.heads.stop]
        pool.run(0, len(whole)).view(np.float16)[:] = own.ravel()


def test_two_ranks_to_one_and_back_by_hand() -> None:
    two = HandOver(layout=LAYOUT, source=(2, 1), target=(1, 1))
    assert [(p.source, p.target, p.heads) for p in two.pieces] == [(0, 0, range(2)), (1, 0, range(2, 4))]
    back = HandOver(layout=LAYOUT, source=(1, 1), target=(2, 1))
    assert [(p.source, p.target, p.heads) for p in back.pieces] == [(0, 0, range(2)), (0, 1, range(2, 4))]
    deep = HandOver(layout=LAYOUT, source=(1, 2), target=(1, 1))
    assert [(p.source, p.target, p.layers) for p in deep.pieces] == [(0, 0, range(2)), (1, 0, range(2, 4))]


DEGREES = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))


@settings(max_examples=40, deadline=None)
@given(source=DEGREES, target=DEGREES, seed=st.integers(0, 99))
def test_every_rank_gets_what_is_its_own(source: tuple[int, int], target: tuple[int, int], seed: int) -> None:
    hand_over = HandOver(layout=LAYOUT, source=source, target=target)
    seen = [(p.target, layer, head) for p in hand_over.pieces for layer in p.layers for head in p.heads]
    wanted = [(at, layer, head) for at, p in enumerate(hand_over.targets) for layer in p.layers for head in p.heads]
    assert sorted(seen) == sorted(wanted)  # once each
    draw = np.random.default_rng(seed)
    whole = draw.standard_normal((6, 4, 2, 16, 4, 8)).astype(np.float16)
    given_, taken, wanted_pools = (pools(LAYOUT, degrees, 6) for degrees in (source, target, target))
    fill(LAYOUT, source, given_, whole)
    places = [int(page) for page in draw.permutation(6)]
    moved = hand_over.copy(given_, taken, pulls_of(range(6), places))
    fill(LAYOUT, target, wanted_pools, whole[np.argsort(places)])
    for got, want in zip(taken, wanted_pools, strict=True):
        np.testing.assert_array_equal(got.run(0, 6), want.run(0, 6))
    assert moved == 6 * sum(LAYOUT.page_bytes(part) for part in hand_over.targets)


def test_readers_are_spread_over_replicas() -> None:
    wide = HandOver(layout=Layout(layers=1, heads=1, head_bytes=16, page_tokens=16), source=(2, 1), target=(4, 1))
    assert [piece.source for piece in wide.pieces] == [0, 1, 0, 1]


def test_pages_that_follow_each_other_are_one_pull() -> None:
    assert pulls_of([3, 4, 5, 9], [0, 1, 2, 3]) == (Pull(3, 0, 3), Pull(9, 3, 1))


def test_bad_degrees_are_named() -> None:
    with pytest.raises(InputError, match="4 layers cannot be divided among 3 stages"):
        parts_of(LAYOUT, 1, 3)
    with pytest.raises(InputError, match="4 heads of keys and values cannot be divided among 3 ranks"):
        parts_of(LAYOUT, 3, 1)
