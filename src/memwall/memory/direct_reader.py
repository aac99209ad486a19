"""Many reads of one file at once, round the page cache: `DirectReader` takes (offset, length) in batches.

A drive answers scattered pages fastest when it knows of many at a time. A thread a read costs more than the read;
Linux's own queue (`io_submit`) takes hundreds in one call, and the drive works on as many as it can. It is asynchronous
for files opened with O_DIRECT only, and not every system lets it be used; threads that read do it there. Where direct
reads are refused altogether, a reader says so in `note` and reads through the page cache.

Direct reads move whole sectors to addresses that are multiples of a sector. What is asked for otherwise is read with
what lies about it, and counted so. Units: places and lengths in bytes. Cost: 104 bytes for each read that can be under
way, and room for sectors where the caller gives none.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall.errors import InputError
from memwall.memory.pages import PAGE_BYTES

DEPTH = 1024
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit, by machine."""
# struct iocb and struct io_event of linux/aio_abi.h, little end first
_REQUEST = np.dtype(
    [("name", "u8"), ("key", "u4"), ("rw_flags", "u4"), ("code", "u2"), ("priority", "i2"), ("file", "u4"),
     ("address", "u8"), ("nbytes", "u8"), ("place", "i8"), ("reserved", "u8"), ("flags", "u4"), ("event_file", "u4")]
)  # fmt: skip
_EVENT = np.dtype([("name", "u8"), ("request", "u8"), ("result", "i8"), ("second", "i8")])


class ReadQueue:
    """A queue of the system for reads of one file that is open for direct I/O. OSError where it cannot be had.

    depth: reads under way at once.
    """

    def __init__(self, file: int, depth: int = DEPTH) -> None:
        if not sys.platform.startswith("linux") or platform.machine() not in _CALLS:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._setup, self._destroy, self._events, self._submit = _CALLS[platform.machine()]
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        context = ctypes.c_ulong(0)
        self._checked(self._setup, ctypes.c_ulong(depth), ctypes.byref(context))
        self._context = context
        weakref.finalize(self, self._call, ctypes.c_long(self._destroy), context)
        self._requests, self._answers = np.zeros(depth, _REQUEST), np.zeros(depth, _EVENT)
        self._requests["file"] = file
        self._pointers = self._requests.ctypes.data + _REQUEST.itemsize * np.arange(depth, dtype=np.uint64)
        self._turn = threading.Lock()

    def read(
        self, places: np.ndarray, lengths: np.ndarray, addresses: np.ndarray, least: np.ndarray | None = None
    ) -> None:
        """Reads lengths[i] bytes from places[i] of the file to addresses[i], any number of them.

        least: as many of them must come, where a file ends within the sectors asked for; all of them unless said.
        OSError where one fails or comes short; nothing is under way any more when it is raised. Threads take turns.
        """
        least = lengths if least is None else least
        with self._turn:
            for begin in range(0, len(places), len(self._requests)):
                some = slice(begin, begin + len(self._requests))
                self._batch(places[some], lengths[some], addresses[some], least[some])

    def _batch(self, places: np.ndarray, lengths: np.ndarray, addresses: np.ndarray, least: np.ndarray) -> None:
        count = len(places)
        wanted = self._requests[:count]
        wanted["place"], wanted["nbytes"], wanted["address"] = places, lengths, addresses
        wanted["name"] = np.arange(count)
        sent = done = 0
        refused: OSError | None = None
        results = np.empty(count, np.int64)
        while done < count:
            if sent < count and refused is None:
                try:
                    sent += self._checked(
                        self._submit, self._context, ctypes.c_long(count - sent),
                        ctypes.c_void_p(self._pointers[sent:].ctypes.data),
                    )  # fmt: skip
                except OSError as error:
                    # EAGAIN: the system has no room for more at the moment; those that are sent make some
                    refused = None if error.errno == errno.EAGAIN and sent > done else error
            if sent == done:
                break
            got = self._checked(
                self._events, self._context, ctypes.c_long(1 if sent < count else sent - done), ctypes.c_long(count),
                ctypes.c_void_p(self._answers.ctypes.data), None,
            )  # fmt: skip
            answers = self._answers[:got]
            results[answers["name"].astype(np.int64)] = answers["result"]
            done += got
        if refused is not None:
            raise refused
        wrong = np.flatnonzero(results < least)
        if len(wrong):
            raise _failure(int(results[wrong[0]]), int(lengths[wrong[0]]))

    def _checked(self, number: int, *arguments: object) -> int:
        """A system call's result; OSError with its own word for what went wrong. Signals only interrupt it."""
        while True:
            result: int = self._call(ctypes.c_long(number), *arguments)
            if result >= 0:
                return result
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))


