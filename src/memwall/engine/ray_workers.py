"""DistServe's two workers as Ray actors, on any machines of a cluster: each has weights and a memory of its own.

The engine's process keeps the books of both memories without having either. A finished prompt's pages go from actor to
actor through Ray's object store (shared memory within a node, the network between nodes): the decode side's job names
them and Ray fetches them to it. An actor that is lost takes its memory along; it is made anew, what was there is
computed again, and the random numbers of tokens are drawn here, so that answers do not change.

Ray serializes what is sent between the cluster's processes: use a cluster that you trust.
"""

from __future__ import annotations

import logging
import queue
import socket
import time
from collections.abc import Mapping
from collections.abc import Sequence as Batch
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from typing import Any

from memwall.engine.base import PHASES, Phase, Shares
from memwall.engine.executor import Entry, Output
from memwall.engine.hand_over import Pull
from memwall.engine.phased import Done
from memwall.engine.sequence import Sequence
from memwall.engine.side import Side, SideSettings
from memwall.engine.workers import MOST_LOSSES, WAIT_SECONDS, Draws
from memwall.errors import DoesNotFit, InputError, MemwallError, MissingDependency

LOCAL = "local"
READY_SECONDS = 600.0
ALIVE_SECONDS = 10.0
CONNECT_SECONDS = 5.0
WHOLE = Shares(prefill=100, decode=100)
log = logging.getLogger("memwall.engine")


@dataclass(slots=True, eq=False)
class Job:
    """A batch under way."""

    phase: Phase
    batch: list[Entry]
    began: float
    answer: Future[Any]


class Actor:
    """A side in its process. What it refuses is told, since an actor that fails to begin tells little."""

    def __init__(self, settings: SideSettings) -> None:
        self.refused = ""
        try:
            self.side = Side(settings)
        except MemwallError as error:
            self.refused = str(error)

    def describe(self) -> dict[str, Any]:
        """See `Side`; or `refused`, and why."""
        return {"refused": self.refused} if self.refused else self.side.describe()

    def read(self, runs: Batch[tuple[int, int]]) -> Any:
        """See `Side`."""
        return self.side.read(runs)

    def run(self, job: dict[str, Any], pulled: Any = None) -> dict[str, Any]:
        """See `Side`."""
        return self.side.run(job, pulled)


