"""Pages of keys and values by what they hold: shared beginnings are found by the digest of their tokens.

A full page of a sequence is known by a digest of its tokens and of all before them, so that an equal beginning of
another sequence takes the same page. Pages that nobody uses any more stay as `prefix` until their room is wanted; the
longest unused go first, and of one sequence the last page before the first.

Digests are BLAKE2b of 16 bytes, keyed by `salt`: what one adapter or tenant cached is of no use to another, and nobody
can construct two texts that share a page.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from memwall.memory import OutOfPages, PagePool

TENANT = "kv"
POOL_OWNER = "kv/pages"
IDLE_TENANT = "prefix"


def digest_page(before: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
    """Names a page by its tokens and all before it (`before`: the digest of the page before; empty for the first)."""
    # keyed on every page: a salt that only began the chain could be chosen as the digest of somebody else's page
    key = hashlib.blake2b(salt, digest_size=32).digest() if salt else b""
    return hashlib.blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=16, key=key).digest()


class Lender(Protocol):
    """Somebody else who keeps pages of the pool that can be had back at once (adapters that nobody uses)."""

    @property
    def idle_pages(self) -> int:
        """Pages that `give_back` can free."""

    def give_back(self, count: int, *, wanted_soon: bool) -> int:
        """Frees at least `count` pages if there are so many; how many. wanted_soon: also those meant for what comes."""


class Leaving(Protocol):
    """Pages that are being copied out: free once that is done."""

    @property
    def leaving_pages(self) -> int:
        """Pages that nobody else holds."""

    def is_leaving(self, page: int) -> bool:
        """Whether the page is one of them."""

    def free_up(self, count: int) -> None:
        """Waits until at least `count` of them are free or kept for their beginning alone, or none is left."""


class KVPages:
    """Counted pages over a pool, with the beginnings that can be shared."""

    def __init__(self, pool: PagePool, page_tokens: int, *, keep_prefixes: bool = True) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self.keep_prefixes = keep_prefixes
        self.lender: Lender | None = None
        self.leaving: Leaving | None = None
        self.version = 0
        """Changes when what can be shared changes."""
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def idle_pages(self) -> int:
        """Pages kept for their beginnings alone."""
        return len(self._idle)

    @property
    def available_pages(self) -> int:
        """Pages that `take` can give."""
        lent = self.lender.idle_pages if self.lender is not None else 0
        leaving = self.leaving.leaving_pages if self.leaving is not None else 0
        return self.pool.free_pages + self.idle_pages + lent + leaving

    def is_idle(self, page: int) -> bool:
        """Whether nobody but the index, or a copy on its way out, holds it."""
        return page in self._idle or (self.leaving is not None and self.leaving.is_leaving(page))

    def freeable(self, pages: Sequence[int]) -> int:
        """How many of a sequence's pages no other sequence holds."""
        return len(pages) - self.pool.num_shared(pages)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Pages of the longest known beginning. They may go at any moment until `acquire` has them."""
        found = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def knows(self, digest: bytes) -> bool:
        """Whether a page holds what the digest names."""
        return digest in self._page_of

    def acquire(self, pages: list[int], owner: int | None = None, most: int = 0) -> list[int]:
        """One more holder for pages that `find` gave; those that it can have, all in a pool with page tables.

        owner: the request that begins with them, and will come to hold `most` pages.
        """
        pages = pages if owner is None else self.pool.begin(owner, pages, most)
        for page in pages:
            if page in self._idle:  # the index's own reference becomes the sequence's
                del self._idle[page]
                self.pool.give_to(TENANT, [page])
            else:
                self.pool.share([page])
        return pages

    def take(self, count: int, tenant: str = TENANT, owner: int | None = None) -> list[int]:
        """Fresh pages; beginnings that nobody uses make room. OutOfPages when there are too few.

        owner: the request that they should lie together for, in a pool of groups.
        """
        if count > self.available_pages:
            raise OutOfPages(f"{count} pages wanted, {self.available_pages} of {self.pool.limit_pages} are free")
        self.forget(count - self.pool.free_pages)
        if count > self.pool.free_pages and self.leaving is not None:
            self.leaving.free_up(count - self.pool.free_pages)
            self.forget(count - self.pool.free_pages)
        return self.pool.take(tenant, count, owner)

    def forget_contents(self, pages: Sequence[int]) -> None:
        """The pages will hold something else: nobody finds them by their beginning any more."""
        for page in pages:
            digest = self._digest_of.pop(page, None)
            if digest is not None:
                del self._page_of[digest]
        self.version += 1

    def register(self, page: int, digest: bytes) -> None:
        """The page holds all the tokens that the digest names; others may share it from now on."""
        if self.keep_prefixes and digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest
            self.version += 1

    def release(self, pages: Sequence[int]) -> None:
        """A sequence lets go of its pages. What others could share stays until its room is wanted."""
        for page in reversed(pages):
            if self.pool.uses(page) == 1 and page in self._digest_of:
                self._idle[page] = None
                self.pool.give_to(IDLE_TENANT, [page])
            else:
                self.pool.drop([page])
        self.version += 1

    def forget(self, count: int) -> int:
        """Gives `count` of the longest unused pages back, or as many as there are; how many.

        Adapters that nobody waits for go first: to read one again costs less than to compute a beginning.
        """
        if count <= 0:
            return 0
        lent = self.lender.give_back(count, wanted_soon=False) if self.lender is not None else 0
        given = 0
        while lent + given < count and self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
            self.pool.drop([page])
            given += 1
        self.version += given
        if lent + given < count and self.lender is not None:
            lent += self.lender.give_back(count - lent - given, wanted_soon=True)
        return lent + given

    def moved(self, moves: Mapping[int, int]) -> None:
        """The pool has moved pages."""
        if not moves:
            return
        self._digest_of = {moves.get(page, page): digest for page, digest in self._digest_of.items()}
        self._page_of = {digest: page for page, digest in self._digest_of.items()}
        self._idle = OrderedDict((moves.get(page, page), None) for page in self._idle)
