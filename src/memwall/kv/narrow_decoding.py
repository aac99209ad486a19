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

    def stands(self) -> bool:
        return True

    def begin(self) -> None:
        held, cut = np.array([cache.begin_decode() for cache in self._narrow], np.int64).T
        self._rows = np.stack([held - cut, held], axis=1)
        self._in_recent, self._in_compact = (np.zeros((len(held), PLACES), np.int64) for _ in range(2))
        self._in_recent[:, 4] = cut
        self._in_recent[:, 5], self._in_recent[:, 6] = held - cut + 1, held - cut
        self._in_compact[:, 5], self._in_compact[:, 6] = cut, held
        self._cut = np.flatnonzero(cut)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        append_parts(self._recent[layer], k, v, self._rows)

    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        scale, window, end = self.shape.logit_scale, self.shape.window(layer), first + len(q)
        stats = np.empty((*q.shape[:2], 2), np.float32)
        recent, places = self._recent[layer][first:end], self._in_recent[first:end]
        attend_parts(recent, q, places, out=out, stats=stats, scale=scale, window=window)
        some = self._cut[(self._cut >= first) & (self._cut < end)]
        if not len(some):
            return
        rows = some - first
        channels = np.stack([self._narrow[i].channels_of(layer) for i in some]).astype(np.intp)
        own = np.repeat(channels, self.shape.num_heads // self.shape.num_kv_heads, axis=1)
        narrow, parts = np.take_along_axis(q[rows], own, axis=2), [self._compact[layer][i] for i in some]
        found, joined, compact = np.empty_like(out[rows]), out[rows], np.empty_like(stats[rows])
        attend_parts(parts, narrow, self._in_compact[some], out=found, stats=compact, scale=scale, window=window)
        join_two(found, joined, np.stack([compact, stats[rows]]))
        out[rows] = joined

    def settle(self, layer: int) -> None:
        if layer == self.shape.num_layers - 1:
            for cache in self._narrow:
                cache.end_decode()
