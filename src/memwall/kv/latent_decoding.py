"""The next tokens of several caches of latent rows at once: all their keys are rebuilt and attended to in one call.

What a query finds in its own token, in those that its cache kept whole and in rebuilt ones is joined, as the cache by
itself joins it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from memwall.kernels.parts import PLACES, attend_parts, float_part, join_pieces
from memwall.kv.decoding import OneByOne
from memwall.kv.latent import attend_rebuilt, sums_rows

if TYPE_CHECKING:
    from memwall.kernels.parts import CachePart
    from memwall.kv.latent import LatentCache

Found = tuple[np.ndarray, np.ndarray]
"""Outputs [n, H, D] and their stats [n, H, 2]."""


class LatentDecoding(OneByOne):
    """Caches of latent rows. One of so few tokens that it would rebuild their values attends by itself."""

    def __init__(self, caches: Sequence[LatentCache]) -> None:
        super().__init__(caches)
        self._latent, self.shape, self._rotary = list(caches), caches[0].shape, caches[0].model.rotary
        self._rebuilt = [list(parts) for parts in zip(*(cache.layer_parts() for cache in caches))]
        layers = range(self.shape.num_layers)
        self._whole = [[float_part(*cache.kept_whole(layer)) for cache in caches] for layer in layers]
        self._places: dict[int | None, np.ndarray] = {}

    def begin(self) -> None:
        super().begin()
        windows = {self.shape.window(layer): layer for layer in range(self.shape.num_layers)}
        self._places = {
            window: np.array([cache.place(layer) for cache in self._latent]) for window, layer in windows.items()
        }
        count = np.array([cache.num_whole(0) for cache in self._latent])
        self._kept = np.zeros((len(count), PLACES), np.int64)
        self._kept[:, 5] = self._kept[:, 6] = count
        self._own = np.zeros_like(self._kept)
        self._own[:, 3] = self._own[:, 4] = np.arange(len(count))
        self._own[:, 5] = 1

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        super().append(layer, k, v)
        self._new = float_part(k, v)

    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        cut = slice(first, first + len(q))
        places, kept, scale = self._places[self.shape.window(layer)][cut], self._kept[cut], self.shape.logit_scale
        stats = self._attend(layer, [self._new] * len(q), q, self._own[cut], out)
        some = np.flatnonzero(kept[:, 5])
        if len(some):
            part = np.empty_like(q[some])
            windows = [self._whole[layer][first + i] for i in some]
            part_stats = self._attend(layer, windows, q[some], kept[some], part)
            _join((out, stats), some, (part, part_stats))
        held = places[:, 2] > 0
        sums = np.array([sums_rows(self.shape.num_heads, int(seen), int(count)) for _, _, count, seen in places])
        for i in np.flatnonzero(held & ~sums):
            row = slice(i, i + 1)
            self._latent[first + i].attend(layer, q[row], self._at[first + i], out[row])
        some = np.flatnonzero(held & sums)
        if len(some):
            for i in some:
                self._latent[first + i].make_ready(layer)
            parts = [self._rebuilt[layer][first + i] for i in some]
            _join((out, stats), some, attend_rebuilt(parts, q[some], places[some], self._rotary, scale))

    def _attend(
        self, layer: int, parts: list[CachePart], q: np.ndarray, places: np.ndarray, out: np.ndarray
    ) -> np.ndarray:
        stats = np.empty((*q.shape[:2], 2), np.float32)
        scale, window = self.shape.logit_scale, self.shape.window(layer)
        attend_parts(parts, q, places, scale=scale, window=window, out=out, stats=stats)
        return stats


def _join(found: Found, some: np.ndarray, other: Found) -> None:
    """Joins what queries `some` found in other tokens into what all found."""
    pairs = (np.stack([all_[some], part], axis=1) for all_, part in zip(found, other))
    outs, stats = (pair.reshape(-1, *pair.shape[2:]) for pair in pairs)
    join_pieces(outs, stats, np.arange(2, len(outs) + 1, 2), *other)
    for all_, part in zip(found, other):
        all_[some] = part
