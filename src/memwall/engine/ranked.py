"""Keys and values of a model cut over ranks: a pool for each, by heads (tensor) and by layers (pipeline).

Every rank keeps the keys and values of its own heads in its own layers and attends with them, as the ranks of a tensor
group do; what their attention gives is put side by side. Products with the weights stay whole, so that the numbers are
those of the model in one piece, to the bit, and a difference after a hand-over can only come from the hand-over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memwall.engine.batch import BatchCache, ModelExecutor
from memwall.engine.executor import Entry
from memwall.engine.hand_over import HandOver, Layout, Part, parts_of, pulls_of
from memwall.engine.page_forms import INT4, page_bytes
from memwall.engine.sequence import Sequence as Running
from memwall.kv import CacheShape
from memwall.kv.float_store import row_bytes
from memwall.memory import Arena, PagePool


def layout_of(shape: CacheShape, page_tokens: int, kv: str = "float16") -> Layout:
    """A model's keys and values in pages of so many tokens, stored as `kv` says."""
    heads, layers = shape.num_kv_heads, shape.num_layers
    if kv == INT4:  # a page is one piece: its heads and tokens lie in blocks
        return Layout(layers=1, heads=1, head_bytes=page_bytes(shape, page_tokens, kv) // 2, page_tokens=1)
    return Layout(layers=layers, heads=heads, head_bytes=row_bytes(kv, shape) // heads, page_tokens=page_tokens)


def rank_pools(layout: Layout, degrees: tuple[int, int], num_pages: int, arena: Arena, owner: str) -> list[PagePool]:
    """A pool for each rank, all of it resident: one block table serves all of them."""
    made = []
    for number, part in enumerate(parts_of(layout, *degrees)):
        pool = PagePool(f"{owner}/rank {number}", page_bytes=layout.page_bytes(part), most_pages=num_pages, arena=arena)
        pool.take("kv", num_pages)
        made.append(pool)
    return made


class RankedCache(BatchCache):
    """A `BatchCache` over the pools of (tensor, pipeline) ranks, in the order of `parts_of`."""

    def __init__(
        self, shape: CacheShape, pools: Sequence[PagePool], page_tokens: int, degrees: tuple[int, int]
    ) -> None:
        super().__init__(shape, pools[0], page_tokens)
        self.ranks: list[tuple[Part, BatchCache]] = []
        self._group = shape.num_heads // shape.num_kv_heads
        for part, pool in zip(parts_of(layout_of(shape, page_tokens), *degrees), pools, strict=True):
            windows = None if shape.windows is None else tuple(shape.windows[layer] for layer in part.layers)
            own = replace(
                shape, num_layers=len(part.layers), num_heads=self._group * len(part.heads),
                num_kv_heads=len(part.heads), windows=windows,
            )  # fmt: skip
            self.ranks.append((part, BatchCache(own, pool, page_tokens)))

    def begin(self, batch: list[Entry]) -> np.ndarray:
        """See `BatchCache`."""
        positions = [cache.begin(batch) for _, cache in self.ranks]
        return positions[0]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """See `BatchCache`: each rank takes its heads."""
        for part, cache in self.ranks:
            if layer in part.layers:
                mine = slice(part.heads.start, part.heads.stop)
                cache.append(layer - part.layers.start, k[:, mine], v[:, mine], positions)

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        """See `BatchCache`; of a replicated head the last rank's result stays, and all of them are the same."""
        for part, cache in self.ranks:
            if layer in part.layers:
                mine = slice(part.heads.start * self._group, part.heads.stop * self._group)
                queries = np.ascontiguousarray(q[:, mine])
                out[:, mine] = cache.attend(layer - part.layers.start, queries, positions, np.empty_like(queries))
        return out


def serve_across(
    executor: ModelExecutor,
    shape: CacheShape,
    some: Sequence[Running],
    source: tuple[int, int],
    target: tuple[int, int],
    arena: Arena,
) -> None:
    """Computes prompts on ranks of one side, hands their pages over, and makes the other tokens on the other side.

    Each takes the pages that its whole text needs on both sides, in another order there. The executor is as it was
    afterwards. Greedy and seeded requests must make the tokens that they make in one piece.
    """
    page_tokens, before = executor.cache.page_tokens, executor.cache
    layout, count = layout_of(shape, page_tokens), 0
    for one in some:
        need = -(-one.most_tokens // page_tokens)
        one.pages, count = list(range(count, count + need)), count + need
    sides = [rank_pools(layout, degrees, count, arena, "kv/ranks") for degrees in (source, target)]
    try:
        executor.cache = RankedCache(shape, sides[0], page_tokens, source)
        _step(executor, some)
        pages = [page for one in some for page in one.pages]
        HandOver(layout=layout, source=source, target=target).copy(sides[0], sides[1], pulls_of(pages, pages[::-1]))
        for one in some:
            one.pages = [count - 1 - page for page in one.pages]
        executor.cache = RankedCache(shape, sides[1], page_tokens, target)
        while left := [one for one in some if one.num_made < one.request.sampling.max_new_tokens]:
            _step(executor, left)
    finally:
        executor.cache = before
        for pool in (*sides[0], *sides[1]):
            pool.release()
        for one in some:
            executor.forget(one)


def _step(executor: ModelExecutor, some: Sequence[Running]) -> None:
    batch = [Entry(one, one.computed, len(one.tokens) - one.computed, True) for one in some]
    for entry, output in zip(batch, executor.run(batch), strict=True):
        assert output is not None
        entry.sequence.computed = len(entry.sequence.tokens)
        entry.sequence.tokens.append(output.token)
