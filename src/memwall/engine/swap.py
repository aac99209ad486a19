"""Where requests that were set aside keep their pages: a file that has no name and goes with the process.

Reads and writes are runs of whole pages that lie in a line in memory and in the file; each is one copy, as long as
`merge` is set. The file is on the ledger's `disk` tier, as long as it may become; without a pool in memory (the
simulator's) pages are counted and nothing is written. Who has which place, and when copies run, is the matter of
`switching`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memwall.errors import BudgetExceeded, InputError
from memwall.memory import Arena, OutOfPages, PagePool
from memwall.memory.page_groups import FreePages, LowestFirst, Owner, PageGroups, paired_runs

OWNER = "kv/swap"


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies that are still to be made: how many, of how many pages and bytes, and what makes them (any thread may)."""

    count: int
    pages: int
    nbytes: int
    run: Callable[[], None]


class SwapArea:
    """Room for `capacity_pages` pages of a pool. folder: where the file lies; None for the system's temporary one.

    group_pages: places of one owner lie in groups of so many, with room for what it will add; 0: the lowest first.
    merge: neighbours are copied together; else each page is a copy.
    """

    def __init__(
        self,
        pool: PagePool,
        capacity_pages: int,
        *,
        arena: Arena | None = None,
        folder: Path | None = None,
        group_pages: int = 0,
        merge: bool = True,
    ) -> None:
        self.pool = pool
        self.capacity_pages = capacity_pages
        self.merge = merge
        self._free: FreePages = PageGroups(capacity_pages, group_pages) if group_pages else LowestFirst(capacity_pages)
        self._used: set[int] = set()
        self._end = 0
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
        return self.capacity_pages - len(self._used)

    def take(self, count: int, owner: Owner = None) -> list[int]:
        """Places for so many pages. OutOfPages, with none taken, where there are too few or the disk has less."""
        if count > self.free_pages:
            raise OutOfPages(f"{OWNER}: {count} pages wanted, {self.free_pages} of {self.capacity_pages} are free")
        places = self._free.take(count, owner)
        end = max(self._end, max(places, default=-1) + 1)
        try:
            if self._charge is not None:
                self._charge.resize(end * self.pool.page_bytes)
        except BudgetExceeded as error:
            self._free.give(places)
            raise OutOfPages(f"{OWNER}: {error}") from error
        self._used.update(places)
        self._end = end
        return places

    def drop(self, places: Sequence[int]) -> None:
        """Frees places whose pages nobody wants any more, and whose copies are over or come before all later ones."""
        self._used.difference_update(places)
        self._free.give(places)

    def close(self, owner: Owner) -> None:
        """The owner takes no more places."""
        self._free.close(owner)

    def empty(self) -> None:
        """Gives the file's length back where no place is in use; no copy may be under way."""
        if not self._used and self._end:
            self._end = 0
            if self._file is not None and self._charge is not None:
                os.ftruncate(self._file.fileno(), 0)
                self._charge.resize(0)

    def cut(self) -> None:
        """A page could not be written: the file grows no further than what is in it."""
        self.capacity_pages = max(self._used, default=-1) + 1
        self._free.reset(self.capacity_pages, self._used)

    def write(self, pages: Sequence[int], places: Sequence[int]) -> Copies:
        """Copies of pages to places. OSError comes from `run`."""
        self.written_bytes += len(pages) * self.pool.page_bytes
        return self._copies(pages, places, self._write)

    def read(self, places: Sequence[int], pages: Sequence[int]) -> Copies:
        """Copies of places to pages. OSError comes from `run`."""
        self.read_bytes += len(pages) * self.pool.page_bytes
        return self._copies(pages, places, self._read)

    def _copies(self, pages: Sequence[int], places: Sequence[int], copy: Callable[[memoryview, int], None]) -> Copies:
        size = self.pool.page_bytes
        runs = paired_runs(pages, places) if self.merge else [(page, place, 1) for page, place in zip(pages, places)]
        # views are made here: the pool belongs to the engine's thread
        views = self.pool.pieces(runs) if self._file else []

        def run() -> None:
            for view, at in views:
                copy(view, at)

        return Copies(len(runs), len(pages), len(pages) * size, run)

    def _write(self, view: memoryview, at: int) -> None:
        assert self._file is not None
        while view:
            count = os.pwrite(self._file.fileno(), view, at)
            view, at = view[count:], at + count

    def _read(self, view: memoryview, at: int) -> None:
        assert self._file is not None
        while view:
            count = os.preadv(self._file.fileno(), [view], at)
            if count == 0:
                raise OSError(f"{OWNER}: the file ended at byte {at:,}")
            view, at = view[count:], at + count

    def release(self) -> None:
        """Gives the file up."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._charge is not None:
            self._charge.release()
            self._charge = None
