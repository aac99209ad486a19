"""The storage process: owns the file of keys and values, and attends to them where they are.

Started by `kv.storage_link` with one end of a socket pair; ends when the other end is closed, however that came about.
It takes one request at a time (`kv.storage_wire`). The file has no name: nothing is left of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from memwall import kernels
from memwall.errors import DoesNotFit
from memwall.kv.flash import FlashFile, FlashLayout
from memwall.kv.flash_sequence import FlashSequence, Writer
from memwall.kv.sparf import SparseSettings, StorageAttention
from memwall.kv.storage_wire import REQUEST_BYTES, Flag, Op, Reply, Request, Status, receive_into
from memwall.memory import Arena, Ledger, resident_bytes

Answer = tuple[int, list[np.ndarray]]
"""The reply's value and payload."""


class Storage:
    """Sequences by number, and what is done with them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.layout = FlashLayout(**config["layout"])
        self.windows: list[int | None] = config["windows"]
        sparse = config["sparse"]
        self.sparse = SparseSettings(**sparse) if sparse is not None else None
        if config["threads"]:
            kernels.set_num_threads(config["threads"])
        self.arena = Arena(config["limit"], Ledger())
        self.file = FlashFile(self.layout, direct=config["direct"], throttle=_throttle(config["flash_bytes_per_s"]))
        self.attention = StorageAttention(self.layout, self.file, self.arena, config["scale"])
        self.writer = Writer(self.file, self.attention.images)
        self.sequences: dict[int, FlashSequence] = {}
        self._sender = ThreadPoolExecutor(1, "sender")
        self._sending: Future[None] | None = None
        self._broken = ""  # what went wrong behind a reply that was out already
        self._does: dict[int, Callable[[Request, memoryview], Answer]] = {
            Op.BEGIN: self._begin,
            Op.PLAN: self._plan,
            Op.RESERVE: self._reserve,
            Op.APPEND: self._append,
            Op.ROWS: self._rows,
            Op.TRUNCATE: self._truncate,
            Op.FORK: self._fork,
            Op.RECLAIM: self._reclaim,
            Op.REPORT: self._report,
        }

    def serve(self, connection: socket.socket) -> None:
        """Answers until the other end is gone."""
        header = bytearray(REQUEST_BYTES)
        inbox = self.attention.inbox.data
        while True:
            receive_into(connection, memoryview(header))
            request = Request.unpack(header)
            payload = inbox[: request.payload_bytes]
            if len(payload) != request.payload_bytes:
                raise EOFError(f"a request of {request.payload_bytes:,} bytes is more than any has")
            receive_into(connection, payload)
            self._answer(connection, request, payload)

    def _answer(self, connection: socket.socket, request: Request, payload: memoryview) -> None:
        after: Callable[[], None] | None = None
        try:
            if self._broken:
                raise OSError(self._broken)
            if request.limit > self.arena.used_bytes:
                self.arena.set_cap(request.limit)
            if request.op == Op.ATTEND:
                answer, after = self._attend(request, payload)
            else:
                answer = self._does[request.op](request, payload)
        except DoesNotFit as full:
            self._send(connection, Status.DOES_NOT_FIT, 0, [np.frombuffer(str(full).encode(), np.uint8)])
        except Exception as error:  # the other end must hear of it; it ends this process
            text = f"{type(error).__name__}: {error}"
            self._send(connection, Status.FAILED, 0, [np.frombuffer(text.encode(), np.uint8)])
        else:
            self._send(connection, Status.OK, *answer, later=request.op == Op.ROWS)
            if after is not None:
                try:
                    after()
                except Exception as error:  # told with the next request
                    self._broken = f"writing pages failed: {type(error).__name__}: {error}"

    def _send(
        self, connection: socket.socket, status: Status, value: int, parts: list[np.ndarray], *, later: bool = False
    ) -> None:
        """later: by a thread, so that the next rows are read while these are on their way."""
        head = Reply(status, value, sum(part.nbytes for part in parts), time.perf_counter()).pack()
        if self._sending is not None:
            self._sending.result()
        buffers = [np.ascontiguousarray(part).reshape(-1).view(np.uint8).data for part in parts]

        def send() -> None:
            connection.sendall(head)
            for buffer in buffers:
                connection.sendall(buffer)

        self._sending = self._sender.submit(send) if later else None
        if not later:
            send()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _begin(self, request: Request, payload: memoryview) -> Answer:
        self.sequences[request.sequence] = self._fresh()
        return 0, []

    def _fresh(self) -> FlashSequence:
        return FlashSequence(self.layout, self.file, self.writer, self.arena, self.attention.halves)

    def _plan(self, request: Request, payload: memoryview) -> Answer:
        return self.sequences[request.sequence].blocks_for(request.number), []

    def _reserve(self, request: Request, payload: memoryview) -> Answer:
        sequence = self.sequences[request.sequence]
        sequence.reserve(request.number)
        return len(sequence.blocks), []

    def _append(self, request: Request, payload: memoryview) -> Answer:
        shape = (2, request.number, self.layout.kv_heads, self.layout.head_dim)
        rows = np.frombuffer(payload, np.float16).reshape(shape)
        self.sequences[request.sequence].append(request.layer, rows[0], rows[1])
        return 0, []

    def _attend(self, request: Request, payload: memoryview) -> tuple[Answer, Callable[[], None] | None]:
        layout, sequence, layer = self.layout, self.sequences[request.sequence], request.layer
        numbers, new = np.frombuffer(payload, np.float16), layout.kv_heads * layout.head_dim
        flush = None
        if request.flags & Flag.NEW_ROW:
            rows = numbers[: 2 * new].reshape(2, 1, layout.kv_heads, layout.head_dim)
            sequence.put(layer, rows[0], rows[1])
            numbers = numbers[2 * new :]
            # what fills a page is written after the answer is out
            flush = lambda: sequence.flush(layer)  # noqa: E731
        q = self.attention.queries(numbers.reshape(request.number, layout.heads, layout.head_dim))
        if request.flags & Flag.SPARSE and self.sparse is not None and self.windows[layer] is None:
            out, stats = self.attention.sparse(sequence, layer, q, self.sparse)
        else:
            out, stats = self.attention.dense(sequence, layer, q, request.first, self.windows[layer])
        parts = [out.transpose(1, 0, 2, 3).astype(np.float16)]
        if request.flags & Flag.STATS:
            parts.append(stats.transpose(1, 0, 2, 3))
        return (0, parts), flush

    def _rows(self, request: Request, payload: memoryview) -> Answer:
        sequence = self.sequences[request.sequence]
        keys, values = sequence.rows(request.layer, request.first, request.first + request.number)
        return 0, [keys, values]

    def _truncate(self, request: Request, payload: memoryview) -> Answer:
        sequence = self.sequences[request.sequence]
        sequence.truncate(request.number)
        return len(sequence.blocks), []

    def _fork(self, request: Request, payload: memoryview) -> Answer:
        other = self._fresh()
        try:
            self.sequences[request.sequence].copy_to(other)
        except BaseException:
            other.release()
            raise
        self.sequences[request.number] = other
        return len(other.blocks), []

    def _reclaim(self, request: Request, payload: memoryview) -> Answer:
        self.sequences.pop(request.sequence).release()
        return 0, []

    def _report(self, request: Request, payload: memoryview) -> Answer:
        for sequence in self.sequences.values():
            sequence.wait()
        resident = resident_bytes(exact=True)
        report = {
            **self.file.counters.to_dict(),
            "page_bytes": self.layout.page_bytes,
            "direct": self.file.direct,
            "note": self.file.note,
            "directory": self.file.directory,
            "arena_bytes": self.arena.used_bytes,
            "resident_bytes": resident,
            "runtime_bytes": max(resident - self.arena.used_bytes, 0),
        }
        return 0, [np.frombuffer(json.dumps(report).encode(), np.uint8)]


def _throttle(bytes_per_s: float) -> Callable[[int, float], None] | None:
    if not bytes_per_s:
        return None
    from memwall.kv.link import Throttle, Trace

    return Throttle(Trace((bytes_per_s,))).wait


def main(descriptor: int, config: str) -> None:
    """Serves at one end of a socket pair until the other is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host, which closes its end
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(EOFError, OSError):
        try:
            storage = Storage(json.loads(config))
        except Exception as error:
            _refuse(connection, f"cannot start: {type(error).__name__}: {error}")
        else:
            storage.serve(connection)
    os._exit(0)  # threads may be in the middle of a read for nobody


def _refuse(connection: socket.socket, text: str) -> None:
    """Tells whoever asks first."""
    receive_into(connection, memoryview(bytearray(REQUEST_BYTES)))
    connection.sendall(Reply(Status.FAILED, 0, len(text.encode()), 0.0).pack() + text.encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
