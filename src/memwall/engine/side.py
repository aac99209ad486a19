"""One phase on a machine of its own: a model, a memory for keys and values, and batches that are computed in it.

It is what an actor of a cluster holds (`ray_workers`), and knows nothing of the cluster: jobs and answers are the same
messages as a forked worker's (`phase_process`), pages go in and out as bytes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memwall.engine.base import Limits
from memwall.engine.batch import BatchCache, ModelExecutor, page_bytes
from memwall.engine.guide import TokenTable
from memwall.engine.loading import Settings, cache_shape, load_decoder
from memwall.engine.phase_process import DrawingExecutor, answer_message
from memwall.engine.sampling import Sampler
from memwall.engine.told_forms import ToldForms
from memwall.errors import BudgetExceeded
from memwall.memory import Arena, Budget, PagePool, resident_bytes
from memwall.models.config import ModelConfig

MOST_LOGIT_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SideSettings:
    """model: its directory, there. contexts: requests of the whole context that the pages hold where no budget says how
    many. memory_bytes: of the whole process.
    """

    model: str
    weights: str
    context_tokens: int
    kv: str = "float16"
    max_sequences: int = 16
    token_budget: int = 256
    page_tokens: int = 16
    threads: int | None = None
    exact: bool = False
    contexts: int = 4
    memory_bytes: int | None = None

    @property
    def limits(self) -> Limits:
        """What one step may do."""
        return Limits(token_budget=self.token_budget, max_sequences=self.max_sequences, page_tokens=self.page_tokens)


class Side:
    """Loads the model; BudgetExceeded where weights and one request of the whole context do not fit."""

    def __init__(self, settings: SideSettings) -> None:
        budget = None if settings.memory_bytes is None else Budget(tiers={"ram": settings.memory_bytes})
        rows = min(settings.max_sequences, MOST_LOGIT_ROWS)
        loaded = load_decoder(
            Path(settings.model),
            Settings(
                weights=settings.weights, segment_tokens=settings.token_budget, logit_rows=rows,
                threads=settings.threads, exact=settings.exact,
            ),
            budget=budget,
            sequences=settings.max_sequences,
        )  # fmt: skip
        shape, arena = cache_shape(loaded.config), loaded.arena
        scratch = arena.allocate("sampling", Sampler.scratch_shape(loaded.config.vocab_size), np.float32)
        self.pool = _pool(settings, page_bytes(shape, settings.page_tokens, settings.kv), arena)
        made = ModelExecutor(
            loaded.decoder,
            BatchCache(shape, self.pool, settings.page_tokens, settings.kv),
            logit_rows=rows,
            scratch=scratch,
        )
        self.executor = DrawingExecutor(made, made.cache, ToldForms(partial(_table, settings.model, loaded.config)))

    def describe(self) -> dict[str, Any]:
        """Where it is and what it holds."""
        return {
            "node": platform.node(), "pid": os.getpid(), "pages": self.pool.limit_pages,
            "page_bytes": self.pool.page_bytes, "resident_bytes": resident_bytes(),
        }  # fmt: skip

    def read(self, runs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Bytes of runs (first page, pages), one after the other. Any thread may: they are done and do not change."""
        return np.concatenate([self.pool.run(first, count) for first, count in runs])

    def run(self, job: dict[str, Any], pulled: np.ndarray | None = None) -> dict[str, Any]:
        """Computes a batch, once the pages in `pulled` are in their places."""
        began, used, at = time.perf_counter(), time.process_time(), 0
        for _, target, count in job["pulls"]:
            assert pulled is not None
            place = self.pool.run(target, count)
            place[...] = pulled[at : at + place.nbytes]
            at += place.nbytes
        moved = (at, time.perf_counter() - began)
        outputs = self.executor.run_told(job["entries"])
        return answer_message(outputs, began, used, moved)


def _table(model: str, config: ModelConfig) -> TokenTable:
    """The tokens' bytes, for answers in a form."""
    from memwall.models.tokenizer import Tokenizer  # whoever asks for none needs none

    return TokenTable(Tokenizer.from_directory(model), config.vocab_size, config.eos_token_ids)


def _pool(settings: SideSettings, size: int, arena: Arena) -> PagePool:
    """All pages there will be, resident from the start."""
    least = settings.limits.pages(settings.context_tokens)
    count = settings.contexts * least if settings.memory_bytes is None else arena.free_bytes // size
    if count < least or count * size > arena.free_bytes:
        raise BudgetExceeded("kv/pages", least * size, arena.free_bytes, arena.cap_bytes)
    pool = PagePool("kv/pages", page_bytes=size, most_pages=count, arena=arena)
    pool.drop(pool.take("kv", count))
    return pool