def _failure(result: int, length: int) -> OSError:
    """What a read that gave `result`, a negative error number or too few bytes, is told as."""
    code = -result if result < 0 else errno.EIO
    return OSError(code, os.strerror(code) if result < 0 else f"{result} of {length} bytes went through")


def try_direct(file: int, page_bytes: int) -> ReadQueue | None:
    """Tries direct I/O on an empty file: some file systems take the flag and refuse the first transfer with an OSError.

    A queue for the file's reads, or None where the system has none to give.
    """
    with mmap.mmap(-1, page_bytes) as probe:
        os.pwrite(file, probe, 0)
        os.preadv(file, [probe], 0)
        room = np.frombuffer(probe, np.uint8)
        try:
            queue = ReadQueue(file)
            queue.read(np.zeros(1, np.int64), np.array([page_bytes]), np.array([room.ctypes.data]))
        except (OSError, AttributeError):
            queue = None
        del room
    os.ftruncate(file, 0)
    return queue


# ---- a file, in batches ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ReadStats:
    """What a reader has moved. wanted_bytes: asked for; read_bytes: with what lies about it in whole sectors."""

    batches: int = 0
    requests: int = 0
    wanted_bytes: int = 0
    read_bytes: int = 0
    seconds: float = 0.0


def aligned_bytes(nbytes: int) -> np.ndarray:
    """uint8 room whose address is a multiple of a page, so that direct reads go straight to it; not zeroed."""
    room = np.empty(nbytes + PAGE_BYTES, np.uint8)
    start = -room.ctypes.data % PAGE_BYTES
    return room[start : start + nbytes]


