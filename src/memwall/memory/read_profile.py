"""What reads of one file cost: measured over sizes and numbers under way, round the page cache.

Source: LLM in a flash (Keivan Alizadeh, 2023, arXiv 2312.11514), sections 2.2 and 3.1. A drive's rate rises with the
size of a read, and with how many it knows of, until it is full: so it may take less time to read what lies between two
wanted pieces than to ask twice. The gap up to which that is so follows from the table (`break_even_bytes`); the paper
names the rule and not the figure.

Rates between measured sizes are those of a straight line through logarithms. Units: bytes, seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall.errors import InputError
from memwall.hardware.units import KIB, MIB
from memwall.memory.direct_reader import DirectReader, aligned_bytes

CHUNKS = (4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 256 * KIB, MIB)
DEPTHS = (1, 4, 16, 32)
BATCH_BYTES = 8 * MIB
"""Most that one batch of a measurement reads."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadProfile:
    """bytes_per_s[i][j]: of reads of chunks[i] bytes with depths[j] under way. direct: round the page cache."""

    chunks: tuple[int, ...]
    depths: tuple[int, ...]
    bytes_per_s: tuple[tuple[float, ...], ...]
    direct: bool = True

    def __post_init__(self) -> None:
        for name, values in (("chunks", self.chunks), ("depths", self.depths)):
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise InputError(f"{name} {values}: must be ascending numbers above zero")
        wide = [len(row) for row in self.bytes_per_s] != [len(self.depths)] * len(self.chunks)
        if wide or any(not 0 < rate < math.inf for row in self.bytes_per_s for rate in row):
            raise InputError("bytes_per_s must have a rate above zero for each chunk and depth")

    def rate(self, chunk_bytes: float, depth: int = 32) -> float:
        """Bytes a second of reads of that size; beyond the smallest and largest measured, reads a second or bytes a
        second stay the same.
        """
        deep = np.log([min(max(depth, self.depths[0]), self.depths[-1])])
        rates = [float(np.interp(deep, np.log(self.depths), np.log(row))[0]) for row in self.bytes_per_s]
        size = math.log(chunk_bytes)
        smallest = math.log(self.chunks[0])
        return math.exp(float(np.interp(size, np.log(self.chunks), rates)) + min(size - smallest, 0.0))

    def seconds(self, num_reads: int, chunk_bytes: float, depth: int = 32) -> float:
        """Of so many reads, handed over together."""
        return num_reads * chunk_bytes / self.rate(chunk_bytes, min(depth, num_reads)) if num_reads else 0.0

    def break_even_bytes(self, chunk_bytes: int, depth: int = 32, copy_bytes_per_s: float = math.inf) -> int:
        """The largest gap between two pieces of that size over which one read is no slower than two; -1 where even
        neighbours are better read apart. copy_bytes_per_s: of bringing what came in one read to two places.
        """
        apart = 2 * chunk_bytes / self.rate(chunk_bytes, depth)

        def together(gap: int) -> float:
            whole = 2 * chunk_bytes + gap
            return whole / self.rate(whole, depth) + 2 * chunk_bytes / copy_bytes_per_s

        low, high = 0, max(self.chunks[-1], chunk_bytes)
        if together(0) > apart:
            return -1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if together(middle) <= apart else (low, middle)
        return low


def measure_copies(room: np.ndarray, row_bytes: int, seconds: float = 0.01) -> float:
    """Bytes a second of rows that go to places of their own within `room`, uint8 with two rows at least."""
    rows = room[: room.nbytes // row_bytes * row_bytes].reshape(-1, row_bytes)
    half = len(rows) // 2
    if half < 1:
        raise InputError(f"room of {room.nbytes:,} bytes is too small to copy rows of {row_bytes:,} in")
    order = np.arange(half)[::-1]
    moved, began = 0, time.perf_counter()
    while moved == 0 or time.perf_counter() - began < seconds:
        rows[half + order] = rows[order]
        moved += half * row_bytes
    return moved / (time.perf_counter() - began)


def measure_reads(
    path: str | Path,
    *,
    chunks: Sequence[int] = CHUNKS,
    depths: Sequence[int] = DEPTHS,
    seconds: float = 0.05,
    rounds: int = 1,
    room: np.ndarray | None = None,
    progress: Progress | None = None,
) -> ReadProfile:
    """Reads random pieces of a file for so long at each size and depth, all of them in turn in each round: medians over
    rounds. room: uint8 at an address of whole sectors to read to, so that none is taken. InputError where the file or
    the room is smaller than the largest piece.
    """
    file_bytes = Path(path).stat().st_size if Path(path).is_file() else 0
    if file_bytes < max(chunks):
        raise InputError(f"{path}: {file_bytes:,} bytes are too few for pieces of {max(chunks):,}")
    readers = {depth: DirectReader(path, depth) for depth in depths}
    if room is None:
        room = aligned_bytes(max(BATCH_BYTES, max(chunks)))
        room.fill(0)  # pages must be there, or their coming is measured
    if room.nbytes < max(chunks):
        raise InputError(f"room of {room.nbytes:,} bytes is too small for pieces of {max(chunks):,}")
    found: dict[tuple[int, int], list[float]] = {(chunk, depth): [] for chunk in chunks for depth in depths}
    try:
        for turn in range(rounds):
            for done, (chunk, depth) in enumerate(found):
                if progress is not None:
                    progress(
                        turn * len(found) + done, rounds * len(found), f"reads of {chunk // KIB} KiB, {depth} deep"
                    )
                count = max(min(room.nbytes // chunk, 16 * depth), 1)
                addresses = room.ctypes.data + np.arange(count) * chunk
                moved, began = 0, time.perf_counter()
                while moved == 0 or time.perf_counter() - began < seconds:
                    # scattered by a multiplication (Knuth): NumPy's generators would bring megabytes of code in
                    numbers = (np.arange(count) + moved // chunk + 1) * 2_654_435_761 >> 8
                    places = numbers % (file_bytes // chunk) * chunk
                    readers[depth].read_to(places, np.full(count, chunk), addresses)
                    moved += count * chunk
                found[chunk, depth].append(moved / (time.perf_counter() - began))
        direct = all(reader.direct for reader in readers.values())
    finally:
        for reader in readers.values():
            reader.close()
    rates = tuple(tuple(float(np.median(found[chunk, depth])) for depth in depths) for chunk in chunks)
    return ReadProfile(chunks=tuple(chunks), depths=tuple(depths), bytes_per_s=rates, direct=direct)
