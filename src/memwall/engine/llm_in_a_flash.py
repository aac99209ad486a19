"""LLM in a flash: of a ReLU feed-forward only the neurons that a token wakes are read from disk, the last ones kept.

Source: LLM in a flash: Efficient Large Language Model Inference with Limited Memory (Keivan Alizadeh, 2023, arXiv
2312.11514), sections 3.1 to 3.3. No official code.

Idea: a low-rank predictor tells from the normed output of a layer's attention which of the layer's neurons are active.
Those of the last `window` tokens are held in memory (`memory.row_store`), so only what the window lacks is read: rows
of [gate |] up | down in one piece each, many at once round the page cache (`memory.direct_reader`), neighbours in one
read where the gap between them costs less than another read (`memory.read_profile`). All held neurons are computed,
predicted or not: it costs no read. A prompt wakes nearly all neurons: its layers are streamed whole, in large pieces,
the next one read while one is computed, exactly; what its last tokens want stays.

Units and shapes: x, residual float32 [T, H]; a row is one neuron of a layer, in the layout of `models.neurons`.
Differs from the paper: rows that come take the places of rows that go (only the difference moves); a predictor has a
bias for each neuron; where more neurons are predicted than there are rows, they are read in turns.
Cost: rows(window) * row_bytes + predictors + two pieces of STREAM_BYTES held; (new neurons) * row_bytes read a token.
Holds when: the feed-forward is a ReLU's (`relu`, `reglu`, FATReLU); others have no zeros to leave out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.errors import BudgetExceeded, InputError
from memwall.hardware.units import MIB
from memwall.kernels.neurons import add_neurons
from memwall.memory import Arena, Charge
from memwall.memory.arena import allocated_bytes
from memwall.memory.direct_reader import DirectReader
from memwall.memory.read_profile import measure_copies, measure_reads
from memwall.memory.row_store import RowStore
from memwall.models.config import ModelConfig
from memwall.models.neurons import FILE_NAME, NeuronLayout
from memwall.models.weights import Weights

OWNER = "neurons/window"
STAGE = "neurons/stage"
STREAM_BYTES = 2 * MIB
"""Of a prompt's layers, read at once; two such pieces are held."""
LOOSE_BYTES = 2 * MIB
"""Counted for what lies outside the arena meanwhile: lists of neurons, copies of rows, stacks of threads."""
FEW_TOKENS = 4
"""So many at once are predicted and read as one; more are streamed like a prompt."""
DEFAULT_WINDOW = 5
PROFILE_SECONDS = 0.02


@dataclass(slots=True)
class FlashStats:
    """Of what was done for single tokens, summed over layers; streamed: bytes of prompts. Seconds are disjoint."""

    tokens: int = 0
    predicted: int = 0
    loaded: int = 0
    reads: int = 0
    read_bytes: int = 0
    streamed_bytes: int = 0
    turns: int = 0
    """Loads beyond the first where a token wanted more rows than there are."""
    predict_seconds: float = 0.0
    manage_seconds: float = 0.0
    read_seconds: float = 0.0
    compute_seconds: float = 0.0


def store_bytes(config: ModelConfig, window: int) -> int:
    """What the windows of all layers, and the neurons' biases, take of an arena."""
    layout = config.neurons
    assert layout is not None
    biases = 4 * layout.num_layers * layout.num_neurons * (layout.parts - 1) if config.mlp_bias else 0
    return biases + sum(
        RowStore.predict_bytes(
            num_keys=layout.num_neurons, capacity=rows, row_bytes=layout.row_bytes, side=layout.parts - 1
        )
        for rows in layout.rows(window)
    )


def stage_bytes(layout: NeuronLayout, segment_tokens: int) -> int:
    """What else streaming takes: two pieces, activations, scores."""
    shapes = _stage_forms(layout, segment_tokens).values()
    return LOOSE_BYTES + sum(allocated_bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize) for shape, dtype in shapes)


