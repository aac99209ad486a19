"""Profile tables of this machine's own engine, in the form that `tables` reads.

The model is loaded as it will be served, and its operations are timed one by one, layer after layer, so that weights
come from where they come from in a real step: products for 1 to 128 tokens, attention over pages for batches that
decode and for prompts, sampling. Then whole steps of the engine are timed for as many tokens; what the operations do
not explain (norms, the step loop, Python) are the rows `passes`, `step` and `embedding` of `pass.csv`.

Medians of a few rounds: a run meets the machine as it usually is.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from memwall import kernels
from memwall.engine.base import RequestView
from memwall.engine.batch import ModelExecutor
from memwall.engine.executor import Entry
from memwall.engine.sampling import Sampler, Sampling
from memwall.engine.sequence import Request
from memwall.engine.sequence import Sequence as Running
from memwall.engine.serving import MOST_LOGIT_ROWS, Serving
from memwall.errors import InputError
from memwall.hardware.system import write_whole
from memwall.models.config import HEAD
from memwall.models.decode import Layer
from memwall.models.decoder import BLOCK_ROWS
from memwall.simulate.serving_model import Formats
from memwall.simulate.tables import AttentionTable, Curve, along

TOKENS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 20, 24, 32, 33, 48, 64, 96, 128)
"""Closer where the kernels go over to another tile: 9 tokens take a third longer than 8, as do 33 than 32."""
CONTEXTS = (32, 128, 512, 1024)
QUERIES = (16, 64, 128, 256)
ROUNDS = 7
ACTIVATIONS = "float32"
"""What the CPU engine's activations are; products over packed weights round them on the way."""
GPU = "host"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rows of the tables; times in seconds. gemm: (m, k, n, t); attention: (batch, queries, keys, t); passes: (name,
    rows, t).
    """

    formats: Formats
    head_size: int
    heads: int
    kv_heads: int
    gemm: list[tuple[int, int, int, float]]
    attention: list[tuple[int, int, int, float]]
    passes: list[tuple[str, int, float]]

    def write(self, folder: Path) -> list[Path]:
        """gemm.csv, attention.csv and pass.csv; each appears whole."""
        folder.mkdir(parents=True, exist_ok=True)
        dtype, attended = self.formats.compute, self.formats.attention
        shape = (self.head_size, self.heads, self.kv_heads)
        return [
            _put(
                folder / "gemm.csv",
                ("gpu", "dtype", "m", "k", "n", "time(us)"),
                [(GPU, dtype, m, k, n, _us(t)) for m, k, n, t in self.gemm],
            ),
            _put(
                folder / "attention.csv",
                ("gpu", "dtype", "head_size", "heads", "kv_heads", "batch", "queries", "seq_len", "time(us)"),
                [(GPU, attended, *shape, batch, queries, keys, _us(t)) for batch, queries, keys, t in self.attention],
            ),
            _put(
                folder / "pass.csv",
                ("gpu", "name", "rows", "time(us)"),
                [(GPU, name, rows, _us(t)) for name, rows, t in self.passes],
            ),
        ]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3f}"


def _put(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
    return path


def profile_engine(serving: Serving, *, rounds: int = ROUNDS, progress: Progress | None = None) -> Profile:
    """Times a loaded model's operations and steps. The engine must be idle; it is idle and empty afterwards.

    InputError for a model of experts, whose steps depend on what the tokens are.
    """
    if serving.config.num_experts:
        raise InputError("a model of experts cannot be profiled here: its steps depend on the tokens")
    if serving.engine.busy:
        raise InputError("the engine works on requests; profile it before any come")
    work = _Work(serving, rounds)
    stages = (("products", work.products), ("attention", work.attention), ("steps", work.steps))
    for number, (name, measure) in enumerate(stages):
        if progress is not None:
            progress(number, len(stages), name)
        measure()
    config = serving.config
    return Profile(
        formats=Formats(weights=_format_of(serving), kv="float16", activations=ACTIVATIONS),
        head_size=config.head_dim,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        gemm=work.gemm_rows,
        attention=work.attention_rows,
        passes=work.pass_rows,
    )


def _format_of(serving: Serving) -> str:
    """The format that most of the weights have."""
    executor = serving.engine.executor
    assert isinstance(executor, ModelExecutor)
    specs = list(executor.decoder.weights.specs.values())
    return max(set(specs), key=specs.count)


class _Work:
    """Measurements over one engine."""

    def __init__(self, serving: Serving, rounds: int) -> None:
        executor = serving.engine.executor
        assert isinstance(executor, ModelExecutor)
        self.serving, self.engine, self.rounds = serving, serving.engine, rounds
        self.config, self.decoder, self.cache = serving.config, executor.decoder, executor.cache
        self.layers = [Layer(self.config, self.decoder.weights, at) for at in range(self.config.num_layers)]
        self.most_tokens = self.engine.limits.token_budget
        self.most_context = serving.context_tokens
        self.gemm_rows: list[tuple[int, int, int, float]] = []
        self.attention_rows: list[tuple[int, int, int, float]] = []
        self.pass_rows: list[tuple[str, int, float]] = []
        self._products, self._submitted = self._names(), 0
        serving.govern()
        self.engine.fit_limit()

    # ---- products ----------------------------------------------------------------------------------------------

    def products(self) -> None:
        """All of a layer's products, one layer after another; then the head's, and sampling."""
        random = np.random.default_rng(0)
        for tokens in [n for n in TOKENS if n <= min(BLOCK_ROWS, self.most_tokens)]:
            inputs, outs = self._room(tokens)
            for x in inputs:
                random.standard_normal(out=x, dtype=np.float32)
            taken = [self._layer_pass(inputs, outs) for _ in range(self.rounds + 1)]
            for (_, sizes, k), seconds in zip(self._products, np.median(taken[1:], axis=0)):
                self.gemm_rows.append((sum(sizes), k, tokens, float(seconds)))
        most = min(self.engine.limits.max_sequences, MOST_LOGIT_ROWS)
        for sampled in [n for n in TOKENS if n <= most]:
            self._head(sampled, random.standard_normal((sampled, self.config.hidden_size), np.float32))

    def _names(self) -> list[tuple[Callable[[Layer], list[str]], list[int], int]]:
        config = self.config
        return [
            (lambda layer: layer.qkv, [config.query_size, config.kv_size, config.kv_size], config.hidden_size),
            (lambda layer: [layer.output], [config.hidden_size], config.query_size),
            (lambda layer: layer.gate_up, [config.intermediate_size] * (2 if config.gated else 1), config.hidden_size),
            (lambda layer: [layer.down], [config.hidden_size], config.intermediate_size),
        ]

    def _layer_pass(self, inputs: list[np.ndarray], outs: list[list[np.ndarray]]) -> np.ndarray:
        """Mean seconds of each product over all layers."""
        return np.mean([self._layer_products(layer, inputs, outs) for layer in self.layers], axis=0)

    def _layer_products(self, layer: Layer, inputs: list[np.ndarray], outs: list[list[np.ndarray]]) -> list[float]:
        """Seconds of each product of one layer."""
        taken, held, clock = [], self.decoder.weights.matrices, time.perf_counter
        for (name, _, _), x, out in zip(self._products, inputs, outs):
            matrices = [held[each] for each in name(layer)]
            began = clock()
            kernels.linear(x, matrices, out, exact=self.decoder.exact)
            taken.append(clock() - began)
        return taken

    def _head(self, sampled: int, hidden: np.ndarray) -> None:
        head, out = self.decoder.weights.matrices[HEAD], np.empty((sampled, self.config.vocab_size), np.float32)
        sampler = Sampler(Sampling(), np.empty(Sampler.scratch_shape(self.config.vocab_size), np.float32))
        products, picks, room = [], [], self._room(1)
        for _ in range(self.rounds):
            self._layer_pass(*room)  # the head's weights are not in a cache when a step comes to them
            began = time.perf_counter()
            kernels.linear(hidden, [head], [out], exact=self.decoder.exact)
            products.append(time.perf_counter() - began)
            began = time.perf_counter()
            for row in out:
                sampler.pick(row)
            picks.append(time.perf_counter() - began)
        self.gemm_rows.append((self.config.vocab_size, self.config.hidden_size, sampled, median(products)))
        self.pass_rows.append(("sample", sampled, median(picks)))

    def _room(self, tokens: int) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Inputs (zero) and outputs of a layer's products for so many tokens."""
        inputs = [np.zeros((tokens, k), np.float32) for _, _, k in self._products]
        return inputs, [[np.empty((tokens, m), np.float32) for m in sizes] for _, sizes, _ in self._products]

    # ---- attention ---------------------------------------------------------------------------------------------

    def attention(self) -> None:
        """Over pages of the pool, as a step sees them."""
        pages = self.engine.pages.available_pages
        room = pages * self.engine.limits.page_tokens
        contexts = [n for n in CONTEXTS if n < self.most_context] or [self.most_context // 2]
        most = min(self.engine.limits.max_sequences, self.most_tokens)
        for batch in [n for n in TOKENS if n <= most]:
            for context in [n for n in contexts if batch * (n + self.engine.limits.page_tokens) <= room]:
                self.attention_rows.append((batch, 1, context, self._attend([(context - 1, 1)] * batch)))
        for queries in [n for n in QUERIES if n <= self.most_tokens]:
            for keys in sorted({queries, *(n for n in contexts if n > queries)}):
                if keys <= min(self.most_context, room):
                    self.attention_rows.append((1, queries, keys, self._attend([(keys - queries, queries)])))

    def _attend(self, parts: list[tuple[int, int]]) -> float:
        """Seconds of one layer's attention for (first, count) of each sequence, a layer's products before each: its
        keys come from where they come from in a step, which reads all weights from one step's attention to the next.
        """
        config, room = self.config, self._room(1)
        entries = []
        for number, (first, count) in enumerate(parts):
            one = Running(id=number, request=Request(prompt=(0,)), arrival=0.0, eos=())
            one.pages = self.engine.pages.take(self.engine.limits.pages(first + count))
            entries.append(Entry(one, first, count, True))
        positions = self.cache.begin(entries)
        rows = len(positions)
        q = np.random.default_rng(1).standard_normal((rows, config.num_heads, config.head_dim), np.float32)
        out, found = np.empty_like(q), []
        keys = np.full((rows, config.num_kv_heads, config.head_dim), 0.5, np.float32)
        for _ in range(self.rounds):
            taken = 0.0
            for layer in range(config.num_layers):
                self._layer_products(self.layers[layer], *room)
                self.cache.append(layer, keys, keys, positions)
                began = time.perf_counter()
                for at in range(0, rows, BLOCK_ROWS):
                    end = min(at + BLOCK_ROWS, rows)
                    self.cache.attend(layer, q[at:end], positions[at:end], out[at:end])
                taken += time.perf_counter() - began
            found.append(taken / config.num_layers)
        for entry in entries:
            self.engine.pages.release(entry.sequence.pages)
        return median(found)

    # ---- whole steps -------------------------------------------------------------------------------------------

    def steps(self) -> None:
        """What the operations leave unexplained: of a block by tokens, of the step around all blocks by requests and,
        for prompts, by tokens (in the row `embedding`, whose look-up it holds).
        """
        self.pass_rows.append(("embedding", 1, 0.0))
        most, around = min(self.engine.limits.max_sequences, self.most_tokens), 0.0
        for batch in [n for n in TOKENS if n <= most]:
            blocks, rest = self._decode_step(batch)
            around = max(rest, 0.0) if batch == 1 else around
            self.pass_rows.append(("passes", batch, max(blocks / self.config.num_layers, 0.0)))
            self.pass_rows.append(("step", batch, max(rest, 0.0)))
        for tokens in [n for n in (16, 64, 128, 256) if n <= min(self.most_tokens, self.most_context - 1)]:
            blocks, rest = self._prompt_step(tokens)
            self.pass_rows.append(("passes", tokens, max(blocks / self.config.num_layers, 0.0)))
            # what a prompt's tokens add to the step of one request
            self.pass_rows.append(("embedding", tokens, max(rest - around, 0.0)))

    def _timed_step(self) -> tuple[float, float]:
        """(seconds of a step, of it in the blocks)."""
        inside, plain = 0.0, self.decoder.batch

        def timed(*arguments: Any) -> np.ndarray:
            nonlocal inside
            began = time.perf_counter()
            found = plain(*arguments)
            inside += time.perf_counter() - began
            return found

        self.decoder.batch = timed  # type: ignore[method-assign,assignment]
        try:
            began = time.perf_counter()
            self.serving.govern()
            self.engine.step()
            return time.perf_counter() - began, inside
        finally:
            del self.decoder.batch

    def _decode_step(self, batch: int) -> tuple[float, float]:
        """Seconds of the blocks beyond their operations, and of the rest of the step, while `batch` requests decode."""
        length, made = 8, self.rounds + 3
        for _ in range(batch):
            self._submit(length, made)
        while any(not view.decodes for view in self._views()):
            self.serving.govern()
            self.engine.step()
        found = []
        while self.engine.busy:
            whole = len(self.engine.running) == batch
            taken = self._timed_step()
            found += [taken] if whole else []
        return self._unexplained(found, batch, batch, self._table(batch, 1, length + made // 2))

    def _prompt_step(self, tokens: int) -> tuple[float, float]:
        """The same of a step that computes a prompt whole."""
        found = []
        for _ in range(self.rounds):
            self._submit(tokens, 1)
            found.append(self._timed_step())
            while self.engine.busy:
                self.engine.step()
        return self._unexplained(found, tokens, 1, self._table(1, tokens, tokens))

    def _unexplained(
        self, found: list[tuple[float, float]], tokens: int, sampled: int, attention: float
    ) -> tuple[float, float]:
        products, head = self._operations(tokens, sampled)
        blocks = median(inside for _, inside in found) - products - attention * self.config.num_layers
        return blocks, median(whole - inside for whole, inside in found) - head

    def _views(self) -> list[RequestView]:
        state = self.engine.snapshot()
        return [*state.running, *state.waiting]

    def _submit(self, length: int, made: int) -> None:
        # no two alike: a beginning that is known would not be computed
        self._submitted += 1
        tokens = np.random.default_rng(self._submitted).integers(0, self.config.vocab_size, length)
        self.engine.submit(
            Request(prompt=tuple(map(int, tokens)), sampling=Sampling(max_new_tokens=made, ignore_eos=True))
        )

    def _operations(self, tokens: int, sampled: int) -> tuple[float, float]:
        """Seconds of all blocks' products, and of head and sampling, from the rows measured."""
        curves: dict[tuple[int, int], Curve] = {}
        for m, k, n, seconds in self.gemm_rows:
            xs, ys = curves.setdefault((m, k), ([], []))
            xs.append(float(n))
            ys.append(seconds)
        head = along(curves.pop((self.config.vocab_size, self.config.hidden_size)), sampled)
        picks = [(float(n), seconds) for name, n, seconds in self.pass_rows if name == "sample"]
        head += along(([x for x, _ in picks], [y for _, y in picks]), sampled)
        return self.config.num_layers * sum(along(curve, tokens) for curve in curves.values()), head

    def _table(self, batch: int, queries: int, keys: int) -> float:
        table = AttentionTable()
        for b, q, s, seconds in self.attention_rows:
            side, place = (table.decode, float(b)) if q == 1 else (table.prompt, float(q))
            curve = side.setdefault(place, ([], []))
            curve[0].append(float(s))
            curve[1].append(seconds)
        return table.seconds(batch, queries, keys) or 0.0
