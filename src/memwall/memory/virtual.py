"""Address ranges far larger than memory, and a pool of physical pages that are mapped into them.

Arrays over a range never move; what is behind them comes and goes page by page. A `PageSource` makes pages and maps
them (`HostPages` here, `memory.virtual_cuda` for a GPU). A `BlockPool` hands pages out and keeps the books, and
`SlotRanges` maps them at the slots of several ranges at once.

Pages are numbered. A block is one page for each of `planes` ranges (keys and values of each layer, say), which always
come and go together: page `plane * num_blocks + block`. So a slot whose blocks follow each other needs one mapping per
plane, however long it is, and the system's limit on mappings is far away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.memory.arena import Arena
from memwall.memory.pages import HUGE_PAGE_BYTES, PAGE_BYTES, round_up
from memwall.memory.resident import count_unseen

# From Linux' headers; the values are the same on all its common architectures.
_NONE, _READ_WRITE = 0, 3
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE, _POPULATE = 0x01, 0x02, 0x10, 0x20, 0x4000, 0x8000
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_HUGETLB = 0x04
_DONTNEED, _HUGE = 4, 14
_FAILED = ctypes.c_void_p(-1).value
DEFAULT_MOST_MAPPINGS = 65530
MAPPINGS_FOR_OTHERS = 4096
"""Mappings left to the rest of the process: libraries, the heap, thread stacks."""


class OutOfBlocks(DoesNotFit):
    """No block is left: something must be freed, or a sequence set aside."""


class AddressRange:
    """Reserved addresses. They stay reserved as long as this object or an array over them lives."""

    def __init__(self, address: int, nbytes: int, give_up: Any, *arguments: object) -> None:
        self.address = address
        self.nbytes = nbytes
        weakref.finalize(self, give_up, *arguments)


@dataclass(frozen=True, slots=True)
class _Window:
    """What NumPy makes an array of; the array keeps it, and it keeps the range."""

    range: AddressRange
    __array_interface__: dict[str, object]


class PageSource(ABC):
    """Physical pages by number, and address ranges that they can be mapped into."""

    page_bytes: int
    maps_count = True
    """Whether the system limits how many separate mappings there are."""

    @abstractmethod
    def reserve(self, nbytes: int) -> AddressRange:
        """Addresses with nothing behind them."""

    @abstractmethod
    def touch(self, first: int, count: int) -> None:
        """Makes pages physical; MemoryError, with none of them made, when there is no memory left."""

    @abstractmethod
    def discard(self, first: int, count: int) -> None:
        """Gives the memory of pages that are mapped nowhere back."""

    @abstractmethod
    def map(self, target: AddressRange, offset_bytes: int, first: int, count: int) -> None:
        """Puts physical pages behind addresses that have nothing behind them. A page may be mapped several times."""

    @abstractmethod
    def unmap(self, target: AddressRange, offset_bytes: int, count: int) -> None:
        """Leaves the addresses reserved, with nothing behind them; the pages keep what is in them."""

    @abstractmethod
    def view(
        self, target: AddressRange, shape: Sequence[int], strides: Sequence[int], dtype: DTypeLike, offset_bytes: int
    ) -> Any:
        """An array over the range (strides in bytes), mapped or not."""

    @abstractmethod
    def copy(self, array: Any) -> Any:
        """What an array of `view` holds now, in memory of its own."""

    def fence(self) -> None:  # noqa: B027 - a processor needs none
        """Returns once everything queued that may read mapped pages has ended."""

    @abstractmethod
    def close(self) -> None:
        """Gives all pages back."""


def _load(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C library; called through ctypes it lets other threads run."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.argtypes, function.restype = arguments, result
    return function


_LINUX = sys.platform.startswith("linux")
if _LINUX:
    _SIZE, _INT, _ADDRESS, _OFFSET = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_long
    _mmap = _load("mmap", _ADDRESS, _ADDRESS, _SIZE, _INT, _INT, _INT, _OFFSET)
    _munmap = _load("munmap", _INT, _ADDRESS, _SIZE)
    _madvise = _load("madvise", _INT, _ADDRESS, _SIZE, _INT)
    _fallocate = _load("fallocate", _INT, _INT, _INT, _OFFSET, _OFFSET)


def _map_memory(address: int | None, nbytes: int, protection: int, flags: int, file: int = -1, offset: int = 0) -> int:
    found = _mmap(address, nbytes, protection, flags, file, offset)
    if found in (_FAILED, None):
        code = ctypes.get_errno()
        raise MemoryError(f"the system mapped no {nbytes:,} bytes: {os.strerror(code)} ({errno.errorcode.get(code)})")
    return int(found)


class HostPages(PageSource):
    """Pages of this machine's memory: one file that lives in memory only, a page number being a place in it.

    huge: 2 MiB pages of the processor, from the system's huge page pool where that has enough (`MFD_HUGETLB`), and
    asked for page by page otherwise. They need a `page_bytes` that is a multiple of 2 MiB.
    """

    def __init__(self, page_bytes: int, num_pages: int, *, huge: bool = False) -> None:
        if not _LINUX:
            raise InputError(
                "pages that are mapped on demand need Linux (memfd); use another KV policy, such as float16"
            )
        unit = HUGE_PAGE_BYTES if huge else PAGE_BYTES
        if page_bytes <= 0 or page_bytes % unit or num_pages < 1:
            raise InputError(f"{num_pages} pages of {page_bytes} bytes: a page must be a multiple of {unit} bytes")
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.huge = huge
        self.from_huge_pool = huge and self._open(_HUGETLB)
        if not self.from_huge_pool:
            self._open(0)
        self._mapped_pages = 0
        self._lock = threading.Lock()
        count_unseen(self)

    def _open(self, flags: int) -> bool:
        """Opens the file; False when the huge page pool can't back all of it."""
        nbytes = self.page_bytes * self.num_pages
        if flags and _free_huge_bytes() < nbytes:
            return False
        try:
            self._file = os.memfd_create("memwall pages", os.MFD_CLOEXEC | flags)
            os.ftruncate(self._file, nbytes)
        except OSError:
            if flags:
                return False
            raise
        self._close = weakref.finalize(self, os.close, self._file)
        return True

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the system has given the file."""
        return os.fstat(self._file).st_blocks * 512 if self._close.alive else 0

    @property
    def unseen_bytes(self) -> int:
        shown = 0 if self.from_huge_pool else self._mapped_pages * self.page_bytes
        return self.held_bytes - shown

    def reserve(self, nbytes: int) -> AddressRange:
        slack = HUGE_PAGE_BYTES if self.huge else 0
        flags = _PRIVATE | _ANONYMOUS | _NORESERVE
        whole = round_up(nbytes) + slack
        base = _map_memory(None, whole, _NONE, flags)
        return AddressRange(base + (-base % HUGE_PAGE_BYTES if slack else 0), nbytes, _munmap, base, whole)

    def touch(self, first: int, count: int) -> None:
        try:
            os.posix_fallocate(self._file, first * self.page_bytes, count * self.page_bytes)
        except OSError as error:
            raise MemoryError(f"the system has no {count * self.page_bytes:,} bytes of memory left: {error}") from error

    def discard(self, first: int, count: int) -> None:
        if _fallocate(self._file, _PUNCH_HOLE | _KEEP_SIZE, first * self.page_bytes, count * self.page_bytes):
            raise OSError(ctypes.get_errno(), "pages could not be given back")

    def map(self, target: AddressRange, offset_bytes: int, first: int, count: int) -> None:
        nbytes, address = count * self.page_bytes, target.address + offset_bytes
        flags = _SHARED | _FIXED | _POPULATE
        _map_memory(address, nbytes, _READ_WRITE, flags, self._file, first * self.page_bytes)
        if self.huge and not self.from_huge_pool:
            _madvise(address, nbytes, _HUGE)  # advice: the kernel may have none, and nothing changes but speed
        with self._lock:
            self._mapped_pages += count

    def unmap(self, target: AddressRange, offset_bytes: int, count: int) -> None:
        flags = _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED
        _map_memory(target.address + offset_bytes, count * self.page_bytes, _NONE, flags)
        with self._lock:
            self._mapped_pages -= count

    def view(
        self, target: AddressRange, shape: Sequence[int], strides: Sequence[int], dtype: DTypeLike, offset_bytes: int
    ) -> np.ndarray:
        interface = {
            "version": 3, "shape": tuple(shape), "strides": tuple(strides), "typestr": np.dtype(dtype).str,
            "data": (target.address + offset_bytes, False),
        }  # fmt: skip
        return np.asarray(_Window(target, interface))

    def copy(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def close(self) -> None:
        self._close()
        self._mapped_pages = 0


class LazyPages(HostPages):
    """The baseline: every address may be used; the system finds a page at the first touch, in the midst of the work.

    Nothing is held before, nothing bounds it but the machine, and a page cannot be shared.
    """

    maps_count = False

    def reserve(self, nbytes: int) -> AddressRange:
        flags = _PRIVATE | _ANONYMOUS | _NORESERVE
        base = _map_memory(None, round_up(nbytes), _READ_WRITE, flags)
        return AddressRange(base, nbytes, _munmap, base, round_up(nbytes))

    def touch(self, first: int, count: int) -> None:
        pass

    def discard(self, first: int, count: int) -> None:
        pass

    def map(self, target: AddressRange, offset_bytes: int, first: int, count: int) -> None:
        pass

    def unmap(self, target: AddressRange, offset_bytes: int, count: int) -> None:
        _madvise(target.address + offset_bytes, count * self.page_bytes, _DONTNEED)


class BlockPool:
    """Blocks of pages: free without memory, spare (memory held, mapped nowhere) or mapped, perhaps more than once.

    Memory is counted against the arena before it is touched: mapped blocks under `owner`, spare ones under `owner`
    `/spare`. keep: whether a block that is dropped stays as a spare one; otherwise its memory goes back at once. limit:
    blocks that may have memory, `num_blocks` unless it is moved. A block that is pinned counts as mapped, and keeps
    what is in it.
    """

    def __init__(
        self, source: PageSource, arena: Arena, owner: str, *, num_blocks: int, planes: int, keep: bool
    ) -> None:
        self.source = source
        self.arena = arena
        self.num_blocks = self.limit = num_blocks
        self.planes = planes
        self.keep = keep
        self.block_bytes = planes * source.page_bytes
        self._uses = np.zeros(num_blocks, np.int32)
        self._held = np.zeros(num_blocks, np.bool_)
        self._num_held = self._num_mapped = 0
        self.pinned: set[int] = set()
        self._mapped_charge = arena.charge(owner, 0)
        self._spare_charge = arena.charge(f"{owner}/spare", 0)

    @property
    def mapped(self) -> int:
        """Blocks mapped somewhere, or pinned."""
        return self._num_mapped

    @property
    def held(self) -> int:
        """Blocks with memory."""
        return self._num_held

    @property
    def spare(self) -> int:
        """Blocks with memory that are mapped nowhere."""
        return self._num_held - self._num_mapped

    @property
    def available(self) -> int:
        """Blocks that `take` could hand out now: spare ones, and new ones as far as the arena has room."""
        return self.spare + min(self.limit - self._num_held, self.arena.free_bytes // self.block_bytes)

    def uses(self, block: int) -> int:
        """How often a block is mapped."""
        return int(self._uses[block]) - (block in self.pinned)

    def fill(self, count: int) -> None:
        """Holds memory for `count` more spare blocks; BudgetExceeded or MemoryError with nothing changed."""
        self._hold(np.flatnonzero(~self._held)[:count].tolist(), count)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Blocks to map, following `after` and each other where they can.

        OutOfBlocks, BudgetExceeded or MemoryError with nothing changed.
        """
        self.check(count)
        new = max(count - self.spare, 0)
        taken: list[int] = []
        for index in range(count):
            block = after = self._pick(after, spare=index < count - new)
            self._uses[block] = 1
            taken.append(block)
        try:
            self._hold([block for block in taken if not self._held[block]], new)
        except BaseException:
            self._uses[taken] = 0
            raise
        self._num_mapped += count
        self._spare_charge.move_to(self._mapped_charge, count * self.block_bytes)
        return taken

    def check(self, count: int) -> None:
        """OutOfBlocks or BudgetExceeded where `take` could not hand out so many."""
        left = self.limit - self._num_mapped
        if count > left:
            raise OutOfBlocks(f"{count} blocks of {self.block_bytes:,} bytes wanted, {left} of {self.limit} are left")
        new, arena = max(count - self.spare, 0) * self.block_bytes, self.arena
        if new > arena.free_bytes:
            raise BudgetExceeded(self._mapped_charge.owner, new, arena.free_bytes, arena.cap_bytes, arena.tier)

    def share(self, blocks: Sequence[int]) -> None:
        """These mapped blocks are mapped once more each."""
        assert all(self._uses[block] > 0 for block in blocks)
        for block in blocks:
            self._uses[block] += 1

    def pin(self, blocks: Sequence[int]) -> None:
        """These mapped blocks keep what is in them until `unpin`."""
        self.share(blocks)
        self.pinned.update(blocks)

    def unpin(self, blocks: Sequence[int]) -> None:
        """Those that are mapped nowhere are free from now on."""
        self.pinned.difference_update(blocks)
        self.drop(blocks)

    def drop(self, blocks: Sequence[int]) -> int:
        """These blocks are mapped once less each; how many are mapped nowhere now."""
        unused = []
        for block in blocks:
            assert self._uses[block] > 0, f"block {block} is dropped more often than it was mapped"
            self._uses[block] -= 1
            if not self._uses[block]:
                unused.append(block)
        self._num_mapped -= len(unused)
        self._mapped_charge.move_to(self._spare_charge, len(unused) * self.block_bytes)
        if not self.keep:
            self._give_back(unused)
        return len(unused)

    def give_back(self, count: int | None = None) -> int:
        """Gives the memory of so many spare blocks (all, unless told) back to the system; how many there were."""
        spare = np.flatnonzero(self._held & (self._uses == 0)).tolist()
        gone = spare if count is None else spare[len(spare) - min(count, len(spare)) :]
        self._give_back(gone)
        return len(gone)

    def release(self) -> None:
        """Gives everything back; the pages must be mapped nowhere."""
        self.source.close()
        self._mapped_charge.release()
        self._spare_charge.release()

    def _hold(self, blocks: list[int], count: int) -> None:
        if len(blocks) < count:
            raise OutOfBlocks(f"{count} blocks to hold, but the pool of {self.num_blocks} has {len(blocks)} left")
        if not blocks:
            return
        before = self._spare_charge.nbytes
        self._spare_charge.resize(before + len(blocks) * self.block_bytes)
        done: list[tuple[int, int]] = []
        try:
            for first, length in self._pages(blocks):
                self.source.touch(first, length)
                done.append((first, length))
        except MemoryError:
            for first, length in done:
                self.source.discard(first, length)
            self._spare_charge.resize(before)
            raise
        self._held[blocks] = True
        self._num_held += len(blocks)

    def _give_back(self, blocks: list[int]) -> None:
        for first, length in self._pages(blocks):
            self.source.discard(first, length)
        self._held[blocks] = False
        self._num_held -= len(blocks)
        self._spare_charge.resize(self._spare_charge.nbytes - len(blocks) * self.block_bytes)

    def _pages(self, blocks: list[int]) -> Iterator[tuple[int, int]]:
        for first, length in runs(sorted(blocks)):
            for plane in range(self.planes):
                yield plane * self.num_blocks + first, length

    def _pick(self, after: int | None, *, spare: bool) -> int:
        """The block that follows; else one in the midst of the longest free run, so that both neighbours can grow."""
        follower = self.num_blocks if after is None else after + 1
        if follower < self.num_blocks and not self._uses[follower] and self._held[follower] == spare:
            return follower
        usable = (self._uses == 0) & (self._held == spare)
        edges = np.flatnonzero(np.diff(usable, prepend=False, append=False))
        begins, ends = edges[::2], edges[1::2]
        longest = int(np.argmax(ends - begins))
        begin, end = int(begins[longest]), int(ends[longest])
        return begin if begin == 0 else (begin + end) // 2


