"""BurstGPT: fits by hand, bursts that scaling keeps and thinning does not, load that is like the trace it came from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.serve import burstgpt
from memwall.serve.traces import NONE, make_trace

RNG = np.random.default_rng(0)


def bursty(shape: float, count: int, mean: float = 0.1, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.gamma(shape, mean / shape, count))


def test_a_window_by_hand() -> None:
    at = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 18])
    (window,) = burstgpt.windows(at, 60)
    gaps = [1.0] * 8 + [10.0]
    mean, variance = sum(gaps) / 9, sum((gap - 2) ** 2 for gap in gaps) / 9
    assert (window.count, mean, variance) == (10, 2, 8)
    assert window.cv == pytest.approx(math.sqrt(2))
    assert (window.shape, window.scale) == pytest.approx((0.5, 4.0))
    assert window.fano == pytest.approx(1 - 10 / 60)  # counts of 0 and 1: variance p (1 - p), mean p
    assert window.peak == pytest.approx(6)


def test_windows_cover_the_trace_and_the_quiet_ones_are_poisson() -> None:
    at = np.concatenate([bursty(0.3, 500, 0.1), [400.0]])
    found = burstgpt.windows(at, 60)
    assert sum(window.count for window in found) == 501
    assert [window.begin for window in found] == pytest.approx([at[0] + 60 * i for i in range(len(found))])
    quiet = [window for window in found if not window.fitted]
    assert quiet
    assert all((window.shape, window.gain) == (1.0, 0.0) for window in quiet)
    assert burstgpt.windows(np.zeros(0)) == []
    with pytest.raises(InputError, match="above zero"):
        burstgpt.windows(at, 0)


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0, 3.0])
def test_the_fit_finds_the_shape_and_beats_the_exponential_where_it_is_another(shape: float) -> None:
    (window,) = burstgpt.windows(bursty(shape, 20000), 1e6)
    assert window.shape == pytest.approx(shape, rel=0.1)
    assert window.shape * window.scale == pytest.approx(0.1, rel=0.05)
    assert (window.gain > 0.01) == (shape != 1.0)


def test_scaling_keeps_bursts_and_thinning_makes_them_milder() -> None:
    trace = make_trace(bursty(0.2, 20000), np.ones(20000), np.ones(20000), "x")
    whole, scaled, thinned = (burstgpt.burst_index(one.at) for one in (trace, trace.scale_rate(5), trace.thin(0.2, 1)))
    assert scaled.cv == pytest.approx(whole.cv, rel=1e-6)
    assert scaled.rate_per_s == pytest.approx(5 * whole.rate_per_s)
    assert thinned.rate_per_s == pytest.approx(whole.rate_per_s / 5, rel=0.05)
    assert thinned.cv < 0.8 * whole.cv
    assert thinned.fano < whole.fano


def test_generated_windows_are_like_those_they_came_from() -> None:
    parts = [bursty(shape, 3000, 0.02, seed) for seed, shape in enumerate((0.3, 1.0, 0.5))]
    at = np.concatenate([part[part < 60] + 60 * i for i, part in enumerate(parts)])
    steps = burstgpt.windows(at, 60)[:3]
    made = burstgpt.draw_arrivals(steps, 5, scale=4.0)
    assert np.all(np.diff(made) >= 0)
    for step, again in zip(steps, burstgpt.windows(made, 60)):
        assert again.count == pytest.approx(4 * step.count, rel=0.15)
        assert again.cv == pytest.approx(step.cv, rel=0.1)
    assert np.array_equal(made, burstgpt.draw_arrivals(steps, 5, scale=4.0))
    assert not np.array_equal(made, burstgpt.draw_arrivals(steps, 6, scale=4.0))


def test_pairs_stay_together_and_zipf_tears_them_apart() -> None:
    prompt = RNG.integers(1, 1000, 4000)
    trace = make_trace(np.arange(4000.0), prompt, prompt // 2 + RNG.integers(1, 50, 4000), "x")
    true = burstgpt.rank_correlation(trace.prompt, trace.output)
    steps = burstgpt.windows(trace.at, 600)
    joint = burstgpt.generate(steps, burstgpt.JointLengths(trace), 1)
    apart = burstgpt.generate(steps, burstgpt.ZipfLengths(), 1)
    assert burstgpt.rank_correlation(joint.prompt, joint.output) == pytest.approx(true, abs=0.02)
    assert abs(burstgpt.rank_correlation(apart.prompt, apart.output)) < 0.1
    assert burstgpt.distance(joint.prompt, trace.prompt) < 0.05
    assert joint.provenance[0].startswith("generate(")


def test_zipf_lengths_have_their_exponent_and_their_most() -> None:
    prompt, output = burstgpt.ZipfLengths(exponent=1.5, most_prompt=50, most_output=3).draw(RNG, 200000)
    counts = np.bincount(prompt)[1:]
    assert (prompt.min(), prompt.max(), output.max()) == (1, 50, 3)
    assert counts[0] / counts[3] == pytest.approx(4**1.5, rel=0.1)
    assert burstgpt.zipf_exponent(prompt) == pytest.approx(1.5, rel=0.1)


def test_the_example_generator_s_defaults() -> None:
    steps = burstgpt.example_windows(4)
    assert [(step.shape, step.scale) for step in steps] == [(0.25, 2.0), *[(0.5, 2.0)] * 3]
    trace = burstgpt.generate(steps, burstgpt.ZipfLengths(), 0, scale=20)
    assert trace.prompt.max() <= 1024
    assert len(trace) == pytest.approx(20 * (120 + 3 * 60), rel=0.25)


def test_conversations_keep_their_turns_in_order_and_their_history() -> None:
    seen = make_trace(np.array([0.0, 1, 10, 12]), np.ones(4), np.ones(4), "x", session=np.array([0, 1, 0, NONE]))
    found = burstgpt.Conversations.of(seen)
    assert (sorted(found.turns), found.think_seconds.tolist()) == ([1, 2], [10.0])
    talk = burstgpt.Conversations(turns=np.array([3]), think_seconds=np.array([5.0]))
    starts = make_trace(np.array([0.0, 1.0, 2.0]), np.array([10, 20, 90]), np.array([5, 5, 5]), "y")
    trace = talk.unfold(starts, 1, most_tokens=100)
    for session, rows in trace.sessions().items():
        assert np.diff(trace.at[rows]) == pytest.approx([5.0] * (len(rows) - 1))
        new, answer = trace.prompt[rows[0]], trace.output[rows[0]]
        assert trace.prompt[rows].tolist() == [new + turn * (new + answer) for turn in range(len(rows))]
        assert trace.turn[rows].tolist() == list(range(len(rows)))
        assert len(rows) == (3, 3, 1)[session]
        assert (trace.prompt[rows] + trace.output[rows]).max() <= 100
    with pytest.raises(InputError, match="no session of two turns"):
        burstgpt.Conversations.of(starts)


def test_the_plain_load_has_the_same_rate_and_lengths_and_no_bursts() -> None:
    at = bursty(0.2, 5000)
    trace = make_trace(at, RNG.integers(1, 99, 5000), RNG.integers(1, 99, 5000), "x")
    plain, fixed = (burstgpt.poisson_like(trace, 1, lengths=lengths) for lengths in ("trace", "fixed"))
    assert burstgpt.burst_index(plain.at).cv == pytest.approx(1, abs=0.05)
    assert plain.seconds == pytest.approx(trace.seconds, rel=0.01)
    assert np.array_equal(plain.prompt, trace.prompt)
    assert set(fixed.prompt) == {round(float(trace.prompt.mean()))}
    with pytest.raises(InputError, match="trace or fixed"):
        burstgpt.poisson_like(trace, 1, lengths="other")


def test_periods_failures_and_conditional_lengths() -> None:
    hours = np.arange(24 * 21)
    counts = np.where(hours % 24 < 12, 20, 2)
    at = np.concatenate([3600.0 * hour + np.linspace(0, 3599, count) for hour, count in zip(hours, counts)])
    series = burstgpt.counts_per(at, 3600)
    assert burstgpt.autocorrelation(series, 24) > 0.95 > 0 > burstgpt.autocorrelation(series, 12)
    assert math.isnan(burstgpt.autocorrelation(series[:10], 24))
    profile = burstgpt.weekly_profile(at)
    assert profile.shape == (7, 24)
    assert profile[3, 5] == pytest.approx(20)
    output = np.where(np.repeat(counts, counts) == 20, 0, 7)
    told = burstgpt.failures(make_trace(at, np.ones(len(at)), output, "x"))
    assert told["with_load"] > 0.9
    assert told["share"] == pytest.approx(20 / 22)
    pairs = make_trace(np.arange(100.0), np.arange(100), np.arange(100), "x")
    assert burstgpt.conditional_quantiles(pairs, 2) == [(49, 12.25, 24.5, 36.75), (99, 62.25, 74.5, 86.75)]


def test_conversations_by_turns_pauses_and_growth() -> None:
    session = np.array([1, 2, 1, NONE, 1])
    trace = make_trace(np.array([0.0, 1, 4, 5, 10]), np.array([10, 9, 30, 1, 70]), np.ones(5), "x", session=session)
    told = burstgpt.conversations(trace)
    assert (told["turns_mean"], told["turns_most"], told["pause_p50"], told["prompt_growth"]) == (2, 3, 5, 30)
    assert burstgpt.conversations(trace.keep(session == NONE, "none")) == {}


def test_one_moment_tells_nothing_about_bursts() -> None:
    with pytest.raises(InputError, match="nothing about bursts"):
        burstgpt.burst_index(np.array([1.0, 1.0]))
