"""CacheGen's streaming controller: a context comes chunk by chunk, as text or as a bitstream, so that a time is met.

Before each chunk is sent for, its form is chosen by what is known then: the throughput of the chunk before, the time
left, how long recomputing takes (section 5.3 of the paper), each with a margin for how wrong such estimates were until
now (`kv.cachegen_costs`). A chunk is decoded, or recomputed on top of the chunks before it, while the next is on its
way. A chunk whose stream breaks or is damaged comes as text instead.

Several requests to one model go through in rounds: the first chunk of each, then the second. They share link and
processor, so what the others still have to send and compute counts in each estimate.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from memwall.errors import InputError
from memwall.kv.base import KVCache
from memwall.kv.cachegen import Chunk, Shape, cache_planes, encode_chunk
from memwall.kv.cachegen_costs import LINK_ERROR, Backlog, Costs, Pace, Task
from memwall.kv.cachegen_profile import LEVELS
from memwall.kv.link import ChunkLink, Index, LinkBroken
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder

TEXT = 0
"""The form of a chunk that is sent as text; others are levels."""
LEAST_MEASURED_BYTES = 16 << 10
"""A smaller transfer measures the link's latency, not its throughput."""
QUEUED_CHUNKS = 2
PROBES = 2
"""Runs of each measurement at the start, after one that is not counted."""
FAR_TOKENS = 4096
"""The longest context to measure behind; longer ones are reckoned from it."""

