"""The caches, the way to memory and the core of `kernels/cpp/memory_levels.h`, written plainly and slowly: what the
fast ones are tested against. A set is a list of blocks in the order of its ways.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Settings = dict[str, int]
Key = tuple[Any, ...]


@dataclass(slots=True)
class Block:
    """rank: the time of the last use under LRU, else the re-reference value."""

    key: Key
    rank: int
    payload: int = 0
    dirty: bool = False
    translation: bool = False


class SetStore:
    """Sets of at most `ways` blocks; srrip: else LRU. A cleared way is None, and is the first to be filled again."""

    def __init__(self, sets: int, ways: int, *, srrip: bool = False) -> None:
        self.sets, self.ways, self.srrip = sets, ways, srrip
        self.blocks: dict[int, list[Block | None]] = defaultdict(lambda: [None] * ways)
        self.clock = 0

    def find(self, number: int, key: Key) -> Block | None:
        """The block with that key, in the set of that number."""
        return next((block for block in self.blocks[number % self.sets] if block and block.key == key), None)

    def touch(self, block: Block, *, favoured: bool = False) -> None:
        """It was used."""
        if not self.srrip:
            self.clock += 1
            block.rank = self.clock
        else:
            block.rank = 0 if favoured else max(0, block.rank - 1)

    def insert(self, number: int, block: Block, *, favoured: bool = False, favour: bool = False) -> Block | None:
        """Gives the block that had to leave."""
        ways = self.blocks[number % self.sets]
        self.clock += 1
        block.rank = (0 if favoured else 2) if self.srrip else self.clock
        place = ways.index(None) if None in ways else self._victim([one for one in ways if one], favour)
        out, ways[place] = ways[place], block
        return out

    def _victim(self, ways: list[Block], favour: bool) -> int:
        if not self.srrip:
            return min(range(len(ways)), key=lambda way: ways[way].rank)
        for chance in (favour, False):
            while not any(block.rank == 3 for block in ways):
                for block in ways:
                    block.rank += 1
            place = next(way for way, block in enumerate(ways) if block.rank == 3)
            if not (chance and ways[place].translation):
                return place
            ways[place].rank = 0
        raise AssertionError

    def remove(self, which: Callable[[Block], bool]) -> list[Block]:
        """Clears all blocks of which that is true."""
        gone = []
        for ways in self.blocks.values():
            for place, block in enumerate(ways):
                if block and which(block):
                    gone.append(block)
                    ways[place] = None
        return gone


class SlotCalendar:
    """How much of a resource is taken in slots of some cycles; slots that share a place forget the older booking."""

    PLACES = 1 << 12

    def __init__(self, cycles: int, capacity: int) -> None:
        self.cycles, self.capacity = cycles, capacity
        self.places: dict[int, tuple[int, int]] = {}

    def _taken(self, slot: int) -> int:
        number, taken = self.places.get(slot % self.PLACES, (-1, 0))
        return taken if number == slot else 0

    def first_free(self, when: int) -> int:
        """The first cycle from `when` on at which one more may begin."""
        slot = when // self.cycles
        while self._taken(slot) >= self.capacity:
            slot += 1
        return max(when, slot * self.cycles)

    def take(self, start: int, end: int) -> None:
        """From one cycle to another, at least one slot."""
        for slot in range(start // self.cycles, (max(end, start + 1) - 1) // self.cycles + 1):
            self.places[slot % self.PLACES] = (slot, self._taken(slot) + 1)


class SlowLevels:
    """Three levels and memory; `access` gives (cycles, level that had the line)."""

    def __init__(self, settings: Settings, counters: Counter[str]) -> None:
        def store(name: str, *, srrip: bool) -> SetStore:
            return SetStore(settings[f"{name}_sets"], settings[f"{name}_ways"], srrip=srrip)

        self.settings, self.counters = settings, counters
        self.first = {"data": store("data", srrip=False), "code": store("code", srrip=False)}
        self.second, self.third = store("second", srrip=True), store("third", srrip=True)
        self.channel = SlotCalendar(settings["memory_line_cycles"], 1)
        self.misses = SlotCalendar(16, settings["outstanding_misses"])
        self.favour = False
        self.dropped: Callable[[Block], None] = lambda block: None

    def access(self, begin: str, line: int, *, write: bool, when: int) -> tuple[int, int]:
        """begin: data, code, or second, where walks begin."""
        if begin == "second":
            return self._below(line, write=write, when=when)
        first = self.first[begin]
        block = first.find(line, (line,))
        if block:
            first.touch(block)
            block.dirty |= write
            return self.settings[f"{begin}_cycles"], 1
        start = self.misses.first_free(when)
        cycles, level = self._below(line, write=False, when=start)
        self.misses.take(start, start + cycles)
        out = first.insert(line, Block((line,), 0, dirty=write))
        if out and out.dirty:
            held = self.second.find(out.key[0], out.key)
            if held:
                held.dirty = True
            else:
                self.put_second(out.key[0], Block(out.key, 0, dirty=True), when)
        return start - when + cycles, level

    def _below(self, line: int, *, write: bool, when: int) -> tuple[int, int]:
        block = self.second.find(line, (line,))
        if block:
            self.second.touch(block)
            block.dirty |= write
            return self.settings["second_cycles"], 2
        cycles, level = self.settings["third_cycles"], 3
        there = self.third.find(line, (line,))
        if there:
            self.third.touch(there)
        else:
            self.counters["memory_reads"] += 1
            start = self._transfer(when + cycles)
            self.counters["memory_wait_cycles"] += start - when - cycles
            cycles, level = start - when + self.settings["memory_cycles"], 4
            self._put_third(line, dirty=False, when=when)
        self.put_second(line, Block((line,), 0, dirty=write), when)
        return cycles, level

    def put_second(self, number: int, block: Block, when: int) -> None:
        """Makes room; what leaves is written to the third level if it is dirty."""
        favoured = block.translation and self.favour
        out = self.second.insert(number, block, favoured=favoured, favour=self.favour)
        if out and out.dirty:
            self.counters["translation_writebacks" if out.translation else "second_writebacks"] += 1
            held = self.third.find(out.key[0], out.key)
            if held:
                held.dirty = True
            else:
                self._put_third(out.key[0], dirty=True, when=when)
        if out and out.translation:
            self.dropped(out)

    def _put_third(self, line: int, *, dirty: bool, when: int) -> None:
        out = self.third.insert(line, Block((line,), 0, dirty=dirty))
        if out and out.dirty:
            self.counters["memory_writes"] += 1
            self._transfer(when)

    def _transfer(self, when: int) -> int:
        start = self.channel.first_free(when)
        self.channel.take(start, start + 1)
        return start


class SlowCore:
    """Times in slots, `width` of them a cycle."""

    def __init__(self, settings: Settings, counters: Counter[str]) -> None:
        self.width, self.window, self.counters = settings["width"], settings["window"], counters
        self.dispatched = self.retired = 0
        self.done: list[tuple[int, int, int]] = []  # instruction, slot of retirement, cycle of completion
        self.tail = 0

    def issue(self, gap: int, depends: int) -> int:
        """Cycle at which the access may begin."""
        self.counters["instructions"] += gap + 1
        self.dispatched += gap + 1
        leaves = self.counters["instructions"] - self.window
        while self.tail + 1 < len(self.done) and self.done[self.tail + 1][0] <= leaves:
            self.tail += 1
        if self.done and self.done[self.tail][0] <= leaves:
            instruction, retired, _ = self.done[self.tail]
            self.dispatched = max(self.dispatched, retired + leaves - instruction)
        ready = self.done[-depends][2] if 0 < depends <= len(self.done) else 0
        return max(self.now(), ready)

    def now(self) -> int:
        """Cycle of dispatch."""
        return -(-self.dispatched // self.width)

    def finish(self, gap: int, issued: int, translation: int, data: int, *, write: bool) -> None:
        """Retirement of the access, and what it waited."""
        data = 1 if write else data
        completed, ideal = issued + translation + data, self.retired + gap + 1
        self._retire(max(ideal, completed * self.width), ideal, translation, data)
        self.done.append((self.counters["instructions"], self.retired, completed))

    def finish_fetch(self, issued: int, translation: int, data: int) -> None:
        """Code that came late keeps all that follows."""
        if translation + data:
            completed = (issued + translation + data) * self.width
            self.dispatched = max(self.dispatched, completed)
            self._retire(max(self.retired, completed), self.retired, translation, data)

    def _retire(self, slot: int, ideal: int, translation: int, data: int) -> None:
        part = (slot - ideal) * translation // (translation + data)
        self.counters["translation_stall_slots"] += part
        self.counters["data_stall_slots"] += slot - ideal - part
        self.retired = self.counters["slots"] = slot