class SlotRanges:
    """`planes` address ranges of `num_slots` slots each; the same blocks, from a slot's start on, lie behind all of
    them. Not safe for several threads by itself.
    """

    def __init__(self, pool: BlockPool, *, num_slots: int, slot_bytes: int) -> None:
        self.pool = pool
        self.slot_bytes = round_up(slot_bytes, pool.source.page_bytes)
        self.ranges = [pool.source.reserve(num_slots * self.slot_bytes) for _ in range(pool.planes)]
        self.blocks: list[list[int]] = [[] for _ in range(num_slots)]
        self.num_calls = 0
        self._runs = [0] * num_slots
        self.most_mappings = _most_mappings() if pool.source.maps_count else sys.maxsize
        least = pool.planes * (2 * num_slots + 1)
        if least > self.most_mappings:
            raise InputError(
                f"{num_slots} slots in {pool.planes} ranges need {least:,} mappings, and the system allows "
                f"{self.most_mappings:,} (vm.max_map_count); use fewer slots, or one range for all layers (megacache)"
            )

    @property
    def mappings(self) -> int:
        """At most this many mappings of the system: runs of pages, and what is left of each slot."""
        return self.pool.planes * (1 + sum(self._runs) + len(self._runs) - self._runs.count(0))

    def grow(self, slot: int, blocks: list[int]) -> None:
        """Maps more blocks behind those of the slot. DoesNotFit, with nothing changed, at the limit of mappings."""
        if not blocks:
            return
        held = self.blocks[slot]
        more = self.pool.planes * (sum(1 for _ in runs(blocks)) + 2)
        if self.mappings + more > self.most_mappings:
            raise DoesNotFit(
                f"{self.mappings:,} mappings of pages are in use and the system allows {self.most_mappings:,} "
                "(vm.max_map_count); use larger pages, or one range for all layers (megacache)"
            )
        offset = slot * self.slot_bytes + len(held) * self.pool.source.page_bytes
        if offset + len(blocks) * self.pool.source.page_bytes > (slot + 1) * self.slot_bytes:
            raise ValueError(f"slot {slot} holds {len(held)} blocks; {len(blocks)} more do not fit")
        for first, length in runs(blocks):
            for plane, target in enumerate(self.ranges):
                self.pool.source.map(target, offset, plane * self.pool.num_blocks + first, length)
            offset += length * self.pool.source.page_bytes
            self.num_calls += self.pool.planes
        self._runs[slot] += sum(1 for _ in runs(blocks)) - (bool(held) and held[-1] + 1 == blocks[0])
        held.extend(blocks)

    def shrink(self, slot: int, num_blocks: int) -> int:
        """Keeps the slot's first blocks and drops the others; how many of these are mapped nowhere now."""
        held = self.blocks[slot]
        gone = held[num_blocks:]
        if not gone:
            return 0
        self._unmap(slot, num_blocks, len(gone))
        del held[num_blocks:]
        self._runs[slot] = sum(1 for _ in runs(held))
        return self.pool.drop(gone)

    def replace(self, slot: int, index: int, block: int) -> None:
        """Another block in the place of one of the slot's, with the same content."""
        source, page = self.pool.source, self.pool.source.page_bytes
        offset = slot * self.slot_bytes + index * page
        for plane, target in enumerate(self.ranges):
            window = source.view(target, (page,), (1,), np.uint8, offset)
            content = source.copy(window)
            source.fence()  # the copy itself may still be queued
            source.unmap(target, offset, 1)
            source.map(target, offset, plane * self.pool.num_blocks + block, 1)
            window[:] = content
        self.num_calls += self.pool.planes
        self.pool.drop([self.blocks[slot][index]])
        self.blocks[slot][index] = block
        self._runs[slot] = sum(1 for _ in runs(self.blocks[slot]))

    def pages(self, slot: int, index: int) -> list[Any]:
        """The bytes of one of a slot's blocks: of its page in each range, uint8."""
        page = self.pool.source.page_bytes
        offset = slot * self.slot_bytes + index * page
        return [self.pool.source.view(target, (page,), (1,), np.uint8, offset) for target in self.ranges]

    def release(self) -> None:
        """Unmaps everything."""
        for slot in range(len(self.blocks)):
            self.shrink(slot, 0)

    def _unmap(self, slot: int, first: int, count: int) -> None:
        for target in self.ranges:
            self.pool.source.unmap(target, slot * self.slot_bytes + first * self.pool.source.page_bytes, count)


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, length) of the stretches in which each number follows the one before."""
    begin = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            yield blocks[begin], index - begin
            begin = index


def _most_mappings() -> int:
    """Mappings that this process may still make."""
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
        in_use = Path("/proc/self/maps").read_text().count("\n")
    except (OSError, ValueError):
        allowed, in_use = DEFAULT_MOST_MAPPINGS, 0
    return allowed - in_use - MAPPINGS_FOR_OTHERS


def _free_huge_bytes() -> int:
    folder = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE_BYTES >> 10}kB")
    try:
        return int((folder / "free_hugepages").read_text()) * HUGE_PAGE_BYTES
    except (OSError, ValueError):
        return 0
