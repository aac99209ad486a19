"""Draws given by a counter: the published test vectors, independence of what was drawn before, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.engine.counter import CounterDraws, philox
from memwall.engine.sampling import Sampler, Sampling
from memwall.errors import InputError

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_a_step_has_its_number_whatever_came_before(seed: int, prompt: int, step: int) -> None:
    draws = CounterDraws(seed=seed, prompt=prompt)
    first = draws.at(step)
    assert 0 <= first < 1
    draws.at(step ^ 1)
    assert CounterDraws(seed=seed, prompt=prompt).at(step) == first
    assert CounterDraws(seed=seed, prompt=prompt ^ 1).at(step) != first
    assert CounterDraws(seed=seed ^ 1, prompt=prompt).at(step) != first
    assert draws.at(step ^ 1) != first


def test_draws_are_even() -> None:
    found = np.array([CounterDraws(seed=seed, prompt=prompt).at(step)
                      for seed in range(10) for prompt in range(10) for step in range(100)])  # fmt: skip
    counts = np.histogram(found, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 0.999 quantile of chi-squared with 19 degrees of freedom
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(("seed", "prompt"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_keys_out_of_range(seed: int, prompt: int) -> None:
    with pytest.raises(InputError, match=r"2\^"):
        CounterDraws(seed=seed, prompt=prompt)


def test_a_sampler_takes_the_draw_it_is_given() -> None:
    logits = np.log(np.float32([0.1, 0.2, 0.3, 0.4]))
    sampler = Sampler(Sampling(temperature=1.0))
    assert [sampler.pick(logits, draw) for draw in (0.0, 0.05, 0.15, 0.35, 0.65, 0.999)] == [0, 0, 1, 2, 3, 3]
    assert [Sampler(Sampling(temperature=1.0, top_k=2)).pick(logits, draw) for draw in (0.0, 0.42, 0.44)] == [2, 2, 3]
    assert Sampler(Sampling(temperature=0.0)).pick(logits, 0.0) == 3
