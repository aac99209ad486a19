"""Parts of a model that two processes hold between them, and the memory through which they meet."""

from __future__ import annotations

import json
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memwall import kernels
from memwall.engine.arrivals import Load
from memwall.engine.core import Engine
from memwall.engine.executor import Entry
from memwall.engine.s_lora_parallel import LoraParts
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.engine.sequence import Sequence as Running
from memwall.errors import InputError
from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, ModelConfig
from memwall.models.decoder import DOWN, OUTPUT, Decoder
from memwall.simulate.iterations import Served

Kind = Literal["data", "tensor", "pipeline"]
RANKS = 2


# ---- models cut in two ---------------------------------------------------------------------------------------------


def cut_model(source: Path, folder: Path, kind: Kind, rank: int) -> Path:
    """The part of a model with tied embeddings that one process holds, as a model directory of its own."""
    config = ModelConfig.from_directory(source)
    if config.falcon is not None:
        raise InputError(f"{source}: a {config.family} model is not cut into parts; one of the Llama form is")
    told = dict(config.source)
    told["head_dim"] = config.head_dim
    blocks = range(config.num_layers)
    if kind == "tensor":
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            told[name] = told[name] // RANKS
    elif kind == "pipeline":
        half = config.num_layers // RANKS
        told["num_hidden_layers"] = half
        blocks = range(rank * half, (rank + 1) * half)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told))
    part = ModelConfig.from_directory(folder)
    with Checkpoint(source, config) as checkpoint:
        rows = [(tensor.name, np.dtype(np.float16), tensor.shape) for tensor in part.tensors()]
        with SafetensorsWriter(folder / "model.safetensors", rows) as writer:
            for tensor in part.tensors():
                name = tensor.name
                if tensor.layer is not None:
                    name = name.replace(f"layers.{tensor.layer}.", f"layers.{blocks[tensor.layer]}.")
                values = checkpoint.tensor(name).astype(np.float16)
                writer.write(tensor.name, _cut(values, tensor.shape, rank))
    return folder


def _cut(values: np.ndarray, shape: tuple[int, ...], rank: int) -> np.ndarray:
    """The rank's part along whichever axis is shorter in `shape`."""
    for axis, (whole, part) in enumerate(zip(values.shape, shape)):
        if whole != part:
            values = np.take(values, range(rank * part, (rank + 1) * part), axis=axis)
    return np.ascontiguousarray(values)


# ---- memory between two processes ----------------------------------------------------------------------------------


