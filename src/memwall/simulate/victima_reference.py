"""The machine of `kernels/cpp/translation.cpp`, written plainly and slowly: what the fast one is tested against, access
by access. It also checks what the fast one takes for granted: that no translation that is used is an old one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from memwall.simulate.access_traces import FETCH, FLUSH_PROCESS, INVALIDATE, WRITE, Trace
from memwall.simulate.core_reference import Block, SetStore, Settings, SlotCalendar, SlowCore, SlowLevels

_MASK = (1 << 64) - 1
SMALL_BASE, LARGE_BASE, SOFTWARE_BASE = 1 << 23, 1 << 25, 1 << 22


def mixed(x: int) -> int:
    """64 bits, well stirred."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def sized(page: int, size: int) -> int:
    """Number of the page of 4 KiB (size 0) or 2 MiB (1) around a page of 4 KiB."""
    return page >> 9 if size else page


class Frames:
    """Frames of tables, small and large pages, in three areas."""

    def __init__(self, scattered: int) -> None:
        self.scattered, self.counts = scattered, Counter[str]()

    def next(self, what: str) -> int:
        """A frame of that kind."""
        number = self.counts[what]
        self.counts[what] += 1
        if what == "table":
            return number
        if what == "large":
            return LARGE_BASE + 512 * number
        return SMALL_BASE + ((number * 0x9E3779B1) % (1 << 24) if self.scattered else number)


@dataclass(slots=True)
class Entry:
    """A leaf: frame of its first 4 KiB, and the counters in its spare bits."""

    frame: int
    size: int
    frequency: int = 0
    cost: int = 0


class SlowTable:
    """Tables by (level, prefix of the page number); leaves by (size, number)."""

    def __init__(self, frames: Frames, large_per_mille: int, seed: int) -> None:
        self.frames, self.large, self.seed = frames, large_per_mille, seed
        self.tables = {(4, 0): frames.next("table")}
        self.leaves: dict[tuple[int, int], Entry] = {}

    def get(self, page: int) -> Entry | None:
        """The leaf that maps a page."""
        return self.leaves.get((1, page >> 9)) or self.leaves.get((0, page))

    def ensure(self, page: int) -> Entry:
        """The same, mapped if it was not."""
        found = self.get(page)
        if found is None:
            size = int(mixed(self.seed ^ page >> 9) % 1000 < self.large)
            for level in range(3, size, -1):
                if (level, page >> 9 * level) not in self.tables:
                    self.tables[level, page >> 9 * level] = self.frames.next("table")
            found = self.leaves[size, sized(page, size)] = Entry(self.frames.next("large" if size else "page"), size)
        return found

    def frame(self, page: int) -> int:
        """Of 4 KiB."""
        entry = self.ensure(page)
        return entry.frame + (page & 511 if entry.size else 0)


class Walked(NamedTuple):
    """cycles, the leaf's line, whether memory was read, the leaf."""

    cycles: int
    line: int
    memory: bool
    entry: Entry


