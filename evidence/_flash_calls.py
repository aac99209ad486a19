"""What tokens of `_flash_ladder` cost by calls of their own: bookkeeping, products, and latencies told from them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import numpy as np
from _flash_ladder import DEPTH, HOLES, Bench, Spent

from memwall.engine.flash_costs import FlashCosts, WindowCounts, window_counts
from memwall.hardware import GIB
from memwall.kernels.row_scores import row_scores
from memwall.memory import Arena, Ledger
from memwall.memory.read_profile import ReadProfile
from memwall.memory.row_store import RowStore


def calibrated(bench: Bench, profile: ReadProfile) -> FlashCosts:
    """Costs of this machine from calls of their own: products over some rows, bookkeeping without reads."""
    shape = bench.shape
    rows = np.zeros((min(shape.neurons, (64 << 20) // shape.row_bytes), shape.row_bytes), np.uint8)
    rows.view(np.float16)[:] = 0.01
    times = []
    for _ in range(7):
        began = time.perf_counter()
        bench.neurons(rows)
        times.append(time.perf_counter() - began)
    others = []
    for _ in range(7):
        for layer in range(shape.layers):
            began = time.perf_counter()
            bench.attend(bench.resident[layer])
            low = row_scores("float16", shape.width, bench.predictors[0], bench.x, cosine=False)
            row_scores("float16", shape.rank, bench.predictors[1], low, cosine=False)
            others.append(time.perf_counter() - began)
    # rows of few bytes: keys, not bytes, are what bookkeeping costs, as rows that come take places of those that go
    store = RowStore(Arena(GIB, Ledger()), "keys", num_keys=shape.neurons, capacity=shape.neurons, row_bytes=64, side=1)
    draw, counts, seconds = np.random.default_rng(3), [], []
    for now in range(60):
        keys = np.flatnonzero(draw.random(shape.neurons) < (0.01 if now % 2 else 0.2))
        began = time.perf_counter()
        missing = store.missing(keys, now)
        places = store.exchange(store.idle(now - 2), missing, now)
        store.side[places] = HOLES
        seconds.append(time.perf_counter() - began)
        counts.append(len(keys) + 2 * len(missing))
    slope, base = np.polyfit(counts[10:], seconds[10:], 1)
    return FlashCosts(
        profile=profile, depth=DEPTH, call_seconds=max(float(base), 0.0), key_seconds=max(float(slope), 0.0),
        held_bytes_per_s=rows.nbytes / median(times), other_seconds=median(others),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    window: int
    mode: str
    predicted: float
    measured: float


def forecasts(bench: Bench, costs: FlashCosts, windows: tuple[int, ...], tokens: int) -> list[Forecast]:
    """Token latencies by window and pieces: told from counts and costs alone, then measured."""
    found = []
    for window in windows:
        for mode in ("window", "bundled"):
            counts: list[WindowCounts] = [window_counts(wanted, window) for wanted in bench.sets]
            told = sum(
                sum(
                    costs.layer_seconds(
                        predicted=each.predicted, loaded=each.loaded, held=each.held, row_bytes=bench.shape.row_bytes,
                        pieces=2 if mode == "window" else 1,
                    ).values()
                )
                for each in counts
            )  # fmt: skip
            spent = Spent()
            bench.begin(mode, window)
            for _ in range(tokens):
                bench.sparse_token(spent)
            found.append(Forecast(window=window, mode=mode, predicted=told, measured=spent.seconds / spent.tokens))
    return found


def management(bench: Bench, tokens: int) -> dict[str, list[float]]:
    """Seconds a token of one layer's store: rows exchanged in place, swapped with the last, or arrays built anew."""
    shape, wanted = bench.shape, bench.sets[0]
    found: dict[str, list[float]] = {"exchange": [], "swap": [], "rebuild": []}
    made = {
        name: RowStore(
            Arena(4 * GIB, Ledger()), name, num_keys=shape.neurons, capacity=shape.neurons, row_bytes=shape.row_bytes,
            side=1,
        )
        for name in ("exchange", "swap")
    }  # fmt: skip
    rows, sides = np.empty((0, shape.row_bytes), np.uint8), np.empty((0, 1), np.float32)
    keys, used_at = np.empty(0, np.int64), np.empty(0, np.int64)
    fresh = np.zeros((shape.neurons, shape.row_bytes), np.uint8)
    for now in range(tokens):
        want = np.flatnonzero(wanted[now % len(wanted)])
        for name, store in made.items():
            began = time.perf_counter()
            missing, leaving = store.missing(want, now), store.idle(now - bench.most_window + 1)
            if name == "exchange":
                places = store.exchange(leaving, missing, now)
            else:
                store.drop(leaving)
                places = store.append(missing, now)
            store.side[places] = HOLES
            found[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        used_at[np.isin(keys, want)] = now
        new = np.setdiff1d(want, keys, assume_unique=True)
        staying = used_at >= now - bench.most_window + 1
        rows = np.concatenate([rows[staying], fresh[: len(new)]])
        sides = np.concatenate([sides[staying], np.full((len(new), 1), HOLES, np.float32)])
        keys, used_at = np.concatenate([keys[staying], new]), np.concatenate([used_at[staying], np.full(len(new), now)])
        found["rebuild"].append(time.perf_counter() - began)
    for store in made.values():
        store.release()
    return {name: each[bench.most_window :] for name, each in found.items()}
