"""InstInfer: keys and values live on storage, and attention is computed there; only q, k, v and outputs cross the link.

Source: InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference; Pan et al., 2024,
arXiv 2409.04992 (journal-size version: InstAttention, HPCA 2025); written from published summaries, without its code.
Idea: decoding reads all keys and values once a token and does next to no arithmetic on each, so it belongs inside the
drive, whose flash is faster than its link. A process of its own plays the drive: it owns the file, reads it directly
(`kv.flash`), attends (`kv.sparf`: dense, or SparF with channel pages first) and answers with the output. Prompts are
attended on the host, layer by layer, while the layer before is shipped; where both hold a part, partial results merge.
Units and shapes: rows [n, Hkv, D]; on the link and on flash float16. Default: share 1/8, r = D / 8 and k = S / 16.
Differs from the paper: a process and a file stand for drive and flash; heads that share keys choose channels and tokens
together (sum of |q|, sum of shares), which the paper, on models without sharing, leaves open; 64 tokens are attended to
at least; layers with a sliding window, and a later prompt's queries over earlier tokens, are attended to densely.
Cost: per token and layer (2 H + 2 Hkv) D 16-bit numbers over the link, against 2 S Hkv D where keys and values are
fetched. Flash: 3/2 of keys and values (keys twice). Host memory: a request's buffers. The process: rows that wait to
fill pages, tables, chunks of pages.
Holds when: the link is slower than the flash behind it. Keys and values are lost with the process (`StorageLost`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall.kernels.attention import attend_float, merge_partials
from memwall.kv.base import CacheModel, CacheShape, KVCache
from memwall.kv.flash import QUERY_ROWS
from memwall.kv.policy import Policy
from memwall.kv.storage_link import StorageLost
from memwall.kv.storage_pool import Drives, Shipper
from memwall.kv.storage_settings import (
    FLASH,
    LINK,
    PROCESS,
    STAGING,
    buffer_shapes,
    held_bytes,
    settings_of,
    staging_shape,
    step_bytes,
)
from memwall.kv.storage_wire import Flag, Op
from memwall.memory.arena import allocated_bytes

if TYPE_CHECKING:
    from memwall.memory import Arena

MERGED_ROWS = 16
"""Queries whose parts are joined at once: merging makes copies."""


@dataclass(slots=True)
class Fresh:
    """New rows of a layer: the decoder's own arrays, which stay as they are until it settles. sent: to the drives."""

    layer: int
    k: np.ndarray
    v: np.ndarray
    sent: bool = False


