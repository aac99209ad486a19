"""The system's queue for direct reads: what is asked for comes, whole or as an error, and nothing is left under way."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.kv import direct_reads
from memwall.kv.direct_reads import ReadQueue, try_direct

PAGE, PAGES = 4096, 256


class Disk:
    """A file of pages that begin with their numbers, open for direct I/O, and memory to read to."""

    def __init__(self) -> None:
        self.file = os.open(tempfile.gettempdir(), os.O_RDWR | os.O_DIRECT | os.O_TMPFILE, 0o600)
        self.queue = try_direct(self.file, PAGE)
        self.room = mmap.mmap(-1, PAGES * PAGE)
        self.out = np.frombuffer(self.room, np.int64).reshape(PAGES, -1)
        self.out[:] = np.arange(PAGES)[:, None]
        os.pwrite(self.file, self.room, 0)
        self.out[:] = -1

    def read(self, queue: ReadQueue, places: list[tuple[int, int]]) -> None:
        """(first page, pages) of runs, one behind the other into the room."""
        firsts, counts = np.array(places, np.int64).reshape(-1, 2).T
        begins = np.cumsum(counts) - counts
        queue.read(firsts * PAGE, counts * PAGE, self.out.ctypes.data + begins * PAGE)


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    try:
        made = Disk()
    except (OSError, AttributeError) as refused:
        pytest.skip(f"no direct I/O here: {refused}")
    if made.queue is None:
        pytest.skip("the system has no queue to give")
    yield made
    os.close(made.file)


@settings(max_examples=50, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, PAGES - 4), st.integers(1, 4)), max_size=PAGES // 4),
    depth=st.integers(1, 40),
)
def test_every_run_comes_whole(disk: Disk, places: list[tuple[int, int]], depth: int) -> None:
    """Whatever the queue's depth, in any order, one page as often as it is asked for."""
    disk.out[:] = -1
    disk.read(ReadQueue(disk.file, depth), places)
    pages = [first + i for first, count in places for i in range(count)]
    assert disk.out[: len(pages), 0].tolist() == disk.out[: len(pages), -1].tolist() == pages
    assert (disk.out[len(pages) :] == -1).all()


def test_what_comes_short_is_an_error_and_the_queue_goes_on(disk: Disk) -> None:
    assert disk.queue is not None
    with pytest.raises(OSError, match="0 of 4096 bytes"):
        disk.read(disk.queue, [(0, 1), (PAGES, 1), (1, 1)])
    with pytest.raises(OSError, match="4096 of 8192 bytes"):
        disk.read(disk.queue, [(PAGES - 1, 2)])
    with pytest.raises(OSError) as refused:  # direct I/O takes whole sectors only
        disk.queue.read(np.array([0, 3]), np.array([PAGE, PAGE]), disk.out.ctypes.data + np.array([0, PAGE]))
    assert refused.value.errno == errno.EINVAL
    disk.read(disk.queue, [(7, 1), (3, 2)])
    assert disk.out[:3, 0].tolist() == [7, 3, 4]


def test_threads_take_turns(disk: Disk) -> None:
    queue = disk.queue
    assert queue is not None
    wrong = []

    def read(first: int) -> None:
        with mmap.mmap(-1, 32 * PAGE) as room:
            out = np.frombuffer(room, np.int64).reshape(32, -1)
            for turn in range(20):
                pages = (np.arange(32) * 5 + first + turn) % PAGES
                queue.read(pages * PAGE, np.full(32, PAGE), out.ctypes.data + np.arange(32) * PAGE)
                wrong.extend(np.flatnonzero(out[:, 9] != pages))
            del out

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_system_without_a_queue_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(direct_reads, "_CALLS", {})
    with (tmp_path / "f").open("w+b") as file:
        assert try_direct(file.fileno(), PAGE) is None
        assert os.fstat(file.fileno()).st_size == 0
