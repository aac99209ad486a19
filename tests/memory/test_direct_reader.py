"""Direct reads: what is asked for comes, whole or as an error, and nothing is left under way."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.memory import direct_reader
from memwall.memory.direct_reader import DirectReader, ReadQueue, aligned_bytes, try_direct

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
    monkeypatch.setattr(direct_reader, "_CALLS", {})
    with (tmp_path / "f").open("w+b") as file:
        assert try_direct(file.fileno(), PAGE) is None
        assert os.fstat(file.fileno()).st_size == 0


# ---- a file, in batches ---------------------------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).integers(0, 256, 200_003, np.uint8)
KINDS = ("queue", "threads", "cached")


def open_reader(path: Path, kind: str, threads: int = 4) -> DirectReader:
    with pytest.MonkeyPatch.context() as patch:
        if kind == "cached":
            patch.delattr(os, "O_DIRECT", raising=False)
            patch.setattr("sys.platform", "linux")
        return DirectReader(path, threads, queue=kind == "queue")


@pytest.fixture(scope="module", params=KINDS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectReader]:
    path = tmp_path_factory.mktemp("reader") / "content"
    CONTENT.tofile(path)
    with open_reader(path, request.param) as made:
        assert request.param != "cached" or (not made.direct and not made.queued and "page cache" in str(made.note))
        yield made


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Whole sectors and odd bytes, up to the last one of the file."""
    unit = draw(st.sampled_from((1, 512, 4096)))
    begin = draw(st.integers(0, (len(CONTENT) - 1) // unit)) * unit
    length = draw(st.integers(1, 9000 // unit)) * unit
    return begin, min(length, len(CONTENT) - begin)


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(ranges(), max_size=12), shift=st.sampled_from((0, 512, 1)), given_room=st.booleans())
def test_bytes_are_those_of_the_file(
    reader: DirectReader, requests: list[tuple[int, int]], shift: int, given_room: bool
) -> None:
    before = reader.stats.wanted_bytes
    buffers = [aligned_bytes(length + shift)[shift:] for _, length in requests] if given_room else None
    found = reader.read(requests, buffers)
    assert [each.tolist() for each in found] == [CONTENT[at : at + length].tolist() for at, length in requests]
    if buffers is not None:
        assert all((buffer == each).all() for buffer, each in zip(buffers, found, strict=True))
    assert reader.stats.wanted_bytes - before == sum(length for _, length in requests)
    assert reader.stats.read_bytes >= reader.stats.wanted_bytes


def test_the_device_moves_what_is_counted(tmp_path: Path) -> None:
    """Of a file that the page cache holds: the system's own count of the process's reads says that they went round."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        pytest.skip("the system does not count")
    path = tmp_path / "content"
    CONTENT.tofile(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        file.read()
    with open_reader(path, "queue") as reader:
        if not reader.direct:
            pytest.skip(str(reader.note))

        def from_device() -> int:
            return int(counts.read_text().split("read_bytes:")[1].split()[0])

        before, counted = from_device(), reader.stats.read_bytes
        reader.read([(4096 * i, 4096) for i in range(40)])
        moved = from_device() - before
        if moved == 0:
            pytest.skip("the file lies on no device that is counted")
        assert moved == reader.stats.read_bytes - counted == 40 * 4096


@pytest.mark.parametrize("kind", KINDS)
def test_bad_requests_are_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "content"
    CONTENT[:10_000].tofile(path)
    with open_reader(path, kind) as reader:
        assert reader.read([]) == []
        for request in ((-1, 5), (0, 0), (9_999, 2), (20_000, 1)):
            with pytest.raises(InputError, match=r"lie outside the file, which has 10,000"):
                reader.read([(0, 10), request])
        for buffers in ([], [np.empty(9, np.uint8)], [b"0123456789"], [np.empty((10, 2), np.uint8)[:, 0]]):
            with pytest.raises(InputError, match="buffers must be writable, in one piece"):
                reader.read([(0, 10)], buffers)
        if reader.sector_bytes > 1:
            with pytest.raises(InputError, match="not whole sectors"):
                reader.read_to(np.array([3]), np.array([512]), np.array([0]))
        path.write_bytes(b"short")
        with pytest.raises(OSError, match="0 of"):
            reader.read([(0, 5), (4096, 512)])
        assert bytes(reader.read([(0, 5)])[0]) == b"short"
    with pytest.raises(InputError, match="closed"):
        reader.read([(0, 5)])
    reader.close()


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        DirectReader(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        DirectReader(tmp_path)
    with pytest.raises(InputError, match="1 to 1024"):
        DirectReader(tmp_path, 0)


def test_threads_read_at_once(reader: DirectReader) -> None:
    wrong = []

    def read(first: int) -> None:
        for turn in range(10):
            places = [((first * 7919 + turn * 104_729 + i * 4001) % 190_000, 700) for i in range(20)]
            found = reader.read(places)
            wrong.extend(
                at for (at, n), each in zip(places, found, strict=True) if (CONTENT[at : at + n] != each).any()
            )

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