class InstInferCache(KVCache):
    """See the module's text."""

    plain_rows = True
    tiers: ClassVar[Mapping[str, str]] = {PROCESS: "storage", FLASH: "disk"}

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self._policy = policy
        self.settings = settings_of(policy, shape, capacity_tokens)
        self._drives = Drives(self.settings, arena.beside(self.tiers[PROCESS]), PROCESS)
        try:
            self._open()
            self._begin()
        except BaseException:
            self._drives.drop()
            raise

    def _open(self) -> None:
        """What every sequence has: buffers of its requests, and its charges."""
        layout, process, disk = self.settings.layout, *(self.arena.beside(self.tiers[o]) for o in (PROCESS, FLASH))
        self._lengths = [0] * self.shape.num_layers
        self._room = [0] * self._drives.count  # blocks held, by drive
        self._cut = False  # whether tokens were ever forgotten: blocks then hold less than they could
        self._fresh: Fresh | None = None
        self._staging: np.ndarray | None = None
        self._shipper = Shipper()
        self._buffers: list[np.ndarray] = []
        self._number, self._generation = 0, self._drives.generation
        self._memory, self._flash = process.charge(PROCESS, 0), disk.charge(FLASH, 0)
        try:
            self._memory.resize(self._drives.count * layout.sequence_bytes(0))
            self._drives.allow(self._memory.nbytes)
            for sizes, dtype in buffer_shapes(self.shape):
                self._buffers.append(self.arena.allocate(LINK, sizes, dtype))
        except BaseException:
            self._close()
            raise

    def _begin(self) -> None:
        number = self._drives.new_number()
        try:
            self._drives.all(Op.BEGIN, sequence=number)
        except BaseException:
            self._close()
            raise
        self._number = number

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner; `tiers` says which of them are not the host's."""
        return held_bytes(settings_of(policy, shape, capacity_tokens), shape, num_tokens, prefill_tokens)

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes of pages, and of rows that wait for one, that a decode step reads inside the storage processes.

        Where tokens are chosen: with every chosen one in a page of its own, so that it is at most this.
        """
        return step_bytes(settings_of(policy, shape, max(num_tokens, 1)), num_tokens)

    @staticmethod
    def processes(policy: Policy, shape: CacheShape) -> int:
        """Processes beside the host's, each with an interpreter of its own."""
        return settings_of(policy, shape, 1).drives

    @property
    def policy(self) -> str:
        return str(self._policy)

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        staged = allocated_bytes(self._staging.nbytes) if self._staging is not None else 0
        own = sum(allocated_bytes(buffer.nbytes) for buffer in self._buffers)
        return own + staged + self._memory.nbytes + self._flash.nbytes + self._drives.shared_bytes

    # ---- a pass ------------------------------------------------------------------------------------------------------

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held = self._lengths[layer]
        self._check_append(held, len(k), positions)
        if layer == 0:
            self._make_room(len(k), held + len(k))
        self._fresh = Fresh(layer, k, v)
        self._lengths[layer] = held + len(k)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        fresh = self._fresh
        if fresh is not None and (fresh.layer != layer or fresh.sent):
            fresh = None
        for begin in range(0, len(q), QUERY_ROWS):
            rows = slice(begin, min(begin + QUERY_ROWS, len(q)))
            part = None if stats is None else stats[rows]
            if fresh is not None and max(len(fresh.k), len(q)) > 1:
                self._attend_both(layer, q[rows], int(positions[rows][0]), (fresh.k, fresh.v), out[rows], part)
                continue
            new = (fresh.k, fresh.v) if fresh is not None else None
            sparse = Flag.SPARSE if len(q) == 1 else Flag(0)
            self._attend_there(layer, q[rows], int(positions[rows][0]), new, sparse, out[rows], part)
            if fresh is not None:
                fresh.sent = True
        return out

    def _attend_both(
        self, layer: int, q: np.ndarray, first: int, new: tuple[np.ndarray, np.ndarray], out: np.ndarray,
        stats: np.ndarray | None,
    ) -> None:  # fmt: skip
        """A prompt's queries: over its own tokens here, over earlier ones there."""
        held = self._lengths[layer] - len(new[0])
        here = self._buffers[2][0, : len(q)] if stats is None else stats
        attend_float(
            q, *new, scale=self.shape.logit_scale, first_position=first, window=self.shape.window(layer),
            key_start=held, out=out, stats=here if held else stats,
        )  # fmt: skip
        if not held:
            return
        self._shipper.wait()
        part, there = self._buffers[3][: len(q)], self._buffers[2][1, : len(q)]
        self._attend_there(layer, q, first, None, Flag(0), part, there)
        for begin in range(0, len(q), MERGED_ROWS):
            some = slice(begin, begin + MERGED_ROWS)
            out[some], here[some] = merge_partials([out[some], part[some]], [here[some], there[some]])

    def _attend_there(
        self, layer: int, q: np.ndarray, first: int, new: tuple[np.ndarray, np.ndarray] | None, flags: Flag,
        out: np.ndarray, stats: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Sends queries, and a new token where there is one; each drive answers for its heads."""
        layout = self.settings.layout
        flags |= (Flag.NEW_ROW if new is not None else Flag(0)) | (Flag.STATS if stats is not None else Flag(0))
        asked, answered = self._buffers[:2]
        shape = (len(q), layout.heads, layout.head_dim)
        numbers = int(np.prod(shape))
        replies = []
        for drive, link in enumerate(self._drives):
            heads, kv_heads = self.settings.heads(drive)
            parts = [np.ascontiguousarray(row[:, kv_heads], np.float16) for row in new or ()]
            sent = asked[drive * numbers : (drive + 1) * numbers].reshape(shape)
            sent[:] = q[:, heads]
            got = answered[drive * numbers : (drive + 1) * numbers].reshape(shape)
            found = np.empty((*shape[:2], 2), np.float32) if stats is not None else None
            into = [got] if found is None else [got, found]
            replies.append((heads, got, found))
            header = {"flags": int(flags), "layer": layer, "sequence": self._number, "number": len(q), "first": first}
            self._drives.ask(link, Op.ATTEND, parts=[*parts, sent], into=into, **header)
        self._drives.answers()
        for heads, got, found in replies:
            out[:, heads] = got
            if stats is not None and found is not None:
                stats[:, heads] = found

    def settle(self, layer: int) -> None:
        last = layer == self.shape.num_layers - 1
        fresh, self._fresh = self._fresh, None
        if fresh is not None and not fresh.sent:
            k, v = fresh.k, fresh.v
            if self._staging is None:
                self._ship(layer, np.stack([k, v]).astype(np.float16))
            else:
                staged = self._staging[layer % len(self._staging), :, : len(k)]
                self._shipper.wait(leaving=len(self._staging) - 1)
                staged[0], staged[1] = k, v
                self._shipper.submit(partial(self._ship, layer, staged))
        if last:
            self._shipper.wait()
            self._unstage()

    def _ship(self, layer: int, rows: np.ndarray) -> None:
        """Sends a layer's new rows [2, n, Hkv, D], as many at a time as a request holds."""
        for begin in range(0, rows.shape[1], QUERY_ROWS):
            piece = rows[:, begin : begin + QUERY_ROWS]
            for drive, link in enumerate(self._drives):
                own = np.ascontiguousarray(piece[:, :, self.settings.heads(drive)[1]])
                self._drives.ask(
                    link, Op.APPEND, parts=[own], layer=layer, sequence=self._number, number=piece.shape[1]
                )
            self._drives.answers()

    def _make_room(self, count: int, end: int) -> None:
        """All that a pass takes, before a layer has changed: staging, memory and blocks of the drives."""
        if not self._alive:
            raise StorageLost("the storage process of this cache is gone: read the prompt again")
        before = self._memory.nbytes, self._flash.nbytes
        try:
            if count > 1 and self._staging is None:
                self._staging = self.arena.allocate(STAGING, staging_shape(self.shape, count), np.float16)
            wanted = [self.settings.layout.blocks(end)] * self._drives.count
            if self._cut and end // self.settings.layout.group > (end - count) // self.settings.layout.group:
                wanted = self._drives.all(Op.PLAN, sequence=self._number, number=end)
            self._charge(end, max(sum(wanted), sum(self._room)))
            if sum(wanted) > sum(self._room):
                self._room = self._drives.all(Op.RESERVE, sequence=self._number, number=end)
        except BaseException:
            self._unstage()
            self._flash.resize(before[1])
            self._drives.allow(before[0] - self._memory.nbytes)
            self._memory.resize(before[0])
            raise

    def _charge(self, num_tokens: int, blocks: int) -> None:
        """Counts what so many tokens and blocks take of the drives, on the ledger and for the processes themselves."""
        layout, before = self.settings.layout, self._memory.nbytes
        self._memory.resize(self._drives.count * layout.sequence_bytes(num_tokens))
        self._drives.allow(self._memory.nbytes - before)
        self._flash.resize(blocks * layout.pages_per_block * layout.page_bytes)
        self._drives.expect(self._flash.nbytes // self._drives.count)

    @property
    def _alive(self) -> bool:
        return self._drives.alive and self._generation == self._drives.generation

    def _unstage(self) -> None:
        if self._staging is not None:
            self.arena.free(self._staging)
            self._staging = None

    # ---- all of it ---------------------------------------------------------------------------------------------------

    def rows(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        pieces = list(self.fetch(layer, begin, end))
        keys, values = (np.concatenate([piece[which] for piece in pieces]) for which in range(2))
        return keys.astype(np.float32), values.astype(np.float32)

    def fetch(self, layer: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """Keys and values [2, n, Hkv, D] float16 over the link, piece by piece; the next is read meanwhile."""
        return self._drives.fetch(self._number, layer, begin, end)

    def rewindable(self, length: int) -> int:
        return length if self._alive else 0

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        self._fresh = None
        self._shipper.stop()
        self._unstage()
        self._lengths = [length] * self.shape.num_layers
        if self._alive:
            with contextlib.suppress(StorageLost):
                self._cut = length > 0
                self._room = self._drives.all(Op.TRUNCATE, sequence=self._number, number=length)
                self._charge(length, sum(self._room))
        if length == 0 and not self._alive:
            self._close()
            if not self._drives.alive:
                self._drives.restart()
            self._open()
            self._begin()

    def fork(self) -> InstInferCache:
        other, length = copy.copy(self), self.length
        self._drives.share()
        try:
            other._open()
            try:
                number = self._drives.new_number()
                other._charge(length, self._drives.count * self.settings.layout.blocks(length))
                other._room = self._drives.all(Op.FORK, sequence=self._number, number=number)
            except BaseException:
                other._close()
                raise
        except BaseException:
            self._drives.drop()
            raise
        other._number, other._lengths = number, list(self._lengths)
        return other

    def release(self) -> None:
        if self._buffers:
            self._close()
            self._drives.drop()

    def _close(self) -> None:
        self._shipper.stop()
        self._unstage()
        if self._number and self._alive:
            with contextlib.suppress(StorageLost):
                self._drives.all(Op.RECLAIM, sequence=self._number)
        for buffer in self._buffers:
            self.arena.free(buffer)
        self._buffers = []
        if self._generation == self._drives.generation:
            self._drives.allow(-self._memory.nbytes)
        self._memory.release()
        self._flash.release()

    def report(self) -> dict[str, object]:
        return self._drives.report()
