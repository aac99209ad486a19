"""BurstGPT: what real load is like (bursts, lengths, conversations, failures), and load of that kind at any scale.

*Source*: BurstGPT (Wang 2024, arXiv 2401.17644), characteristics and workload generator; defaults of the authors'
example generator.
*Idea*: gaps between arrivals follow a Gamma distribution whose shape and scale change from window to window: shape 1 is
Poisson, below it bursts. Lengths are drawn as pairs, since prompts and answers belong together; conversations have
turns whose prompts hold what was said before.
*Units*: seconds, tokens; windows of `WINDOW_SECONDS`.
*Differs from the paper*: windows with few gaps are Poisson of their own rate.
*Cost*: a pass over the columns; a generated trace costs its columns.
*Holds when*: load within a window is steady; a window's own trend counts as burstiness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from memwall.errors import InputError
from memwall.serve.traces import NONE, Trace, make_trace, turns

WINDOW_SECONDS = 60.0
LEAST_GAPS = 8
"""Fewer than these do not tell a shape."""
LEAST_STRETCHES = 5
SHORTEST_GAP = 1e-6
ZIPF_EXPONENT, MOST_TOKENS = 1.1, 1024
EXAMPLE_STEPS = ((0.25, 2.0), (0.5, 2.0))
"""(shape, scale) of the example generator: at the start, and from then on."""


# ---- what a trace is like ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Arrivals of one window. shape, scale: of the Gamma fit by moments (k = 1 / CV^2); gain: its log-likelihood above
    that of the exponential fit, per gap; fano: variance over mean of the counts in seconds; peak: the most of these
    counts over their mean.
    """

    begin: float
    seconds: float
    count: int
    shape: float
    scale: float
    cv: float
    gain: float
    fano: float
    peak: float

    @property
    def fitted(self) -> bool:
        """Whether there were gaps enough to tell a shape."""
        return self.count > LEAST_GAPS


