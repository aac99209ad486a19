"""vAttention as the store of the engine: each running request has a slot, where its rows lie in a line.

The engine goes on planning in pages; a page here is a block of `kv.vattention.VirtualKV`, as many of the system's pages
in each array as hold whole rows. `SlotPool` keeps the engine's books like any pool, but the system's page tables say
where a request's pages are: what it takes is mapped behind its slot at once, so that a refusal comes before a step.
`SlotCache` tells the store the lengths of a step; what the next ones will need is mapped while that one computes.
Attention is `attend_float` over plain rows; there are no block tables.

Pages of a request that is over stay mapped in its slot (deferred reclamation) and are free all the same: the next
request in the slot finds them there, and any other takes them away. Beginnings that are kept for others are pinned, and
are mapped once more at the slot of whoever begins with them.

Differs from the paper: the pool takes memory as it is needed, up to the limit that the budget leaves now, and keeps
what becomes free until that limit falls; a slot is chosen by all that a request brings, kept beginnings included.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memwall.engine.batch import BatchCache
from memwall.engine.executor import Entry
from memwall.engine.switching import SwitchSettings
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.hardware.units import KIB, format_bytes
from memwall.kernels.attention import attend_float
from memwall.kv import CacheShape, parse
from memwall.kv.float_store import put_rows
from memwall.kv.vattention import OWNER, VirtualKV, VirtualSettings
from memwall.kv.virtual_cache import ADDRESS_BYTES, VirtualCache, virtual_settings
from memwall.memory import Arena, OutOfPages, PagePool
from memwall.memory.page_groups import Owner
from memwall.memory.virtual import runs

if TYPE_CHECKING:
    from memwall.engine.serving import ServingSettings

log = logging.getLogger("memwall.engine")
AHEAD_STEPS = 10
"""Steps that pages are mapped ahead for unless it is said otherwise; the paper's figure."""


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """page_bytes: mapped at once in each of `planes` arrays, of rows of row_bytes; a page of the engine is that in all
    of them, for page_tokens tokens.
    """

    page_bytes: int
    planes: int
    row_bytes: int
    dtype: str
    megacache: bool
    ahead: int

    @classmethod
    def of(cls, kv: str, shape: CacheShape) -> SlotLayout:
        """What a policy such as `vattention(page_kib=64)` means for a model.

        Of the system's pages as many are mapped together as hold whole rows: then a page of the engine begins with a
        token, and its tokens are all that is shared with it.
        """
        settings = virtual_settings(parse(kv), ahead=AHEAD_STEPS)
        together = shape.num_layers if settings["megacache"] else 1
        row_bytes = shape.row_values * settings["bits"] // 8 * together
        return cls(
            page_bytes=math.lcm(settings["page_kib"] * KIB, row_bytes),
            planes=2 * shape.num_layers // together,
            row_bytes=row_bytes,
            dtype=VirtualCache.DTYPES[settings["bits"]],
            megacache=together > 1,
            ahead=settings["ahead"],
        )

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.page_bytes // self.row_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a page in all arrays."""
        return self.page_bytes * self.planes


def check_slots(settings: ServingSettings) -> None:
    """InputError for what cannot be done where requests have slots."""
    virtual_settings(parse(settings.kv), ahead=AHEAD_STEPS)
    without = f"--kv {settings.kv} serves requests from slots of addresses: "
    if settings.lora is not None:
        raise InputError(without + "there are no pages that adapters could lie in; leave --lora and --lora-dir out")
    if settings.shared_prefixes:
        raise InputError(
            without + "prefixes that batchllm plans go on anywhere in a page, for which it has no tables; add "
            "--scheduler fcfs, which shares whole pages of beginnings"
        )
    if settings.phases is not None:
        raise InputError(without + "they are mapped in one process; use --scheduler fcfs")
    if settings.ahead or settings.switch != SwitchSettings():
        raise InputError(without + "their pages are not moved in groups beside the steps; use --scheduler fcfs")