class SlowMachine:
    """`run` gives (translation cycles, data cycles) of each access."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.counters = settings, Counter[str]()
        self.levels, self.core = SlowLevels(settings, self.counters), SlowCore(settings, self.counters)
        self.levels.dropped = self._dropped
        self.walkers = SlotCalendar(16, settings["walkers"])
        self.tlbs = {name: self._store(f"{name}_tlb") for name in ("data", "code", "second", "third", "nested")}
        self.software = self._store("software")
        self.walk_caches = {(host, level): self._store(f"walk_cache_{level}") for host in (0, 1) for level in (2, 3, 4)}
        self.frames, self.guest_frames = Frames(settings["scattered"]), Frames(settings["scattered"])
        self.processes: dict[int, SlowTable] = {}
        self.host = SlowTable(self.frames, settings["large_per_mille"], mixed(settings["seed"] + 1000))
        self.bypass = self.pressure = False
        self.next_window = settings["window_instructions"]
        self.window = Counter[str]()

    def _store(self, name: str) -> SetStore:
        return SetStore(self.settings[f"{name}_sets"], self.settings[f"{name}_ways"])

    def _table(self, process: int) -> SlowTable:
        if process not in self.processes:
            frames = self.guest_frames if self.settings["virtualised"] else self.frames
            seed = mixed(self.settings["seed"] + process)
            self.processes[process] = SlowTable(frames, self.settings["large_per_mille"], seed)
        return self.processes[process]

    def resolve(self, process: int, page: int) -> tuple[int, int]:
        """(frame of the page of 4 KiB, size as a TLB holds it)."""
        entry = self._table(process).ensure(page)
        size, frame = entry.size, self._table(process).frame(page)
        if self.settings["virtualised"]:
            size, frame = min(size, self.host.ensure(frame).size), self.host.frame(frame)
        return frame, size

    def map(self, process: int, first_page: int, pages: int) -> None:
        """In order."""
        for page in range(first_page, first_page + pages):
            self.resolve(process, page)

    # ---- a trace -------------------------------------------------------------------------------------------------

    def run(self, trace: Trace) -> list[tuple[int, int]]:
        """All accesses in order."""
        columns = (trace.addresses, trace.kinds, trace.gaps, trace.depends, trace.processes)
        return [self._access(*map(int, row)) for row in zip(*columns, strict=True)]

    def _access(self, address: int, kind: int, gap: int, depends: int, process: int) -> tuple[int, int]:
        if kind <= WRITE:
            self.counters["accesses"] += 1
            issued = self.core.issue(gap, depends)
            line, translation = self._translate(process, address, issued, "data")
            data, level = self.levels.access("data", line, write=kind == WRITE, when=issued + translation)
            for least, name in ((2, "first_misses_data"), (3, "second_misses_data"), (4, "third_misses_data")):
                self.counters[name] += level >= least
            self.counters["memory_reads_data"] += level == 4
            self.window["data"] += level >= 3
            self.core.finish(gap, issued, translation, data, write=kind == WRITE)
            self._account()
            return translation, data
        if kind == FETCH:
            self.counters["fetches"] += 1
            issued = self.core.now()
            line, translation = self._translate(process, address, issued, "code")
            data, level = self.levels.access("code", line, write=False, when=issued + translation)
            self.counters["memory_reads_data"] += level == 4
            late = data - self.settings["code_cycles"] if level > 1 else 0
            self.core.finish_fetch(issued, translation, late)
            return translation, data
        if kind == INVALIDATE:
            self._invalidate(process, address >> 12)
        elif kind == FLUSH_PROCESS:
            self._flush(lambda key: key[0] != "nested" and key[1] == process)
        else:
            self._flush(lambda key: True)
            self.tlbs["nested"].remove(lambda block: True)
        return 0, 0

    def _account(self) -> None:
        instructions, length = self.counters["instructions"], self.settings["window_instructions"]
        if instructions < self.next_window:
            return
        since = instructions - self.next_window + length
        self.bypass = self.window["data"] * 1000 > self.settings["bypass_misses"] * since
        self.pressure = self.window["tlb"] * 1000 > self.settings["pressure_misses"] * since
        self.levels.favour = bool(self.settings["aware"]) and self.pressure
        self.counters["bypass_samples"] += self.bypass
        self.counters["pressure_samples"] += self.pressure
        self.counters["samples"] += 1
        for block in self._blocks():
            if block.key[0] == "block":
                self.counters["reach_bytes_sum"] += block.payload.bit_count() << (21 if block.key[2] else 12)
        self.window.clear()
        self.next_window = instructions + length

    def _blocks(self) -> list[Block]:
        return [block for ways in self.levels.second.blocks.values() for block in ways if block and block.translation]

    def _translate(self, process: int, address: int, when: int, first: str) -> tuple[int, int]:
        """(line, cycles)."""
        page, cycles = address >> 12, 0
        names = [name for name in (first, "second", "third") if self.tlbs[name].sets]
        for place, name in enumerate(names):
            cycles += 0 if name == first else self.settings[f"{name}_tlb_cycles"]
            for size in (0, 1):
                block = self.tlbs[name].find(sized(page, size), ("tlb", process, size, sized(page, size)))
                if block is None:
                    continue
                self.tlbs[name].touch(block)
                assert block.payload + (page & 511 if size else 0) == self.resolve(process, page)[0], (
                    "an old translation"
                )
                if name == "third":
                    self.counters["third_tlb_hits"] += 1
                    self.counters["second_tlb_miss_cycles"] += self.settings["third_tlb_cycles"]
                for above in reversed(names[:place]):
                    self._fill(above, process, page, when + cycles)
                return self._line(process, address), cycles
            if name != "third":
                self.counters["first_tlb_misses" if name == first else "second_tlb_misses"] += 1
                self.window["tlb"] += name == "second"
        more = self._miss(process, page, when + cycles)
        third = self.settings["third_tlb_cycles"] if self.tlbs["third"].sets else 0
        self.counters["second_tlb_miss_cycles"] += third + more
        for name in reversed(names):
            self._fill(name, process, page, when + cycles + more)
        return self._line(process, address), cycles + more

    def _line(self, process: int, address: int) -> int:
        return self.resolve(process, address >> 12)[0] << 6 | (address >> 6 & 63)

    def _fill(self, name: str, process: int, page: int, when: int) -> None:
        frame, size = self.resolve(process, page)
        number, tlb = sized(page, size), self.tlbs[name]
        block = tlb.find(number, ("tlb", process, size, number))
        if block:
            tlb.touch(block)
            return
        out = tlb.insert(number, Block(("tlb", process, size, number), 0, frame - (page & 511 if size else 0)))
        if name == "second" and out and self.settings["victima"] and self.settings["on_eviction"]:
            self._evicted(out, when)

    # ---- misses --------------------------------------------------------------------------------------------------

    def _miss(self, process: int, page: int, when: int) -> int:
        self.resolve(process, page)
        cycles = 0
        if self.software.sets:
            found, cycles = self._software_lookup(process, page, when)
            if found:
                return cycles
        if self.settings["victima"] and self._probe("block", process, page):
            self.counters["block_hits"] += 1
            self.counters["aborted_walks"] += 1
            return self.settings["second_cycles"]
        start = self.walkers.first_free(when + cycles)
        walked = self._full_walk(process, page, start, "walk")
        self.walkers.take(start, start + walked.cycles)
        self.counters["walks"] += 1
        self.counters["walks_to_memory"] += walked.memory
        self.counters["walk_cycles"] += walked.cycles
        self._count(walked.entry, walked.memory)
        cycles = start - when + walked.cycles
        if self.settings["victima"] and self.settings["on_walk"] and self._deserves(walked.entry):
            self._park(process, page, walked, when + cycles)
        if self.software.sets:
            self._software_fill(process, page, when + cycles)
        return cycles

    def _count(self, entry: Entry, memory: bool) -> None:
        entry.frequency = min(entry.frequency + 1, self.settings["frequency_most"])
        entry.cost = min(entry.cost + memory, self.settings["cost_most"])

    def _deserves(self, entry: Entry) -> bool:
        if not self.settings["predictor"] or self.bypass:
            return True
        limits = self.settings
        costly = (
            limits["frequency_low"] <= entry.frequency <= limits["frequency_high"]
            and limits["cost_low"] <= entry.cost <= limits["cost_high"]
        )
        self.counters["refused"] += not costly
        return costly

    def _software_place(self, number: int, block: Block | None) -> int:
        ways = self.software.blocks[number % self.software.sets]
        way = next((way for way, one in enumerate(ways) if one is block and block), 0)
        return (SOFTWARE_BASE << 6) + (number % self.software.sets * self.software.ways + way) // 4

    def _software_lookup(self, process: int, page: int, when: int) -> tuple[bool, int]:
        line, found = self._software_place(page, None), False
        for size in (0, 1):
            number = sized(page, size)
            block = self.software.find(number, ("tlb", process, size, number))
            if block:
                self.software.touch(block)
                line, found = self._software_place(number, block), True
                break
        cycles, level = self.levels.access("second", line, write=False, when=when)
        self.counters["memory_reads_software"] += level == 4
        self.counters["software_hits" if found else "software_misses"] += 1
        return found, cycles

    def _software_fill(self, process: int, page: int, when: int) -> None:
        frame, size = self.resolve(process, page)
        number = sized(page, size)
        block = Block(("tlb", process, size, number), 0, frame)
        self.software.insert(number, block)
        _, level = self.levels.access("second", self._software_place(number, block), write=True, when=when)
        self.counters["memory_reads_software"] += level == 4

    # ---- walks ---------------------------------------------------------------------------------------------------

    def _walk(
        self, table: SlowTable, host: int, process: int, page: int, when: int, cause: str, nested: bool
    ) -> Walked:
        entry = table.ensure(page)
        leaf, level, cycles, memory, line = entry.size + 1, 4, self.settings["walk_cache_2_cycles"], False, 0
        for cached in range(leaf + 1, 5):
            prefix = page >> 9 * (cached - 1)
            store = self.walk_caches[host, cached]
            block = store.find(prefix, (process, prefix))
            if block:
                store.touch(block)
                level = cached - 1
                break
        for step in range(level, leaf - 1, -1):
            frame = table.tables[step, page >> 9 * step if step < 4 else 0]
            if nested:
                more, frame, far = self._nested(frame, when + cycles, cause)
                cycles, memory = cycles + more, memory or far
            line = frame << 6 | (page >> 9 * (step - 1) & 511) >> 3
            more, found = self.levels.access("second", line, write=False, when=when + cycles)
            cycles, memory = cycles + more, memory or found == 4
            self.counters["walk_steps"] += 1
            self.counters[f"memory_reads_{cause}"] += found == 4
            if step > leaf:
                prefix = page >> 9 * (step - 1)
                self.walk_caches[host, step].insert(prefix, Block((process, prefix), 0))
        return Walked(cycles, line, memory, entry)

    def _full_walk(self, process: int, page: int, when: int, cause: str) -> Walked:
        table = self._table(process)
        virtual = bool(self.settings["virtualised"])
        walked = self._walk(table, 0, process, page, when, cause, virtual)
        if virtual:
            more, _, far = self._nested(table.frame(page), when + walked.cycles, cause)
            walked = walked._replace(cycles=walked.cycles + more, memory=walked.memory or far)
        return walked

    def _nested(self, page: int, when: int, cause: str) -> tuple[int, int, bool]:
        """(cycles, frame, whether memory was read) of a guest's frame."""
        entry, frame = self.host.ensure(page), self.host.frame(page)
        number, cycles, memory = sized(page, entry.size), self.settings["nested_tlb_cycles"], False
        tlb = self.tlbs["nested"]
        block = tlb.find(number, ("nested", entry.size, number))
        if block:
            tlb.touch(block)
            return cycles, frame, False
        self.counters["nested_misses"] += cause == "walk"
        if self.settings["victima"] and self._probe("nested", 0, page):
            self.counters["nested_block_hits"] += 1
            cycles += self.settings["second_cycles"]
        else:
            walked = self._walk(self.host, 1, 0, page, when + cycles, cause, False)
            cycles, memory = cycles + walked.cycles, walked.memory
            if cause == "walk":
                self.counters["host_walks"] += 1
                self._count(entry, memory)
            if self.settings["victima"] and self.settings["on_walk"] and self._deserves(entry):
                self._insert(
                    walked.line, "nested", 0, number, entry.size, self._neighbours(self.host, page), when + cycles
                )
        out = tlb.insert(number, Block(("nested", entry.size, number), 0))
        if out and self.settings["victima"] and self.settings["on_eviction"]:
            self._nested_evicted(out, when + cycles)
        return cycles, frame, memory

    def _nested_evicted(self, out: Block, when: int) -> None:
        _, size, number = out.key
        page = number << 9 if size else number
        if self._block_with("nested", 0, number, size):
            self.counters["eviction_covered"] += 1
        elif self._deserves(self.host.ensure(page)):
            self.counters["host_background_walks"] += 1
            walked = self._walk(self.host, 1, 0, page, when, "background", False)
            self._insert(walked.line, "nested", 0, number, size, self._neighbours(self.host, page), when)

    # ---- blocks of translations ----------------------------------------------------------------------------------

    def _block_with(self, kind: str, process: int, number: int, size: int) -> Block | None:
        block = self.levels.second.find(number >> 3, (kind, process, size, number >> 3))
        return block if block and block.payload >> (number & 7) & 1 else None

    def _probe(self, kind: str, process: int, page: int) -> bool:
        for size in (0, 1):
            block = self._block_with(kind, process, sized(page, size), size)
            if block:
                self.levels.second.touch(block, favoured=self.levels.favour)
                return True
        return False

    def _neighbours(self, table: SlowTable, page: int) -> int:
        """Entries beside a page's that are leaves of its size, as bits."""
        size = table.ensure(page).size
        first = sized(page, size) & ~7
        return sum(1 << j for j in range(8) if (size, first + j) in table.leaves)

    def _guest_neighbours(self, process: int, page: int, size: int) -> int:
        """Those whose frames stand in the two lines of leaves that the walk has read."""
        table = self._table(process)
        guest, own = table.frame(page), table.ensure(page).size
        host_size, mask = self.host.ensure(guest).size, 0
        for j in range(8):
            number = (sized(page, size) & ~7) + j
            other = number << 9 if size else number
            entry = table.get(other)
            if entry is None or entry.size != own:
                continue
            host = self.host.get(table.frame(other))
            if host is None or host.size != host_size:
                continue
            pages = [sized(frame, host_size) for frame in (guest, table.frame(other))]
            known = pages[0] == pages[1] if host_size and not size else pages[0] >> 3 == pages[1] >> 3
            mask |= known << j
        return mask

    def _insert(self, line: int | None, kind: str, process: int, number: int, size: int, mask: int, when: int) -> None:
        second = self.levels.second
        leaf = second.find(line, (line,)) if line is not None else None
        if leaf and not leaf.dirty:
            ways = second.blocks[leaf.key[0] % second.sets]
            ways[next(way for way, one in enumerate(ways) if one is leaf)] = None
        key = (kind, process, size, number >> 3)
        block = second.find(number >> 3, key)
        if block:
            block.payload |= mask
            second.touch(block, favoured=self.levels.favour)
        else:
            self.counters["block_inserts"] += 1
            self.levels.put_second(number >> 3, Block(key, 0, mask, translation=True), when)

    def _park(self, process: int, page: int, walked: Walked, when: int) -> None:
        size = self.resolve(process, page)[1]
        line: int | None = walked.line
        if self.settings["virtualised"]:
            mask = self._guest_neighbours(process, page, size)
            line = line if walked.entry.size == size else None
        else:
            mask = self._neighbours(self._table(process), page)
        self._insert(line, "block", process, sized(page, size), size, mask, when)

    def _evicted(self, out: Block, when: int) -> None:
        _, process, size, number = out.key
        page = number << 9 if size else number
        if self._block_with("block", process, number, size):
            self.counters["eviction_covered"] += 1
        elif self._deserves(self._table(process).ensure(page)):
            self.counters["background_walks"] += 1
            self._park(process, page, self._full_walk(process, page, when, "background"), when)

    def _dropped(self, block: Block) -> None:
        self.counters["block_drops"] += 1

    # ---- maintenance ---------------------------------------------------------------------------------------------

    def _invalidate(self, process: int, page: int) -> None:
        entry = self._table(process).get(page)
        if entry is None:
            return
        entry.frame = self.frames_of().next("large" if entry.size else "page")

        def old(key: tuple[int | str, ...]) -> bool:
            if key[0] == "nested" or key[1] != process:
                return False
            size, number = int(key[2]), int(key[3])
            pages = range(number << 3, (number + 1) << 3) if key[0] == "block" else range(number, number + 1)
            if size == entry.size:
                return sized(page, size) in pages
            return size < entry.size and any(one >> 9 == page >> 9 for one in pages)

        self._flush(old)

    def frames_of(self) -> Frames:
        """Where processes' frames come from."""
        return self.guest_frames if self.settings["virtualised"] else self.frames

    def _flush(self, which: Callable[[tuple[int | str, ...]], bool]) -> None:
        for store in (self.tlbs["data"], self.tlbs["code"], self.tlbs["second"], self.tlbs["third"], self.software):
            store.remove(lambda block: which(block.key))
        for _ in self.levels.second.remove(lambda block: block.translation and which(block.key)):
            self.counters["block_drops"] += 1
            self.counters["invalidated"] += 1
        for store in self.walk_caches.values():
            store.remove(lambda block: True)
