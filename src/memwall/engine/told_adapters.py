"""Adapters in a worker of another process: they lie in pages that both see, and the engine tells where.

The engine's process reads them into the pool (`adapters`); a worker that shares the pool needs no copy, only shapes and
page numbers, which come with every batch, and once what lengthens the outputs of a DoRA adapter. Scratch for their
products is the worker's own.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.executor import Entry
from memwall.kernels.lora import LoraRoom, PagedLora
from memwall.memory import PagePool

if TYPE_CHECKING:
    from memwall.engine.adapters import Adapters

MOST_ROWS = 8


def adapters_message(batch: Iterable[Entry], adapters: Adapters | None) -> dict[str, Any]:
    """What workers must know of the adapters of a batch, by their keys."""
    if adapters is None:
        return {}
    keys = {entry.sequence.request.adapter for entry in batch}
    return {key: adapters.told(key) for key in keys if key is not None}


class ToldRows:
    """What one worker has of the rows of DoRA adapters: they are numbers of the engine's own, go over once, and stay
    there for the `MOST_ROWS` adapters that were used last.
    """

    def __init__(self) -> None:
        self._there: OrderedDict[str, None] = OrderedDict()

    def message(self, told: Mapping[str, Any], adapters: Adapters | None) -> dict[str, Any]:
        """What the worker needs beside `adapters_message`, and what it may forget."""
        wanted = {one["rows"]: key for key, one in told.items() if "rows" in one}
        new: dict[str, Any] = {}
        for name, key in wanted.items():
            if name not in self._there:
                assert adapters is not None
                new[name] = {target: _text(rows) for target, rows in adapters.rows(key).items()}
            self._there[name] = None
            self._there.move_to_end(name)
        drop = [name for name in list(self._there)[: max(len(self._there) - MOST_ROWS, 0)] if name not in wanted]
        for name in drop:
            del self._there[name]
        return {"new": new, "drop": drop}


def _text(rows: np.ndarray) -> list[Any]:
    return [rows.shape, base64.b64encode(np.ascontiguousarray(rows, "<f4").tobytes()).decode()]


def _lengthen(made: PagedLora, rows: Mapping[str, Any]) -> None:
    for target, (shape, text) in rows.items():
        made.lengthen(target, np.frombuffer(base64.b64decode(text), "<f4").reshape(shape))


class ToldAdapters:
    """Those of the batch at hand, in the pages of `pool`."""

    def __init__(self, pool: PagePool, room: LoraRoom) -> None:
        self.pool, self.room = pool, room
        self._held: dict[str, PagedLora] = {}
        self._lengthened: dict[str, PagedLora] = {}

    def tell(self, told: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
        """The adapters of the next batch; others are forgotten. rows: of `ToldRows`."""
        for name in rows["drop"]:
            self._lengthened.pop(name, None)
        held = {}
        for key, one in told.items():
            made = self._lengthened.get(one.get("rows"))
            if made is None:
                shapes = {name: (shape[0], shape[1], shape[2]) for name, shape in one["shapes"].items()}
                made = PagedLora(self.room, one["form"], one["scale"], shapes)
                if "rows" in one:
                    _lengthen(made, rows["new"][one["rows"]])
                    self._lengthened[one["rows"]] = made
            held[key] = made
            made.place(one["pages"])
        self._held = held

    def paged(self, key: str) -> PagedLora:
        """Where an adapter lies."""
        return self._held[key]

    def array(self) -> np.ndarray:
        """All resident pages, uint8 [pages, page bytes]."""
        return self.pool.array((self.pool.page_bytes,), np.dtype(np.uint8))
