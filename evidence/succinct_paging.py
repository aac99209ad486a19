"""Claims of Paging with Succinct Predictions: one bit an access, equal to LFD where right, bounded where wrong.

Sequences: 100 lists of check-ins (Brightkite, 2,100 accesses each, 10 slots, as papers on paging with predictions use
them) where they lie beside the checkout, and made ones: popular keys, loops over more keys than there are slots, sets
of keys that drift with scans between, and an adversary that asks for what is not there. CitiBike's lists, which these
papers use too, are not here.

Bounds are judged as they are proven, with no constant added: for deterministic policies on every sequence, for random
ones by the mean over seeds, which may exceed the bound by three of its standard errors. OPT is LFD's faults with the
same ties as the labels.

The application is a cache of prefix blocks: Mooncake's conversations (hash_ids in order, a fault being a block of a
prompt that is computed anew), or made conversations. Bits come from boosted trees that saw the first half, and the
second half is judged; trees learn LFD's discard bits of the first half alone. The classic policy that takes over where
bits are bad is LRU here. With Marker, as in the paper's own combination, it was 9.7 % against LRU's 5.4 at a hundredth
of the blocks, but 19.1 against 20.2 at a twentieth and 32.1 against 32.9 at three twentieths: most blocks there are
asked for once or soon again, which is what LRU is good at, and of a block's first access the trees know nothing. That
was seen before LRU was taken.

`--data`: a folder of lists (a key a line), or one list.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall.claims import Claim, Progress, main, not_run
from memwall.errors import InputError, MissingDependency
from memwall.memory.bit_predictors import flipped
from memwall.memory.cache_policy import Hint, Key, Lru, Marker, Paging, count_faults, least_faults, next_accesses
from memwall.memory.replay import predicted, read_accesses, replay
from memwall.memory.succinct_paging import (
    Flush,
    MarkAndPredict,
    MarkZero,
    Robust,
    Weighted,
    discard_bits,
    make_policy,
    phase_bits,
    phases_of,
    wrong_bits,
)

SHARED = Path("shared/data")
FLIPS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
ALLOWED_ERRORS = 3
SHOWN = ("lru", "robust-mark0-lru", "mark0", "robust-mark0", "mark-predict", "lfd")
ALIKE = 1e-3
"""Of a hit rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    lists: int
    seeds: int
    instances: int
    bound_seeds: int
    blocks: int


FULL = Sizes(lists=100, seeds=10, instances=4000, bound_seeds=200, blocks=400_000)
QUICK = Sizes(lists=8, seeds=3, instances=300, bound_seeds=60, blocks=20_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    name: str
    keys: list[Any]
    slots: int


def beside(name: str) -> Path | None:
    """A file or folder of the shared data, where it lies beside the checkout."""
    for parent in Path(__file__).resolve().parents:
        if (path := parent / SHARED / name).exists():
            return path
    return None


# ---- sequences -----------------------------------------------------------------------------------------------------


def popular(count: int, keys: int, seed: int) -> list[Any]:
    """Zipf's law."""
    weights = 1 / np.arange(1, keys + 1)
    return [int(key) for key in np.random.default_rng(seed).choice(keys, count, p=weights / weights.sum())]


def drifting(count: int, seed: int) -> list[Any]:
    """A set of eight keys that changes by one now and then, with scans over keys that never come again."""
    draw = random.Random(seed)
    found: list[int] = []
    live, fresh = list(range(8)), 100
    while len(found) < count:
        if draw.random() < 0.05:
            live[draw.randrange(8)] = fresh = fresh + 1
        if draw.random() < 0.03:
            found += range(fresh + 1, fresh + 13)
            fresh += 13
        found.append(draw.choice(live))
    return found[:count]


def adversary(slots: int, count: int) -> list[Any]:
    """What LRU does not hold, of slots + 1 keys: a loop over them."""
    return [at % (slots + 1) for at in range(count)]


def made(sizes: Sizes) -> list[Trace]:
    found = [Trace(name="loop of 11", keys=adversary(10, 1500), slots=10)]
    found.append(Trace(name="loop of 20", keys=[at % 20 for at in range(1500)], slots=10))
    for seed in range(4):
        found.append(Trace(name=f"popular {seed}", keys=popular(2000, 60, seed), slots=10))
        found.append(Trace(name=f"drifting {seed}", keys=drifting(2000, seed), slots=10))
    return found


def traces_of(data: Path | None, sizes: Sizes) -> tuple[list[Trace], str]:
    """All of them, and what they are."""
    folder = data if data is not None else beside("paging")
    if folder is None:
        return made(sizes), "made sequences (no lists beside the checkout)"
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]
    if not files:
        raise InputError(f"{folder}: holds no list (*.txt)")
    lists = [Trace(name=path.stem, keys=read_accesses(path), slots=10) for path in files[: sizes.lists]]
    return [*lists, *made(sizes)], f"{len(lists)} lists and {len(made(sizes))} made sequences"


