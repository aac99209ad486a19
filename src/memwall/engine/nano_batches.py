"""A decoder whose batch runs as nano-batches on three streams: products, attention over caches, and sums with others.

While decode attention of one nano-batch reads its cache, products of another compute, and sums of a third cross to the
other process. Each stream is a thread that works its part of a static schedule from top to bottom, in every layer the
same, and waits for nothing but the parents of what comes next; tails of a layer run beside heads of the next. A stream
may have processor threads of its own (a lane), so that classes do not queue for one pool.

Source: NanoFlow, Zhu 2024, arXiv 2408.12757, section 4.3. On a GPU streams share the device by thread blocks; here by
lanes. Products stay one at a time; attention of several rows at once gives the same bits.

Shapes: T rows of a batch, those of one token each first; hidden states [T, H] are float32.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from memwall import kernels
from memwall._native import set_lane_threads
from memwall.engine.batch import BatchCache, ModelExecutor
from memwall.engine.nano_schedule import (
    RESOURCES,
    Edge,
    NanoOperation,
    Placed,
    Resource,
    Schedule,
    Turns,
    edges_of,
    in_turn,
)
from memwall.engine.page_forms import INT4
from memwall.engine.serving import MOST_LOGIT_ROWS, Serving
from memwall.errors import InputError
from memwall.memory import Charge
from memwall.models.config import EMBEDDING
from memwall.models.decode import Layer
from memwall.models.decoder import BLOCK_ROWS, OWNER, SCRATCH, Decoder, product_scratch_bytes

CHAIN: tuple[tuple[str, Resource, tuple[str, ...]], ...] = (
    ("kqv", "compute", ()),
    ("decode", "memory", ("kqv",)),
    ("prefill", "compute", ("kqv",)),
    ("o", "compute", ("decode", "prefill")),
    ("reduce1", "network", ("o",)),
    ("up_gate", "compute", ("reduce1",)),
    ("down", "compute", ("up_gate",)),
    ("reduce2", "network", ("down",)),
)
"""Operations of a layer that is split by heads and filters, with the sums of both parts' results."""
NOMINAL = 1 << 16
MOST_PLANS = 256
"""Kept at once: a server sees thousands of pairs of rows and rows that decode."""
ROW_BUFFERS = ("normed", "queries", "attended", "gate", "up")
Lanes = Mapping[Resource, int]
Needs = Sequence[tuple[int, int]]


class Wire(Protocol):
    """The way to the process that holds the other part of the model."""

    def exchange(self, x: np.ndarray) -> np.ndarray:
        """Shows x [n, H] and gives what the other showed at its call of the same turn; valid until the next call."""


def graph(*, network: bool) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Parents of each operation in its layer, and in the layer before."""
    parents = {name: told for name, _, told in CHAIN}
    if network:
        return parents, {"kqv": ("reduce2",)}
    del parents["reduce1"], parents["reduce2"]
    parents["up_gate"] = ("o",)
    return parents, {"kqv": ("down",)}


def alternating(parts: int, *, network: bool = False) -> Schedule:
    """Even parts that take turns at every operation: a schedule without a search. One part: no nano-batches."""
    return _by_hand(parts, network, lambda step, part: float(step * parts + part))


def two_phases(*, network: bool = False) -> Schedule:
    """Halves that are half a layer apart: while one attends, the other multiplies."""
    steps = len(CHAIN)
    return _by_hand(
        2, network, lambda step, part: step + part * steps / 2 + (0.25 if part else 0.0), period=float(steps)
    )


def in_blocks(parts: int, *, network: bool = False) -> Schedule:
    """Attention of each part in turn, then the feed-forward of each: a block is what computes while the sum of the
    block before it crosses, and no sum is waited for at once.
    """
    attention = [name for name, _, _ in CHAIN].index("reduce1")
    rest = len(CHAIN) - attention - 2  # the sums have a stream of their own

    def start(step: int, part: int) -> float:
        if step <= attention:
            return float(attention * part + step)
        return float(attention * parts + rest * part + step - attention - 1)

    return _by_hand(parts, network, start, period=float((attention + rest) * parts + 1))


def _by_hand(parts: int, network: bool, start: Callable[[int, int], float], period: float | None = None) -> Schedule:
    if parts < 1:
        raise InputError(f"{parts} parts; it must be at least 1")
    known, before = graph(network=network)
    cuts = [NOMINAL * part // parts for part in range(parts + 1)]
    placed = [
        Placed(
            operation=NanoOperation(name=name, resource=resource, first=cuts[part], end=cuts[part + 1], index=part),
            share=1.0, start=start(step, part), seconds=0.5,
        )
        for step, (name, resource, _) in enumerate(CHAIN) if name in known for part in range(parts)
    ]  # fmt: skip
    edges = edges_of([one.operation for one in placed], known, before)
    return Schedule.by_starts(placed, edges, period or float(len(CHAIN) * parts), NOMINAL)


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule for a batch of so many rows. rows: of each nano-operation."""

    operations: tuple[NanoOperation, ...]
    turns: dict[Resource, Turns]
    parents: tuple[tuple[Edge, ...], ...]

    @staticmethod
    def of(schedule: Schedule, singles: int, rows: int, *, network: bool) -> Plan:
        """Ranges scaled to the batch; empty ones are left out. singles: rows that decode, which come first."""
        kept: list[NanoOperation] = []
        place: dict[int, int] = {}
        for at, one in enumerate(schedule.placed):
            first, end = _scaled(schedule, one.operation, singles, rows)
            if first < end:
                place[at] = len(kept)
                name, resource = one.operation.name, one.operation.resource
                kept.append(
                    NanoOperation(name=name, resource=resource, first=first, end=end, index=one.operation.index)
                )
        parents: list[list[Edge]] = [[] for _ in kept]
        for edge in edges_of(kept, *graph(network=network)):
            parents[edge.child].append(edge)
        turns = {
            name: tuple((place[at], shift) for at, shift in schedule.stream(name) if at in place) for name in RESOURCES
        }
        return Plan(tuple(kept), turns, tuple(tuple(found) for found in parents))


