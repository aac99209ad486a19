"""A new token for each of several caches at once: what a server's step does where each request has a cache of its own.

The decoder appends, attends and settles a layer at a time, as with one cache (`kv.base`). `OneByOne` does so cache
after cache, and does for any policy. A policy whose caches can be asked together says how in `KVCache.decode_together`:
plain rows and KIVI's codes are `kernels.parts`, one native call for all caches (`PartsDecoding`); who holds what is
left of a prompt in another cache hands the tokens on to it (`InnerDecoding`). What comes out is the same to the bit.

Shapes: n caches, one new token each; H query heads, Hkv key-value heads, D numbers a head; floats are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memwall.kernels.parts import PLACES, CachePart, append_parts, attend_parts, encode_parts

if TYPE_CHECKING:
    from memwall.kv.base import CacheShape, KVCache

ROWS, JOBS = 2, 6


class Decoding(ABC):
    """Several caches of one policy and shape, and the next token of each."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = list(caches)

    @abstractmethod
    def stands(self) -> bool:
        """Whether it does for the token that comes next: caches may have changed since the last one."""

    @abstractmethod
    def begin(self) -> None:
        """Another token comes to each: makes room in all layers.

        BudgetExceeded or DoesNotFit, with all that the caches hold as it was, where there is none.
        """

    def take_inputs(self, layer: int, x: np.ndarray, first: int) -> None:
        """See `KVCache.take_inputs`; x [m, d] of caches `first .. first + m`."""
        raise NotImplementedError

    @abstractmethod
    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        """Takes k, v [n, Hkv, D]."""

    @abstractmethod
    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        """Attention of q [m, H, D], the queries of caches `first .. first + m`, into out of the same shape."""

    @abstractmethod
    def settle(self, layer: int) -> None:
        """See `KVCache.settle`; after the last layer's the tokens are held."""


class OneByOne(Decoding):
    """Each cache by itself."""

    def stands(self) -> bool:
        return True

    def begin(self) -> None:
        self._at = [np.array([cache.length], np.int64) for cache in self.caches]

    def take_inputs(self, layer: int, x: np.ndarray, first: int) -> None:
        for i in range(len(x)):
            self.caches[first + i].take_inputs(layer, x[i : i + 1], self._at[first + i])

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        for i, cache in enumerate(self.caches):
            cache.append(layer, k[i : i + 1], v[i : i + 1], self._at[i])

    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        for i in range(len(q)):
            self.caches[first + i].attend(layer, q[i : i + 1], self._at[first + i], out[i : i + 1])

    def settle(self, layer: int) -> None:
        for cache in self.caches:
            cache.settle(layer)


class PartedCache(Protocol):
    """A cache whose layers are parts."""

    shape: CacheShape

    def parts(self) -> list[CachePart]:
        """Of each layer; the same ones as long as the cache lives."""

    def begin_decode(self) -> tuple[int, ...]:
        """Makes room for another token in all layers, or raises with all that is held as it was. Gives what all layers
        do for it: the rows that it goes to (`append_parts`), its places (`attend_parts`), and what is coded behind it
        (`encode_parts`): ROWS + PLACES + JOBS numbers.
        """

    def end_decode(self) -> None:
        """That was done in all layers: the token is held."""


class PartsDecoding(Decoding):
    """Caches that are parts: one call for all of them, three a layer where they code."""

    def __init__(self, caches: Sequence[KVCache], parted: Sequence[PartedCache]) -> None:
        """parted: the caches as such."""
        super().__init__(caches)
        self.parted, self.shape = list(parted), parted[0].shape
        self._parts = list(map(list, zip(*(cache.parts() for cache in parted))))

    def stands(self) -> bool:
        return True

    def begin(self) -> None:
        told = np.array([cache.begin_decode() for cache in self.parted], np.int64)
        rows, places, jobs = np.split(told, (ROWS, ROWS + PLACES), axis=1)
        self._rows, self._places = np.ascontiguousarray(rows), np.ascontiguousarray(places)
        coding = np.flatnonzero(jobs[:, 1] + jobs[:, 4])
        self._jobs, self._coding = np.ascontiguousarray(jobs[coding]), coding.tolist()

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        append_parts(self._parts[layer], k, v, self._rows)

    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        parts, places = self._parts[layer], self._places
        if len(q) < len(parts):
            parts, places = parts[first : first + len(q)], places[first : first + len(q)]
        attend_parts(parts, q, places, scale=self.shape.logit_scale, window=self.shape.window(layer), out=out)

    def settle(self, layer: int) -> None:
        if self._coding:
            parts = self._parts[layer]
            encode_parts([parts[i] for i in self._coding], self._jobs)
        if layer == self.shape.num_layers - 1:
            for cache in self.parted:
                cache.end_decode()


class OuterCache(Protocol):
    """A cache that has read its prompt, or has not, and holds what is left of it in another one."""

    shape: CacheShape

    @property
    def inner(self) -> KVCache:
        """The other one."""

    @property
    def passes_on(self) -> bool:
        """Whether the next token goes to the inner cache as it comes: the prompt has been read."""

    def took_in(self, num_tokens: int) -> None:
        """The inner cache took in so many tokens."""


class InnerDecoding(Decoding):
    """Those whose prompts have been read: the inner caches' tokens are theirs. Others go one by one."""

    def __init__(self, caches: Sequence[KVCache], outer: Sequence[OuterCache]) -> None:
        """outer: the caches as such."""
        super().__init__(caches)
        self._outer = list(outer)
        self._passes = all(cache.passes_on for cache in outer)
        inner = [cache.inner for cache in outer] if self._passes else self.caches
        self._inner = type(inner[0]).decode_together(inner) if self._passes else OneByOne(inner)

    def stands(self) -> bool:
        return self._passes and all(cache.passes_on for cache in self._outer) and self._inner.stands()

    def begin(self) -> None:
        self._inner.begin()

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self._inner.append(layer, k, v)

    def attend(self, layer: int, q: np.ndarray, out: np.ndarray, first: int = 0) -> None:
        self._inner.attend(layer, q, out, first)

    def settle(self, layer: int) -> None:
        self._inner.settle(layer)
        if self._passes and layer == self._outer[0].shape.num_layers - 1:
            for cache in self._outer:
                cache.took_in(1)