class _SlotPages:
    """Pages of owners in the order of their tokens, each owner's mapped at its slot; a `FreePages`."""

    def __init__(self, store: VirtualKV, page_tokens: int) -> None:
        self.store = store
        self.page_tokens = page_tokens
        self.tight = False
        """The system's limit of mappings was met; from then on pages are counted as if each took one by itself."""
        self._slots: dict[Owner, int] = {}
        self._counts: dict[Owner, int] = {}

    @property
    def num_free(self) -> int:
        """See `FreePages`."""
        return self.mappable(self.store.free_blocks)

    def mappable(self, pages: int) -> int:
        """How many of so many free pages the system has mappings for."""
        return min(pages, self._room) if self.tight else pages

    @property
    def _room(self) -> int:
        """Pages that can be mapped, each by itself, once what nobody needs has made room."""
        held = [self.store.ranges.blocks[slot][: self._counts[owner]] for owner, slot in self._slots.items()]
        needed = 1 + sum(1 + sum(1 for _ in runs(blocks)) for blocks in held if blocks)
        return max(self.store.ranges.most_mappings // self.store.pool.planes - needed - 2, 0)

    def slot(self, owner: Owner) -> int:
        """Where an owner's tokens lie."""
        return self._slots[owner]

    def begin(self, owner: Owner, pages: list[int], most: int) -> list[int]:
        """A slot for an owner, with pages mapped at its start; none of them where that cannot be."""
        self.store.wait()
        if self.tight:  # shared pages take mappings too, which setting somebody aside would seem not to give back
            pages = []
        tokens = min(most * self.page_tokens, self.store.max_tokens)
        try:
            slot = self.store.alloc(tokens, pages)
        except DoesNotFit:  # too many mappings, or no slot yet: it begins by itself when it takes pages
            return []
        self._slots[owner], self._counts[owner] = slot, len(pages)
        return pages

    def take(self, count: int, owner: Owner = None) -> list[int]:
        """See `FreePages`. OutOfPages, BudgetExceeded or MemoryError with nothing changed."""
        if not count:
            return []
        new = owner not in self._slots
        if new:
            self.begin(owner, [], count)
        if owner not in self._slots:
            raise OutOfPages(f"all {self.store.num_slots} slots are in use")
        self.store.wait()
        slot, held = self._slots[owner], self._counts[owner]
        try:
            self._map(slot, (held + count - 1) * self.page_tokens + 1)
        except BaseException:
            if new:
                self.close(owner)
            raise
        pages = self.store.ranges.blocks[slot][held : held + count]
        self.store.pool.pin(pages)
        self._counts[owner] = held + count
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """See `FreePages`: they stay mapped where they are until they are wanted."""
        self.store.wait()
        self.store.pool.unpin(list(pages))

    def close(self, owner: Owner) -> None:
        """See `FreePages`."""
        slot = self._slots.pop(owner, None)
        if slot is not None:
            del self._counts[owner]
            self.store.wait()
            self.store.free(slot)
            self.tight = self.tight and self._room < self.store.free_blocks

    def reset(self, limit: int, used: Collection[int]) -> None:
        """See `FreePages`."""
        self.store.set_limit(limit)

    def places(self) -> dict[int, tuple[int, int]]:
        """Slot of a running request, and place in it, of each page."""
        return {
            page: (slot, index)
            for owner, slot in self._slots.items()
            for index, page in enumerate(self.store.ranges.blocks[slot][: self._counts[owner]])
        }

    def _map(self, slot: int, tokens: int) -> None:
        try:
            self.store.step({slot: tokens})
        except BudgetExceeded:
            raise
        except DoesNotFit:  # the system's limit of mappings: those that nobody needs make room
            self.store.reclaim(self.store.pool.num_blocks)
            try:
                self.store.step({slot: tokens})
            except DoesNotFit as refused:
                if not self.tight:
                    log.warning("fewer requests run than memory has room for: %s", refused)
                self.tight = True
                raise OutOfPages(str(refused)) from refused


class SlotPool(PagePool):
    """A pool whose pages are blocks of a `VirtualKV`."""

    anywhere = False
    counts = "slots"

    def __init__(
        self,
        layout: SlotLayout,
        shape: CacheShape,
        arena: Arena,
        *,
        num_slots: int,
        context_pages: int,
        most_pages: int,
        limit_pages: int,
    ) -> None:
        """num_slots: requests that may run at once. context_pages: of the longest request."""
        addresses = layout.planes * num_slots * context_pages * layout.page_bytes
        if addresses > ADDRESS_BYTES:
            raise InputError(
                f"{num_slots} slots for {context_pages * layout.page_tokens:,} tokens each are "
                f"{format_bytes(addresses)} of addresses, and a process has {format_bytes(ADDRESS_BYTES)} for them; "
                "use a shorter --context or fewer --max-sequences"
            )
        super().__init__(OWNER, page_bytes=layout.block_bytes, most_pages=most_pages, limit_pages=limit_pages)
        self.layout = layout
        self.store = VirtualKV(
            shape,
            arena,
            num_slots=num_slots,
            max_tokens=context_pages * layout.page_tokens,
            num_blocks=most_pages,
            settings=VirtualSettings(
                page_bytes=layout.page_bytes, megacache=layout.megacache, ahead_steps=layout.ahead
            ),
            dtype=layout.dtype,
            fill=False,
        )
        self.store.set_limit(limit_pages)
        self._pages = _SlotPages(self.store, layout.page_tokens)
        self._free = self._pages

    @property
    def free_pages(self) -> int:
        """See `PagePool`: what is mapped without being needed is free too."""
        return self._pages.mappable(super().free_pages)

    @property
    def committed_bytes(self) -> int:
        """See `PagePool`."""
        return self.store.pool.held * self.page_bytes

    def slot(self, owner: Owner) -> int:
        """The slot of a running request."""
        return self._pages.slot(owner)

    def begin(self, owner: Owner, pages: list[int], most: int) -> list[int]:
        """See `PagePool`: they are mapped at the start of its slot."""
        return self._pages.begin(owner, pages, most)

    def set_limit(self, limit_pages: int) -> dict[int, int]:
        """See `PagePool`. No page moves: any of them can be given back."""
        limit = self._checked_limit(limit_pages)
        self._pages.reset(limit, self._uses)
        self._limit = limit
        return {}

    def pieces(self, runs: Iterable[tuple[int, int, int]]) -> list[tuple[memoryview, int]]:
        """See `PagePool`: a page lies in as many pieces as there are arrays. They must be of running requests."""
        places, size = self._pages.places(), self.layout.page_bytes
        return [
            (view.data, (place + at) * self.page_bytes + plane * size)
            for page, place, count in runs
            for at in range(count)
            for plane, view in enumerate(self.store.ranges.pages(*places[page + at]))
        ]

    def map(self) -> Sequence[int]:
        """See `PagePool`: used pages together, then numbers of none for the free ones."""
        return [*sorted(self._uses), *[-1] * (self.limit_pages - self.used_pages)]

    def told(self) -> dict[str, int]:
        """Slots, and how many have a request. Pages that were mapped in a step and beside one; those that are mapped
        without being needed, for a slot's next request or for what its own will add; the system's mappings.
        """
        store = self.store
        return {
            "slots": store.num_slots,
            "active_slots": store.num_active,
            "mapped_in_steps": store.critical_blocks,
            "mapped_beside_steps": store.background_blocks,
            "waiting_pages": store.pool.mapped - self.used_pages,
            "mappings": store.mappings,
        }

    def release(self) -> None:
        """See `PagePool`."""
        self.store.release()
        super().release()


@dataclass(slots=True)
class _Rows:
    """Rows [row, row + count) of the batch are tokens [first, first + count) at a slot."""

    row: int
    count: int
    first: int
    slot: int


class SlotCache(BatchCache):
    """A `BatchCache` over slots."""

    def __init__(self, shape: CacheShape, pool: SlotPool, page_tokens: int) -> None:
        super().__init__(shape, pool, page_tokens)
        self.slots = pool
        self.store = pool.store
        self._batch: list[_Rows] = []
        tail = (shape.num_kv_heads, shape.head_dim)
        self._flat = [[_flattened(array, tail) for array in pair] for pair in zip(self.store.keys, self.store.values)]

    def begin(self, batch: list[Entry]) -> np.ndarray:
        """See `BatchCache`; the pages of these tokens are mapped, and those of the next ones will be meanwhile."""
        store, row = self.store, 0
        self._batch, positions, rows = [], [], []
        self._singles = sum(entry.count == 1 for entry in batch)
        for entry in batch:
            at = np.arange(entry.first, entry.first + entry.count, dtype=np.int64)
            one = _Rows(row, entry.count, entry.first, self.slots.slot(entry.sequence.id))
            self._batch.append(one)
            positions.append(at)
            rows.append(one.slot * store.max_tokens + at)
            row += entry.count
        # a step that failed may have left a slot longer
        lengths = {one.slot: max(one.first + one.count, store.lengths[one.slot]) for one in self._batch}
        advance: Callable[[dict[int, int]], int] = store.step_async if self.slots.layout.ahead else store.step
        advance(lengths)
        self._rows, self._at = np.concatenate(rows), 0
        return np.concatenate(positions)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """See `BatchCache`."""
        self.append_rows(layer, k, v, 0)
        self._at = 0

    def append_rows(self, layer: int, k: np.ndarray, v: np.ndarray, begin: int) -> None:
        """See `BatchCache`."""
        for into, fresh in zip(self._flat[layer], (k, v)):
            put_rows(into, fresh, self._rows[begin : begin + len(fresh)])

    def attend_rows(self, layer: int, q: np.ndarray, begin: int, out: np.ndarray) -> np.ndarray:
        """See `BatchCache`: the same kernel as for one sequence, over its rows."""
        scale, window, stop = self.shape.logit_scale, self.shape.window(layer), begin + len(q)
        for one in self._batch:
            first, last = max(one.row, begin), min(one.row + one.count, stop)
            if first < last:
                place = slice(first - begin, last - begin)
                keys, values = self.store.rows(layer, one.slot, 0, one.first + one.count)
                position = one.first + first - one.row
                attend_float(
                    q[place], keys, values, scale=scale, first_position=position, window=window, out=out[place]
                )
        return out

    def settle(self, layer: int) -> None:
        """See `BatchCache`; after the last layer the thread's pages are on the ledger."""
        if layer == self.shape.num_layers - 1:
            self.store.wait()


def make_slots(
    settings: ServingSettings, shape: CacheShape, arena: Arena, *, context: int, most_pages: int, limit_pages: int
) -> SlotPool:
    """The pool of a server."""
    return SlotPool(
        SlotLayout.of(settings.kv, shape),
        shape,
        arena,
        num_slots=settings.max_sequences,
        context_pages=settings.limits.pages(context),
        most_pages=most_pages,
        limit_pages=limit_pages,
    )


def _flattened(array: np.ndarray, tail: tuple[int, ...]) -> np.ndarray:
    """[slots, tokens, ..] as [slots * tokens, ..]: slots hold whole rows, so that all of them follow each other."""
    flat = array.view()
    flat.shape = (-1, *tail)  # where that needed a copy it would be refused
    return flat
