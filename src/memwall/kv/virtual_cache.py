"""One sequence in vAttention's store, as a cache policy: `vattention(page_kib=64,bits=16,ahead=1,megacache=0)`.

Source: none; `kv.vattention` behind the seam of one sequence's cache.
Idea: rows lie in a slot of a `VirtualKV` whose pool keeps no spare memory, so that the ledger holds the mapped pages
and nothing else. While a step computes, a thread maps what `ahead` more tokens need; the step's end waits for it. A
fork is another slot of the same store: it sees the same pages, and only the block that it goes on writing in is copied.
Units and shapes: rows [tokens, Hkv, D] of float16 or float32 (`bits`); `page_kib` is a power of two. With `megacache`
a token's rows of all layers lie together in two arrays, so that a page is mapped for all layers at once.
Differs from the paper: nothing known beyond what `kv.vattention` says.
Cost: resident 2 * layers * ceil(min(n + ahead, capacity) * row bytes / page) * page, with `megacache` 2 such arrays of
rows that are as many times as long as there are layers; a decode step reads the n rows.
Holds when: Linux, as pages are mapped by the system; a capacity whose slots fit in the addresses of a process.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import KIB, TIB
from memwall.kernels.attention import attend_float
from memwall.kv.base import CacheModel, CacheShape, KVCache
from memwall.kv.policy import Policy
from memwall.kv.vattention import OWNER, VirtualKV, VirtualSettings
from memwall.memory.pages import round_up
from memwall.memory.virtual import OutOfBlocks

if TYPE_CHECKING:
    from memwall.memory import Arena

DEFAULTS: Mapping[str, int] = {"page_kib": 64, "bits": 16, "ahead": 1, "megacache": 0}
LARGEST_PAGE_KIB = 2048
MOST_FORKS = 64
ADDRESS_BYTES = 32 * TIB
"""Addresses one store may reserve: a quarter of what a process has."""


class VirtualCache(KVCache):
    """See the module's text."""

    DTYPES: ClassVar[Mapping[int, str]] = {16: "float16", 32: "float32"}

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
        *,
        store: VirtualKV | None = None,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self._settings = settings = virtual_settings(policy)
        self._policy = policy
        page, dtype = settings["page_kib"] * KIB, self.DTYPES[settings["bits"]]
        if store is None:
            planes, row_bytes = _planes(settings, shape)
            blocks = -(-capacity_tokens * row_bytes // page)
            slots = max(min(MOST_FORKS, ADDRESS_BYTES // (planes * blocks * page)), 1)
            store = VirtualKV(
                shape,
                arena,
                num_slots=slots,
                max_tokens=capacity_tokens,
                num_blocks=slots * blocks,
                settings=VirtualSettings(
                    page_bytes=page,
                    deferred=False,
                    keep=False,
                    ahead_steps=settings["ahead"],
                    ahead_blocks=blocks,
                    megacache=bool(settings["megacache"]),
                ),
                dtype=dtype,
                fill=False,
            )
        self._store = store
        self._slot: int | None = store.alloc(1)
        self._lengths = [0] * shape.num_layers

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held."""
        settings = virtual_settings(policy)
        mapped = min(num_tokens + settings["ahead"], capacity_tokens) if num_tokens else 0
        planes, row_bytes = _planes(settings, shape)
        return {OWNER: planes * round_up(mapped * row_bytes, settings["page_kib"] * KIB)}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` held."""
        row_bytes = shape.row_values * virtual_settings(policy)["bits"] // 8
        return sum(2 * row_bytes * min(num_tokens, shape.window(i) or num_tokens) for i in range(shape.num_layers))

    @property
    def policy(self) -> str:
        return str(self._policy)

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        return self._store.slot_bytes(self._slot) if self._slot is not None else 0

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held = self._lengths[layer]
        self._check_append(held, len(k), positions)
        end = held + len(k)
        slot = self._live()
        # the first layer maps for all: a refusal must come before any layer has changed
        if layer == 0:
            self._store.step_async({slot: end}) if self._settings["ahead"] else self._store.step({slot: end})
        keys, values = self._store.rows(layer, slot, held, end)
        keys[:] = k
        values[:] = v
        self._lengths[layer] = end

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        keys, values = self._store.rows(layer, self._live(), 0, self._lengths[layer])
        return attend_float(
            q,
            keys,
            values,
            scale=self.shape.logit_scale,
            first_position=int(positions[0]),
            window=self.shape.window(layer),
            out=out,
            stats=stats,
        )

    def settle(self, layer: int) -> None:
        """Nothing to compress; after the last layer the thread's pages are on the ledger."""
        if layer == self.shape.num_layers - 1:
            self._store.wait()

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        slot, spare = self._live(), self._settings["ahead"] if length else 0
        # a refused forward pass may have left the slot longer or shorter than the layers
        self._store.truncate(slot, min(length, self._store.lengths[slot]), spare_tokens=spare)
        self._lengths = [length] * self.shape.num_layers

    def fork(self) -> VirtualCache:
        """Whole blocks are shared; the rows behind them are copied."""
        try:
            other = VirtualCache(self._policy, self.shape, self.arena, self.capacity_tokens, store=self._store)
        except OutOfBlocks as full:
            raise DoesNotFit(f"a cache and its forks are {self._store.num_slots} at most: release one") from full
        source, target, length = self._live(), other._live(), self.length
        try:
            shared = self._store.share(source, target, length)
            self._store.step({target: length})
            for layer in range(self.shape.num_layers):
                for mine, theirs in zip(*(self._store.rows(layer, slot, shared, length) for slot in (source, target))):
                    theirs[:] = mine
            other._lengths = [length] * self.shape.num_layers
        except BaseException:
            other.release()
            raise
        return other

    def release(self) -> None:
        if self._slot is None:
            return
        self._store.wait()
        self._store.free(self._slot)
        self._slot = None
        self._lengths = [0] * self.shape.num_layers
        if not self._store.num_active:
            self._store.release()

    def _live(self) -> int:
        if self._slot is None:
            raise ValueError("the cache was released")
        return self._slot


def virtual_settings(policy: Policy, **defaults: int) -> dict[str, int]:
    """The settings of a policy, checked; defaults: other ones than those of one sequence."""
    settings = policy.integers({**DEFAULTS, **defaults})
    page_kib, least = settings["page_kib"], max(mmap.PAGESIZE // KIB, 1)
    if not least <= page_kib <= LARGEST_PAGE_KIB or page_kib & (page_kib - 1):
        raise InputError(
            f"policy {policy}: pages of {page_kib} KiB; must be a power of two from {least} to {LARGEST_PAGE_KIB}"
        )
    if settings["bits"] not in VirtualCache.DTYPES:
        raise InputError(f"policy {policy}: {settings['bits']} bits; must be 16 or 32 (for fewer use kivi)")
    if settings["megacache"] not in (0, 1):
        raise InputError(f"policy {policy}: megacache={settings['megacache']}; must be 0 or 1")
    return settings


def _planes(settings: Mapping[str, int], shape: CacheShape) -> tuple[int, int]:
    """(arrays, bytes of a token's row in each)."""
    row_bytes = shape.row_values * settings["bits"] // 8
    return (2, row_bytes * shape.num_layers) if settings["megacache"] else (2 * shape.num_layers, row_bytes)
