"""A swap area in two tiers, memory and disk, whose copies are contiguous: gathered, moved in one piece, scattered.

Pages of a conversation lie anywhere in the pool but in a line in the area. Reading them back is one copy of a stretch
into a staging buffer, which then is scattered to the pages; writing is the reverse. The most recently used stretches
stay in memory (`host`); those that were not used longest go to the file when that is full. A page is in one of both.

Source: NanoFlow, Zhu 2024, arXiv 2408.12757, section 4.5 (off-loading of keys and values, with LRU over host memory and
SSD). Differs from it: a stretch has room for the pages of one owner and stays where it is in the file; this machine has
one memory node, so nothing is said about where in memory the host tier lies.

Units: pages and places of the pool's size; `staging_bytes` and `host_bytes` count on the ledger.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memwall.engine.swap import Copies, SwapArea
from memwall.hardware.units import MIB
from memwall.memory import Arena, PagePool

HOST_OWNER, STAGING_OWNER = "kv/host", "kv/staging"
STAGING_BYTES = MIB


@dataclass(slots=True)
class _Slot:
    """Memory of one block. valid: its places that are here and not in the file."""

    at: int
    valid: set[int] = field(default_factory=set)


@dataclass(slots=True)
class TierCounts:
    """Pages since the start: read from memory, read from the file, moved from memory to the file."""

    host_pages: int = 0
    disk_pages: int = 0
    evicted_pages: int = 0


class StagedArea(SwapArea):
    """A `SwapArea` whose copies are staged. host_bytes: memory for what was used last; 0 for the file alone."""

    def __init__(
        self,
        pool: PagePool,
        capacity_pages: int,
        *,
        arena: Arena | None = None,
        folder: Path | None = None,
        group_pages: int = 0,
        host_bytes: int = 0,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        super().__init__(pool, capacity_pages, arena=arena, folder=folder, group_pages=group_pages)
        self.block_pages = max(min(staging_bytes // pool.page_bytes, max(capacity_pages, 1)), 1)
        self.counts = TierCounts()
        self._arena = arena
        self._tiers = threading.Lock()  # both streams copy, each in its thread
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._free_slots: list[int] = []
        self._due: Counter[int] = Counter()  # reads by place that were asked for and have not been
        self._host = self._staging = None
        if self._file is None or arena is None:
            return
        block_bytes = self.block_pages * pool.page_bytes
        self._staging = arena.allocate(STAGING_OWNER, (2, self.block_pages, pool.page_bytes), np.uint8)
        blocks = host_bytes // block_bytes
        if blocks:
            self._host = arena.allocate(HOST_OWNER, (blocks, self.block_pages, pool.page_bytes), np.uint8)
            self._free_slots = list(range(blocks))

    def write(self, pages: Sequence[int], places: Sequence[int]) -> Copies:
        """See `SwapArea`."""
        self.written_bytes += len(pages) * self.pool.page_bytes
        return self._staged(pages, places, 0)

    def read(self, places: Sequence[int], pages: Sequence[int]) -> Copies:
        """See `SwapArea`."""
        self.read_bytes += len(pages) * self.pool.page_bytes
        if self._host is not None:
            with self._tiers:
                self._due.update(places)
        return self._staged(pages, places, 1)

    def empty(self) -> None:
        """See `SwapArea`; what is in memory is wanted no more either, and must not make the file grow again."""
        if not self._used:
            self._free_slots += [slot.at for slot in self._slots.values()]
            self._slots.clear()
        super().empty()

    def release(self) -> None:
        """See `SwapArea`."""
        for held in (self._host, self._staging):
            if held is not None and self._arena is not None:
                self._arena.free(held)
        self._host = self._staging = None
        self._slots.clear()
        super().release()

    def _staged(self, pages: Sequence[int], places: Sequence[int], way: int) -> Copies:
        pieces = list(self._pieces(pages, places))
        # the pool belongs to the engine's thread: the view is made here
        rows = self.pool.array((self.pool.page_bytes,), np.dtype(np.uint8)) if self._staging is not None else None

        def run() -> None:
            if rows is None or self._staging is None:
                return
            for block, first, some in pieces:
                stage = self._staging[way][: len(some)]
                if way == 0:
                    np.take(rows, some, axis=0, out=stage, mode="clip")  # "raise" would gather elsewhere first
                    self._put(block, first, stage)
                else:
                    self._get(block, first, stage)
                    rows[some] = stage
            if way == 1 and self._host is not None:
                with self._tiers:
                    self._due -= Counter(places)

        return Copies(len(pieces), len(pages), len(pages) * self.pool.page_bytes, run)

    def _pieces(self, pages: Sequence[int], places: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """(block, first place in it, pages) of stretches whose places lie in a line within a block."""
        some: list[int] = []
        begin = last = -1
        for page, place in zip(pages, places, strict=True):
            if some and (place != last + 1 or place % self.block_pages == 0):
                yield begin // self.block_pages, begin % self.block_pages, some
                some = []
            if not some:
                begin = place
            some.append(page)
            last = place
        if some:
            yield begin // self.block_pages, begin % self.block_pages, some

    def _put(self, block: int, first: int, stage: np.ndarray) -> None:
        with self._tiers:
            slot = self._slot(block)
            if slot is None:
                self._write(stage.data.cast("B"), self._offset(block, first))
                return
            assert self._host is not None
            self._host[slot.at, first : first + len(stage)] = stage
            slot.valid.update(range(first, first + len(stage)))

    def _get(self, block: int, first: int, stage: np.ndarray) -> None:
        with self._tiers:
            slot = self._slots.get(block)
            if slot is None:
                self._read(stage.data.cast("B"), self._offset(block, first))
                self.counts.disk_pages += len(stage)
                return
            assert self._host is not None
            self._slots.move_to_end(block)
            at = 0
            while at < len(stage):
                here = first + at in slot.valid
                end = at + 1
                while end < len(stage) and (first + end in slot.valid) == here:
                    end += 1
                if here:
                    stage[at:end] = self._host[slot.at, first + at : first + end]
                    self.counts.host_pages += end - at
                else:
                    self._read(stage[at:end].data.cast("B"), self._offset(block, first + at))
                    self.counts.disk_pages += end - at
                at = end

    def _slot(self, block: int) -> _Slot | None:
        """Memory for a block, the one that was not used longest gives way; None where there is no host tier."""
        if self._host is None:
            return None
        slot = self._slots.get(block)
        if slot is None:
            if not self._free_slots:
                self._evict()
            slot = self._slots[block] = _Slot(self._free_slots.pop())
        self._slots.move_to_end(block)
        return slot

    def _evict(self) -> None:
        assert self._host is not None
        block, slot = next(iter(self._slots.items()))
        # a dropped place is worth a write only where a read was asked for before it was dropped
        start = block * self.block_pages
        wanted = [at for at in sorted(slot.valid) if start + at in self._used or self._due[start + at]]
        for first, end in _stretches(wanted):
            self._write(self._host[slot.at, first:end].data.cast("B"), self._offset(block, first))
            self.counts.evicted_pages += end - first
        del self._slots[block]
        self._free_slots.append(slot.at)

    def _offset(self, block: int, place: int) -> int:
        return (block * self.block_pages + place) * self.pool.page_bytes


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """[first, end) of what lies in a line."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
