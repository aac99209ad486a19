"""int4: keys and values in 4 bits, appended token by token; keys of the newest block in 8.

Source: the grouping of KIVI (Liu 2024, arXiv 2402.02750), keys per channel and values per token, and the 4-bit pages of
COMET (Liu 2024, arXiv 2410.12168).
Idea: keys need a scale for each channel over several tokens, which are not there yet when a token comes. Here 16 tokens
make a block of keys, and until they are there, keys wait in int8 rows in the place of the block that they will be. So a
page of 32 tokens holds all that belongs to its tokens, at any moment: it can be shared, moved and swapped as pages of
floats are, and the same form serves one conversation and many.
Units and shapes: rows [tokens, Hkv, D]; a scale and a minimum in float16 belong to a channel and 16 keys, and to a
token and 64 channels of its value (32 or 16 where D asks for it).
Differs from the papers: no token of the past stays in floats; keys wait in int8, values not at all; tokens of one
segment of a prompt see each other exactly, as with KIVI.
Cost: a page of 32 tokens has 31 rows' worth of codes: one layer of one takes Hkv * (16 * D / 2 + 4 * D + 15 * (D + 2) +
32 * D / 2 + 32 * 4 * D / G) bytes, 5.7 bits a number for D = 64. A decode step reads all of it once.
Holds when: 16 divides D, and numbers stay below 65,504.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kernels.pages import PageForm, attend_pages, cut_page, page_form, read_pages, store_pages
from memwall.kv.base import CacheModel, CacheShape, Facts, KVCache, Reader
from memwall.kv.policy import Policy
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

INT4 = "int4"
OWNER = "kv/int4"
PAGE_TOKENS = 32
GROUPS = (64, 32, 16)


def int4_form(shape: CacheShape, page_tokens: int = PAGE_TOKENS) -> PageForm:
    """How one layer of these keys and values lies in a page; InputError where it cannot."""
    group = next((group for group in GROUPS if shape.head_dim % group == 0), 0)
    if not group or shape.head_dim > 1024:
        raise InputError(f"int4 needs a head dimension that 16 divides, 1,024 at most, not {shape.head_dim}; use int8")
    return page_form(shape.num_kv_heads, shape.head_dim, page_tokens=page_tokens, bits=4, group=group)


def num_pages(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE_TOKENS)


class Int4Cache(KVCache):
    """See the module's text."""

    saves = True
    plain_rows = True
    codes_prompt = True

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        policy.integers({})  # there are no settings
        self._form = int4_form(shape)
        self._size = self._form.layer_bytes
        most = num_pages(capacity_tokens)
        self._table = np.arange(most, dtype=np.int32)
        self._regions = [arena.reserve(OWNER, most * self._size) for _ in range(shape.num_layers)]
        self._pages = [self._view(layer) for layer in range(shape.num_layers)]
        self._lengths = [0] * shape.num_layers
        self._stored = [0] * shape.num_layers
        self._fresh: tuple[np.ndarray, np.ndarray] | None = None

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held."""
        policy.integers({})
        return {OWNER: shape.num_layers * round_up(num_pages(num_tokens) * int4_form(shape).layer_bytes)}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` held."""
        size = int4_form(shape).layer_bytes
        seen = (min(num_tokens, shape.window(layer) or num_tokens) for layer in range(shape.num_layers))
        return sum(num_pages(tokens) * size for tokens in seen)

    @property
    def policy(self) -> str:
        return INT4

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        return sum(region.committed_bytes for region in self._regions)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held = self._lengths[layer]
        self._check_append(held, len(k), positions)
        end = held + len(k)
        # the first layer takes room for all: a refusal must come before any layer has changed
        for each in range(self.shape.num_layers) if layer == 0 else (layer,):
            self._reserve(each, end)
        self._lengths[layer] = end
        if len(k) > 1:
            self._fresh = (k, v)
        else:
            self._store(layer, k, v)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        return attend_pages(
            self._form, self._pages[layer], 0, q, self._table, length=self._lengths[layer],
            scale=self.shape.logit_scale, first_position=int(positions[0]), window=self.shape.window(layer), out=out,
            fresh=self._fresh, stats=stats,
        )  # fmt: skip

    def settle(self, layer: int) -> None:
        if self._fresh is not None:
            self._store(layer, *self._fresh)
            self._fresh = None

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        self._fresh = None
        page, slot = divmod(length, PAGE_TOKENS)
        for layer in range(self.shape.num_layers):
            if slot and length < self._stored[layer]:
                cut_page(self._form, self._pages[layer], 0, page, slot)
            self._lengths[layer] = length
            self._stored[layer] = min(length, self._stored[layer])
            self._pages[layer] = self._pages[layer][:0]
            self._regions[layer].shrink(num_pages(length) * self._size)
            self._pages[layer] = self._view(layer)

    def fork(self) -> Int4Cache:
        other = Int4Cache(Policy(INT4), self.shape, self.arena, self.capacity_tokens)
        count = num_pages(self.length)
        try:
            for layer, pages in enumerate(self._pages):
                other._reserve(layer, self.length)
                other._pages[layer][:count] = pages[:count]
        except BaseException:
            other.release()
            raise
        other._lengths, other._stored = list(self._lengths), list(self._stored)
        return other

    def dump(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        count = num_pages(self.length)
        return {f"pages.{layer}": pages[:count] for layer, pages in enumerate(self._pages)}, {"tokens": self.length}

    def layout(self, facts: Facts) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        shape = (num_pages(facts["tokens"]), self._size)
        return {f"pages.{layer}": (shape, np.dtype(np.uint8)) for layer in range(self.shape.num_layers)}

    def restore(self, facts: Facts, keep: int, reader: Reader) -> None:
        saved = facts["tokens"]
        self._check_restore(keep, saved)
        count = num_pages(keep)
        try:
            for layer in range(self.shape.num_layers):
                self._reserve(layer, keep)
            for layer, pages in enumerate(self._pages):
                reader(f"pages.{layer}", pages[:count])
        except BaseException:
            self.truncate(0)
            raise
        held = min(saved, count * PAGE_TOKENS)
        self._lengths, self._stored = [held] * self.shape.num_layers, [held] * self.shape.num_layers
        self.truncate(keep)

    def rows(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        first = begin // PAGE_TOKENS
        skip = begin - first * PAGE_TOKENS
        # a block is read as the length says that it is held: all of its tokens, though some are not asked for
        length = min(self.length, num_pages(end) * PAGE_TOKENS) - first * PAGE_TOKENS
        keys, values = read_pages(self._form, self._pages[layer], 0, self._table[first:], length)
        wanted = slice(skip, skip + end - begin)
        return keys[wanted], values[wanted]

    def release(self) -> None:
        for layer, region in enumerate(self._regions):
            self._pages[layer] = self._pages[layer][:0]
            region.release()

    def _store(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        first = self._stored[layer]
        k, v = np.ascontiguousarray(k, np.float32), np.ascontiguousarray(v, np.float32)
        store_pages(self._form, self._pages[layer], 0, k, v, np.arange(first, first + len(k)))
        self._stored[layer] = first + len(k)

    def _reserve(self, layer: int, tokens: int) -> None:
        if num_pages(tokens) > len(self._pages[layer]):
            self._regions[layer].commit(num_pages(tokens) * self._size)
            self._pages[layer] = self._view(layer)

    def _view(self, layer: int) -> np.ndarray:
        region = self._regions[layer]
        count = min(region.committed_bytes, region.capacity_bytes) // self._size
        return region.array((count, self._size), np.dtype(np.uint8))
