"""What a format study says: its cells with intervals, answers to the paper's questions, and which format to take.

An answer holds, does not hold, or is not shown: where a difference is within two standard errors, nothing is claimed,
neither that there is one nor that there is none (that takes an interval that lies within bounds).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memwall.hardware.units import format_bytes
from memwall.studies.ptq_impact_study import TEMPERATURE, TOP_K, Row, Study, described_grid
from memwall.studies.ptq_models import BASE, FOUR_BIT
from memwall.studies.ptq_statistics import (
    WINDOWS,
    Estimate,
    Sensitivity,
    Texts,
    estimate,
    measures,
    sensitivities,
    slopes,
)

HOLDS, FAILS, NOT_SHOWN = "holds", "does not hold", "not shown"
NOTHING_LOST = 0.005
"""Relative change of perplexity that double quantization may make."""
EQUAL_NATS = 0.05
"""Losses whose difference is surely below this, 5 % of perplexity, are called equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question of the study. verdict: holds, does not hold, not shown; figures: what that rests on."""

    question: str
    verdict: str
    figures: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The format to take for temperatures in a window within a number of bytes, and why; None where none fits."""

    window: str
    memory_bytes: int
    format: str | None
    reason: str


def curves(study: Study, measure: str) -> dict[str, dict[float, np.ndarray]]:
    """format -> temperature -> [prompts, seeds] of a measure, at the fixed top-k, in texts of equal length."""
    found: dict[str, dict[float, np.ndarray]] = {}
    for row in study.own:
        for (temperature, top_k), texts in sorted(row.texts.items()):
            tables = tables_of(study, texts, study.grid.tokens)
            if top_k == TOP_K and temperature in study.grid.temperatures and measure in tables:
                found.setdefault(row.format, {})[temperature] = tables[measure]
    return found


def tables_of(study: Study, texts: Texts, num_tokens: int) -> dict[str, np.ndarray]:
    """All measures of texts cut after so many tokens."""
    base = study.base.texts[texts.temperature, texts.top_k]
    cut = measures(texts.cut(num_tokens), base.cut(num_tokens))
    whole = measures(texts, base)
    return cut | {name: whole[name] for name in ("kl", "top1_agreement") if name in whole}


def sensitivity_of(study: Study) -> list[Sensitivity]:
    """Slopes of the loss over temperature, per format and window."""
    return sensitivities(curves(study, "loss"), BASE)


def heldout(row: Row) -> Estimate | None:
    """Mean loss over held-out windows, in nats."""
    return estimate(np.array(row.heldout)[:, None]) if row.heldout else None


def heldout_gap(row: Row, other: Row) -> Estimate | None:
    """Mean difference of held-out losses, window by window: about the relative change of perplexity."""
    return estimate((np.array(row.heldout) - np.array(other.heldout))[:, None]) if row.heldout else None


def cells(study: Study) -> Iterator[dict[str, Any]]:
    """Every cell as JSON shows it: a measure's mean, interval and means by seed, and its difference to bfloat16."""
    for row in study.own:
        for (temperature, top_k), texts in sorted(row.texts.items()):
            base = study.base.texts[temperature, top_k]
            lengths = {study.grid.tokens, *study.grid.lengths} if texts.num_tokens > study.grid.tokens else {
                texts.num_tokens}  # fmt: skip
            for length in sorted(lengths):
                plain = tables_of(study, base, length)
                found = {}
                for name, table in tables_of(study, texts, length).items():
                    found[name] = _told(table, None if row.format == BASE else plain.get(name))
                yield {"format": row.format, "temperature": temperature, "top_k": top_k, "max_new_tokens": length,
                       "measures": found}  # fmt: skip


def _told(table: np.ndarray, plain: np.ndarray | None) -> dict[str, Any] | None:
    mine = estimate(table)
    if mine is None:
        return None
    seeds = [None if np.isnan(column).all() else float(np.nanmean(column)) for column in table.T]
    apart = None if plain is None else estimate(table - plain)
    return {**asdict(mine), "by_seed": seeds, "difference": apart and asdict(apart)}