def windows(at: np.ndarray, seconds: float = WINDOW_SECONDS) -> list[Window]:
    """All windows from the first arrival on, empty ones too."""
    if not seconds > 0:
        raise InputError(f"a window of {seconds} seconds; it must be above zero")
    if not len(at):
        return []
    edges = at[0] + seconds * np.arange(int((at[-1] - at[0]) // seconds) + 2)
    cuts = np.searchsorted(at, edges)
    return [_window(at[a:b], float(edge), seconds) for a, b, edge in zip(cuts, cuts[1:], edges)]


def _window(at: np.ndarray, begin: float, seconds: float) -> Window:
    fano, peak = burstiness(at - begin, seconds)
    shape, scale, cv, gain = 1.0, seconds / max(len(at), 1), 1.0, 0.0
    if len(at) > LEAST_GAPS:
        gaps = np.maximum(np.diff(at), SHORTEST_GAP)
        mean, cv = float(gaps.mean()), float(gaps.std() / gaps.mean())
        shape, scale = 1 / max(cv, 1e-3) ** 2, mean * max(cv, 1e-3) ** 2
        gain = gamma_likelihood(gaps, shape, scale) - gamma_likelihood(gaps, 1.0, mean)
    return Window(
        begin=begin, seconds=seconds, count=len(at), shape=shape, scale=scale, cv=cv, gain=gain, fano=fano, peak=peak
    )


def gamma_likelihood(gaps: np.ndarray, shape: float, scale: float) -> float:
    """Mean log-likelihood of gaps under a Gamma distribution."""
    mean_log = float(np.log(gaps).mean())
    return (shape - 1) * mean_log - float(gaps.mean()) / scale - math.lgamma(shape) - shape * math.log(scale)


def burstiness(since: np.ndarray, seconds: float) -> tuple[float, float]:
    """Fano factor and peak-to-mean ratio of the counts per second; 0 without arrivals."""
    counts = np.bincount(np.clip(since.astype(np.int64), 0, None), minlength=max(int(seconds), 1))
    mean = float(counts.mean())
    return (float(counts.var()) / mean, float(counts.max()) / mean) if mean else (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstIndex:
    """How bursty a load is; told next to a benchmark's results."""

    rate_per_s: float
    cv: float
    fano: float
    peak: float


def burst_index(at: np.ndarray) -> BurstIndex:
    """Of a whole load."""
    if len(at) < 2 or at[-1] <= at[0]:
        raise InputError(f"{len(at)} arrivals at one moment tell nothing about bursts")
    gaps, seconds = np.diff(at), float(at[-1] - at[0])
    fano, peak = burstiness(at - at[0], seconds)
    return BurstIndex(rate_per_s=len(gaps) / seconds, cv=float(gaps.std() / gaps.mean()), fano=fano, peak=peak)


def counts_per(at: np.ndarray, seconds: float) -> np.ndarray:
    """Arrivals in each stretch of time, from the first one on."""
    return np.bincount(((at - at[0]) // seconds).astype(np.int64))


def fano_factor(at: np.ndarray, seconds: float) -> float:
    """Variance over mean of the counts in whole stretches of so many seconds: 1 for Poisson arrivals, whatever the
    length, while bursts show in those that are as long as they are. nan where there are fewer than `LEAST_STRETCHES`.
    """
    counts = counts_per(at, seconds)[:-1]
    return float(counts.var() / counts.mean()) if len(counts) >= LEAST_STRETCHES else float("nan")


def autocorrelation(counts: np.ndarray, lag: int) -> float:
    """Of a series with itself `lag` places later; nan where it is too short."""
    if len(counts) <= lag + 1:
        return float("nan")
    return float(np.corrcoef(counts[:-lag], counts[lag:])[0, 1])


def weekly_profile(at: np.ndarray) -> np.ndarray:
    """Mean arrivals an hour, by weekday and hour [7, 24]; day 0 is the first of the trace's calendar."""
    hours = (at // 3600).astype(np.int64)
    counts = np.bincount(hours, minlength=int(hours.max()) + 1)[hours.min() :]
    places = (np.arange(len(counts)) + hours.min()) % (7 * 24)
    seen = np.bincount(places, minlength=7 * 24)
    return (np.bincount(places, counts, minlength=7 * 24) / np.maximum(seen, 1)).reshape(7, 24)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, equal values sharing their mean rank."""
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of both distribution functions."""
    every = np.concatenate([one, other])
    shares = [np.searchsorted(np.sort(each), every, side="right") / len(each) for each in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def conditional_quantiles(trace: Trace, parts: int = 10) -> list[tuple[int, float, float, float]]:
    """Quartiles of answers by length of the prompt: (longest prompt of the part, 25 %, 50 %, 75 %)."""
    order = np.argsort(trace.prompt, kind="stable")
    found = []
    for rows in np.array_split(order, min(parts, max(len(order), 1))):
        if len(rows):
            low, middle, high = np.quantile(trace.output[rows], [0.25, 0.5, 0.75]).tolist()
            found.append((int(trace.prompt[rows[-1]]), low, middle, high))
    return found


def zipf_exponent(lengths: np.ndarray) -> float:
    """Slope of log frequency against log rank of lengths."""
    counts = np.sort(np.unique(lengths, return_counts=True)[1])[::-1]
    if len(counts) < 3:
        return float("nan")
    return float(-np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0])


def conversations(trace: Trace) -> dict[str, float]:
    """Turns of a session, seconds between them (heavy-tailed: see the quantiles) and how much longer a turn's prompt is
    than the one's before; empty without a session of two turns.
    """
    rows = [each for each in trace.sessions().values() if len(each) > 1]
    if not rows:
        return {}
    pauses, grown = (np.concatenate([np.diff(column[each]) for each in rows]) for column in (trace.at, trace.prompt))
    counts = [len(each) for each in trace.sessions().values()]
    told = {f"pause_p{q}": float(np.quantile(pauses, q / 100)) for q in (50, 90, 99)}
    return {
        "turns_mean": float(np.mean(counts)),
        "turns_most": max(counts),
        **told,
        "prompt_growth": float(grown.mean()),
    }


def failures(trace: Trace, seconds: float = 3600.0) -> dict[str, Any]:
    """Share of failures, by model, and how it goes with the load of their stretch of time (rank correlation)."""
    places = ((trace.at - trace.at[0]) // seconds).astype(np.int64)
    load = np.bincount(places)
    rate = np.bincount(places, trace.failed) / np.maximum(load, 1)
    by_model = {name: float(trace.failed[trace.model == code].mean()) for code, name in enumerate(trace.models)
                if np.any(trace.model == code)}  # fmt: skip
    with_load = rank_correlation(load[load > 0], rate[load > 0]) if len(np.unique(rate[load > 0])) > 1 else 0.0
    return {"share": float(trace.failed.mean()), "by_model": by_model, "with_load": with_load}


# ---- load of that kind ---------------------------------------------------------------------------------------------


class Lengths(Protocol):
    """Draws (prompt, output) tokens."""

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [count] each."""


@dataclass(frozen=True, slots=True, eq=False)
class JointLengths:
    """Pairs of a trace, drawn again: what belongs together stays so."""

    trace: Trace

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Lengths`."""
        rows = rng.integers(0, len(self.trace), count)
        return self.trace.prompt[rows], self.trace.output[rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipfLengths:
    """Both lengths Zipf distributed up to a most, each for itself."""

    exponent: float = ZIPF_EXPONENT
    most_prompt: int = MOST_TOKENS
    most_output: int = MOST_TOKENS

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Lengths`."""
        return self._one(rng, count, self.most_prompt), self._one(rng, count, self.most_output)

    def _one(self, rng: np.random.Generator, count: int, most: int) -> np.ndarray:
        sums = np.cumsum(np.arange(1, most + 1, dtype=float) ** -self.exponent)
        return np.searchsorted(sums, rng.random(count) * sums[-1]) + 1


def example_windows(count: int) -> list[Window]:
    """Windows of the example generator's defaults."""
    steps = [EXAMPLE_STEPS[0], *([EXAMPLE_STEPS[1]] * (count - 1))]
    return [
        Window(begin=WINDOW_SECONDS * i, seconds=WINDOW_SECONDS, count=LEAST_GAPS + 1, shape=shape, scale=scale,
               cv=shape**-0.5, gain=0.0, fano=0.0, peak=0.0)
        for i, (shape, scale) in enumerate(steps)
    ]  # fmt: skip


def draw_arrivals(steps: Sequence[Window], seed: int, scale: float = 1.0) -> np.ndarray:
    """Arrivals whose gaps follow each window's Gamma, `scale` times as many."""
    if not scale > 0:
        raise InputError(f"scale is {scale}; it must be above zero")
    rng, found = np.random.default_rng(seed), []
    for step in steps:
        if not step.count:
            continue
        expected = step.seconds * scale / (step.shape * step.scale)
        at, ends = np.zeros(0), rng.random() * rng.gamma(step.shape, step.scale / scale)  # the first comes amid a gap
        while ends < step.seconds:
            gaps = rng.gamma(step.shape, step.scale / scale, int(expected * 1.2) + 16)
            at = np.append(at, ends + np.concatenate([[0.0], np.cumsum(gaps)[:-1]]))
            ends = float(at[-1] + gaps[-1])
        found.append(step.begin + at[at < step.seconds])
    return np.concatenate(found) if found else np.zeros(0)


def generate(steps: Sequence[Window], lengths: Lengths, seed: int, scale: float = 1.0) -> Trace:
    """A trace of the same kind as the one that the windows and lengths were taken from."""
    at = draw_arrivals(steps, seed, scale)
    prompt, output = lengths.draw(np.random.default_rng((seed, 1)), len(at))
    return make_trace(at, prompt, output, f"generate({len(steps)} windows, scale={scale:g}, seed={seed})")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversations:
    """How sessions go on: turns of each, and seconds from an answer's time to the next question; both drawn again from
    what was seen.
    """

    turns: np.ndarray
    think_seconds: np.ndarray

    @staticmethod
    def of(trace: Trace) -> Conversations:
        """From a trace with sessions. InputError where it has none of two turns."""
        sessions = trace.sessions()
        intervals = [np.diff(trace.at[rows]) for rows in sessions.values() if len(rows) > 1]
        if not intervals:
            raise InputError("the trace has no session of two turns; conversations cannot be taken from it")
        return Conversations(
            turns=np.array([len(rows) for rows in sessions.values()]), think_seconds=np.concatenate(intervals)
        )

    def unfold(self, starts: Trace, seed: int, most_tokens: int) -> Trace:
        """Every request begins a session; a later turn's prompt is all that was said before, and a new text as long as
        the first. Sessions end where `most_tokens` would be passed.
        """
        rng = np.random.default_rng(seed)
        counts = rng.choice(self.turns, len(starts))
        at, prompt, output, session = [], [], [], []
        for number in range(len(starts)):
            moment, history = float(starts.at[number]), 0
            new, answer = int(starts.prompt[number]), int(starts.output[number])
            for turn in range(int(counts[number])):
                if turn and history + new + answer > most_tokens:
                    break
                at.append(moment)
                prompt.append(history + new)
                output.append(answer)
                session.append(number)
                history += new + answer
                moment += float(rng.choice(self.think_seconds))
        order = np.argsort(at, kind="stable")
        ids = np.array(session, np.int64)[order]
        return make_trace(
            np.array(at)[order], np.array(prompt)[order], np.array(output)[order],
            "; ".join((*starts.provenance, f"unfold(seed={seed})")), session=ids, turn=turns(ids),
        )  # fmt: skip


def poisson_like(trace: Trace, seed: int, *, lengths: str) -> Trace:
    """The plain load that bursts are compared with: Poisson arrivals of the same mean rate, with the trace's lengths
    (`trace`) or their means (`fixed`).
    """
    if lengths not in ("trace", "fixed"):
        raise InputError(f"lengths is {lengths!r}; it is trace or fixed")
    rng = np.random.default_rng(seed)
    at = trace.at[0] + np.sort(rng.random(len(trace))) * trace.seconds
    if lengths == "trace":
        prompt, output = trace.prompt, trace.output
    else:
        prompt = np.full(len(trace), max(round(float(trace.prompt.mean())), 1))
        output = np.full(len(trace), max(round(float(trace.output.mean())), 1))
    return make_trace(at, prompt, output, "; ".join((*trace.provenance, f"poisson({lengths} lengths, seed={seed})")))


def has_sessions(trace: Trace) -> bool:
    """Whether any request belongs to a conversation."""
    return bool(np.any(trace.session != NONE))
