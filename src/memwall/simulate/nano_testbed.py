"""Measures nano-batches on this machine: what classes of work cost alone and beside each other, and what a pipeline
gains, for one process, or for two that hold a half of the model each with an emulated link between them.

A batch is `rows` sequences that decode, with `context` tokens of cache each, all in pages of their own: what a layer's
attention reads comes from memory wherever that is more than the processor's last level holds.

Units: seconds of one forward pass, shares of the speed with all threads. Ways to run a batch: `whole` operations one
after another, `parts` of them one after another, parts that `overlap`.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memwall import kernels
from memwall._native import set_lane_threads
from memwall.engine.batch import ModelExecutor
from memwall.engine.executor import Entry
from memwall.engine.nano_batches import NanoDecoder, Plan, Ran, alternating, in_blocks, nano_decoder, two_phases
from memwall.engine.nano_schedule import Interference, Resource, Schedule
from memwall.engine.nano_wire import Link, SharedWire, wire_pair
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.engine.sequence import Sequence as Running
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.simulate.nano_pipeline import Pipeline, carry_out

Way = Literal["whole", "parts", "overlap"]
OWN_CORES: dict[Resource, int] = {"compute": 1, "memory": 1}
EVERYTHING: dict[Resource, int] = {}


@dataclass(slots=True)
class Bench:
    """A model and a batch of it. network: the half of a model, whose wire is given to `way`."""

    model: Path
    rows: int = 16
    most_context: int = 8192
    threads: int = 2
    serving: Serving = field(init=False)
    decoder: NanoDecoder = field(init=False)
    _pages: list[list[int]] = field(init=False)
    _batch: list[Entry] = field(init=False)

    def __post_init__(self) -> None:
        settings = ServingSettings(
            weights="int8", context_tokens=min(self.most_context, 256), token_budget=max(self.rows, 16),
            max_sequences=self.rows, threads=self.threads, keep_prefixes=False, swap_bytes=0,
        )  # fmt: skip
        self.serving = load_engine(self.model, settings)
        engine, limits = self.serving.engine, self.serving.engine.limits
        each = limits.pages(self.most_context + 1)
        engine.wanted_pages = self.rows * each
        self.serving.pool.set_limit(engine.wanted_pages)
        self._pages = [engine.pages.take(each) for _ in range(self.rows)]
        # written, so that it is there; small numbers of both signs
        whole = self.serving.pool.array((1,), np.dtype(np.float16))
        noise = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float16)
        for at in range(0, len(whole), len(noise)):
            piece = whole[at : at + len(noise)]
            piece[...] = noise[: len(piece), None]
        self.decoder = nano_decoder(self.serving, alternating(1))
        self._batch = []
        for number in range(self.rows):
            one = Running(id=number, request=Request(prompt=(7,), sampling=Sampling()), arrival=0.0, eos=())
            self._batch.append(Entry(one, 0, 1, False))
        self.set_context(1)

    def set_context(self, tokens: int) -> None:
        """Every sequence decodes after so many tokens."""
        count = self.serving.engine.limits.pages(tokens + 1)
        for at, entry in enumerate(self._batch):
            one = entry.sequence
            one.pages = self._pages[at][:count]
            one.tokens = [8 + (31 * at + n) % 500 for n in range(tokens + 1)]
            self._batch[at] = Entry(one, tokens, 1, False)

    def way(
        self, way: Way, lanes: dict[Resource, int] | None = None, schedule: Schedule | None = None,
        wire: SharedWire | None = None,
    ) -> None:  # fmt: skip
        """How batches run from now on. schedule: None for two halves that suit what is there."""
        network = wire is not None
        if way == "whole":
            schedule = alternating(1, network=network)
        elif schedule is None:
            schedule = in_blocks(2, network=True) if network else two_phases()
        self.decoder.pipeline(schedule, overlap=way == "overlap", lanes=lanes, wire=wire)

    def step(self) -> np.ndarray:
        """One forward pass: hidden states [rows, H]."""
        executor = self.serving.engine.executor
        assert isinstance(executor, ModelExecutor)
        positions = executor.cache.begin(self._batch)
        tokens = [entry.sequence.tokens[entry.first] for entry in self._batch]
        return self.decoder.batch(np.array(tokens, np.int64), positions, executor.cache)

    def seconds(self, steps: int) -> float:
        """Median of some passes."""
        found = []
        for _ in range(steps):
            began = time.perf_counter()
            self.step()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def by_class(self, passes: int = 3) -> dict[Resource, float]:
        """Seconds of a pass that each class' operations took; of the quickest of some."""
        found: list[dict[Resource, float]] = []
        for _ in range(passes):
            trace: list[Ran] = []
            self.decoder.trace = trace
            self.step()
            self.decoder.trace = None
            sums: dict[Resource, float] = {}
            for ran in trace:
                name = ran.operation.resource
                sums[name] = sums.get(name, 0.0) + ran.end - ran.start
            found.append(sums)
        return min(found, key=lambda sums: sum(sums.values()))

    def overlapped(self) -> float:
        """Of a pass, the share of time in which two classes ran."""
        trace: list[Ran] = []
        self.decoder.trace = trace
        self.step()
        self.decoder.trace = None
        moments = sorted([(ran.start, 1) for ran in trace] + [(ran.end, -1) for ran in trace])
        both, running, before = 0.0, 0, moments[0][0]
        for at, change in moments:
            both += (at - before) * (running > 1)
            running, before = running + change, at
        return both / (moments[-1][0] - moments[0][0])

    def release(self) -> None:
        """Gives everything back."""
        self.serving.release()


