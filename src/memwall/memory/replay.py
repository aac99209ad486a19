"""Sequences of accesses under many eviction policies: what each would have had to fetch, beside the least there is."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memwall.errors import InputError
from memwall.memory import bit_predictors as predict
from memwall.memory.cache_policy import Hint, Key, count_faults, next_accesses
from memwall.memory.succinct_paging import discard_bits, make_policy, phase_bits, phases_of, wrong_bits

SOURCES = ("oracle", "noisy", "seen", "popu", "pleco", "learned")
KINDS: tuple[Hint, ...] = ("discard", "phase")


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Hints of a sequence by kind; what a source cannot give is not there. wrong: (zeros, ones) of each kind of bit."""

    hints: dict[Hint, list[int]]
    wrong: dict[Hint, tuple[int, int]]
    train: int
    """Accesses that the source has learned from; faults count from there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One policy's faults (mean over seeds) over the accesses that count, of which LFD faults at `least`."""

    policy: str
    hint: Hint
    faults: float
    least: int
    counted: int

    @property
    def times_least(self) -> float:
        """Faults beside LFD's."""
        return self.faults / max(self.least, 1)

    @property
    def hit_rate(self) -> float:
        """Share of the accesses that found their key."""
        return 1 - self.faults / max(self.counted, 1)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {**asdict(self), "times_least": self.times_least, "hit_rate": self.hit_rate}


def together(results: Sequence[Result]) -> Result:
    """One policy over several sequences."""
    return Result(
        policy=results[0].policy,
        hint=results[0].hint,
        faults=sum(one.faults for one in results),
        least=sum(one.least for one in results),
        counted=sum(one.counted for one in results),
    )


def read_accesses(path: Path, limit: int | None = None) -> list[Key]:
    """The keys of a file: one a line, or the `hash_ids` of a JSON lines trace (Mooncake's), block after block."""
    found: list[Key] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(found) >= limit:
                    break
                if line.strip():
                    found += _blocks(path, number, line) if path.suffix == ".jsonl" else [line.strip()]
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not found:
        raise InputError(f"{path}: holds no access; a key a line is wanted, or JSON lines with hash_ids")
    return found[:limit]


def _blocks(path: Path, number: int, line: str) -> list[Key]:
    try:
        row = json.loads(line)
        ids = row["hash_ids"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}, line {number}: not a JSON object with hash_ids") from None
    if not isinstance(ids, list) or not all(isinstance(each, int | str) for each in ids):
        raise InputError(f"{path}, line {number}: hash_ids are numbers or words in a list")
    return list(ids)


def predicted(
    keys: Sequence[Key], slots: int, source: str, *, zeros: float = 0.0, ones: float = 0.0, sigma: float = 1.0,
    train: float = 0.5, seed: int = 0,
) -> Predicted:  # fmt: skip
    """Hints of a sequence. source: `oracle`, whose bits are true but for a share of the zeros and one of the ones;
    `noisy` next accesses, off by a log-normal factor of `sigma`; `seen`, whose bit is 1 where a key comes for the first
    time; `popu`, `pleco` and `learned`, which know the past, and of bits those of the first `train` of the sequence.
    The first two look ahead.
    """
    if source not in SOURCES:
        raise InputError(f"no source of predictions {source!r}; there are {', '.join(SOURCES)}")
    if not 0 < train < 1:
        raise InputError(f"a share of {train:g} to learn from; it lies between 0 and 1")
    hints: dict[Hint, list[int]]
    first = 0
    if source == "oracle":
        hints = {
            "discard": predict.flipped(discard_bits(keys, slots), seed, zeros=zeros, ones=ones),
            "phase": predict.flipped(phase_bits(keys, slots), seed + 1, zeros=zeros, ones=ones),
            "arrival": next_accesses(keys),
        }
    elif source == "noisy":
        arrivals = predict.noisy_arrivals(keys, sigma, seed)
        hints = {
            "discard": discard_bits(keys, slots, arrivals),
            "phase": _beyond_next_phase(keys, slots, arrivals),
            "arrival": arrivals,
        }
    elif source == "seen":
        hints = {kind: predict.first_times(keys) for kind in KINDS}
    else:
        first = int(train * len(keys))
        known = keys[:first]
        if len(known) < slots:
            raise InputError(
                f"{len(known)} accesses to learn from, fewer than the {slots} slots; give a longer sequence"
            )
        labels: dict[Hint, list[int]] = {"discard": discard_bits(known, slots), "phase": phase_bits(known, slots)}
        if source == "learned":
            hints = {kind: predict.learned(keys, labels[kind], first, seed) for kind in KINDS}
        else:
            guess: Callable[[Sequence[Key]], list[int]] = predict.popu if source == "popu" else predict.pleco
            arrivals = guess(keys)
            hints = {kind: predict.bits_beyond(arrivals, labels[kind], first) for kind in KINDS}
            hints["arrival"] = arrivals
    wrong = {kind: wrong_bits(kind, keys, slots, hints[kind]) for kind in KINDS}
    return Predicted(hints=hints, wrong=wrong, train=first)


def _beyond_next_phase(keys: Sequence[Key], slots: int, arrivals: Sequence[int]) -> list[int]:
    phases = phases_of(keys, slots)
    ends = {phase: at + 1 for at, phase in enumerate(phases)}
    return [int(arrival >= ends.get(phase + 1, len(keys))) for arrival, phase in zip(arrivals, phases, strict=True)]


def replay(keys: Sequence[Key], slots: int, names: Sequence[str], told: Predicted, *, seeds: int = 5) -> list[Result]:
    """Every policy over the sequence; those for which the source has no hint are left out. Policies that draw lots run
    once for each seed.
    """
    least = count_faults(make_policy("lfd", slots), keys, next_accesses(keys), first=told.train)
    found = []
    for name in names:
        policy = make_policy(name, slots)
        if name == "lfd":
            faults = [least]
        elif policy.hint != "none" and policy.hint not in told.hints:
            continue
        else:
            hints = told.hints.get(policy.hint)
            faults = [
                count_faults(make_policy(name, slots, seed), keys, hints, first=told.train)
                for seed in range(seeds if policy.draws else 1)
            ]
        found.append(
            Result(
                policy=name,
                hint=policy.hint,
                faults=statistics.fmean(faults),
                least=least,
                counted=len(keys) - told.train,
            )
        )
    return found
