"""One bit an access: equal to LFD where it is right, within the proven bounds where not, and what shortcuts break."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.memory.cache_policy import Lru, Marker, count_faults, least_faults, next_accesses
from memwall.memory.succinct_paging import (
    Flush,
    MarkAndPredict,
    MarkZero,
    PredictiveMarker,
    Robust,
    Weighted,
    discard_bits,
    phase_bits,
    phases_of,
    wrong_bits,
)

SEQUENCES = st.lists(st.integers(0, 8), min_size=1, max_size=80)
SLOTS = st.integers(1, 7)
BITS = st.lists(st.integers(0, 1), min_size=80, max_size=80)


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, SLOTS, st.integers(0, 9))
def test_true_discard_bits_are_worth_the_future(keys: list[int], slots: int, seed: int) -> None:
    bits, least = discard_bits(keys, slots), least_faults(keys, slots)
    assert wrong_bits("discard", keys, slots, bits) == (0, 0)
    assert count_faults(Flush(slots), keys, bits) == least
    assert count_faults(MarkZero(slots, seed), keys, bits) == least


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, SLOTS, BITS)
def test_flush_stays_within_its_bound_whatever_the_bits(keys: list[int], slots: int, bits: list[int]) -> None:
    zeros, ones = wrong_bits("discard", keys, slots, bits[: len(keys)])
    limit = least_faults(keys, slots) + (slots - 1) * zeros + ones
    assert count_faults(Flush(slots), keys, bits[: len(keys)]) <= limit


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, SLOTS, BITS, st.booleans())
def test_marks_keep_their_phases_and_true_phase_bits_twice_the_least(
    keys: list[int], slots: int, bits: list[int], in_order: bool
) -> None:
    policy = MarkAndPredict(slots, 1, in_order=in_order)
    count_faults(policy, keys, bits[: len(keys)])
    assert policy.phases == phases_of(keys, slots)[-1] + 1
    faults = count_faults(MarkAndPredict(slots, 1, in_order=in_order), keys, phase_bits(keys, slots))
    assert faults <= 2 * least_faults(keys, slots) + slots


def test_bits_by_hand() -> None:
    keys = list("abcabd")  # two slots: LFD faults at a, b, c (b leaves: a comes sooner), not at a, at b, d
    assert discard_bits(keys, 2) == [0, 1, 1, 1, 0, 0]
    assert phases_of(keys, 2) == [0, 0, 1, 1, 2, 2]
    assert phase_bits(keys, 2) == [0, 1, 1, 1, 1, 1]
    assert wrong_bits("discard", keys, 2, [0] * 6) == (3, 0)
    assert wrong_bits("phase", list("aab"), 2, [0, 1, 1]) == (0, 0)  # of a phase the key's last bit counts


def test_a_hit_overwrites_the_bit() -> None:
    for policy in (Flush(2), MarkAndPredict(2, in_order=True)):
        policy.on_access("a", 1, 0)
        policy.on_access("b", 1, 0)
        policy.on_access("b", 1, 1)  # now to be discarded
        policy.on_access("a", 1, 0)
        assert list(policy.on_access("c", 1, 0)) == ["b"]


def test_all_zeros_flush_the_cache() -> None:
    policy = Flush(3)
    for key in "abc":
        assert not policy.on_access(key, 1, 0)
    assert set(policy.on_access("d", 1, 0)) == {"a", "b", "c"}


def test_a_key_that_comes_back_unmarked_drives_another_one_out() -> None:
    """Though a slot is free: what is unmarked stays a fair sample of what is due."""
    counts: Counter[str] = Counter()
    for seed in range(600):
        policy = MarkZero(4, seed)
        for key in "abcd":
            policy.on_access(key, 1, 0)
        gone = policy.on_access("e", 1, 1)  # one of four leaves for it, and it leaves itself
        assert len(gone) == 2
        assert len(policy.held) == 3
        back = policy.on_access(gone[0], 1, 0)
        assert len(back) == 1
        assert back[0] in policy.due
        assert len(policy.held) == 3  # the free slot is not used
        counts.update(policy.unmarked)
    # each of four is unmarked with chance 1/2
    assert all(counts[key] == pytest.approx(300, abs=60) for key in "abcd")


@pytest.mark.parametrize("kind", ["discard", "phase"])
def test_random_forms_keep_their_bounds_in_the_mean(kind: str) -> None:
    draw = random.Random(3)
    for _ in range(40):
        slots = draw.randint(2, 6)
        keys = [draw.randrange(slots + 2) for _ in range(60)]
        bits = [draw.randrange(2) for _ in keys]
        zeros, ones = wrong_bits(kind, keys, slots, bits)
        harmonic = sum(1 / n for n in range(1, slots + 1))
        form, factor = (MarkZero, 2 * harmonic) if kind == "discard" else (MarkAndPredict, harmonic)
        runs = [count_faults(form(slots, seed), keys, bits) for seed in range(100)]
        best = least_faults(keys, slots)
        limit = best + factor * zeros + ones if kind == "discard" else 2 * best + slots + factor * zeros + ones
        assert statistics.fmean(runs) <= limit + 3 * statistics.stdev(runs) / 10


def test_robust_forms_follow_the_better_one() -> None:
    loop = [at % 6 for at in range(600)]  # LRU with five slots never hits, true bits nearly always
    bits = discard_bits(loop, 5)
    best, lru = least_faults(loop, 5), count_faults(Lru(5), loop)
    assert lru == 600
    assert count_faults(Robust(Flush(5), Lru(5)), loop, bits) == best
    assert count_faults(Weighted(MarkZero(5), Marker(5), seed=3), loop, bits) <= 1.3 * best + 5
    wrong = [1 - bit for bit in bits]
    marker = statistics.fmean(count_faults(Marker(5, seed), loop) for seed in range(10))
    assert count_faults(MarkZero(5), loop, wrong) > 1.5 * marker
    runs = [count_faults(Weighted(MarkZero(5), Marker(5, seed), seed=seed), loop, wrong) for seed in range(10)]
    assert statistics.fmean(runs) <= 1.3 * marker + 10


def test_a_robust_form_holds_what_it_says() -> None:
    draw = random.Random(5)
    for make in (lambda: Robust(MarkZero(4, 1), Lru(4)), lambda: Weighted(MarkZero(4, 1), Marker(4), seed=2)):
        keys = [draw.randrange(7) for _ in range(400)]
        policy = make()
        count_faults(policy, keys, [draw.randrange(2) for _ in keys])
        assert max(store.faults for store in policy.stores) <= 400
    with pytest.raises(InputError, match="beta 1"):
        Weighted(MarkZero(4), Marker(4), beta=1.0)


def test_marking_that_is_told_next_accesses() -> None:
    draw = random.Random(6)
    for _ in range(50):
        slots = draw.randint(1, 6)
        keys = [draw.randrange(slots + 3) for _ in range(80)]
        best = least_faults(keys, slots)
        for trust in (True, False):
            told = count_faults(PredictiveMarker(slots, 1, trust=trust), keys, next_accesses(keys))
            assert best <= told <= 2 * best + slots  # true next accesses
            policy = PredictiveMarker(slots, 1, trust=trust)
            count_faults(policy, keys, [draw.randrange(80) for _ in keys])
            assert policy.phases == phases_of(keys, slots)[-1] + 1
