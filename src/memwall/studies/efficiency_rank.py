"""Ranks of techniques within their group, out of records alone.

*Source*: EfficientLLM (2025), arXiv 2505.13840: ranks per group and metric, 1 best.
*Idea*: runs of a technique that differ by their seed alone are one row, with a mean and its error. Each metric ranks
the rows of a group; raw values stay beside the ranks. A weighted score puts a metric's best row at 1 and its worst at
0; the front is the rows that no other row of the group equals or beats in all weighed metrics.
*Units and shapes*: as `efficiency_records`.
*Differs from the paper*: which has ranks only. Held-out loss stands beside the six metrics as a seventh, `quality`.
*Holds when*: the rows of a group ran on one machine, equally long; `remarks` of the report say where they did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.studies.efficiency_records import Record
from memwall.studies.efficiency_sizes import BASELINES
from memwall.studies.ptq_statistics import Estimate, estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """value: of a record, None where it does not apply. smaller: whether less is better."""

    name: str
    label: str
    smaller: bool
    value: Callable[[Record], float | None]


def _throughput(record: Record) -> float | None:
    metrics = record.metrics
    return next((value for value in (metrics.tt, metrics.st, metrics.it) if value is not None), None)


METRICS = (
    Metric(name="quality", label="held-out loss, nats per token", smaller=True, value=lambda record: record.loss),
    Metric(name="amu", label="mean resident bytes", smaller=True, value=lambda record: record.metrics.amu_bytes),
    Metric(name="pcu", label="mean use of the processors", smaller=False, value=lambda record: record.metrics.pcu),
    Metric(name="al", label="mean seconds of a step", smaller=True, value=lambda record: record.metrics.al_s),
    Metric(name="throughput", label="TT, ST or IT", smaller=False, value=_throughput),
    Metric(name="aec", label="mean power, watts", smaller=True, value=lambda record: record.metrics.aec_w),
    Metric(name="mcr", label="compression times quality", smaller=False, value=lambda record: record.metrics.mcr),
)
BY_NAME = {metric.name: metric for metric in METRICS}
DEFAULT_WEIGHTS = {"quality": 1.0, "amu": 1.0, "al": 1.0}
"""Quality, memory, latency: throughput is latency again, power alone rewards what is slow, and PCU is no goal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A technique in its group and stage. gap: its loss less the baseline's, windows and seeds paired."""

    axis: str
    group: str
    stage: str
    technique: str
    records: tuple[Record, ...]
    values: dict[str, float]
    errors: dict[str, float | None]
    ranks: dict[str, int]
    gap: Estimate | None
    score: float | None
    front: bool

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is ranked with."""
        return self.axis, self.group, self.stage

    def figure(self, name: str) -> float | None:
        """Mean of a measured number over the runs; None where one lacks it."""
        found = [record.figures.get(name) for record in self.records]
        numbers = [value for value in found if isinstance(value, int | float)]
        return sum(numbers) / len(numbers) if len(numbers) == len(found) else None


def parse_weights(text: str) -> dict[str, float]:
    """`quality=2,amu=1` as weights; InputError for unknown metrics and for what is no weight."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in BY_NAME:
            raise InputError(
                f"--score {text!r}: {name!r} is none of {', '.join(BY_NAME)}; give such as quality=2,amu=1"
            )
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] < math.inf:
            raise InputError(f"--score {text!r}: the weight of {name} must be a number from 0")
    if not any(found.values()):
        raise InputError(f"--score {text!r}: some weight must be above 0")
    return found


def ranked(records: Sequence[Record], weights: Mapping[str, float] | None = None) -> list[Row]:
    """A row a technique, groups one after the other in the records' order, rows in the order of their first record."""
    weights = DEFAULT_WEIGHTS if weights is None else weights
    groups: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in records:
        key = record.axis, record.group, record.stage
        groups.setdefault(key, {}).setdefault(record.technique, []).append(record)
    return [row for key, runs in groups.items() for row in _group(key, runs, weights)]


def _group(key: tuple[str, str, str], runs: dict[str, list[Record]], weights: Mapping[str, float]) -> list[Row]:
    values: dict[str, dict[str, float]] = {name: {} for name in runs}
    errors: dict[str, dict[str, float | None]] = {name: {} for name in runs}
    for name, records in runs.items():
        for metric in METRICS:
            found = [metric.value(record) for record in records]
            numbers = [value for value in found if value is not None]
            if len(numbers) == len(records):
                one = estimate(np.array([numbers]))
                assert one is not None
                values[name][metric.name], errors[name][metric.name] = one.mean, one.error
    shared = [metric for metric in METRICS if all(metric.name in held for held in values.values())]
    ranks = {
        metric.name: _ranks({name: values[name][metric.name] for name in runs}, metric.smaller) for metric in shared
    }
    weighed = [metric for metric in shared if weights.get(metric.name)]
    points = {name: _points(weighed, values, name) for name in runs}
    base = runs.get(BASELINES.get(key[0], ""))
    return [
        Row(
            axis=key[0],
            group=key[1],
            stage=key[2],
            technique=name,
            records=tuple(records),
            values=values[name],
            errors=errors[name],
            ranks={metric: held[name] for metric, held in ranks.items()},
            gap=None if base is None or records is base else gap(records, base),
            score=_score(points[name], weights),
            front=not any(_beats(points[other], points[name]) for other in runs if other != name),
        )
        for name, records in runs.items()
    ]


def _ranks(values: Mapping[str, float], smaller: bool) -> dict[str, int]:
    """1 is best; equal values share the better rank, and the next one is left out."""
    sign = 1 if smaller else -1
    return {name: 1 + sum(sign * other < sign * value for other in values.values()) for name, value in values.items()}


def _points(weighed: Sequence[Metric], values: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float]:
    """A row's metrics between the group's worst, 0, and best, 1; where all are equal, 1."""
    found = {}
    for metric in weighed:
        column = [held[metric.name] for held in values.values()]
        low, high = min(column), max(column)
        place = 1.0 if high == low else (values[name][metric.name] - low) / (high - low)
        found[metric.name] = place if high == low or not metric.smaller else 1 - place
    return found


def _score(points: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    whole = sum(weights[name] for name in points)
    return sum(weights[name] * place for name, place in points.items()) / whole if whole else None


def _beats(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """At least as good in all, better in some."""
    return all(one[name] >= other[name] for name in one) and any(one[name] > other[name] for name in one)


def gap(records: Sequence[Record], base: Sequence[Record]) -> Estimate | None:
    """Mean difference of losses over windows and seeds that both have; None without losses."""
    mine = {record.seed: record.quality.get("losses", []) for record in records}
    theirs = {record.seed: record.quality.get("losses", []) for record in base}
    columns = [
        np.array(mine[seed]) - np.array(theirs[seed])
        for seed in sorted(mine.keys() & theirs.keys())
        if mine[seed] and len(mine[seed]) == len(theirs[seed])
    ]
    if not columns or len({len(column) for column in columns}) != 1:
        return None
    return estimate(np.stack(columns, 1))
