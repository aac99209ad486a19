"""The storage processes of one cache and its forks: heads are split over them, and they are asked all at once.

The ledger holds, on the tier `storage`, what each process may allocate (its arena has that as its cap) and, measured,
what its interpreter takes; on the tier `disk` the blocks of its file. None of it is the host's resident memory.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from memwall.errors import DoesNotFit, MemwallError
from memwall.kv.storage_link import TIMEOUT_SECONDS, StorageLink
from memwall.kv.storage_settings import StorageSettings
from memwall.kv.storage_wire import Op
from memwall.memory import Arena

RUNTIME = "runtime/storage process"
"""Ledger owner of interpreters and libraries of the storage processes."""
SWEEPS = 4
"""So many times a drive may read all that it holds before a request is late."""


class _Asked(threading.local):
    """Links whose reply is due to this thread, in the order of the requests."""

    def __init__(self) -> None:
        self.links: list[StorageLink] = []


class Drives:
    """See the module's text. Counts its users: the processes end with the last one."""

    def __init__(self, settings: StorageSettings, arena: Arena, owner: str) -> None:
        self.settings, self.count = settings, settings.drives
        self.generation = 0
        self._charge = arena.charge(owner, self.count * settings.layout.fixed_bytes())
        self._runtime = arena.ledger.add(RUNTIME, arena.tier, 0)
        self._uses, self._allowed, self._numbers = 1, 0, 0
        self._asked = _Asked()
        self._links: list[StorageLink] = []
        try:
            self._start()
        except BaseException:
            self.drop()
            raise

    def __iter__(self) -> Iterator[StorageLink]:
        return iter(self._links)

    @property
    def alive(self) -> bool:
        """Whether all processes are there."""
        return bool(self._links) and all(link.alive for link in self._links)

    @property
    def shared_bytes(self) -> int:
        """One user's part of what all have in common."""
        return self._charge.nbytes // max(self._uses, 1)

    def new_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def share(self) -> None:
        """One more user."""
        self._uses += 1

    def drop(self) -> None:
        """One user less."""
        self._uses -= 1
        if self._uses == 0:
            self._stop()
            self._charge.release()
            self._runtime.release()

    def restart(self) -> None:
        """New, empty processes in place of lost ones; what other users had there is lost as well."""
        self._stop()
        self._allowed = 0
        self.generation += 1
        self._start()

    def allow(self, more_bytes: int) -> None:
        """Sequences may take so much more memory of the processes, all together."""
        self._allowed += more_bytes
        for link in self._links:
            link.limit_bytes = self._limit()

    def expect(self, flash_bytes: int) -> None:
        """So much lies on flash: an emulated drive may need that long to read it."""
        rate = self.settings.flash_bytes_per_s
        for link in self._links:
            link.timeout_seconds = TIMEOUT_SECONDS + (SWEEPS * flash_bytes / rate if rate else 0)

    def ask(self, link: StorageLink, op: Op, **request: Any) -> None:
        """Sends a request to one process; `answers` takes the replies."""
        try:
            link.ask(op, **request)
        except BaseException:
            self._give_up()
            raise
        self._asked.links.append(link)

    def answers(self, *, one: bool = False) -> list[int]:
        """Values of the replies that are due to this thread, or of one for each process."""
        asked, values = self._asked.links, []
        refused: DoesNotFit | None = None
        for _ in range(min(len(asked), self.count) if one else len(asked)):
            try:
                values.append(asked.pop(0).answer())
            except DoesNotFit as full:
                refused = full
            except BaseException:
                self._give_up()
                raise
        if refused is not None:
            raise refused
        return values

    def all(self, op: Op, **header: int) -> list[int]:
        """The same request to every process; the replies' values."""
        for link in self._links:
            self.ask(link, op, **header)
        return self.answers()

    def fetch(self, sequence: int, layer: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """Keys and values [2, n, Hkv, D] float16 of all heads, piece by piece; the next is read meanwhile."""
        layout = self.settings.layout
        step = layout.slots // (2 * layout.kv_heads) * layout.group
        ends = [begin, *range(begin // step * step + step, end, step), end]
        waiting: list[np.ndarray] = []
        for first, last in itertools.pairwise(ends):
            rows = (2, last - first, layout.kv_heads, layout.head_dim)
            waiting.append(np.empty((self.count, *rows), np.float16))
            header = {"layer": layer, "sequence": sequence, "number": last - first, "first": first}
            for drive, link in enumerate(self._links):
                self.ask(link, Op.ROWS, into=[waiting[-1][drive]], **header)
            if len(waiting) > 1:
                self.answers(one=True)
                yield np.concatenate(list(waiting.pop(0)), axis=2)
        self.answers()
        for piece in waiting:
            yield np.concatenate(list(piece), axis=2)

    def report(self) -> dict[str, object]:
        """Counters of each process and its link, and whether an emulated one."""
        reports = [link.report() for link in self._links] if self.alive else []
        self._runtime.resize(sum(each["runtime_bytes"] for each in reports))
        return {
            "link_bytes_per_s": self.settings.link_bytes_per_s or None,
            "flash_bytes_per_s": self.settings.flash_bytes_per_s or None,
            "emulated": bool(self.settings.link_bytes_per_s or self.settings.flash_bytes_per_s),
            "drives": reports,
        }

    def _give_up(self) -> None:
        """Heads are split: with one process lost, or out of step (Ctrl-C), the rest is of no use."""
        for link in self._links:
            link.drop()
        self._asked.links.clear()
        self._stop()

    def _limit(self) -> int:
        return self.settings.layout.fixed_bytes() + self._allowed // self.count

    def _start(self) -> None:
        self._links = [StorageLink(self.settings.config(), self._limit()) for _ in range(self.count)]
        for drive in self.report()["drives"]:  # type: ignore[attr-defined]
            if drive["note"] and self.settings.direct:
                warnings.warn(
                    f"{drive['note']}; pages go through the system's cache, which is fast but takes memory that no "
                    "ledger shows",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _stop(self) -> None:
        for link in self._links:
            link.close()
        self._links = []


class Shipper:
    """Sends in the background, in order."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        self._thread = self._thread or ThreadPoolExecutor(1, "ship")
        self._jobs.append(self._thread.submit(job))

    def wait(self, leaving: int = 0) -> None:
        """Until no more than so many jobs are left; raises what one ended with."""
        while len(self._jobs) > leaving:
            self._jobs.pop(0).result()

    def stop(self) -> None:
        """Until none is left, however each ends."""
        while self._jobs:
            with contextlib.suppress(MemwallError):
                self._jobs.pop(0).result()
