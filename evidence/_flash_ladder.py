"""Time of tokens over real files: layers of a published shape, weights at random, neurons woken as a small model's.

The layers are OPT-6.7B's or a quarter of their width, a few of them, float16: only sizes matter to a disk. Which
neurons a token is predicted to wake follows a trained small model on text it was not trained on: its layers' predicted
sets, side by side until they are as many neurons as the shape has. That is synthetic, and said to be. Everything else
happens: files are read round the page cache, rows move in the store, products are computed; attention is its four
matrices, without keys and values.

Ladder (all but the first two hold attention and predictors): `naive` reads all weights, `hybrid` holds half of them,
both in large pieces, the next one read while one is computed; `predictor` reads what is predicted, in two pieces a
neuron; `window` what the last tokens did not have; `bundled` that in one piece a neuron; `merged` over gaps where that
is cheaper. `mapped` computes over maps of the files that hold no page when a token begins: least recently used pages
under a memory of half the model leave before a token comes back to them.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from memwall.engine.llm_in_a_flash import merged
from memwall.hardware import GIB
from memwall.kernels.neurons import add_neurons
from memwall.kernels.row_scores import row_scores
from memwall.memory import Arena, Ledger
from memwall.memory.direct_reader import DirectReader, aligned_bytes
from memwall.memory.read_profile import ReadProfile, measure_copies, measure_reads
from memwall.memory.row_store import RowStore

PIECE_BYTES = 8 << 20
DEPTH = 32
SLACK = 1.1
MOST_TOKENS = 512
MODES = ("naive", "hybrid", "mapped", "predictor", "window", "bundled", "merged")
SPARSE = ("predictor", "window", "bundled", "merged")
HOLES = -2.0
"""Bias of neurons whose weights are random: of products with a variance of one about two in a hundred stay above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """width: H; rank: of predictors. window: tokens."""

    width: int
    neurons: int
    layers: int
    rank: int
    window: int = 5

    @property
    def row_bytes(self) -> int:
        return 4 * self.width

    @property
    def neuron_bytes(self) -> int:
        return self.layers * self.neurons * self.row_bytes

    @property
    def attention_bytes(self) -> int:
        return self.layers * 8 * self.width**2

    @property
    def predictor_bytes(self) -> int:
        return self.layers * 2 * self.rank * (self.width + self.neurons)

    @property
    def model_bytes(self) -> int:
        return self.neuron_bytes + self.attention_bytes