def _scaled(schedule: Schedule, one: NanoOperation, singles: int, rows: int) -> tuple[int, int]:
    """Boundaries keep their order, so that no two ranges meet that did not meet before."""
    decode = schedule.ranges("decode")[-1][1]
    if decode == schedule.tokens:  # both kinds lie all over the batch: a range has those of its rows that are of a kind
        first, end = (round(rows * at / schedule.tokens) for at in (one.first, one.end))
        least, most = {"decode": (0, singles), "prefill": (singles, rows)}.get(one.name, (0, rows))
        return max(first, least), min(end, most)

    def row(at: int) -> int:
        if at <= decode:
            return round(singles * at / decode)
        return singles + round((rows - singles) * (at - decode) / (schedule.tokens - decode))

    return row(one.first), row(one.end)


@dataclass(frozen=True, slots=True)
class Ran:
    """When a nano-operation of a layer ran, by `time.perf_counter`."""

    operation: NanoOperation
    layer: int
    start: float
    end: float


@dataclass(slots=True)
class _State:
    """What the streams of one step tell each other. done: layers that each nano-operation is through.

    A stream is woken when all that it waits for is there, and not before: to wake, look and wait again would cost the
    stream that computes a change of threads at every operation.
    """

    done: list[int]
    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: dict[Resource, tuple[threading.Condition, Needs]] = field(default_factory=dict)
    fault: BaseException | None = None

    def wait(self, name: Resource, needs: Needs) -> bool:
        """Until each (nano-operation, layers) of `needs` is through; False where another stream has failed."""
        with self.lock:
            if not self._there(needs) and self.fault is None:
                changed = threading.Condition(self.lock)
                self.waiting[name] = (changed, needs)
                while not self._there(needs) and self.fault is None:
                    changed.wait()
                del self.waiting[name]
            return self.fault is None

    def finish(self, at: int, layers: int) -> None:
        """A nano-operation is through so many layers."""
        with self.lock:
            self.done[at] = layers
            for changed, needs in self.waiting.values():
                if self._there(needs):
                    changed.notify()

    def fail(self, error: BaseException) -> None:
        """All streams end."""
        with self.lock:
            self.fault = self.fault or error
            for changed, _ in self.waiting.values():
                changed.notify()

    def _there(self, needs: Needs) -> bool:
        return all(self.done[parent] >= layers for parent, layers in needs)


class _Stream:
    """A thread that works what it is handed."""

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"memwall {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._todo.get()) is not None:
            work()

    def hand(self, work: Callable[[], None]) -> None:
        self._todo.put(work)

    def stop(self) -> None:
        self._todo.put(None)
        self._thread.join()


