"""Traces of requests as columns, read from published files, and pure operations on them that say where they come from.

Read are BurstGPT's CSV (with and without the columns of release 1.2), Azure's CSV and Mooncake's JSON lines. Rows are
streamed into columns of 8 bytes or less a value, so that millions of them take seconds and tens of megabytes.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memwall.engine.arrivals import MOST_LINE_CHARACTERS, OUTPUT_NAMES, PROMPT_NAMES, Load
from memwall.engine.arrivals import seconds_of as _seconds
from memwall.errors import InputError

DAY_SECONDS = 86_400.0
NONE = -1
"""Session of a request that belongs to none."""
LEAST_MOMENTS = 16
"""Fewer different times do not tell whether they were recorded at fixed moments."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trace:
    """Requests in the order of their arrival; all columns [n].

    at: float64 seconds; prompt, output: int64 tokens (output 0: it failed); elapsed: float64 seconds to the whole
    answer, nan where nobody knows; session: int64, turn: its place in the session from 0; model, kind: int64 places in
    `models` and `kinds`. provenance: file, then what was done, in order.
    """

    at: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    elapsed: np.ndarray
    session: np.ndarray
    turn: np.ndarray
    model: np.ndarray
    kind: np.ndarray
    models: tuple[str, ...] = ("",)
    kinds: tuple[str, ...] = ("",)
    provenance: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.at)

    @property
    def failed(self) -> np.ndarray:
        """Which ones have no answer."""
        return self.output == 0

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return float(self.at[-1] - self.at[0]) if len(self) else 0.0

    def gaps(self) -> np.ndarray:
        """Seconds between arrivals [n - 1]."""
        return np.diff(self.at)

    def keep(self, mask: np.ndarray, what: str) -> Trace:
        """The requests where `mask` is true."""
        columns = ("at", "prompt", "output", "elapsed", "session", "turn", "model", "kind")
        rows = {name: getattr(self, name)[mask] for name in columns}
        return replace(self, **rows, provenance=(*self.provenance, what))

    def days(self, first: float, last: float) -> Trace:
        """Those of days [first, last) from midnight of day 0."""
        inside = (self.at >= first * DAY_SECONDS) & (self.at < last * DAY_SECONDS)
        return self.keep(inside, f"days({first:g}, {last:g})")

    def between(self, first: float, last: float) -> Trace:
        """Those of seconds [first, last) after the first arrival."""
        since = self.at - (self.at[0] if len(self) else 0.0)
        return self.keep((since >= first) & (since < last), f"between({first:g}, {last:g})")

    def select(self, *, model: str | None = None, kind: str | None = None) -> Trace:
        """Those of one model, one kind of log, or both. InputError names those there are."""
        mask = np.ones(len(self), bool)
        for name, wanted, known, column in (
            ("model", model, self.models, self.model), ("kind", kind, self.kinds, self.kind)
        ):  # fmt: skip
            if wanted is not None:
                if wanted not in known:
                    raise InputError(f"no {name} {wanted!r} in the trace; there are {', '.join(known)}")
                mask &= column == known.index(wanted)
        return self.keep(mask, f"select(model={model}, kind={kind})")

    def answered(self) -> Trace:
        """Without those that failed."""
        return self.keep(~self.failed, "answered()")

    def scale_rate(self, factor: float) -> Trace:
        """Arrivals `factor` times as dense: seconds shrink, the shape of bursts stays."""
        _positive("factor", factor)
        first = self.at[0] if len(self) else 0.0
        return replace(
            self, at=first + (self.at - first) / factor, provenance=(*self.provenance, f"scale_rate({factor:g})")
        )

    def thin(self, share: float, seed: int) -> Trace:
        """Each kept with probability `share`, whatever the others do: bursts become milder, unlike in `scale_rate`."""
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; it must be above 0 and at most 1")
        mask = np.random.default_rng(seed).random(len(self)) < share
        return self.keep(mask, f"thin({share:g}, seed={seed})")

    @property
    def tick_seconds(self) -> float:
        """Seconds between the moments that times were recorded at, such as Mooncake's 3; 0 where requests have their
        own times. Requests of one moment are no burst: their times were rounded.
        """
        moments = np.unique(self.at)
        if len(moments) < LEAST_MOMENTS or len(moments) == len(self):
            return 0.0
        gaps = np.diff(moments)
        step = float(np.median(gaps[gaps < 1.5 * gaps.min()]))
        steps = np.maximum(np.round(gaps / step), 1)
        return step if np.all(np.abs(gaps - steps * step) < 0.05 * step) else 0.0

    def spread(self, seed: int) -> Trace:
        """Requests that were recorded at one moment at times drawn from the tick that it stands for, in their order."""
        tick = self.tick_seconds
        drawn = np.random.default_rng(seed).random(len(self)) * tick
        at = np.maximum.accumulate(self.at + drawn[np.lexsort((drawn, self.at))])
        return replace(self, at=at, provenance=(*self.provenance, f"spread({tick:g} s, seed={seed})"))

    def trim_gaps(self, most_seconds: float) -> Trace:
        """Idle stretches of more than so many seconds shortened to that; what comes later moves up."""
        _positive("most_seconds", most_seconds)
        first = self.at[:1]
        at = np.concatenate([first, first + np.cumsum(np.minimum(self.gaps(), most_seconds))]) if len(self) else self.at
        return replace(self, at=at, provenance=(*self.provenance, f"trim_gaps({most_seconds:g})"))

    def clip_lengths(self, prompt: int, output: int) -> Trace:
        """Lengths of at most so many tokens."""
        _positive("prompt", prompt)
        _positive("output", output)
        return replace(
            self,
            prompt=np.minimum(self.prompt, prompt),
            output=np.minimum(self.output, output),
            provenance=(*self.provenance, f"clip_lengths({prompt}, {output})"),
        )

    def shift(self, seconds: float) -> Trace:
        """So much later."""
        return replace(self, at=self.at + seconds, provenance=(*self.provenance, f"shift({seconds:g})"))

    def sessions(self) -> dict[int, np.ndarray]:
        """Rows of each session, in order."""
        rows = np.flatnonzero(self.session != NONE)
        order = rows[np.argsort(self.session[rows], kind="stable")]
        names, starts = np.unique(self.session[order], return_index=True)
        return dict(zip(names.tolist(), np.split(order, starts[1:]))) if len(order) else {}

    def loads(self) -> list[Load]:
        """What the client of a benchmark sends: times from the first arrival, without those that failed."""
        kept = self.answered()
        first = kept.at[0] if len(kept) else 0.0
        return [
            Load(at=float(at - first), prompt_tokens=int(prompt), output_tokens=int(output))
            for at, prompt, output in zip(kept.at, kept.prompt, kept.output)
            if prompt > 0
        ]