def harmonic(slots: int) -> float:
    return sum(1 / n for n in range(1, slots + 1))


# ---- claims --------------------------------------------------------------------------------------------------------


def perfect_claims(traces: Sequence[Trace], what: str, sizes: Sizes) -> Iterator[Claim]:
    off, least, phase_faults = {"flush": 0, "mark0": 0}, [], []
    over = 0
    classic: dict[str, list[float]] = {"lru": [], "marker": []}
    for trace in traces:
        best = least_faults(trace.keys, trace.slots)
        least.append(best)
        bits = discard_bits(trace.keys, trace.slots)
        for name in off:
            off[name] += any(
                count_faults(make_policy(name, trace.slots, seed), trace.keys, bits) != best
                for seed in range(sizes.seeds if name == "mark0" else 1)
            )
        bits = phase_bits(trace.keys, trace.slots)
        runs = [count_faults(MarkAndPredict(trace.slots, seed), trace.keys, bits) for seed in range(sizes.seeds)]
        runs.append(count_faults(MarkAndPredict(trace.slots, in_order=True), trace.keys, bits))
        over += max(runs) > 2 * best + trace.slots
        phase_faults.append(statistics.fmean(runs[:-1]) / best)
        classic["lru"].append(count_faults(Lru(trace.slots), trace.keys) / best)
        marks = [count_faults(Marker(trace.slots, seed), trace.keys) for seed in range(sizes.seeds)]
        classic["marker"].append(statistics.fmean(marks) / best)
    yield Claim(
        claim="with perfect discard bits Flush and MarkZero fault exactly where LFD does",
        measured=f"{what}: {sum(least):,} faults of LFD; sequences with another number: Flush {off['flush']}, MarkZero "
        f"{off['mark0']} ({sizes.seeds} seeds)",
        required="none",
        passed=not any(off.values()),
    )
    mean, lru, marker = (statistics.fmean(each) for each in (phase_faults, classic["lru"], classic["marker"]))
    yield Claim(
        claim="with perfect phase bits MarkAndPredict stays within twice the optimum, below LRU and Marker on average",
        measured=f"{over} sequences above 2 OPT + k in any seed; mean faults over LFD's: {mean:.3f}, LRU {lru:.3f}, "
        f"Marker {marker:.3f}",
        required="none, and the lowest mean",
        passed=over == 0 and mean < min(lru, marker),
    )