class NanoDecoder(Decoder):
    """Runs batches as nano-batches; the rest as `Decoder` does. Dense feed-forward models without adapters."""

    _streams: dict[Resource, _Stream] | None = None
    _own_scratch: Charge | None = None

    def pipeline(
        self,
        schedule: Schedule,
        *,
        overlap: bool = True,
        lanes: Lanes | None = None,
        wire: Wire | None = None,
    ) -> None:
        """Call it before the first batch, and again to change. overlap: False works the same nano-operations one
        after another. lanes: processor threads of each class, 0 or none for those that all share. wire: None where the
        model is whole.
        """
        if self.config.num_experts:
            raise InputError("nano-batches are for dense models; this one has experts")
        self._schedule, self._overlap, self._lanes, self._wire = schedule, overlap, dict(lanes or {}), wire
        self._plans: dict[tuple[int, int], Plan] = {}
        self.trace: list[Ran] | None = None
        if self._streams is None:
            self._streams = {}
            self._widen()
        self._charge_lanes()

    def _charge_lanes(self) -> None:
        """Scratch of the threads that streams have to themselves; what the shared ones keep is counted already.

        A batch's rows may all go through a product, or attention, at once; that of the network adds and keeps nothing.
        """
        rows, config = self.segment_tokens, self.config
        lane = {name: max(self._lanes.get(name, 0), 1) for name in RESOURCES}
        if self._own_scratch is None:
            self._own_scratch = self._arena.charge(SCRATCH, 0)
        products = product_scratch_bytes(config, self.weights.specs, rows, exact=self.exact, threads=lane["compute"])
        attention = kernels.predict_attention_scratch_bytes(
            config.num_heads, config.num_kv_heads, config.head_dim, rows, threads=lane["memory"], sequences=rows,
        )  # fmt: skip
        self._own_scratch.resize(products + (attention if self._overlap else 0))

    def _widen(self) -> None:
        """Every row has its own place in all buffers, since several blocks are under way."""
        rows, width = self.segment_tokens, self.config.hidden_size
        for name in ROW_BUFFERS if rows > BLOCK_ROWS else ():
            if name not in self._buffers:  # gate, of models that have none
                continue
            narrow = self._buffers[name]
            self._buffers[name] = self._arena.allocate(OWNER, (rows, narrow.shape[1]), np.float32)
            self._arena.free(narrow)
        self._buffers["part"] = self._arena.allocate(OWNER, (rows, width), np.float32)

    def release(self) -> None:
        """See `Decoder`; the streams end."""
        for stream in (self._streams or {}).values():
            stream.stop()
        if self._own_scratch is not None:
            self._own_scratch.release()
        super().release()

    def batch(self, tokens: np.ndarray, positions: np.ndarray, cache: Any) -> np.ndarray:
        """See `Decoder`."""
        assert isinstance(cache, BatchCache)
        rows, singles = len(tokens), cache.singles
        if not 0 < rows <= self.segment_tokens:
            raise ValueError(f"batch takes 1 to {self.segment_tokens} tokens at a time, got {rows}")
        hidden = self._buffers["hidden"][:rows]
        kernels.gather_rows(self.weights.matrices[EMBEDDING], np.asarray(tokens, np.int64), hidden)
        self._tables = self._rotation(cache, positions)
        self._cache, self._hidden = cache, hidden
        plan = self._plans.get((singles, rows))
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = Plan.of(self._schedule, singles, rows, network=self._wire is not None)
            self._plans[singles, rows] = plan
        if self._overlap:
            self._run_streams(plan)
        else:
            self._run_in_turn(plan)
        self.last_norm.into(hidden, hidden)
        return hidden

    # ---- how ---------------------------------------------------------------------------------------------------------

    def _run_in_turn(self, plan: Plan) -> None:
        order = sorted(range(len(plan.operations)), key=lambda at: (_STEP[plan.operations[at].name], at))
        try:
            for layer in range(self.config.num_layers):
                for at in order:
                    set_lane_threads(self._lanes.get(plan.operations[at].resource, 0))
                    self._work(plan.operations[at], layer)
        finally:
            set_lane_threads(0)

    def _run_streams(self, plan: Plan) -> None:
        state = _State([0] * len(plan.operations))
        assert self._streams is not None
        others = [name for name in RESOURCES if name != "compute" and plan.turns[name]]
        ended = threading.Semaphore(0)
        for name in others:
            if name not in self._streams:
                self._streams[name] = _Stream(name)
            self._streams[name].hand(lambda name=name: self._run_stream(name, plan, state, ended))  # type: ignore[misc]
        self._run_stream("compute", plan, state, ended)
        for _ in range(len(others) + 1):
            ended.acquire()
        if state.fault is not None:
            raise state.fault

    def _run_stream(self, name: Resource, plan: Plan, state: _State, ended: threading.Semaphore) -> None:
        try:
            set_lane_threads(self._lanes.get(name, 0))
            for at, layer in in_turn(plan.turns[name], self.config.num_layers):
                parents = [(edge.parent, layer - edge.layers + 1) for edge in plan.parents[at]]
                if not state.wait(name, parents):
                    return
                self._work(plan.operations[at], layer)
                state.finish(at, layer + 1)
        except BaseException as error:
            state.fail(error)
        finally:
            set_lane_threads(0)
            ended.release()

    # ---- what --------------------------------------------------------------------------------------------------------

    def _work(self, operation: NanoOperation, index: int) -> None:
        began = time.perf_counter()
        rows, layer = slice(operation.first, operation.end), self._layers[index]
        getattr(self, "_do_" + _WORK.get(operation.name, operation.name))(index, layer, rows)
        if self.trace is not None:
            self.trace.append(Ran(operation, index, began, time.perf_counter()))

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        return self._buffers[name][rows]

    def _do_kqv(self, index: int, layer: Layer, rows: slice) -> None:
        normed = self._rows("normed", rows)
        outs = [self._rows(name, rows) for name in ("queries", "keys", "values")]
        layer.input_norm.into(self._hidden[rows], normed)
        self._linear(normed, layer.qkv, outs, layer.qkv_bias)
        cos, sin = (table[rows] for table in self._tables)
        self._finish_heads(outs[0], layer.q_norm, self.config.num_heads, cos, sin)
        self._finish_heads(outs[1], layer.k_norm, self.config.num_kv_heads, cos, sin)
        shape = (len(normed), self.config.num_kv_heads, self.config.head_dim)
        self._cache.append_rows(index, outs[1].reshape(shape), outs[2].reshape(shape), rows.start)

    def _do_attend(self, index: int, layer: Layer, rows: slice) -> None:
        shape = (rows.stop - rows.start, self.config.num_heads, self.config.head_dim)
        queries, out = (self._rows(name, rows).reshape(shape) for name in ("queries", "attended"))
        self._cache.attend_rows(index, queries, rows.start, out)

    def _do_o(self, index: int, layer: Layer, rows: slice) -> None:
        if layer.parallel and layer.post_norm is not None:  # before the hidden state changes
            layer.post_norm.into(self._hidden[rows], self._rows("normed", rows))
        self._add(self._rows("attended", rows), layer.output, layer.output_bias, rows)

    def _do_up_gate(self, index: int, layer: Layer, rows: slice) -> None:
        normed, inner = self._rows("normed", rows), [self._rows(name, rows) for name in layer.inner]
        if layer.post_norm is not None and not layer.parallel:
            layer.post_norm.into(self._hidden[rows], normed)
        self._linear(normed, layer.gate_up, inner, layer.gate_up_bias)
        layer.activate(inner)

    def _do_down(self, index: int, layer: Layer, rows: slice) -> None:
        self._add(self._rows(layer.inner[0], rows), layer.down, layer.down_bias, rows)

    def _add(self, x: np.ndarray, name: str, bias: np.ndarray | None, rows: slice) -> None:
        """To the hidden state; or, of a part of the model, kept until the other part's is there."""
        if self._wire is None:
            self._linear(x, [name], [self._hidden[rows]], [bias], accumulate=True)
        else:
            self._linear(x, [name], [self._rows("part", rows)], [bias])

    def _do_reduce(self, index: int, layer: Layer, rows: slice) -> None:
        assert self._wire is not None
        part = self._rows("part", rows)
        np.add(part, self._wire.exchange(part), out=part)  # the same sum, to the bit, in both processes
        self._hidden[rows] += part


def nano_decoder(serving: Serving, schedule: Schedule, **told: Any) -> NanoDecoder:
    """A loaded engine computes by nano-batches from now on. told: as for `NanoDecoder.pipeline`."""
    settings, executor = serving.settings, serving.engine.executor
    if not isinstance(executor, ModelExecutor) or serving.workers is not None or executor.lora is not None:
        raise InputError("nano-batches are for one worker without adapters; choose the scheduler fcfs or nanoflow")
    if settings.kv == INT4:
        raise InputError(
            "--kv int4: nano-batches store a prompt's tokens out of order, which blocks of codes are not for; use int8"
        )
    made = NanoDecoder(
        serving.config, executor.decoder.weights, serving.arena, segment_tokens=settings.token_budget,
        logit_rows=min(settings.max_sequences, MOST_LOGIT_ROWS), exact=settings.exact,
        sequences=settings.max_sequences, shared=settings.shared_prefixes,
    )  # fmt: skip
    made.pipeline(schedule, **told)
    serving.take_decoder(made)
    return made


_STEP = {name: step for step, (name, _, _) in enumerate(CHAIN)}
_WORK = {"decode": "attend", "prefill": "attend", "reduce1": "reduce", "reduce2": "reduce"}