Rule = Literal["remaining", "even"]
Carried = TypeVar("Carried")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known before a chunk is sent for.

    remaining_seconds: until the time must be met. bytes_per_s: of the link; None before anything was measured.
    level_bytes: of all chunks that are left, by level. text_seconds: to recompute all that is left.
    busy_seconds: that the processor will still need for what it has been given. decode_seconds: of all chunks that are
    left; last_decode_seconds: of those that cannot be decoded before all bytes are here.
    """

    remaining_seconds: float
    bytes_per_s: float | None
    level_bytes: Mapping[int, int]
    text_seconds: float
    busy_seconds: float = 0.0
    decode_seconds: float = 0.0
    last_decode_seconds: float = 0.0

    @property
    def by_text(self) -> float:
        """Seconds until all is there if the rest comes as text."""
        return self.busy_seconds + self.text_seconds

    def by_level(self, level: int) -> float:
        """The same at a level."""
        assert self.bytes_per_s is not None
        arrived = self.level_bytes[level] / self.bytes_per_s + self.last_decode_seconds
        return max(arrived, self.busy_seconds + self.decode_seconds)


def choose(outlook: Outlook, default_level: int, likely: Outlook | None = None) -> int:
    """TEXT where all that is left can be recomputed in time, else the finest level that arrives in time.

    Without a throughput, the default level. Where nothing is in time, the coarsest level, or text if that should take
    less time. likely: estimates without margins, which tell what comes first; the outlook itself unless given.
    """
    if outlook.by_text <= outlook.remaining_seconds:
        return TEXT
    if outlook.bytes_per_s is None:
        return default_level if default_level in outlook.level_bytes else max(outlook.level_bytes)
    levels = sorted(outlook.level_bytes, reverse=True)
    in_time = [level for level in levels if outlook.by_level(level) <= outlook.remaining_seconds]
    if in_time:
        return in_time[0]
    likely = likely or outlook
    return levels[-1] if likely.by_level(levels[-1]) <= likely.by_text else TEXT


class Receiver:
    """Where a context is put together: the cache of an engine, with the decoder that recomputes what comes as text."""

    def __init__(
        self,
        cache: KVCache,
        decoder: Decoder,
        config: ModelConfig,
        *,
        model: str,
        profile: Mapping[str, np.ndarray] | None,
        form: str = "auto",
    ) -> None:
        self.cache, self.config = cache, config
        self._decoder = decoder
        self._shape = Shape.of(config)
        self._model, self._profile, self._form = model, profile, form
        self.costs = Costs()

    def measure(self, context_tokens: int, num_tokens: int) -> None:
        """How long recomputing takes here, without a context and behind one of about that length, and decoding.

        The cache must be empty, and is left so. Rows of the context are drawn: their values do not matter to the time.
        """
        n = min(num_tokens, self._decoder.segment_tokens, context_tokens)
        tokens = np.arange(n) % self.config.vocab_size
        far_first = min(context_tokens, FAR_TOKENS) - n
        taken: dict[int, list[float]] = {}
        for first in dict.fromkeys((far_first, 0)):
            self._fill(first)
            taken[first] = [self._recompute_again(tokens, first) for _ in range(1 + PROBES)][1:]
        if far_first:
            self.costs.learn_growth(min(taken[0]), min(taken[far_first]), far_first, n)
        for first, runs in taken.items():
            for seconds in runs:
                self.costs.text.saw(self.costs.work(first, n), seconds)
        data = encode_chunk(cache_planes(self.cache, self.config, 0, n), self._shape, model=self._model, first=0,
                            level=LEVELS[1], form=self._form, profile=self._profile)  # fmt: skip
        for _ in range(PROBES):
            self.cache.truncate(0)
            self.decode(self.open(data), n)
        self.cache.truncate(0)

    def _fill(self, length: int) -> None:
        step = max(min(length, self._decoder.segment_tokens), 1)
        shape = (step, self.config.num_kv_heads, self.config.head_dim)
        drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
        self.cache.truncate(0)
        for begin in range(0, length, step):
            positions = np.arange(begin, min(begin + step, length))
            rows = drawn[: len(positions)]
            for layer in range(self.config.num_layers):
                self.cache.append(layer, rows, rows, positions)
                self.cache.settle(layer)

    def _recompute_again(self, tokens: np.ndarray, first: int) -> float:
        self.cache.truncate(first)
        began = time.perf_counter()
        self._decoder.hidden(tokens, self.cache)
        return time.perf_counter() - began

    def open(self, data: bytes) -> Chunk:
        """A received chunk, checked; InputError when it is damaged."""
        return Chunk(data, self._shape, model=self._model, profile=self._profile)

    def recompute(self, tokens: np.ndarray) -> None:
        """Prefills a chunk's tokens on top of the chunks before it."""
        began, step, first = time.perf_counter(), self._decoder.segment_tokens, self.cache.length
        for begin in range(0, len(tokens), step):
            self._decoder.hidden(tokens[begin : begin + step].astype(np.int64), self.cache)
        self.costs.text.saw(self.costs.work(first, len(tokens)), time.perf_counter() - began)

    def decode(self, chunk: Chunk, most_tokens: int) -> None:
        """Decodes a chunk into the cache."""
        began = time.perf_counter()
        chunk.append_to(self.cache, self.config, most_tokens)
        self.costs.decoding.saw(chunk.num_tokens, time.perf_counter() - began)


@dataclass(slots=True, kw_only=True)
class Sent:
    """What became of one chunk: how long it was on its way, what was thought of the link before, how long the processor
    was expected to need for it. fallback: why it came as text although a stream was chosen, else empty."""

    chunk: int
    form: int
    nbytes: int = 0
    seconds: float = 0.0
    estimate_bytes_per_s: float | None = None
    expected_seconds: float = 0.0
    fallback: str = ""