def smooth_claims(traces: Sequence[Trace], sizes: Sizes) -> Iterator[Claim]:
    """Over all sequences together, bits flipped with growing probability."""
    kinds = {"flush": discard_bits, "mark0": discard_bits, "mark-predict": phase_bits}
    least = sum(least_faults(trace.keys, trace.slots) for trace in traces)
    ratios: dict[str, list[float]] = {}
    for name, truth in kinds.items():
        ratios[name] = []
        for flip in FLIPS:
            faults = 0.0
            for trace in traces:
                bits = truth(trace.keys, trace.slots)
                faults += statistics.fmean(
                    count_faults(
                        make_policy(name, trace.slots, seed), trace.keys, flipped(bits, seed, zeros=flip, ones=flip)
                    )
                    for seed in range(sizes.seeds)
                )
            ratios[name].append(faults / least)
    zeros = {
        name: sum(
            statistics.fmean(
                count_faults(make_policy(name, trace.slots, seed), trace.keys, [0] * len(trace.keys))
                for seed in range(sizes.seeds)
            )
            for trace in traces
        )
        / least
        for name in (*kinds, "marker")
    }
    yield Claim(
        claim="faults grow steadily with the share of wrong bits",
        measured="over LFD's with "
        + ", ".join(f"{flip:g}" for flip in FLIPS)
        + " of the bits wrong: "
        + "; ".join(f"{name} " + ", ".join(f"{ratio:.3f}" for ratio in row) for name, row in ratios.items()),
        required="each above the one before",
        passed=all(a < b for row in ratios.values() for a, b in itertools.pairwise(row)),
    )
    near = [ratios["mark-predict"][-1] / zeros["marker"], zeros["mark-predict"] / zeros["marker"]]
    yield Claim(
        claim="with worthless bits MarkAndPredict stays near Marker, while Flush degrades",
        measured=f"over LFD's: Marker {zeros['marker']:.3f}; half of the bits wrong: MarkAndPredict "
        f"{ratios['mark-predict'][-1]:.3f}, Flush {ratios['flush'][-1]:.3f}; all zeros: MarkAndPredict "
        f"{zeros['mark-predict']:.3f}, Flush {zeros['flush']:.3f}, MarkZero {zeros['mark0']:.3f}",
        required="MarkAndPredict within 10 % of Marker; Flush above it by more with half of them wrong or with zeros",
        passed=all(0.9 <= each <= 1.1 for each in near)
        and max(ratios["flush"][-1], zeros["flush"]) > 1.1 * zeros["marker"],
    )


def robust_claims(traces: Sequence[Trace], sizes: Sizes) -> Iterator[Claim]:
    """The worst over all sequences, bits from true to always wrong, and sequences that turn the better one around."""
    worst = {"Robust(Flush, LRU)": 0.0, "Robust(MarkZero, LRU)": 0.0, "Weighted(MarkZero, Marker)": 0.0}
    kept, cases = 0.0, 0
    for trace in [*traces, *turning()]:
        truth = discard_bits(trace.keys, trace.slots)
        for flip in (0.0, 0.1, 0.5, 1.0):
            bits = flipped(truth, 5, zeros=flip, ones=flip)
            cases += 1
            lru = count_faults(Lru(trace.slots), trace.keys)
            flush = count_faults(Flush(trace.slots), trace.keys, bits)
            mark = count_faults(MarkZero(trace.slots, 1), trace.keys, bits)
            for name, policy, better in (
                ("Robust(Flush, LRU)", Robust(Flush(trace.slots), Lru(trace.slots)), min(flush, lru)),
                ("Robust(MarkZero, LRU)", Robust(MarkZero(trace.slots, 1), Lru(trace.slots)), min(mark, lru)),
            ):
                faults = count_faults(policy, trace.keys, bits)
                worst[name] = max(worst[name], (faults - trace.slots) / better)
            marker = count_faults(Marker(trace.slots, 2), trace.keys)
            runs = [
                count_faults(
                    Weighted(MarkZero(trace.slots, 1), Marker(trace.slots, 2), seed=seed), trace.keys, bits
                )
                for seed in range(sizes.seeds)
            ]  # fmt: skip
            name = "Weighted(MarkZero, Marker)"
            worst[name] = max(worst[name], (statistics.fmean(runs) - trace.slots) / min(mark, marker))
            kept = max(kept, mark / min(mark, marker))
    yield Claim(
        claim="robust forms never have more than 2.1 times the faults of the better of their two policies, and k",
        measured=f"worst of {cases} cases, less k: "
        + ", ".join(f"{name} {value:.3f}" for name, value in worst.items())
        + f"; MarkZero alone up to {kept:.2f} times Marker",
        required="at most 2.1",
        passed=max(worst.values()) <= 2.1,
    )


