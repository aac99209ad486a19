"""Two worker processes over one copy of the weights and one pool of pages: the engine's end.

The engine's process hands out pages and work and computes nothing. New shares come as the paper's partitions do, with
new processes: they are made while the old ones go on, and each phase changes over at the end of its own iteration; or
(`fresh=False`) as a message with the next batch, since a quota of time can be changed in a process that runs.

A worker that is lost is replaced, and its batch done again: its tokens had not been counted yet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import selectors
import socket
import sys
import time
from collections.abc import Sequence as Batch
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from memwall.engine.adapters import Adapters
from memwall.engine.base import PHASES, Phase, Shares
from memwall.engine.batch import ModelExecutor
from memwall.engine.executor import Entry, Output
from memwall.engine.hand_over import Pull
from memwall.engine.pacing import Board
from memwall.engine.phase_process import Worker, entry_message, fork_resident, order_worker, outputs_of, receive, send
from memwall.engine.phased import Done
from memwall.engine.pooling import Pooler, pooled
from memwall.engine.sequence import Sequence
from memwall.engine.told_adapters import ToldRows, adapters_message
from memwall.engine.told_forms import ToldForms
from memwall.errors import InputError, MemwallError
from memwall.hardware.units import KIB
from memwall.memory import Ledger, PagePool
from memwall.memory.resident import count_unseen

OWNER = "workers"
WAIT_SECONDS = 0.25
READY_SECONDS = 60.0
MEASURE_SECONDS = 1.0
MOST_LOSSES = 3
"""In a row, before the engine gives up."""
log = logging.getLogger("memwall.engine")


@dataclass(slots=True, eq=False)
class Process:
    """A worker process. pid: 0 until it is ready."""

    phase: Phase
    connection: socket.socket
    percent: int
    pid: int = 0
    rows: ToldRows = field(default_factory=ToldRows)


class Draws:
    """Random numbers for tokens, drawn where no worker's loss can touch them, and sums of embedded texts."""

    def __init__(self) -> None:
        self._pooler = Pooler()
        self._sources: dict[int, random.Random] = {}
        self._drawn: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._sources) + len(self._drawn)

    def of(self, entry: Entry) -> float | None:
        """The number for this entry's token; the same again where a worker was lost with it."""
        one = entry.sequence
        if not entry.sample or one.request.sampling.temperature == 0:
            return None
        if one.id not in self._drawn:
            source = self._sources.setdefault(one.id, random.Random(one.request.sampling.seed))
            self._drawn[one.id] = source.random()
        return self._drawn[one.id]

    def message(self, entry: Entry) -> dict[str, Any]:
        """What a worker is told of an entry."""
        return entry_message(entry, self.of(entry), self._pooler.seen_before(entry))

    def done(self, phase: Phase, batch: list[Entry], answer: dict[str, Any], seconds: float) -> Done:
        """A batch that a worker has answered: its tokens are there."""
        for entry in batch:
            self._drawn.pop(entry.sequence.id, None)
        began, ended = answer["span"]
        outputs = pooled(batch, outputs_of(answer), self._pooler)
        return Done(phase, batch, outputs, seconds, began, ended, answer["cpu"], *answer["pulled"])

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over."""
        self._sources.pop(sequence.id, None)
        self._drawn.pop(sequence.id, None)
        self._pooler.forget(sequence.id)


class ForkedWorkers:
    """See `Workers`. Make it while the process has one thread."""

    def __init__(
        self,
        executor: ModelExecutor,
        pool: PagePool,
        shares: Shares,
        *,
        page_tokens: int,
        cores: int,
        fresh: bool = True,
        whole_threads: bool = True,
        ledger: Ledger | None = None,
        prefill_pool: PagePool | None = None,
        forms: ToldForms | None = None,
    ) -> None:
        """cores: what 100 percent are. fresh: new shares come with new processes. whole_threads: see `Pacer`.
        prefill_pool: where prompts have their pages; None for those of `pool`. forms: of answers, for the workers.
        """
        if not sys.platform.startswith("linux"):
            raise InputError("two workers over one memory need Linux; choose the scheduler fcfs")
        self.shares = shares
        self.preparing: Shares | None = None
        self.pools: dict[Phase, PagePool] = {"prefill": prefill_pool or pool, "decode": pool}
        self.fresh = self._fresh_wanted = fresh
        self.cores = cores
        self.lost = 0
        self._page_tokens = page_tokens
        adapters = executor.adapters if isinstance(executor.adapters, Adapters) else None
        self.adapters: dict[Phase, Adapters | None] = dict.fromkeys(PHASES, adapters)
        """Of each phase's memory."""
        self._whole_threads = whole_threads
        self._ledger = ledger
        self._busy: dict[Phase, tuple[list[Entry], float]] = {}
        self._losses: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self.draws = Draws()
        self._next: dict[Phase, Process] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self.board = Board()
        pools, board = self.pools, self.board
        self._resident, self._orders = fork_resident(
            lambda connection, order: Worker(connection, order, executor, pools, board, forms)
        )
        self._unseen, self._measured, self.reserve_bytes = 0, 0.0, 0
        self._process = {phase: self._make(phase, shares) for phase in PHASES}
        for process in self._process.values():
            self._await(process)
        count_unseen(self)

    # ---- batches ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether one of them computes."""
        return bool(self._busy)

    def start(self, phase: Phase, batch: list[Entry], pulls: Batch[Pull] = ()) -> None:
        """See `Workers`."""
        self._change_over()
        try:
            self._send(self._process[phase], batch, pulls)
        except OSError:  # it was lost while it was idle
            self._replace(phase)
            self._send(self._process[phase], batch, pulls)
        self._busy[phase] = (batch, time.perf_counter())

    def _send(self, process: Process, batch: list[Entry], pulls: Batch[Pull]) -> None:
        phase = process.phase
        adapters = adapters_message(batch, self.adapters[phase])
        job = {
            "percent": process.percent if self.fresh else self.shares.of(phase),
            "committed": [self.pools[one].committed_bytes for one in PHASES],
            "entries": [self.draws.message(entry) for entry in batch],
            "pulls": [astuple(one) for one in pulls],
            "adapters": adapters,
            "rows": process.rows.message(adapters, self.adapters[phase]),
        }
        send(process.connection, job)

    def collect(self, until: float | None = None, *, wait: bool = True) -> list[Done]:
        """See `Workers`."""
        end = time.perf_counter() + WAIT_SECONDS if until is None else until
        while True:
            left = max(end - time.perf_counter(), 0.0) if wait and self._busy else 0.0
            done, woken = [], False
            for key, _ in self._selector.select(left):
                if key.data is None:
                    woken = True
                    self._drain_wakes()
                elif key.data.connection.fileno() < 0:  # dropped by what was read just before
                    continue
                elif key.data.pid:
                    done += self._receive(key.data)
                else:
                    self._await(key.data)
            self._change_over()
            if done or woken or not wait or not self._busy or time.perf_counter() >= end:
                return done

    def wake(self) -> None:
        """See `Workers`."""
        with contextlib.suppress(OSError):  # it is full, or over
            self._waker.send(b"\0")

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """See `Executor`: one batch by itself, in the prefill worker."""
        return self.run_as("prefill", batch)

    def run_as(self, phase: Phase, batch: list[Entry], pulls: Batch[Pull] = ()) -> list[Output | None]:
        """One batch by itself."""
        while True:
            self.start(phase, batch, pulls)
            done: list[Done] = []
            while not done:
                done = self.collect()
            if done[0].outputs is not None:
                return done[0].outputs

    def forget(self, sequence: Sequence) -> None:
        """See `Executor`."""
        self.draws.forget(sequence)

    def _receive(self, process: Process) -> list[Done]:
        answer = receive(process.connection)
        if answer is None:
            return self._lose(process)
        batch, sent = self._busy.pop(process.phase)
        seconds = time.perf_counter() - sent
        if "error" in answer:
            return [self._failed(process.phase, batch, answer["error"], seconds)]
        self._losses[process.phase] = 0
        return [self.draws.done(process.phase, batch, answer, seconds)]

    def _failed(self, phase: Phase, batch: list[Entry], why: str, seconds: float) -> Done:
        self._losses[phase] += 1
        if self._losses[phase] >= MOST_LOSSES:
            self._losses[phase] = 0
            raise MemwallError(f"the {phase} worker failed {MOST_LOSSES} times in a row: {why}")
        log.warning("the %s worker failed and tries again: %s", phase, why)
        return Done(phase, batch, None, seconds)

    # ---- processes -------------------------------------------------------------------------------------------------

    def switch(self, shares: Shares) -> None:
        """See `Workers`."""
        if not self.fresh:
            self.shares = shares
            return
        self._give_up_next()
        self.preparing = shares
        self._next = {phase: self._make(phase, shares) for phase in PHASES}

    @property
    def pids(self) -> tuple[int, ...]:
        """The resident process and the workers."""
        made = [*self._process.values(), *self._next.values()]
        return (self._resident, *(process.pid for process in made if process.pid))

    def release(self) -> None:
        """Ends all processes."""
        if self._resident:
            for process in (*self._process.values(), *self._next.values()):
                self._drop(process)
            self._next = {}
            self._orders.close()
            os.waitpid(self._resident, 0)
            self._resident = 0
            self._selector.close()
            self._woken.close()
            self._waker.close()
            if self._ledger is not None:
                self._ledger.put(OWNER, "ram", 0)

    def make_do(self, *, roomy: bool) -> None:
        """Whether there is room for two more workers while shares change; where there is none, the shares of those
        that are there change.
        """
        self.fresh = self._fresh_wanted and roomy
        if not self.fresh:
            self._give_up_next()
            self.reserve_bytes = 0

    def _make(self, phase: Phase, shares: Shares) -> Process:
        order = {
            "phase": phase, "percent": shares.of(phase), "cores": self.cores,
            "page_tokens": self._page_tokens, "whole_threads": self._whole_threads,
        }  # fmt: skip
        try:
            connection = order_worker(self._orders, order)
        except OSError as error:
            raise MemwallError(f"the process that holds the weights is gone: {error}") from error
        process = Process(phase, connection, shares.of(phase))
        self._selector.register(connection, selectors.EVENT_READ, process)
        return process

    def _await(self, process: Process) -> None:
        """Takes its first message."""
        process.connection.settimeout(READY_SECONDS)
        try:
            told = receive(process.connection)
        except TimeoutError:
            told = None
        process.connection.settimeout(None)
        if told is not None:
            process.pid = told["ready"]
        elif process in self._next.values():
            log.warning("a %s worker with new shares could not be made; the old ones go on", process.phase)
            self._give_up_next()
        else:
            raise MemwallError(f"the {process.phase} worker could not be made")

    def _change_over(self) -> None:
        """New workers that are ready take over, each phase when its old worker is idle."""
        if not self._next:
            return
        if self.preparing is not None:
            if not all(process.pid for process in self._next.values()):
                return
            self.shares, self.preparing = self.preparing, None
        for phase in [phase for phase in self._next if phase not in self._busy]:
            self._drop(self._process[phase])
            self._process[phase] = self._next.pop(phase)

    def _give_up_next(self) -> None:
        for process in self._next.values():
            self._drop(process)
        self._next, self.preparing = {}, None

    def _lose(self, process: Process) -> list[Done]:
        if process in self._next.values():
            self._give_up_next()
            return []
        phase = process.phase
        was_busy = phase in self._busy
        batch, began = self._busy.pop(phase, ([], time.perf_counter()))
        self._replace(phase)
        if not was_busy:
            return []
        return [self._failed(phase, batch, "it ended", time.perf_counter() - began)]

    def _replace(self, phase: Phase) -> None:
        self.lost += 1
        log.warning("the %s worker was lost and is made anew", phase)
        self._drop(self._process[phase])
        self.board.hide(phase)
        self._process[phase] = self._make(phase, self.shares)
        self._await(self._process[phase])

    def _drop(self, process: Process) -> None:
        self._selector.unregister(process.connection)
        process.connection.close()

    def _drain_wakes(self) -> None:
        try:
            while self._woken.recv(4096):
                pass
        except BlockingIOError:
            pass

    # ---- memory ----------------------------------------------------------------------------------------------------

    @property
    def unseen_bytes(self) -> int:
        """What the other processes hold beyond what the engine's own resident set shows; measured once a second."""
        now = time.perf_counter()
        if self._resident and now - self._measured > MEASURE_SECONDS:
            self.measure()
        return self._unseen if self._resident else 0

    def measure(self) -> dict[str, int]:
        """Bytes of all processes: `held` in all, each page counted once; `own` of the workers and the resident one;
        `engine`: what the engine's process shows. Libraries are files that all of them map, and the engine counts them.
        """
        mine = _memory(os.getpid())
        others = {pid: _memory(pid) for pid in self.pids}
        shares = sum(one["Pss_Anon"] + one["Pss_Shmem"] for one in (mine, *others.values()))
        self._unseen = max(shares - mine["Anonymous"] - mine["RssShmem"], 0)
        self._measured = time.perf_counter()
        private = [others[process.pid]["Private"] for process in self._process.values()]
        self.reserve_bytes = sum(private) if self.fresh and not self._next else 0
        if self._ledger is not None:
            self._ledger.put(OWNER, "ram", self._unseen)
        held = mine["Rss"] + self._unseen
        return {"held": held, "own": sum(one["Private"] for one in others.values()), "engine": mine["Rss"]}


def _memory(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind; zeros where it is gone. Pss: a page that n processes map is 1 / n."""
    names = ("Rss", "Anonymous", "Pss_Anon", "Pss_Shmem", "RssShmem")
    found = dict.fromkeys((*names, "Private"), 0)
    try:
        text = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status"))
    except OSError:
        return found
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[name] = int(rest.split()[0]) * KIB
        elif name in ("Private_Clean", "Private_Dirty"):
            found["Private"] += int(rest.split()[0]) * KIB
    return found
