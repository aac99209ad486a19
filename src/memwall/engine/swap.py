"""Where requests that were set aside keep their pages: a file that has no name and goes with the process.

Reads and writes are whole pages. The file is on the ledger's `disk` tier, as long as it may become; without a pool in
memory (the simulator's) pages are counted and nothing is written.
"""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from memwall.errors import InputError
from memwall.memory import Arena, OutOfPages, PagePool

OWNER = "kv/swap"


class SwapArea:
    """Room for `capacity_pages` pages of a pool. folder: where the file lies; None for the system's temporary one."""

    def __init__(
        self, pool: PagePool, capacity_pages: int, *, arena: Arena | None = None, folder: Path | None = None
    ) -> None:
        self.pool = pool
        self.capacity_pages = capacity_pages
        self._free: list[int] = []
        self._next = 0
        self._file = self._charge = None
        self.read_bytes = self.written_bytes = 0
        if arena is not None and capacity_pages:
            try:
                self._file = tempfile.TemporaryFile(dir=folder, prefix="memwall-swap-")  # noqa: SIM115 - lives with us
            except OSError as error:
                raise InputError(f"no swap file can be made in {folder or tempfile.gettempdir()}: {error}") from error
            self._charge = arena.beside("disk").charge(OWNER, 0)

    @property
    def free_pages(self) -> int:
        """Pages that may still be written."""
        return self.capacity_pages - self._next + len(self._free)

    def write(self, pages: Sequence[int]) -> list[int]:
        """Copies pages out; gives their places. OutOfPages, with none taken, when there is no room, on the disk either:
        then the file grows no further.
        """
        if len(pages) > self.free_pages:
            raise OutOfPages(f"{OWNER}: {len(pages)} pages wanted, {self.free_pages} of {self.capacity_pages} are free")
        places = []
        for page in pages:
            if self._free:
                place = heapq.heappop(self._free)
            else:
                place, self._next = self._next, self._next + 1
            places.append(place)
            self.written_bytes += self.pool.page_bytes
            try:
                self._write(page, place)
            except OSError as error:
                self.capacity_pages = self._next  # what was written once can be written again
                self.drop(places)
                raise OutOfPages(f"{OWNER}: no page can be written: {error}") from error
        if self._charge is not None:
            self._charge.resize(self._next * self.pool.page_bytes)
        return places

    def _write(self, page: int, place: int) -> None:
        if self._file is not None:
            view, at = memoryview(self.pool.page(page).data), place * self.pool.page_bytes
            while view:
                count = os.pwrite(self._file.fileno(), view, at)
                view, at = view[count:], at + count

    def read(self, places: Sequence[int], pages: Sequence[int]) -> None:
        """Copies pages back in and frees their places. OSError, with none freed, when one cannot be read."""
        for place, page in zip(places, pages, strict=True):
            self.read_bytes += self.pool.page_bytes
            if self._file is not None:
                view, at = memoryview(self.pool.page(page).data), place * self.pool.page_bytes
                while view:
                    count = os.preadv(self._file.fileno(), [view], at)
                    if count == 0:
                        raise OSError(f"{OWNER}: the file ended at byte {at:,}")
                    view, at = view[count:], at + count
        self.drop(places)

    def drop(self, places: Sequence[int]) -> None:
        """Frees places whose pages nobody wants any more."""
        for place in places:
            heapq.heappush(self._free, place)
        if len(self._free) == self._next:
            self._free, self._next = [], 0
            if self._file is not None and self._charge is not None:
                os.ftruncate(self._file.fileno(), 0)
                self._charge.resize(0)

    def release(self) -> None:
        """Gives the file up."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._charge is not None:
            self._charge.release()
            self._charge = None
