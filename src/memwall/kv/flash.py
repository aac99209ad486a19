"""A file used as flash: pages that are written once, erase blocks, direct reads by several channels at a time.

Layout of one sequence (all 16-bit floats). A *token page* holds `group` consecutive tokens of one head, keys or values
apart; a *channel page* holds `channels` channels of a head's keys for `span` consecutive tokens. Both are as large:
group * D = channels * span numbers. So keys are there twice, once to be read by token and once by channel.

Pages are only ever appended to a block; a block belongs to one sequence and is erased (its bytes go back to the file
system) when none of its pages is needed any more. Nothing is copied to make room. The file has no name, so that nothing
is left of it however the process ends.

Units: pages and blocks by number from 0; lengths in tokens.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np

from memwall.errors import DoesNotFit
from memwall.memory.arena import SMALL_BYTES, allocated_bytes
from memwall.memory.direct_reader import ReadQueue, try_direct
from memwall.memory.pages import round_up

HALF_BYTES, FLOAT_BYTES, ENTRY_BYTES = 2, 4, 4
SECTOR_BYTES = 512
"""Direct I/O takes multiples of this on most disks."""
FLASH_CHANNELS = 8
"""Of the paper's drive; page p is on channel p mod 8."""
QUERY_ROWS = 128
"""Most queries of one request: as many as the decoder hands over at once."""
READERS = 4
READER_RUNS, READER_BYTES = 4, 1 << 20
"""One reader is enough for so many runs, or for so many bytes in a long one: a second costs more than it brings."""


