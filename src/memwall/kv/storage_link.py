"""The host's end of storage processes: starting and ending them, requests with a time limit, bytes counted, a throttle.

A process that dies, or that does not answer in time, is ended and `StorageLost` raised; nothing waits for ever. With a
rate, the link is an emulated one: bytes pass no faster in either direction, and figures must say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import DoesNotFit, MemwallError
from memwall.kv.flash import FlashLayout
from memwall.kv.link import Throttle, Trace
from memwall.kv.storage_wire import REPLY_BYTES, REQUEST_BYTES, Op, Reply, Request, Status, receive_into

TIMEOUT_SECONDS = 60.0
"""Beyond what an emulated drive needs to read all that it holds."""
GOODBYE_SECONDS = 5.0
MAX_TEXT_BYTES = 1 << 16
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class StorageLost(MemwallError):
    """A storage process died or hangs, and the keys and values with it. Starting anew (`truncate(0)`) works."""

    exit_status = 1


@dataclass(slots=True)
class Traffic:
    """Bytes over one link. framing: headers, in both directions."""

    down_bytes: int = 0
    up_bytes: int = 0
    framing_bytes: int = 0
    requests: int = 0

    def to_dict(self) -> dict[str, int]:
        return {
            "down_bytes": self.down_bytes,
            "up_bytes": self.up_bytes,
            "framing_bytes": self.framing_bytes,
            "requests": self.requests,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """What a storage process is started with. Rates in bytes a second, 0 for as fast as it goes."""

    layout: FlashLayout
    windows: Sequence[int | None]
    scale: float
    sparse: dict[str, Any] | None
    direct: bool
    link_bytes_per_s: float
    flash_bytes_per_s: float
    threads: int

    def to_json(self, limit_bytes: int) -> str:
        layout = {name: getattr(self.layout, name) for name in self.layout.__dataclass_fields__}
        body = {"layout": layout, "windows": list(self.windows), "scale": self.scale, "sparse": self.sparse}
        body |= {"direct": self.direct, "flash_bytes_per_s": self.flash_bytes_per_s, "threads": self.threads}
        return json.dumps(body | {"limit": limit_bytes})


@dataclass(slots=True)
class _Awaited:
    """What the link is waiting for: set between `ask` and `answer`."""

    op: Op
    into: list[np.ndarray] = field(default_factory=list)


class StorageLink:
    """One storage process and the link to it. Requests from several threads take turns.

    `ask` sends and `answer` waits, so that several processes work at once; every `ask` needs its `answer`.
    """

    def __init__(self, config: StorageConfig, limit_bytes: int) -> None:
        self.config = config
        self.traffic = Traffic()
        self.limit_bytes = limit_bytes
        self.timeout_seconds = TIMEOUT_SECONDS
        self._turn = threading.RLock()
        self._awaited: list[_Awaited] = []
        self._down, self._up = (
            Throttle(Trace((config.link_bytes_per_s,))) if config.link_bytes_per_s else None for _ in range(2)
        )
        self._socket, theirs = socket.socketpair()
        try:
            self.process = _start(theirs, config.to_json(limit_bytes))
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._end = weakref.finalize(self, _end, self.process, self._socket)

    @property
    def alive(self) -> bool:
        return self._end.alive and self.process.poll() is None

    def request(
        self,
        op: Op,
        *,
        parts: Sequence[np.ndarray] = (),
        into: Sequence[np.ndarray] = (),
        **header: int,
    ) -> int:
        """Sends a request and waits for its reply; the reply's value. `into` receives the payload, in order."""
        self.ask(op, parts=parts, into=into, **header)
        return self.answer()

    def ask(self, op: Op, *, parts: Sequence[np.ndarray] = (), into: Sequence[np.ndarray] = (), **header: int) -> None:
        """Sends a request. Its reply must be taken with `answer`, by the same thread."""
        numbers = {"flags": 0, "layer": 0, "sequence": 0, "number": 0, "first": 0, **header}
        nbytes = sum(part.nbytes for part in parts)
        head = Request(op=op, limit=self.limit_bytes, payload_bytes=nbytes, **numbers).pack()
        self._turn.acquire()
        self._awaited.append(_Awaited(op, list(into)))
        try:
            self._socket.settimeout(self.timeout_seconds)
            if self._down is not None and op != Op.REPORT:
                self._down.wait(len(head) + nbytes)  # it is there when its last byte would be
            self._socket.sendall(head)
            for part in parts:
                self._socket.sendall(part.reshape(-1).view(np.uint8).data)
            if op != Op.REPORT:  # asking does not change the figures
                self.traffic.down_bytes += nbytes
                self.traffic.framing_bytes += REQUEST_BYTES
                self.traffic.requests += 1
        except OSError as error:
            raise self._lost(error) from error
        except BaseException:  # such as Ctrl-C: what was sent, and what comes, is not known any more
            self.drop()
            raise

    def answer(self) -> int:
        """The value of the oldest reply that is due; its payload is where the request wanted it."""
        if not self._awaited:
            raise StorageLost(f"the storage process (pid {self.process.pid}) was ended meanwhile")
        awaited = self._awaited[0]
        try:
            head = bytearray(REPLY_BYTES)
            receive_into(self._socket, memoryview(head))
            reply = Reply.unpack(head)
            if reply.status != Status.OK:
                text = bytearray(min(reply.payload_bytes, MAX_TEXT_BYTES))
                receive_into(self._socket, memoryview(text))
                self._refused(reply.status, text.decode(errors="replace"))
            if reply.payload_bytes != sum(each.nbytes for each in awaited.into) and awaited.op != Op.REPORT:
                raise OSError(f"{reply.payload_bytes:,} bytes came for {awaited.op.name}")
            if awaited.op == Op.REPORT:
                awaited.into[0].resize(reply.payload_bytes, refcheck=False)
            for each in awaited.into:
                receive_into(self._socket, each.reshape(-1).view(np.uint8).data)
            if self._up is not None and awaited.op != Op.REPORT:
                # it could be on its way from the moment that the other end had it
                self._up.wait(REPLY_BYTES + reply.payload_bytes, reply.ready)
            if awaited.op != Op.REPORT:
                self.traffic.up_bytes += reply.payload_bytes
                self.traffic.framing_bytes += REPLY_BYTES
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        except MemwallError:  # a refusal, read to its end
            raise
        except BaseException:
            self.drop()
            raise
        self._done()
        return reply.value

    def report(self) -> dict[str, Any]:
        """The process' counters and memory, and this end's traffic."""
        body = np.empty(0, np.uint8)
        self.request(Op.REPORT, into=[body])
        return {**json.loads(body.tobytes()), "link": self.traffic.to_dict(), "pid": self.process.pid}

    def close(self) -> None:
        """Ends the process; it has nothing left to do."""
        self._end()

    def drop(self) -> None:
        """Ends the process at once, with all that it was asked for."""
        self.process.kill()
        while self._awaited:
            self._done()
        self._end()

    def _done(self) -> None:
        self._awaited.pop(0)
        with contextlib.suppress(RuntimeError):  # another thread's turn, which ends with the process
            self._turn.release()

    def _refused(self, status: int, text: str) -> None:
        self._done()
        if status == Status.DOES_NOT_FIT:
            raise DoesNotFit(text)
        raise StorageLost(f"the storage process (pid {self.process.pid}) failed: {text}")

    def _lost(self, error: Exception) -> StorageLost:
        """Ends what is left of the process and says what became of it."""
        was = self.process.poll()
        if was is None and isinstance(error, EOFError | BrokenPipeError | ConnectionResetError):
            try:
                was = self.process.wait(GOODBYE_SECONDS)  # its end is on its way
            except subprocess.TimeoutExpired:
                was = None
        if isinstance(error, TimeoutError):
            how = f"did not answer within {self.timeout_seconds:.0f} s and was ended"
        elif was is not None:
            how = f"was ended by signal {-was}" if was < 0 else f"ended with status {was}"
        else:
            how = f"cannot be reached ({error or type(error).__name__})"
        self.drop()
        return StorageLost(
            f"the storage process (pid {self.process.pid}) {how}; the keys and values that it held are lost: read the "
            "prompt again"
        )


def _start(theirs: socket.socket, config: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, (str(PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "memwall.kv.storage_process", str(theirs.fileno()), config],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(theirs.fileno(),),
        env={**os.environ, "PYTHONPATH": path},
    )


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """Also runs when the host's interpreter ends: it leaves no process behind."""
    connection.close()
    try:
        process.wait(GOODBYE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