def make_trace(at: np.ndarray, prompt: np.ndarray, output: np.ndarray, provenance: str, **columns: Any) -> Trace:
    """A trace from what every request has; other columns as in `Trace`."""
    n = len(at)
    filled: dict[str, Any] = {
        "elapsed": np.full(n, np.nan), "session": np.full(n, NONE, np.int64), "turn": np.zeros(n, np.int64),
        "model": np.zeros(n, np.int64), "kind": np.zeros(n, np.int64), **columns,
    }  # fmt: skip
    at, prompt, output = np.asarray(at, float), np.asarray(prompt, np.int64), np.asarray(output, np.int64)
    return Trace(at=at, prompt=prompt, output=output, provenance=(provenance,), **filled)


def merge(traces: Sequence[Trace]) -> Trace:
    """All requests of several traces by their times; sessions stay apart."""
    models = tuple(dict.fromkeys(name for trace in traces for name in trace.models))
    kinds = tuple(dict.fromkeys(name for trace in traces for name in trace.kinds))
    sessions, most = [], 0
    for trace in traces:
        sessions.append(np.where(trace.session == NONE, NONE, trace.session + most))
        most = max(most, int(sessions[-1].max(initial=-1)) + 1)
    names = ("at", "prompt", "output", "elapsed", "turn")
    rows = {name: np.concatenate([getattr(trace, name) for trace in traces]) for name in names}
    rows["session"] = np.concatenate(sessions)
    rows["model"] = np.concatenate([_renamed(trace.model, trace.models, models) for trace in traces])
    rows["kind"] = np.concatenate([_renamed(trace.kind, trace.kinds, kinds) for trace in traces])
    order = np.argsort(rows["at"], kind="stable")
    told = " + ".join("; ".join(trace.provenance) for trace in traces)
    return Trace(**{name: column[order] for name, column in rows.items()}, models=models, kinds=kinds,
                 provenance=(f"merge({told})",))  # fmt: skip


def _renamed(column: np.ndarray, old: tuple[str, ...], new: tuple[str, ...]) -> np.ndarray:
    return np.array([new.index(name) for name in old], np.int64)[column]


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} is {value}; it must be above zero")


