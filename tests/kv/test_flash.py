"""The file that plays flash: pages where they belong, blocks that come and go, room that is refused in time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import DoesNotFit
from memwall.kv.flash import FlashFile, FlashLayout, _cut, runs
from memwall.kv.flash_sequence import FlashSequence, Writer
from memwall.kv.sparf import StorageAttention
from memwall.memory import Arena, Ledger

LAYOUT = FlashLayout(
    layers=2, heads=4, kv_heads=2, head_dim=32, group=16, channels=4, capacity=2048, block_bytes=16384,
    chunk_bytes=8192, sparse=True,
)  # fmt: skip


@pytest.fixture
def file() -> FlashFile:
    return FlashFile(LAYOUT)


def aligned(pages: int) -> np.ndarray:
    array = Arena(1 << 30, Ledger()).allocate("test", max(pages * LAYOUT.page_bytes, 1 << 16), np.uint8)
    return array[: pages * LAYOUT.page_bytes].reshape(pages, -1)


def test_runs_of_neighbours() -> None:
    assert runs(np.array([4, 5, 6, 9, 2, 3])) == [(0, 3), (3, 4), (4, 6)]
    assert runs(np.array([], np.int64)) == []


def test_runs_are_dealt_in_about_equal_parts() -> None:
    dealt = _cut([(0, 50), (50, 51), (51, 100)], 100, 4)
    assert [sum(end - begin for begin, end in part) for part in dealt] == [25, 25, 25, 25]
    assert [place for part in dealt for place in part][-1][1] == 100


def test_pages_come_back_in_any_order(file: FlashFile) -> None:
    image = aligned(48)
    image[:] = np.random.default_rng(0).integers(0, 256, image.shape)
    blocks = [file.take_block() for _ in range(3)]
    assert LAYOUT.pages_per_block == 16
    pages = np.concatenate([np.arange(16) + 16 * block for block in blocks])
    file.write(pages, image)
    order = np.random.default_rng(1).permutation(48)
    out = aligned(48)
    file.read(pages[order], out)
    np.testing.assert_array_equal(out, image[order])
    assert file.counters.token_pages_read == sum(file.counters.channel_reads) == 48
    parts = [pages[order[a : a + 10]] for a in range(0, 48, 10)]
    halves = aligned(20).reshape(2, 10, -1)
    got = [chunk.copy() for chunk in file.chunks(parts, halves)]
    np.testing.assert_array_equal(np.concatenate(got), image[order])
    file.close()


def test_an_erased_block_gives_its_bytes_back(file: FlashFile) -> None:
    blocks = [file.take_block() for _ in range(4)]
    image = aligned(16)
    image[:] = 7
    for block in blocks:
        file.write(np.arange(16) + 16 * block, image)
    on_disk = os.fstat(file._fd).st_blocks * 512
    assert file.invalidate(np.arange(15), open_block=None) == []
    assert file.invalidate(np.array([15]), open_block=None) == [0]
    assert os.fstat(file._fd).st_blocks * 512 <= on_disk - 16384
    assert file.counters.blocks_erased == 1
    assert file.take_block() == 0  # the freed one comes first
    file.close()


def test_an_open_block_is_not_erased(file: FlashFile) -> None:
    block = file.take_block()
    file.write(np.arange(2) + 16 * block, aligned(2))
    assert file.invalidate(np.arange(2) + 16 * block, open_block=block) == []
    assert file.is_empty(block)
    file.close()


def test_a_full_disk_is_said_with_what_to_do(file: FlashFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DoesNotFit, match="TMPDIR"):
        file.take_block()
    assert file.num_blocks == 0
    file.close()


def test_nothing_is_left_and_no_name_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = FlashFile(LAYOUT)
    file.take_block()
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_without_nameless_files_the_name_goes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delattr(os, "O_TMPFILE")
    file = FlashFile(LAYOUT)
    file.take_block()
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_direct_io_is_left_out_where_the_file_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, page_bytes: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("memwall.kv.flash.try_direct", refuse)
    file = FlashFile(LAYOUT)
    assert not file.direct
    assert "no direct I/O" in file.note
    file.close()


def test_memory_is_what_the_layout_says() -> None:
    """Byte for byte what the process allocates: its arena has no room for more."""
    ledger = Ledger()
    arena = Arena(1 << 30, ledger)
    file = FlashFile(LAYOUT)
    attention = StorageAttention(LAYOUT, file, arena, 0.1)
    assert ledger.total() == LAYOUT.fixed_bytes()
    sequence = FlashSequence(LAYOUT, file, Writer(file, attention.images), arena, attention.halves)
    assert ledger.total() == LAYOUT.fixed_bytes() + LAYOUT.sequence_bytes(0)
    rows = np.ones((700, 2, 32), np.float16)
    for layer in range(2):
        sequence.append(layer, rows, rows)
    sequence.logits(700)
    assert ledger.total() == LAYOUT.fixed_bytes() + LAYOUT.sequence_bytes(700)
    assert sequence.blocks_for(700) == len(sequence.blocks) == LAYOUT.blocks(700)
    assert sequence.blocks_for(900) == LAYOUT.blocks(900)
    sequence.wait()
    assert file.counters.pages_written == LAYOUT.pages(700)
    sequence.release()
    assert ledger.total() == LAYOUT.fixed_bytes()
    file.close()


def test_a_random_walk_keeps_its_books() -> None:
    """Growing, cutting and copying at random: rows are right, blocks are all accounted for."""
    rng = np.random.default_rng(0)
    arena = Arena(1 << 30, Ledger())
    file = FlashFile(LAYOUT)
    attention = StorageAttention(LAYOUT, file, arena, 0.1)
    writer = Writer(file, attention.images)
    fresh = lambda: FlashSequence(LAYOUT, file, writer, arena, attention.halves)  # noqa: E731
    sequence, rows = fresh(), np.empty((0, 2, 32), np.float16)
    for _ in range(60):
        what, length = rng.integers(4), len(rows)
        if what < 2:
            new = rng.standard_normal((min(int(rng.integers(1, 200)), 2048 - length), 2, 32)).astype(np.float16)
            sequence.reserve(length + len(new))
            for layer in range(2):
                sequence.append(layer, new, -new)
            rows = np.concatenate([rows, new])
        elif what == 2:
            rows = rows[: int(rng.integers(length + 1))]
            sequence.truncate(len(rows))
        else:
            other = fresh()
            sequence.copy_to(other)
            sequence.release()
            sequence = other
        held = [sequence.lengths[0], sequence.written[0], sequence.spanned[0]]
        assert held == [len(rows), len(rows) // 16 * 16, len(rows) // 128 * 128]
        for begin in range(0, len(rows), 32):
            end = min(begin + 32, len(rows))
            keys, values = sequence.rows(1, begin, end)
            np.testing.assert_array_equal(keys, rows[begin:end])
            np.testing.assert_array_equal(values, -rows[begin:end])
        sums = -rows[: len(rows) // 16 * 16].astype(np.float32).sum(axis=0)
        np.testing.assert_allclose(sequence.sums[0], sums, atol=1e-3)
        assert file.num_blocks == len(file.free) + len(sequence.blocks)
        assert sequence.blocks_for(len(rows)) == len(sequence.blocks)
    sequence.release()
    assert len(file.free) == file.num_blocks
    file.close()
