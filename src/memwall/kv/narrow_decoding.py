"""The next tokens of several caches of compact and recent keys at once: two calls a layer, and one to join them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from memwall.kernels.parts import PLACES, append_parts, attend_parts
from memwall.kv.decoding import Decoding
from memwall.kv.narrow_store import join_two

if TYPE_CHECKING:
    from memwall.kv.narrow_store import NarrowFloat


class NarrowDecoding(Decoding):
    """Caches of float rows, some of whose keys have fewer channels."""

    def __init__(self, caches: Sequence[NarrowFloat]) -> None:
        super().__init__(caches)
        self._narrow, self.shape = list(caches), caches[0].shape
        pairs = [list(zip(*layer)) for layer in zip(*(cache.parts() for cache in caches))]
        self._recent, self._compact = ([list(layer[which]) for layer in pairs] for which in (0, 1))
        self._narrowed = [cache.times_narrowed for cache in caches]
        self._own: dict[int, np.ndarray] = {}

    def stands(self) -> bool:
        """Not where a cache has read another prompt: its channels are others."""
        return self._narrowed == [cache.times_narrowed for cache in self._narrow]

    def _gather(self, layer: int) -> np.ndarray:
        """Where among all numbers of a layer's queries those are that meet compact keys: [n, H, channels]."""
        channels = np.stack([cache.channels_of(layer) for cache in self._narrow]).astype(np.int32)
        n, heads, dim = len(channels), self.shape.num_heads, self.shape.head_dim
        own = np.repeat(channels, heads // self.shape.num_kv_heads, axis=1)
        return own + dim * np.arange(n * heads, dtype=np.int32).reshape(n, heads, 1)

    def begin(self) -> None:
        held, cut = np.array([cache.begin_decode() for cache in self._narrow], np.int64).T
        self._rows = np.stack([held - cut, held], axis=1)
        self._in_recent, self._in_compact = (np.zeros((len(held), PLACES), np.int64) for _ in range(2))
        self._in_recent[:, 4] = cut
        self._in_recent[:, 5], self._in_recent[:, 6] = held - cut + 1, held - cut
        self._in_compact[:, 5], self._in_compact[:, 6] = cut, held
        self._cut = cut > 0

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        append_parts(self._recent[layer], k, v, self._rows)

    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        scale, window, cut = self.shape.logit_scale, self.shape.window(layer), slice(first, first + len(q))
        both = np.empty((2, *q.shape[:2], 2), np.float32)
        recent, places = self._recent[layer][cut], self._in_recent[cut]
        attend_parts(recent, q, places, out=out, stats=both[1], scale=scale, window=window)
        some, parts = self._cut[cut], self._compact[layer][cut]
        if not some.any():
            return
        if layer not in self._own:
            self._own[layer] = self._gather(layer)
        narrow, places = q.take(self._own[layer][cut] - first * q[0].size), self._in_compact[cut]
        joined = out
        if not some.all():
            rows = np.flatnonzero(some)
            narrow, places, parts = narrow[rows], places[rows], [parts[i] for i in rows]
            joined, both = out[rows], both.take(rows, axis=1)
        found = np.empty_like(joined)
        attend_parts(parts, narrow, places, out=found, stats=both[0], scale=scale, window=window)
        join_two(found, joined, both)
        if joined is not out:
            out[rows] = joined

    def settle(self, layer: int) -> None:
        if layer == self.shape.num_layers - 1:
            for cache in self._narrow:
                cache.end_decode()
