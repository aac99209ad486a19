"""A cache of its own for each request: every policy of `memwall.kv`, behind a server.

Pages of a pool hold rows that are all alike, which any request can have. What other policies keep is not: a prompt is
pruned once it has been read, codes wait for a group, keys lose channels. Here each running request has a cache that its
policy made, and the engine goes on counting in pages: of bytes, which a request takes for what its cache will hold at
most (`Growth`, from the policy's own `predict`) before it comes to hold it. So the budget is never crossed, and nobody
waits for memory in the middle of a step. What all caches share, such as fitted matrices, is held once (`template`).

A prompt is cut as its policy asks (`KVCache.begin_prompt`), and its chunks are not cut any further, so that answers are
those of `memwall run`. Decoding requests append and attend together where their policy can (`kv.decoding`).

A request that ended leaves its cache to the next turn of its conversation (`kept_caches`).

Not here: beginnings that several share, swapping (a request that is set aside is read again, as one prompt with what it
had made), adapters, and schedulers that count in tokens of pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.base import RequestView
from memwall.engine.batch import BatchCache
from memwall.engine.core import Engine
from memwall.engine.executor import Entry, Output
from memwall.engine.kept_caches import Kept, OwnPages
from memwall.engine.kv_pages import POOL_OWNER
from memwall.engine.loading import cache_shape
from memwall.engine.sequence import Event, FinishReason, Sequence
from memwall.engine.switching import SwitchSettings
from memwall.errors import BudgetExceeded, InputError
from memwall.hardware import available_memory_bytes
from memwall.kv import CacheModel, CacheShape, KVCache, build, packs_positions, predict, resolve
from memwall.kv.decoding import Decoding
from memwall.kv.table import resolve_for, technique
from memwall.memory import Arena, PagePool
from memwall.models.config import ModelConfig

if TYPE_CHECKING:
    from memwall.engine.serving import ServingSettings

PAGE_TOKENS = 16
"""Of a page's share in the largest request: pages are of bytes, and so many that the context is in pages of these."""
STATE_PAGES = 64
"""Of a state, whose size does not go by tokens."""
PAGE_ROUNDING = 256
SYSTEM_PAGE = 4096
LEAST_CONTEXT_TOKENS = 256
LOOKED_AT, LENGTHS = 9, 512
"""Prompts, and lengths for each, that the largest request is looked for among."""
MARGIN = 1 / 64
ELSEWHERE = {
    "vattention": "it is served in slots, by itself: --kv vattention",
    "instinfer": "each request would need a storage process of its own",
}


def check_own(settings: ServingSettings) -> None:
    """InputError for policies that are not served, and for what cannot be done where requests have caches."""
    policy = resolve(settings.kv)
    for part in policy.parts:
        if part.name in ELSEWHERE:
            raise InputError(f"--kv {policy}: {part.name} is not kept for each request: {ELSEWHERE[part.name]}")
    without = f"--kv {policy} gives each request a cache of its own: "
    if settings.lora is not None:
        raise InputError(without + "there are no pages that adapters could lie in; leave --lora and --lora-dir out")
    if settings.shared_prefixes or settings.phases is not None or settings.ahead:
        raise InputError(without + "nothing of it is shared between requests or processes; use --scheduler fcfs")
    if settings.switch != SwitchSettings():
        raise InputError(without + "it is not moved in groups of pages beside the steps; use --scheduler fcfs")


