"""Adapters in a worker of another process: they lie in pages that both see, and the engine tells where.

The engine's process reads them into the pool (`adapters`); a worker that shares the pool needs no copy, only shapes and
page numbers, which come with every batch. Scratch for their products is the worker's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.executor import Entry
from memwall.kernels.lora import LoraRoom, PagedLora
from memwall.memory import PagePool

if TYPE_CHECKING:
    from memwall.engine.adapters import Adapters


def adapters_message(batch: Iterable[Entry], adapters: Adapters | None) -> dict[str, Any]:
    """What workers must know of the adapters of a batch, by their keys."""
    if adapters is None:
        return {}
    keys = {entry.sequence.request.adapter for entry in batch}
    return {key: adapters.told(key) for key in keys if key is not None}


class ToldAdapters:
    """Those of the batch at hand, in the pages of `pool`."""

    def __init__(self, pool: PagePool, room: LoraRoom) -> None:
        self.pool, self.room = pool, room
        self._held: dict[str, PagedLora] = {}

    def tell(self, told: Mapping[str, Any]) -> None:
        """The adapters of the next batch; others are forgotten."""
        held = {}
        for key, one in told.items():
            shapes = {name: (shape[0], shape[1], shape[2]) for name, shape in one["shapes"].items()}
            held[key] = PagedLora(self.room, one["form"], one["scale"], shapes)
            held[key].place(one["pages"])
        self._held = held

    def paged(self, key: str) -> PagedLora:
        """Where an adapter lies."""
        return self._held[key]

    def array(self) -> np.ndarray:
        """All resident pages, uint8 [pages, page bytes]."""
        return self.pool.array((self.pool.page_bytes,), np.dtype(np.uint8))