def sets_like(predicted: list[np.ndarray], shape: Shape) -> list[np.ndarray]:
    """Of each layer [T, neurons] booleans: a small model's sets ([T', F] each), side by side at other times."""
    predicted = [each[:MOST_TOKENS] for each in predicted]
    count = len(predicted[0])
    apart = count // 3
    found = []
    for layer in range(shape.layers):
        blocks, have, turn = [], 0, 0
        while have < shape.neurons:
            source = predicted[(layer + turn) % len(predicted)]
            blocks.append(np.roll(source, turn // len(predicted) * apart, axis=0))
            have += source.shape[1]
            turn += 1
        found.append(np.concatenate(blocks, axis=1)[:, : shape.neurons])
    return found


def write_files(folder: Path, shape: Shape) -> dict[str, Path]:
    """`bundled` [L, F, up | down], `apart` [L, F, up] then [L, F, down], `attention` [L, 4 H, H]; numbers repeat."""
    draw = np.random.default_rng(0)
    # rows that any may begin at: 4,099 rows of H numbers with a variance of 1 / H
    numbers = (draw.standard_normal((4099, shape.width), np.float32) / np.sqrt(shape.width)).astype(np.float16)
    paths = {name: folder / name for name in ("bundled", "apart", "attention")}

    def write(path: Path, rows: int, wide: int) -> None:
        with path.open("wb") as file:
            step = max(PIECE_BYTES // (2 * shape.width * wide), 1)
            for begin in range(0, rows, step):
                some = np.arange(begin * wide, min(begin + step, rows) * wide) * 7 % len(numbers)
                file.write(numbers[some].data)
            file.flush()
            os.fsync(file.fileno())

    write(paths["bundled"], shape.layers * shape.neurons, 2)
    write(paths["apart"], 2 * shape.layers * shape.neurons, 1)
    write(paths["attention"], shape.layers * 4 * shape.width, 1)
    return paths


@dataclass(slots=True)
class Spent:
    """Seconds and counts of one token or several."""

    tokens: int = 0
    seconds: float = 0.0
    read_seconds: float = 0.0
    manage_seconds: float = 0.0
    compute_seconds: float = 0.0
    other_seconds: float = 0.0
    read_bytes: int = 0
    device_bytes: int = 0
    reads: int = 0
    loaded: int = 0


def device_bytes() -> int:
    """What the system says that this process has had read from devices; -1 where it does not say."""
    try:
        return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])
    except (OSError, IndexError):
        return -1


class Bench:
    """One machine's files, memory and state of all modes. cap_bytes of the arena: half of the model."""

    def __init__(self, folder: Path, shape: Shape, sets: list[np.ndarray]) -> None:
        self.shape, self.sets = shape, sets
        self.paths = write_files(folder, shape)
        self.readers = {name: DirectReader(path, DEPTH) for name, path in self.paths.items()}
        self.arena = Arena(shape.model_bytes // 2, Ledger())
        self.x = np.random.default_rng(1).standard_normal((1, shape.width)).astype(np.float32)
        self.out, self.scores = np.zeros_like(self.x), np.empty((1, 4 * shape.width), np.float32)
        self.active = np.empty(max(shape.neurons, PIECE_BYTES // shape.row_bytes), np.float32)
        self._ahead = ThreadPoolExecutor(1)
        self._pieces = [aligned_bytes(PIECE_BYTES) for _ in range(2)]
        self.resident = self.arena.allocate("attention", (shape.layers, 4 * shape.width, 2 * shape.width), np.uint8)
        draw = np.random.default_rng(2)
        self.predictors = [
            self.arena.allocate("predictors", (rows, 2 * cols), np.uint8)
            for rows, cols in ((shape.rank, shape.width), (shape.neurons, shape.rank))
        ]  # one layer's, used for all
        for array in self.predictors:
            array.view(np.float16)[:] = 0.01 * draw.standard_normal((len(array), array.shape[1] // 2)).astype(
                np.float16
            )
        self.arena.charge("predictors", shape.predictor_bytes - sum(each.nbytes for each in self.predictors))
        for layer in range(shape.layers):
            size = self.resident[layer].nbytes
            self.readers["attention"].read([(layer * size, size)], [self.resident[layer].reshape(-1)])
        self.stores: list[RowStore] = []
        self.mode, self.now, self.gap = "", 0, 0
        self.most_window = self.fitting_window()

    def close(self) -> None:
        self._ahead.shutdown()
        for reader in self.readers.values():
            reader.close()

    # ---- dense ------------------------------------------------------------------------------------------------------

    def _pieces_of(self, name: str, begin: int, end: int, row_bytes: int) -> Iterator[np.ndarray]:
        """Rows of a part of a file; the next piece is read meanwhile, in parts of a megabyte."""
        step = PIECE_BYTES // row_bytes * row_bytes
        starts = list(range(begin, end, step))

        def read(turn: int) -> np.ndarray:
            size = min(step, end - starts[turn])
            room = self._pieces[turn % 2][:size]
            offsets = np.arange(0, size, 1 << 20)
            lengths = np.minimum(1 << 20, size - offsets)
            self.readers[name].read_to(starts[turn] + offsets, lengths, room.ctypes.data + offsets)
            return room.reshape(-1, row_bytes)

        coming = self._ahead.submit(read, 0) if starts else None
        for turn in range(len(starts)):
            assert coming is not None
            rows = coming.result()
            coming = self._ahead.submit(read, turn + 1) if turn + 1 < len(starts) else None
            yield rows

    def attend(self, rows: np.ndarray) -> None:
        row_scores("float16", self.shape.width, rows, self.x, cosine=False)

    def neurons(self, rows: np.ndarray) -> None:
        biases = np.full((len(rows), 1), HOLES, np.float32)
        add_neurons("float16", rows, self.x, self.out, self.active[: len(rows)][None], biases=biases)

    def dense_token(self, held_rows: int, held: np.ndarray | None, *, attention_held: bool) -> None:
        """All weights: `held_rows` neurons of each layer, and attention, are in memory or not."""
        shape = self.shape
        layer_bytes, attention = shape.neurons * shape.row_bytes, 8 * shape.width**2
        for layer in range(shape.layers):
            if attention_held:
                self.attend(self.resident[layer])
            else:
                for rows in self._pieces_of("attention", layer * attention, (layer + 1) * attention, 2 * shape.width):
                    self.attend(rows)
            if held is not None:
                self.neurons(held[layer * held_rows : (layer + 1) * held_rows])
            begin = layer * layer_bytes + held_rows * shape.row_bytes
            for rows in self._pieces_of("bundled", begin, (layer + 1) * layer_bytes, shape.row_bytes):
                self.neurons(rows)

    def mapped_token(self) -> None:
        """Over maps whose pages have left memory."""
        shape = self.shape
        for name, parts, wide, work in (
            ("attention", 4 * shape.width * shape.layers, 2 * shape.width, self.attend),
            ("bundled", shape.neurons * shape.layers, shape.row_bytes, self.neurons),
        ):
            with self.paths[name].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                rows = np.frombuffer(pages, np.uint8).reshape(parts, wide)
                step = max(PIECE_BYTES // wide, 1)
                for begin in range(0, parts, step):
                    work(rows[begin : begin + step])
                del rows
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    # ---- sparse -----------------------------------------------------------------------------------------------------

    def rows(self, window: int) -> list[int]:
        """Of each layer, so that windows of so many tokens have room."""
        found = []
        for wanted in self.sets:
            counts = np.add.accumulate(np.pad(wanted, ((1, 0), (0, 0))).astype(np.int32), axis=0)
            most = int((counts[window:] > counts[:-window]).sum(1).max())
            found.append(min(int(SLACK * most), self.shape.neurons))
        return found

    def fitting_window(self) -> int:
        """The longest up to the shape's own that half of the model has room for."""
        sizes = {"num_keys": self.shape.neurons, "row_bytes": self.shape.row_bytes, "side": 1}
        for window in range(self.shape.window, 1, -1):
            if (
                sum(RowStore.predict_bytes(capacity=rows, **sizes) for rows in self.rows(window))
                <= self.arena.free_bytes
            ):
                return window
        return 1

    def begin(self, mode: str, window: int | None = None) -> None:
        """Empty stores for a mode, and the tokens that fill its window. window: another than fits, outside the cap."""
        for store in self.stores:
            store.release()
        self.mode, self.now = mode, 0
        self.window = 0 if mode == "predictor" else window or self.most_window
        arena = self.arena if window is None else Arena(8 * GIB, Ledger())
        sizes = {"num_keys": self.shape.neurons, "row_bytes": self.shape.row_bytes, "side": 1}
        self.stores = [RowStore(arena, "window", capacity=rows, **sizes) for rows in self.rows(max(self.window, 1))]
        for _ in range(self.window):
            self.sparse_token(Spent())

    def sparse_token(self, spent: Spent) -> None:
        """One token, in the mode that was begun."""
        self.now += 1
        began = time.perf_counter()
        for layer, store in enumerate(self.stores):
            one = time.perf_counter()
            self.attend(self.resident[layer])
            low = row_scores("float16", self.shape.width, self.predictors[0], self.x, cosine=False)
            row_scores("float16", self.shape.rank, self.predictors[1], low, cosine=False)
            two = time.perf_counter()
            wanted = np.flatnonzero(self.sets[layer][self.now % len(self.sets[layer])])
            if self.window == 0:
                store.drop(np.arange(store.used))
            missing = store.missing(wanted, self.now)
            leaving = store.idle(self.now - self.window + 1)
            short = len(missing) - (store.capacity - store.used) - len(leaving)
            if short > 0:
                leaving = store.least_used(len(leaving) + short)
            places = store.exchange(leaving, missing, self.now)
            store.side[places] = HOLES
            three = time.perf_counter()
            moved = self._load(layer, store, missing, places)
            four = time.perf_counter()
            active = self.active[: store.used][None]
            add_neurons("float16", store.data[: store.used], self.x, self.out, active, biases=store.side[: store.used])
            five = time.perf_counter()
            spent.other_seconds += two - one
            spent.manage_seconds += three - two
            spent.read_seconds += four - three
            spent.compute_seconds += five - four
            spent.reads += moved[0]
            spent.read_bytes += moved[1]
            spent.loaded += len(missing)
        spent.tokens += 1
        spent.seconds += time.perf_counter() - began

    def _load(self, layer: int, store: RowStore, keys: np.ndarray, places: np.ndarray) -> tuple[int, int]:
        """(reads, bytes) of what was read."""
        size = self.shape.row_bytes
        to = store.data.ctypes.data + places * size
        if self.mode in ("predictor", "window"):
            half, base = size // 2, (layer * self.shape.neurons + keys) * (size // 2)
            offsets = np.concatenate([base, base + self.shape.layers * self.shape.neurons * half])
            lengths = np.full(len(offsets), half)
            self.readers["apart"].read_to(offsets, lengths, np.concatenate([to, to + half]))
            return len(offsets), int(lengths.sum())
        base = (layer * self.shape.neurons + keys) * size
        if self.mode == "bundled" or not len(keys):
            lengths = np.full(len(base), size)
            self.readers["bundled"].read_to(base, lengths, to)
            return len(base), int(lengths.sum())
        first, stop = merged(keys, self.gap)
        spans = (keys[stop - 1] - keys[first] + 1) * size
        room = aligned_bytes(int(spans.sum())) if not hasattr(self, "room") else self.room
        if room.nbytes < spans.sum():
            room = aligned_bytes(int(2 * spans.sum()))
        self.room = room
        at = np.cumsum(spans) - spans
        single = stop - first == 1
        targets = np.where(single, to[first], room.ctypes.data + at)
        self.readers["bundled"].read_to(base[first], spans, targets)
        staged = room[: int(spans.sum()) // size * size].reshape(-1, size)
        for run in np.flatnonzero(~single).tolist():
            own = slice(first[run], stop[run])
            store.data[places[own]] = staged[at[run] // size + keys[own] - keys[first[run]]]
        return len(first), int(spans.sum())

    def profile(self, rounds: int) -> ReadProfile:
        """What reads cost, from half a neuron on."""
        chunks = tuple(self.shape.row_bytes // 2 << power for power in range(6))
        return measure_reads(self.paths["bundled"], chunks=chunks, depths=(1, 8, DEPTH), seconds=0.06, rounds=rounds)

    # ---- all of them in turn ----------------------------------------------------------------------------------------

    def measure(self, mode: str, tokens: int) -> Spent:
        """So many tokens of a mode; those before them, which fill a window, do not count."""
        spent = Spent()
        if mode in SPARSE:
            self.begin(mode)
            before = device_bytes()
            for _ in range(tokens):
                self.sparse_token(spent)
        else:
            rows, held = 0, None
            if mode == "hybrid":
                # attention and as many neurons as half of the model has room for; their numbers do not matter
                for store in self.stores:
                    store.release()
                self.stores = []
                rows = int(0.99 * self.arena.free_bytes / self.shape.layers / self.shape.row_bytes)
                held = self.arena.allocate("held", (self.shape.layers * rows, self.shape.row_bytes), np.uint8)
                held.view(np.float16)[:] = 0.01
            counted = sum(reader.stats.read_bytes for reader in self.readers.values())
            before, began = device_bytes(), time.perf_counter()
            for _ in range(tokens):
                if mode == "mapped":
                    self.mapped_token()
                else:
                    self.dense_token(rows, held, attention_held=mode == "hybrid")
            spent.tokens, spent.seconds = tokens, time.perf_counter() - began
            if held is not None:
                self.arena.free(held)
            spent.read_bytes = sum(reader.stats.read_bytes for reader in self.readers.values()) - counted
        spent.device_bytes = device_bytes() - before if before >= 0 else -1
        return spent


@dataclass(slots=True)
class Ladder:
    """What was measured: by mode one entry a round."""

    spent: dict[str, list[Spent]]
    profile: ReadProfile
    half_rate: list[float]
    whole_rate: list[float]

    def per_token(self, mode: str) -> list[float]:
        return [each.seconds / each.tokens for each in self.spent[mode]]

    def typical(self, mode: str) -> float:
        return median(self.per_token(mode))


def climb(bench: Bench, rounds: int, tokens: dict[str, int], progress: Callable[[int, int, str], None]) -> Ladder:
    """All modes in turn in each round, and the disk's rate at the two sizes of pieces before and after."""
    half, whole = bench.shape.row_bytes // 2, bench.shape.row_bytes
    profile = bench.profile(rounds=3)
    copies = measure_copies(aligned_bytes(PIECE_BYTES), whole, 0.05)
    bench.gap = profile.break_even_bytes(whole, DEPTH, copies) // whole
    found = Ladder({mode: [] for mode in MODES}, profile, [], [])
    for turn in range(rounds):
        for number, mode in enumerate(MODES):
            progress(turn * len(MODES) + number, rounds * len(MODES), f"tokens: {mode}")
            found.spent[mode].append(bench.measure(mode, tokens[mode]))
            if mode in ("window", "bundled"):
                rates = measure_reads(bench.paths["bundled"], chunks=(half, whole), depths=(DEPTH,), seconds=0.15)
                found.half_rate.append(rates.rate(half, DEPTH))
                found.whole_rate.append(rates.rate(whole, DEPTH))
    return found
