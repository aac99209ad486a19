"""Ranges of anonymous memory whose pages are made resident and given back on request.

The heap keeps what is freed for itself; a mapping of one's own gives pages back to the system at once, which is what
lets the ledger agree with the resident set. Huge pages (2 MiB) are asked for only where a whole one is committed, so
that the resident set never exceeds what was committed.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import sys
from typing import Any

import numpy as np

from memwall.hardware.units import MIB

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 * MIB
_LINUX = sys.platform.startswith("linux")
# Not named in the mmap module of every Python this runs on; values from the kernels' headers.
_NORESERVE = 0x4000 if _LINUX else 0x40 if sys.platform == "darwin" else 0
_POPULATE_WRITE = 23
_REMOVE = 9  # shared pages are the mapping's own: to let go of them here alone frees nothing
_HUGE, _NO_HUGE = 14, 15


def round_up(nbytes: int, unit: int = PAGE_BYTES) -> int:
    """The least multiple of `unit` that is not below `nbytes`."""
    return -(-nbytes // unit) * unit


class Pages:
    """`capacity_bytes` of address space, of which nothing is resident until `populate`.

    The address range lives as long as any array made by `view`; `discard` gives the pages back at once, and arrays that
    still look at them read zeros instead of crashing.
    """

    def __init__(self, capacity_bytes: int, *, huge: bool, shared: bool = False) -> None:
        """shared: a process that is forked from this one sees the same bytes, not a copy of them."""
        self.capacity_bytes = round_up(capacity_bytes)
        self._huge = huge and _LINUX and not shared
        self._given_back = _REMOVE if shared and _LINUX else mmap.MADV_DONTNEED if _LINUX else mmap.MADV_FREE
        slack = HUGE_PAGE_BYTES if self._huge else 0
        try:
            kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
            self._map = mmap.mmap(-1, self.capacity_bytes + slack, flags=kind | mmap.MAP_ANONYMOUS | _NORESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"the system gave no address range of {capacity_bytes:,} bytes: {error}") from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        base = int(self._bytes.ctypes.data)
        self._start = -base % HUGE_PAGE_BYTES if self._huge else 0
        self._address = base + self._start
        if _LINUX:  # where huge pages are the system's default a fault in the tail would bring in 2 MiB
            _madvise(base, self.capacity_bytes + slack, _NO_HUGE)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset_bytes: int) -> np.ndarray:
        """An array over the range; it keeps the address range alive."""
        begin = self._start + offset_bytes
        nbytes = math.prod(shape) * dtype.itemsize
        return self._bytes[begin : begin + nbytes].view(dtype).reshape(shape)

    def populate(self, begin: int, end: int) -> None:
        """Makes the pages of [begin, end) resident, zeroed.

        MemoryError, with nothing kept, when the system has none left.
        """
        if begin >= end:
            return
        if self._huge and end >= HUGE_PAGE_BYTES:
            _madvise(self._address, end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, _HUGE)
        failure = _madvise(self._address + begin, end - begin, _POPULATE_WRITE) if _LINUX else errno.EINVAL
        if failure == errno.EINVAL:  # a kernel before 5.14, or another system: touch each page
            self._bytes[self._start + begin : self._start + end : 1 if not _LINUX else PAGE_BYTES] = 0
        elif failure:
            self.discard(begin, end)
            raise MemoryError(
                f"the system has no {end - begin:,} bytes of memory left (errno {errno.errorcode.get(failure)})"
            )

    def discard(self, begin: int, end: int) -> None:
        """Gives the pages of [begin, end) back to the system."""
        if begin >= end:
            return
        if self._huge:
            kept = begin // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
            _madvise(self._address + kept, self.capacity_bytes - kept, _NO_HUGE)
        _madvise(self._address + begin, end - begin, self._given_back)


def _load_madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise  # through ctypes: it lets other threads run meanwhile
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


_libc_madvise = _load_madvise()


def _madvise(address: int, nbytes: int, advice: int) -> int:
    """0, or the error number. Advice on huge pages may fail harmlessly where the kernel has none."""
    while True:
        if _libc_madvise(address, nbytes, advice) == 0:
            return 0
        failure = ctypes.get_errno()
        if failure not in (errno.EINTR, errno.EAGAIN):
            return failure