@dataclass(slots=True, kw_only=True)
class Request:
    """One context to fetch, and, once done, how it went.

    num_chunks: how many from the first on. most_tokens: where to stop inside the last. tokens: the text, where it is
    known here, for the case that the link is gone. tail_seconds: kept free for what follows, such as the question.
    """

    link: ChunkLink
    index: Index
    receiver: Receiver
    slo_seconds: float
    num_chunks: int
    most_tokens: int | None = None
    tokens: Sequence[int] | None = None
    tail_seconds: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def in_time(self) -> bool:
        """Whether the context was there when it had to be."""
        return self.seconds + self.tail_seconds <= self.slo_seconds

    def level_bytes(self, first: int) -> dict[int, int]:
        """Bytes of the chunks from `first` on, by level."""
        return {level: sum(sizes[first : self.num_chunks]) for level, sizes in self.index.sizes.items()}

    def task(self, begin: int, end: int, form: int) -> Task:
        """What the processor has to do for the chunks from `begin` to `end`."""
        lengths = self.index.chunk_tokens
        tokens = sum(lengths[begin:end])
        if form == TEXT:  # a stream is decoded whole
            tokens = sum(sent_tokens(self, chunk) for chunk in range(begin, end))
        return Task(costs=self.receiver.costs, text=form == TEXT, first=sum(lengths[:begin]), num_tokens=tokens)


Item = tuple[Request, Sent, "Chunk | np.ndarray | BaseException"]


