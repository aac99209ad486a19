"""CacheGen's streaming controller: a context comes chunk by chunk, as text or as a bitstream, so that a time is met.

Before each chunk is sent for, its form is chosen by what is known then: the throughput of the chunk before, the time
left, how long recomputing takes (section 5.3 of the paper). A chunk is decoded, or recomputed on top of the chunks
before it, while the next is on its way. A chunk whose stream breaks or is damaged comes as text instead.

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
from memwall.kv.cachegen import Chunk, Shape
from memwall.kv.link import ChunkLink, Index, LinkBroken
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder

TEXT = 0
"""The form of a chunk that is sent as text; others are levels."""
LEAST_MEASURED_BYTES = 16 << 10
"""A smaller transfer measures the link's latency, not its throughput."""
QUEUED_CHUNKS = 2

Rule = Literal["remaining", "even"]
Carried = TypeVar("Carried")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known before a chunk is sent for.

    remaining_seconds: until the time must be met. bytes_per_s: of the chunk before; None before the first.
    level_bytes: of all chunks that are left, by level. text_seconds: to recompute all that is left.
    busy_seconds: that the processor will still need for what it has been given. decode_seconds: of the last chunk.
    """

    remaining_seconds: float
    bytes_per_s: float | None
    level_bytes: Mapping[int, int]
    text_seconds: float
    busy_seconds: float = 0.0
    decode_seconds: float = 0.0


def choose(outlook: Outlook, default_level: int) -> int:
    """TEXT where all that is left can be recomputed in time, else the finest level that arrives in time.

    Where none does, the coarsest, or text if that should take less time. Without a throughput, the default level.
    """
    by_text = outlook.busy_seconds + outlook.text_seconds
    if by_text <= outlook.remaining_seconds:
        return TEXT
    if outlook.bytes_per_s is None:
        return default_level if default_level in outlook.level_bytes else max(outlook.level_bytes)
    levels = sorted(outlook.level_bytes, reverse=True)
    seconds = {v: _arrival(outlook.level_bytes[v], outlook) for v in levels}
    in_time = [v for v in levels if seconds[v] <= outlook.remaining_seconds]
    if in_time:
        return in_time[0]
    return levels[-1] if seconds[levels[-1]] <= by_text else TEXT


def _arrival(nbytes: int, outlook: Outlook) -> float:
    assert outlook.bytes_per_s is not None
    return max(nbytes / outlook.bytes_per_s, outlook.busy_seconds) + outlook.decode_seconds


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
    ) -> None:
        self.cache, self.config = cache, config
        self._decoder = decoder
        self._shape = Shape.of(config)
        self._model, self._profile = model, profile
        self.seconds_per_token = 0.0
        self.seconds_per_byte = 0.0

    def measure(self, num_tokens: int = 64) -> None:
        """How long a token takes to recompute here: the first estimate, before any has been."""
        tokens = np.arange(min(num_tokens, self._decoder.segment_tokens)) % self.config.vocab_size
        held = self.cache.length
        self._decoder.hidden(tokens, self.cache)  # what first calls allocate is not measured
        self.cache.truncate(held)
        began = time.perf_counter()
        self._decoder.hidden(tokens, self.cache)
        self.seconds_per_token = (time.perf_counter() - began) / len(tokens)
        self.cache.truncate(held)

    def open(self, data: bytes) -> Chunk:
        """A received chunk, checked; InputError when it is damaged."""
        return Chunk(data, self._shape, model=self._model, profile=self._profile)

    def recompute(self, tokens: np.ndarray) -> None:
        """Prefills a chunk's tokens on top of the chunks before it."""
        began, step = time.perf_counter(), self._decoder.segment_tokens
        for begin in range(0, len(tokens), step):
            self._decoder.hidden(tokens[begin : begin + step].astype(np.int64), self.cache)
        self.seconds_per_token = (time.perf_counter() - began) / len(tokens)

    def decode(self, chunk: Chunk, nbytes: int, most_tokens: int) -> None:
        """Decodes a chunk into the cache."""
        began = time.perf_counter()
        chunk.append_to(self.cache, self.config, most_tokens)
        self.seconds_per_byte = (time.perf_counter() - began) / max(nbytes, 1)


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

    def tokens_left(self, first: int) -> int:
        return sum(self.index.chunk_tokens[first : self.num_chunks])


