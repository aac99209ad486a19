"""Cache-Craft's scores and decisions against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kv.cache_craft import (
    Context,
    CraftSettings,
    Focus,
    chunk_id,
    decayed,
    decide,
    order_distance,
    preload_layers,
    worth,
)


def context(inter: list[float], names: str, intra: float = 2.0, tokens: int = 4) -> Context:
    """Predecessors named by single letters, of 10 tokens each."""
    return Context(
        num_tokens=tokens,
        predecessors=tuple(names),
        lengths=(10,) * len(names),
        inter=np.array(inter),
        intra=intra,
        token_inter=np.array([0.1, 0.9, 0.4, 0.9], np.float32)[:tokens],
    )


def test_impact_by_hand() -> None:
    # a = (3 + 1) / (4 * 10) = 0.1, b = 2 / 16 = 0.125
    assert context([3.0, 1.0], "ab").impact == pytest.approx(1 / (1 + math.exp(-0.1 / 0.125)))
    assert context([], "").impact == 0.5  # a chunk without predecessors is self-contained
    assert context([1.0], "a", intra=0.0).impact == 1.0
    assert context([0.0], "a", intra=0.0).impact == 0.5


def overlap(one: Context, now: str) -> float:
    return one.overlap(now, [10] * len(now))


def test_overlap_by_hand() -> None:
    one = context([3.0, 1.0], "ab")
    assert overlap(one, "ab") == 1.0
    assert one.shared("xay") == 0.75
    assert one.known("xay", [10, 20, 10]) == 0.5
    assert overlap(one, "a") == 0.75
    assert overlap(one, "xay") == pytest.approx(1 / 3)  # a third of what comes before it now is known to it
    assert overlap(one, "b") == 0.25
    assert overlap(one, "xyz") == 0.0
    assert overlap(one, "ba") == 0.0  # all there, every pair turned
    three = context([2.0, 1.0, 1.0], "abc")
    assert overlap(three, "acb") == pytest.approx(1 - 1 / 3)


def test_overlap_of_a_chunk_that_looked_at_nothing() -> None:
    assert context([0.0, 0.0], "ab").shared("xyz") == 1.0
    assert context([], "").shared("xyz") == 1.0
    assert overlap(context([], ""), "xyz") == 0.0  # all is new to it
    assert overlap(context([], ""), "") == 1.0
    assert context([1.0], "a").known("a", [0]) == 1.0  # an opening of one token is no context


def test_duplicates_count_as_often_as_both_have_them() -> None:
    twice = context([3.0, 1.0], "aa")
    assert twice.shared("a") == 0.75
    assert twice.shared("aa") == 1.0
    assert context([4.0], "a").shared("aa") == 1.0
    assert context([4.0], "a").known("aa", [10, 10]) == 0.5


def test_order_distance() -> None:
    assert order_distance("abcd", "abcd") == 0
    assert order_distance("abcd", "dcba") == 1
    assert order_distance("abcd", "abdc") == pytest.approx(1 / 6)
    assert order_distance("ab", "cd") == 0
    assert order_distance("aba", "aab") == pytest.approx(1 / 3)


def test_overhead_is_a_share() -> None:
    one = context([3.0, 1.0], "ab")
    assert one.overhead("ab", (10, 10), 5.0) == 0
    assert one.overhead("xy", (10, 10), 0.5) == pytest.approx(0.5 * one.impact)
    assert one.overhead("xy", (10, 10), 50.0) == 1
    assert one.overhead("xy", (10, 10), 0.0) == 0


def test_ranked_takes_those_that_looked_outside_most() -> None:
    one = context([3.0, 1.0], "ab")
    assert one.ranked(1).tolist() == [1]  # of equals the first
    assert one.ranked(3).tolist() == [1, 2, 3]
    assert one.ranked(0).tolist() == []
    assert one.ranked(4).tolist() == [0, 1, 2, 3]


def test_decide_takes_the_cheapest_variant_or_computes_in_full() -> None:
    variants = {"near": context([3.0, 1.0], "ab"), "far": context([3.0, 1.0], "xy")}
    best = decide(variants, "ac", (10, 10), 4, alpha=1.0)
    assert best.variant == "near"
    assert best.overhead == pytest.approx(variants["near"].impact * 0.5)
    assert len(best.repair) == math.ceil(4 * best.overhead)
    assert decide(variants, "xy", (10, 10), 4, alpha=1.0).variant == "far"
    full = decide(variants, "uv", (10, 10), 4, alpha=9.0)
    assert full.variant is None
    assert full.repair.tolist() == [0, 1, 2, 3]
    assert decide({}, "ab", (10, 10), 4, alpha=1.0).variant is None
    chosen = decide(variants, "ac", (10, 10), 4, 1.0, lambda context, count: np.arange(count))
    assert chosen.repair.tolist() == list(range(len(chosen.repair)))


def test_worth_and_decay() -> None:
    assert worth(0.5) == 2
    assert worth(0.0) == 20
    assert decayed(8.0, 32) == 4


@pytest.mark.parametrize(
    ("layers", "prefill", "load", "wanted"),
    [(32, 2.0, 1.0, 1), (32, 1.0, 1.0, 1), (33, 1.0, 2.0, 17), (32, 0.0, 1.0, 32), (5, 1.0, 4.0, 4), (8, 1.0, 0.0, 1)],
)
def test_preload_depth(layers: int, prefill: float, load: float, wanted: int) -> None:
    depth = preload_layers(layers, prefill, load)
    assert depth == wanted
    # no layer is waited for: layer l arrives at l * load, computing began when `depth` were there
    for layer in range(depth, layers + 1):
        assert layer * load <= depth * load + (layer - 1) * prefill + 1e-9


def test_focus_settles_on_chunks_that_stay_apart() -> None:
    focus = Focus(CraftSettings(stop=2), np.zeros(3))
    assert focus.look(np.array([0.3, 0.29, 0.28])) is None  # no gap
    assert focus.look(np.array([0.9, 0.1, 0.8])) is None  # 1.2, 0.39, 1.08: a gap, for the first time
    assert focus.look(np.array([0.9, 0.1, 0.8])) == {0, 2}
    assert focus.look(np.array([0.0, 9.0, 0.0])) is None  # told once
    never = Focus(CraftSettings(stop=0), np.zeros(2))
    assert never.look(np.array([1.0, 0.0])) is None


def test_focus_starts_anew_when_the_chunks_change() -> None:
    focus = Focus(CraftSettings(stop=2), np.zeros(2))
    assert focus.look(np.array([1.0, 0.1])) is None
    assert focus.look(np.array([0.0, 5.0])) is None
    assert focus.look(np.array([0.0, 1.0])) == {1}


def test_settings() -> None:
    assert CraftSettings.from_policy("cache-craft").alpha is None
    settings = CraftSettings.from_policy("cache-craft(alpha=0.5,variants=2,ram_mb=1)")
    assert (settings.alpha, settings.variants, settings.ram_bytes) == (0.5, 2, 1_000_000)
    for wrong in (
        "cache-craft(alpha=200)",
        "cache-craft(variants=0)",
        "kivi",
        "cache-craft(beta=1)",
        "cache-craft(margin=0.5)",
    ):
        with pytest.raises(InputError):
            CraftSettings.from_policy(wrong)


def test_chunk_ids_name_tokens() -> None:
    assert chunk_id([1, 2]) == chunk_id(np.array([1, 2]))
    assert chunk_id([1, 2]) != chunk_id([2, 1])
