"""Measures what iterations cost at several shares, alone and beside each other, and fits the cost model to it.

The same few measurements run on real workers and on virtual ones. Nothing else may run in the engine meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence as Batch

from memwall.engine.base import Phase, Shares
from memwall.engine.executor import Entry
from memwall.engine.phase_costs import Costs, Demand, Operator, fit_contention, fit_operator
from memwall.engine.phase_device import ModelSize
from memwall.engine.phased import Done, PhasedEngine
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import Serving
from memwall.errors import InputError
from memwall.models.config import ModelConfig

SHARES = (20, 50, 75, 100)
REPEATS = 1
LEAST_SECONDS = 0.06
MOST_BESIDE = 64
Spec = Batch[tuple[int, int]]
"""(first, count) of each sequence."""


def size_of(config: ModelConfig, weight_bytes: int, kv_bytes: int) -> ModelSize:
    """What an iteration of a model reads and computes. weight_bytes: as they are held; kv_bytes: of one token."""
    products = sum(tensor.size for tensor in config.tensors() if len(tensor.shape) == 2 and "embed" not in tensor.name)
    return ModelSize(
        parameters=max(products, 1),
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        attention_flop=4 * config.num_layers * config.num_heads * config.head_dim,
    )


class Probe:
    """Runs batches that are made up on an engine's workers."""

    def __init__(self, engine: PhasedEngine) -> None:
        if engine.busy:
            raise InputError("costs are measured before requests come")
        self.engine = engine

    def alone(self, phase: Phase, spec: Spec, percent: int) -> float:
        """Seconds of an iteration by itself: the mean of so many that a quota's saved time has no part in it."""
        workers, batch, clock = self.engine.workers, self._batch(spec), self.engine.clock
        workers.switch(Shares(prefill=percent, decode=percent))
        ends: list[float] = []
        began = clock()
        while len(ends) < 1 + REPEATS or ends[-1] - began < LEAST_SECONDS:
            workers.start(phase, batch)
            self._next()
            ends.append(clock())
        self._release(batch)
        skipped = max(len(ends) // 4, 1)
        return (ends[-1] - ends[skipped - 1]) / (len(ends) - skipped)

    def beside(self, prefill: Spec, decode: Spec, shares: Shares) -> float:
        """Mean seconds of decode's iterations while one of prefill goes on."""
        workers, chunk, batch = self.engine.workers, self._batch(prefill), self._batch(decode)
        workers.switch(shares)
        workers.start("prefill", chunk)
        workers.start("decode", batch)
        found: list[float] = []
        while workers.busy:
            over = {done.phase: done for done in self._next()}
            if "decode" in over:
                found.append(over["decode"].seconds)
                if "prefill" not in over and len(found) < MOST_BESIDE:
                    workers.start("decode", batch)
            if "prefill" in over and workers.busy:
                last = self._next()
                if not found:
                    found.append(last[0].seconds)
        self._release(chunk)
        self._release(batch)
        return sum(found) / len(found)

    def _next(self) -> list[Done]:
        while not (found := self.engine.workers.collect()):
            pass
        return found

    def _batch(self, spec: Spec) -> list[Entry]:
        found = []
        for number, (first, count) in enumerate(spec):
            one = Sequence(id=-1 - number, request=Request(prompt=(5,) * (first + count)), arrival=0.0, eos=())
            one.pages = self.engine.pages.take(self.engine.limits.pages(first + count))
            found.append(Entry(one, first, count, False))
        return found

    def _release(self, batch: list[Entry]) -> None:
        for entry in batch:
            self.engine.pages.release(entry.sequence.pages)


def profile(engine: PhasedEngine, size: ModelSize, *, contention: bool = True) -> Costs:
    """The cost model of these workers. contention: also fit how far prefill's bytes slow decode down."""
    probe, limits = Probe(engine), engine.limits
    shares = engine.workers.shares
    room = min(engine.context_tokens - 1, engine.pages.available_pages * limits.page_tokens // 2)
    chunk = min(limits.token_budget, max(room // 2, 1))
    long = max(room - chunk - limits.page_tokens, 1)
    rows = max(min(limits.max_sequences, 8, engine.pages.available_pages // max(limits.pages(long + 1), 1)), 1)
    most = max(min(limits.max_sequences, engine.pages.available_pages), 1)
    try:
        costs = Costs(
            size=size,
            contention=0.0,
            **_operators(probe, size, "prefill", [[(0, max(chunk // 4, 1))], [(0, chunk)]], [(long, chunk)]),
            **_operators(probe, size, "decode", [[(1, 1)], [(1, 1)] * most, [(1, 1)] * rows], [(long, 1)] * rows),
        )
        if not contention:
            return costs
        points = []
        for first in (0, long):
            chunks, tokens = [(first, chunk)], [(long // 2, 1)] * rows
            for percent in (50, 70):
                pair = Shares(prefill=percent, decode=100 - percent)
                seconds = probe.beside(chunks, tokens, pair)
                demand = Demand.of(chunks, [first + 1 for first, _ in tokens])
                points.append((demand, percent / 100, 1 - percent / 100, seconds))
        return fit_contention(costs, points)
    finally:
        engine.workers.switch(shares)


def profile_serving(serving: Serving) -> Costs:
    """The cost model of a loaded model on this machine; seconds for a large one."""
    engine = serving.engine
    if not isinstance(engine, PhasedEngine):
        raise InputError("costs of two phases are measured on an engine with two workers")
    weight_bytes = sum(row.nbytes for row in serving.ledger.rows() if row.owner.startswith("weights"))
    serving.govern()
    engine.fit_limit()
    return profile(engine, size_of(serving.config, weight_bytes, serving.pool.page_bytes // engine.limits.page_tokens))


def _operators(probe: Probe, size: ModelSize, phase: Phase, short: Batch[Spec], long: Spec) -> dict[str, Operator]:
    """Dense operators from iterations that attend to little, attention from what more of it adds to the last."""
    few = [Demand.of(spec, []) for spec in short]
    many = Demand.of(long, [])
    pairs, reads = many.prefill_pairs - few[-1].prefill_pairs, many.prefill_kv - few[-1].prefill_kv
    dense, attention = [], []
    for percent in SHARES:
        seconds, share = [probe.alone(phase, spec, percent) for spec in short], percent / 100
        more = max(probe.alone(phase, long, percent) - seconds[-1], 1e-9)
        attention.append((size.attention_flop * pairs, float(size.kv_bytes * reads), share, more))
        for demand, took in zip(few, seconds):
            flop = 2.0 * size.parameters * demand.prefill_tokens
            own = max(took - more * demand.prefill_pairs / pairs, 0.1 * took)
            dense.append((flop, float(size.weight_bytes), share, own))
    return {f"{phase}_dense": fit_operator(dense), f"{phase}_attention": fit_operator(attention)}
