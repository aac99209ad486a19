"""vAttention: many caches as plain arrays that never move, over pages that are mapped as tokens come.

Source: vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention; Prabhu et al., 2024 (ASPLOS
2025), arXiv 2405.04437, sections 5 and 6; official code github.com/microsoft/vattention.
Idea: the system has page tables already, so a cache needs none of its own. Keys and values of each layer are one array
[slots, tokens, Hkv, D] of addresses, far larger than memory; a sequence gets a slot, and pages come behind its rows
before they are written. Decoding grows by one token a step, so a thread maps the next pages while a step computes.
Units and shapes: lengths in tokens; a block is one page in each array (2 L of them, or 2 with `megacache`, where a
token's rows of all layers lie together); block_tokens = page / bytes of a row.
Differs from the paper: the unit of the pool is the block, and the blocks of a slot follow each other in the pool where
they can, so that their mappings merge (Linux allows 65,530); what the next step needs is mapped ahead for every
sequence, and only what is wanted later stops after two blocks; the system is asked for 64 KiB to 2 MiB on a CPU, where
any power of two from its own page up works. A block that two slots see is replaced by a copy before one writes to it.
Cost: resident 2 L * ceil(n * row / page) * page bytes a sequence: at most a page more than its rows in each array. No
bytes moved, no tables; a block costs one mapping call per array, off the critical path while decoding.
Holds when: Linux on a CPU; on a GPU the driver's virtual-memory calls (`memory.virtual_cuda`) and 2 MiB pages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import MIB
from memwall.kv.base import CacheShape
from memwall.memory.virtual import BlockPool, HostPages, OutOfBlocks, PageSource, SlotRanges

if TYPE_CHECKING:
    from memwall.memory import Arena

OWNER = "kv/mapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualSettings:
    """page_bytes: what is mapped at once in each array. megacache: one array for the keys of all layers and one for
    their values. deferred: blocks of a finished sequence stay mapped for the next one until they are wanted elsewhere.
    ahead_steps, ahead_blocks: how far the background thread looks, and after how many blocks it has done enough. eager:
    it unmaps a block of an idle slot when it has nothing else to do. keep: a dropped block's memory stays in the pool.
    """

    page_bytes: int = 2 * MIB
    megacache: bool = False
    deferred: bool = True
    ahead_steps: int = 10
    ahead_blocks: int = 2
    eager: bool = False
    keep: bool = True


class VirtualKV:
    """Keys and values of up to `num_slots` sequences; see the module's text.

    Before each forward pass `step` or `step_async` is told how long every sequence will be; then `keys[layer][slot]`
    and `values[layer][slot]` can be written and read up to there, and nowhere else: an address with no page behind it
    ends the program.

    num_blocks: what the pool may hold; fill: whether it holds all of it from the start. source: what makes and maps
    pages, this machine's memory unless given.
    """

    def __init__(
        self,
        shape: CacheShape,
        arena: Arena,
        *,
        num_slots: int,
        max_tokens: int,
        num_blocks: int,
        settings: VirtualSettings | None = None,
        dtype: str = "float16",
        fill: bool = True,
        source: PageSource | None = None,
    ) -> None:
        self.settings = settings or VirtualSettings()
        self.shape, self.num_slots, self.max_tokens = shape, num_slots, max_tokens
        if min(num_slots, max_tokens, num_blocks) < 1:
            raise InputError(
                f"{num_slots} slots of {max_tokens} tokens in {num_blocks} blocks: each must be at least 1"
            )
        layers = shape.num_layers
        itemsize = np.dtype(dtype).itemsize
        self.row_bytes = shape.row_values * itemsize * (layers if self.settings.megacache else 1)
        page, planes = self.settings.page_bytes, 2 if self.settings.megacache else 2 * layers
        self.block_bytes = planes * page
        self.source = source or HostPages(page, planes * num_blocks)
        keep = self.settings.keep
        self.pool = BlockPool(self.source, arena, OWNER, num_blocks=num_blocks, planes=planes, keep=keep)
        self.ranges = SlotRanges(self.pool, num_slots=num_slots, slot_bytes=max_tokens * self.row_bytes)
        self.keys, self.values = (
            [self._array(layer, which, itemsize, dtype) for layer in range(layers)] for which in (0, 1)
        )
        self.lengths = [0] * num_slots
        self._active: set[int] = set()
        self._next_tokens = 1
        self._lock = threading.RLock()
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: Future[None] | None = None
        self.critical_blocks = self.background_blocks = 0
        if fill:
            try:
                self.pool.fill(num_blocks)
            except BaseException:
                self.release()
                raise

    # ---- sequences ---------------------------------------------------------------------------------------------------

    def alloc(self, num_tokens: int, begin: Sequence[int] = ()) -> int:
        """A slot for a sequence that begins with so many tokens: the idle one whose pages fit best. Maps nothing yet.

        begin: blocks, mapped elsewhere or pinned, that hold its first tokens already: these are mapped at once.
        OutOfBlocks when no slot is idle; DoesNotFit at the system's limit of mappings.
        """
        with self._lock:
            slot = self._best_fit(num_tokens, begin)
            if slot is None:
                raise OutOfBlocks(f"all {self.num_slots} slots are in use; end a sequence first")
            self._begin(slot, begin)
            self._active.add(slot)
            self._next_tokens = num_tokens
            return slot

    def free(self, slot: int) -> None:
        """The sequence is over. Its pages stay mapped until they are wanted (`deferred`), or go now."""
        with self._lock:
            self._check_active(slot)
            self._active.remove(slot)
            self.lengths[slot] = 0
            if not self.settings.deferred:
                self.source.fence()
                self.ranges.shrink(slot, 0)

    def step(self, lengths: Mapping[int, int]) -> int:
        """Maps what is missing for sequences of these lengths (their new tokens included); the blocks that took.

        DoesNotFit (OutOfBlocks, BudgetExceeded), with nothing changed, when there is no memory: set a sequence aside.
        """
        self.wait()
        with self._lock:
            count = self._grow(lengths)
            self.critical_blocks += count
            return count

    def step_async(self, lengths: Mapping[int, int]) -> int:
        """`step`, and starts to map in the background what the next steps will need."""
        count = self.step(lengths)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "memwall pages")
        if self.settings.eager or any(self._wanted(slot, self.settings.ahead_steps) for slot in self._active):
            self._ahead = self._thread.submit(self._map_ahead)
        return count

    def wait(self) -> None:
        """Returns once the background has done its part for the last step."""
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None

    def truncate(self, slot: int, length: int, *, spare_tokens: int = 0) -> None:
        """Forgets a sequence's tokens from `length` on and unmaps the blocks that it and `spare_tokens` do not need."""
        self.wait()
        with self._lock:
            self._check_active(slot)
            if not 0 <= length <= self.lengths[slot]:
                raise ValueError(f"slot {slot}: cannot truncate {self.lengths[slot]} tokens to {length}")
            self.source.fence()
            self.lengths[slot] = length
            self.ranges.shrink(slot, self.blocks(min(length + spare_tokens, self.max_tokens)))

    def share(self, source: int, target: int, num_tokens: int) -> int:
        """The target, still empty, begins with the source's first tokens, in the same memory; how many: whole blocks.

        Either may go on writing: a block is copied before it would be written to.
        """
        self.wait()
        with self._lock:
            self._check_active(source)
            self._check_active(target)
            if self.lengths[target] or source == target or num_tokens > self.lengths[source]:
                raise ValueError(f"slot {target} cannot begin with {num_tokens} tokens of slot {source}")
            self.source.fence()
            self.ranges.shrink(target, 0)
            blocks = self.ranges.blocks[source][: num_tokens * self.row_bytes // self.settings.page_bytes]
            self.pool.share(blocks)
            try:
                self.ranges.grow(target, blocks)
            except BaseException:
                self.pool.drop(blocks)
                raise
            self.lengths[target] = len(blocks) * self.settings.page_bytes // self.row_bytes
            return self.lengths[target]

    def rows(self, layer: int, slot: int, begin: int, end: int) -> tuple[Any, Any]:
        """Keys and values of tokens [begin, end) of one sequence: plain arrays [tokens, Hkv, D]."""
        if not 0 <= begin <= end <= self.lengths[slot]:
            raise ValueError(f"slot {slot} holds {self.lengths[slot]} tokens, not {begin} to {end}")
        return self.keys[layer][slot, begin:end], self.values[layer][slot, begin:end]

    # ---- memory ------------------------------------------------------------------------------------------------------

    def blocks(self, num_tokens: int) -> int:
        """Blocks behind so many tokens of one sequence."""
        return -(-num_tokens * self.row_bytes // self.settings.page_bytes)

    def mapped_blocks(self, slot: int) -> int:
        """Blocks mapped at a slot now."""
        return len(self.ranges.blocks[slot])

    def slot_bytes(self, slot: int) -> int:
        """Bytes of a slot's blocks, those shared with others by its part of them."""
        return sum(self.block_bytes // self.pool.uses(block) for block in self.ranges.blocks[slot])

    @property
    def num_active(self) -> int:
        """Sequences now."""
        return len(self._active)

    @property
    def mappings(self) -> int:
        """At most this many mappings of the operating system."""
        return self.ranges.mappings

    @property
    def free_blocks(self) -> int:
        """Blocks for new tokens: what the pool has, and what is mapped without being needed. Admit by this figure."""
        with self._lock:
            needed = self.pool.pinned.union(*(self._needed(slot) for slot in self._active))
            return self.pool.available + self.pool.mapped - len(needed)

    def can_admit(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens can begin now."""
        idle = len(self._active) < self.num_slots
        return idle and num_tokens <= self.max_tokens and self.blocks(num_tokens) <= self.free_blocks

    def reclaim(self, count: int) -> int:
        """Unmaps up to `count` blocks that no sequence needs, from the highest slot down; how many there were."""
        with self._lock:
            self.source.fence()
            freed = 0
            for slot in reversed(range(self.num_slots)):
                needed = len(self._needed(slot))
                while freed < count and self.mapped_blocks(slot) > needed:
                    freed += self.ranges.shrink(slot, self.mapped_blocks(slot) - 1)
            return freed

    def set_limit(self, num_blocks: int) -> None:
        """The pool has memory for so many blocks at most from now on. OutOfBlocks, with the limit as it was, where
        sequences need more.
        """
        self.wait()
        with self._lock:
            over = self.pool.held - num_blocks
            if over > 0 and self.pool.spare + self.reclaim(over - self.pool.spare) < over:
                raise OutOfBlocks(f"sequences need {self.pool.mapped} blocks; a limit of {num_blocks} is too low")
            self.pool.give_back(max(over, 0))
            self.pool.limit = num_blocks

    def release(self) -> None:
        """Gives everything back; the arrays must not be touched any more."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
        with self._lock:
            self.source.fence()
            self._active.clear()
            self.ranges.release()
            self.pool.release()

    # ---- how ---------------------------------------------------------------------------------------------------------

    def _array(self, layer: int, which: int, itemsize: int, dtype: str) -> Any:
        head = (self.shape.num_kv_heads, self.shape.head_dim)
        strides = (self.ranges.slot_bytes, self.row_bytes, head[1] * itemsize, itemsize)
        together = self.settings.megacache
        target = self.ranges.ranges[which if together else 2 * layer + which]
        offset = layer * self.shape.row_values * itemsize if together else 0
        return self.source.view(target, (self.num_slots, self.max_tokens, *head), strides, dtype, offset)

    def _check_active(self, slot: int) -> None:
        if slot not in self._active:
            raise ValueError(f"slot {slot} holds no sequence")

    def _best_fit(self, num_tokens: int, begin: Sequence[int] = ()) -> int | None:
        """The idle slot with the fewest blocks that are enough; else the one with the most."""
        idle = {slot: self._usable(slot, begin) for slot in range(self.num_slots) if slot not in self._active}
        enough = [slot for slot, usable in idle.items() if usable >= self.blocks(num_tokens)]
        return min(enough, key=idle.__getitem__) if enough else max(idle, key=idle.__getitem__, default=None)

    def _usable(self, slot: int, begin: Sequence[int]) -> int:
        """Blocks of an idle slot that can stay for a sequence: those it begins with, then those nobody else wants."""
        held = self.ranges.blocks[slot]
        if not begin and not self.pool.pinned:
            return len(held)
        same = next((i for i, pair in enumerate(zip(held, begin)) if pair[0] != pair[1]), min(len(held), len(begin)))
        if same < len(begin):
            return same
        taken = (i for i in range(same, len(held)) if held[i] in self.pool.pinned or self.pool.uses(held[i]) > 1)
        return next(taken, len(held))

    def _begin(self, slot: int, begin: Sequence[int]) -> None:
        usable = self._usable(slot, begin)
        more = begin[usable:]
        if usable < self.mapped_blocks(slot):
            self.source.fence()
            self.ranges.shrink(slot, usable)
        self.pool.share(more)
        try:
            self.ranges.grow(slot, list(more))
        except BaseException:
            self.pool.drop(more)
            raise
        self.lengths[slot] = len(begin) * self.settings.page_bytes // self.row_bytes

    def _needed(self, slot: int) -> list[int]:
        """The blocks behind a slot's tokens."""
        return self.ranges.blocks[slot][: self.blocks(self.lengths[slot])]

    def _grow(self, lengths: Mapping[int, int]) -> int:
        for slot, length in lengths.items():
            self._check_active(slot)
            if length > self.max_tokens:
                raise DoesNotFit(f"slot {slot}: {length:,} tokens, but a sequence may have {self.max_tokens:,} at most")
            if length < self.lengths[slot]:
                raise ValueError(f"slot {slot} holds {self.lengths[slot]} tokens, not {length}: truncate it first")
        missing = {slot: self.blocks(n) - self.mapped_blocks(slot) for slot, n in lengths.items()}
        copies = [(slot, index) for slot, n in lengths.items() for index in self._shared(slot, n)]
        count = sum(max(n, 0) for n in missing.values()) + len(copies)
        before = dict(zip(lengths, (self.lengths[slot] for slot in lengths)))
        self.lengths = [lengths.get(slot, n) for slot, n in enumerate(self.lengths)]  # reclaim must not take these
        try:
            self._ensure(count)
            for slot, wanted in missing.items():
                self._map(slot, wanted)
            if copies:
                self.source.fence()
            for slot, index in copies:
                self.ranges.replace(slot, index, self.pool.take(1)[0])
        except BaseException:
            for slot, length in before.items():
                self.lengths[slot] = length
            raise
        return count

    def _shared(self, slot: int, length: int) -> Iterator[int]:
        """Places of the blocks that tokens up to `length` will be written to and that another slot sees too."""
        held, page = self.ranges.blocks[slot], self.settings.page_bytes
        for index in range(self.lengths[slot] * self.row_bytes // page, min(self.blocks(length), len(held))):
            if self.pool.uses(held[index]) > 1:
                yield index

    def _ensure(self, count: int) -> None:
        """Reclaims until the pool can hand out so many blocks; OutOfBlocks when it can't be."""
        short = count - self.pool.available
        if short > 0 and self.reclaim(short) < short:
            self.pool.check(count)

    def _map(self, slot: int, count: int) -> None:
        if count <= 0:
            return
        held = self.ranges.blocks[slot]
        # an empty slot of a pool with a place for every block starts where no other slot ever comes
        roomy = self.pool.num_blocks >= self.num_slots * self.blocks(self.max_tokens)
        after = held[-1] if held else slot * self.blocks(self.max_tokens) - 1 if roomy else None
        blocks = self.pool.take(count, after)
        try:
            self.ranges.grow(slot, blocks)
        except BaseException:
            self.pool.drop(blocks)
            raise

    def _map_ahead(self) -> None:
        """What the paper's background thread does between two steps; a shortage is left for the next step to report."""
        with self._lock:
            active = sorted(self._active)
        mapped = 0
        try:
            for ahead in range(1, self.settings.ahead_steps + 1):
                for slot in active:
                    if ahead > 1 and mapped >= self.settings.ahead_blocks:
                        return
                    mapped += self._map_one_ahead(slot, ahead)
        except (DoesNotFit, MemoryError):
            return
        finally:
            self.background_blocks += mapped
        if not mapped and self.settings.eager:
            self._unmap_one()

    def _map_one_ahead(self, slot: int, ahead: int) -> int:
        with self._lock:
            count = self._wanted(slot, ahead) if slot in self._active else 0
            self._ensure(count)
            self._map(slot, count)
            return count

    def _wanted(self, slot: int, ahead: int) -> int:
        """Blocks that so many more tokens of a running sequence would need."""
        length = self.lengths[slot]
        blocks = self.blocks(min(length + ahead, self.max_tokens)) if length else 0
        return max(blocks - self.mapped_blocks(slot), 0)

    def _unmap_one(self) -> None:
        with self._lock:
            spared = self._best_fit(self._next_tokens)
            for slot in reversed(range(self.num_slots)):
                if slot not in self._active and slot != spared and self.mapped_blocks(slot):
                    self.source.fence()
                    self.ranges.shrink(slot, self.mapped_blocks(slot) - 1)
                    return
