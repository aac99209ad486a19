from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine import Sampler, Sampling
from memwall.engine.sampling import StopWatcher
from memwall.errors import InputError


def test_greedy_takes_the_largest() -> None:
    assert Sampler(Sampling()).pick(np.array([0.1, 3.0, -1.0], np.float32)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_outputs_that_are_no_numbers(temperature: float, wrong: float) -> None:
    with pytest.raises(InputError, match="not numbers"):
        Sampler(Sampling(temperature=temperature)).pick(np.array([1.0, wrong, 2.0], np.float32))


def test_same_seed_same_tokens() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.pick(logits) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_frequencies_follow_the_softmax() -> None:
    chances = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(Sampling(temperature=1.0, seed=3))
    counts = np.bincount([sampler.pick(np.log(chances).astype(np.float32)) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - chances).max() < 0.03


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        # 0.5 alone is short of 0.6: the token that crosses the mass is kept
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.5}, {0, 1}),
        ({"top_p": 0.1}, {0}),
        ({"top_k": 3, "top_p": 0.5}, {0, 1}),
    ],
)
def test_filters_keep_the_right_candidates(options: dict[str, float], allowed: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    sampler = Sampler(Sampling(temperature=1.0, **options))  # type: ignore[arg-type]
    assert {sampler.pick(logits) for _ in range(300)} <= allowed


def slow_candidates(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> chance, straight from the definitions."""
    scores = [float(x) / temperature for x in logits]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[: top_k or None]
    masses = [math.exp(scores[token] - scores[order[0]]) for token in order]
    chances = [mass / sum(masses) for mass in masses]
    kept, total = 0, 0.0
    while kept < len(order) and total < top_p:
        total, kept = total + chances[kept], kept + 1
    return {token: chance / total for token, chance in zip(order[:kept], chances[:kept])}


@pytest.mark.parametrize("options", [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 6, 0.7)])
def test_draws_follow_the_definition(options: tuple[float, int, float]) -> None:
    temperature, top_k, top_p = options
    logits = np.random.default_rng(7).normal(size=40).astype(np.float32)
    wanted = slow_candidates(logits, *options)
    sampler = Sampler(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=1))
    counts = np.bincount([sampler.pick(logits) for _ in range(6000)], minlength=len(logits)) / 6000
    assert set(np.flatnonzero(counts)) <= set(wanted)
    assert max(abs(counts[token] - wanted.get(token, 0.0)) for token in range(len(logits))) < 0.03


def test_of_equal_tokens_the_first_are_kept() -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_k=2))
    assert {sampler.pick(np.zeros(9, np.float32)) for _ in range(100)} == {0, 1}


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    sampler = Sampler(Sampling(temperature=1e-300))
    assert sampler.pick(np.array([1.0, 1.5, 1.4], np.float32)) == 1


def test_a_draw_works_in_its_scratch_alone() -> None:
    logits = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    scratch = np.empty(Sampler.scratch_shape(len(logits)), np.float32)
    for options in ({}, {"top_k": 40}, {"top_p": 0.9}):
        sampler = Sampler(Sampling(temperature=1.0, **options), scratch)  # type: ignore[arg-type]
        tracemalloc.start()
        sampler.pick(logits)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * len(logits)  # masks of a byte a token, no floats


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_bad_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Sampling(**options)  # type: ignore[arg-type]


@given(
    text=st.text(alphabet="abc", max_size=40),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stop_watcher_is_the_same_however_the_text_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    watcher = StopWatcher(tuple(stop))
    shown, met = "", False
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for begin, end in itertools.pairwise(edges):
        part, met = watcher.push(text[begin:end])
        shown += part
        if met:
            break
    if not met:
        shown += watcher.flush()
    assert not any(s in shown for s in stop)
    assert text.startswith(shown)
    assert met == any(s in text for s in stop)
    if not met:
        assert shown == text