class StreamingController:
    """Fetches contexts for requests that wait for them; see the module's text.

    fixed: always this form, for comparison. rule `even` is that of the official code: each chunk has an equal share of
    the time, and levels are tried for that chunk alone, without margins. prior_bytes_per_s: the throughput to believe
    in at first. A controller that stays knows its link from the contexts before. clock: seconds.
    """

    def __init__(
        self,
        *,
        rule: Rule = "remaining",
        fixed: int | None = None,
        default_level: int = 2,
        prior_bytes_per_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rule, self.fixed = rule, fixed
        self.default_level = default_level
        self.link = Pace(LINK_ERROR, prior_bytes_per_s)
        self.backlog = Backlog()
        self._clock = clock
        self._lock = threading.Lock()
        self._started = clock()
        self._stopped = threading.Event()

    def run(self, requests: Sequence[Request]) -> None:
        """Brings all chunks of all requests into their caches; fills in what was sent and how long it took.

        LinkBroken where a chunk cannot be had in any form.
        """
        self._started, self.backlog = self._clock(), Backlog()
        self._stopped.clear()
        arrived: queue.Queue[Item | None] = queue.Queue(QUEUED_CHUNKS)
        fetcher = threading.Thread(target=self._fetch_all, args=(requests, arrived), name="cachegen", daemon=True)
        fetcher.start()
        try:
            while (item := arrived.get()) is not None:
                self._take(*item)
        finally:
            self._stopped.set()
            while fetcher.is_alive():  # it may be waiting for room in the queue
                _drain(arrived)
                fetcher.join(0.01)

    def _take(self, request: Request, sent: Sent, content: Chunk | np.ndarray | BaseException) -> None:
        """Recompute or decode what has arrived, in order."""
        if isinstance(content, BaseException):
            raise content
        receiver = request.receiver
        room = sent_tokens(request, sent.chunk)
        with self._lock:
            self.backlog.begin(self._clock())
        if isinstance(content, Chunk):
            receiver.decode(content, room)
        else:
            receiver.recompute(content[:room])
        with self._lock:
            self.backlog.end()
        request.seconds = self._clock() - self._started

    def _fetch_all(self, requests: Sequence[Request], arrived: queue.Queue[Item | None]) -> None:
        rounds = max((request.num_chunks for request in requests), default=0)
        try:
            for chunk in range(rounds):
                for place, request in enumerate(requests):
                    if chunk < request.num_chunks and not self._stopped.is_set():
                        sent, content = self._fetch(request, chunk, self._others(requests, place, chunk))
                        request.sent.append(sent)
                        task = request.task(chunk, chunk + 1, sent.form)
                        sent.expected_seconds = task.seconds()
                        with self._lock:
                            self.backlog.add(task)
                        arrived.put((request, sent, content))
        except BaseException as error:  # a thread has no caller: the one that waits for chunks raises it
            arrived.put((requests[0], Sent(chunk=0, form=TEXT), error))
        arrived.put(None)

    def _others(self, requests: Sequence[Request], place: int, chunk: int) -> list[tuple[Request, int]]:
        """The other requests, each with the first chunk that it has not been sent."""
        return [(r, chunk + (i < place)) for i, r in enumerate(requests) if i != place]

    def _fetch(
        self, request: Request, chunk: int, others: list[tuple[Request, int]]
    ) -> tuple[Sent, Chunk | np.ndarray]:
        sent = Sent(chunk=chunk, form=self.form(request, chunk, others), estimate_bytes_per_s=self.link.per_s)
        if sent.form != TEXT:
            nbytes = request.index.sizes[sent.form][chunk]
            try:
                data = self._timed(sent, nbytes, lambda: request.link.chunk(chunk, sent.form, nbytes))
                return sent, request.receiver.open(data)
            except (LinkBroken, InputError) as error:
                sent.fallback, sent.form = str(error), TEXT
        num_tokens = request.index.chunk_tokens[chunk]
        try:
            return sent, self._timed(sent, 4 * num_tokens, lambda: request.link.text(chunk, num_tokens))
        except LinkBroken as error:
            if request.tokens is None:
                raise
            sent.fallback = sent.fallback or str(error)
            begin = sum(request.index.chunk_tokens[:chunk])
            return sent, np.asarray(request.tokens[begin : begin + num_tokens], np.int32)

    def _timed(self, sent: Sent, nbytes: int, fetch: Callable[[], Carried]) -> Carried:
        began = self._clock()
        try:
            result = fetch()
            sent.nbytes += nbytes
            return result
        finally:
            seconds = self._clock() - began
            sent.seconds += seconds
            if sent.nbytes >= LEAST_MEASURED_BYTES and not sent.fallback:
                self.link.saw(nbytes, seconds)

    def form(self, request: Request, chunk: int, others: Sequence[tuple[Request, int]] = ()) -> int:
        """The form to send a chunk in. others: further requests, each with the first chunk it has not been sent.

        Decisions use the past only: nothing here knows the link's rate but by what it has carried.
        """
        if self.fixed is not None:
            return self.fixed
        if self.rule == "even":
            sizes = {level: row[chunk] for level, row in request.index.sizes.items()}
            share = request.slo_seconds / request.num_chunks
            text = request.task(chunk, chunk + 1, TEXT).seconds()
            even = Outlook(remaining_seconds=share, bytes_per_s=self.link.per_s, level_bytes=sizes, text_seconds=text)
            return choose(even, self.default_level)
        careful, likely = (self._outlook(request, chunk, others, careful=careful) for careful in (True, False))
        return choose(careful, self.default_level, likely)

    def _outlook(
        self, request: Request, chunk: int, others: Sequence[tuple[Request, int]], *, careful: bool
    ) -> Outlook:
        level_bytes = request.level_bytes(chunk)
        for other, first in others:
            for level, nbytes in other.level_bytes(first).items():
                level_bytes[level] = level_bytes.get(level, 0) + nbytes
        now, rate = self._clock(), self.link.per_s
        with self._lock:
            busy = self.backlog.seconds(now, careful=careful)
        end, any_level = request.num_chunks, max(level_bytes)
        return Outlook(
            remaining_seconds=request.slo_seconds - request.tail_seconds - (now - self._started),
            bytes_per_s=rate / self.link.margin if rate is not None and careful else rate,
            level_bytes=level_bytes,
            text_seconds=request.task(chunk, end, TEXT).seconds(careful=careful),
            busy_seconds=busy,
            decode_seconds=request.task(chunk, end, any_level).seconds(careful=careful),
            last_decode_seconds=request.task(end - 1, end, any_level).seconds(careful=careful),
        )


def sent_tokens(request: Request, chunk: int) -> int:
    """Tokens of a chunk that the request wants."""
    tokens = request.index.chunk_tokens[chunk]
    if request.most_tokens is None:
        return tokens
    return max(min(tokens, request.most_tokens - sum(request.index.chunk_tokens[:chunk])), 0)


def _drain(arrived: queue.Queue[Item | None]) -> None:
    try:
        while True:
            arrived.get_nowait()
    except queue.Empty:
        return