class Wire:
    """Shared memory of two processes: each has two areas that it fills in turn, and a count of how often it did."""

    def __init__(self, path: Path, most_values: int, rank: int) -> None:
        size = 4096 + 4 * 2 * RANKS * most_values
        with path.open("a+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self.rank = rank
        self._counts = np.frombuffer(self._map, np.int64, 16 * RANKS)  # a cache line apart
        self._areas = np.frombuffer(self._map, np.float32, offset=4096).reshape(RANKS, 2, most_values)
        self._done = 0

    def exchange(self, x: np.ndarray) -> np.ndarray:
        """Shows x to the other process and gives what it showed, as wide; valid until the next but one exchange."""
        self._done += 1
        side = self._done % 2
        self._areas[self.rank, side, : x.size] = x.ravel()
        self._counts[8 * self.rank] = self._done
        other = 1 - self.rank
        while self._counts[8 * other] < self._done:
            os.sched_yield()
        return self._areas[other, side, : x.size].reshape(x.shape)

    def area(self, which: int) -> np.ndarray:
        """One of the areas, for data whose order something else settles."""
        return self._areas[which // 2, which % 2]


class TensorDecoder(Decoder):
    """Half of every block of a dense model: sums with the other half's after products that write to the residual."""

    parts: LoraParts | None = None
    """Of adapters, where requests have some."""

    def join(self, wire: Wire, head: kernels.Matrix, rows: int) -> None:
        """Call it before the first step. head: this half's rows of the head."""
        self.wire, self.head, self.rows = wire, head, rows
        buffers = self._buffers
        self._partial = np.empty_like(buffers["hidden"])
        self._half = np.empty((len(buffers["logits"]), rows), np.float32)
        self.observer = lambda name, x: None  # recorded steps would not stop for the other process

    def _linear(
        self,
        x: np.ndarray,
        names: list[str],
        outs: list[np.ndarray],
        biases: list[np.ndarray | None] | None = None,
        accumulate: bool = False,
    ) -> None:
        if accumulate:  # exchanged by the call that follows, once adapters have added their slice
            self._sums = self._partial[: len(x)]
            outs = [self._sums]
        super()._linear(x, names, outs, biases)

    def _add_lora(
        self, index: int, rows: slice, x: np.ndarray, targets: tuple[int, ...], outs: list[np.ndarray]
    ) -> None:
        summed = targets in (OUTPUT, DOWN)
        if self.parts is not None and summed:
            self.parts.add_to_sums(index, rows.start, x, targets[0], self._sums)
        elif self.parts is not None:
            self.parts.add(index, rows.start, x, targets, outs)
        if summed:
            outs[0] += self._sums
            outs[0] += self.wire.exchange(self._sums)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """See `Decoder`: half of them from the other process."""
        half = self._half[: len(hidden)]
        kernels.linear(hidden, [self.head], [half], exact=self.exact)
        other, out = self.wire.exchange(half), self._buffers["logits"][: len(hidden)]
        parts = (half, other) if self.wire.rank == 0 else (other, half)
        np.concatenate(parts, axis=1, out=out)
        return out


class StageDecoder(Decoder):
    """Some of the blocks: begins with token ids or with the hidden state of the stage before."""

    def enter(self, tokens: np.ndarray) -> np.ndarray:
        """Embedding rows [B, H], in the decoder's buffer."""
        hidden = self._buffers["hidden"][: len(tokens)]
        kernels.gather_rows(self.weights.matrices[EMBEDDING], np.asarray(tokens, np.int64), hidden)
        return hidden

    def go_on(self, hidden: np.ndarray, positions: np.ndarray, cache: Any, *, last: bool) -> np.ndarray:
        """All blocks over hidden [B, H] in place; last: and the norm at the end."""
        cos, sin = self._rotation(cache, positions)
        for index, layer in enumerate(self._layers):
            self._run_layer(index, layer, hidden, positions, cos, sin, cache)
        if last:
            self.last_norm.into(hidden, hidden)
        return hidden


# ---- steps that one process tells the other ------------------------------------------------------------------------


def hold_all(engine: Engine, num_pages: int) -> None:
    """Makes all pages resident: the other process says which ones a request has."""
    engine.wanted_pages = num_pages
    engine.fit_limit()
    engine.pages.take(num_pages)


def tokens_of(entries: Sequence[Entry]) -> np.ndarray:
    """Token ids that the entries compute, in a row."""
    return np.array([t for one in entries for t in one.sequence.tokens[one.first : one.first + one.count]], np.int64)


Told = tuple[int, int, int, bool, list[int], list[int]]


def told_step(batch: Sequence[Entry]) -> list[Told]:
    """A step as the other process needs it: whose each entry is, its pages and its tokens."""
    return [
        (
            one.sequence.id, one.first, one.count, one.sample, one.sequence.pages,
            one.sequence.tokens[one.first : one.first + one.count],
        )
        for one in batch
    ]  # fmt: skip


def entries_of(told: Sequence[Told]) -> list[Entry]:
    """The step as it was told."""
    entries = []
    for number, first, count, sample, pages, tokens in told:
        one = Running(id=number, request=Request(prompt=(0,)), arrival=0.0, eos=())
        one.pages, one.tokens = pages, [0] * first + tokens
        entries.append(Entry(one, first, count, sample))
    return entries


# ---- a load on the real clock --------------------------------------------------------------------------------------


def serve_loads(
    engine: Engine,
    loads: Sequence[Load],
    began: float,
    vocabulary: int,
    *,
    before_step: Callable[[], None] | None = None,
    adapters: Sequence[str | None] = (None,),
) -> list[Served]:
    """Serves loads on the real clock with prompts drawn at random; began: a time of `time.time`, arrivals count from
    it. before_step: called before each step. adapters: keys of the engine's, dealt to requests in turn.
    """
    draw, coming = random.Random(1), sorted(loads, key=lambda load: load.at or 0.0)
    prompts = [tuple(draw.randrange(8, vocabulary) for _ in range(load.prompt_tokens)) for load in coming]
    served: dict[int, tuple[Served, Running]] = {}
    time.sleep(max(began - time.time(), 0.0))
    offset = engine.clock() - (time.time() - began)
    at = 0
    while at < len(coming) or engine.busy:
        now = engine.clock() - offset
        while at < len(coming) and (coming[at].at or 0.0) <= now:
            load, arrival = coming[at], coming[at].at or 0.0
            sampling = Sampling(max_new_tokens=load.output_tokens, ignore_eos=True)
            request = Request(prompt=prompts[at], sampling=sampling, adapter=adapters[at % len(adapters)])
            one = engine.submit(request, offset + arrival)
            served[one.id] = (Served(arrival=arrival, prompt=load.prompt_tokens, output=load.output_tokens), one)
            at += 1
        if not engine.busy:
            time.sleep(max((coming[at].at or 0.0) - now, 0.0))
            continue
        if before_step is not None:
            before_step()
        engine.step()
    for told, one in served.values():
        assert one.first_token is not None
        assert one.last_token is not None
        told.first, told.last = one.first_token - offset, one.last_token - offset
        told.tokens, told.preemptions, told.made = one.num_made, one.preemptions, tuple(one.made)
    return [told for told, _ in served.values()]
