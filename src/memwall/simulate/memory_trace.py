"""Schedules on a cache that places nothing by hand: the lines they touch, in order, and what a cache would move.

`TracedMemory` runs what is written for `fast_memory`, but loads copy nothing: what is loaded is touched where it lies,
and blocks that a schedule makes lie in scratch of their own. A product touches what a plain loop over its rows would.
`cache_traffic` replays the lines under LRU, or under LFD (Belady's rule), which fetches least.

Units: lines of 64 bytes, 16 words of float32. Caches are fully associative and write back; a line that is written
before it is read is not fetched (write-validate), so that a store costs once, as in the two-level model. Caches that
fetch such lines move a word more for each that is stored without having been loaded.

Cost: about a microsecond a line, and 8 bytes a touch while tracing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.memory.cache_policy import Farthest, Lru, Paging, next_accesses
from memwall.simulate.attention_io_complexity import Plan
from memwall.simulate.attention_schedules import Schedule, problems, schedule_of
from memwall.simulate.attention_shape import Attention
from memwall.simulate.fast_memory import Block

LINE_BYTES = 64
LINE_WORDS = LINE_BYTES // 4
POLICIES = ("lru", "belady")
READ, WRITE = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Touches:
    """Lines in order. read: whether what the line held before matters; written: whether it is other afterwards."""

    lines: list[int]
    read: list[bool]
    written: list[bool]


class TracedBlock(Block):
    """A block and where it lies: the address of its first number and bytes from one to the next along both axes."""

    __slots__ = ("address", "own", "strides")

    def __init__(self, array: np.ndarray, address: int, strides: tuple[int, ...], *, own: bool) -> None:
        super().__init__(array)
        self.address, self.strides, self.own = address, strides, own

    def addresses(self) -> np.ndarray:
        """Of all numbers, [rows, columns]."""
        rows, columns = self.array.shape
        return self.address + self.strides[0] * np.arange(rows)[:, None] + self.strides[1] * np.arange(columns)


class TracedMemory:
    """Records lines; see `fast_memory.Memory` for what schedules ask of it."""

    def __init__(self) -> None:
        self._arrays: dict[int, tuple[np.ndarray, int]] = {}
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)
        self._touched: list[np.ndarray] = []

    def load(self, view: np.ndarray) -> Block:
        """A copy to work on, with the address of the original."""
        return TracedBlock(view.copy(), self._address(view), view.strides, own=False)

    def create(self, shape: tuple[int, ...]) -> Block:
        """Scratch, in a place of that size that was let go, if there is one."""
        array = np.zeros(shape, np.float32)
        free = self._free[array.nbytes]
        made = TracedBlock(array, free.pop() if free else self._reserve(array.nbytes), array.strides, own=True)
        self._record(_coded(made.addresses(), WRITE).ravel())
        return made

    def store(self, block: Block, view: np.ndarray) -> None:
        """What is stored where it lies has been written there; else it is copied."""
        assert isinstance(block, TracedBlock)
        view[...] = block.array
        place = self._address(view)
        if place != block.address:
            self._record(_interleaved(block.addresses(), _addresses(view, place)))

    def evict(self, *blocks: Block) -> None:
        """Scratch can be used again."""
        for block in blocks:
            assert isinstance(block, TracedBlock)
            if block.own:
                self._free[block.array.nbytes].append(block.address)
            block.drop()

    def multiply(self, out: Block, a: Block, b: Block, *, turned_a: bool = False, turned_b: bool = False) -> None:
        """Row by row of a: along b's rows where these lie together, else a dot product for each number."""
        assert isinstance(out, TracedBlock)
        assert isinstance(a, TracedBlock)
        assert isinstance(b, TracedBlock)
        out.array[...] += (a.array.T if turned_a else a.array) @ (b.array.T if turned_b else b.array)
        left = a.addresses().T if turned_a else a.addresses()
        right, made = (b.addresses().T if turned_b else b.addresses()), out.addresses()
        (rows, depth), columns = left.shape, right.shape[1]
        shape: tuple[int, ...]
        if turned_b:
            parts, shape = [_coded(left[:, _steps(depth)])[:, None], _coded(right[_steps(depth)].T)], (rows, columns)
            parts.append(_coded(made, READ | WRITE)[:, :, None])
        else:
            parts, shape = [_coded(left)[:, :, None], _coded(right[:, _steps(columns)])], (rows, depth)
            parts.append(_coded(made[:, _steps(columns)], READ | WRITE)[:, None])
        whole = [np.broadcast_to(part, (*shape, part.shape[-1])) for part in parts]
        self._record(np.concatenate(whole, axis=-1).ravel())

    def touch(self, *blocks: Block, written: bool = True) -> None:
        """One block after another, row by row."""
        for block in blocks:
            assert isinstance(block, TracedBlock)
            self._record(_coded(block.addresses(), READ | WRITE * written).ravel())

    def touches(self) -> Touches:
        """All of them; those of one line in a row are one."""
        codes = _runs(np.concatenate(self._touched)) if self._touched else np.empty(0, np.int64)
        return Touches(
            lines=(codes // 4).tolist(),
            read=(codes & READ != 0).tolist(),
            written=(codes & WRITE != 0).tolist(),
        )

    def _record(self, codes: np.ndarray) -> None:
        self._touched.append(_runs(codes))

    def _address(self, view: np.ndarray) -> int:
        whole: Any = view
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        if id(whole) not in self._arrays:
            self._arrays[id(whole)] = whole, self._reserve(whole.nbytes)  # held, so that no other gets its identity
        start = self._arrays[id(whole)][1]
        return start + view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]

    def _reserve(self, num_bytes: int) -> int:
        start = self._end
        self._end += -(-num_bytes // LINE_BYTES) * LINE_BYTES
        return start


def _addresses(view: np.ndarray, address: int) -> np.ndarray:
    return TracedBlock(view, address, view.strides, own=False).addresses()


def _coded(addresses: np.ndarray, how: int = READ) -> np.ndarray:
    return addresses // LINE_BYTES * 4 + how


def _interleaved(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.stack([_coded(source), _coded(target, WRITE)], axis=1).ravel()


def _steps(count: int) -> np.ndarray:
    """Of numbers in a row, enough to meet each of their lines."""
    return np.unique(np.append(np.arange(0, count, LINE_WORDS), count - 1))


def _runs(codes: np.ndarray) -> np.ndarray:
    """Touches of one line in a row as one: read if the first of them reads, written if any writes."""
    starts = np.flatnonzero(np.diff(codes // 4, prepend=-1))
    if not len(starts):
        return codes
    return codes[starts] // 4 * 4 + (codes[starts] & READ) + np.maximum.reduceat(codes & WRITE, starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Lines that a cache missed, fetched, and wrote back, those that are dirty at the end too."""

    misses: int
    fetched: int
    written: int

    @property
    def words(self) -> int:
        """Words fetched and written back."""
        return LINE_WORDS * (self.fetched + self.written)


def trace(shape: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray, schedule: Plan | Schedule) -> TracedMemory:
    """What a schedule touches; arrays as `attention_schedules.execute` takes them."""
    memory = TracedMemory()
    run = schedule_of(schedule) if isinstance(schedule, Plan) else schedule
    for problem, _ in problems(shape, q, k, v):
        run(memory, problem)
    return memory


def cache_traffic(touched: Touches, cache_lines: int, policy: str) -> Traffic:
    """Of a cache that begins empty. policy: lru or belady; InputError for others."""
    if policy not in POLICIES:
        raise InputError(f"no cache policy {policy!r}; there are {', '.join(POLICIES)}")
    upcoming = next_accesses(touched.lines) if policy == "belady" else [0] * len(touched.lines)
    cache: Paging = Farthest(cache_lines) if policy == "belady" else Lru(cache_lines)
    held: dict[int, bool] = {}
    misses = fetched = back = 0
    for line, read, dirty, hint in zip(touched.lines, touched.read, touched.written, upcoming, strict=True):
        victims = cache.on_access(line, 1, hint)
        if line not in held:
            misses += 1
            fetched += read
            held[line] = dirty
        elif dirty:
            held[line] = True
        for victim in victims:
            back += held.pop(victim)  # type: ignore[call-overload]
    return Traffic(misses=misses, fetched=fetched, written=back + sum(held.values()))
