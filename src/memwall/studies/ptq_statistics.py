"""Figures of the format study with their errors: measures of texts, differences under the same draws, sensitivities.

Every measure is a table [prompts, seeds], one number a text. A mean's standard error is the larger of two: that of the
means of the seeds, and that of the means of the prompts. (At low temperature all seeds give the same text, and seeds
alone would then claim certainty.) Intervals are Student's, at 95 %. Formats see the same prompts and random numbers, so
a difference between two is taken text by text, which leaves out what prompts and seeds do to both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# two-sided 95 % quantiles of Student's t by degrees of freedom; past the table the normal's, a little widened
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_STUDENT_BEYOND = 2.04
SIGNIFICANT = 2.0
"""Standard errors past which a difference counts."""
WINDOWS: dict[str, Callable[[float], bool]] = {
    "[0.1, 0.5)": lambda t: 0.1 <= t < 0.5,
    "[0.5, 0.8]": lambda t: 0.5 <= t <= 0.8,
    "(0.8, 1.0]": lambda t: 0.8 < t <= 1.0,
}
"""Ranges of temperature in which sensitivities are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean, its standard error and 95 % interval; the last three are None where one prompt or seed alone was run."""

    mean: float
    error: float | None
    low: float | None
    high: float | None

    @property
    def above(self) -> bool:
        """Whether it is above zero by more than two standard errors."""
        return self.error is not None and self.mean > SIGNIFICANT * self.error

    @property
    def below(self) -> bool:
        """Whether it is below zero by more than two standard errors."""
        return self.error is not None and self.mean < -SIGNIFICANT * self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What one format made at one setting: tokens and their losses under the reference, prompt by prompt, seed by seed.

    kl, agreement: [prompts * seeds] along bfloat16's own texts; empty where that was not run.
    """

    format: str
    temperature: float
    top_k: int
    num_tokens: int
    seeds: int
    tokens: list[list[int]]
    losses: list[list[float]]
    kl: list[float | None]
    agreement: list[float | None]

    def table(self, values: Sequence[float | None]) -> np.ndarray:
        """[prompts, seeds]; nan for a text that says nothing of a measure."""
        return np.array([np.nan if value is None else value for value in values], np.float64).reshape(-1, self.seeds)

    def cut(self, num_tokens: int) -> Texts:
        """The same run stopped after so many new tokens: draws are given by the step, so it would have made these."""
        return Texts(
            format=self.format, temperature=self.temperature, top_k=self.top_k, num_tokens=num_tokens,
            seeds=self.seeds, tokens=[each[:num_tokens] for each in self.tokens],
            losses=[each[:num_tokens] for each in self.losses], kl=[], agreement=[],
        )  # fmt: skip


def estimate(table: np.ndarray) -> Estimate | None:
    """Mean of a table [prompts, seeds] with its error; None where all of it is missing."""
    table = table[~np.isnan(table).all(axis=1)]
    if not table.size:
        return None
    table = table[:, ~np.isnan(table).all(axis=0)]
    mean = float(np.nanmean(table))
    found: list[tuple[float, int]] = []
    for axis in (0, 1):
        means = np.nanmean(table, axis=axis)
        if len(means) > 1:
            found.append((float(means.std(ddof=1)) / math.sqrt(len(means)), len(means) - 1))
    if not found:
        return Estimate(mean=mean, error=None, low=None, high=None)
    error, freedom = max(found, key=lambda one: one[0] * student(one[1]))
    half = error * student(freedom)
    return Estimate(mean=mean, error=error, low=mean - half, high=mean + half)


def student(freedom: int) -> float:
    """Quantile of Student's t for a two-sided 95 % interval."""
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _STUDENT_BEYOND


def repeated(tokens: Sequence[int], size: int = 4) -> float | None:
    """Share of a text's n-grams that stood in it before."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(tokens: Sequence[int], size: int) -> float | None:
    """Different n-grams over all."""
    found = repeated(tokens, size)
    return None if found is None else 1 - found


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Position of the first token that differs; the shorter length where one begins the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def measures(texts: Texts, base: Texts) -> dict[str, np.ndarray]:
    """All measures of texts, name -> [prompts, seeds]. base: bfloat16's texts at the same setting."""
    pairs = list(zip(texts.tokens, base.tokens, strict=True))
    found: dict[str, Sequence[float | None]] = {
        "loss": [sum(each) / len(each) if each else None for each in texts.losses],
        "repeated_4grams": [repeated(each) for each in texts.tokens],
        "distinct_1": [distinct(each, 1) for each in texts.tokens],
        "distinct_2": [distinct(each, 2) for each in texts.tokens],
        "length": [len(each) for each in texts.tokens],
        "first_difference": [first_difference(one, other) for one, other in pairs],
        "same_text": [float(one == other) for one, other in pairs],
    }
    if texts.kl:
        found |= {"kl": texts.kl, "top1_agreement": texts.agreement}
    return {name: texts.table(values) for name, values in found.items()}


def slopes(tables: Mapping[float, np.ndarray]) -> np.ndarray | None:
    """Least-squares slope over temperature of each text's measure; None below two temperatures."""
    if len(tables) < 2:
        return None
    temperatures = np.array(sorted(tables))
    centred = temperatures - temperatures.mean()
    stacked = np.stack([tables[t] for t in temperatures])
    slope: np.ndarray = np.tensordot(centred, stacked, 1) / (centred @ centred)
    return slope


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How a format's loss moves with temperature in a window: slope in nats per unit of temperature, range of the means
    in nats, the slope's excess over bfloat16's, and whether that is past two standard errors.
    """

    format: str
    window: str
    slope: Estimate
    range: float
    excess: Estimate
    flagged: bool


def sensitivities(curves: Mapping[str, Mapping[float, np.ndarray]], base: str) -> list[Sensitivity]:
    """curves: format -> temperature -> losses [prompts, seeds]; base: the format that others are held against."""
    found = []
    for window, holds in WINDOWS.items():
        inside = {form: {t: one for t, one in tables.items() if holds(t)} for form, tables in curves.items()}
        plain = slopes(inside[base])
        for form, tables in inside.items():
            mine = slopes(tables)
            if mine is None or plain is None or set(tables) != set(inside[base]):
                continue
            slope, excess = estimate(mine), estimate(mine - plain)
            if slope is None or excess is None:
                continue
            means = [float(np.nanmean(one)) for one in tables.values()]
            found.append(
                Sensitivity(
                    format=form,
                    window=window,
                    slope=slope,
                    range=max(means) - min(means),
                    excess=excess,
                    flagged=form != base and excess.above,
                )
            )
    return found