class DirectReader:
    """Reads one file in batches of (offset, length). Safe to use from several threads; `close` it, or use `with`.

    threads: reads under way at once, by threads where the system has no queue; `queued` says whether it has.
    direct: whether reads go round the page cache; `note` says why not. sector_bytes: what offsets, lengths and
    addresses should be multiples of, so that nothing is read or copied beside what is wanted.
    """

    def __init__(self, path: str | Path, threads: int = 32, *, queue: bool = True) -> None:
        """queue: False for threads whatever the system has. InputError where the file cannot be opened."""
        if not 1 <= threads <= DEPTH:
            raise InputError(f"threads is {threads}; reads under way at once must be 1 to {DEPTH}")
        self.path = Path(path)
        self.stats = ReadStats()
        self.note: str | None = None
        if not self.path.is_file():
            raise InputError(f"{path}: cannot be read: there is no such file")
        try:
            self._file, self.sector_bytes = self._open()
            self.file_bytes = os.fstat(self._file).st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        self._close = weakref.finalize(self, os.close, self._file)
        self._queue: ReadQueue | None = None
        if queue and self.direct:
            with suppress(OSError):
                self._queue = ReadQueue(self._file, threads)
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def direct(self) -> bool:
        return self.note is None

    @property
    def queued(self) -> bool:
        return self._queue is not None

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The file, and the threads; doing so twice does nothing."""
        with self._lock:
            self._queue = None
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
        self._close()

    def read(
        self,
        requests: Sequence[tuple[int, int]] | np.ndarray,
        buffers: Sequence[np.ndarray | memoryview] | None = None,
    ) -> list[np.ndarray]:
        """The bytes of each (offset, length), as uint8 arrays; with `buffers`, in these and over them.

        buffers: one for each request, writable, in one piece, of exactly its length; it is read to in place where the
        request and its address are whole sectors. OSError where a read fails; InputError past the end of the file.
        """
        places, wanted = np.asarray(requests, np.int64).reshape(-1, 2).T
        if buffers is None:
            return self._fresh(places, wanted)
        try:
            views = [np.frombuffer(each, np.uint8) for each in buffers]
        except (ValueError, BufferError):
            views = []
        if [view.nbytes for view in views] != wanted.tolist() or not all(view.flags.writeable for view in views):
            raise InputError(f"{self.path}: buffers must be writable, in one piece, as many and as long as requests")
        addresses = np.array([view.ctypes.data for view in views], np.int64)
        aside = np.flatnonzero((places | wanted | addresses) % self.sector_bytes)
        straight = np.setdiff1d(np.arange(len(views)), aside, assume_unique=True)
        self.read_to(places[straight], wanted[straight], addresses[straight])
        for index, found in zip(aside, self._fresh(places[aside], wanted[aside]), strict=True):
            views[index][:] = found
        return views

    def read_to(self, places: np.ndarray, lengths: np.ndarray, addresses: np.ndarray) -> None:
        """Like `read`, in place: int64 arrays, all multiples of `sector_bytes`. The caller keeps the memory alive."""
        if len(lengths) and ((places | lengths | addresses) % self.sector_bytes).any():
            raise InputError(f"{self.path}: not whole sectors of {self.sector_bytes} bytes")
        self._run(places, lengths, addresses, places, lengths)

    def _fresh(self, places: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
        first = places // self.sector_bytes * self.sector_bytes
        lengths = -(-(places + wanted - first) // self.sector_bytes) * self.sector_bytes
        ends = np.cumsum(lengths)
        begins = ends - lengths
        room = aligned_bytes(int(ends[-1]) if len(ends) else 0)
        self._run(first, lengths, room.ctypes.data + begins, places, wanted)
        starts = begins + places - first
        return [room[start : start + size] for start, size in zip(starts.tolist(), wanted.tolist(), strict=True)]

    def _run(
        self, first: np.ndarray, lengths: np.ndarray, addresses: np.ndarray, places: np.ndarray, wanted: np.ndarray
    ) -> None:
        """Whole sectors from `first`, of which bytes from `places` on are wanted: these must come."""
        self._check(places, wanted)
        if not len(first):
            return
        began = time.perf_counter()
        least = places + wanted - first
        queue = self._queue
        if queue is not None:
            queue.read(first, lengths, addresses, least)
        else:
            self._threaded(first, lengths, addresses, least)
        with self._lock:
            self.stats.batches += 1
            self.stats.requests += len(first)
            self.stats.wanted_bytes += int(wanted.sum())
            self.stats.read_bytes += int(lengths.sum())
            self.stats.seconds += time.perf_counter() - began

    def _check(self, places: np.ndarray, wanted: np.ndarray) -> None:
        if self._close.alive is False:
            raise InputError(f"{self.path}: the reader was closed")
        wrong = np.flatnonzero((places < 0) | (wanted < 1) | (places + wanted > self.file_bytes))
        if len(wrong):
            place, length = int(places[wrong[0]]), int(wanted[wrong[0]])
            raise InputError(
                f"{self.path}: {length} bytes at {place} lie outside the file, which has {self.file_bytes:,}"
            )

    def _threaded(self, first: np.ndarray, lengths: np.ndarray, addresses: np.ndarray, least: np.ndarray) -> None:
        def some(begin: int) -> None:
            share = slice(begin, None, self.threads)
            rows = zip(*(each[share].tolist() for each in (first, lengths, addresses, least)), strict=True)
            for place, length, address, enough in rows:
                got = os.preadv(self._file, [(ctypes.c_char * length).from_address(address)], place)
                if got < enough:
                    raise _failure(got, length)

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, "memwall-read")
            tasks = [self._pool.submit(some, begin) for begin in range(min(self.threads, len(first)))]
        wait(tasks)  # nothing may be under way when an error is raised: it would write to memory that is given back
        for task in tasks:
            task.result()

    def _open(self) -> tuple[int, int]:
        """The open file and its sector size; sets `note` where direct reads are refused."""
        if sys.platform == "darwin":
            import fcntl

            file = os.open(self.path, os.O_RDONLY)
            fcntl.fcntl(file, 48, 1)  # F_NOCACHE
            return file, 1
        if hasattr(os, "O_DIRECT"):
            try:
                file = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                for sector in (512, PAGE_BYTES):
                    with suppress(OSError):
                        os.preadv(file, [aligned_bytes(sector).data], 0)
                        return file, sector
                os.close(file)
        self.note = f"{self.path} takes no direct reads: they go through the page cache"
        return os.open(self.path, os.O_RDONLY), 1