def paired(ways: dict[str, Callable[[], None]], bench: Bench, *, rounds: int, steps: int = 1) -> dict[str, float]:
    """Median seconds of each way, taken in turns; each function sets its way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, prepare in ways.items():
            prepare()
            seconds = bench.seconds(steps)
            if number:  # the first round warms up
                found[name].append(seconds)
    return {name: statistics.median(times) for name, times in found.items()}


# ---- classes beside each other ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Speeds of both with so many threads each, beside each other, as shares of each alone with all of them."""

    compute_threads: int
    memory_threads: int
    compute: float
    memory: float
    spread: float


def pairwise_speeds(bench: Bench, context: int, *, seconds: float = 0.5, rounds: int = 3) -> list[Pair]:
    """Products of a layer beside decode attention of a batch, for all quotas of threads."""
    bench.set_context(context)
    bench.way("whole")
    bench.step()
    decoder, total = bench.decoder, kernels.num_threads()
    layer, rows = decoder._layers[0], slice(0, bench.rows)

    def products() -> None:
        decoder._do_up_gate(0, layer, rows)

    def attention() -> None:
        decoder._do_attend(0, layer, rows)

    alone = {"c": _rate(products, total, seconds), "m": _rate(attention, total, seconds)}
    found = []
    for compute in range(1, total + 1):
        for memory in range(1, total + 1):
            both = [_beside(products, compute, attention, memory, seconds) for _ in range(rounds)]
            speeds = [(c / alone["c"], m / alone["m"]) for c, m in both]
            c, m = (statistics.median(one[at] for one in speeds) for at in (0, 1))
            spread = max(
                statistics.pstdev(one[at] for one in speeds) / max(mean, 1e-9) for at, mean in ((0, c), (1, m))
            )
            found.append(Pair(compute_threads=compute, memory_threads=memory, compute=c, memory=m, spread=spread))
    return found


def own_core_speeds(bench: Bench, context: int, *, seconds: float = 0.5) -> tuple[float, float]:
    """Speeds of products and of attention beside each other, a thread each, as shares of each alone with one thread."""
    bench.set_context(context)
    bench.way("whole")
    bench.step()
    decoder, layer, rows = bench.decoder, bench.decoder._layers[0], slice(0, bench.rows)

    def products() -> None:
        decoder._do_up_gate(0, layer, rows)

    def attention() -> None:
        decoder._do_attend(0, layer, rows)

    alone = (_rate(products, 1, seconds), _rate(attention, 1, seconds))
    both = _beside(products, 1, attention, 1, seconds)
    return both[0] / alone[0], both[1] / alone[1]


def predicted_seconds(bench: Bench, compute: float, memory: float) -> float:
    """What a pass of `two_phases` on own cores will take, by the virtual device: from what its parts take one after
    another and the speeds that classes keep beside each other.
    """
    bench.way("parts", OWN_CORES)
    bench.step()
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(3):
        bench.decoder.trace = []
        bench.step()
        for ran in bench.decoder.trace:
            times.setdefault((ran.operation.name, ran.operation.first), []).append(ran.end - ran.start)
    bench.decoder.trace = None
    plan = Plan.of(two_phases(), bench.rows, bench.rows, network=False)
    # a layer's products lose 1 - compute to attention beside them, which keeps `memory`
    lost = min(max(1 - compute, 0.0), 0.99)
    table = Interference(
        shares=(0.0, max(lost, 1e-3), 1.0), memory=(0.0, min(max(memory, 1e-3), 1.0), 1.0), network=(0.0, 0.5, 1.0),
        source="measured on this machine",
    )  # fmt: skip
    pipeline = Pipeline(
        operations=plan.operations,
        seconds=tuple(statistics.median(times[one.name, one.first]) for one in plan.operations),
        shares=tuple(1.0 if one.resource == "compute" else max(lost, 1e-3) for one in plan.operations),
        order=plan.turns,
        edges=tuple(edge for edges in plan.parents for edge in edges),
    )
    return carry_out(pipeline, table, layers=bench.serving.config.num_layers).seconds


