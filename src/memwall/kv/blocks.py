"""Block prefill: read a block, score what is held, evict, go on. The peak of a cache no longer depends on the prompt.

Three parts meet here. A `Scorer` says what each unit (one token in one head) is worth, from what the decoder shows it;
a `BudgetAllocator` says how many units each layer and head keeps, and which; `BlockCache` feeds both and stores the
rest.

Kept units lie head by head in flat rows, so that heads may keep different tokens and different numbers of them at no
byte of padding. New tokens come into a tail that all heads share, where they attend exactly; when a block is complete
it is folded: units are chosen, and rows are packed and given back. Where `turns` is given, kept units are also numbered
anew, and their keys turn with them: rotations by differences, in float32, rounded once a move.

Shapes: T new tokens, H query heads, Hkv key-value heads, D numbers a head; budgets in units per head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memwall.kernels import rope
from memwall.kernels.attention import attend_ragged
from memwall.kv.base import CacheShape, KVCache
from memwall.kv.ragged import KEY_BYTES, STAGING, LayerUnits
from memwall.memory import Arena
from memwall.models.rope import RotaryTable, inverse_frequencies

HALF = np.dtype(np.float16)
TURNED_ROWS = 512
"""Keys turned at once: the float32 copies stay small."""


@dataclass(frozen=True, slots=True)
class Units:
    """What one layer may keep: of each head its past units, in order, then the newest `num_new` tokens.

    past_scores: of each head, as kept. keys(head): rotated, float32 [units, D], until they are asked of another head.
    """

    past_scores: list[np.ndarray]
    num_new: int
    keys: Callable[[int], np.ndarray]


class Scorer(ABC):  # noqa: B024 - it has two ways to be whole, see `is_final`
    """What units are worth; the highest stay."""

    keeps_scores = True
    """Whether the scores of kept units are stored beside them."""
    is_final = False
    """Whether `see` gives each unit's score when it comes, for good; otherwise `score` is asked at each eviction."""

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> np.ndarray | None:
        """New tokens q [n, H, D], k, v [n, Hkv, D] rotated to positions `turns` [n] -> scores [n, Hkv] if final."""
        return None

    def score(self, layer: int, units: Units) -> list[np.ndarray]:
        """Of each head the scores of all its units, past ones first."""
        raise NotImplementedError


