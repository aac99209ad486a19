"""Costs by hand, and counts against sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.engine.flash_costs import FlashCosts, window_counts
from memwall.errors import InputError
from memwall.memory.read_profile import ReadProfile

PROFILE = ReadProfile(chunks=(4096, 8192), depths=(1, 32), bytes_per_s=((1e6, 4.096e6), (2e6, 4.096e6)))


def test_a_layer_by_hand() -> None:
    costs = FlashCosts(
        profile=PROFILE, depth=32, call_seconds=1e-4, key_seconds=1e-6, held_bytes_per_s=1e9, other_seconds=2e-3
    )
    parts = costs.layer_seconds(predicted=300, loaded=100, held=1000, row_bytes=8192)
    assert parts == pytest.approx({"read": 0.2, "manage": 6e-4, "compute": 8.192e-3, "other": 2e-3})
    # in two pieces: twice as many reads of half the size, each a thousandth of a second
    assert costs.read_seconds(100, 8192, 2) == pytest.approx(0.2)
    with pytest.raises(InputError):
        FlashCosts(profile=PROFILE, depth=32, call_seconds=-1, key_seconds=0, held_bytes_per_s=1)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(6, 20))
def test_counts_are_those_of_sets(seed: int, window: int, tokens: int) -> None:
    wanted = np.random.default_rng(seed).random((tokens, 9)) < 0.3
    sets = [set(np.flatnonzero(row).tolist()) for row in wanted]
    later = range(window, tokens)
    before = [set().union(*sets[t - window : t]) for t in later]
    held = [set().union(*sets[t - window + 1 : t + 1]) for t in later]
    counts = window_counts(wanted, window)
    assert counts.predicted == pytest.approx(np.mean([len(sets[t]) for t in later]))
    assert counts.loaded == pytest.approx(np.mean([len(sets[t] - seen) for t, seen in zip(later, before, strict=True)]))
    assert counts.held == pytest.approx(np.mean([len(each) for each in held]))


def test_windows_longer_than_the_text_are_told() -> None:
    with pytest.raises(InputError, match="from 1 to 2"):
        window_counts(np.ones((3, 2), bool), 3)
