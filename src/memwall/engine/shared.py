"""Prefixes that several requests go on from: computed once, held while one of these is not over, freed with the last.

A request with `members` is a prefix: it is computed like any prompt, makes no token, and its pages then stay. A request
with `prefix` names such a one; its own pages begin after `base` tokens of it, wherever in a page that is, so that not a
token of a shared beginning is computed twice. How many members come is said beforehand: they may enter later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from memwall.engine.kv_pages import KVPages
from memwall.engine.sequence import Sequence
from memwall.errors import InputError

TENANT = "shared prefix"


class SharedPrefixes:
    """The prefixes of an engine, from their entry to the end of their last member."""

    def __init__(self, pages: KVPages) -> None:
        self.pages = pages
        self.held: dict[int, Sequence] = {}
        """Those that are computed."""
        self._all: dict[int, Sequence] = {}

    @property
    def held_pages(self) -> int:
        """Pages of the prefixes that are computed."""
        return sum(len(one.pages) for one in self.held.values())

    def enter(self, sequence: Sequence) -> None:
        """A new request: a prefix, a member of one, or neither."""
        request = sequence.request
        if request.members:
            self._all[sequence.id] = sequence
        if request.prefix is None:
            return
        parent = self._all.get(request.prefix)
        if parent is None:
            raise InputError(f"request {request.prefix} is no prefix that is still here")
        if request.adapter != parent.request.adapter:
            raise InputError(f"request {request.prefix} was computed with another adapter: its keys are of no use here")
        if not 0 < request.base <= parent.num_prompt or request.base >= sequence.num_prompt:
            raise InputError(
                f"a prompt of {sequence.num_prompt} tokens cannot go on after {request.base} of a prefix of "
                f"{parent.num_prompt}: one token at least must be its own"
            )
        sequence.parent, sequence.computed = parent, request.base

    def hold(self, prefix: Sequence) -> None:
        """All of a prefix is computed."""
        prefix.status = "held"
        self.held[prefix.id] = prefix
        self.pages.pool.give_to(TENANT, prefix.pages)

    def member_over(self, member: Sequence) -> Sequence | None:
        """A member has ended; gives its prefix when that was the last."""
        parent = member.parent
        if parent is None:
            return None
        parent.left -= 1
        return parent if parent.left == 0 and parent.status != "finished" else None

    def take_back(self, number: int) -> Sequence:
        """A held prefix that gives its pages up for now."""
        return self.held.pop(number)

    def forget(self, prefix: Sequence) -> None:
        """A prefix is over."""
        self.held.pop(prefix.id, None)
        self._all.pop(prefix.id, None)

    def moved(self, moves: Mapping[int, int]) -> None:
        """The pool has moved pages."""
        for one in self.held.values():
            one.pages = [moves.get(page, page) for page in one.pages]


def orphans(prefix: Sequence, requests: Iterable[Sequence]) -> list[Sequence]:
    """Members of a prefix that ended before them."""
    return [one for one in requests if one.parent is prefix]