def undominated(pairs: Sequence[Pair]) -> list[Pair]:
    """Those that no other one beats at both."""
    return [
        one for one in pairs
        if not any(two.compute > one.compute and two.memory > one.memory for two in pairs)
    ]  # fmt: skip


def interference_of(pairs: Sequence[Pair]) -> Interference:
    """P(R) from measured pairs: R is what products lose."""
    points = {0.0: 0.0, 1.0: 1.0}
    for one in sorted(undominated(pairs), key=lambda pair: 1 - pair.compute):
        share = round(min(max(1 - one.compute, 0.01), 0.99), 3)
        points[share] = max(min(one.memory, 1.0), max(p for r, p in points.items() if r < share))
    shares = tuple(sorted(points))
    return Interference(
        shares=shares, memory=tuple(points[r] for r in shares),
        network=tuple(0.0 if r == 0 else 1.0 for r in shares), source="measured on this machine",
    )  # fmt: skip


def _rate(work: Callable[[], None], lane: int, seconds: float, stop: threading.Event | None = None) -> float:
    set_lane_threads(lane)
    try:
        work()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds and not (stop is not None and stop.is_set()):
            work()
            count += 1
        return count / (time.perf_counter() - began)
    finally:
        set_lane_threads(0)


def _beside(
    one: Callable[[], None], lane: int, other: Callable[[], None], other_lane: int, seconds: float
) -> tuple[float, float]:
    found: dict[str, float] = {}
    thread = threading.Thread(target=lambda: found.update(other=_rate(other, other_lane, seconds)))
    thread.start()
    found["one"] = _rate(one, lane, seconds)
    thread.join()
    return found["one"], found["other"]


# ---- two processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What both processes are to do: steps of a way over a link. rounds: medians of so many passes."""

    way: Way
    link: Link
    context: int = 64
    rounds: int = 5


class TwoHalves:
    """The halves of a model in this process and a forked one, one processor thread for each."""

    def __init__(self, halves: tuple[Path, Path], *, rows: int = 16, most_context: int = 256) -> None:
        context = multiprocessing.get_context("fork")
        self._ends = wire_pair(1 << 20, Link())
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_follow, args=(halves[1], rows, most_context, self._ends, (self._pipe, theirs)), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ends[1].close()
        try:
            self.bench = Bench(halves[0], rows=rows, most_context=most_context, threads=1)
        except BaseException:
            self._process.kill()
            raise

    def ask(self, asked: Asked) -> tuple[float, float, np.ndarray]:
        """Seconds of a pass, of which the wire kept its stream waiting, and the hidden states."""
        self._pipe.send(asked)
        found = _passes(self.bench, self._ends[0], asked)
        theirs = self._pipe.recv()
        assert np.array_equal(found[2], theirs), "both halves hold the same hidden states"
        return found

    def __enter__(self) -> TwoHalves:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
        self.bench.release()


def _passes(bench: Bench, wire: SharedWire, asked: Asked) -> tuple[float, float, np.ndarray]:
    bench.set_context(asked.context)
    wire.link = asked.link
    lanes: dict[Resource, int] = {"compute": 1, "memory": 1, "network": 1}
    bench.way(asked.way, lanes, wire=wire)
    bench.step()
    before = wire.waited_seconds
    seconds = bench.seconds(asked.rounds)
    return seconds, (wire.waited_seconds - before) / asked.rounds, bench.step().copy()


def _follow(
    half: Path, rows: int, most_context: int, ends: tuple[SharedWire, SharedWire], pipes: tuple[Connection, Connection]
) -> None:
    ends[0].close()
    pipes[0].close()  # else nothing would tell that the other process has ended
    pipe = pipes[1]
    bench: Any = Bench(half, rows=rows, most_context=most_context, threads=1)
    try:
        while (asked := pipe.recv()) is not None:
            pipe.send(_passes(bench, ends[1], asked)[2])
    except (EOFError, ConnectionError):
        pass
    finally:
        os._exit(0)
