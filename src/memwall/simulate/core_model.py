"""One core, its caches and its way to memory, as simulators of traces take them (`kernels/cpp/memory_levels.h`).

Time is told by an out-of-order core in which `width` instructions a cycle come in and leave in order and at most
`window` are inside; an access begins when its address is known, and waits for one of `outstanding_misses` registers and
for the memory's channel. State (what is cached) changes in the order of the trace. So cycles are those of the
instructions alone, plus stalls that retirement sees.

Units: bytes, cycles of the core, seconds; sizes are such that sets are powers of two. Defaults are those of Victima's
simulated core (paper, and configuration of the official simulator): 2.6 GHz, 4 wide, window 224, 16 registers of
misses, L1 32 KB, L2 2 MB, L3 slice 1408 KB, three channels of DDR4-2400 (57.6 GB/s) at 45 ns. Decided here: a code
cache like that for data, L3 35 cycles, channels as one, and no prefetching, which that simulator has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memwall.errors import InputError
from memwall.hardware.units import KIB, MIB, BytesPerSecond, Seconds

LINE_BYTES = 64
MEMORY_SECONDS = Seconds(45e-9)
MEMORY_BYTES_PER_S = BytesPerSecond(57.6e9)
SECOND_CYCLES = {1 * MIB: 12, 2 * MIB: 16, 4 * MIB: 22, 8 * MIB: 30}
"""Latency of a second level of that size (paper)."""


def checked_sets(name: str, entries: int, ways: int) -> int:
    """Sets of so many entries; InputError where that is no power of two."""
    sets = entries // ways if ways > 0 else 0
    if sets < 1 or sets * ways != entries or sets & (sets - 1):
        near = 1 << max(0, round(math.log2(max(1, entries / max(ways, 1)))))
        raise InputError(
            f"{name}: {entries:,} entries in {ways} ways are not a power of two of sets; {near * max(ways, 1):,} are"
        )
    return sets


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLevel:
    """A cache: bytes, ways, and cycles from the core to its data."""

    num_bytes: int
    ways: int
    cycles: int

    def fields(self, name: str) -> dict[str, int]:
        """For the simulator. InputError for a size that has no power of two of sets."""
        sets = checked_sets(f"{name} cache", self.num_bytes // LINE_BYTES, self.ways)
        return {f"{name}_sets": sets, f"{name}_ways": self.ways, f"{name}_cycles": self.cycles}


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreModel:
    """A core with three levels of cache; `second` also holds translations, where a technique parks them there."""

    hertz: float = 2.6e9
    width: int = 4
    window: int = 224
    outstanding_misses: int = 16
    data: CacheLevel = CacheLevel(num_bytes=32 * KIB, ways=8, cycles=4)
    code: CacheLevel = CacheLevel(num_bytes=32 * KIB, ways=8, cycles=4)
    second: CacheLevel = CacheLevel(num_bytes=2 * MIB, ways=16, cycles=16)
    third: CacheLevel = CacheLevel(num_bytes=1408 * KIB, ways=11, cycles=35)
    memory_seconds: Seconds = MEMORY_SECONDS
    memory_bytes_per_s: BytesPerSecond = MEMORY_BYTES_PER_S

    def __post_init__(self) -> None:
        if not (1 <= self.width <= 64 and 1 <= self.window <= 255 and 1 <= self.outstanding_misses <= 4096):
            raise InputError(
                f"a core {self.width} wide with a window of {self.window} and {self.outstanding_misses} misses; "
                "1 to 64, 1 to 255 and 1 to 4096 can be simulated"
            )
        if not (0 < self.hertz < math.inf and 0 <= self.memory_seconds < 1 and 0 < self.memory_bytes_per_s < math.inf):
            raise InputError("a core's clock and memory's rate are positive, memory's latency lies below a second")

    @property
    def memory_cycles(self) -> int:
        """Latency of memory, behind that of the third level."""
        return round(self.memory_seconds * self.hertz)

    @property
    def line_cycles(self) -> int:
        """For which a line keeps the channel busy."""
        return max(1, math.ceil(LINE_BYTES * self.hertz / self.memory_bytes_per_s))

    def fields(self) -> dict[str, int]:
        """For the simulator."""
        return {
            "width": self.width, "window": self.window, "outstanding_misses": self.outstanding_misses,
            "memory_cycles": self.memory_cycles, "memory_line_cycles": self.line_cycles,
            **self.data.fields("data"), **self.code.fields("code"), **self.second.fields("second"),
            **self.third.fields("third"),
        }  # fmt: skip
