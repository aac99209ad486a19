"""Many small reads at once through Linux's own queue for direct I/O: one call hands over hundreds of them.

A drive answers scattered pages fastest when it knows of many at a time. A thread a read costs more than the read; the
system's queue (`io_submit`) takes them all in one call, and the drive works on as many as it can. It is asynchronous
for files opened with O_DIRECT only, and not every system lets it be used; `try_direct` then says None.

Units: places and lengths in bytes. Cost: 104 bytes for each read that can be under way.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import threading
import weakref

import numpy as np

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

    def read(self, places: np.ndarray, lengths: np.ndarray, addresses: np.ndarray) -> None:
        """Reads lengths[i] bytes from places[i] of the file to addresses[i], any number of them.

        OSError where one fails or comes short; nothing is under way any more when it is raised. Threads take turns.
        """
        with self._turn:
            for begin in range(0, len(places), len(self._requests)):
                some = slice(begin, begin + len(self._requests))
                self._batch(places[some], lengths[some], addresses[some])

    def _batch(self, places: np.ndarray, lengths: np.ndarray, addresses: np.ndarray) -> None:
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
        wrong = np.flatnonzero(results != lengths)
        if len(wrong):
            result = int(results[wrong[0]])
            code = -result if result < 0 else errno.EIO
            said = os.strerror(code) if result < 0 else f"{result} of {int(lengths[wrong[0]])} bytes went through"
            raise OSError(code, said)

    def _checked(self, number: int, *arguments: object) -> int:
        """A system call's result; OSError with its own word for what went wrong. Signals only interrupt it."""
        while True:
            result: int = self._call(ctypes.c_long(number), *arguments)
            if result >= 0:
                return result
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))


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
