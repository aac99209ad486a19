"""The next tokens of several lambda-shaped caches at once: each sees pieces of its ring, and its sinks.

A query is turned anew for every piece (`kv.ring`), so the queries of all pieces of all caches are turned, attended with
and joined together, a layer at a time; what is turned by how much, and where it lies, is found once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from memwall import kernels
from memwall.kernels.parts import append_parts, attend_parts, encode_parts, join_pieces
from memwall.kv.decoding import Decoding, OneByOne

if TYPE_CHECKING:
    from memwall.kernels.parts import CachePart
    from memwall.kv.lambda_shaped import LambdaCache


class LambdaDecoding(Decoding):
    """Caches whose next token is one for the ring; where one's is not, they go one by one."""

    def __init__(self, caches: Sequence[LambdaCache]) -> None:
        super().__init__(caches)
        self._shaped, self.shape = list(caches), caches[0].shape
        self._layers = [list(parts) for parts in zip(*(cache.parts() for cache in caches))]
        self._rings: list[list[CachePart]] = [[parts[0] for parts in layer] for layer in self._layers]
        self._pieces: tuple[list[tuple[int, int]], list[list[CachePart]]] = ([], [])
        self._singly = None if all(cache.steady for cache in caches) else OneByOne(caches)

    def stands(self) -> bool:
        return self._singly is None and all(cache.steady for cache in self._shaped)

    def begin(self) -> None:
        if self._singly is not None:
            self._singly.begin()
            return
        told = [cache.begin_decode() for cache in self._shaped]
        self._rows = np.array([(token.row, token.row) for token, _ in told], np.int64)
        self._coding = [i for i, (token, _) in enumerate(told) if token.coding[1]]
        self._jobs = np.array([told[i][0].coding * 2 for i in self._coding], np.int64)
        self._find_pieces([[(i, part) for part, _, _ in seen] for i, (_, seen) in enumerate(told)])
        self._places = np.array([places for _, seen in told for _, _, places in seen], np.int64)
        self._turn([by for _, seen in told for _, by, _ in seen])

    def _find_pieces(self, whose: list[list[tuple[int, int]]]) -> None:
        """The parts of all pieces: mostly those of the step before."""
        self._ends = np.cumsum([len(seen) for seen in whose])
        pieces = [piece for seen in whose for piece in seen]
        if pieces != self._pieces[0]:
            self._pieces = pieces, [[layer[i][part] for i, part in pieces] for layer in self._layers]
            self._owners = np.array([i for i, _ in pieces])

    def _turn(self, by: list[int]) -> None:
        rotary = self._shaped[0].rotary
        cos, sin = rotary.at(np.array(by, np.float32))
        factor = np.float32(rotary.rope.attention_factor)  # a turn leaves YaRN's in the queries as it is
        self._cos, self._sin = cos / factor, sin / factor

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        if self._singly is not None:
            self._singly.append(layer, k, v)
            return
        rings = self._rings[layer]
        append_parts(rings, k, v, self._rows)
        if self._coding:
            encode_parts([rings[i] for i in self._coding], self._jobs)

    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        if self._singly is not None:
            self._singly.attend(layer, q, out, first)
            return
        begin, end = self._ends[first - 1] if first else 0, self._ends[first + len(q) - 1]
        cut = slice(begin, end)
        turned = kernels.rope(q[self._owners[cut] - first], self._cos[cut], self._sin[cut])
        outs, stats = np.empty_like(turned), np.empty((*turned.shape[:2], 2), np.float32)
        scale = self.shape.logit_scale
        attend_parts(self._pieces[1][layer][cut], turned, self._places[cut], scale=scale, out=outs, stats=stats)
        join_pieces(outs, stats, self._ends[first : first + len(q)] - begin, out)

    def settle(self, layer: int) -> None:
        if self._singly is not None:
            self._singly.settle(layer)
        elif layer == self.shape.num_layers - 1:
            for cache in self._shaped:
                cache.end_decode()
