"""Plans carried out for real, by two processes of one thread each on this machine, so that predictions can be held
against measurements.

- data: two whole models; requests are dealt in turn;
- tensor: each process holds half of the heads, of the filters and of the head's rows; partial sums are added through
  shared memory after attention and after the feed-forward network, and the first process schedules;
- pipeline: each holds half of the blocks; two flights of requests, each with a scheduler of its own in the first
  process, follow one another through both.

The engine, its schedulers, pages and kernels are those of `memwall serve`; what is cut is the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from memwall import kernels
from memwall.engine.arrivals import Load
from memwall.engine.batch import BatchCache, ModelExecutor, batch_order
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.kv_pages import KVPages
from memwall.engine.loading import cache_shape
from memwall.engine.s_lora_parallel import LoraParts
from memwall.engine.sampling import Sampler
from memwall.engine.serving import MOST_LOGIT_ROWS, Serving, ServingSettings, load_engine
from memwall.formats import codec
from memwall.memory import PagePool
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, HEAD, ModelConfig
from memwall.models.decode import Layer
from memwall.models.decoder import Decoder
from memwall.models.lora import LoraWeights
from memwall.simulate.host import Profile, profile_engine
from memwall.simulate.iterations import Served
from memwall.simulate.parts import (
    RANKS,
    Kind,
    StageDecoder,
    TensorDecoder,
    Wire,
    entries_of,
    hold_all,
    serve_loads,
    tokens_of,
    told_step,
)

START_SECONDS = 0.3
MESSAGE_ROUNDS = 7
LEAST_VALUES = 1 << 18
"""Room for messages whose time is measured."""


# ---- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a plan is carried out. num_pages: of each process (pipeline: of both flights together). adapters: PEFT
    directories made for `whole`, dealt to requests in turn with the bare base behind them (tensor only).
    """

    kind: Kind
    folders: tuple[Path, Path]
    settings: ServingSettings
    num_pages: int
    wire: Path
    whole: Path | None = None
    adapters: tuple[Path, ...] = ()

    @property
    def most_values(self) -> int:
        """Numbers of one message."""
        config = ModelConfig.from_directory(self.folders[0])
        rows = max(self.settings.token_budget, MOST_LOGIT_ROWS)
        return max(rows * config.hidden_size, MOST_LOGIT_ROWS * config.vocab_size, LEAST_VALUES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """sums: (bytes, seconds) of an exchange of so many bytes and their sum, from when a process comes to it, so that
    waiting for the other one is in it; gathers: of one after which both hold so many bytes of logits (tensor only).
    piped: seconds of telling a step by a pipe.
    """

    sums: list[tuple[int, float]]
    gathers: list[tuple[int, float]]
    piped: float

    @staticmethod
    def mean_of(all_of_them: Sequence[Messages]) -> Messages:
        """Of both processes, or of several rounds; sizes must be the same."""

        def rows(which: str) -> list[tuple[int, float]]:
            found = zip(*(getattr(one, which) for one in all_of_them))
            return [(same[0][0], fmean(seconds for _, seconds in same)) for same in found]

        return Messages(sums=rows("sums"), gathers=rows("gathers"), piped=fmean(one.piped for one in all_of_them))


class TwoProcesses:
    """Two processes that hold their parts of a model. Use it with `with`."""

    def __init__(self, setting: Setting) -> None:
        context = get_context("spawn")
        self.setting, self._pipes, self._workers = setting, [], []
        between = [context.Pipe() for _ in range(RANKS)]
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            others = tuple(pair[rank] for pair in between)
            worker = context.Process(target=_work, args=(rank, setting, theirs, others), daemon=True)
            worker.start()
            theirs.close()  # else nobody would hear that it has ended
            self._pipes.append(ours)
            self._workers.append(worker)
        try:
            self._answers()
        except BaseException:
            self._end(at_once=True)
            raise

    def __enter__(self) -> TwoProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(at_once=error[0] is not None)

    def _end(self, *, at_once: bool) -> None:
        for pipe, worker in zip(self._pipes, self._workers):
            with suppress(OSError):
                pipe.send(("stop", None))
            worker.join(0 if at_once else 20)
            if worker.is_alive():  # it may wait for the other one, which failed
                worker.kill()
                worker.join()

    def profile(self) -> list[Profile]:
        """Both processes' tables, measured at the same time (data, pipeline), each of the part it holds."""
        return self._ask("profile", [None] * RANKS)

    def serve(self, loads: Sequence[Load]) -> list[Served]:
        """Serves the loads on the real clock; requests in order of arrival."""
        parts: list[list[Load]] = [list(loads), []]
        if self.setting.kind == "data":
            parts = [list(loads[rank::RANKS]) for rank in range(RANKS)]
        began = time.time() + START_SECONDS
        found = self._ask("serve", [(part, began) for part in parts])
        return sorted((one for part in found for one in part), key=lambda one: one.arrival)

    def lora_numbers(self) -> list[tuple[int, int]]:
        """(numbers shown to the other for adapters, bytes of adapters held) of each process."""
        return self._ask("lora_numbers", [None] * RANKS)

    def messages(self, sizes: Sequence[int]) -> Messages:
        """What both processes take to meet, in the mean of the two. sizes: bytes of hidden states to add up."""
        return Messages.mean_of(self._ask("messages", [sizes] * RANKS))

    def _ask(self, what: str, arguments: Sequence[Any]) -> list[Any]:
        for pipe, argument in zip(self._pipes, arguments):
            pipe.send((what, argument))
        return self._answers()

    def _answers(self) -> list[Any]:
        found: dict[int, Any] = {}
        while len(found) < RANKS:
            ready: list[Any] = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in found])
            for pipe in ready:
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    kind, value = "error", "a process of the testbed has ended"
                if kind == "error":
                    raise RuntimeError(value)
                found[self._pipes.index(pipe)] = value
        return [found[rank] for rank in range(RANKS)]


