"""Prefill of a prompt made of chunks: kept rows are loaded and turned to their places, chosen tokens run through the
layers (`kv.cache_craft`).

Layer by layer: a thread brings in the layer's kept rows while earlier layers compute; keys are rotated to their new
positions; keys and values of the chosen tokens overwrite theirs; these tokens attend to all earlier ones; the whole
layer goes to the sequence's own cache, and rows of chunks that were computed in full go to the store. Only one layer is
held in full precision, whatever the cache's own form.

The prompt is worked in spans, each with as many chosen tokens as the decoder takes at once; a span's tokens see earlier
spans as the cache gives their rows back.

Units: positions and lengths in tokens; T chosen tokens, W parts of the prompt (opening and chunks), n tokens up to the
end of a span.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall.kernels import attend_scattered
from memwall.kv.cache_craft import Chooser, Focus, preload_layers
from memwall.kv.cachegen_profile import turn
from memwall.kv.chunk_file import ROWS
from memwall.kv.chunk_prompt import LEAST_OPENING_TOKENS, ChunkPrompt, Part, Span, arrange, cut_spans, stage_bytes

if TYPE_CHECKING:
    from memwall.kv.base import CacheShape, KVCache
    from memwall.kv.chunk_store import ChunkStore
    from memwall.memory.arena import Charge
    from memwall.models.config import ModelConfig
    from memwall.models.decoder import Decoder

STAGE = "kv/chunks"
"""Ledger owner of the one layer in full precision, of rows that arrive, and of what the statistics are made in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a prefill did. Rows are tokens times layers that ran; preload: layers that were there before the first ran.

    wait_seconds: time spent waiting for rows to arrive; stall_seconds: that of it after computing had begun. hidden:
    final states of the last span's chosen tokens, the question's among them; like logits it is the decoder's own, until
    the next call.
    """

    logits: np.ndarray
    hidden: np.ndarray
    num_tokens: int
    parts: tuple[Part, ...]
    rows_run: int
    rows_in_all: int
    preload: int
    wait_seconds: float
    stall_seconds: float
    seconds: float
    loaded_bytes: int
    focused: tuple[int, ...] | None

    @property
    def share(self) -> float:
        """Of a full prefill's rows, the share that ran."""
        return self.rows_run / self.rows_in_all


