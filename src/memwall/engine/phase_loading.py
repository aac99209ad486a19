"""What a server with two workers is made of: their settings, the prefill side's memory, the processes, the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memwall import kernels
from memwall.engine.apart import ApartEngine
from memwall.engine.base import Phase, Scheduler, Shares
from memwall.engine.batch import ModelExecutor
from memwall.engine.distserve import DistServe
from memwall.engine.executor import Entry
from memwall.engine.kv_pages import POOL_OWNER, KVPages
from memwall.engine.mirrored import MirroredAdapters
from memwall.engine.phased import WINDOW_ITERATIONS, PhasedEngine
from memwall.engine.phases import Split
from memwall.engine.sequence import Request, Sequence
from memwall.engine.told_forms import ToldForms
from memwall.engine.workers import ForkedWorkers
from memwall.errors import BudgetExceeded, InputError
from memwall.memory import Arena, PagePool

if TYPE_CHECKING:
    from memwall.engine.serving import Serving, ServingSettings

PREFILL_OWNER = "kv/prefill"


PREFILL_ROOM = 0.25
"""Of the pages, where prompts have a memory of their own and nobody says how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSettings:
    """Prompts and tokens are computed by two processes. shares: theirs at the start; fresh: new shares come with new
    processes. window: iterations after which the scheduler sees what was observed. whole_threads: see `pacing.Pacer`.
    prefill_room: share of the pages that prompts have to themselves, in a memory of their own (`apart`); None where
    both processes use one memory.
    """

    shares: Shares
    fresh: bool = True
    window: int = WINDOW_ITERATIONS
    whole_threads: bool = True
    prefill_room: float | None = None

    def __post_init__(self) -> None:
        if self.prefill_room is not None and not 0 < self.prefill_room < 1:
            raise InputError(f"prefill_room is {self.prefill_room}; it must be above 0 and below 1, such as 0.25")

    @classmethod
    def apart(cls, cores: int, prefill_room: float = PREFILL_ROOM) -> PhaseSettings:
        """Each process has a memory of its own, and half of the cores to itself; a single core is shared."""
        half = max(cores // 2, 1)
        shares = Shares(prefill=100 * half // cores, decode=100 * max(cores - half, 1) // cores)
        return cls(shares=shares, fresh=False, whole_threads=False, prefill_room=prefill_room)

    @property
    def memories(self) -> int:
        """How many there are."""
        return 1 if self.prefill_room is None else 2


def make_workers(
    settings: ServingSettings, phases: PhaseSettings, executor: ModelExecutor, pool: PagePool, arena: Arena,
    *, limited: bool, forms: ToldForms | None = None,
) -> ForkedWorkers:  # fmt: skip
    """The processes, forked here: weights and pages must be there. limited: whether there is a budget. forms: of
    answers, which workers draw.
    """
    own = _make_prefill_pool(settings, phases, pool, arena, limited=limited)
    return ForkedWorkers(
        executor, pool, phases.shares, page_tokens=settings.page_tokens, cores=kernels.num_threads(),
        fresh=phases.fresh, whole_threads=phases.whole_threads, ledger=arena.ledger, prefill_pool=own,
        forms=forms,
    )  # fmt: skip


def _make_prefill_pool(
    settings: ServingSettings, phases: PhaseSettings, pool: PagePool, arena: Arena, *, limited: bool
) -> PagePool | None:
    """The prefill side's memory, where it has one: all of it is held from the start, and it keeps its size."""
    if phases.prefill_room is None:
        return None
    least = pool.limit_pages + (0 if settings.lora is None else -(-settings.lora.room_bytes // pool.page_bytes))
    most = max(arena.free_bytes // pool.page_bytes - pool.limit_pages, least)
    room = arena.free_bytes // pool.page_bytes if limited else settings.max_sequences * least
    count = min(max(round(phases.prefill_room * room), least), most)
    made = PagePool(PREFILL_OWNER, page_bytes=pool.page_bytes, most_pages=count, arena=arena, shared=True)
    made.drop(made.take(POOL_OWNER, count))
    return made


def phased_engine(
    settings: ServingSettings, phases: PhaseSettings, scheduler: Scheduler | None, workers: ForkedWorkers,
    pages: KVPages, arena: Arena, common: dict[str, Any],
) -> PhasedEngine:  # fmt: skip
    """The step loop, over one memory or two."""
    common = {**common, "window": phases.window}
    own = workers.pools["prefill"]
    if own is pages.pool:
        return PhasedEngine(scheduler or Split(), workers, pages, **common)
    rule = scheduler or DistServe()
    if not isinstance(rule, DistServe):
        raise InputError(f"{type(rule).__name__} plans for one memory; leave the scheduler out, or prefill_room")
    pages.keep_prefixes = False  # beginnings are of use where prompts are computed
    kept = KVPages(own, settings.page_tokens, keep_prefixes=settings.keep_prefixes)
    adapters = common.get("adapters")
    workers.adapters["prefill"] = front = None if adapters is None else MirroredAdapters(adapters, kept, arena)
    return ApartEngine(
        rule, workers, pages, front_pages=kept, front_limits=settings.limits, front_adapters=front, **common
    )


def begin_phases(serving: Serving, workers: ForkedWorkers) -> None:
    """A batch in each worker brings what they need into memory, and then it is seen whether all of it fits."""
    engine, limits = serving.engine, serving.engine.limits
    assert isinstance(engine, PhasedEngine)
    largest: dict[Phase, int] = {"decode": limits.max_sequences, "prefill": limits.token_budget}
    for phase, tokens in largest.items():
        count = max(min(tokens, engine.context_tokens - 1), 1)
        one = Sequence(id=-1, request=Request(prompt=(0,) * count), arrival=0.0, eos=())
        pages = engine.pages_of(phase)
        one.pages = pages.take(limits.pages(count))
        workers.run_as(phase, [Entry(one, 0, count, True)])
        pages.release(one.pages)
    workers.measure()
    if serving.budget_bytes is not None and serving.budget_bytes < serving.least_budget_bytes():
        short = serving.least_budget_bytes() - serving.budget_bytes
        raise BudgetExceeded("workers", short, 0, serving.budget_bytes)
    serving.govern()