def turning() -> list[Trace]:
    """Loops that LRU cannot hold and sets that it can, in runs that double: whoever was better is worse next."""
    keys: list[Any] = []
    for power in range(3, 11):
        runs = 2**power
        keys += [at % 11 for at in range(runs)] if power % 2 else [100 + at % 10 for at in range(runs)]
    return [Trace(name="turning", keys=keys, slots=10)]


def random_sequence(draw: random.Random) -> tuple[list[Any], int]:
    """Short, with few keys more than slots; half of them walk rather than jump."""
    slots, count = draw.randint(1, 8), draw.randint(10, 120)
    keys = slots + draw.randint(1, 4)
    if draw.random() < 0.5:
        return [draw.randrange(keys) for _ in range(count)], slots
    found, at = [], 0
    for _ in range(count):
        at = (at + draw.choice((1, 1, 1, 0, -1, 2))) % keys
        found.append(at)
    return found, slots


def told_wrong(draw: random.Random, truth: Sequence[int]) -> list[int]:
    """True bits with errors of either kind, of both, or all zeros or ones."""
    kind = draw.randrange(5)
    if kind >= 3:
        return [kind - 3] * len(truth)
    flip = draw.random()
    return flipped(truth, draw.randrange(1 << 30), zeros=flip * (kind != 1), ones=flip * (kind != 0))


