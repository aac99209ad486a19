"""Stores of two segments: older keys with some channels left out, then recent ones at full width; values in full.

What chooses the channels (`kv.think`) tells the store per layer, once, when a prompt has been attended to.
`NarrowFloat` keeps float rows: compact keys of [tokens, Hkv, n], recent keys of [tokens, Hkv, D]. `NarrowKivi` is KIVI
whose coded keys are compact: its residual is the recent segment, and what leaves it later keeps the same channels.

A query meets compact keys with the same channels of its own, recent keys in full; the two partial attentions are
merged. The scale of logits stays that of D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from memwall.kernels import attention
from memwall.kernels.parts import CachePart, float_part
from memwall.kv.base import CacheShape, KVCache
from memwall.kv.decoding import Decoding, OneByOne
from memwall.kv.float_store import OWNER, GrowingRows, float_dtype
from memwall.kv.kivi import KiviCache
from memwall.kv.policy import Policy
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

COMPACT = "kv/compact"
CODED_AT_ONCE = 256
"""Rows narrowed together before they are coded: a prompt's would be a copy that no ledger knows."""

Part = Callable[[np.ndarray, np.ndarray, np.ndarray], object]


def narrow_rows(rows: np.ndarray, channels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Each head's own channels [Hkv, n] of rows [tokens, Hkv, D]: [tokens, Hkv, n]."""
    if out is None:
        out = np.empty((len(rows), *channels.shape), rows.dtype)
    for head, own in enumerate(channels):
        out[:, head] = rows[:, head, own]
    return out


def attend_two(
    q: np.ndarray, channels: np.ndarray, out: np.ndarray, stats: np.ndarray | None, compact: Part, recent: Part
) -> np.ndarray:
    """Joins two attentions; each part is called with queries, an output and its stats to fill.

    compact gets of each query [T, H, D] the channels [Hkv, n] that its keys have.
    """
    own = np.repeat(channels.astype(np.intp), q.shape[1] // len(channels), axis=0)
    narrow = np.ascontiguousarray(q[:, np.arange(q.shape[1])[:, None], own])
    first, both = np.empty_like(out), np.empty((2, len(q), q.shape[1], 2), np.float32)
    compact(narrow, first, both[0])
    recent(q, out, both[1])
    join_two(first, out, both, stats)
    return out


def join_two(first: np.ndarray, out: np.ndarray, both: np.ndarray, stats: np.ndarray | None = None) -> None:
    """Joins what the same queries found in compact keys, first [T, H, D], and in recent ones, out, into out. both
    [2, T, H, 2]: their stats.
    """
    peak = both[..., 0].max(axis=0)
    # a query's own token is always among the recent ones, so that the higher peak is a number
    weights = both[..., 1] * np.exp(both[..., 0] - peak)
    total = weights.sum(axis=0)
    weights /= total
    out *= weights[1, ..., None]
    first *= weights[0, ..., None]
    out += first
    if stats is not None:
        stats[..., 0], stats[..., 1] = peak, total


def _where(shape: CacheShape, layer: int, positions: np.ndarray) -> dict[str, Any]:
    """What both parts of an attention share."""
    return {"scale": shape.logit_scale, "first_position": int(positions[0]), "window": shape.window(layer)}


class NarrowFloat(KVCache):
    """Float rows; `recent` keys stay at full width when a prompt is narrowed to `width` channels."""

    waits = True
    """Whether keys can be narrowed after segments of a prompt have been stored."""

    def __init__(
        self, policy: Policy, shape: CacheShape, arena: Arena, capacity_tokens: int, width: int, recent: int
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self._policy, self.width, self.recent = policy, width, recent
        dtype, layers = float_dtype(policy.name), range(shape.num_layers)
        slim = replace(shape, head_dim=width)
        self._compact = [GrowingRows(arena, COMPACT, capacity_tokens, slim, dtype) for _ in layers]
        self._keys = [GrowingRows(arena, OWNER, capacity_tokens, shape, dtype) for _ in layers]
        self._values = [GrowingRows(arena, OWNER, capacity_tokens, shape, dtype) for _ in layers]
        self._channels: list[np.ndarray | None] = [None] * shape.num_layers
        self._narrow = [0] * shape.num_layers
        self._lengths = [0] * shape.num_layers
        self._narrowing = False
        self.times_narrowed = 0
        """Counts layers whose channels have come: after another prompt they are others."""
        self._prompt: tuple[np.ndarray, np.ndarray] | None = None
        self._parts: list[tuple[CachePart, CachePart]] = []

    @property
    def policy(self) -> str:
        return str(self._policy)

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (*self._compact, *self._keys, *self._values))

    def begin_pass(self, *, narrowing: bool) -> None:
        """Before a pass's first `append`: whether each layer of it will be narrowed before it settles."""
        self._narrowing = narrowing

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held = self._lengths[layer]
        self._check_append(held, len(k), positions)
        end = held + len(k)
        at_once = self._narrowing and held == 0  # keys go to their segments when they are narrowed, not before
        for each in range(self.shape.num_layers) if layer == 0 else [layer]:
            self._values[each].reserve(end)
            if self._narrowing:
                self._compact[each].reserve(end - self.recent)
            self._keys[each].reserve(self.recent if at_once else end - self._narrow[layer])
        self._values[layer].rows(held, end)[:] = v
        if not at_once:
            self._keys[layer].rows(held - self._narrow[layer], end - self._narrow[layer])[:] = k
        self._prompt = (k, v) if at_once else None
        self._lengths[layer] = end

    def narrow(self, layer: int, channels: np.ndarray) -> None:
        """All but the recent keys keep only these channels [Hkv, n], in order."""
        count = self._lengths[layer] - self.recent
        keys = self._prompt[0] if self._prompt is not None else self._keys[layer].rows(0, count + self.recent)
        narrow_rows(keys[:count], channels, self._compact[layer].rows(0, count))
        self._keys[layer].rows(0, self.recent)[:] = keys[count:].copy()
        self._keys[layer].shrink(self.recent)
        self._narrow[layer] = count
        self.narrowed_by(layer, channels)

    def narrowed_by(self, layer: int, channels: np.ndarray) -> None:
        """The array that holds a layer's channels."""
        self._channels[layer] = channels
        self.times_narrowed += 1

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        where = _where(self.shape, layer, positions)
        if self._prompt is not None:
            return attention.attend_float(q, *self._prompt, **where, out=out, stats=stats)
        end, cut, channels = self._lengths[layer], self._narrow[layer], self._channels[layer]
        keys, values = self._keys[layer].rows(0, end - cut), self._values[layer].rows(0, end)
        if channels is None or not cut:
            return attention.attend_float(q, keys, values, **where, out=out, stats=stats)
        old = self._compact[layer].rows(0, cut)
        return attend_two(
            q, channels, out, stats,
            lambda q, out, stats: attention.attend_float(q, old, values[:cut], **where, out=out, stats=stats),
            lambda q, out, stats: attention.attend_float(
                q, keys, values[cut:], **where, key_start=cut, out=out, stats=stats
            ),
        )  # fmt: skip

    def settle(self, layer: int) -> None:
        self._prompt = None

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        from memwall.kv.narrow_decoding import NarrowDecoding

        return NarrowDecoding(cast("Sequence[NarrowFloat]", caches))

    def parts(self) -> list[tuple[CachePart, CachePart]]:
        """Each layer's recent keys and its compact ones, with the values, as kernels take them; the same ones as long
        as the cache lives.
        """
        if not self._parts:
            self._parts = [
                (float_part(keys.capacity(), values.capacity()), float_part(compact.capacity(), values.capacity()))
                for keys, compact, values in zip(self._keys, self._compact, self._values)
            ]
        return self._parts

    def begin_decode(self) -> tuple[int, int]:
        """Makes room for another token in all layers, or raises with all that is held as it was. Gives how many tokens
        there are, and how many of them have compact keys; layers differ only within a forward pass.
        """
        held, cut = self.length, self._narrow[0]
        self._check_room(held, 1)
        self._narrowing = False
        if not (self._values[-1].has(held + 1) and self._keys[-1].has(held + 1 - cut)):
            for keys, values in zip(self._keys, self._values):
                values.reserve(held + 1)
                keys.reserve(held + 1 - cut)
        return held, cut

    def end_decode(self) -> None:
        """The token is held."""
        self._lengths = [self._lengths[0] + 1] * self.shape.num_layers

    def channels_of(self, layer: int) -> np.ndarray:
        """Of compact keys [Hkv, n]; any where there are none."""
        channels = self._channels[layer]
        return np.zeros((self.shape.num_kv_heads, self.width), np.uint16) if channels is None else channels

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        self._prompt = None
        for layer in range(self.shape.num_layers):
            self._narrow[layer] = min(self._narrow[layer], length)
            self._lengths[layer] = length
            self._compact[layer].shrink(self._narrow[layer])
            self._keys[layer].shrink(length - self._narrow[layer])
            self._values[layer].shrink(length)

    def fork(self) -> NarrowFloat:
        other = NarrowFloat(self._policy, self.shape, self.arena, self.capacity_tokens, self.width, self.recent)
        length = self.length
        try:
            for layer, cut in enumerate(self._narrow):
                for name, count in (("_compact", cut), ("_keys", length - cut), ("_values", length)):
                    mine, theirs = getattr(self, name)[layer], getattr(other, name)[layer]
                    theirs.reserve(count)
                    theirs.rows(0, count)[:] = mine.rows(0, count)
        except BaseException:
            other.release()
            raise
        other._channels, other._narrow = list(self._channels), list(self._narrow)
        other._lengths = [length] * self.shape.num_layers
        return other

    def release(self) -> None:
        self._parts = []
        for rows in (*self._compact, *self._keys, *self._values):
            rows.release()


class NarrowKivi(KiviCache):
    """KIVI over the channels that are left: coded keys are compact, exact ones and values in full."""

    waits = False

    def __init__(self, policy: Policy, shape: CacheShape, arena: Arena, capacity_tokens: int, width: int) -> None:
        self.width = width
        self._channels: list[np.ndarray | None] = [None] * shape.num_layers
        super().__init__(policy, shape, arena, capacity_tokens)

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        return OneByOne(caches)

    def begin_pass(self, *, narrowing: bool) -> None:
        """As `NarrowFloat.begin_pass`; from a narrowed prompt on all keys are coded at its width."""
        if narrowing:
            self.key_dim = self.width

    def narrow(self, layer: int, channels: np.ndarray) -> None:
        """What is coded from now on keeps only these channels [Hkv, n], in order."""
        self.narrowed_by(layer, channels)

    def narrowed_by(self, layer: int, channels: np.ndarray) -> None:
        """The array that holds a layer's channels."""
        self._channels[layer] = channels

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        state, channels = self._layers[layer], self._channels[layer]
        if channels is None or not state.coded_keys:
            return super().attend(layer, q, positions, out, stats)
        keys, values = self._exact(layer)
        coded = min(state.coded_values, state.coded_keys)
        cut = state.coded_keys - coded  # exact values whose keys are coded
        if state.coded_values > coded:  # fewer than a cycle: with no residual, or after `truncate`
            rest = np.empty((state.coded_values - coded, *values.shape[1:]), np.float32)
            form = {"bits": self.settings.bits, "group": self.settings.group}
            attention.kivi_decode_values(state.value_blocks.bytes, coded, rest, **form)
            values = np.concatenate([rest, values.astype(np.float32)])
        where = _where(self.shape, layer, positions)
        none = np.empty((0, *channels.shape), np.float32)
        return attend_two(
            q, channels, out, stats,
            lambda q, out, stats: attention.attend_kivi(
                q, state.key_blocks.bytes, state.value_blocks.bytes, none, values[:cut],
                coded_keys=state.coded_keys, coded_values=coded,
                bits=self.settings.bits, group=self.settings.group, key_group=self.settings.key_tokens,
                integers=self.settings.integers,
                **where, out=out, stats=stats,
            ),
            lambda q, out, stats: attention.attend_float(
                q, keys, values[cut:], **where, key_start=state.coded_keys, out=out, stats=stats
            ),
        )  # fmt: skip

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if length == 0:
            self.key_dim = self.shape.head_dim
            self._channels = [None] * self.shape.num_layers

    def fork(self) -> NarrowKivi:
        other = super().fork()
        assert isinstance(other, NarrowKivi)
        other.key_dim, other._channels = self.key_dim, list(self._channels)
        return other

    def _empty(self) -> NarrowKivi:
        return NarrowKivi(self._policy, self.shape, self.arena, self.capacity_tokens, self.width)

    def _encode_keys(self, layer: int, keys: np.ndarray, first: int) -> None:
        channels = self._channels[layer]
        if channels is None:
            super()._encode_keys(layer, keys, first)
            return
        step = round_up(CODED_AT_ONCE, self.settings.key_tokens)
        for begin in range(0, len(keys), step):
            super()._encode_keys(layer, narrow_rows(keys[begin : begin + step], channels), first + begin)

    def _decode_keys(self, layer: int, first: int, out: np.ndarray) -> None:
        channels = self._channels[layer]
        if channels is None:
            super()._decode_keys(layer, first, out)
            return
        narrow = np.empty((len(out), *channels.shape), np.float32)
        super()._decode_keys(layer, first, narrow)
        out[:] = 0  # what was left out is gone
        for head, own in enumerate(channels):
            out[:, head, own] = narrow[:, head]
