"""A model that serves many requests inside one budget: loading it, and keeping the budget while it runs.

What the process holds outside the arena (interpreter, connections, texts) moves while it serves. `govern` reads the
resident set before a step and moves the pool's limit, so that the whole process stays below the budget: kept prefixes
go first, then requests are set aside; when there is room again the pool grows back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall import _native
from memwall.engine.adapters import Adapters, check_room
from memwall.engine.base import Limits, Scheduler
from memwall.engine.batch import PAGED, ModelExecutor
from memwall.engine.core import Engine
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.kv_pages import KVPages
from memwall.engine.loading import LoadedDecoder, Settings, cache_shape, load_decoder
from memwall.engine.page_forms import check_page_tokens, page_tokens_of
from memwall.engine.priorities import Priorities
from memwall.engine.s_lora import SLora
from memwall.engine.sampling import Sampler
from memwall.engine.serving_parts import (
    check_unpaged,
    has_own,
    make_adapters,
    make_cache,
    make_pages,
    make_pool,
    make_switcher,
    settled,
    told_forms,
)
from memwall.engine.session import SAMPLING
from memwall.engine.switching import SwitchSettings
from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import MIB, format_bytes
from memwall.kv import CacheModel
from memwall.memory import Arena, Budget, Ledger, PagePool, measure_runtime, resident_bytes
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.dora import row_changes
from memwall.models.lora import LoraWeights
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import Progress

if TYPE_CHECKING:  # what one server in ten needs costs every other one no memory
    from memwall.engine.phase_loading import PhaseSettings
    from memwall.engine.ray_workers import RayWorkers
    from memwall.engine.workers import ForkedWorkers

log = logging.getLogger("memwall.engine")
MOST_LOGIT_ROWS = 16
MOST_KEPT_CONTEXTS = 4
"""Requests of the whole context whose pages a growing stack of blocks leaves room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """How adapters are served. most_rank: largest that may come. room_bytes: kept for them where the context is chosen
    by what fits. exact: float32 adapters stay float32.

    link_bytes_per_s: emulates a slower way from where adapters are kept.
    """

    most_rank: int = 64
    room_bytes: int = 0
    exact: bool = False
    link_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.most_rank <= 512:
            raise InputError(f"most_rank is {self.most_rank}; it must be 1 to 512")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """How a model serves.

    weights: as for a session. kv: how pages hold keys and values, one of `batch.PAGED`, or `vattention` with its
    settings for slots instead of pages (see `slots`). context_tokens: longest request, prompt and answer; None for the
    model's positions. page_tokens: 0 for what suits `kv`. token_budget: tokens computed in one step. swap_bytes: disk
    for requests set aside. headroom_bytes: kept free for what the process comes to hold outside the arena. exact: float
    arithmetic on packed weights. lora: None where requests have no adapters. shared_prefixes: room for requests that go
    on from prefixes (see `shared`). phases: None where one worker computes prompts and tokens together. ahead: the next
    batch is formed while one is computed.
    """

    weights: str = "float16"
    kv: str = "float16"
    context_tokens: int | None = None
    max_sequences: int = 16
    token_budget: int = 256
    page_tokens: int = 0
    swap_bytes: int = 256 * MIB
    swap_folder: Path | None = None
    switch: SwitchSettings = field(default_factory=SwitchSettings)
    headroom_bytes: int = 8 * MIB
    threads: int | None = None
    exact: bool = False
    keep_prefixes: bool = True
    lora: LoraSettings | None = None
    shared_prefixes: bool = False
    phases: PhaseSettings | None = None
    ahead: bool = False

    @property
    def limits(self) -> Limits:
        """What one step may do."""
        return Limits(token_budget=self.token_budget, max_sequences=self.max_sequences, page_tokens=self.page_tokens)

    def __post_init__(self) -> None:
        for name in ("max_sequences", "token_budget", "headroom_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.token_budget < self.max_sequences:
            raise InputError(
                f"a step of {self.token_budget} tokens cannot give one to each of {self.max_sequences} sequences; "
                f"raise it to {self.max_sequences} or more"
            )
        if self.ahead and (self.phases is not None or self.lora is not None):
            raise InputError("batches are formed ahead for one worker without adapters; choose the scheduler fcfs")
        if self.kv not in PAGED:
            check_unpaged(self)
            return
        if not self.page_tokens:
            object.__setattr__(self, "page_tokens", page_tokens_of(self.kv))
        check_page_tokens(self.kv, self.page_tokens)


class Serving:
    """An engine with its model, and the budget it lives in."""

    def __init__(
        self,
        settings: ServingSettings,
        loaded: LoadedDecoder,
        engine: Engine,
        pool: PagePool,
        budget: Budget | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.settings = settings
        self.config: ModelConfig = loaded.config
        self.arena: Arena = loaded.arena
        self.ledger: Ledger = loaded.ledger
        self.engine = engine
        self.pool = pool
        self.tokenizer = tokenizer
        self.budget_bytes = budget.ram if budget is not None else None
        self.most_budget_bytes: int | None = None
        self._loaded = loaded
        self._outside = loaded.runtime_bytes
        self._most_adapter_pages = 0
        self._tight = False
        self.stack = loaded.decoder.weights.stack
        self._wanted_blocks = self.stack.num_blocks if self.stack is not None else 0
        self.workers: ForkedWorkers | RayWorkers | None = None

    @property
    def context_tokens(self) -> int:
        """Longest request, prompt and answer."""
        return self.engine.context_tokens

    @property
    def prefill_pool(self) -> PagePool | None:
        """Where prompts have a memory of their own."""
        forked = self._forked
        own = self.pool if forked is None else forked.pools["prefill"]
        return None if own is self.pool else own

    @property
    def adapters(self) -> Adapters | None:
        """Where requests may have adapters."""
        return self.engine.adapters

    def read_adapter(self, directory: Path) -> LoraWeights:
        """Reads the headers of an adapter for this model; any thread may. InputError for one that cannot be served."""
        if self.settings.lora is None:
            raise InputError("this server was started without adapters; give --lora or --lora-dir")
        weights = LoraWeights.read(directory, self.config)
        if weights.rank > self.settings.lora.most_rank:
            raise InputError(
                f"{directory}: rank {weights.rank}, but at most {self.settings.lora.most_rank} was allowed for; "
                f"start with --max-lora-rank {weights.rank}"
            )
        return weights

    def add_adapter(self, name: str, weights: LoraWeights) -> str:
        """Makes an adapter known; the key that requests give. Call it between two steps.

        DoesNotFit where it leaves no room for one request of the whole context.
        """
        adapters = self.engine.adapters
        assert adapters is not None
        key = adapters.add(name, weights, row_changes(weights, self._loaded.decoder.weights, self.config))
        known = adapters.describe(name)
        assert known is not None
        if self.budget_bytes is None:
            self._most_adapter_pages = max(self._most_adapter_pages, known.num_pages)
            self.govern()
        try:
            for room in (self.engine.wanted_pages, *([] if (own := self.prefill_pool) is None else [own.limit_pages])):
                check_room(known, room, self.engine.limits.pages(self.context_tokens))
        except BaseException:
            adapters.remove(name)
            raise
        self._most_adapter_pages = max(self._most_adapter_pages, known.num_pages)
        return key

    def govern(self) -> None:
        """Moves the pool's limit to what the budget leaves now. Call it before a step."""
        pool = self.pool
        if self.budget_bytes is None:
            self.engine.wanted_pages = min(pool.most_pages, self._unlimited_pages())
            return
        self._grow_stack()
        # where workers change, there is room for two more of them before they are made
        outside = self._outside_bytes() + self._reserve_bytes()
        fixed = outside + self.arena.used_bytes - pool.committed_bytes + self._missing_bytes()
        roomy, forked = (self.budget_bytes - fixed - self.settings.headroom_bytes) // pool.page_bytes, self._forked
        if forked is not None and forked.reserve_bytes and roomy < self._least_pages():
            roomy += forked.reserve_bytes // pool.page_bytes  # requests need it more
            fixed -= forked.reserve_bytes
            forked.make_do(roomy=False)
        tight = (self.budget_bytes - fixed - self.settings.headroom_bytes // 2) // pool.page_bytes
        wanted = self.engine.wanted_pages
        # between the two nothing moves: the heap breathes
        wanted = max(min(max(wanted, roomy), tight), 0)
        self.engine.wanted_pages = min(wanted, pool.most_pages)
        if self.stack is not None and self.engine.wanted_pages < self._least_pages():
            self._fit_stack()  # the process grew elsewhere: blocks make room for requests
        self._tell_if_tight()
        cap = self.arena.used_bytes - pool.committed_bytes + self.engine.wanted_pages * pool.page_bytes
        self.arena.set_cap(max(cap, self.arena.used_bytes, 1))

    def _tell_if_tight(self) -> None:
        """Says once that the process has grown into the last request's pages: longer ones wait for a larger budget."""
        tight = self.engine.wanted_pages < self._least_pages()
        if tight and not self._tight:
            least = self.least_budget_bytes()
            log.warning("the budget has no room for a request of the whole context now; %d bytes would have", least)
        self._tight = tight

    def _outside_bytes(self) -> int:
        return max(resident_bytes() - self.arena.used_bytes, self._loaded.runtime_bytes)

    def _missing_bytes(self) -> int:
        """What the stack is to take beside what it holds."""
        return 0 if self.stack is None else max(self.stack.nbytes_of(self._wanted_blocks) - self.stack.nbytes, 0)

    def _fit_stack(self) -> None:
        """Gives a model of blocks what the budget leaves beside the pages of a few requests; it shrinks at once."""
        if self.stack is None or self.budget_bytes is None:
            return
        held = self.arena.used_bytes - self.pool.committed_bytes - self.stack.nbytes
        room = self.budget_bytes - self._outside_bytes() - held - self.settings.headroom_bytes
        kept = min(MOST_KEPT_CONTEXTS * self._least_pages(), self.pool.most_pages) * self.pool.page_bytes
        # where all of that does not fit, blocks and requests get half each, but one request always has its pages
        kept = max(min(kept, room // 2), self._least_pages() * self.pool.page_bytes)
        self._wanted_blocks = self.stack.longest(room - kept)
        if self._wanted_blocks < self.stack.num_blocks:
            self.stack.resize(self._wanted_blocks)

    def _grow_stack(self) -> None:
        """Reads the blocks that are wanted and that there is room for by now: requests may have to give way first."""
        if self.stack is None or self.budget_bytes is None or not self._missing_bytes():
            return
        room = self.budget_bytes - self._outside_bytes() - self.arena.used_bytes - self.settings.headroom_bytes // 2
        blocks = min(self.stack.longest(self.stack.nbytes + room), self._wanted_blocks)
        if room > 0 and blocks > self.stack.num_blocks:
            self.arena.set_cap(max(self.arena.cap_bytes, self.arena.used_bytes + self._missing_bytes()))
            self.stack.resize(blocks)

    def _least_pages(self) -> int:
        return self.engine.limits.pages(self.context_tokens) + self._most_adapter_pages

    def least_budget_bytes(self) -> int:
        """The smallest budget in which one request of the whole context can run, with the largest adapter."""
        pages = self._least_pages()
        blocks = self.stack.nbytes if self.stack is not None else 0
        held = max(resident_bytes() - self.pool.committed_bytes - blocks, 0) + self._reserve_bytes()
        return held + pages * self.pool.page_bytes + self.settings.headroom_bytes

    def set_budget(self, nbytes: int) -> None:
        """A new budget for the whole process, from the next step on. DoesNotFit when it is too small to go on."""
        least = self.least_budget_bytes()
        if nbytes < least:
            raise DoesNotFit(
                f"a budget of {format_bytes(nbytes)} does not hold the weights and one request of "
                f"{self.context_tokens:,} tokens; the smallest that does is {least:,} bytes ({format_bytes(least)})"
            )
        if self._forked is not None and nbytes > (self.budget_bytes or 0):
            self._forked.make_do(roomy=True)
        self.budget_bytes = nbytes
        self._fit_stack()

    def settle(self) -> None:
        """Moves to a new budget while nothing runs; memory that the heap keeps is given back first."""
        _native.give_back_freed_memory()
        self.engine.switch.poll()  # pages of turns that ended are free once they are copied
        self.govern()
        if not self.engine.busy:
            self.engine.fit_limit()

    def take_decoder(self, decoder: Decoder) -> None:
        """Another decoder over the same weights computes from now on."""
        assert isinstance(self.engine.executor, ModelExecutor)
        self._loaded.decoder.release()
        self._loaded = replace(self._loaded, decoder=decoder)
        self.engine.executor.decoder = decoder

    def close_books(self) -> None:
        """Measures the runtime row of the ledger anew."""
        measure_runtime(self.ledger)

    def release(self) -> None:
        """Gives all memory back."""
        if self.workers is not None:
            self.workers.release()
        if self.settings.ahead:
            self.engine.release()  # type: ignore[attr-defined]
        self.engine.switch.release()
        if self.engine.adapters is not None:
            for each in (*self.engine.adapters.mirrors, self.engine.adapters):
                each.stop()
        for pool in (self.pool, self.prefill_pool):
            if pool is not None:
                pool.release()
        self._loaded.decoder.release()
        self._loaded.weights.release()

    def _unlimited_pages(self) -> int:
        wanted = self.settings.max_sequences * self._least_pages()
        return min(wanted, max(self.arena.cap_bytes - self.arena.used_bytes, 0) // self.pool.page_bytes + self._held())

    def _reserve_bytes(self) -> int:
        return 0 if self._forked is None else self._forked.reserve_bytes

    @property
    def _forked(self) -> ForkedWorkers | None:
        """The workers, where they are forks of this process."""
        if self.workers is None:
            return None  # nothing of them is brought in
        from memwall.engine.workers import ForkedWorkers

        return self.workers if isinstance(self.workers, ForkedWorkers) else None

    def _held(self) -> int:
        return self.pool.committed_bytes // self.pool.page_bytes


def load_engine(
    model: Path,
    settings: ServingSettings,
    *,
    budget: Budget | None = None,
    tokenizer: Tokenizer | None = None,
    scheduler: Scheduler | None = None,
    priorities: Priorities | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] | None = None,
) -> Serving:
    """Loads a model for many requests. Call it once everything else that the process needs is imported.

    BudgetExceeded when weights and one request of the whole context do not fit.
    """
    rows = min(settings.max_sequences, MOST_LOGIT_ROWS)
    loaded = load_decoder(
        model,
        Settings(
            weights=settings.weights,
            segment_tokens=settings.token_budget,
            logit_rows=rows,
            threads=settings.threads,
            exact=settings.exact,
        ),
        budget=budget,
        progress=progress,
        sequences=settings.max_sequences,
        shared=settings.shared_prefixes,
        headroom_bytes=settings.headroom_bytes,
    )
    config, arena, settings = loaded.config, loaded.arena, settled(settings, loaded.config)
    scratch = arena.allocate(SAMPLING, Sampler.scratch_shape(config.vocab_size), np.float32)
    behind = CacheModel(config=config, weights=loaded.weights, directory=model)
    pool, context = make_pool(settings, behind, arena, limited=budget is not None)
    pages = make_pages(settings, pool)
    shape, adapters, lora = cache_shape(config), None, None
    if settings.lora is not None:
        adapters, lora = make_adapters(settings, settings.lora, pages, arena, shape)
        scheduler = scheduler or (SLora() if settings.phases is None else None)
    own: dict[str, Any] = {"logit_rows": rows, "scratch": scratch, "adapters": adapters, "lora": lora}
    executor = ModelExecutor(loaded.decoder, make_cache(settings, shape, pool), **own)
    common: dict[str, Any] = {
        "limits": settings.limits,
        "context_tokens": context,
        "eos": tuple(config.eos_token_ids),
        "switch": make_switcher(settings, pages, arena),
        "adapters": adapters,
        "priorities": priorities,
        "clock": clock or time.perf_counter,
    }
    if settings.phases is None:
        engine = _kind_of(settings)(scheduler or FirstComeFirstServed(), executor, pages, **common)
        serving = Serving(settings, loaded, engine, pool, budget, tokenizer)
        serving.govern()
        return serving
    phases: dict[str, Any] = {"executor": executor, "scheduler": scheduler, "pages": pages, "common": common}
    return _load_phases(settings, settings.phases, loaded, budget, tokenizer, **phases)


def _load_phases(
    settings: ServingSettings,
    phases: PhaseSettings,
    loaded: LoadedDecoder,
    budget: Budget | None,
    tokenizer: Tokenizer | None,
    *,
    executor: ModelExecutor,
    scheduler: Scheduler | None,
    pages: KVPages,
    common: dict[str, Any],
) -> Serving:
    """The engine of two workers."""
    from memwall.engine.phase_loading import begin_phases, make_workers, phased_engine

    pool = pages.pool
    forms = None if tokenizer is None else told_forms(tokenizer, loaded.config)
    workers = make_workers(settings, phases, executor, pool, loaded.arena, limited=budget is not None, forms=forms)
    try:
        engine = phased_engine(settings, phases, scheduler, workers, pages, loaded.arena, common)
        serving = Serving(settings, loaded, engine, pool, budget, tokenizer)
        serving.workers = workers
        begin_phases(serving, workers)
    except BaseException:
        workers.release()
        raise
    return serving


def _kind_of(settings: ServingSettings) -> type[Engine]:
    if has_own(settings.kv):
        from memwall.engine.own_caches import OwnCachesEngine

        return OwnCachesEngine
    if not settings.ahead:
        return Engine
    from memwall.engine.ahead import AheadEngine

    return AheadEngine
