"""What an engine is made of beside its model: the pool of pages, the swap area, adapters, forms for workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.adapters import Adapters
from memwall.engine.batch import lora_room, page_bytes
from memwall.engine.kv_pages import POOL_OWNER, KVPages
from memwall.engine.loading import cache_shape
from memwall.engine.swap import SwapArea
from memwall.engine.switching import Switcher
from memwall.errors import BudgetExceeded, InputError
from memwall.hardware import available_memory_bytes
from memwall.kernels.lora import MOST_TOGETHER, LoraBatch
from memwall.kv import CacheShape
from memwall.memory import Arena, PagePool
from memwall.models.config import ModelConfig
from memwall.models.decoder import BLOCK_ROWS
from memwall.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from memwall.engine.serving import LoraSettings, ServingSettings
    from memwall.engine.told_forms import ToldForms

LORA_SCRATCH = "adapters/scratch"
LEAST_CONTEXT_TOKENS = 256
"""Where the context is left open and less than this fits, loading is refused."""
MOST_PLACES = 1 << 31
"""Page tables are of 32-bit numbers."""


def make_pool(settings: ServingSettings, config: ModelConfig, arena: Arena, *, limited: bool) -> tuple[PagePool, int]:
    """The pool, with a limit of one request of the whole context, and that context."""
    size, pages = page_bytes(cache_shape(config), settings.page_tokens, settings.kv), settings.limits.pages
    context = settings.context_tokens or config.max_position
    if context > config.max_position:
        raise InputError(f"a context of {context:,} tokens, but the model knows {config.max_position:,} positions")
    least, sides = pages(context), settings.phases.memories if settings.phases is not None else 1
    if settings.context_tokens is None:
        room_bytes = settings.lora.room_bytes if settings.lora is not None else 0
        fitting = max(arena.free_bytes - room_bytes, 0) // (size * sides)
        least = min(least, max(fitting, pages(min(context, LEAST_CONTEXT_TOKENS))))
        context = min(context, least * settings.page_tokens)
    if arena.free_bytes < least * size * sides:
        raise BudgetExceeded(POOL_OWNER, least * size * sides, arena.free_bytes, arena.cap_bytes)
    # address space for what the budget may become, not memory
    room = max(available_memory_bytes(), arena.cap_bytes if limited else 0)
    most = min(max(room // size, 1), MOST_PLACES // (2 * config.num_layers) - 1)
    pool = PagePool(
        POOL_OWNER,
        page_bytes=size,
        most_pages=max(most, least),
        limit_pages=least,
        arena=arena,
        group_pages=settings.switch.group_pages,
        shared=settings.phases is not None,
    )
    return pool, context


def make_switcher(settings: ServingSettings, pages: KVPages, arena: Arena) -> Switcher:
    """What swaps requests."""
    how, room = settings.switch, settings.swap_bytes // pages.pool.page_bytes
    told: dict[str, Any] = {"arena": arena, "folder": settings.swap_folder, "group_pages": how.group_pages}
    if how.staged:
        from memwall.engine.staged import StagedArea

        area: SwapArea = StagedArea(pages.pool, room, host_bytes=how.host_bytes, **told)
    else:
        area = SwapArea(pages.pool, room, merge=how.merge, **told)
    return Switcher(pages, area, how)


def make_adapters(
    settings: ServingSettings, lora: LoraSettings, pages: KVPages, arena: Arena, shape: CacheShape
) -> tuple[Adapters, LoraBatch]:
    """Adapters over the pages, and the products with them."""
    room = lora_room(shape, settings.page_tokens, settings.kv)
    scratch = arena.allocate(LORA_SCRATCH, _scratch_shape(settings, lora), np.float32)
    adapters = Adapters(
        pages,
        room,
        arena=arena,
        exact=lora.exact,
        link_bytes_per_s=lora.link_bytes_per_s,
        elsewhere=settings.phases is not None,
    )
    return adapters, LoraBatch(room, scratch)


def _scratch_shape(settings: ServingSettings, lora: LoraSettings) -> tuple[int, int]:
    return min(settings.token_budget, BLOCK_ROWS), MOST_TOGETHER * lora.most_rank


def lora_scratch_bytes(settings: ServingSettings) -> int:
    """Bytes that products with adapters work in; for plans."""
    if settings.lora is None:
        return 0
    rows, width = _scratch_shape(settings, settings.lora)
    return rows * width * np.dtype(np.float32).itemsize


def told_forms(tokenizer: Tokenizer, config: ModelConfig) -> ToldForms:
    """Forms of answers for workers that are forked after this."""
    from memwall.engine.guide import TokenTable
    from memwall.engine.told_forms import ToldForms

    forms = ToldForms(lambda: TokenTable(tokenizer, config.vocab_size, config.eos_token_ids))
    forms.prepare()  # in memory that the workers share
    return forms
