"""What an engine is made of beside its model: the pool of pages, the swap area, adapters, forms for workers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.adapters import Adapters
from memwall.engine.batch import PAGED, BatchCache, lora_room, page_bytes
from memwall.engine.kv_pages import POOL_OWNER, KVPages
from memwall.engine.loading import cache_shape
from memwall.engine.swap import SwapArea
from memwall.engine.switching import Switcher
from memwall.errors import BudgetExceeded, InputError
from memwall.hardware import available_memory_bytes
from memwall.kernels.lora import MOST_TOGETHER, LoraBatch
from memwall.kv import CacheModel, CacheShape, parse
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


def in_slots(kv: str) -> bool:
    """Whether keys and values lie in slots of addresses, by a policy that pages do not hold."""
    policy = parse(kv)
    return policy.name == "vattention" and policy.inner is None


def has_own(kv: str) -> bool:
    """Whether each request has a cache of its own."""
    return kv not in PAGED and not in_slots(kv)


def check_unpaged(settings: ServingSettings) -> None:
    """InputError for what slots, or caches of each request, cannot do."""
    # whoever serves pages needs none of it
    if in_slots(settings.kv):
        from memwall.engine.slots import check_slots

        check_slots(settings)
    else:
        from memwall.engine.own_caches import check_own

        check_own(settings)


def settled(settings: ServingSettings, config: ModelConfig) -> ServingSettings:
    """The settings with what follows from the model: how many tokens the pages of slots hold."""
    if has_own(settings.kv) or config.ssm is not None:
        from memwall.engine.own_caches import settled_own

        return settled_own(settings, config)
    if settings.kv in PAGED:
        return settings
    from memwall.engine.slots import SlotLayout

    layout = SlotLayout.of(settings.kv, cache_shape(config))
    if settings.page_tokens not in (0, layout.page_tokens):
        raise InputError(
            f"page_tokens is {settings.page_tokens}; with {settings.kv} this model's pages are of {layout.page_tokens} "
            "tokens: page_kib says how large they are"
        )
    return replace(settings, page_tokens=layout.page_tokens)


def make_cache(settings: ServingSettings, shape: CacheShape, pool: PagePool) -> BatchCache:
    """What the decoder sees of the pool."""
    if settings.kv in PAGED:
        return BatchCache(shape, pool, settings.page_tokens, settings.kv)
    if has_own(settings.kv):
        from memwall.engine.own_caches import OwnPool, decoders_view

        assert isinstance(pool, OwnPool)
        return decoders_view(shape, pool)
    from memwall.engine.slots import SlotCache, SlotPool

    assert isinstance(pool, SlotPool)
    return SlotCache(shape, pool, settings.page_tokens)


def make_pages(settings: ServingSettings, pool: PagePool) -> KVPages:
    """The pool's pages by what they hold."""
    if not has_own(settings.kv):
        return KVPages(pool, settings.page_tokens, keep_prefixes=settings.keep_prefixes)
    from memwall.engine.kept_caches import OwnPages
    from memwall.engine.own_caches import OwnPool

    assert isinstance(pool, OwnPool)
    return OwnPages(pool, settings.page_tokens, keep=settings.keep_prefixes)


def _bytes_of_page(settings: ServingSettings, shape: CacheShape) -> int:
    if settings.kv in PAGED:
        return page_bytes(shape, settings.page_tokens, settings.kv)
    from memwall.engine.slots import SlotLayout

    return SlotLayout.of(settings.kv, shape).block_bytes


def make_pool(settings: ServingSettings, model: CacheModel, arena: Arena, *, limited: bool) -> tuple[PagePool, int]:
    """The pool, with a limit of one request of the whole context, and that context."""
    config = model.config
    shape, pages = cache_shape(config), settings.limits.pages
    if has_own(settings.kv):
        from memwall.engine.own_caches import make_own

        return make_own(settings, shape, model, arena, limited=limited)
    size = _bytes_of_page(settings, shape)
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
    limits: dict[str, int] = {"most_pages": max(most, least), "limit_pages": least}
    if settings.kv not in PAGED:
        from memwall.engine.slots import make_slots

        return make_slots(settings, shape, arena, context=context, **limits), context
    pool = PagePool(
        POOL_OWNER,
        page_bytes=size,
        arena=arena,
        group_pages=settings.switch.group_pages,
        shared=settings.phases is not None,
        **limits,
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