def settled_own(settings: ServingSettings, config: ModelConfig) -> ServingSettings:
    """The settings with what follows: pages of a share of the context, nothing swapped. A model without attention has a
    state of one size for requests of any length.
    """
    kv, tokens = settings.kv, PAGE_TOKENS
    if config.ssm is not None:
        kv = str(resolve_for(kv, cache_shape(config)))
        tokens = max(tokens, -(-(settings.context_tokens or config.max_position) // STATE_PAGES))
    return replace(settings, kv=kv, page_tokens=tokens, swap_bytes=0)


# ---- what a request takes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one request's cache. shared: of them, those that all caches have together. segments: the chunks that a
    prompt of so many tokens is read in.
    """

    policy: str
    shape: CacheShape
    context_tokens: int
    shared: int
    segments: Callable[[int], list[int]]

    @property
    def prunes(self) -> bool:
        """Whether a prompt in several chunks is kept whole, in float16, until its last one."""
        kinds = [technique(part.name) for part in resolve(self.policy).parts]
        return any(kind.codes_prompt and kind.role != "store" for kind in kinds)

    def at(self, prompt: int, tokens: int) -> int:
        """With so many tokens taken in, those of the prompt at once."""
        return sum(predict(self.policy, self.shape, tokens, prompt, self.context_tokens).values()) - self.shared

    def read(self, prompt: int) -> int:
        """While a prompt is read, at most."""
        found = self.at(prompt, prompt)
        if self.prunes and len(self.segments(prompt)) > 1:
            row = 2 * self.shape.num_layers * self.shape.row_values * np.dtype(np.float16).itemsize
            found += row * prompt + 2 * self.shape.num_layers * SYSTEM_PAGE
        return found

    def largest(self) -> int:
        """Of any request of the whole context, at most. Between the lengths that are looked at a cache may hold more,
        where codes wait for a group to fill: by the tokens between them at most, as floats.
        """
        longest, step = self.context_tokens, max(self.context_tokens // LENGTHS, 1)
        prompts = {1 + (longest - 1) * at // LOOKED_AT for at in range(LOOKED_AT)} | {max(longest - 1, 1)}
        peaks = [max(self.read(m), *(self.at(m, n) for n in range(longest, m - 1, -step))) for m in prompts]
        between = (step - 1) * 2 * self.shape.num_layers * self.shape.row_values * np.dtype(np.float32).itemsize
        return int(max(peaks) * (1 + MARGIN)) + between


class Growth:
    """What a request with such a prompt takes with every token, in pages of page_bytes, and the chunks of its prompt,
    of which the first `begun` tokens are there. See `base.Growth`; a function of its arguments, whose values are kept
    once they are known.
    """

    def __init__(self, sizes: Sizes, page_bytes: int, prompt: int, begun: int = 0) -> None:
        self.sizes, self.page_bytes, self.prompt, self.begun = sizes, page_bytes, prompt, begun
        self._ends = [begun + end for end in accumulate(sizes.segments(prompt - begun))]
        self._read = sizes.read(prompt)
        self._peaks = [sizes.at(prompt, prompt)]

    def pages(self, tokens: int) -> int:
        """See `base.Growth`: all of the prompt's from its first token on, and less once it has been read."""
        while len(self._peaks) <= tokens - self.prompt:
            self._peaks.append(max(self._peaks[-1], self.sizes.at(self.prompt, self.prompt + len(self._peaks))))
        nbytes = self._peaks[tokens - self.prompt] if tokens > self.prompt else self._read
        return -(-nbytes // self.page_bytes)

    def chunk(self, computed: int) -> int:
        """See `base.Growth`."""
        return next((end - computed for end in self._ends if end > computed), 1)


# ---- the caches ----------------------------------------------------------------------------------------------------


class OwnPool(PagePool):
    """Pages are counted, and caches hold the memory."""

    counts = "caches"

    def __init__(
        self, template: KVCache, sizes: Sizes, longest: int, *, page_bytes: int, most_pages: int, limit_pages: int
    ) -> None:
        """template: an empty cache, of which each request's is a fork. longest: tokens of a prompt's chunk."""
        super().__init__(POOL_OWNER, page_bytes=page_bytes, most_pages=most_pages, limit_pages=limit_pages)
        self.template, self.sizes, self.longest = template, sizes, longest
        self.caches: dict[int, KVCache] = {}
        self.together: Decoding | None = None
        """Of those that took in a token together last; none once one of them has gone."""
        self._held = self._counted = 0

    @property
    def committed_bytes(self) -> int:
        """See `PagePool`: what the caches hold, of all that was taken for them."""
        return self._held

    def begin_cache(self, number: int, num_tokens: int) -> None:
        """An empty cache for a request, whose prompt comes in the chunks that `Growth` knows."""
        self.end_cache(number)
        cache = self.caches[number] = self.template.fork()
        cache.begin_prompt(num_tokens, self.longest)

    def end_cache(self, number: int) -> None:
        """A request's cache goes, if it has one."""
        cache = self.caches.pop(number, None)
        if cache is not None:
            self.together = None
            cache.release()
            self.count()

    def count(self) -> None:
        """Counts what the caches hold now; once a step, as each has to be asked, and where the arena has changed."""
        used = self.template.arena.used_bytes
        if used == self._counted:
            return
        self._counted = used
        self._held = sum(max(cache.nbytes - self.sizes.shared, 0) for cache in self.caches.values())

    def told(self) -> dict[str, int]:
        """Caches, and the bytes that they hold, beside those taken for what they will."""
        return {"caches": len(self.caches), "held_bytes": self._held, "taken_bytes": self.used_pages * self.page_bytes}

    def release(self) -> None:
        """See `PagePool`."""
        for cache in (*self.caches.values(), self.template):
            cache.release()
        self.caches.clear()
        self.together = None
        self._held = 0
        super().release()


@dataclass(slots=True)
class Part:
    """Rows [begin, end) of the batch are tokens at these places of one cache."""

    begin: int
    end: int
    cache: KVCache
    at: np.ndarray

    def within(self, begin: int, end: int) -> tuple[slice, np.ndarray] | None:
        """Its rows among [begin, end): where among these, and their places."""
        first, last = max(self.begin, begin), min(self.end, end)
        if first >= last:
            return None
        return slice(first - begin, last - begin), self.at[first - self.begin : last - self.begin]


class OwnCaches(BatchCache):
    """A `BatchCache` that hands every row to the cache of its request: those of one token each together."""

    def __init__(self, shape: CacheShape, pool: OwnPool) -> None:
        super().__init__(shape, pool, PAGE_TOKENS)  # what pages would hold is not looked at
        self.own = pool
        self._several: list[Part] = []
        self._decoding: Decoding | None = None
        self._taken = 0

    def begin(self, batch: list[Entry]) -> np.ndarray:
        """See `BatchCache`; positions are those that rows are turned by, which some caches number anew."""
        self._several, self._at, self._taken = [], 0, 0
        caches = [self._cache_of(entry) for entry in batch]
        places = np.array([cache.next_position for cache in caches], np.int64)
        self._singles = sum(entry.count == 1 for entry in batch)
        self._decoding = self._decode(caches[: self._singles])
        turns, row = [places[: self._singles]], self._singles
        for entry, cache, place in zip(batch[row:], caches[row:], places[row:]):
            at = np.arange(entry.count, dtype=np.int64)
            self._several.append(Part(row, row + entry.count, cache, at + entry.first))
            turns.append(at + place)
            row += entry.count
        return np.concatenate(turns)

    @property
    def parts(self) -> list[Part]:
        """Whose rows are whose, for all of the batch."""
        singles = enumerate(self._decoding.caches if self._decoding is not None else ())
        return [*(Part(row, row + 1, cache, np.array([cache.length])) for row, cache in singles), *self._several]

    def _cache_of(self, entry: Entry) -> KVCache:
        number = entry.sequence.id
        if entry.first == 0:
            self.own.begin_cache(number, len(entry.sequence.tokens))
        cache = self.own.caches[number]
        assert cache.length == entry.first
        return cache

    def _decode(self, caches: list[KVCache]) -> Decoding | None:
        """What takes in the next tokens of those that get one by itself."""
        if not caches:
            return None
        together = self.own.together
        if together is None or together.caches != caches or not together.stands():
            together = self.own.together = type(caches[0]).decode_together(caches)
        together.begin()
        return together

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        """See `KVCache`: rows come in order, blocks of them at a time."""
        begin, self._taken = self._taken, self._taken + len(x)
        if self._decoding is not None and begin < self._singles:
            self._decoding.take_inputs(layer, x[: self._singles - begin], begin)
        for part in self._several:
            if (found := part.within(begin, self._taken)) is not None:
                part.cache.take_inputs(layer, x[found[0]], found[1])

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """See `BatchCache`."""
        if self._decoding is not None:
            self._decoding.append(layer, k[: self._singles], v[: self._singles])
        for part in self._several:
            part.cache.append(layer, k[part.begin : part.end], v[part.begin : part.end], part.at)
        self._at = self._taken = 0

    def append_rows(self, layer: int, k: np.ndarray, v: np.ndarray, begin: int) -> None:
        """Not here: a cache takes all of its new rows at once."""
        raise NotImplementedError

    def attend_rows(self, layer: int, q: np.ndarray, begin: int, out: np.ndarray) -> np.ndarray:
        """See `BatchCache`."""
        if self._decoding is not None and begin < self._singles:
            end = self._singles - begin
            self._decoding.attend(layer, q[:end], out[:end], begin)
        for part in self._several:
            if (found := part.within(begin, begin + len(q))) is not None:
                place, at = found
                part.cache.attend(layer, q[place], at, out[place])
        return out

    def settle(self, layer: int) -> None:
        """See `KVCache`."""
        if self._decoding is not None:
            self._decoding.settle(layer)
        for part in self._several:
            part.cache.settle(layer)
        if layer == self.shape.num_layers - 1:
            self._decoding = None
            self.own.count()


class OwnInputs(OwnCaches):
    """The same for caches that keep what layers read."""

    takes_inputs = True


class OwnCachesEngine(Engine):
    """An engine whose requests take pages by `Growth`."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        pages = self.pages
        assert isinstance(pages, OwnPages)
        self.kept, self.own = pages, pages.own
        self._growths: dict[int, Growth] = {}

    def growth(self, one: Sequence, begun: int | None = None) -> Growth:
        """Of a request, whose prompt is all that it had when it began to be read; begun: what it goes on from, None for
        what was said last.
        """
        found, prompt = self._growths.get(one.id), len(one.tokens)
        if begun is None:
            begun = 0 if found is None else found.begun
        if found is None or (not one.computed and (found.prompt, found.begun) != (prompt, begun)):
            found = self._growths[one.id] = Growth(self.own.sizes, self.own.page_bytes, prompt, begun)
        return found

    def _view(self, one: Sequence) -> RequestView:
        one.growth = self.growth(one)
        return super()._view(one)

    def _waiting_view(self, one: Sequence) -> RequestView:
        """What it would go on from counts as computed; its pages are among the free ones until it has them."""
        if one.view is None or one.version != self.pages.version:
            found = self.kept.find_kept(one)
            begun = 0 if found is None else found[1]
            self.growth(one, begun)
            one.view = replace(self._view(one), computed=begun)
            one.version = self.pages.version
        return one.view

    def _admit(self, one: Sequence, hit: int, now: float, *, restore: bool = False) -> None:
        found, first = self.kept.find_kept(one), one.admitted is None
        self.growth(one, 0 if found is None else found[1])  # another one may have taken it in this step
        super()._admit(one, hit, now, restore=restore)
        if found is None:
            return
        cache, one.pages = self.kept.take_over(found[0], one.id, found[1])
        one.computed = found[1]
        cache.begin_prompt(len(one.tokens) - one.computed, self.own.longest)
        if first:
            one.cached = one.computed
            self.totals.prefix_hits += one.computed

    def _pages_behind(self, one: Sequence, tokens: int) -> int:
        return self.growth(one).pages(tokens)

    def _computed(self, entry: Entry, output: Output | None, now: float) -> Event | None:
        event, one = super()._computed(entry, output, now), entry.sequence
        if one.status == "running" and one.computed == self.growth(one).prompt:  # what reading it took is free again
            kept = self.growth(one).pages(one.computed + 1)
            self.pages.release(one.pages[kept:])
            del one.pages[kept:]
        return event

    def _start_over(self, one: Sequence) -> None:
        super()._start_over(one)
        self.own.end_cache(one.id)

    def _finish(self, one: Sequence, why: FinishReason) -> Event:
        kept = None
        if self.kept.keeps and why in ("stop", "length") and one.status == "running" and one.num_made:
            kept, one.pages = Kept(one.tokens[: one.computed], one.request.salt, one.pages), []
        event = super()._finish(one, why)
        self._growths.pop(one.id, None)
        if kept is not None:
            self.kept.keep(one.id, kept)
        else:
            self.own.end_cache(one.id)
        return event


def decoders_view(shape: CacheShape, pool: OwnPool) -> OwnCaches:
    """What the decoder sees of the caches."""
    kind = OwnInputs if pool.template.takes_inputs else OwnCaches
    return kind(shape, pool)


def longest_chunk(settings: ServingSettings) -> int:
    """Tokens of a prompt that one step reads at most: beside those that decode, who go first, they must fit a step."""
    return max(settings.token_budget - settings.max_sequences, 1)


def make_own(
    settings: ServingSettings, shape: CacheShape, model: CacheModel, arena: Arena, *, limited: bool
) -> tuple[OwnPool, int]:
    """The pool of a server, with a limit of one request of the whole context, and that context."""
    most = model.config.max_position
    context = settings.context_tokens or most
    if context > most and not packs_positions(settings.kv):
        raise InputError(f"a context of {context:,} tokens, but the model knows {most:,} positions")
    while True:
        template, sizes = _template(settings, shape, model, arena, context)
        pages = settings.limits.pages(context)
        page_bytes = -(-sizes.largest() // (pages * PAGE_ROUNDING)) * PAGE_ROUNDING
        if arena.free_bytes >= pages * page_bytes:
            break
        needed, free = pages * page_bytes, arena.free_bytes
        template.release()
        if settings.context_tokens is not None or context <= LEAST_CONTEXT_TOKENS:
            raise BudgetExceeded(POOL_OWNER, needed, free, arena.cap_bytes)
        context = max(context // 2, LEAST_CONTEXT_TOKENS)
    room = max(available_memory_bytes(), arena.cap_bytes if limited else 0)
    limits = {"most_pages": max(room // page_bytes, pages), "limit_pages": pages}
    pool = OwnPool(template, sizes, longest_chunk(settings), page_bytes=page_bytes, **limits)
    return pool, context


def _template(
    settings: ServingSettings, shape: CacheShape, model: CacheModel, arena: Arena, context: int
) -> tuple[KVCache, Sizes]:
    """An empty cache, and what its forks take."""
    template = build(settings.kv, shape, arena, context, model)
    try:
        before = arena.used_bytes
        probe = template.fork()
        shared = max(template.nbytes - (arena.used_bytes - before), 0)
        probe.release()
        longest = longest_chunk(settings)

        def segments(prompt: int) -> list[int]:
            sizes = template.begin_prompt(prompt, longest)
            template.truncate(0)  # it begins no prompt itself
            return sizes

        return template, Sizes(template.policy, shape, context, shared, segments)
    except BaseException:
        template.release()
        raise