def to_dict(study: Study) -> dict[str, Any]:
    """The JSON object, version first. Losses are nats per token; perplexity is their exponential."""
    rows = []
    for row in study.rows:
        loss, gap = heldout(row), None if row.format == BASE else heldout_gap(row, study.base)
        perplexity = None if loss is None else math.exp(loss.mean)
        rows.append({
            "format": row.format, "library": row.library, "skipped": row.skipped, "heldout_perplexity": perplexity,
            "heldout_loss": loss and asdict(loss), "heldout_gap": gap and asdict(gap), **row.costs,
        })  # fmt: skip
    return {
        "version": study.version, "model": study.model, "fingerprint": study.fingerprint, "machine": study.machine,
        "seconds": study.seconds, "grid": described_grid(study), "formats": rows, "cells": list(cells(study)),
        "sensitivities": [asdict(one) for one in sensitivity_of(study)],
        "answers": [asdict(one) for one in answers(study)], "advice": [asdict(one) for one in advice(study)],
    }  # fmt: skip


# -- the paper's questions ---------------------------------------------------------------------------------------------


def answers(study: Study) -> list[Answer]:
    """The questions that the formats at hand can answer."""
    rows = {row.format: row for row in study.own}
    found = []
    if {"nf4", "fp4"} <= set(rows):
        found += [_equally_good(study, rows), _resilient(study)]
    if set(FOUR_BIT) & set(rows):
        found.append(_more_sensitive(study))
    if any(row.format.endswith("-dq") for row in study.own):
        found.append(_double(rows))
    if all(row.costs for row in study.own) and len(rows) > 1:
        found += _speed(rows)
    return [one for one in found if one is not None]


def _shown(one: Estimate, form: str = "+.4f") -> str:
    return format(one.mean, form) if one.error is None else f"{one.mean:{form}} ± {one.error:.4f}"


def _equally_good(study: Study, rows: dict[str, Row]) -> Answer | None:
    losses = curves(study, "loss")
    both = [losses["nf4"][t] - losses["fp4"][t] for t in losses["nf4"]]
    apart, gap = estimate(np.mean(both, axis=0)), heldout_gap(rows["fp4"], rows["nf4"])
    if apart is None or gap is None:
        return None
    equal = apart.low is not None and apart.high is not None and max(-apart.low, apart.high) < EQUAL_NATS
    return Answer(
        question="nf4 and fp4 write equally good text",
        verdict=HOLDS if equal else FAILS if apart.above or apart.below else NOT_SHOWN,
        figures=f"loss of texts, nf4 - fp4 over all temperatures: {_shown(apart)} nats; held-out loss, fp4 - nf4: "
        f"{_shown(gap)} nats",
    )


def _resilient(study: Study) -> Answer | None:
    window, losses = "[0.1, 0.5)", curves(study, "loss")
    inside = [{t: x for t, x in losses[form].items() if WINDOWS[window](t)} for form in ("nf4", "fp4")]
    first, second = slopes(inside[0]), slopes(inside[1])
    apart = None if first is None or second is None else estimate(first - second)
    if apart is None:
        return None
    return Answer(
        question="at low temperature nf4 reacts less to it than fp4",
        verdict=HOLDS if apart.below else FAILS if apart.above else NOT_SHOWN,
        figures=f"slope of the loss in {window}, nf4 - fp4: {_shown(apart, '+.3f')} nats per unit of temperature",
    )


def _more_sensitive(study: Study) -> Answer | None:
    found = [s for s in sensitivity_of(study) if s.window == "[0.5, 0.8]" and s.format in FOUR_BIT]
    if not found:
        return None
    flagged, less = sum(one.flagged for one in found), sum(one.excess.below for one in found)
    verdict = HOLDS if flagged == len(found) else FAILS if less == len(found) else NOT_SHOWN
    return Answer(
        question="4-bit formats are more sensitive to temperature in 0.5 to 0.8 than bfloat16",
        verdict=verdict,
        figures="slope over bfloat16's: " + ", ".join(f"{s.format} {_shown(s.excess, '+.3f')}" for s in found)
        + f" nats per unit; {flagged} of {len(found)} past two standard errors",
    )  # fmt: skip


