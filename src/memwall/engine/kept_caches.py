"""Caches of requests that are over, kept until their room is wanted: the next turn of a conversation goes on from one.

A conversation's next prompt begins with all that the last one had and was answered. Where requests have caches of their
own (`own_caches`) there are no pages that could be found by what they hold, but the whole cache is there; whoever comes
with its tokens takes it over, cut to what both share, and only the rest is read. Its pages count as free meanwhile: the
longest unused cache goes first when somebody needs them.

What the answer was coded in stays coded, as it does in a chat of `memwall run`; read again as one prompt it would have
been attended to exactly once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from memwall.engine.kv_pages import IDLE_TENANT, TENANT, KVPages
from memwall.kv import KVCache, resolve
from memwall.kv.table import technique

if TYPE_CHECKING:
    from memwall.engine.own_caches import OwnPool
    from memwall.engine.sequence import Sequence as Running

LEAST_TOKENS = 16
LEAST_SHARE = 0.5
"""Of a kept cache's tokens: who shares less with it, such as the same opening alone, is not whom it is kept for."""


def goes_on(policy: str) -> bool:
    """Whether another prompt may follow in the bytes that `predict` tells for one prompt of all tokens: pruned prompts
    are predicted as they are once.
    """
    kinds = [technique(part.name) for part in resolve(policy).parts]
    return all(kind.role == "store" or kind.goes_on for kind in kinds)


@dataclass(slots=True)
class Kept:
    """The cache of a request that is over: its tokens, whose they are (`salt`), and the pages it takes."""

    tokens: list[int]
    salt: bytes
    pages: list[int]

    def shared(self, tokens: list[int]) -> int:
        """Tokens that both begin with; 0 where it is less than LEAST_SHARE of the kept ones."""
        least = max(math.ceil(LEAST_SHARE * len(self.tokens)), LEAST_TOKENS)
        look = slice(least - LEAST_TOKENS, least)
        # conversations have openings in common, but seldom what comes half-way
        if len(tokens) < least or self.tokens[look] != tokens[look]:
            return 0
        both = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, tokens)))
        return both if both >= least else 0


class OwnPages(KVPages):
    """Pages that caches of requests take. Idle ones are those of kept caches."""

    def __init__(self, pool: OwnPool, page_tokens: int, *, keep: bool) -> None:
        super().__init__(pool, page_tokens, keep_prefixes=False)
        self.own = pool
        self.keeps = keep and goes_on(pool.sizes.policy)
        self.kept: dict[int, Kept] = {}
        """By request, the longest unused first."""

    @property
    def idle_pages(self) -> int:
        """See `KVPages`."""
        return sum(len(kept.pages) for kept in self.kept.values())

    def forget(self, count: int) -> int:
        """See `KVPages`: whole caches, the longest unused first."""
        given = 0
        while given < count and self.kept:
            given += self.drop(next(iter(self.kept)))
        return given

    def moved(self, moves: Mapping[int, int]) -> None:
        """See `KVPages`."""
        for kept in self.kept.values():
            kept.pages = [moves.get(page, page) for page in kept.pages]

    def keep(self, number: int, kept: Kept) -> None:
        """The cache of request `number`, which is over, stays."""
        self.pool.give_to(IDLE_TENANT, kept.pages)
        self.kept[number] = kept
        self.version += 1

    def drop(self, number: int) -> int:
        """A kept cache goes; its pages."""
        kept = self.kept.pop(number)
        self.own.end_cache(number)
        self.pool.drop(kept.pages)
        self.version += 1
        return len(kept.pages)

    def find_kept(self, one: Running) -> tuple[int, int] | None:
        """Whose cache the request goes on from, and after how many tokens; one at least stays to be computed."""
        best = None
        for number, kept in self.kept.items():
            if kept.salt != one.request.salt:
                continue
            shared = self.own.caches[number].rewindable(min(kept.shared(one.tokens), len(one.tokens) - 1))
            if shared and (best is None or shared > best[1]):
                best = number, shared
        return best

    def take_over(self, number: int, by: int, tokens: int) -> tuple[KVCache, list[int]]:
        """The kept cache of `number` becomes that of request `by`, cut to `tokens`; with its pages."""
        kept, cache = self.kept.pop(number), self.own.caches.pop(number)
        if cache.length > tokens:
            cache.truncate(tokens)
        self.own.caches[by] = cache
        self.pool.give_to(TENANT, kept.pages)
        self.version += 1
        return cache, kept.pages