def _work(rank: int, setting: Setting, pipe: Connection, others: tuple[Connection, ...]) -> None:
    """A process of the testbed."""
    import traceback

    try:
        part = _PARTS[setting.kind](rank, setting, others)
        pipe.send(("ready", None))
        while True:
            what, argument = pipe.recv()
            if what == "stop":
                return
            pipe.send(("done", getattr(part, what)(argument)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


class _Part:
    """What all kinds have in common: a model loaded with one thread."""

    def __init__(self, rank: int, setting: Setting, others: tuple[Connection, ...]) -> None:
        self.rank, self.setting, self.others = rank, setting, others
        settings = replace(setting.settings, threads=1)
        self.serving: Serving = load_engine(setting.folders[rank], settings, scheduler=FirstComeFirstServed())
        self.config, self.engine = self.serving.config, self.serving.engine
        executor = self.engine.executor
        assert isinstance(executor, ModelExecutor)
        self.executor = executor
        self.executor.decoder.observer = lambda name, x: None  # all kinds alike: none records its steps
        self.wire = Wire(setting.wire, setting.most_values, rank)

    def profile(self, _: object) -> Profile:
        return profile_engine(self.serving)

    def messages(self, sizes: Sequence[int]) -> Messages:
        found = []
        for size in sizes:
            x, times = np.zeros(max(size // 4, 1), np.float32), []
            for _ in range(40):
                began = time.perf_counter()
                x += self.wire.exchange(x)
                times.append(time.perf_counter() - began)
            found.append((size, float(np.median(times))))
        return Messages(sums=found, gathers=[], piped=self._piped())

    def _piped(self) -> float:
        """Half of the time in which a step is told and told back, both times put together from what came."""
        pipe, trips = self.others[0], []
        told = told_step(entries_of([(0, 0, 1, True, list(range(16)), [0])] * 8))
        for _ in range(40):
            began = time.perf_counter()
            if self.rank == 0:
                pipe.send(told)
                told = told_step(entries_of(pipe.recv()))
            else:
                pipe.send(told_step(entries_of(pipe.recv())))
            trips.append(time.perf_counter() - began)
        return float(np.median(trips)) / 2

    def serve(self, argument: tuple[Sequence[Load], float]) -> list[Served]:
        loads, began = argument
        self.engine.wanted_pages = self.setting.num_pages
        return serve_loads(self.engine, loads, began, self.config.vocab_size)

    def rebuild(self, kind: type[Decoder]) -> Any:
        """A decoder of another class over the same weights."""
        old, settings = self.executor.decoder, self.serving.settings
        old.release()
        self.executor.decoder = kind(
            self.config, old.weights, self.serving.arena, segment_tokens=settings.token_budget,
            logit_rows=min(settings.max_sequences, MOST_LOGIT_ROWS), exact=settings.exact,
            sequences=settings.max_sequences,
        )  # fmt: skip
        return self.executor.decoder


class _Data(_Part):
    pass


class _Tensor(_Part):
    """The first process schedules and tells the second what each step works on."""

    def __init__(self, rank: int, setting: Setting, others: tuple[Connection, ...]) -> None:
        super().__init__(rank, setting, others)
        self._joined = False

    def profile(self, argument: object) -> Profile:
        assert not self._joined, "profile before the parts are joined"
        return super().profile(argument)

    def messages(self, sizes: Sequence[int]) -> Messages:
        """Between a layer's products, as in a step: a process that comes first waits for the other, and the more they
        differ from product to product the longer.
        """
        hidden, sums = self.config.hidden_size, []
        for size in sizes:
            tokens = max(size // (4 * hidden), 1)
            found = [self._sums(tokens) for _ in range(MESSAGE_ROUNDS + 1)]
            sums.append((4 * hidden * tokens, float(np.median(found[1:]))))
        rows = self.config.vocab_size // RANKS
        gathers = []
        for sampled in (1, 4, min(self.setting.settings.max_sequences, MOST_LOGIT_ROWS)):
            half, out = np.zeros((sampled, rows), np.float32), np.empty((sampled, RANKS * rows), np.float32)
            times = []
            for _ in range(MESSAGE_ROUNDS):
                self._sums(1)  # as before the head of a step: what lies in the cache is the layers'
                began = time.perf_counter()
                np.concatenate((half, self.wire.exchange(half)), axis=1, out=out)
                times.append(time.perf_counter() - began)
            gathers.append((out.nbytes, float(np.median(times))))
        return Messages(sums=sums, gathers=gathers, piped=self._piped())

    def _sums(self, tokens: int) -> float:
        """Mean seconds of the sums that a step of so many tokens has, all products between them."""
        config, held, taken = self.config, self.executor.decoder.weights.matrices, 0.0
        widths = (config.hidden_size, config.query_size, config.kv_size, config.intermediate_size)
        hidden, q, kv, filters = (np.zeros((tokens, width), np.float32) for width in widths)
        part, out = np.empty_like(hidden), np.zeros_like(hidden)
        for index in range(config.num_layers):
            layer = Layer(config, self.executor.decoder.weights, index)
            pairs = (
                (hidden, layer.qkv, [q, kv, kv.copy()], q, layer.output),
                (hidden, layer.gate_up, [filters, filters.copy()], filters, layer.down),
            )
            for x, first, outs, inner, second in pairs:
                kernels.linear(x, [held[name] for name in first], outs, exact=self.executor.decoder.exact)
                kernels.linear(inner, [held[second]], [part], exact=self.executor.decoder.exact)
                began = time.perf_counter()
                out += part
                out += self.wire.exchange(part)
                taken += time.perf_counter() - began
        return taken / (2 * config.num_layers)

    def serve(self, argument: tuple[Sequence[Load], float]) -> list[Served]:
        if not self._joined:
            self._join()
        if self.rank == 0:
            plain, pipe = self.executor.run, self.others[0]

            def run(batch: list[Entry]) -> list[Output | None]:
                pipe.send(told_step(batch))
                return plain(batch)

            self.executor.run = run  # type: ignore[method-assign]
            try:
                return super().serve(argument)
            finally:
                del self.executor.run
                pipe.send(None)
        while (told := self.others[0].recv()) is not None:
            self.executor.run(entries_of(told))
        return []

    def _join(self) -> None:
        with Checkpoint(self.setting.folders[self.rank], self.config) as checkpoint:
            rows = self.config.vocab_size // RANKS
            values = checkpoint.tensor(EMBEDDING)[self.rank * rows : (self.rank + 1) * rows].astype(np.float32)
        spec = self.executor.decoder.weights.matrices[HEAD].spec
        decoder = self.rebuild(TensorDecoder)
        decoder.join(self.wire, kernels.matrix(codec(spec).encode(values)), rows)
        if self.setting.adapters:
            assert self.setting.whole is not None
            whole = ModelConfig.from_directory(self.setting.whole)
            adapters = [LoraWeights.read(folder, whole) for folder in self.setting.adapters]
            decoder.parts = LoraParts(adapters, whole, self.wire, self.serving.arena)
            self.executor.assign = self._deal  # type: ignore[method-assign]
        if self.rank == 1:
            hold_all(self.engine, self.setting.num_pages)
        self._joined = True

    def _deal(self, batch: list[Entry]) -> None:
        """Instead of the executor's own: which rows have which adapter."""
        segments, row = [], 0
        for entry in batch:
            which = entry.sequence.id % (len(self.setting.adapters) + 1)
            if which < len(self.setting.adapters):
                segments.append((row, entry.count, which))
            row += entry.count
        parts = self.executor.decoder.parts  # type: ignore[attr-defined]
        parts.assign(segments)

    def lora_numbers(self, _: object) -> tuple[int, int]:
        parts = self.executor.decoder.parts  # type: ignore[attr-defined]
        return parts.sent_numbers, parts.nbytes


class _Pipeline(_Part):
    """The first process holds the schedulers of both flights, each in a thread; the second works what comes."""

    def profile(self, argument: object) -> Profile:
        return super().profile(argument)

    def serve(self, argument: tuple[Sequence[Load], float]) -> list[Served]:
        decoder = self.executor.decoder
        if not isinstance(decoder, StageDecoder):
            decoder = self.rebuild(StageDecoder)
            self._flights = [self._flight(number) for number in range(RANKS)]
        return self._lead(decoder, *argument) if self.rank == 0 else self._follow(decoder)

    def _flight(self, number: int) -> tuple[Engine, ModelExecutor]:
        settings, pages = self.serving.settings, self.setting.num_pages // RANKS
        pool = PagePool(
            f"kv/flight {number}", page_bytes=self.engine.pages.pool.page_bytes, most_pages=pages,
            arena=self.serving.arena,
        )  # fmt: skip
        held = KVPages(pool, settings.page_tokens, keep_prefixes=False)
        executor = ModelExecutor(
            self.executor.decoder, BatchCache(cache_shape(self.config), pool, settings.page_tokens, settings.kv),
            logit_rows=min(settings.max_sequences, MOST_LOGIT_ROWS),
            scratch=np.empty(Sampler.scratch_shape(self.config.vocab_size), np.float32),
        )  # fmt: skip
        engine = Engine(
            FirstComeFirstServed(), executor, held, limits=settings.limits, context_tokens=self.serving.context_tokens
        )
        if self.rank == 1:
            hold_all(engine, pages)
        return engine, executor

    def _lead(self, decoder: StageDecoder, loads: Sequence[Load], began: float) -> list[Served]:
        lock = threading.Lock()
        found: list[list[Served]] = [[], []]
        faults: list[BaseException] = []

        def flight(number: int) -> None:
            engine, executor = self._flights[number]
            area, pipe, hidden_size = self.wire.area(number), self.others[number], self.config.hidden_size

            def run(batch: list[Entry]) -> list[Output | None]:
                order = sorted(range(len(batch)), key=lambda i: batch_order(batch[i]))
                entries = [batch[i] for i in order]
                with lock:
                    positions = executor.cache.begin(entries)
                    hidden = decoder.enter(tokens_of(entries))
                    decoder.go_on(hidden, positions, executor.cache, last=False)
                    area[: len(hidden) * hidden_size] = hidden.ravel()
                pipe.send(told_step(entries))
                outputs: list[Output | None] = [None] * len(batch)
                for place, token in zip(order, pipe.recv()):
                    outputs[place] = None if token is None else Output(token)
                return outputs

            executor.run = run  # type: ignore[method-assign]
            try:
                found[number] = serve_loads(engine, loads[number::RANKS], began, self.config.vocab_size)
            except BaseException as error:
                faults.append(error)
            finally:
                pipe.send(None)

        threads = [threading.Thread(target=flight, args=(number,)) for number in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]
        return [*found[0], *found[1]]

    def _follow(self, decoder: StageDecoder) -> list[Served]:
        live: dict[Any, int] = {pipe: number for number, pipe in enumerate(self.others)}
        while live:
            ready: list[Any] = wait(list(live))
            for pipe in ready:
                number = live[pipe]
                told = pipe.recv()
                if told is None:
                    del live[pipe]
                    continue
                executor, entries = self._flights[number][1], entries_of(told)
                positions = executor.cache.begin(entries)
                area = self.wire.area(number)[: len(positions) * self.config.hidden_size]
                hidden = decoder.go_on(area.reshape(len(positions), -1).copy(), positions, executor.cache, last=True)
                pipe.send(self._draw(decoder, hidden, entries))
        return []

    def _draw(self, decoder: StageDecoder, hidden: np.ndarray, entries: list[Entry]) -> list[int | None]:
        lasts = np.cumsum([entry.count for entry in entries]) - 1
        asking = [place for place, entry in enumerate(entries) if entry.sample]
        tokens: list[int | None] = [None] * len(entries)
        rows = min(self.serving.settings.max_sequences, MOST_LOGIT_ROWS)
        for begin in range(0, len(asking), rows):
            some = asking[begin : begin + rows]
            logits = decoder.logits(np.ascontiguousarray(hidden[lasts[some]]))
            for place, row in zip(some, logits):
                tokens[place] = int(row.argmax())
        return tokens


_PARTS: dict[str, type[_Part]] = {"data": _Data, "tensor": _Tensor, "pipeline": _Pipeline}
