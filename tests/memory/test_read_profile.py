"""What reads cost: tables are read as they should be, and the measurement gives one for the file it is told of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.memory.read_profile import ReadProfile, measure_copies, measure_reads

# a drive of 1,000 reads a second until it is full at 64 MB/s
CHUNKS = (4096, 16384, 65536, 262144)
PROFILE = ReadProfile(
    chunks=CHUNKS, depths=(1, 32), bytes_per_s=tuple((min(100 * c, 16e6), min(1000 * c, 64e6)) for c in CHUNKS)
)


def test_measured_points_are_given_back_and_others_lie_between() -> None:
    assert PROFILE.rate(4096, 32) == pytest.approx(4.096e6)
    assert PROFILE.rate(16384, 1) == pytest.approx(1.6384e6)
    assert PROFILE.rate(8192, 32) == pytest.approx(8.192e6)
    assert PROFILE.rate(1024, 32) == pytest.approx(1.024e6)  # as many reads a second as the smallest
    assert PROFILE.rate(1 << 20, 32) == PROFILE.rate(262144, 32)
    assert PROFILE.rate(4096, 1) < PROFILE.rate(4096, 6) < PROFILE.rate(4096, 32) == PROFILE.rate(4096, 99)


def test_seconds_follow_what_can_be_under_way() -> None:
    assert PROFILE.seconds(0, 4096) == 0
    assert PROFILE.seconds(1000, 4096) == pytest.approx(1)
    assert PROFILE.seconds(1, 4096) == pytest.approx(0.01)


def test_gaps_are_worth_reading_over_as_long_as_asking_costs_more() -> None:
    # two reads of 4 KiB take 2 ms, in which one of 64 KiB and more comes: 2 ms at 64 MB/s are 128,000 bytes
    gap = PROFILE.break_even_bytes(4096)
    assert 2 * 4096 + gap == pytest.approx(128_000, rel=0.05)
    # a drive that is full at any size gains nothing but the gap's own time
    full = ReadProfile(chunks=CHUNKS, depths=(32,), bytes_per_s=((64e6,),) * 4)
    assert full.break_even_bytes(4096) == 0
    slower = ReadProfile(chunks=CHUNKS, depths=(32,), bytes_per_s=((64e6,), (32e6,), (16e6,), (8e6,)))
    assert slower.break_even_bytes(4096) == -1
    # what came in one read must be copied: 8 KiB at 9 MB/s take 0.91 ms of the 2, and 1.09 ms are 69,700 bytes
    copied = PROFILE.break_even_bytes(4096, copy_bytes_per_s=9e6)
    assert 2 * 4096 + copied == pytest.approx(69_700, rel=0.05)
    assert PROFILE.break_even_bytes(4096, copy_bytes_per_s=1e6) == -1


@given(chunk=st.integers(512, 1 << 20), depth=st.integers(1, 64))
def test_a_gap_that_is_worth_it_costs_no_more(chunk: int, depth: int) -> None:
    gap = PROFILE.break_even_bytes(chunk, depth)
    apart = 2 * chunk / PROFILE.rate(chunk, depth)
    assert gap < 0 or (2 * chunk + gap) / PROFILE.rate(2 * chunk + gap, depth) <= apart * (1 + 1e-9)


def test_measures_a_file(tmp_path: Path) -> None:
    path = tmp_path / "content"
    np.zeros(1 << 18, np.uint8).tofile(path)
    told: list[tuple[int, int, str]] = []
    profile = measure_reads(
        path, chunks=(4096, 16384), depths=(1, 4), seconds=0.001, rounds=2,
        progress=lambda done, whole, what: told.append((done, whole, what)),
    )  # fmt: skip
    assert profile.chunks == (4096, 16384)
    assert profile.depths == (1, 4)
    assert [done for done, _, _ in told] == list(range(8))
    with pytest.raises(InputError, match="too small"):
        measure_reads(path, chunks=(4096, 8192), room=np.zeros(4096, np.uint8))
    with pytest.raises(InputError, match="too few"):
        measure_reads(path, chunks=(1 << 20,))


def test_copies_are_measured_where_there_is_room() -> None:
    assert measure_copies(np.zeros(1 << 16, np.uint8), 512, 0.001) > 0
    with pytest.raises(InputError, match="too small"):
        measure_copies(np.zeros(1000, np.uint8), 512)


def test_bad_tables_are_told() -> None:
    for change in ({"chunks": (8, 4)}, {"depths": ()}, {"bytes_per_s": ((1.0,),)}, {"bytes_per_s": ((0.0, 1.0),) * 4}):
        with pytest.raises(InputError):
            ReadProfile(**{"chunks": CHUNKS, "depths": (1, 32), "bytes_per_s": PROFILE.bytes_per_s, **change})