def _double(rows: dict[str, Row]) -> Answer | None:
    pairs = [(rows[f"{form}-dq"], rows[form]) for form in ("nf4", "fp4") if {form, f"{form}-dq"} <= set(rows)]
    gaps = {one.format: gap for one, other in pairs if (gap := heldout_gap(one, other)) is not None}
    if not gaps:
        return None
    changes = {form: math.expm1(gap.mean) for form, gap in gaps.items()}
    return Answer(
        question="double quantization changes perplexity by less than 0.5 %",
        verdict=HOLDS if all(abs(change) < NOTHING_LOST for change in changes.values()) else FAILS,
        figures=", ".join(f"{form} {change:+.3%}" for form, change in changes.items()),
    )


def _speed(rows: dict[str, Row]) -> Iterator[Answer]:
    rates = {form: row.costs["decode_tokens_per_s"] for form, row in rows.items()}
    order = sorted(rates, key=lambda form: -rates[form])
    told = ", ".join(f"{form} {rates[form]:.0f}" for form in order) + " tokens per second"
    if "int8" in rates:
        yield Answer(question="int8 with outliers is the slowest", figures=told,
                     verdict=HOLDS if order[-1] == "int8" else FAILS)  # fmt: skip
    yield Answer(question="bfloat16 is the fastest", figures=told, verdict=HOLDS if order[0] == BASE else FAILS)


# -- which format ------------------------------------------------------------------------------------------------------


def advice(study: Study, memory_bytes: int | None = None) -> list[Advice]:
    """For every window of temperatures: the format that strays least from bfloat16 among those that fit, and of those
    that stray no more (within two standard errors) the fastest. Limits are the formats' own bytes unless one is given.
    """
    if not all(row.costs for row in study.own):
        return []
    sizes = sorted({row.costs["ledger_bytes"] for row in study.own})
    limits = [memory_bytes] if memory_bytes is not None else sizes
    flagged = {(one.window, one.format) for one in sensitivity_of(study) if one.flagged}
    kl = curves(study, "kl")
    return [
        _advised(study, window, limit, {f: _inside(tables, window) for f, tables in kl.items()}, flagged)
        for window in WINDOWS
        for limit in limits
        if all(_inside(tables, window) is not None for tables in kl.values())
    ]


def _inside(tables: dict[float, np.ndarray], window: str) -> np.ndarray | None:
    chosen = [table for temperature, table in tables.items() if WINDOWS[window](temperature)]
    return np.mean(chosen, axis=0) if chosen else None


def _advised(study: Study, window: str, limit: int, strays: dict[str, Any], flagged: set[tuple[str, str]]) -> Advice:
    fits = [row for row in study.own if row.costs["ledger_bytes"] <= limit and row.format in strays]
    if not fits:
        least = min(study.own, key=lambda row: int(row.costs["ledger_bytes"]))
        reason = f"none fits; the smallest is {least.format} with {format_bytes(least.costs['ledger_bytes'])}"
        return Advice(window=window, memory_bytes=limit, format=None, reason=reason)
    means = {row.format: float(np.nanmean(strays[row.format])) for row in fits}
    best = min(means, key=lambda form: means[form])
    even = []
    for row in fits:
        apart = estimate(strays[row.format] - strays[best])
        if row.format == best or (apart is not None and apart.error is not None and not apart.above):
            even.append(row)
    calm = [row for row in even if (window, row.format) not in flagged] or even
    taken = max(calm, key=lambda row: float(row.costs["decode_tokens_per_s"]))
    others = [row.format for row in even if row is not taken]
    reason = (
        f"{means[taken.format]:.4f} nats from bfloat16, {taken.costs['decode_tokens_per_s']:.0f} tokens per second, "
        f"{format_bytes(taken.costs['ledger_bytes'])}"
    )
    if others:
        reason += f"; as close within two standard errors, and slower or more sensitive: {', '.join(others)}"
    return Advice(window=window, memory_bytes=limit, format=taken.format, reason=reason)


def at_default(study: Study, row: Row) -> dict[str, np.ndarray]:
    """A format's measures where the others' settings stand."""
    texts = row.texts.get((TEMPERATURE, TOP_K))
    return {} if texts is None else tables_of(study, texts, study.grid.tokens)
