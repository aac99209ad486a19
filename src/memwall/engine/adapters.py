"""Adapters in the pages of the cache: read when they are wanted, or before, and kept while there is room.

An adapter takes pages of the same pool as keys and values, any free ones, as the tenant `adapters`. One that a running
request uses stays; the others count as free and are given up when pages are wanted, the longest unused first, those
that the scheduler expects soon last. Copies that were asked for ahead run in a thread of their own and hold no lock of
the interpreter, so that steps go on meanwhile.

Everything here belongs to the engine's thread, except the copies themselves and `key_of`.

Source: S-LoRA, Sheng 2023, arXiv 2311.03285, sections 5 (unified paging) and 5.2 (prefetching). Differs from the paper:
adapters that nobody uses stay until their room is wanted, rather than to leave after each batch.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.base import AdapterView
from memwall.engine.kv_pages import KVPages
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.kernels.lora import LoraRoom, PagedLora
from memwall.memory import Arena, OutOfPages
from memwall.models.lora import LoraWeights

if TYPE_CHECKING:
    from memwall.engine.mirrored import MirroredAdapters

TENANT = "adapters"
OWNER = "adapters/pages"
KNOWN_OWNER = "adapters/known"
KNOWN_BYTES = 2048
"""What Python keeps of an adapter beside its offsets: names, shapes, tables (measured with CPython 3.11)."""


@dataclass(slots=True)
class AdapterCounts:
    """Since the start. hits: the adapter was there when a request began to run; prefetch_hits: because it was read
    ahead and not used since. stalls: a step waited for a copy, for stall_seconds in all.
    """

    hits: int = 0
    prefetch_hits: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    prefetched: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    evictions: int = 0


@dataclass(slots=True, eq=False)
class Adapter:
    """One that is known. users: running requests; requests: all that are not over. weights None: it is only counted.
    rows: of a `dora` adapter whose products are made in other processes.
    """

    key: str
    name: str
    num_pages: int
    secret: bytes
    weights: LoraWeights | None = None
    paged: PagedLora | None = None
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    users: int = 0
    requests: int = 0
    wanted_soon: bool = False
    unused: bool = False
    copying: Future[int] | None = None
    retired: bool = False


class Adapters:
    """Adapters over the pages of one engine. owner, known_owner: their rows of the ledger."""

    owner: str = OWNER
    known_owner: str | None = KNOWN_OWNER

    def __init__(
        self,
        pages: KVPages,
        room: LoraRoom | None = None,
        *,
        arena: Arena | None = None,
        exact: bool = False,
        link_bytes_per_s: float | None = None,
        elsewhere: bool = False,
    ) -> None:
        """room: how pages are cut; None where they are only counted. exact: float32 adapters stay float32. elsewhere:
        products with them are made in other processes, see `told`.

        link_bytes_per_s: emulates a slower way from where adapters are kept.
        """
        self.pages = pages
        self.room = room
        self.exact = exact
        self.link_bytes_per_s = link_bytes_per_s
        self.elsewhere = elsewhere
        self.counts = AdapterCounts()
        self._known: dict[str, Adapter] = {}
        self._key_of: dict[str, str] = {}
        self._held: dict[str, Adapter] = {}
        self._idle: OrderedDict[str, Adapter] = OrderedDict()
        self._idle_pages = 0
        self._soon: list[Adapter] = []
        self._worker: ThreadPoolExecutor | None = None
        self.mirrors: list[MirroredAdapters] = []
        """The same adapters in other memories."""
        self._charge = arena.charge(self.owner, 0) if arena is not None else None
        # on the heap already, and so a matter for the ledger, not for the arena's cap
        counted = arena is not None and self.known_owner is not None
        self._known_entry = arena.ledger.add(self.known_owner, "ram", 0) if counted else None  # type: ignore[union-attr, arg-type]
        pages.lender = self

    # ---- who is known ----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names that requests may ask for."""
        return list(self._key_of)

    def key_of(self, name: str) -> str | None:
        """What `Request.adapter` must be for this name. An adapter that comes later under the same name has another."""
        return self._key_of.get(name)

    def describe(self, name: str) -> Adapter | None:
        """What is known of a name."""
        key = self._key_of.get(name)
        return None if key is None else self._known[key]

    def add(self, name: str, weights: LoraWeights, rows: Mapping[str, np.ndarray] | None = None) -> str:
        """Makes an adapter known; its key. rows: of a `dora` adapter, see `models.dora.row_changes`; they stay in
        memory. InputError when the name is taken.
        """
        assert self.room is not None
        paged = weights.paged(self.room, exact=self.exact)
        for target, each in (rows or {}).items() if not self.elsewhere else ():
            paged.lengthen(target, each)
        key = self._add(name, paged.num_pages, weights, paged, rows if self.elsewhere else None)
        self._count_known(self._known_bytes(self._known[key]))
        return key

    def add_counted(self, name: str, num_pages: int) -> str:
        """The same without numbers, for a pool that only counts."""
        return self._add(name, num_pages)

    def _add(
        self,
        name: str,
        num_pages: int,
        weights: LoraWeights | None = None,
        paged: PagedLora | None = None,
        rows: Mapping[str, np.ndarray] | None = None,
    ) -> str:
        if name in self._key_of:
            raise InputError(f"an adapter is called {name!r} already; unload it first, or choose another name")
        key, number = name, 0
        while key in self._known:  # requests go on with one of this name that was removed
            number += 1
            key = f"{name}@{number}"
        self._known[key] = made = Adapter(key, name, num_pages, secrets.token_bytes(16), weights, paged, rows or {})
        self._key_of[name] = key
        for mirror in self.mirrors:
            mirror.take_in(made)
        return key

    def remove(self, name: str) -> None:
        """The name is no longer served; requests that have it go on, and then it is forgotten."""
        key = self._key_of.pop(name, None)
        if key is None:
            raise InputError(f"no adapter is called {name!r}")
        adapter = self._known[key]
        adapter.retired = True
        self._forget_retired(adapter)

    def check(self, key: str | None) -> None:
        """InputError for a key that nobody has."""
        if key is not None and key not in self._known:
            raise InputError(f"the adapter {key!r} is not here; load it first")

    def salt(self, key: str, salt: bytes) -> bytes:
        """What keeps cached beginnings of this adapter apart from all others; nobody can guess it."""
        return hashlib.blake2b(salt, key=self._known[key].secret, digest_size=32).digest()

    def open(self, key: str) -> None:
        """A request that wants it has come."""
        self._known[key].requests += 1

    def close(self, key: str) -> None:
        """A request that wanted it is over."""
        adapter = self._known[key]
        adapter.requests -= 1
        self._forget_retired(adapter)

    def view(self, key: str) -> AdapterView:
        """What schedulers see."""
        adapter = self._known[key]
        return AdapterView(name=key, pages=adapter.num_pages, resident=bool(adapter.pages))

    def views(self, wanted: Iterable[str | None]) -> tuple[AdapterView, ...]:
        """Of each adapter that is wanted once, in the order of asking; None wants none."""
        return tuple(self.view(key) for key in dict.fromkeys(wanted) if key is not None)

    # ---- pages -----------------------------------------------------------------------------------------------------

    @property
    def idle_pages(self) -> int:
        """See `Lender`."""
        return self._idle_pages

    @property
    def used_pages(self) -> int:
        """Pages that adapters hold, used or idle."""
        return sum(len(adapter.pages) for adapter in self._held.values())

    def acquire(self, key: str) -> None:
        """A running request uses it: it is there when this returns, and stays until `release`.

        OutOfPages or BudgetExceeded when there is no room, InputError when its file cannot be read; then nothing is
        held.
        """
        adapter = self._known[key]
        there = bool(adapter.pages)
        if not there:
            self._take(adapter)
        late = adapter.copying is not None and not adapter.copying.done()
        self._wait(adapter, stalls=late or not there)
        if there and not late:
            self.counts.hits += 1
            self.counts.prefetch_hits += adapter.unused
        adapter.unused = False
        adapter.users += 1
        self._awake(adapter)

    def release(self, key: str) -> None:
        """One running request less."""
        adapter = self._known[key]
        adapter.users -= 1
        if not adapter.users:
            self._rest(adapter)

    def prefetch(self, keys: Sequence[str]) -> None:
        """Those that are expected soon: they are given up last, and read ahead where pages are free or idle."""
        for adapter in self._soon:
            adapter.wanted_soon = False
        self._soon = [self._known[key] for key in keys]
        for adapter in self._soon:
            adapter.wanted_soon = True
        for adapter in self._soon:
            if adapter.pages:
                continue
            kept = sum(one.num_pages for one in self._idle.values() if one.wanted_soon)
            if adapter.num_pages > self.pages.available_pages - kept:
                return
            try:
                self._take(adapter)
            except (OutOfPages, BudgetExceeded):
                return
            adapter.unused = True
            self._rest(adapter)
            self.counts.prefetched += 1

    def give_back(self, count: int, *, wanted_soon: bool) -> int:
        """See `Lender`."""
        given = 0
        for adapter in [one for one in self._idle.values() if wanted_soon or not one.wanted_soon]:
            if given >= count:
                break
            given += self._drop(adapter)
        return given

    def offload(self) -> int:
        """Gives up all that nobody uses; pages that became free."""
        return self.give_back(self.idle_pages, wanted_soon=True)

    def settle(self) -> None:
        """Waits for copies under way: pages are about to move."""
        for adapter in self._held.values():
            if adapter.copying is not None:
                adapter.copying.exception()

    def moved(self, moves: Mapping[int, int]) -> None:
        """The pool has moved pages."""
        for adapter in self._held.values() if moves else ():
            self._place(adapter, [moves.get(page, page) for page in adapter.pages])

    def array(self) -> np.ndarray:
        """All resident pages, uint8 [pages, page bytes]."""
        return self.pages.pool.array((self.pages.pool.page_bytes,), np.dtype(np.uint8))

    def paged(self, key: str) -> PagedLora:
        """Where an adapter that is held lies."""
        paged = self._known[key].paged
        assert paged is not None
        return paged

    def told(self, key: str) -> dict[str, Any]:
        """What a process that sees the same pages must know of an adapter that is held (`told_adapters`)."""
        adapter = self._known[key]
        assert adapter.weights is not None
        assert adapter.paged is not None
        told: dict[str, Any] = {
            "form": adapter.paged.form, "scale": adapter.weights.scale, "shapes": adapter.weights.shapes,
            "pages": adapter.pages,
        }  # fmt: skip
        return {**told, "rows": adapter.secret.hex()} if adapter.rows else told

    def rows(self, key: str) -> Mapping[str, np.ndarray]:
        """Of a `dora` adapter whose products are made in other processes: what lengthens the outputs of each target."""
        return self._known[key].rows

    def stop(self) -> None:
        """Ends the thread and lets go of all pages; of no more use."""
        self.settle()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        if self._charge is not None:
            self._charge.release()
        if self._known_entry is not None:
            self._known_entry.release()
        for known in (self._idle, self._held, self._known, self._key_of):
            known.clear()
        self._idle_pages = 0

    def _take(self, adapter: Adapter) -> None:
        """Pages, and a copy into them that has begun."""
        pages = self.pages.take(adapter.num_pages, TENANT)
        self._place(adapter, pages)
        self._held[adapter.key] = adapter
        if self._charge is not None:
            self.pages.pool.count_as(self._charge, len(pages))
        self.counts.loads += 1
        if adapter.weights is not None:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "memwall adapters")
            adapter.copying = self._worker.submit(_copy, adapter, self.array(), self.link_bytes_per_s)

    def _place(self, adapter: Adapter, pages: list[int]) -> None:
        adapter.pages = pages
        if adapter.paged is not None:
            adapter.paged.place(pages)

    def _wait(self, adapter: Adapter, *, stalls: bool) -> None:
        began = time.perf_counter()
        copying, adapter.copying = adapter.copying, None
        try:
            if copying is not None:
                self.counts.loaded_bytes += copying.result()
        except BaseException:
            self._drop(adapter)
            raise
        if stalls:
            self.counts.stalls += 1
            self.counts.stall_seconds += time.perf_counter() - began

    def _rest(self, adapter: Adapter) -> None:
        if adapter.key not in self._idle:
            self._idle[adapter.key] = adapter
            self._idle_pages += adapter.num_pages

    def _awake(self, adapter: Adapter) -> None:
        if self._idle.pop(adapter.key, None) is not None:
            self._idle_pages -= adapter.num_pages

    def _drop(self, adapter: Adapter) -> int:
        self._awake(adapter)
        del self._held[adapter.key]
        if adapter.copying is not None:
            if adapter.copying.exception() is None:
                self.counts.loaded_bytes += adapter.copying.result()
            adapter.copying = None
        pages, adapter.pages = adapter.pages, []
        if self._charge is not None:
            self.pages.pool.count_as(self._charge, -len(pages))
        self.pages.pool.drop(pages)
        self.counts.evictions += 1
        return len(pages)

    def _forget_retired(self, adapter: Adapter) -> None:
        if adapter.retired and not adapter.requests:
            self._forget(adapter)
            for mirror in self.mirrors:
                mirror.let_go(adapter.key)

    def _forget(self, adapter: Adapter) -> None:
        if adapter.pages:
            self._drop(adapter)
        if adapter in self._soon:
            self._soon.remove(adapter)
        del self._known[adapter.key]
        if adapter.weights is not None:
            self._count_known(-self._known_bytes(adapter))

    def _known_bytes(self, adapter: Adapter) -> int:
        """What is in memory of one that nobody asks for."""
        assert adapter.weights is not None
        assert adapter.paged is not None
        rows = adapter.paged.row_bytes + sum(each.nbytes for each in adapter.rows.values())
        return KNOWN_BYTES + adapter.weights.offsets.nbytes + rows

    def _count_known(self, nbytes: int) -> None:
        if self._known_entry is not None:
            self._known_entry.resize(self._known_entry.nbytes + nbytes)


def _copy(adapter: Adapter, pool: np.ndarray, link_bytes_per_s: float | None) -> int:
    """In the copying thread."""
    assert adapter.weights is not None
    assert adapter.paged is not None
    began = time.perf_counter()
    nbytes = adapter.weights.fetch(adapter.paged, pool)
    if link_bytes_per_s is not None:
        time.sleep(max(nbytes / link_bytes_per_s - (time.perf_counter() - began), 0.0))
    return nbytes


def check_room(adapter: Adapter, num_pages: int, context_pages: int) -> None:
    """DoesNotFit where an adapter and one request of the whole context do not fit beside each other."""
    if adapter.num_pages + context_pages > num_pages:
        raise DoesNotFit(
            f"the adapter {adapter.name!r} takes {adapter.num_pages:,} pages and one request of the whole context "
            f"{context_pages:,}, but there are {num_pages:,}; give more --memory or a shorter --context"
        )