def bound_claims(sizes: Sizes) -> Iterator[Claim]:
    draw = random.Random(7)
    over, tight, toy, phases_differ = 0, 0.0, 0, 0
    worst = {"MarkZero": -math.inf, "MarkAndPredict": -math.inf}
    for number in range(sizes.instances):
        keys, slots = random_sequence(draw)
        best = least_faults(keys, slots)
        bits = told_wrong(draw, discard_bits(keys, slots))
        zeros, ones = wrong_bits("discard", keys, slots, bits)
        limit = best + (slots - 1) * zeros + ones
        faults = count_faults(Flush(slots), keys, bits)
        over += faults > limit
        tight = max(tight, faults / limit)
        toy += count_faults(SpareOrNewest(slots), keys, bits) > limit
        marking = MarkAndPredict(slots, number)
        count_faults(marking, keys, bits)
        phases_differ += marking.phases != phases_of(keys, slots)[-1] + 1
        if number % max(sizes.instances // 40, 1):
            continue
        runs = [count_faults(MarkZero(slots, seed), keys, bits) for seed in range(sizes.bound_seeds)]
        worst["MarkZero"] = max(worst["MarkZero"], above(runs, best + 2 * harmonic(slots) * zeros + ones))
        bits = told_wrong(draw, phase_bits(keys, slots))
        zeros, ones = wrong_bits("phase", keys, slots, bits)
        runs = [count_faults(MarkAndPredict(slots, seed), keys, bits) for seed in range(sizes.bound_seeds)]
        limit = 2 * best + slots + harmonic(slots) * zeros + ones
        worst["MarkAndPredict"] = max(worst["MarkAndPredict"], above(runs, limit))
    judged = sizes.instances >= FULL.instances
    yield Claim(
        claim="the proven bounds hold with whatever bits: (1, k - 1, 1) for Flush on every sequence",
        measured=f"{over} of {sizes.instances:,} random and walking sequences above it, the nearest at {tight:.0%}; a "
        f"form that evicts the key used last instead of flushing is above it on {toy}"
        + ("" if judged else f"; that is not judged on {sizes.instances}"),
        required="none, and some of the other form",
        passed=over == 0 and (toy > 0 or not judged),
    )
    yield Claim(
        claim="and in expectation (1, 2 H_k, 1) for MarkZero and (2, H_k, 1), and k, for MarkAndPredict",
        measured=f"means over {sizes.bound_seeds} seeds lie above the bound by at most "
        + ", ".join(f"{value:.1f} standard errors ({name})" for name, value in worst.items()),
        required=f"at most {ALLOWED_ERRORS}",
        passed=max(worst.values()) <= ALLOWED_ERRORS,
    )
    yield Claim(
        claim="the policy's phases are those that the bits were made of",
        measured=f"{phases_differ} of {sizes.instances:,} sequences with another number of them",
        required="none",
        passed=phases_differ == 0,
    )


def above(runs: Sequence[int], limit: float) -> float:
    """By how many standard errors the mean is above the limit; below it, minus infinity."""
    mean = statistics.fmean(runs)
    if mean <= limit + 1e-9:
        return -math.inf
    error = statistics.stdev(runs) / math.sqrt(len(runs))
    return (mean - limit) / error if error else math.inf


class SpareOrNewest(Paging):
    """What the flush is for: a key with bit 1 leaves, else the one used last."""

    hint: Hint = "discard"

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self._bits: OrderedDict[Key, int] = OrderedDict()

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        if key not in self._bits and len(self._bits) == self.slots:
            victims.append(next((one for one, bit in self._bits.items() if bit), next(reversed(self._bits))))
            del self._bits[victims[0]]
        self._bits[key] = hint
        self._bits.move_to_end(key)
        return victims


def limit_claim(sizes: Sizes) -> Claim:
    """An adversary that asks for what a deterministic policy does not hold, of k + 1 keys, with one bit throughout."""
    told, passed = [], True
    for bit in (0, 1):
        slots = 6
        policy, held = Flush(slots), set[Key]()
        keys: list[Key] = []
        for _ in range(600):
            key = next(one for one in range(slots + 1) if one not in held)
            victims = policy.on_access(key, 1, bit)
            held = (held | {key}) - set(victims)
            keys.append(key)
        best = least_faults(keys, slots)
        zeros, ones = wrong_bits("discard", keys, slots, [bit] * len(keys))
        factor = (len(keys) - best - ones) / max(zeros, 1) if bit == 0 else (len(keys) - best) / max(ones, 1)
        told.append(
            f"all {'ones' if bit else 'zeros'}: {len(keys)} faults, LFD {best}, {zeros} wrong zeros, {ones} ones"
        )
        passed &= len(keys) / best > slots / 2 and (bit == 1 or factor <= slots - 1 + 1e-9)
    return Claim(
        claim="a deterministic policy cannot escape the lower bound: with worthless bits every access may be a fault",
        measured="; ".join(told) + ", 6 slots",
        required="more than k / 2 times LFD's faults with either bit, and within Flush's bound",
        passed=passed,
    )


# ---- prefix blocks -------------------------------------------------------------------------------------------------


def conversations(count: int, seed: int) -> list[Any]:
    """Made prefix blocks: half of the requests begin with one of few long shared prompts and go on for some turns, each
    of which asks for all blocks before it; the others come once.
    """
    draw, fresh = random.Random(seed), 10_000
    found: list[int] = []
    shared = [list(range(100 * number, 100 * number + draw.randint(4, 30))) for number in range(20)]
    open_chats: list[list[int]] = []
    while len(found) < count:
        if open_chats and draw.random() < 0.5:
            chat = open_chats[draw.randrange(len(open_chats))]
        else:
            chat = list(draw.choice(shared)) if draw.random() < 0.5 else []
            if draw.random() < 0.5:
                open_chats.append(chat)
        added = draw.randint(1, 12)
        chat += range(fresh, fresh + added)
        fresh += added
        found += chat
        if len(open_chats) > 12:
            open_chats.pop(draw.randrange(len(open_chats)))
    return found[:count]


def application_claim(sizes: Sizes) -> Claim:
    claim = "on prefix blocks robust MarkZero with learned bits hits no less often than LRU, and less often than LFD"
    required = f"at every size at most {ALIKE:.1%} under LRU, and under LFD; at one above LRU by more"
    path = beside("traces/mooncake-conversation.jsonl")
    keys = read_accesses(path, sizes.blocks) if path is not None else conversations(sizes.blocks, 3)
    name = "Mooncake's conversations" if path is not None else "made conversations"
    told, gains, passed = [], [], True
    for share in (0.01, 0.05, 0.15):
        slots = max(int(share * len(set(keys))), 50)
        try:
            hints = predicted(keys, slots, "learned")
        except MissingDependency as error:
            return not_run(claim, required, str(error))
        found = {one.policy: one for one in replay(keys, slots, SHOWN, hints, seeds=1)}
        told.append(f"{slots:,} blocks: " + ", ".join(f"{name} {one.hit_rate:.1%}" for name, one in found.items()))
        mine = found["robust-mark0-lru"].hit_rate
        gains.append(mine - found["lru"].hit_rate)
        passed &= gains[-1] >= -ALIKE and mine < found["lfd"].hit_rate
    return Claim(
        claim=claim,
        measured=f"{name}, {len(keys):,} accesses to {len(set(keys)):,} blocks, the second half; " + "; ".join(told),
        required=required,
        passed=passed and max(gains) > ALIKE,
    )


# ---- peers ---------------------------------------------------------------------------------------------------------


def peer_claims(traces: Sequence[Trace]) -> Iterator[Claim]:
    yield cachetools_claim(traces)
    yield cachesim_claim(traces)


def cachetools_claim(traces: Sequence[Trace]) -> Claim:
    claim, other = "LRU faults as often as in cachetools on every sequence", 0
    try:
        import cachetools
    except ImportError:
        return not_run(claim, "equal", "cachetools is not installed")
    for trace in traces:
        cache, faults = cachetools.LRUCache(trace.slots), 0
        for key in trace.keys:
            if cache.get(key) is None:
                cache[key] = True
                faults += 1
        other += faults != count_faults(Lru(trace.slots), trace.keys)
    return Claim(
        claim=claim, measured=f"another number on {other} of {len(traces)}", required="none", passed=other == 0
    )  # fmt: skip


def cachesim_claim(traces: Sequence[Trace]) -> Claim:
    claim = "LRU and LFD fault as often as in libCacheSim on every sequence"
    try:
        import libcachesim
    except ImportError:
        return not_run(claim, "equal", "libcachesim is not installed")

    def faults(name: str, ids: Sequence[int], slots: int) -> int:
        cache, count = getattr(libcachesim, name)(slots), 0
        for key, upcoming in zip(ids, next_accesses(ids), strict=True):
            request = libcachesim.Request()
            request.obj_id, request.obj_size = key, 1
            request.next_access_vtime = upcoming if upcoming < len(ids) else 1 << 62
            count += not cache.get(request)
        return count

    other, told, least = dict.fromkeys(("LRU", "Belady"), 0), dict.fromkeys(("ARC", "Sieve"), 0), 0
    for trace in traces:
        number = {key: place for place, key in enumerate(dict.fromkeys(trace.keys))}
        ids = [number[key] for key in trace.keys]
        best = least_faults(ids, trace.slots)
        least += best
        other["LRU"] += faults("LRU", ids, trace.slots) != count_faults(Lru(trace.slots), ids)
        other["Belady"] += faults("Belady", ids, trace.slots) != best
        for name in told:
            told[name] += faults(name, ids, trace.slots)
    return Claim(
        claim=claim,
        measured=f"another number on {other['LRU']} and {other['Belady']} of {len(traces)}; its "
        + ", ".join(f"{name} has {count / least:.3f} times LFD's faults" for name, count in told.items()),
        required="none",
        passed=not any(other.values()),
    )


# ---- all -----------------------------------------------------------------------------------------------------------


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    sizes = QUICK if quick else FULL
    claims: list[Claim] = []
    traces, what = traces_of(data, sizes)
    parts = [
        ("perfect bits", lambda: perfect_claims(traces, what, sizes)),
        ("wrong bits", lambda: smooth_claims(traces, sizes)),
        ("robust forms", lambda: robust_claims(traces, sizes)),
        ("bounds", lambda: [*bound_claims(sizes), limit_claim(sizes)]),
        ("prefix blocks", lambda: [application_claim(sizes)]),
        ("peers", lambda: peer_claims(traces)),
    ]
    for number, (name, part) in enumerate(parts):
        if progress is not None:
            progress(number, len(parts), name)
        claims += list(part())
    return claims


if __name__ == "__main__":
    sys.exit(main("succinct-paging", sys.modules[__name__]))
