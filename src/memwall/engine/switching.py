"""Context switches: pages of requests go out to the swap area and come back, beside the steps where that is wanted.

Source: FastSwitch, 2024, arXiv 2411.18424, the Multithreading Swap Manager and the KV Cache Reuse Mechanism; the groups
are `memory.page_groups`, the decisions `fastswitch`.

A page that is copied out is held by its task until the copy is over, so every page is free, or a request's, or the
source of a copy under way. When pages run short, `KVPages.take` waits for the oldest such task alone (a conflict).
Copies in wait for nobody: they may be given pages that are still being copied out, and then come after those copies.
With `keep_turns` the pages of a conversation go out when a turn ends; they are found by the digests of their tokens,
whichever request brings these. With `reuse` a copy outlives the way back: the next time only pages that have come since
are copied. Where the area is full, copies that are not the only one are overwritten from their ends, those of the
lowest priority first (contaminated); what is left of them is the clean beginning, and the rest is copied again.

Everything here belongs to the engine's thread, except the copies themselves.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from memwall.engine.kv_pages import KVPages
from memwall.engine.sequence import HostCopy, Sequence
from memwall.engine.stream import Link, Stream, Task, ThreadStream
from memwall.engine.swap import SwapArea
from memwall.errors import InputError
from memwall.memory import OutOfPages
from memwall.memory.page_groups import runs_of

log = logging.getLogger("memwall.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchSettings:
    """How pages are swapped. group_pages: those of one request lie in groups of so many, in memory and in the swap
    area; 0 takes the lowest free ones. merge: neighbours are one copy. keep_turns: pages of a conversation go out when
    a turn ends, and come back for the next; overlap: no step waits for that. reuse: what is out already is not sent
    again. link: emulates a slower way. early: pages of a conversation go out as they become full, beside the steps.
    staged: copies are gathered and scattered (`staged`), with host_bytes of memory before the file.
    """

    group_pages: int = 0
    merge: bool = True
    keep_turns: bool = False
    reuse: bool = False
    overlap: bool = True
    link: Link | None = None
    early: bool = False
    staged: bool = False
    host_bytes: int = 0

    def __post_init__(self) -> None:
        if self.group_pages < 0:
            raise InputError(f"group_pages is {self.group_pages}; it must be 0 (no groups) or more, such as 60")


@dataclass(slots=True)
class SwitchCounts:
    """Since the start. clean_bytes: not copied out because the copy was there; restored_tokens: of beginnings read back
    instead of computed. overlapped, waited: requests brought back either way; conflicts: pages were wanted that were
    still being copied out; stall_seconds: the engine waited for copies. steps_during: steps that began while a copy
    was under way. runs: contiguous stretches that the `switched` requests had when they went out.
    """

    out_copies: int = 0
    out_bytes: int = 0
    out_seconds: float = 0.0
    in_copies: int = 0
    in_bytes: int = 0
    in_seconds: float = 0.0
    clean_bytes: int = 0
    restored_tokens: int = 0
    overlapped: int = 0
    waited: int = 0
    conflicts: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    steps_during: int = 0
    contaminated_pages: int = 0
    kept: int = 0
    early_pages: int = 0
    switched: int = 0
    runs: int = 0


@dataclass(slots=True, eq=False)
class _Leaving:
    """Device pages whose copy is under way."""

    pages: list[int]
    copy: HostCopy


@dataclass(slots=True)
class Arrivals:
    """What has come of copies. lost: requests whose pages could not be copied; they are computed again."""

    arrived: list[Sequence] = field(default_factory=list)
    lost: list[Sequence] = field(default_factory=list)


class Switcher:
    """Moves pages of one engine. out, into: streams for both directions; by default a thread each."""

    def __init__(
        self,
        pages: KVPages,
        area: SwapArea,
        settings: SwitchSettings | None = None,
        *,
        out: Stream | None = None,
        into: Stream | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pages = pages
        self.area = area
        self.settings = settings or SwitchSettings()
        self.clock = clock
        self.counts = SwitchCounts()
        self.learn: Callable[[int, float], None] | None = None
        """Told of pages and the seconds that they took."""
        self._out = out or ThreadStream("memwall swap out", self.settings.link)
        self._into = into or ThreadStream("memwall swap in", self.settings.link)
        self._leaving: dict[Task, _Leaving] = {}
        self._leaving_pages: Counter[int] = Counter()
        self._coming: dict[Task, Sequence] = {}
        self._copies: dict[int, HostCopy] = {}
        self._at_rest: dict[bytes, HostCopy] = {}
        self._keys = itertools.count()
        self._told = Arrivals()
        pages.leaving = self

    # ---- what others see -------------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Pages that can be written: free ones, and copies that are not the only one."""
        return self.area.free_pages + sum(len(copy.places) for copy in self._copies.values() if _spare(copy))

    @property
    def active(self) -> bool:
        """Whether a copy is under way."""
        return any(not task.done for task in (*self._leaving, *self._coming))

    @property
    def leaving_pages(self) -> int:
        """See `kv_pages.Leaving`."""
        return self.pages.freeable(list(self._leaving_pages)) if self._leaving_pages else 0

    def is_leaving(self, page: int) -> bool:
        """See `kv_pages.Leaving`."""
        return page in self._leaving_pages and self.pages.pool.uses(page) == 1

    def still_unknown(self, one: Sequence) -> bool:
        """Whether nothing of a waiting request's beginning was kept, in memory or out of it, nor is now. Most steps
        fill a page, and then everyone who waits is looked up: in a long queue that costs more than the step, and the
        first page tells for most of them.
        """
        view, first = one.view, one.digests[:1]
        if view is None or view.hit or view.restorable:
            return False
        return not first or not (self.pages.knows(first[0]) or first[0] in self._at_rest)

    def restorable(self, one: Sequence) -> int:
        """Tokens of a waiting request's beginning that the area holds; one at least stays to be computed."""
        return len(self._matching(one)[1]) * self.pages.page_tokens

    # ---- the four ways ---------------------------------------------------------------------------------------------

    def out(self, one: Sequence, *, wait: bool) -> bool:
        """A running request's pages go out. False where there is no room or, having waited, where they are not there;
        it must then be computed again.
        """
        copy = one.copy or self._new(one)
        if not self._room(copy, len(one.pages)):
            return False
        self.counts.switched += 1
        self.counts.runs += len(runs_of(one.pages))
        first, pages, one.pages = copy.clean, one.pages, []
        copy.clean = (one.computed - one.base) // self.pages.page_tokens
        copy.needed = True
        self._send(one, copy, pages, first)
        if (wait or not self.pages.pool.anywhere) and copy.writing is not None:
            self._wait(copy.writing)
            self._reap()
        if one in self._told.lost:
            self._told.lost.remove(one)
            return False
        return True

    def back(self, one: Sequence, count: int) -> None:
        """The `count` pages of a request that was swapped out begin to come in; `poll` tells when they are here."""
        assert one.copy is not None
        one.pages, after = self._take(one, count)
        self._receive(one, one.copy, one.copy.places[:count], one.pages, after)

    def admit(self, one: Sequence, hits: list[int], *, restore: bool) -> None:
        """A waiting request gets the pages of its beginning: `hits`, which it holds already, and what the area has of
        it beyond those, if `restore`. The copy is its own from now on.
        """
        copy, digests = self._matching(one)
        one.pages = hits
        if copy is None:
            return
        self._wake(copy, one, len(digests))
        if restore and len(digests) > len(hits):
            fresh, after = self._take(one, len(digests) - len(hits))
            one.pages = hits + fresh
            self.counts.restored_tokens += len(fresh) * self.pages.page_tokens
            self._receive(one, copy, copy.places[len(hits) : len(digests)], fresh, after)
        elif not self.settings.reuse:
            self._drop(copy)

    def over(self, one: Sequence, *, whole: bool) -> None:
        """A request has ended. With `keep_turns` a conversation's copy stays, completed where the request ended by
        itself (`whole`).
        """
        self._stop_coming(one)
        pages, one.pages = one.pages, []
        copy, one.copy = one.copy, None
        alone = one.parent is None and not one.request.members
        if self.settings.keep_turns and one.request.session is not None and alone:
            count = one.computed // self.pages.page_tokens
            if whole and pages and copy is None and count:
                copy = self._new(one)
            if whole and pages and copy is not None and self._room(copy, count):
                first, copy.clean = copy.clean, count
                self._send(one, copy, pages, min(first, count), count)
                if not self.settings.overlap and copy.writing is not None:
                    self._wait(copy.writing)
                pages = []
            if copy is not None and copy.clean:
                self._rest(copy, one)
                copy = None
        if copy is not None:
            self._drop(copy)
        self._release(one, pages)

    def stream(self, one: Sequence, tokens: int) -> None:
        """Pages of a running conversation's first `tokens` that are not out yet go out, and stay where they are."""
        if not (self.settings.early and self.settings.keep_turns) or one.request.session is None:
            return
        count, copy = tokens // self.pages.page_tokens, one.copy
        if one.parent is not None or one.request.members or count <= (0 if copy is None else copy.clean):
            return
        copy = copy or self._new(one)
        if not self._room(copy, count):
            return
        first, copy.clean = copy.clean, count
        pages = one.pages[first:count]
        self.pages.acquire(pages)  # the copy's own hold on them
        copies = self.area.write(pages, copy.places[first:count])
        self.counts.out_copies += copies.count
        self.counts.out_bytes += copies.nbytes
        self.counts.early_pages += len(pages)
        task = copy.writing = self._out.submit(copies)
        self._leaving[task] = _Leaving(pages, copy)
        self._leaving_pages.update(pages)

    def start_over(self, one: Sequence) -> None:
        """A request goes back to the queue without pages and copies."""
        self._stop_coming(one)
        pages, one.pages = one.pages, []
        if one.copy is not None:
            self._drop(one.copy)
        self._release(one, pages)

    # ---- between steps ---------------------------------------------------------------------------------------------

    def wait_for(self, one: Sequence) -> None:
        """Returns when the pages of an arriving request are there."""
        for task, who in self._coming.items():
            if who is one:
                self._wait(task)

    def poll(self) -> Arrivals:
        """What has ended since the last call."""
        self._reap()
        told, self._told = self._told, Arrivals()
        return told

    def settle(self) -> None:
        """Waits for all copies: pages are about to move."""
        for task in (*self._leaving, *self._coming):
            task.wait()
        self._reap()

    def free_up(self, count: int) -> None:
        """See `kv_pages.Leaving`: the conflict of FastSwitch."""
        pool = self.pages.pool
        wanted = pool.free_pages + self.pages.idle_pages + count
        while self._leaving and pool.free_pages + self.pages.idle_pages < wanted:
            task = next(iter(self._leaving))
            self.counts.conflicts += not task.done
            self._wait(task)
            self._left(task)

    def release(self) -> None:
        """Ends the threads and gives the area up."""
        self.settle()
        self._out.stop()
        self._into.stop()
        self.area.release()

    # ---- copies under way ------------------------------------------------------------------------------------------

    def _send(self, one: Sequence, copy: HostCopy, pages: list[int], first: int, end: int | None = None) -> None:
        """Pages [first, end) go to their places; all of `pages` are let go when that is done."""
        end = len(pages) if end is None else end
        self.counts.clean_bytes += first * self.pages.pool.page_bytes
        if first == end:
            self._release(one, pages)
            return
        copies = self.area.write(pages[first:end], copy.places[first:end])
        self.counts.out_copies += copies.count
        self.counts.out_bytes += copies.nbytes
        task = copy.writing = self._out.submit(copies)
        self._leaving[task] = _Leaving(pages, copy)
        self._leaving_pages.update(pages)
        self.pages.pool.close(one.id)
        self.pages.version += 1

    def _take(self, one: Sequence, count: int) -> tuple[list[int], list[Task]]:
        """Pages to copy into, and the copies out of them that must be over before."""
        free = sorted(page for page in self._leaving_pages if self.is_leaving(page))
        runs = sorted(runs_of(free), key=lambda run: -run[1])  # the longest first: these were apart before
        found = [page for start, length in runs for page in range(start, start + length)][:count]
        given, after = set(found), []
        for task, gone in self._leaving.items() if given else ():
            kept = [page for page in gone.pages if page not in given]
            if len(kept) < len(gone.pages):
                gone.pages = kept
                after.append(task)
        self._leaving_pages -= Counter(found)
        self.pages.forget_contents(found)
        return found + self.pages.take(count - len(found), owner=one.id), after

    def _receive(self, one: Sequence, copy: HostCopy, places: list[int], pages: list[int], after: list[Task]) -> None:
        copies = self.area.read(places, pages)
        self.counts.in_copies += copies.count
        self.counts.in_bytes += copies.nbytes
        self._coming[self._into.submit(copies, [*after, *([copy.writing] if copy.writing else [])])] = one
        copy.needed = True  # until it is here
        one.status = "arriving"

    def _wait(self, task: Task) -> None:
        if task.done:
            return
        began = self.clock()
        task.wait()
        self.counts.stalls += 1
        self.counts.stall_seconds += self.clock() - began

    def _reap(self) -> None:
        for task in [task for task in self._leaving if task.done]:
            self._left(task)
        for task in [task for task in self._coming if task.done]:
            one = self._coming.pop(task)
            self.counts.in_seconds += task.seconds
            self._measured(task)
            assert one.copy is not None
            one.copy.needed = False
            if task.error is None:
                self._told.arrived.append(one)
                if not self.settings.reuse:
                    self._drop(one.copy)
            else:
                log.warning("pages could not be read from the swap area: %s", task.error)
                self._told.lost.append(one)
        if not self._leaving and not self._coming:
            self.area.empty()

    def _left(self, task: Task) -> None:
        """A copy out is over: its pages are free, or kept for their beginnings."""
        gone = self._leaving.pop(task)
        self._leaving_pages -= Counter(gone.pages)
        self.pages.release(gone.pages)
        self.counts.out_seconds += task.seconds
        if gone.copy.writing is task:
            gone.copy.writing = None
        if task.error is None:
            self._measured(task)
            return
        owner = gone.copy.owner
        if gone.copy.key in self._copies:
            log.warning("pages could not be written to the swap area: %s", task.error)
            self._drop(gone.copy)
            self.area.cut()
        if owner is not None and gone.copy.needed:
            self._stop_coming(owner)
            self._told.lost.append(owner)

    def _measured(self, task: Task) -> None:
        if self.learn is not None and task.error is None:
            self.learn(task.copies.pages, task.seconds)

    def _stop_coming(self, one: Sequence) -> None:
        for task in [task for task, who in self._coming.items() if who is one]:
            task.wait()
            del self._coming[task]

    def _release(self, one: Sequence, pages: list[int]) -> None:
        self.pages.release(pages)
        self.pages.pool.close(one.id)

    # ---- copies that are kept --------------------------------------------------------------------------------------

    def _new(self, one: Sequence) -> HostCopy:
        copy = HostCopy(key=next(self._keys), owner=one)
        self._copies[copy.key] = one.copy = copy
        return copy

    def _room(self, copy: HostCopy, count: int) -> bool:
        """Whether the copy has places for so many pages now. One that has not is as it was, or gone where empty."""
        need = count - len(copy.places)
        if need > 0:
            others = [one for one in self._copies.values() if one is not copy and _spare(one)]
            if need <= self.area.free_pages + sum(len(one.places) for one in others):
                self._contaminate(need - self.area.free_pages, others)
                with suppress(OutOfPages):  # the budget of the disk may be less than the area
                    copy.places += self.area.take(need, copy.key)
        if len(copy.places) >= count:
            return True
        if not copy.places:
            self._drop(copy)
        return False

    def _contaminate(self, count: int, others: list[HostCopy]) -> None:
        """Frees places of copies that are not the only one, those of the lowest priority and longest unused first."""
        for copy in sorted(others, key=lambda one: (*_priority(one), -one.used), reverse=True):
            if count <= 0:
                return
            gone = copy.places[-count:]
            count -= len(gone)
            self.counts.contaminated_pages += min(len(gone), max(copy.clean - len(copy.places) + len(gone), 0))
            del copy.places[-len(gone) :]
            copy.clean = min(copy.clean, len(copy.places))
            self.area.drop(gone)
            self._unindex(copy, copy.clean)
            if not copy.places:
                self._drop(copy)

    def _matching(self, one: Sequence) -> tuple[HostCopy | None, list[bytes]]:
        """The copy at rest with the longest beginning of a waiting request, and the digests of that."""
        if not self._at_rest or one.parent is not None or one.request.members:
            return None, []
        digests = one.digests_of(len(one.tokens) - 1, self.pages.page_tokens)
        found: HostCopy | None = None
        for at, digest in enumerate(digests):
            copy = self._at_rest.get(digest)
            if copy is None:
                return found, digests[:at]
            found = copy
        return found, digests

    def _rest(self, copy: HostCopy, one: Sequence) -> None:
        """Its request is over; the copy waits for the next turn. An older one of the same tokens gives way."""
        copy.digests = list(one.digests_of(copy.clean * self.pages.page_tokens, self.pages.page_tokens))
        copy.owner, copy.needed, copy.used = None, False, next(self._keys)
        copy.rank = (one.request.priority, one.level)
        for digest in copy.digests:
            older = self._at_rest.get(digest)
            if older is not None and len(older.digests) <= len(copy.digests):
                self._drop(older)
            self._at_rest[digest] = copy
        self.counts.kept += 1
        self.pages.version += 1

    def _wake(self, copy: HostCopy, one: Sequence, clean: int) -> None:
        self._unindex(copy, 0)
        copy.owner, copy.clean, one.copy = one, clean, copy

    def _unindex(self, copy: HostCopy, keep: int) -> None:
        for digest in copy.digests[keep:]:
            if self._at_rest.get(digest) is copy:
                del self._at_rest[digest]
        if len(copy.digests) > keep:
            del copy.digests[keep:]
            self.pages.version += 1

    def _drop(self, copy: HostCopy) -> None:
        self._unindex(copy, 0)
        if self._copies.pop(copy.key, None) is not None:
            self.area.drop(copy.places)
            self.area.close(copy.key)
        copy.places, copy.clean = [], 0
        if copy.owner is not None and copy.owner.copy is copy:
            copy.owner.copy = None


def _spare(copy: HostCopy) -> bool:
    """Whether the pages are elsewhere too, or of a conversation that rests."""
    return not copy.needed


def _priority(copy: HostCopy) -> tuple[int, int]:
    one = copy.owner
    return copy.rank if one is None else (one.request.priority, one.level)