def write_columns(trace: Trace, path: Path) -> None:
    """A CSV file with BurstGPT's columns, through a temporary one beside it; a comment-free file that others read."""
    names = ("Timestamp", "Session ID", "Elapsed time", "Model", "Request tokens", "Response tokens", "Total tokens",
             "Log Type")  # fmt: skip
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(names)
        for i in range(len(trace)):
            session = "" if trace.session[i] == NONE else int(trace.session[i])
            elapsed = "" if np.isnan(trace.elapsed[i]) else f"{trace.elapsed[i]:.6g}"
            prompt, output = int(trace.prompt[i]), int(trace.output[i])
            rows.writerow(
                (f"{trace.at[i]:.6f}", session, elapsed, trace.models[trace.model[i]], prompt, output, prompt + output,
                 trace.kinds[trace.kind[i]])
            )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_columns(path: Path) -> Trace:
    """A trace of one of the known forms, with failures. InputError names the row that is wrong."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix in (".jsonl", ".json"):
                return _Reader(path).read(("timestamp", "input_length", "output_length"), _json_rows(path, file), 1e-3)
            rows = csv.reader(file)
            header = [name.strip().lower() for name in next(rows, [])]
            return _Reader(path).read(header, rows, 1.0)
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: not a trace: {error}") from None


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[list[Any]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if len(line) <= MOST_LINE_CHARACTERS else None
            yield [row["timestamp"], row["input_length"], row["output_length"]]  # type: ignore[index]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}: row {number} is no request") from None


class _Reader:
    """Rows into columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, dict[str, int]] = {"model": {}, "log type": {}, "session id": {}}

    def read(self, header: Sequence[str], rows: Iterator[Sequence[Any]], unit: float) -> Trace:
        places = {name: place for place, name in enumerate(header)}
        prompt, output = (self._place(places, names) for names in (PROMPT_NAMES, OUTPUT_NAMES))
        total, when, elapsed = places.get("total tokens"), places.get("timestamp"), places.get("elapsed time")
        if when is None:
            raise InputError(f"{self.path}: no column of times")
        at, long, made, took = array("d"), array("q"), array("q"), array("d")
        codes = {name: array("q") for name in self.names if name in places}
        for number, row in enumerate(rows, 1):
            try:
                moment = _seconds(row[when])
                tokens, answer = int(float(row[prompt])), int(float(row[output]))
                took.append(float(row[elapsed] or "nan") if elapsed is not None else float("nan"))
                sound = total is None or tokens + answer == int(float(row[total]))
            except (ValueError, IndexError, OverflowError):
                raise InputError(f"{self.path}: row {number} is no request: {str(list(row))[:80]}") from None
            if moment is None or tokens < 0 or answer < 0 or not sound:
                raise InputError(f"{self.path}: row {number}: a time, lengths from 0 on, and a total that is their sum")
            at.append(moment * unit)
            long.append(tokens)
            made.append(answer)
            for name, column in codes.items():
                column.append(self._code(name, str(row[places[name]]).strip()))
        return self._trace(at, long, made, took, codes)

    def _trace(
        self, at: array[float], long: array[int], made: array[int], took: array[float], codes: dict[str, array[int]]
    ) -> Trace:
        if not at:
            raise InputError(f"{self.path}: no requests in it")
        times = np.array(at)
        if np.any(np.diff(times) < 0):
            row = int(np.argmax(np.diff(times) < 0)) + 2
            raise InputError(f"{self.path}: row {row} comes before the one above it; sort the trace by time")
        found: dict[str, Any] = {"elapsed": np.array(took)}
        for name, column, names in (("model", "model", "models"), ("log type", "kind", "kinds")):
            if name in codes:
                found[column], found[names] = np.array(codes[name]), tuple(self.names[name])
        if "session id" in codes:
            found["session"] = np.array(codes["session id"])
            found["turn"] = turns(found["session"])
        return make_trace(times, np.array(long), np.array(made), self.path.name, **found)

    def _place(self, places: dict[str, int], names: Sequence[str]) -> int:
        found = next((places[name] for name in names if name in places), None)
        if found is None:
            raise InputError(f"{self.path}: no column of lengths; known are {', '.join(names)}")
        return found

    def _code(self, name: str, value: str) -> int:
        if name == "session id" and value in ("", "nan", "-"):
            return NONE
        known = self.names[name]
        return known.setdefault(value, len(known))


def turns(session: np.ndarray) -> np.ndarray:
    """Place of each request in its session, in the order they come."""
    order = np.argsort(session, kind="stable")
    _, starts, counts = np.unique(session[order], return_index=True, return_counts=True)
    places = np.empty(len(session), np.int64)
    places[order] = np.arange(len(session)) - np.repeat(starts, counts)
    places[session == NONE] = 0
    return places
