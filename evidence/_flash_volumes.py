"""Bytes that tokens read, counted from the sets of neurons that they are predicted to wake."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean, stdev

import numpy as np

from memwall.claims import Claim
from memwall.engine.flash_costs import window_counts
from memwall.hardware import format_bytes
from memwall.models.config import ModelConfig

WINDOWS = range(1, 9)
WINDOW = 5


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Mean and standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{scale * mean(values):.3g} +- {scale * error:.1g}"


def loads_with_rows(wanted: np.ndarray, rows: int, rule: str) -> float:
    """Neurons loaded a token where `rows` stay by least recent use or by Belady's rule; [T, F] booleans."""
    tokens, neurons = wanted.shape
    if rule == "belady":
        upcoming = np.full((tokens + 1, neurons), tokens, np.int64)
        for at in range(tokens - 1, -1, -1):
            upcoming[at] = np.where(wanted[at], at, upcoming[at + 1])
    order = np.full(neurons, -1, np.int64)  # when each was last used
    held = np.zeros(neurons, bool)
    loaded = []
    for at in range(tokens):
        now = wanted[at]
        loaded.append(int((now & ~held).sum()))
        held |= now
        order[now] = at
        over = int(held.sum()) - rows
        if over > 0:
            may = np.flatnonzero(held & ~now)
            worth = order[may] if rule == "lru" else -upcoming[at + 1][may]
            held[may[np.argpartition(worth, min(over, len(may)) - 1)[:over]]] = False
    return mean(loaded[WINDOW:])


def volume_claims(active: list[np.ndarray], config: ModelConfig, windows: int) -> Iterator[Claim]:
    """Of predicted sets; windows of text are looked at one by one."""
    inner, hidden = config.intermediate_size, config.hidden_size
    row_bytes = 2 * hidden * (3 if config.gated else 2)
    ffn = config.num_layers * inner * row_bytes
    model = 2 * config.num_parameters
    parts = [np.split(each, windows) for each in active]
    loads = {k: [mean(window_counts(p, k).loaded for p in layer) for layer in parts] for k in WINDOWS}
    predicted = sum(float(each.mean()) for each in active) * inner * row_bytes
    read = {k: sum(loads[k]) * row_bytes for k in WINDOWS}
    yield Claim(
        claim="bytes read a token fall with prediction, and again with the window",
        measured=f"naive {format_bytes(model)}, hybrid {format_bytes(model // 2)}, predictor "
        f"{format_bytes(round(predicted))}, window of {WINDOW} {format_bytes(round(read[WINDOW]))}: "
        f"{model / 2 / read[WINDOW]:.1f} times fewer than hybrid; of the feed-forward {predicted / ffn:.1%} predicted, "
        f"{read[WINDOW] / ffn:.1%} read",
        required="naive > hybrid > predictor > window; window at least 4 times below hybrid",
        passed=model / 2 > predicted > read[WINDOW] and read[WINDOW] <= model / 8,
    )
    totals = [[sum(window_counts(layer[w], k).loaded for layer in parts) for w in range(windows)] for k in WINDOWS]
    steps = [[a - b for a, b in zip(x, y, strict=True)] for x, y in pairwise(totals)]
    shrinking = all(mean(each) > 0 for each in steps) and all(mean(a) > mean(b) for a, b in pairwise(steps))
    yield Claim(
        claim="what is held is concave in the window: memory buys less and less",
        measured="read a token for k = 1 to 8, of all neurons: "
        + ", ".join(f"{sum(loads[k]) / config.num_layers / inner:.2%}" for k in WINDOWS)
        + "; each step saves less than the one before, by window of text "
        + ", ".join(spread([a - b for a, b in zip(x, y, strict=True)]) for x, y in pairwise(steps))
        + " neurons",
        required="falling, and by less with every token more",
        passed=shrinking,
    )
    most, held, found = [], [], {name: [] for name in ("window", "lru", "belady", "lru of all")}
    for parted in parts:
        most.append(max(int(window_rows(part, WINDOW).max()) for part in parted))
        held.append(round(mean(window_counts(part, WINDOW).held for part in parted)))
        found["window"].append(mean(window_counts(part, WINDOW).loaded for part in parted))
        for name, rule, rows in (
            ("lru", "lru", held[-1]),
            ("belady", "belady", held[-1]),
            ("lru of all", "lru", most[-1]),
        ):
            found[name].append(mean(loads_with_rows(part, rows, rule) for part in parted))
    sums = {name: sum(each) for name, each in found.items()}
    yield Claim(
        claim="in the rows that it holds a window reads little more than least recent use, and no rule less than "
        "Belady's",
        measured=f"a token, over all layers: window {sums['window']:.0f}, LRU {sums['lru']:.0f}, Belady "
        f"{sums['belady']:.0f} neurons, in {sum(held)} rows of {config.num_layers * inner}; LRU in the {sum(most)} "
        f"rows that are set aside for the tokens that want most {sums['lru of all']:.0f}",
        required="window within 1.5 times LRU; Belady below both, in every layer",
        passed=sums["window"] <= 1.5 * sums["lru"]
        and all(b <= min(a, c) for a, b, c in zip(found["lru"], found["belady"], found["window"], strict=True)),
    )


def window_rows(wanted: np.ndarray, window: int) -> np.ndarray:
    """Neurons that each `window` successive tokens want together."""
    counts = np.add.accumulate(np.pad(wanted, ((1, 0), (0, 0))).astype(np.int32), axis=0)
    return (counts[window:] > counts[:-window]).sum(1)
