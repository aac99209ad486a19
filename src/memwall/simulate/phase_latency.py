"""How long a prefill batch and a decode step take (DistServe, section 3 and appendix): two small formulas, fitted.

    prefill   a + b * (sum of lengths) + c * (sum of squared lengths)
    decode    a + b * (sum of contexts) + c * (sequences), one set for small batches, one for large ones

All times in seconds. Fits are least squares on *relative* errors: every row is divided by its measured time, so that
short steps count as much as long ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from memwall.engine.saturation import saturating_tokens
from memwall.errors import InputError

Coefficients = tuple[float, float, float]

BATCH_STEP, MOST_BATCH_TOKENS = 32, 8192
LARGE_BATCH = 95
"""Sequences from which on a decode step is worked as a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseLatency:
    """One model on one tensor-parallel group. kv_tokens: keys and values that the group has room for beside its
    weights; decode_large None: one set for all batches.
    """

    prefill: Coefficients
    decode: Coefficients
    decode_large: Coefficients | None = None
    kv_tokens: int

    def prefill_seconds(self, lengths: Sequence[int]) -> float:
        """One batch of prompts."""
        a, b, c = self.prefill
        return a + b * sum(lengths) + c * sum(length * length for length in lengths)

    def decode_seconds(self, context_tokens: int, sequences: int) -> float:
        """One step: all contexts together, sequences in it."""
        large = self.decode_large is not None and sequences >= LARGE_BATCH
        a, b, c = self.decode_large if large and self.decode_large is not None else self.decode
        return a + b * context_tokens + c * sequences

    @property
    def saturating_tokens(self) -> int:
        """L_m: prompts of so many tokens together fill the group (see `engine.saturation`)."""
        counts = range(BATCH_STEP, MOST_BATCH_TOKENS + 1, BATCH_STEP)
        return saturating_tokens([(count, self.prefill_seconds([count])) for count in counts])


def fit_prefill(batches: Sequence[Sequence[int]], seconds: Sequence[float]) -> Coefficients:
    """Coefficients from measured batches (lengths of their prompts)."""
    return _fit([(1.0, sum(batch), sum(n * n for n in batch)) for batch in batches], seconds)


def fit_decode(steps: Sequence[tuple[int, int]], seconds: Sequence[float]) -> Coefficients:
    """Coefficients from measured steps: (all contexts together, sequences)."""
    return _fit([(1.0, context, count) for context, count in steps], seconds)


def _fit(rows: Sequence[tuple[float, float, float]], seconds: Sequence[float]) -> Coefficients:
    if len(rows) != len(seconds) or len(rows) < 3:
        raise InputError(f"{len(rows)} settings and {len(seconds)} times: a fit needs at least three of each")
    times = np.asarray(seconds, float)
    if not (times > 0).all():
        raise InputError("a measured time is not above zero")
    matrix = np.asarray(rows, float) / times[:, None]
    scale = np.abs(matrix).max(0)
    scale[scale == 0] = 1.0
    found = np.linalg.lstsq(matrix / scale, np.ones(len(times)), rcond=None)[0] / scale
    return float(found[0]), float(found[1]), float(found[2])


def relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> np.ndarray:
    """|predicted - measured| / measured."""
    there = np.asarray(measured, float)
    return np.abs(np.asarray(predicted, float) - there) / there


# -- queueing: prompts of one length, Poisson arrivals, one at a time -------------------------------------------------


def waiting_first_token(rate: float, seconds: float) -> float:
    """Mean time to the first token: service of `seconds`, `rate` arrivals a second (M/D/1)."""
    _check(rate * seconds)
    return seconds + rate * seconds**2 / (2 * (1 - rate * seconds))


def tensor_first_token(rate: float, seconds: float, speedup: float) -> float:
    """The same with two devices side by side on each layer, which make a prompt `speedup` times as fast (1 to 2)."""
    _check(rate * seconds / speedup)
    return seconds / speedup + rate * seconds**2 / (2 * speedup * (speedup - rate * seconds))


def pipeline_first_token(rate: float, seconds: float) -> float:
    """The same with two devices one after the other, half the layers each."""
    _check(rate * seconds / 2)
    return seconds + rate * seconds**2 / (4 * (2 - rate * seconds))


def _check(load: float) -> None:
    if not 0 <= load < 1:
        raise InputError(f"arrivals ask for {load:.2f} times what can be done; the queue would grow without end")


def _milliseconds(*values: float) -> Coefficients:
    a, b, c = values
    return a / 1e3, b / 1e3, c / 1e3


# The paper's measured coefficients on A100-80G, by tensor-parallel degree. Of OPT-13B on two and four devices, and of
# OPT-66B, one set of decode is given; it serves all batches.
OPT_13B: Mapping[int, PhaseLatency] = MappingProxyType(
    {
        1: PhaseLatency(
            prefill=_milliseconds(18.10, 0.1019, 7.12e-6),
            decode=_milliseconds(19.93, 6.27e-4, 0.0385),
            decode_large=_milliseconds(7.17, 5.80e-4, 0.158),
            kv_tokens=66_144,
        ),
        2: PhaseLatency(
            prefill=_milliseconds(14.74, 0.0686, 2.45e-6),
            decode=_milliseconds(13.29, 3.41e-4, 0.0630),
            kv_tokens=163_008,
        ),
        4: PhaseLatency(
            prefill=_milliseconds(12.06, 0.0381, 5.23e-7),
            decode=_milliseconds(10.26, 1.88e-4, 0.0327),
            kv_tokens=356_736,
        ),
    }
)
OPT_66B: Mapping[int, PhaseLatency] = MappingProxyType(
    {
        4: PhaseLatency(
            prefill=_milliseconds(29.44, 0.1514, 8.32e-6),
            decode=_milliseconds(30.76, 4.52e-4, 0.0633),
            kv_tokens=78_496,
        ),
    }
)
