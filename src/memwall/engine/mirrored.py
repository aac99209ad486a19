"""The same adapters in a second memory: prompts are computed with them there before tokens are made with them here.

Where prompts and tokens have a memory each (`apart`), an adapter lies in the pages of both, as the weights would on two
machines: each side reads it when one of its requests begins to run, and gives it up by its own use. Who is known, under
which names, and how many requests want it, is the other `Adapters`' matter, so that one that is removed goes on for its
requests wherever they are.
"""

from __future__ import annotations

from memwall.engine.adapters import Adapter, Adapters
from memwall.engine.kv_pages import KVPages
from memwall.memory import Arena

OWNER = "adapters/prefill"


class MirroredAdapters(Adapters):
    """Over the pages of the prefill side."""

    owner, known_owner = OWNER, None

    def __init__(self, leader: Adapters, pages: KVPages, arena: Arena | None = None) -> None:
        """leader: who takes adapters in; those that it knows already are known here too."""
        super().__init__(pages, leader.room, arena=arena, exact=leader.exact, link_bytes_per_s=leader.link_bytes_per_s)
        self.counts = leader.counts
        self._leader = leader
        leader.mirrors.append(self)
        for adapter in leader._known.values():
            self.take_in(adapter)

    def take_in(self, adapter: Adapter) -> None:
        """One that the other knows from now on."""
        paged = None
        if adapter.weights is not None:
            assert self.room is not None
            paged = adapter.weights.paged(self.room, exact=self.exact)
        self._known[adapter.key] = Adapter(
            adapter.key, adapter.name, adapter.num_pages, adapter.secret, adapter.weights, paged, adapter.rows
        )

    def let_go(self, key: str) -> None:
        """One that nobody can name and no request wants any more."""
        self._forget(self._known[key])

    def check(self, key: str | None) -> None:
        """See `Adapters`."""
        self._leader.check(key)

    def open(self, key: str) -> None:
        """See `Adapters`."""
        self._leader.open(key)

    def close(self, key: str) -> None:
        """See `Adapters`."""
        self._leader.close(key)