Item = tuple[Request, Sent, "Chunk | np.ndarray | BaseException"]


class StreamingController:
    """Fetches contexts for requests that wait for them; see the module's text.

    fixed: always this form, for comparison. rule `even` is that of the official code: each chunk has an equal share of
    the time, and levels are tried for that chunk alone. prior_bytes_per_s: the throughput to believe in at first.
    """

    def __init__(
        self,
        *,
        rule: Rule = "remaining",
        fixed: int | None = None,
        default_level: int = 2,
        prior_bytes_per_s: float | None = None,
    ) -> None:
        self.rule, self.fixed = rule, fixed
        self.default_level = default_level
        self._bytes_per_s = prior_bytes_per_s
        self._busy = 0.0
        self._lock = threading.Lock()
        self._started = 0.0
        self._stopped = threading.Event()

    def run(self, requests: Sequence[Request]) -> None:
        """Brings all chunks of all requests into their caches; fills in what was sent and how long it took.

        LinkBroken where a chunk cannot be had in any form.
        """
        self._started, self._busy = time.perf_counter(), 0.0
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
        if isinstance(content, Chunk):
            receiver.decode(content, sent.nbytes, room)
        else:
            receiver.recompute(content[:room])
        with self._lock:
            self._busy = max(self._busy - sent.expected_seconds, 0.0)
        request.seconds = time.perf_counter() - self._started

    def _fetch_all(self, requests: Sequence[Request], arrived: queue.Queue[Item | None]) -> None:
        rounds = max((request.num_chunks for request in requests), default=0)
        try:
            for chunk in range(rounds):
                for place, request in enumerate(requests):
                    if chunk < request.num_chunks and not self._stopped.is_set():
                        sent, content = self._fetch(request, chunk, self._others(requests, place, chunk))
                        request.sent.append(sent)
                        sent.expected_seconds = self._cost(request, sent)
                        with self._lock:
                            self._busy += sent.expected_seconds
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
        sent = Sent(chunk=chunk, form=self._choose(request, chunk, others), estimate_bytes_per_s=self._bytes_per_s)
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
        began = time.perf_counter()
        try:
            result = fetch()
            sent.nbytes += nbytes
            return result
        finally:
            seconds = time.perf_counter() - began
            sent.seconds += seconds
            if sent.nbytes >= LEAST_MEASURED_BYTES and not sent.fallback:
                self._bytes_per_s = nbytes / max(seconds, 1e-9)

    def _choose(self, request: Request, chunk: int, others: list[tuple[Request, int]]) -> int:
        """Decisions use the past only: nothing here knows the link's rate but by what it has carried."""
        if self.fixed is not None:
            return self.fixed
        remaining = request.slo_seconds - request.tail_seconds - (time.perf_counter() - self._started)
        receiver = request.receiver
        last = max(request.index.sizes)
        decode = receiver.seconds_per_byte * request.index.sizes[last][request.num_chunks - 1]
        with self._lock:
            busy = self._busy
        if self.rule == "even":
            share = request.slo_seconds / request.num_chunks
            tokens = request.index.chunk_tokens[chunk]
            sizes = {level: row[chunk] for level, row in request.index.sizes.items()}
            outlook = Outlook(remaining_seconds=share, bytes_per_s=self._bytes_per_s, level_bytes=sizes,
                              text_seconds=tokens * receiver.seconds_per_token)  # fmt: skip
            return choose(outlook, self.default_level)
        level_bytes = request.level_bytes(chunk)
        for other, first in others:
            for level, nbytes in other.level_bytes(first).items():
                level_bytes[level] = level_bytes.get(level, 0) + nbytes
        outlook = Outlook(
            remaining_seconds=remaining,
            bytes_per_s=self._bytes_per_s,
            level_bytes=level_bytes,
            text_seconds=request.tokens_left(chunk) * receiver.seconds_per_token,
            busy_seconds=busy,
            decode_seconds=decode,
        )
        return choose(outlook, self.default_level)

    def _cost(self, request: Request, sent: Sent) -> float:
        """Seconds that the processor should need for a chunk."""
        receiver = request.receiver
        if sent.form == TEXT:
            return request.index.chunk_tokens[sent.chunk] * receiver.seconds_per_token
        return request.index.sizes[sent.form][sent.chunk] * receiver.seconds_per_byte


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