class BudgetAllocator(ABC):
    """How many units stay, and which. budgets [layers]: units per head on average."""

    def __init__(self, budgets: Sequence[int] | np.ndarray) -> None:
        self.budgets = [int(budget) for budget in budgets]

    @abstractmethod
    def num_kept(self, layer: int, sizes: Sequence[int]) -> int:
        """Units kept of heads that have so many."""

    @abstractmethod
    def choose(self, layer: int, scores: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each head the places of the units that stay, ascending."""


class Uniform(BudgetAllocator):
    """Every head keeps the same number of units, its own best."""

    def num_kept(self, layer: int, sizes: Sequence[int]) -> int:
        return sum(min(size, self.budgets[layer]) for size in sizes)

    def choose(self, layer: int, scores: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [best(each, self.budgets[layer]) for each in scores]


class HeadAdaptive(BudgetAllocator):
    """The layer keeps its best units whatever their heads: a head that looks at much keeps much."""

    def num_kept(self, layer: int, sizes: Sequence[int]) -> int:
        return min(sum(sizes), self.budgets[layer] * len(sizes))

    def choose(self, layer: int, scores: Sequence[np.ndarray]) -> list[np.ndarray]:
        chosen = best(np.concatenate(scores), self.budgets[layer] * len(scores))
        ends = np.cumsum([len(each) for each in scores])
        cuts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        return [cut - (end - len(each)) for cut, end, each in zip(cuts, ends, scores)]


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` highest scores, ascending; of equal ones the newer stay."""
    if len(scores) <= count:
        return np.arange(len(scores))
    order = np.argsort(scores, kind="stable")
    return np.sort(order[len(scores) - count :])


def sensitive_budgets(similarity: np.ndarray, mean: int, alpha: float, floor: float = 0.25) -> np.ndarray:
    """Units per head and layer, `mean` on average: most where keys change most under a block mask.

    similarity [L]: cosine between a layer's keys with and without the mask. Weights are (1 - n)^alpha of the similarity
    n scaled to 0..1; no layer gets less than `floor * mean`, and the others pay for that, so that the sum stays.
    """
    span = float(np.ptp(similarity))
    scaled = (similarity - similarity.min()) / span if span > 0 else np.zeros(len(similarity))
    weights = (1 - scaled) ** alpha
    total, least = mean * len(similarity), max(int(floor * mean), 1)
    raised = np.zeros(len(similarity), bool)
    while True:
        left = total - least * raised.sum()
        shares = np.where(raised, least, left * weights / weights[~raised].sum())
        low = (shares < least) & ~raised
        if not low.any():
            break
        raised |= low
    budgets = shares.astype(np.int64)
    budgets[np.argsort(budgets - shares, kind="stable")[: total - budgets.sum()]] += 1  # what rounding down left
    return budgets


@dataclass(frozen=True, slots=True)
class Step:
    """What happens once a forward pass of so many tokens has settled: a fold, its newest units safe or not."""

    num_tokens: int
    folds: bool
    stabilizes: bool = True


class BlockCache(KVCache):
    """A cache that evicts after each block; what is folded stays at most the allocator's budget."""

    sheds_prompt = True

    def __init__(
        self,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        *,
        scorer: Scorer,
        allocator: BudgetAllocator,
        chunk: int,
        stable: int = 0,
        local: int = 0,
        turns: RotaryTable | None = None,
        dtype: np.dtype = HALF,
    ) -> None:
        """chunk: tokens of a block. stable: newest units that an eviction spares while a prompt goes on. local: last
        tokens of a prompt that come after the last eviction. turns: rotation of the model whose keys are numbered anew.
        """
        super().__init__(shape, arena, capacity_tokens)
        self.scorer, self.allocator, self.dtype = scorer, allocator, dtype
        self.chunk, self.stable, self.local, self.turns = chunk, stable, local, turns
        capacity = max(capacity_tokens, chunk)
        self._layers = [
            LayerUnits(arena, shape, capacity, dtype, has_scores=scorer.keeps_scores) for _ in range(shape.num_layers)
        ]
        most = capacity * shape.head_dim * max(shape.num_kv_heads * dtype.itemsize, KEY_BYTES)
        self._staging = arena.reserve(STAGING, most)
        self._plan: deque[Step] = deque()
        self._step = Step(0, folds=False)
        self._new: tuple[np.ndarray, np.ndarray] = (np.empty(0), np.empty(0))
        self._shift = 0  # rotary position less place in the sequence, of the tokens of this pass
        self._table = (np.empty(0, np.float32), np.empty(0, np.float32))

    @property
    def length(self) -> int:
        return min(layer.length for layer in self._layers)

    @property
    def next_position(self) -> int:
        if self.turns is None:
            return self.length
        first = self._layers[0]
        return first.past.lengths[0] + first.num_tail

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers) + self._staging.committed_bytes

    @property
    def kept_lengths(self) -> list[list[int]]:
        """Folded units of every head, layer by layer."""
        return [layer.past.lengths for layer in self._layers]

    def begin_prompt(self, num_tokens: int, longest: int) -> list[int]:
        self._plan.clear()
        pending = self._layers[0].num_tail
        left = max(num_tokens - self.local, 1) if pending + num_tokens >= self.chunk else 0
        rest = num_tokens - left
        while left:
            block = min(self.chunk - pending, left)
            pending, left = 0, left - block
            sizes = pieces(block, longest)
            self._plan += [Step(size, folds=False) for size in sizes[:-1]]
            self._plan.append(Step(sizes[-1], folds=True, stabilizes=left > 0))
        self._plan += [Step(size, folds=False) for size in pieces(rest, longest)]
        return [step.num_tokens for step in self._plan]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        state = self._layers[layer]
        self._check_append(state.length, len(k), positions)
        if layer == 0:
            self._begin_step(len(k))
        self._new = (k, v)
        if self._step.folds and not state.num_tail:
            state.fresh = (k, v)
        else:
            begin, end = state.num_tail, state.num_tail + len(k)
            state.keys.rows(begin, end)[:] = k
            state.values.rows(begin, end)[:] = v
        state.num_tail += len(k)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        state = self._layers[layer]
        past = state.past
        first = int(positions[0]) - state.folded
        past_keys, past_values = past.held
        keys, values = state.tail()
        attend_ragged(
            q,
            past_keys,
            past_values,
            past.offsets,
            keys,
            values,
            scale=self.shape.logit_scale,
            first_query=first,
            out=out,
            stats=stats,
        )
        k, v = self._new
        row = first - (state.num_tail - len(k))
        rows = slice(row, row + len(q))
        if not (self.scorer.is_final or self._step.folds):  # nothing is chosen behind this pass
            return out
        scores = self.scorer.see(layer, q, k[rows], v[rows], np.asarray(positions) + self._shift)
        if scores is not None:
            state.tail_scores(first, first + len(q))[:] = scores
        return out

    def settle(self, layer: int) -> None:
        if self._step.folds:
            self._fold(layer, self._layers[layer].num_tail)
        if layer == self.shape.num_layers - 1:
            self._staging.shrink(0)

    def rewindable(self, length: int) -> int:
        return length if all(length >= layer.folded or not layer.has_dropped for layer in self._layers) else 0

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        if length and self.rewindable(length) != length:
            raise ValueError(f"cannot truncate to {length} tokens: some of them were dropped")
        self._plan.clear()
        self._staging.shrink(0)
        for state in self._layers:
            state.set_tail(max(length - state.folded, 0))
            if length < state.folded:
                self._cut_past(state, length)
            state.past.shrink()

    def copy_to(self, other: BlockCache) -> None:
        """Makes `other`, which is empty, hold the same; it releases itself when there is no room."""
        try:
            for mine, theirs in zip(self._layers, other._layers):
                theirs.copy_from(mine)
        except BaseException:
            other.release()
            raise

    def release(self) -> None:
        for layer in self._layers:
            layer.release()
        self._staging.release()

    def _begin_step(self, num_tokens: int) -> None:
        """What this pass will do, and room in all layers for it: a refusal must come before any has changed."""
        if self._plan and self._plan[0].num_tokens == num_tokens:
            self._step = self._plan.popleft()
        else:
            self._plan.clear()
            self._step = self._unplanned(num_tokens)
        self._shift = self.next_position - self.length
        most = 0
        for index, state in enumerate(self._layers):
            tail = state.num_tail + num_tokens
            state.reserve_tail(tail, rows=not self._step.folds or state.num_tail > 0)
            if self._step.folds:
                kept = self.allocator.num_kept(index, [n + tail for n in state.past.lengths])
                state.past.reserve(max(kept, state.past.num_rows))
                most = max(most, kept * state.past.row_bytes)
                if not self.scorer.is_final:
                    most = max(most, (max(state.past.lengths) + tail) * self.shape.head_dim * KEY_BYTES)
        self._staging.commit(most)

    def _unplanned(self, num_tokens: int) -> Step:
        """Tokens that no prompt announced: they gather until they are a block."""
        return Step(num_tokens, folds=self._layers[0].num_tail + num_tokens >= self.chunk)

    def _fold(self, layer: int, num_new: int) -> None:
        """Chooses among the past and the first `num_new` tokens of the tail; what is behind these is dropped."""
        state = self._layers[layer]
        scores = self._scores_of(layer, state, num_new)
        offered = scores
        if self._step.stabilizes and self.stable:
            offered = [np.concatenate([each[: -self.stable], np.full(min(self.stable, len(each)), np.inf)])
                       for each in scores]  # fmt: skip
        chosen = self.allocator.choose(layer, offered)
        state.has_dropped |= any(len(kept) < len(each) for kept, each in zip(chosen, scores))
        self._pack(state, chosen)
        lengths = [len(kept) for kept in chosen]
        if self.scorer.keeps_scores:
            state.past.scores(sum(lengths))[:] = np.concatenate([each[kept] for each, kept in zip(scores, chosen)])
        state.past.set_lengths(lengths)
        state.folded += num_new
        state.set_tail(0)

    def _scores_of(self, layer: int, state: LayerUnits, num_new: int) -> list[np.ndarray]:
        offsets, past = state.past.offsets, state.past
        before: list[np.ndarray] = [np.empty(0, np.float32)] * state.heads
        if self.scorer.keeps_scores:
            before = np.split(past.scores(past.num_rows), offsets[1:-1])
        if self.scorer.is_final:
            new = state.tail_scores(0, num_new)
            return [np.concatenate([old, new[:, head]]) for head, old in enumerate(before)]

        def keys(head: int) -> np.ndarray:
            old = past.rows(past.num_rows)[0][offsets[head] : offsets[head + 1]]
            both = self._staging.array((len(old) + num_new, self.shape.head_dim), np.float32)
            both[: len(old)] = old
            both[len(old) :] = state.tail()[0][:num_new, head]
            return both

        return self.scorer.score(layer, Units(before, num_new, keys))

    def _pack(self, state: LayerUnits, chosen: list[np.ndarray]) -> None:
        """Moves the chosen rows to the front, head by head, by way of the staging."""
        total = sum(map(len, chosen))
        staged = self._staging.array((total, self.shape.head_dim), self.dtype)
        past, offsets = state.past.rows(state.past.num_rows), state.past.offsets
        for index, (old, new) in enumerate(zip(past, state.tail())):
            begin = 0
            for head, places in enumerate(chosen):
                num_old = int(offsets[head + 1] - offsets[head])
                cut, end = int(np.searchsorted(places, num_old)), begin + len(places)
                mine = old[offsets[head] : offsets[head + 1]]
                if cut:
                    np.take(mine, places[:cut], axis=0, out=staged[begin : begin + cut], mode="clip")
                tail = new[places[cut:] - num_old, head]
                if index == 0 and self.turns is not None:
                    moved = places - np.arange(len(places))
                    self._turn(staged[begin : begin + cut], staged[begin : begin + cut], moved[:cut])
                    self._turn(tail, staged[begin + cut : end], moved[cut:])
                else:
                    staged[begin + cut : end] = tail
                begin = end
            state.past.rows(total)[index][:] = staged

    def _turn(self, source: np.ndarray, target: np.ndarray, moved: np.ndarray) -> None:
        """Keys [n, D] into `target`, turned back by as many positions as each has moved to the front."""
        # places ascend, so that those that stay come first
        stays = int(np.searchsorted(moved, 1))
        if target is not source:
            target[:stays] = source[:stays]
        if stays == len(moved):
            return
        cos, sin = self._turn_table(int(moved[-1]))
        for begin in range(stays, len(moved), TURNED_ROWS):
            rows = slice(begin, min(begin + TURNED_ROWS, len(moved)))
            keys = source[rows, None].astype(np.float32)
            rope(keys, cos[moved[rows]], sin[moved[rows]])
            target[rows] = keys[:, 0]

    def _turn_table(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of turns back by 0 .. most positions; a turn leaves YaRN's factor in the keys as it is."""
        assert self.turns is not None
        if len(self._table[0]) <= most:
            back = -np.arange(most + 1, dtype=np.float32)
            angles = back[:, None] * inverse_frequencies(self.turns.rope, self.turns.head_dim)
            self._table = (np.cos(angles), np.sin(angles))
        return self._table

    def _cut_past(self, state: LayerUnits, length: int) -> None:
        """The first `length` units of each head, which then are the first tokens."""
        begin, total = 0, length * state.heads
        scores = state.past.scores(state.past.num_rows) if self.scorer.keeps_scores else None
        for head in range(state.heads):
            first = int(state.past.offsets[head])
            for rows in state.past.rows(state.past.num_rows):
                rows[begin : begin + length] = rows[first : first + length].copy()
            if scores is not None:
                scores[begin : begin + length] = scores[first : first + length].copy()
            begin += length
        assert begin == total
        state.past.set_lengths([length] * state.heads)
        state.folded = length
        state.has_dropped = state.has_dropped and length > 0


def pieces(count: int, longest: int) -> list[int]:
    """`count` in pieces of at most `longest`."""
    return [min(longest, count - begin) for begin in range(0, count, longest)]
