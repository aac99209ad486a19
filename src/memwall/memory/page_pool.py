"""A pool of equal pages whose limit can move while it is in use.

Pages lie beside each other in one address range of which only the lowest are resident, so the pool gives memory back by
moving its highest pages down (`set_limit`). A page is held by counted references, belongs to a tenant (`kv`, `prefix`,
`adapters`), and may be pinned: then it is neither moved nor given up.

A pool without an arena only counts: the simulator decides over the same object that the engine uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from memwall.errors import DoesNotFit
from memwall.memory.arena import Arena, Charge
from memwall.memory.page_groups import FreePages, LowestFirst, Owner, PageGroups


class OutOfPages(DoesNotFit):
    """The pool has no page left within its limit."""


class PagePool:
    """`limit_pages` of `page_bytes` each, at most `most_pages`; the limit moves between one page and that."""

    anywhere: ClassVar[bool] = True
    """Whether a page is as good for one owner as for another, and stays where it is until nobody holds it."""
    counts: ClassVar[str] = ""
    """What `told` counts."""

    def __init__(
        self,
        owner: str,
        *,
        page_bytes: int,
        most_pages: int,
        limit_pages: int | None = None,
        arena: Arena | None = None,
        group_pages: int = 0,
        shared: bool = False,
    ) -> None:
        """group_pages: pages taken for one owner lie in contiguous groups of so many (`PageGroups`); 0 for none.
        shared: forked processes see the same pages (see `follow`).
        """
        if min(page_bytes, most_pages) < 1:
            raise ValueError(f"{owner}: {most_pages} pages of {page_bytes} bytes; each must be at least 1")
        self.owner = owner
        self.page_bytes = page_bytes
        self.most_pages = most_pages
        self._limit = min(most_pages if limit_pages is None else limit_pages, most_pages)
        self._region = arena.reserve(owner, page_bytes * most_pages, shared=shared) if arena is not None else None
        self._uses: dict[int, int] = {}
        self._shared: set[int] = set()
        self._tenants: dict[int, str] = {}
        self._pins: Counter[int] = Counter()
        self._free: FreePages = PageGroups(self._limit, group_pages) if group_pages else LowestFirst(self._limit)
        self._next = 0  # pages from here on were never handed out
        self.peak_pages = 0

    @property
    def limit_pages(self) -> int:
        """Pages that may be in use."""
        return self._limit

    @property
    def used_pages(self) -> int:
        """Pages in use now, each counted once however many share it."""
        return len(self._uses)

    @property
    def free_pages(self) -> int:
        """Pages that may still be taken."""
        return self._limit - len(self._uses)

    @property
    def committed_bytes(self) -> int:
        """Resident bytes; those of a pool without an arena are what its pages would take."""
        return self._region.committed_bytes if self._region is not None else self._next * self.page_bytes

    def follow(self, committed_bytes: int) -> None:
        """In a forked process: what the owner of a shared pool has made resident by now. It only looks."""
        assert self._region is not None
        self._region.follow(committed_bytes)

    def usage(self) -> dict[str, int]:
        """Pages in use by tenant."""
        return dict(Counter(self._tenants.values()))

    def tenant(self, page: int) -> str | None:
        """Whose page it is; None for a free one."""
        return self._tenants.get(page)

    def uses(self, page: int) -> int:
        """How many references hold a page."""
        return self._uses.get(page, 0)

    def num_shared(self, pages: Iterable[int]) -> int:
        """How many of these pages have more than one reference."""
        return len(self._shared.intersection(pages)) if self._shared else 0

    def take(self, tenant: str, count: int, owner: Owner = None) -> list[int]:
        """Pages of one's own, with whatever was in them. OutOfPages, with nothing taken, when there are too few;
        BudgetExceeded when the arena has no room for pages that were never touched.

        owner: whom they should lie together for, in a pool of groups; `close` it when it takes no more.
        """
        if count > self.free_pages:
            raise OutOfPages(f"{self.owner}: {count} pages wanted, {self.free_pages} of {self._limit} are free")
        pages = self._free.take(count, owner)
        end = max(pages, default=-1) + 1
        if end > self._next:
            try:
                if self._region is not None:
                    self._region.commit(end * self.page_bytes)
            except BaseException:
                self._free.reset(self._limit, self._uses)
                raise
            self._next = end
        for page in pages:
            self._uses[page] = 1
            self._tenants[page] = tenant
        self.peak_pages = max(self.peak_pages, len(self._uses))
        return pages

    def begin(self, owner: Owner, pages: list[int], most: int) -> list[int]:
        """Whoever begins with these pages, which others hold, will come to hold `most`; those of them that it can have.

        Here all: page tables find a page wherever it is.
        """
        return pages

    def close(self, owner: Owner) -> None:
        """Nothing more is taken for this owner: what was kept beside its pages is for all."""
        self._free.close(owner)

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each."""
        for page in pages:
            self._uses[page] += 1
            self._shared.add(page)

    def drop(self, pages: Iterable[int]) -> list[int]:
        """One reference less to each; gives those that became free."""
        freed: list[int] = []
        try:
            for page in pages:
                if self._uses[page] == 1 and self._pins[page]:
                    raise ValueError(f"{self.owner}: page {page} is pinned and cannot be given up")
                self._uses[page] -= 1
                if self._uses[page] == 1:
                    self._shared.discard(page)
                if not self._uses[page]:
                    del self._uses[page], self._tenants[page]
                    freed.append(page)
        finally:
            self._free.give(freed)
        return freed

    def give_to(self, tenant: str, pages: Iterable[int]) -> None:
        """The pages belong to another tenant from now on."""
        for page in pages:
            self._tenants[page] = tenant

    def count_as(self, charge: Charge, pages: int) -> None:
        """So many pages count under another owner of the ledger from now on; a negative number takes them back."""
        if self._region is not None:
            self._region.lend(charge, pages * self.page_bytes)

    def pin(self, pages: Iterable[int]) -> None:
        """Keeps pages where they are until as many `unpin`."""
        for page in pages:
            if page not in self._uses:
                raise ValueError(f"{self.owner}: page {page} is free and cannot be pinned")
            self._pins[page] += 1

    def unpin(self, pages: Iterable[int]) -> None:
        """Takes one pin back from each."""
        for page in pages:
            if not self._pins[page]:
                raise ValueError(f"{self.owner}: page {page} is not pinned")
            self._pins[page] -= 1
            if not self._pins[page]:
                del self._pins[page]

    def set_limit(self, limit_pages: int) -> dict[int, int]:
        """Moves the limit; gives where pages went ({old: new}), whose holders must follow.

        Pages from the new limit on move down and their memory goes back to the system. DoesNotFit, with nothing
        changed, while more are in use, or a pinned one would have to move.
        """
        limit = self._checked_limit(limit_pages)
        high = sorted(page for page in self._uses if page >= limit)
        if pinned := [page for page in high if self._pins[page]]:
            raise DoesNotFit(f"{self.owner}: page {pinned[0]} is pinned above a limit of {limit} pages")
        holes = [page for page in range(min(limit, self._next)) if page not in self._uses]
        moves = dict(zip(high, holes))
        for old, new in moves.items():
            if self._region is not None:
                np.copyto(self.page(new), self.page(old))
            self._uses[new] = self._uses.pop(old)
            self._tenants[new] = self._tenants.pop(old)
        self._shared = {moves.get(page, page) for page in self._shared}
        self._limit = limit
        self._next = min(self._next, limit)
        self._free.reset(limit, self._uses)
        if self._region is not None:
            self._region.shrink(self._next * self.page_bytes)
        return moves

    def page(self, page: int) -> np.ndarray:
        """The bytes of one page, uint8."""
        return self.run(page, 1)

    def run(self, page: int, count: int) -> np.ndarray:
        """The bytes of `count` pages beside each other, uint8."""
        assert self._region is not None
        return self._region.array(count * self.page_bytes, np.uint8, page * self.page_bytes)

    def pieces(self, runs: Iterable[tuple[int, int, int]]) -> list[tuple[memoryview, int]]:
        """The memory of runs (first page, first place, how many) and the byte of a file of pages that it belongs at."""
        return [(self.run(page, count).data, place * self.page_bytes) for page, place, count in runs]

    def map(self) -> Sequence[int]:
        """Numbers of as many pages as the limit allows, used and free, in the order in which they are to be shown."""
        return range(self._limit)

    def told(self) -> dict[str, int]:
        """Counts of a pool's own kind, for who watches: those of this one are all known by name."""
        return {}

    def array(self, row_shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """All resident whole pages as rows. Make it anew when `committed_bytes` has changed."""
        assert self._region is not None
        row_bytes = int(np.prod(row_shape)) * dtype.itemsize
        pages = self._region.committed_bytes // self.page_bytes
        return self._region.array((pages * self.page_bytes // row_bytes, *row_shape), dtype)

    def _checked_limit(self, limit_pages: int) -> int:
        limit = min(limit_pages, self.most_pages)
        if limit < len(self._uses):
            raise DoesNotFit(f"{self.owner}: {len(self._uses)} pages are in use; free {len(self._uses) - limit} first")
        return limit

    def release(self) -> None:
        """Gives everything back; the pool is of no more use."""
        if self._region is not None:
            self._region.release()
        self._uses.clear()
        self._shared.clear()
        self._tenants.clear()
        self._pins.clear()
