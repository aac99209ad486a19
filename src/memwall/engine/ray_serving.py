"""A server whose two workers are Ray actors: it keeps the books and holds neither weights nor keys and values.

Memory is that of the actors, each within a budget of its own that it was started with; here only the process itself is
on the ledger, and what the actors held when they were ready, on the tier `remote`.
"""

from __future__ import annotations

import time
from pathlib import Path

from memwall.engine.apart import ApartEngine
from memwall.engine.base import PHASES, Phase
from memwall.engine.distserve import DistServe
from memwall.engine.kv_pages import POOL_OWNER, KVPages
from memwall.engine.phase_loading import PREFILL_OWNER
from memwall.engine.ray_workers import LOCAL, RayWorkers
from memwall.engine.serving import Serving, ServingSettings
from memwall.engine.side import SideSettings
from memwall.errors import InputError
from memwall.hardware import usable_processors
from memwall.memory import Budget, Ledger, PagePool, measure_runtime, resident_bytes
from memwall.models.config import ModelConfig
from memwall.models.tokenizer import Tokenizer

MOST_OPEN_CONTEXT = 4096
"""Where the context is left open: more is a matter of saying so."""


class RemoteServing(Serving):
    """See `Serving`; nothing of the model is in this process."""

    def __init__(
        self,
        settings: ServingSettings,
        config: ModelConfig,
        engine: ApartEngine,
        workers: RayWorkers,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.settings, self.config, self.engine, self.tokenizer = settings, config, engine, tokenizer
        self.ledger = Ledger()
        self.pool = engine.pages.pool
        self.budget_bytes = self.most_budget_bytes = None
        self.stack = None
        self.workers = workers
        self.close_books()

    @property
    def prefill_pool(self) -> PagePool | None:
        """See `Serving`."""
        return self.engine.pages_of("prefill").pool if isinstance(self.engine, ApartEngine) else None

    def govern(self) -> None:
        """Memory does not move: the actors hold all of theirs."""

    def settle(self) -> None:
        """The same."""

    def least_budget_bytes(self) -> int:
        """Of this process."""
        return resident_bytes()

    def set_budget(self, nbytes: int) -> None:
        """InputError: it is not here that memory is held."""
        raise InputError(
            f"a budget of {nbytes:,} bytes: workers in a cluster keep the memory that they were started with; start "
            "again with another --memory"
        )

    def close_books(self) -> None:
        """See `Serving`."""
        assert isinstance(self.workers, RayWorkers)
        for phase, told in self.workers.told.items():
            self.ledger.put(f"worker/{phase}", "remote", told["resident_bytes"])
        measure_runtime(self.ledger)

    def release(self) -> None:
        """Ends the actors."""
        assert isinstance(self.workers, RayWorkers)
        self.workers.release()
        self.engine.switch.release()


def load_on_ray(
    model: Path,
    settings: ServingSettings,
    address: str,
    *,
    budget: Budget | None = None,
    tokenizer: Tokenizer | None = None,
) -> RemoteServing:
    """Starts both actors. model: a directory that all machines see. budget: its `ram` is what each actor may hold;
    `settings.threads`: those of each, by default half of this machine's where the cluster is here.
    """
    config = ModelConfig.from_directory(model)
    context = settings.context_tokens or min(config.max_position, MOST_OPEN_CONTEXT)
    if context > config.max_position:
        raise InputError(f"a context of {context:,} tokens, but the model knows {config.max_position:,} positions")
    threads = settings.threads or (max(usable_processors() // 2, 1) if address == LOCAL else None)
    side = SideSettings(
        model=str(model.resolve()), weights=settings.weights, context_tokens=context, kv=settings.kv,
        max_sequences=settings.max_sequences, token_budget=settings.token_budget, page_tokens=settings.page_tokens,
        threads=threads, exact=settings.exact, memory_bytes=None if budget is None else budget.ram,
    )  # fmt: skip
    workers = RayWorkers(dict.fromkeys(PHASES, side), address)
    owners: dict[Phase, str] = {"prefill": PREFILL_OWNER, "decode": POOL_OWNER}
    # counted here, held there
    pools = {
        phase: PagePool(owners[phase], page_bytes=told["page_bytes"], most_pages=told["pages"])
        for phase, told in workers.told.items()
    }
    engine = ApartEngine(
        DistServe(), workers, KVPages(pools["decode"], settings.page_tokens, keep_prefixes=False),
        limits=settings.limits, context_tokens=context, eos=tuple(config.eos_token_ids), clock=time.perf_counter,
        front_pages=KVPages(pools["prefill"], settings.page_tokens, keep_prefixes=settings.keep_prefixes),
        front_limits=settings.limits,
    )  # fmt: skip
    return RemoteServing(settings, config, engine, workers, tokenizer)
