"""Which free pages are handed out next: the lowest ones, or contiguous groups that their owner fills page by page.

Source: FastSwitch, 2024, arXiv 2411.18424, the Dynamic Block Group Manager. Groups keep what one request holds in few
contiguous runs, so that moving it is few large copies, while page tables still list single pages. Free pages are kept
as maximal runs, by start and by size, so that neighbours merge when they are given back. An owner is given a group of
`group_pages` (or the largest run there is) of which it uses the first pages; the unused tail counts as free: once no
run is left, half of the longest tail goes to whoever needs pages, so that nothing is refused while a page is free.

Every page below the limit is in use, in a free run, or in one tail. Cost of `take` and `give`: a binary search, and an
insertion into a list as long as the number of runs, for each run.

Differs from the paper: whose tail is split is not told there; here it is the longest one's.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Protocol

Owner = Hashable | None


class FreePages(Protocol):
    """The free ones among pages [0, limit)."""

    @property
    def num_free(self) -> int:
        """Pages that `take` can give."""

    def take(self, count: int, owner: Owner = None) -> list[int]:
        """So many free pages; the caller has looked that there are enough. owner: whom they should lie together for."""

    def give(self, pages: Iterable[int]) -> None:
        """Pages are free again."""

    def close(self, owner: Owner) -> None:
        """The owner takes no more pages."""

    def reset(self, limit: int, used: Collection[int]) -> None:
        """A new limit; all pages below it but `used` are free."""


class LowestFirst:
    """The lowest page first, so that what is ever touched stays short."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[int] = []
        self._next = 0  # pages from here on were never handed out

    @property
    def num_free(self) -> int:
        """See `FreePages`."""
        return self._limit - self._next + len(self._heap)

    def take(self, count: int, owner: Owner = None) -> list[int]:
        """See `FreePages`."""
        fresh = max(count - len(self._heap), 0)
        pages = [heapq.heappop(self._heap) for _ in range(count - fresh)]
        pages += range(self._next, self._next + fresh)
        self._next += fresh
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """See `FreePages`."""
        for page in pages:
            heapq.heappush(self._heap, page)

    def close(self, owner: Owner) -> None:
        """See `FreePages`."""

    def reset(self, limit: int, used: Collection[int]) -> None:
        """See `FreePages`."""
        self._limit = limit
        self._next = max(used, default=-1) + 1
        held = set(used)
        self._heap = [page for page in range(self._next) if page not in held]


class PageGroups:
    """Groups of `group_pages` for each owner; see the top of the file."""

    def __init__(self, limit: int, group_pages: int) -> None:
        if group_pages < 1:
            raise ValueError(f"group_pages is {group_pages}; it must be at least 1")
        self.group_pages = group_pages
        self._length: dict[int, int] = {}  # of the free run that begins there
        self._starts: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._tails: dict[Owner, tuple[int, int]] = {}  # (first unused page, how many); length 0: a group that is full
        self._num_free = 0
        self.reset(limit, ())

    @property
    def num_free(self) -> int:
        """See `FreePages`."""
        return self._num_free

    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of the free runs, tails left out."""
        return [(start, self._length[start]) for start in self._starts]

    def tails(self) -> dict[Owner, tuple[int, int]]:
        """(start, length) of what is free and kept for an owner while there is other room."""
        return {owner: tail for owner, tail in self._tails.items() if tail[1]}

    def take(self, count: int, owner: Owner = None) -> list[int]:
        """See `FreePages`. Pages of one call are in the order in which the owner is to use them."""
        if count > self._num_free:
            raise ValueError(f"{count} pages wanted, {self._num_free} are free")
        found: list[int] = []
        while len(found) < count:
            need = count - len(found)
            start, length = self._group(owner, need)
            used = min(need, length)
            found += range(start, start + used)
            if owner is not None:
                self._tails[owner] = (start + used, length - used)
            elif length > used:
                self._insert(start + used, length - used)
        self._num_free -= count
        return found

    def give(self, pages: Iterable[int]) -> None:
        """See `FreePages`."""
        for start, length in runs_of(sorted(pages)):
            self._num_free += length
            self._insert(start, length)

    def close(self, owner: Owner) -> None:
        """See `FreePages`: its unused tail goes back to the others."""
        start, length = self._tails.pop(owner, (0, 0))
        if length:
            self._insert(start, length)

    def reset(self, limit: int, used: Collection[int]) -> None:
        """See `FreePages`. Tails stay where no page of theirs was used or cut off."""
        self._length.clear()
        self._starts, self._sizes = [], []
        kept, held = {}, set(used)
        for owner, (start, length) in self._tails.items():
            if start + length <= limit and held.isdisjoint(range(start, start + length)):
                kept[owner] = (start, length)
        self._tails, at = kept, 0
        tails = [page for start, length in kept.values() for page in range(start, start + length)]
        for page in [*sorted([*held, *tails]), limit]:
            if page > at:
                self._insert(at, page - at)
            at = page + 1
        self._num_free = sum(self._length.values()) + len(tails)

    def _group(self, owner: Owner, need: int) -> tuple[int, int]:
        """Contiguous pages, at least one, that belong to nobody afterwards."""
        start, length = self._tails.get(owner, (-1, 0)) if owner is not None else (-1, 0)
        if length:
            return start, length
        share = self._num_free // max(len(self._tails), 1)
        want = need if owner is None else max(need, min(self.group_pages, need + share))
        if start in self._length:  # the pages after its last one are free: the group grows in place
            return self._carve(start, want)
        if self._sizes:
            at = bisect_left(self._sizes, (want, -1))
            return self._carve(self._sizes[min(at, len(self._sizes) - 1)][1], want)
        victim = max((one for one in self._tails if self._tails[one][1]), key=lambda one: self._tails[one][1])
        start, length = self._tails[victim]
        half = min(max((length + 1) // 2, need), length)
        self._tails[victim] = (start, length - half)
        return start + length - half, half

    def _carve(self, start: int, want: int) -> tuple[int, int]:
        """The first pages of a free run."""
        length = self._remove(start)
        if length > want:
            self._insert(start + want, length - want)
        return start, min(length, want)

    def _insert(self, start: int, length: int) -> None:
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + length:
            length += self._remove(start + length)
        if at and self._starts[at - 1] + self._length[self._starts[at - 1]] == start:
            before = self._starts[at - 1]
            length += self._remove(before)
            start = before
        insort(self._starts, start)
        insort(self._sizes, (length, start))
        self._length[start] = length

    def _remove(self, start: int) -> int:
        length = self._length.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._sizes[bisect_left(self._sizes, (length, start))]
        return length


def runs_of(pages: Sequence[int]) -> list[tuple[int, int]]:
    """(start, length) of the stretches in which each page follows the one before, in the given order."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and found[-1][0] + found[-1][1] == page:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found


def paired_runs(pages: Sequence[int], places: Sequence[int]) -> list[tuple[int, int, int]]:
    """(page, place, length) of the stretches that lie in a line at both ends: each is one copy."""
    found: list[tuple[int, int, int]] = []
    for page, place in zip(pages, places, strict=True):
        if found:
            start, other, length = found[-1]
            if start + length == page and other + length == place:
                found[-1] = (start, other, length + 1)
                continue
        found.append((page, place, 1))
    return found