def direct_bytes(nbytes: int) -> int:
    """What an array for direct I/O takes: never so small that it would come from the heap, unaligned."""
    return allocated_bytes(max(nbytes, SMALL_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashLayout:
    """Where things lie, and what they take, in one storage process. heads, kv_heads: those of this process.

    channels: of a channel page. capacity: tokens of a sequence. sparse: whether logits of all tokens are held.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    group: int
    channels: int
    capacity: int
    block_bytes: int
    chunk_bytes: int
    sparse: bool

    @property
    def page_bytes(self) -> int:
        return self.group * self.head_dim * HALF_BYTES

    @property
    def span(self) -> int:
        """Tokens of a channel page."""
        return self.group * self.head_dim // self.channels

    @property
    def channel_pages(self) -> int:
        """Channel pages of one head and span."""
        return self.head_dim // self.channels

    @property
    def pages_per_block(self) -> int:
        return max(self.block_bytes // self.page_bytes, 1)

    @property
    def key_rows(self) -> int:
        """Keys of a layer that wait in memory until their channel pages are full."""
        return min(self.span, self.capacity)

    @property
    def slots(self) -> int:
        """Pages of a chunk: what is read while the one before is worked on; no more than a layer can have."""
        least = max(2 * self.kv_heads, self.channel_pages * self.kv_heads)
        whole = 2 * self.kv_heads * -(-self.capacity // self.group)
        return max(min(self.chunk_bytes // self.page_bytes, whole), least)

    def pages(self, num_tokens: int) -> int:
        """Pages that a sequence has written."""
        groups, spans = num_tokens // self.group, num_tokens // self.span
        return self.layers * self.kv_heads * (2 * groups + self.channel_pages * spans)

    def blocks(self, num_tokens: int) -> int:
        return -(-self.pages(num_tokens) // self.pages_per_block)

    def flash_bytes(self, num_tokens: int) -> int:
        """Bytes of the file that a sequence takes."""
        return self.blocks(num_tokens) * self.pages_per_block * self.page_bytes

    def group_entries(self) -> int:
        """Entries of one token group in the table of token pages, all layers."""
        return self.layers * 2 * self.kv_heads

    def span_entries(self) -> int:
        return self.layers * self.kv_heads * self.channel_pages

    def inbox_bytes(self) -> int:
        """The largest request: queries, or as many new tokens."""
        row = self.head_dim * HALF_BYTES
        return (QUERY_ROWS + 1) * row * max(self.heads, 2 * self.kv_heads) + 2 * row * self.kv_heads

    def fixed_bytes(self) -> int:
        """Memory of the process that does not depend on sequences."""
        chunk = self.slots * self.page_bytes
        queries = QUERY_ROWS * self.heads * FLOAT_BYTES
        image = max(2, self.channel_pages) * self.kv_heads * self.page_bytes
        parts = (2 * chunk, chunk, 2 * image)
        floats = 2 * chunk if self.sparse else 0
        return (
            sum(direct_bytes(part) for part in parts)
            + (allocated_bytes(floats) if floats else 0)
            + allocated_bytes(self.inbox_bytes())
            + allocated_bytes(3 * queries * self.head_dim)
            + allocated_bytes(2 * queries * 2)
        )

    def sequence_bytes(self, num_tokens: int) -> int:
        """Memory of the process for one sequence: what waits to be written, and the tables."""
        row = self.kv_heads * self.head_dim
        waiting = (self.key_rows * row * HALF_BYTES, self.group * row * HALF_BYTES, row * FLOAT_BYTES)
        groups, spans = num_tokens // self.group, num_tokens // self.span
        logits = num_tokens * (self.heads + self.kv_heads) * FLOAT_BYTES if self.sparse else 0
        return (
            sum(allocated_bytes(self.layers * part) for part in waiting)
            + round_up(groups * self.group_entries() * ENTRY_BYTES)
            + round_up(spans * self.span_entries() * ENTRY_BYTES)
            + round_up(logits)
        )


@dataclass(slots=True)
class Counters:
    """What the storage process has done. channel_reads: pages by flash channel."""

    token_pages_read: int = 0
    channel_pages_read: int = 0
    pages_written: int = 0
    blocks_erased: int = 0
    read_calls: int = 0
    new_bytes: int = 0
    channel_reads: list[int] = field(default_factory=lambda: [0] * FLASH_CHANNELS)

    def to_dict(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


class FlashFile:
    """The file. `direct` says whether reads and writes bypass the system's page cache; `note` why not.

    throttle: lets bytes be read no faster than an emulated drive would.
    """

    def __init__(
        self, layout: FlashLayout, *, direct: bool = True, throttle: Callable[[int, float], None] | None = None
    ) -> None:
        self.layout = layout
        self.counters = Counters()
        self.throttle = throttle
        self.note = ""
        self.free: list[int] = []
        self.num_blocks = 0
        self.directory = tempfile.gettempdir()
        self._queue: ReadQueue | None = None
        self._fd, self.direct = self._open(direct)
        self._pool = ThreadPoolExecutor(READERS, "flash")
        self._ahead = ThreadPoolExecutor(1, "read ahead")
        self._valid: dict[int, int] = {}

    def _open(self, direct: bool) -> tuple[int, bool]:
        if direct and self.layout.page_bytes % SECTOR_BYTES:
            self.note = f"pages of {self.layout.page_bytes} bytes are no multiple of {SECTOR_BYTES}: no direct I/O"
            direct = False
        if direct:
            fd = -1
            try:
                fd = _nameless(self.directory, os.O_DIRECT)
                self._queue = try_direct(fd, self.layout.page_bytes)
                return fd, True
            except (OSError, AttributeError) as error:
                if fd >= 0:
                    os.close(fd)
                self.note = (
                    f"{self.directory} takes no direct I/O with pages of {self.layout.page_bytes} bytes ({error})"
                )
        return _nameless(self.directory, 0), False

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def take_block(self) -> int:
        """A block to append to; DoesNotFit when the disk is full."""
        size = self.layout.pages_per_block * self.layout.page_bytes
        block = self.free[-1] if self.free else self.num_blocks
        try:
            os.posix_fallocate(self._fd, block * size, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DoesNotFit(
                    f"{self.directory} has no room for {size:,} bytes more of keys and values; free some, or point "
                    "TMPDIR elsewhere"
                ) from error
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        if self.free:
            self.free.pop()
        else:
            self.num_blocks += 1
        self._valid[block] = 0
        return block

    def erase(self, block: int) -> None:
        """The block's bytes go back to the file system."""
        size = self.layout.pages_per_block * self.layout.page_bytes
        with contextlib.suppress(
            OSError, AttributeError
        ):  # a file system without holes keeps the bytes for the next block
            _punch(self._fd, block * size, size)
        del self._valid[block]
        self.free.append(block)
        self.counters.blocks_erased += 1

    def invalidate(self, pages: np.ndarray, open_block: int | None) -> list[int]:
        """These pages are not needed any more; the blocks that could be erased thereby, and were."""
        erased = []
        for block, count in zip(*np.unique(pages // self.layout.pages_per_block, return_counts=True)):
            self._valid[int(block)] -= int(count)
            if not self._valid[int(block)] and int(block) != open_block:
                self.erase(int(block))
                erased.append(int(block))
        return erased

    def is_empty(self, block: int) -> bool:
        return self._valid[block] == 0

    # ---- pages -------------------------------------------------------------------------------------------------------

    def write(self, pages: np.ndarray, image: np.ndarray) -> None:
        """Writes image [n, page bytes] as these pages, one call for each run of neighbours."""
        for begin, end in runs(pages):
            _whole(
                os.pwrite(self._fd, image[begin:end].data, int(pages[begin]) * self.layout.page_bytes), image[begin:end]
            )
        for block, count in zip(*np.unique(pages // self.layout.pages_per_block, return_counts=True)):
            self._valid[int(block)] += int(count)
        self.counters.pages_written += len(pages)

    def read(self, pages: np.ndarray, out: np.ndarray, *, by_channel: bool = False) -> None:
        """Reads the pages in their order into out [n, page bytes], runs of neighbours at once, by several threads; many
        runs through the system's queue.
        """
        began = time.perf_counter()
        found, size = runs(pages), self.layout.page_bytes
        parts = min(READERS, max(len(found) // READER_RUNS, len(pages) * size // READER_BYTES))
        if self._queue is not None and len(found) > READERS * READER_RUNS:
            begins, ends = np.array(found, np.int64).T
            addresses = out.ctypes.data + begins * out.strides[0]
            self._queue.read(pages[begins].astype(np.int64) * size, (ends - begins) * size, addresses)
        elif parts > 1:
            jobs = [self._pool.submit(self._read_runs, pages, out, part) for part in _cut(found, len(pages), parts)]
            for job in jobs:
                job.result()
        else:
            self._read_runs(pages, out, found)
        name = "channel_pages_read" if by_channel else "token_pages_read"
        setattr(self.counters, name, getattr(self.counters, name) + len(pages))
        counts = np.bincount(pages % FLASH_CHANNELS, minlength=FLASH_CHANNELS)
        self.counters.channel_reads = [a + int(b) for a, b in zip(self.counters.channel_reads, counts)]
        self.counters.read_calls += len(found)
        if self.throttle is not None:
            self.throttle(len(pages) * self.layout.page_bytes, began)

    def chunks(
        self, parts: Sequence[np.ndarray], halves: np.ndarray, *, by_channel: bool = False
    ) -> Iterator[np.ndarray]:
        """Each part's pages, read while the one before is worked on: views of the two halves in turn.

        The reading thread goes from one to the next by itself, so that the drive does not wait for the attention.
        """
        free, ready, ended = threading.Semaphore(2), queue.SimpleQueue[BaseException | None](), threading.Event()

        def read() -> None:
            try:
                for number, pages in enumerate(parts):
                    free.acquire()
                    if ended.is_set():
                        return
                    self.read(pages, halves[number % 2], by_channel=by_channel)
                    ready.put(None)
            except BaseException as error:
                ready.put(error)

        job = self._ahead.submit(read) if parts else None
        try:
            for number, pages in enumerate(parts):
                error = ready.get()
                if error is not None:
                    raise error
                yield halves[number % 2][: len(pages)]
                free.release()
        finally:
            ended.set()
            free.release()
            if job is not None:
                job.result()

    def close(self) -> None:
        self._ahead.shutdown()
        self._pool.shutdown()
        os.close(self._fd)

    def _read_runs(self, pages: np.ndarray, out: np.ndarray, found: list[tuple[int, int]]) -> None:
        size = self.layout.page_bytes
        for begin, end in found:
            _whole(os.preadv(self._fd, [out[begin:end].data], int(pages[begin]) * size), out[begin:end])


def runs(pages: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of each run of neighbouring pages."""
    if not len(pages):
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(pages)]))


def _cut(found: list[tuple[int, int]], num_pages: int, parts: int) -> list[list[tuple[int, int]]]:
    """The runs dealt to so many readers, about as many pages to each; long runs are cut."""
    share = -(-num_pages // parts)
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for begin, end in found:
        while begin < end:
            part = begin // share
            stop = min(end, (part + 1) * share)
            dealt[part].append((begin, stop))
            begin = stop
    return dealt


def _whole(done: int, buffer: np.ndarray) -> None:
    if done != buffer.nbytes:
        raise OSError(errno.EIO, f"{done} of {buffer.nbytes} bytes went through")


def _nameless(directory: str, flags: int) -> int:
    flags |= os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(directory, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
    fd, path = tempfile.mkstemp(prefix="memwall-", dir=directory)
    try:
        os.close(fd)
        return os.open(path, flags)
    finally:
        os.unlink(path)


def _punch(fd: int, offset: int, nbytes: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    keep_size_and_punch = 0x01 | 0x02
    if libc.fallocate(fd, keep_size_and_punch, ctypes.c_long(offset), ctypes.c_long(nbytes)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")
