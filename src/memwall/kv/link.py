"""A link that carries chunks of a saved cache: its two ends, and a throttle that emulates a slow one.

One TCP connection, requests one after the other. A request is a line of JSON: {"index": true}, {"chunk": 3, "level": 2}
or {"chunk": 3, "text": true}; the reply is its length (8 bytes, big end first) and so many bytes. What the server does
not have ends the connection. A throttle follows a trace of rates over time; figures measured through one are those of
an emulated link and must say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.kv.cachegen_file import chunk_name, chunk_plan, sizes_of
from memwall.kv.cachegen_profile import LEVELS
from memwall.kv.saved import SavedCache

PIECE_BYTES = 16 << 10
"""Bytes sent at once: the depth of the throttle's bucket."""
MAX_REQUEST_BYTES = 1024
MAX_INDEX_BYTES = 16 << 20
TIMEOUT_SECONDS = 30.0
_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Trace:
    """Rates in bytes a second, each for `step_seconds`, again from the start when they end."""

    rates: tuple[float, ...]
    step_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or self.step_seconds <= 0:
            raise InputError("a bandwidth trace needs rates above zero and a step longer than nothing")

    @staticmethod
    def read(path: Path, *, step_seconds: float, scale: float = 1.0) -> list[Trace]:
        """Traces of a file of JSON lines {"bw": [Gbit/s, ...]}, each rate times `scale`."""
        traces = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            fields = Fields(checked_json.parse(line, f"{path}:{number}"), f"{path}:{number}")
            rates = fields.items("bw", 1 << 16)
            if not all(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
                raise InputError(f"{path}:{number}: bw must be rates in Gbit/s")
            traces.append(Trace(tuple(scale * rate * _GBIT_BYTES for rate in rates), step_seconds))
        return traces

    def arrival(self, seconds: float, nbytes: float) -> float:
        """When so many bytes have passed that are sent from that time on."""
        left = float(nbytes)
        while left > 0:
            rate, lasts = self.rate(seconds)
            passed = min(left, rate * lasts)
            seconds += max(passed / rate, 1e-9)
            left -= passed
        return seconds

    def rate(self, seconds: float) -> tuple[float, float]:
        """(rate at that time, seconds that it still lasts)."""
        step = int(seconds / self.step_seconds)
        return self.rates[step % len(self.rates)], (step + 1) * self.step_seconds - seconds


_GBIT_BYTES = 125e6


class Throttle:
    """Lets bytes pass no faster than a trace allows; its clock starts with the first, or with `restart`."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._start: float | None = None
        self._free = 0.0

    def restart(self) -> None:
        """The trace from its beginning, for the next byte on."""
        self._start, self._free = None, 0.0

    def wait(self, nbytes: int, ready: float | None = None) -> None:
        """Sleeps until so many more bytes would have arrived.

        ready: the time (`perf_counter`) from which they could be on their way; now unless given.
        """
        began = time.perf_counter() if ready is None else ready
        if self._start is None:
            self._start = began
        self._free = self.trace.arrival(max(began - self._start, self._free), nbytes)
        delay = self._start + self._free - time.perf_counter()
        if delay > 0:
            time.sleep(delay)


class ChunkServer:
    """Serves one saved cache on loopback. It reads the file as chunks are asked for and holds none.

    trace: an emulated link; it begins anew with a connection that comes while there is no other.
    """

    def __init__(self, saved: SavedCache, *, port: int = 0, trace: Trace | None = None) -> None:
        if saved.policy is not None:
            raise InputError(
                f"{saved.path}: holds a cache of {saved.policy} in its own form; only coded chunks are served: save it "
                "with --cache-codec cachegen"
            )
        self.saved = saved
        self.lengths, self.levels = chunk_plan(saved.content, saved)
        self._throttle = Throttle(trace) if trace is not None else None
        self._tokens = np.array(saved.tokens(), np.int32)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._socket = socket.create_server(("127.0.0.1", port))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False

    def serve_forever(self) -> None:
        """Accepts connections until `close`."""
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def start(self) -> None:
        """Serves in a thread of its own."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections, and ends those that are open."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> ChunkServer:
        self.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def index(self) -> dict[str, Any]:
        """What a client must know before it asks for chunks."""
        cuts = zip(self._starts[:-1], self._starts[1:])
        return {
            "model": self.saved.model,
            "weights": self.saved.weights,
            "weights_sha256": self.saved.weights_sha256,
            "codec": self.saved.content.text("codec"),
            "chunk_tokens": self.lengths,
            "sizes": sizes_of(self.saved, self.levels, len(self.lengths)),
            "texts": [text_digest(self._tokens[begin:end]) for begin, end in cuts],
        }

    def reply(self, request: Fields) -> bytes:
        """The bytes that a request asks for; InputError when there are none."""
        if request.flag("index", False):
            return json.dumps(self.index()).encode()
        chunk = request.integer("chunk", 0, len(self.lengths) - 1)
        if request.flag("text", False):
            return self._tokens[self._starts[chunk] : self._starts[chunk + 1]].tobytes()
        name = chunk_name(chunk, request.integer("level", self.levels[0], self.levels[-1]))
        data = np.empty(self.saved.file.info(name).nbytes, np.uint8)
        self.saved.read(name, data)
        return data.tobytes()

    def _serve(self, connection: socket.socket) -> None:
        # pieces are smaller than a packet of loopback: without this, each waits for the last one's late acknowledgement
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self._throttle is not None and not self._open:
                self._throttle.restart()
            self._open.add(connection)
        with connection, connection.makefile("rb") as lines:
            try:
                while line := lines.readline(MAX_REQUEST_BYTES):
                    request = Fields(checked_json.parse(line, "request"), "request")
                    self.send(connection, request, self.reply(request))
            except (InputError, OSError):
                return  # the client sees the connection end
            finally:
                with self._lock:
                    self._open.discard(connection)

    def send(self, connection: socket.socket, request: Fields, data: bytes) -> None:
        """Sends a reply through the throttle."""
        whole = memoryview(struct.pack(">Q", len(data)) + data)
        for begin in range(0, len(whole), PIECE_BYTES):
            piece = whole[begin : begin + PIECE_BYTES]
            if self._throttle is not None:
                self._throttle.wait(len(piece))
            connection.sendall(piece)


def text_digest(tokens: np.ndarray | Sequence[int]) -> str:
    """Names a chunk's text: 32 hexadecimal digits of its token ids."""
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:32]


