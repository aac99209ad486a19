"""Load for tests of a server: when requests come and how long they are, drawn or read from published traces.

Times are seconds from the start, lengths are tokens. Everything is drawn from one seed.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from memwall.errors import InputError

MOST_LINE_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One request to come. at: None where a trace tells no times. session: the conversation it is a turn of; its prompt
    then begins with what was said before. think_seconds: from the answer before it, at least.
    """

    at: float | None
    prompt_tokens: int
    output_tokens: int
    session: str | None = None
    think_seconds: float = 0.0


def gamma_gaps(rate_per_s: float, cv: float, count: int, seed: int) -> list[float]:
    """Times of `count` arrivals whose gaps are Gamma distributed: shape 1 / cv^2; cv 1 is Poisson, above it bursty."""
    if not rate_per_s > 0 or not cv > 0:
        raise InputError(f"{rate_per_s} requests a second with a variation of {cv}: both must be above zero")
    draw, shape, at, times = random.Random(seed), 1 / cv**2, 0.0, []
    for _ in range(count):
        at += draw.gammavariate(shape, 1 / (rate_per_s * shape))
        times.append(at)
    return times


def drawn_lengths(prompt: int, output: int, count: int, seed: int) -> list[Load]:
    """Lengths between half of the given ones and half more."""
    draw = random.Random(seed + 1)
    return [
        Load(
            at=None,
            prompt_tokens=max(round(prompt * draw.uniform(0.5, 1.5)), 1),
            output_tokens=max(round(output * draw.uniform(0.5, 1.5)), 1),
        )
        for _ in range(count)
    ]


def read_trace(path: Path, count: int) -> list[Load]:
    """The first `count` requests of a trace: Azure's, BurstGPT's or apex_plus' CSV, Mooncake's JSON lines, or lengths.

    Rows without an answer (failures) are left out.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = _json_rows(file) if path.suffix in (".jsonl", ".json") else csv.DictReader(file)
            found: list[Load] = []
            ends: dict[str, float] = {}
            for number, row in enumerate(rows, 1):
                told = {str(key).strip().lower(): value for key, value in row.items()}
                load = _thinking(_load(path, number, told), seconds_of(told.get("elapsed time")), ends)
                if load.output_tokens > 0 and load.prompt_tokens > 0:
                    found.append(load)
                if len(found) == count:
                    break
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: not a trace: {error}") from None
    if not found:
        raise InputError(f"{path}: no request with an answer in it")
    first = next((load.at for load in found if load.at is not None), 0.0)
    return [replace(load, at=None if load.at is None else load.at - first) for load in found]


def _thinking(load: Load, elapsed: float | None, ends: dict[str, float]) -> Load:
    """The same with the time since its conversation's last answer; ends: of the answers of each, kept for the next."""
    if load.session is None or load.at is None:
        return load
    think = max(load.at - ends.get(load.session, load.at), 0.0)
    if elapsed is not None and math.isfinite(elapsed):
        ends[load.session] = load.at + elapsed
    else:
        ends.pop(load.session, None)
    return replace(load, think_seconds=think)


def timed(loads: Sequence[Load], times: Sequence[float]) -> list[Load]:
    """The same requests at other times."""
    return [replace(load, at=at) for load, at in zip(loads, times)]


def scaled(loads: Sequence[Load], factor: float) -> list[Load]:
    """Arrivals `factor` times as dense, and pauses as much shorter; the shape of bursts stays."""
    return [
        replace(load, at=None if load.at is None else load.at / factor, think_seconds=load.think_seconds / factor)
        for load in loads
    ]


def joined(loads: Sequence[Load], turns: int, think_seconds: float = 0.0) -> list[Load]:
    """Every `turns` requests become a conversation: prompts are what is new of each turn, and then hold all before.

    The first keeps its time, the others come `think_seconds` after the answer before.
    """
    if turns < 1:
        raise InputError(f"turns is {turns}; it must be at least 1")
    found: list[Load] = []
    history = 0
    for number, load in enumerate(loads):
        first = number % turns == 0
        prompt = load.prompt_tokens + (0 if first else history)
        history = prompt + load.output_tokens
        at = load.at if first else None
        pause = 0.0 if first else think_seconds
        name = f"conversation {number // turns}"
        found.append(replace(load, at=at, prompt_tokens=prompt, session=name, think_seconds=pause))
    return found


def clipped(loads: Sequence[Load], context_tokens: int) -> list[Load]:
    """Lengths that a context can hold: the answer is cut to half of it at most, then the prompt to what is left."""
    found = []
    for load in loads:
        output = min(load.output_tokens, max(context_tokens // 2, 1))
        found.append(
            replace(load, output_tokens=output, prompt_tokens=min(load.prompt_tokens, context_tokens - output - 1))
        )
    return found


NANOSECONDS = 1000**3
NO_SESSION = ("", "nan", "-")
PROMPT_NAMES = ("contexttokens", "num_prefill_tokens", "request tokens", "input_length", "prompt_tokens")
OUTPUT_NAMES = ("generatedtokens", "num_decode_tokens", "response tokens", "output_length", "output_tokens")


def _json_rows(lines: Iterable[str]) -> Iterator[dict[str, object]]:
    for line in lines:
        if len(line) > MOST_LINE_CHARACTERS:
            raise InputError(f"a line of {len(line):,} characters is in no trace")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"a line of the trace is not JSON: {error}") from None
        if isinstance(row, dict):
            yield row


def _load(path: Path, number: int, row: dict[str, object]) -> Load:
    def length(names: tuple[str, ...]) -> int:
        for name in names:
            if name in row:
                try:
                    return int(float(str(row[name])))
                except (ValueError, OverflowError):
                    raise InputError(f"{path}: row {number}: {name} is {str(row[name])[:40]!r}, no count") from None
        raise InputError(f"{path}: no column of lengths; known are {', '.join(names)}")

    at = seconds_of(row.get("timestamp"))
    if at is None and (offset := seconds_of(row.get("starttimeoffset"))) is not None:
        at = offset / NANOSECONDS  # apex_plus
    if at is not None and path.suffix == ".jsonl":
        at /= 1000  # Mooncake counts milliseconds
    session = str(row.get("session id") or "").strip()
    return Load(
        at=at,
        prompt_tokens=length(PROMPT_NAMES),
        output_tokens=length(OUTPUT_NAMES),
        session=session if session not in NO_SESSION else None,
    )


def seconds_of(value: object) -> float | None:
    """Seconds from a number or a date and time; None for anything else."""
    try:
        return float(str(value))
    except ValueError:
        pass
    try:
        date, _, fraction = str(value).partition(".")  # seven digits of a second, which Python does not read
        return datetime.fromisoformat(date).timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        return None