class RayWorkers:
    """See `Workers`. address: of a cluster, or `local` for one that is started on this machine and ends with us."""

    def __init__(self, sides: Mapping[Phase, SideSettings], address: str = LOCAL) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingDependency("ray", "ray") from error
        self._ray = ray
        self._sides = dict(sides)
        self._own = _connect(ray, address, sides)
        self.shares, self.preparing = WHOLE, None
        self.lost = 0
        self.draws = Draws()
        self._jobs: dict[Phase, Job] = {}
        self._losses: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._over: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._actors: dict[Phase, Any] = {}
        self.told: dict[Phase, dict[str, Any]] = {}
        """What each actor says of itself: where it is, its pages, its resident bytes when it was ready."""
        try:
            self._check_cores()
            for phase in PHASES:
                self._actors[phase] = self._make(phase)
            for phase in PHASES:
                self._await(phase)
        except BaseException:
            self.release()
            raise

    # ---- batches ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """See `Workers`."""
        return bool(self._jobs)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the actors, on their machines."""
        return tuple(told["pid"] for told in self.told.values())

    def switch(self, shares: Shares) -> None:
        """Each has a machine, or cores, to itself."""

    def start(self, phase: Phase, batch: list[Entry], pulls: Batch[Pull] = ()) -> None:
        """See `Workers`."""
        entries = [self.draws.message(entry) for entry in batch]
        job = {"entries": entries, "pulls": [astuple(pull) for pull in pulls]}
        pages = None
        if pulls:
            pages = self._actors["prefill"].read.remote([(pull.source, pull.count) for pull in pulls])
        answer = self._actors[phase].run.remote(job, pages).future()
        made = self._jobs[phase] = Job(phase, batch, time.perf_counter(), answer)
        answer.add_done_callback(lambda _: self._over.put(made))

    def collect(self, until: float | None = None, *, wait: bool = True) -> list[Done]:
        """See `Workers`."""
        end = time.perf_counter() + WAIT_SECONDS if until is None else until
        while True:
            left = max(end - time.perf_counter(), 0.0) if wait and self._jobs else 0.0
            try:
                job = self._over.get(timeout=left) if left else self._over.get_nowait()
            except queue.Empty:
                return []
            if job is None:
                return []
            if self._jobs.get(job.phase) is job:  # else it was given up with its actor
                return self._taken(job)

    def wake(self) -> None:
        """See `Workers`."""
        self._over.put(None)

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """See `Executor`: one batch by itself, in the prefill worker."""
        while True:
            self.start("prefill", batch)
            done: list[Done] = []
            while not done:
                done = self.collect()
            if done[0].outputs is not None:
                return done[0].outputs

    def forget(self, sequence: Sequence) -> None:
        """See `Executor`."""
        self.draws.forget(sequence)

    def _taken(self, job: Job) -> list[Done]:
        del self._jobs[job.phase]
        seconds = time.perf_counter() - job.began
        error = job.answer.exception()
        if error is not None:
            return self._failed(job, error, seconds)
        self._losses[job.phase] = 0
        return [self.draws.done(job.phase, job.batch, job.answer.result(), seconds)]

    def _failed(self, job: Job, error: BaseException, seconds: float) -> list[Done]:
        """A batch could not be computed: for a fault there, or since an actor is lost, perhaps the other one."""
        phase = job.phase
        self._losses[phase] += 1
        why = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        if self._losses[phase] >= MOST_LOSSES:
            self._losses[phase] = 0
            raise MemwallError(f"the {phase} actor failed {MOST_LOSSES} times in a row: {why[0]}")
        log.warning("the %s actor failed and tries again: %s", phase, why[0])
        gone = [each for each in PHASES if not self._alive(each)]
        done = [Done(phase, job.batch, None, seconds, emptied=phase in gone)]
        for each in gone:
            if each != phase:
                other = self._jobs.pop(each, None)
                done.append(Done(each, [] if other is None else other.batch, None, seconds, emptied=True))
            self.lost += 1
            log.warning("the %s actor was lost with its memory and is made anew", each)
            self._actors[each] = self._make(each)
        for each in gone:
            self._await(each)
        # pulls are undone before the memory that they came from is
        return sorted(done, key=lambda one: one.phase != "decode")

    # ---- actors ----------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Ends the actors, and the cluster where it was started here."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors = {}
        if self._own:
            self._ray.shutdown()
            self._own = False

    def _check_cores(self) -> None:
        """InputError where the cluster's free cores do not hold both: Ray would wait for others to end."""
        wanted = sum(side.threads or 1 for side in self._sides.values())
        free = self._ray.available_resources().get("CPU", 0)
        if free < wanted:
            raise InputError(
                f"the cluster has {free:g} cores free, but the workers take {wanted}: fewer --threads, or end others"
            )

    def _make(self, phase: Phase) -> Any:
        settings = self._sides[phase]
        actor = self._ray.remote(Actor)
        # two calls at a time: pages are read while the next batch is computed. No restarts: the memory would be empty
        options = {"num_cpus": settings.threads or 1, "max_concurrency": 2, "max_restarts": 0}
        return actor.options(**options).remote(settings)

    def _await(self, phase: Phase) -> None:
        try:
            told = self._ray.get(self._actors[phase].describe.remote(), timeout=READY_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise MemwallError(f"the {phase} actor could not be made: {error}") from error
        if "refused" in told:
            raise DoesNotFit(
                f"the {phase} actor: {told['refused']}. Its interpreter alone takes some 120 MB: try more --memory"
            )
        self.told[phase] = told

    def _alive(self, phase: Phase) -> bool:
        try:
            self._ray.get(self._actors[phase].describe.remote(), timeout=ALIVE_SECONDS)
        except self._ray.exceptions.RayActorError:
            return False
        except self._ray.exceptions.GetTimeoutError:  # it is slow, or its machine is gone
            self._ray.kill(self._actors[phase])
            return False
        return True


def _connect(ray: Any, address: str, sides: Mapping[Phase, SideSettings]) -> bool:
    """Whether a cluster was started here."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address == LOCAL:
        cores = sum(side.threads or 1 for side in sides.values())
        ray.init(num_cpus=cores, include_dashboard=False, **quiet)
        return True
    check_address(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, or say {LOCAL}"
        ) from error
    return True


def check_address(address: str) -> None:
    """InputError where nobody listens at a host and port: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, or say {LOCAL}"
        ) from error