class LinkBroken(OSError):
    """The connection ended, or nothing came in time, before a reply was whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What a server holds: origin, tokens and text digest of each chunk, bytes of each chunk by level."""

    model: str
    weights: str
    weights_sha256: str
    codec: str
    chunk_tokens: tuple[int, ...]
    texts: tuple[str, ...]
    sizes: Mapping[int, tuple[int, ...]]

    @staticmethod
    def parse(data: bytes) -> Index:
        """InputError for what is no index."""
        fields = Fields(checked_json.parse(data, "index", max_depth=4), "index")
        lengths, texts = fields.items("chunk_tokens", 1 << 20), fields.items("texts", 1 << 20)
        sizes = fields.mapping("sizes")
        good = bool(lengths) and len(texts) == len(lengths) and all(isinstance(text, str) for text in texts)
        good = good and bool(sizes) and set(sizes) <= {str(level) for level in LEVELS}
        rows = [lengths, *sizes.values()]
        if not good or not all(isinstance(row, list) and len(row) == len(lengths) for row in rows):
            raise InputError("index: chunk_tokens, texts and sizes must be lists, one entry a chunk")
        if not all(type(n) is int and 0 < n < 2**40 for row in rows for n in row):
            raise InputError("index: tokens and sizes must be whole numbers above zero")
        return Index(
            model=fields.text("model"),
            weights=fields.text("weights"),
            weights_sha256=fields.text("weights_sha256"),
            codec=fields.text("codec"),
            chunk_tokens=tuple(lengths),
            texts=tuple(texts),
            sizes={int(level): tuple(row) for level, row in sorted(sizes.items())},
        )

    def num_matching(self, tokens: Sequence[int]) -> int:
        """Chunks from the first on whose text a prompt begins with."""
        begin = 0
        for number, (length, digest) in enumerate(zip(self.chunk_tokens, self.texts)):
            part = tokens[begin : begin + length]
            if len(part) < length or text_digest(part) != digest:
                return number
            begin += length
        return len(self.chunk_tokens)


class ChunkLink:
    """The client's end. A broken connection is opened anew with the next request."""

    def __init__(self, address: tuple[str, int], *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.address = address
        self.timeout_seconds = timeout_seconds
        self._socket: socket.socket | None = None

    def index(self) -> Index:
        """What the server holds."""
        return Index.parse(self._ask({"index": True}, MAX_INDEX_BYTES))

    def text(self, chunk: int, num_tokens: int) -> np.ndarray:
        """Token ids of a chunk."""
        data = self._ask({"chunk": chunk, "text": True}, num_tokens * _TOKEN_BYTES)
        if len(data) != num_tokens * _TOKEN_BYTES:
            raise LinkBroken(f"the text of chunk {chunk} has {len(data)} bytes instead of {num_tokens * _TOKEN_BYTES}")
        return np.frombuffer(data, np.int32)

    def chunk(self, chunk: int, level: int, nbytes: int) -> bytes:
        """A chunk's bytes at a level."""
        return self._ask({"chunk": chunk, "level": level}, nbytes)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> ChunkLink:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _ask(self, request: Mapping[str, object], most_bytes: int) -> bytes:
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self.address, self.timeout_seconds)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            (length,) = struct.unpack(">Q", self._receive(8))
            if length > most_bytes:
                raise LinkBroken(f"the server announces {length:,} bytes where {most_bytes:,} are expected")
            return self._receive(length)
        except OSError as error:
            self.close()
            raise error if isinstance(error, LinkBroken) else LinkBroken(str(error)) from error

    def _receive(self, nbytes: int) -> bytes:
        assert self._socket is not None
        data = bytearray(nbytes)
        view, done = memoryview(data), 0
        while done < nbytes:
            count = self._socket.recv_into(view[done:])
            if not count:
                raise LinkBroken(f"the connection ended after {done:,} of {nbytes:,} bytes")
            done += count
        return bytes(data)