def _stage_forms(layout: NeuronLayout, segment_tokens: int) -> dict[str, tuple[tuple[int, ...], type]]:
    rows = _piece_rows(layout)
    most = max(FEW_TOKENS * layout.num_neurons, segment_tokens * rows)
    return {
        "pieces": ((2 * rows * layout.row_bytes + 4096,), np.uint8),
        "active": ((most,), np.float32),
        "scores": ((FEW_TOKENS, layout.num_neurons), np.float32),
        "low": ((FEW_TOKENS, max(layout.ranks)), np.float32),
    }


def _piece_rows(layout: NeuronLayout) -> int:
    return min(max(STREAM_BYTES // layout.row_bytes, 1), layout.num_neurons)


def merged(keys: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, stop) positions in ascending `keys` of runs to be read as one: neighbours at most `gap` keys apart."""
    cuts = np.flatnonzero(np.diff(keys) > gap + 1) + 1
    return np.concatenate([[0], cuts]), np.concatenate([cuts, [len(keys)]])


class NeuronStream:
    """The feed-forwards of a model, over its file of neurons. Give to a `Decoder` as `feed_forward`.

    window: tokens whose neurons stay. gap_rows: unwanted rows that a read may cross; None measures the disk for it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        directory: Path,
        arena: Arena,
        *,
        window: int = DEFAULT_WINDOW,
        segment_tokens: int = 512,
        threads: int = 32,
        gap_rows: int | None = None,
    ) -> None:
        assert config.neurons is not None
        if window < 1:
            raise InputError(f"a window of {window} tokens: must be 1 or more")
        self.layout, self.window, self.stats = config.neurons, window, FlashStats()
        self._config, self._weights, self._arena = config, weights, arena
        self.reader = DirectReader(directory / FILE_NAME, threads)
        if self.reader.file_bytes != self.layout.file_bytes:
            raise InputError(
                f"{self.reader.path}: {self.reader.file_bytes:,} bytes, not the {self.layout.file_bytes:,} that the "
                "configuration says"
            )
        self._now = 0
        self._ahead = ThreadPoolExecutor(1, "memwall-ahead")
        self.stores: list[RowStore] = []
        self._stage: dict[str, np.ndarray] = {}
        self._charges: list[Charge] = []
        try:
            self._charges.append(arena.charge(STAGE, LOOSE_BYTES))
            self._stage = arena.allocate_all(STAGE, _stage_forms(self.layout, segment_tokens))
            for rows in self.layout.rows(window):
                sizes = {"num_keys": self.layout.num_neurons, "capacity": rows, "row_bytes": self.layout.row_bytes}
                self.stores.append(RowStore(arena, OWNER, **sizes, side=self.layout.parts - 1))
        except BudgetExceeded:
            self.release()
            raise
        begin = -self._stage["pieces"].ctypes.data % 4096
        rows = _piece_rows(self.layout)
        whole = self._stage["pieces"][begin : begin + 2 * rows * self.layout.row_bytes]
        self._pieces = whole.reshape(2, rows, self.layout.row_bytes)
        self._biases = [self._layer_biases(layer) for layer in range(self.layout.num_layers)]
        nbytes = sum(biases.nbytes for biases in self._biases if biases is not None)
        self._charges.append(arena.charge(OWNER, nbytes))
        self.gap_rows = self._measured_gap() if gap_rows is None else gap_rows

    def release(self) -> None:
        """Gives memory, file and threads back; it is of no more use."""
        self._ahead.shutdown()
        self.reader.close()
        for store in self.stores:
            store.release()
        for array in self._stage.values():
            self._arena.free(array)
        for charge in self._charges:
            charge.release()
        self.stores, self._stage, self._charges = [], {}, []

    def _layer_biases(self, layer: int) -> np.ndarray | None:
        """float32 [neurons, 1 or 2], of what comes before the last part; views where there is one."""
        names = ("gate", "up") if self._config.gated else ("up",)
        found = [self._weights.vectors.get(f"model.layers.{layer}.mlp.{name}_proj.bias") for name in names]
        vectors = [vector for vector in found if vector is not None]
        return np.stack(vectors, 1) if vectors else None

    def _measured_gap(self) -> int:
        size = self.layout.row_bytes
        chunks = [size * times for times in (1, 2, 4, 8) if size * times <= self.reader.file_bytes]
        depths, room = (self.reader.threads,), self._pieces.reshape(-1)
        chunks = [chunk for chunk in chunks if chunk <= room.nbytes]
        profile = measure_reads(self.reader.path, chunks=chunks, depths=depths, seconds=PROFILE_SECONDS, room=room)
        copies = measure_copies(room, size, PROFILE_SECONDS)
        return profile.break_even_bytes(size, self.reader.threads, copies) // size

    # ---- the seam of `Decoder` -----------------------------------------------------------------------------------

    def run(self, layer: int, x: np.ndarray, residual: np.ndarray) -> None:
        """residual += the layer's feed-forward of x."""
        if len(x) > FEW_TOKENS:
            self._stream(layer, x, residual)
        else:
            if layer == 0:
                self._now += 1
                self.stats.tokens += len(x)
            began = time.perf_counter()
            wanted = self.predict(layer, x)
            self.stats.predict_seconds += time.perf_counter() - began
            self.stats.predicted += len(wanted)
            self.few(layer, wanted, x, residual)
        bias = self._weights.vectors.get(f"model.layers.{layer}.mlp.down_proj.bias")
        if bias is not None:
            residual += bias

    def predict(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Neurons, ascending, that any of up to FEW_TOKENS tokens is predicted to wake."""
        prefix = f"model.layers.{layer}.mlp.predictor."
        down, up = (self._weights.matrices[f"{prefix}{name}.weight"] for name in ("down", "up"))
        low = self._stage["low"].ravel()[: len(x) * self.layout.ranks[layer]].reshape(len(x), -1)
        scores = self._stage["scores"][: len(x)]
        kernels.linear(x, [down], [low])
        kernels.linear(low, [up], [scores], biases=[self._weights.vectors[f"{prefix}up.bias"]])
        most = scores[0] if len(x) == 1 else scores.max(axis=0)
        return np.flatnonzero(most > self.layout.thresholds[layer])

    def few(self, layer: int, wanted: np.ndarray, x: np.ndarray, residual: np.ndarray) -> None:
        """Brings neurons in and adds what all held ones give; in turns where they are more than there are rows."""
        store = self.stores[layer]
        for begin in range(0, max(len(wanted), 1), store.capacity):
            if begin:  # what was computed must not be computed twice
                self.stats.turns += 1
                store.drop(np.arange(store.used))
            self.bring(layer, wanted[begin : begin + store.capacity])
            began = time.perf_counter()
            self._add(store.data[: store.used], store.side[: store.used], x, residual)
            self.stats.compute_seconds += time.perf_counter() - began

    def bring(self, layer: int, wanted: np.ndarray) -> None:
        """Afterwards the store holds `wanted`, and of others what the window's earlier tokens used, as room allows."""
        store, began = self.stores[layer], time.perf_counter()
        missing = store.missing(wanted, self._now)
        leaving = store.idle(self._now - self.window + 1)
        short = len(missing) - (store.capacity - store.used) - len(leaving)
        if short > 0:  # a token that wants more than those it was sized for: the oldest give way
            leaving = store.least_used(len(leaving) + short)
        places = store.exchange(leaving, missing, self._now)
        if len(missing):
            biases = self._biases[layer]
            store.side[places] = 0.0 if biases is None else biases[missing]
        middle = time.perf_counter()
        self._load(layer, store, missing, places)
        self.stats.loaded += len(missing)
        self.stats.manage_seconds += middle - began
        self.stats.read_seconds += time.perf_counter() - middle

    def _load(self, layer: int, store: RowStore, keys: np.ndarray, places: np.ndarray) -> None:
        """Rows of ascending `keys` to `places`: single ones straight, runs over the stage as far as that has room."""
        if not len(keys):
            return
        size, room = self.layout.row_bytes, self._pieces.reshape(-1, self.layout.row_bytes)
        first, stop = merged(keys, self.gap_rows)
        spans = keys[stop - 1] - keys[first] + 1
        spans[spans == 1] = 0
        ends = np.cumsum(spans)
        over = np.flatnonzero((spans > 0) & (ends <= len(room)))
        alone = np.ones(len(keys), bool)
        for run in over.tolist():
            alone[first[run] : stop[run]] = False
        single, at = np.flatnonzero(alone), ends[over] - spans[over]
        offsets = np.concatenate([keys[single], keys[first[over]]]) * size + layer * self.layout.layer_bytes
        lengths = np.concatenate([np.full(len(single), size), spans[over] * size])
        targets = [store.data.ctypes.data + places[single] * size, room.ctypes.data + at * size]
        self.reader.read_to(offsets, lengths, np.concatenate(targets))
        for run, begin in zip(over.tolist(), at.tolist(), strict=True):
            own = slice(first[run], stop[run])
            store.data[places[own]] = room[begin + keys[own] - keys[first[run]]]
        self.stats.reads += len(offsets)
        self.stats.read_bytes += int(lengths.sum())

    def _add(self, rows: np.ndarray, side: np.ndarray, x: np.ndarray, residual: np.ndarray) -> None:
        active = self._stage["active"][: len(x) * len(rows)].reshape(len(x), len(rows))
        add_neurons(
            self.layout.form, rows, x, residual, active, gated=self._config.gated, biases=side,
            threshold=self._config.relu_threshold,
        )  # fmt: skip

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def _stream(self, layer: int, x: np.ndarray, residual: np.ndarray) -> None:
        """The whole layer, piece by piece; then the last tokens' neurons are held, copied as they came by."""
        store = self.stores[layer]
        if layer == 0:
            self._now += self.window + 1
        last = self.predict(layer, np.ascontiguousarray(x[-min(FEW_TOKENS, self.window) :]))[: store.capacity]
        store.drop(np.arange(store.used))
        places = store.append(last, self._now)
        biases = self._biases[layer]
        none = np.zeros((len(self._pieces[0]), self.layout.parts - 1), np.float32)
        if len(last):
            store.side[places] = 0.0 if biases is None else biases[last]
        for begin, rows in self._layer_pieces(layer):
            side = none[: len(rows)] if biases is None else biases[begin : begin + len(rows)]
            self._add(rows, side, x, residual)
            here = slice(*np.searchsorted(last, (begin, begin + len(rows))))
            store.data[places[here]] = rows[last[here] - begin]

    def _layer_pieces(self, layer: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first neuron, rows) over a layer; the next piece is read meanwhile."""
        step, count = len(self._pieces[0]), self.layout.num_neurons

        def read(begin: int) -> np.ndarray:
            rows = self._pieces[begin // step % 2][: min(step, count - begin)]
            unit = max(rows.nbytes // 8 // 4096 * 4096, 4096)  # several at once: one alone does not fill a drive
            starts = np.arange(0, rows.nbytes, unit)
            lengths = np.minimum(unit, rows.nbytes - starts)
            origin = layer * self.layout.layer_bytes + begin * self.layout.row_bytes
            self.reader.read_to(origin + starts, lengths, rows.ctypes.data + starts)
            self.stats.streamed_bytes += rows.nbytes
            return rows

        coming: Future[np.ndarray] = self._ahead.submit(read, 0)
        for begin in range(0, count, step):
            rows = coming.result()
            if begin + step < count:
                coming = self._ahead.submit(read, begin + step)
            yield begin, rows