class Arrivals:
    """Kept rows of each span and layer in turn, read by a thread that stays at most `ahead` layers in front."""

    def __init__(self, store: ChunkStore, jobs: Sequence[tuple[int, Sequence[Part]]], ahead: int) -> None:
        """jobs: (layer, parts to load) in the order of use."""
        self.wait_seconds = 0.0
        self._store, self._jobs = store, jobs
        self._arrived: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._error: BaseException | None = None
        self._stop = False
        self._turn = threading.Condition()
        self._taken, self._ahead = 0, ahead
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for number, (layer, parts) in enumerate(self._jobs):
                with self._turn:
                    while not self._stop and number >= self._taken + self._ahead:
                        self._turn.wait()
                    if self._stop:
                        return
                rows = []
                for part in parts:
                    assert part.variant is not None
                    shape = self._store.shape
                    keys = np.empty((len(part.tokens), shape.num_kv_heads, shape.head_dim), ROWS)
                    values = np.empty_like(keys)
                    self._store.read_layer(part.variant, layer, keys, values)
                    rows.append((keys, values))
                with self._turn:
                    self._arrived[number] = rows
                    self._turn.notify_all()
        except BaseException as error:  # handed to the thread that waits for the rows, which raises it
            with self._turn:
                self._error = error
                self._turn.notify_all()

    def wait_for(self, number: int) -> None:
        """Until job `number` is there; raises what went wrong with it."""
        began = time.perf_counter()
        with self._turn:
            self._turn.wait_for(lambda: self._error is not None or number in self._arrived or number < self._taken)
            self.wait_seconds += time.perf_counter() - began
            if number not in self._arrived and self._error is not None:
                raise self._error

    def take(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows of job `number`, by part; the thread may then read one more."""
        self.wait_for(number)
        with self._turn:
            self._taken = number + 1
            self._turn.notify_all()
            return self._arrived.pop(number)

    def close(self) -> None:
        """Ends the thread."""
        with self._turn:
            self._stop = True
            self._turn.notify_all()
        self._thread.join()


class Stage:
    """One layer of the prompt at a time, as the decoder sees it (`models.base.SelectedCache`)."""

    takes_inputs: ClassVar[bool] = False
    records: ClassVar[bool] = False

    def __init__(
        self,
        cache: KVCache,
        config: ModelConfig,
        parts: Sequence[Part],
        num_tokens: int,
        arrivals: Arrivals,
        focus: Focus,
        buffers: tuple[np.ndarray, np.ndarray],
        marks: np.ndarray,
    ) -> None:
        """buffers: keys and values [num_tokens, Hkv, D] float32; marks [num_tokens, Hkv, W] float32."""
        self.cache, self.config, self.parts, self.arrivals, self.focus = cache, config, parts, arrivals, focus
        self.shape: CacheShape = cache.shape
        self.question = parts[-1].end if parts else 0
        self.keys, self.values = buffers
        self.rows_run = 0
        self.focused: tuple[int, ...] | None = None
        self._owner = np.full(num_tokens, len(parts))
        self._marks = marks
        marks[:] = 0
        for part in parts:
            self._owner[part.begin : part.end] = part.index
            marks[part.begin : part.end, :, part.index] = 1
        marks[0] = 0  # the prompt's first token is no context
        self._computed = np.array([*(not part.kept for part in parts), False])
        self._repairs = any(part.kept and len(part.reuse.repair) for part in parts)
        self._job = 0
        self._paid = np.zeros(len(parts))

    def begin(self, span: Span) -> None:
        """The next span."""
        self.span = span
        self._loading = [p for p in self.parts if p.kept and span.begin <= p.begin < span.end]
        self._running = span.chosen

    @property
    def length(self) -> int:
        return 0

    @property
    def next_position(self) -> int:
        """As `length`: the decoder turns tokens by their places in the prompt."""
        return 0

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        raise NotImplementedError

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """Brings the layer's kept rows in, turned to their places, and puts those of the chosen tokens over them."""
        begin = self.span.begin
        if begin:
            self.keys[:begin], self.values[:begin] = self.cache.rows(layer, 0, begin)
        if self._loading:
            for part, (keys, values) in zip(self._loading, self.arrivals.take(self._job)):
                rows = slice(part.begin, part.end)
                self.keys[rows], self.values[rows] = keys, values
                flat = self.keys[rows].reshape(len(part.tokens), -1)
                turn(self.config, flat, np.arange(part.begin, part.end))
            self._job += 1
        self.keys[positions], self.values[positions] = k, v
        self.rows_run += len(positions)
        self._paid[:] = 0

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Attention of chosen tokens over all earlier ones; sums what they pay to each part where that is wanted."""
        end, window = self.span.end, self.shape.window(layer)
        positions = np.ascontiguousarray(positions, np.int64)
        scale = self.shape.logit_scale
        attend_scattered(
            q, self.keys[:end], self.values[:end], positions, scale=scale, window=window, out=out
        )  # fmt: skip
        owners = self._owner[positions]
        asking = owners == len(self.parts)
        watched = self._computed[owners] | (asking if self._watching() else False)
        if len(self.parts) and watched.any():
            self._watch(layer, np.ascontiguousarray(q[watched]), positions[watched])
        return out

    def _watching(self) -> bool:
        return self._repairs and not self.focus.settled and self.focus.settings.stop > 0

    def _watch(self, layer: int, q: np.ndarray, positions: np.ndarray) -> None:
        """Attention to each part, as that over values which mark the part a token belongs to: no matrix is made."""
        end, scale = self.span.end, self.shape.logit_scale
        count, heads = q.shape[:2]
        paid = np.empty((count, heads, len(self.parts)), np.float32)
        stats = np.empty((count, heads, 2), np.float32)
        attend_scattered(
            q, self.keys[:end], self._marks[:end], positions,
            scale=scale, window=self.shape.window(layer), out=paid, stats=stats,
        )  # fmt: skip
        shares = paid.mean(axis=1, dtype=np.float64)
        owners = self._owner[positions]
        asking = owners == len(self.parts)
        if asking.any():
            self._paid += shares[asking].sum(axis=0)
        own_keys = np.repeat(self.keys[positions], heads // self.shape.num_kv_heads, axis=1)
        own = np.exp((q * own_keys).sum(-1) * scale - stats[..., 0]) / stats[..., 1]
        own = own.mean(axis=1, dtype=np.float64) * (positions > 0)
        for index in np.unique(owners[~asking]):
            part, rows = self.parts[index], owners == index
            part.inter += shares[rows, :index].sum(axis=0)
            # a token's attention to itself is neither
            part.intra += float((shares[rows, index] - own[rows]).sum())
            part.token_inter[positions[rows] - part.begin] += shares[rows, :index].sum(axis=1)

    def settle(self, layer: int) -> None:
        """The layer is done: its rows go to the cache, those of chunks computed in full to the store."""
        begin, end = self.span.begin, self.span.end
        for part in self.parts:
            first, last = max(part.begin, begin), min(part.end, end)
            if part.writer is None or first >= last:
                continue
            keys = self.keys[first:last].reshape(last - first, -1).copy()
            turn(self.config, keys, np.arange(first, last), back=True)
            part.writer.write(layer, keys.reshape(self.keys[first:last].shape), self.values[first:last])
        self.cache.append(layer, self.keys[begin:end], self.values[begin:end], np.arange(begin, end))
        self.cache.settle(layer)

    def staying(self, layer: int) -> np.ndarray | None:
        """Drops the repair of chunks that the question does not look at, once that is clear."""
        if not self._watching() or self._running[-1] < self.question:
            return None
        chunks = [part for part in self.parts if not part.opening]
        if len(self.focus.seen) == 0:
            self.focus.seen = np.zeros(len(chunks))
        top = self.focus.look(self._paid[[part.index for part in chunks]])
        if top is None:
            return None
        self.focused = tuple(sorted(chunks[place].index for place in top))
        dropped = [part.index for part in chunks if part.kept and part.index not in self.focused]
        staying = np.flatnonzero(~np.isin(self._owner[self._running], dropped))
        self._running = self._running[staying]
        return staying


def prefill(
    decoder: Decoder,
    cache: KVCache,
    store: ChunkStore,
    prompt: ChunkPrompt,
    *,
    alpha: float,
    choose: Chooser | None = None,
    depth: int | None = None,
) -> Outcome:
    """Fills an empty cache with a prompt, computing only what its kept chunks leave to compute.

    Chunks without a usable variant are computed in full and kept behind these predecessors. depth: layers to load
    before computing begins (None: as `preload_layers` has it from what was measured). BudgetExceeded or InputError
    leave the cache empty.
    """
    if cache.length:
        raise ValueError("chunks make the beginning of a text: the cache must be empty")
    began = time.perf_counter()
    store.wait_preload()
    store.begin_request()
    tokens = np.asarray(prompt.tokens, np.int64)
    parts = arrange(store, prompt, alpha, decoder.segment_tokens, choose)
    charge = cache.arena.charge(STAGE, 0)
    try:
        return _Run(decoder, cache, store, parts, tokens, charge).go(depth, began)
    except BaseException:
        cache.truncate(0)
        raise
    finally:
        charge.release()
        for part in parts:
            if part.writer is not None:
                part.writer.abort()
            if part.variant is not None:
                store.unpin(part.variant)


class _Run:
    """One prefill's state, from the decision to the logits."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        store: ChunkStore,
        parts: list[Part],
        tokens: np.ndarray,
        charge: Charge,
    ) -> None:
        self.decoder, self.cache, self.store, self.parts, self.tokens = decoder, cache, store, parts, tokens
        self.charge = charge
        for part in parts:
            if part.reuse.variant is not None:
                part.variant = store.use(part.reuse.variant, part.reuse.overhead)
        self.spans = cut_spans(parts, len(tokens), decoder.segment_tokens)
        self.jobs = [
            (layer, loading)
            for span in self.spans
            if (loading := [p for p in parts if p.kept and span.begin <= p.begin < span.end])
            for layer in range(cache.shape.num_layers)
        ]

    def depth(self, asked: int | None) -> int:
        """Layers to load before the first one runs: as asked, or by the speeds that were measured."""
        layers = self.cache.shape.num_layers
        if not self.jobs:
            return 0
        if asked is not None:
            return min(max(asked, 1), layers)
        rate, per_token = self.store.load_bytes_per_s, self.store.layer_seconds_per_token
        if rate is None or per_token is None:
            return 1
        first = self.jobs[0][1]
        cold = sum(part.variant.file.layer_bytes for part in first if part.variant and not part.variant.resident)
        return preload_layers(layers, per_token * len(self.spans[0].chosen), cold / rate)

    def go(self, asked: int | None, began: float) -> Outcome:
        shape, count = self.cache.shape, len(self.tokens)
        depth = self.depth(asked)
        loading = max((sum(p.variant.file.layer_bytes for p in job[1] if p.variant) for job in self.jobs), default=0)
        rows = (count, shape.num_kv_heads, shape.head_dim)
        self.charge.resize(stage_bytes(shape, count, len(self.parts)))
        if loading:
            # what is left of the budget bounds how far loading runs ahead; two layers are needed to overlap at all
            room = int((self.cache.arena.free_bytes - self._cache_bytes()) // loading)
            depth = min(depth, max(room - 1, 1))
            self.charge.resize(stage_bytes(shape, count, len(self.parts), loading, depth + 1))
        for part in self.parts:
            if part.variant is not None:
                self.store.admit(part.variant)
                continue
            part.inter, part.token_inter = np.zeros(part.index), np.zeros(len(part.tokens))
            if not part.opening or len(part.tokens) >= LEAST_OPENING_TOKENS:
                part.writer = self.store.writer(part.tokens, part.predecessors, part.lengths)
        buffers = (np.empty(rows, np.float32), np.empty(rows, np.float32))
        marks = np.empty((count, shape.num_kv_heads, max(len(self.parts), 1)), np.float32)
        arrivals = Arrivals(self.store, self.jobs, depth + 1)
        try:
            focus = Focus(self.store.settings, np.zeros(0))
            stage = Stage(self.cache, self.decoder.config, self.parts, count, arrivals, focus, buffers, marks)
            for number in range(min(depth, len(self.jobs))):
                arrivals.wait_for(number)
            computing = time.perf_counter()
            waited = arrivals.wait_seconds
            for span in self.spans:
                stage.begin(span)
                hidden = self.decoder.selected(self.tokens[span.chosen], span.chosen, stage)
            logits = self.decoder.logits(hidden[-1:])[0]
        finally:
            arrivals.close()
        ended = time.perf_counter()
        stalled = arrivals.wait_seconds - waited
        self.store.measured((ended - computing - stalled) / stage.rows_run)
        self._keep()
        return Outcome(
            logits=logits,
            hidden=hidden,
            num_tokens=count,
            parts=tuple(self.parts),
            rows_run=stage.rows_run,
            rows_in_all=count * shape.num_layers,
            preload=depth,
            wait_seconds=arrivals.wait_seconds,
            stall_seconds=stalled,
            seconds=ended - began,
            loaded_bytes=sum(p.variant.file.layer_bytes * shape.num_layers for p in self.parts if p.variant),
            focused=stage.focused,
        )

    def _cache_bytes(self) -> int:
        """What the sequence's own cache will take, roughly: float16 rows of the prompt."""
        return 2 * self.cache.shape.num_layers * len(self.tokens) * self.cache.shape.row_values * ROWS.itemsize

    def _keep(self) -> None:
        layers = self.cache.shape.num_layers
        for part in self.parts:
            if part.writer is None:
                continue
            path = part.writer.close(part.inter / layers, part.intra / layers, part.token_inter)
            part.writer = None
            self.store.add(path)
