"""What caches share that drop prompt tokens once the prompt has been read: selection, the wrapper over an inner store.

A `Scorer` says what each token of a prompt is worth to each KV head, a `BudgetAllocator` how many rows a head keeps;
`EvictingCache` does the rest. It attends to the prompt on the decoder's own keys and values, and when a layer has
attended it hands the rows that stay to the inner cache, as if these were all there are. So only one layer ever holds
its whole prompt, and nothing of what goes is ever stored. Rows carry the rotation of their true positions; the next
token's position is the true length.

A prompt that comes in several segments is kept whole, in float16, until its last one: it needs that room besides.

Shapes: T prompt tokens, w observed queries, H query heads, Hkv key-value heads, D numbers a head, C rows kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import numpy as np

from memwall.errors import InputError
from memwall.kernels.attention import attend_float
from memwall.kv import table
from memwall.kv.base import CacheModel, CacheShape, KVCache, Role
from memwall.kv.decoding import Decoding, InnerDecoding
from memwall.kv.float_store import GrowingRows
from memwall.kv.policy import Policy
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

STAGING = "kv/staging"
BLOCK_PRODUCTS = 1 << 18
"""Multiply-adds of keys scored at once: few enough that NumPy's linear algebra wakes no threads of its own, which would
fight with the kernels' for the processor, and that logits stay in its first caches.
"""

BudgetAllocator = Callable[[int], int]
"""Rows that every head of every layer keeps of a prompt of so many tokens."""


class Scorer(Protocol):
    """Scores of a prompt's tokens, the higher the dearer; infinity keeps a token whatever the others have."""

    def window(self, num_tokens: int) -> int:
        """How many of the last queries of a prompt it looks at."""

    def __call__(
        self, layer: int, keys: np.ndarray, queries: np.ndarray, stats: np.ndarray, scale: float
    ) -> np.ndarray:
        """[Hkv, T] of keys [T, Hkv, D], by the last queries [w, H, D] and their softmax `stats` [w, H, 2] over all T.

        stats: the largest logit, and the sum of exponentials relative to it.
        """


# ---- selection -----------------------------------------------------------------------------------------------------


def attention_votes(
    keys: np.ndarray, queries: np.ndarray, stats: np.ndarray, scale: float, num_columns: int | None = None
) -> np.ndarray:
    """Attention that the first columns (all T unless given) get from the last w queries: sums [Hkv, columns].

    Summed over the queries and over the heads of a group, of softmax over all T columns with the causal mask; keys are
    never repeated for query heads. One pass: `stats` already hold each row's peak and sum.
    """
    num_tokens, kv_heads, dim = keys.shape
    num_queries, heads = queries.shape[:2]
    rep, columns = heads // kv_heads, num_tokens if num_columns is None else num_columns
    votes = np.empty((kv_heads, columns), np.float32)
    block = max(BLOCK_PRODUCTS // (dim * num_queries * rep), 16)
    own = np.repeat(np.arange(num_tokens - num_queries, num_tokens), rep)
    for head in range(kv_heads):
        group = slice(head * rep, (head + 1) * rep)
        rows = np.ascontiguousarray(queries[:, group].reshape(-1, dim).T) * np.float32(scale)
        peaks, sums = stats[:, group, 0].reshape(-1), stats[:, group, 1].reshape(-1)
        # a query that was never attended with has no vote
        shift = np.where(sums > 0, peaks + np.log(np.where(sums > 0, sums, 1)), np.inf).astype(np.float32)
        for begin in range(0, columns, block):
            end = min(begin + block, columns)
            logits = np.matmul(np.asarray(keys[begin:end, head], np.float32), rows)
            logits -= shift
            if end > own[0] + 1:
                logits[np.arange(begin, end)[:, None] > own] = -np.inf
            np.exp(logits, out=logits)
            votes[head, begin:end] = logits.sum(axis=1)
    return votes


def pooled(votes: np.ndarray, kernel: int, kind: str) -> np.ndarray:
    """Mean or maximum over `kernel` (odd) neighbours along the last axis; beyond the ends there is nothing, a zero."""
    if kernel == 1:
        return votes
    reach = kernel // 2
    padded = np.pad(votes, ((0, 0), (reach, reach)))  # votes are sums of shares: zero is below all for a maximum too
    out = padded[:, : votes.shape[1]].copy()
    for shift in range(1, kernel):
        part = padded[:, shift : shift + votes.shape[1]]
        np.maximum(out, part, out=out) if kind == "max" else np.add(out, part, out=out)
    return out if kind == "max" else out / np.float32(kernel)


def top_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Places [Hkv, count] of each head's highest scores, in the order of tokens."""
    best = np.argpartition(scores, scores.shape[1] - count, axis=1)[:, scores.shape[1] - count :]
    return np.sort(best, axis=1)


def gather_rows(rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    """Each head's rows: out [C, Hkv, D] of rows [T, Hkv, D] at places [Hkv, C]."""
    for head, own in enumerate(places):
        out[:, head] = rows[own, head]


# ---- bytes ---------------------------------------------------------------------------------------------------------


def array_bytes(nbytes: int) -> int:
    """What an array of so many bytes counts on the ledger."""
    return max(round_up(nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES) if nbytes < SMALL_BYTES else round_up(nbytes)


def staging_parts(shape: CacheShape, kept: int, window: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the float32 arrays of one layer's selection: queries, their stats, the kept keys, the kept values."""
    rows = (kept, shape.num_kv_heads, shape.head_dim)
    return (window, shape.num_heads, shape.head_dim), (window, shape.num_heads, 2), rows, rows


def staging_bytes(shape: CacheShape, kept: int, window: int) -> int:
    """Bytes of them together."""
    return 4 * sum(math.prod(part) for part in staging_parts(shape, kept, window))


def inner_of(policy: Policy) -> Policy:
    """The policy that this one works on top of."""
    return policy.inner or table.DEFAULT_STORE


def seen_whole(policy: Policy, shape: CacheShape, capacity_tokens: int) -> CacheShape:
    """The shape without sliding windows; InputError where one would hide tokens: kept rows have no distances."""
    shortest = min((w for w in shape.windows or () if w is not None), default=capacity_tokens)
    if shortest < capacity_tokens:
        raise InputError(
            f"{policy.name} does not work with sliding windows, and this model's is {shortest} tokens: ask for a "
            f"context of at most {shortest}, or use kivi"
        )
    return shape if shape.windows is None else replace(shape, windows=None)


def predict_evicting(
    policy: Policy,
    shape: CacheShape,
    sizes: tuple[int, int, int],
    budget: BudgetAllocator,
    window: int,
) -> dict[str, int]:
    """Bytes per owner of an evicting cache; sizes: tokens taken in, tokens of the prompt at once, capacity."""
    num_tokens, prefill, capacity_tokens = sizes
    shape = seen_whole(policy, shape, capacity_tokens if prefill else 1)  # without a prompt it is only a size
    prompt = min(prefill, num_tokens)
    kept = min(budget(prompt), prompt) if prompt else 0
    held = num_tokens - (prompt - kept)
    found = dict(table.predict(inner_of(policy), shape, held, kept, capacity_tokens))
    if kept < prompt:
        found[STAGING] = found.get(STAGING, 0) + array_bytes(staging_bytes(shape, kept, window))
    return found


# ---- the wrapper ---------------------------------------------------------------------------------------------------


class EvictingCache(KVCache):
    """A cache that hands an inner one the prompt rows that a scorer picks, and all later rows.

    The first prompt is pruned; what comes after, answers and later prompts, is kept in full and attends exactly.
    """

    role: ClassVar[Role] = "tokens"
    codes_prompt = True

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
        *,
        scorer: Scorer,
        budget: BudgetAllocator,
    ) -> None:
        super().__init__(seen_whole(policy, shape, capacity_tokens), arena, capacity_tokens)
        self.scorer, self.budget = scorer, budget
        self.inner = table.build(inner_of(policy), self.shape, arena, capacity_tokens, model)
        if self.inner.takes_inputs:
            self.inner.release()
            raise InputError(f"{policy.name} keeps rows of keys and values, which {inner_of(policy).name} does not")
        self._lengths = [0] * shape.num_layers
        self._expected = 0  # tokens of the prompt that is coming, where it was announced
        self._prompt = self._dropped = 0  # length of the pruned prompt, and what each head let go of it
        self._rows: tuple[np.ndarray, np.ndarray] | None = None  # a layer's whole prompt, between append and settle
        self._whole: list[tuple[GrowingRows, GrowingRows]] | None = None
        self._staging: np.ndarray | None = None
        self._parts: list[np.ndarray] = []

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        whole = sum(rows.nbytes for pair in self._whole or () for rows in pair)
        return self.inner.nbytes + whole + (0 if self._staging is None else array_bytes(self._staging.nbytes))

    def begin_prompt(self, num_tokens: int, longest: int) -> list[int]:
        if self.length and self._whole is None:
            return self.inner.begin_prompt(num_tokens, longest)
        total = self._expected = self.length + num_tokens
        if self._whole is None and self.budget(total) >= total:
            return self.inner.begin_prompt(num_tokens, longest)
        sizes = super().begin_prompt(num_tokens, longest)
        if len(sizes) > 1:
            window = self.scorer.window(total)
            if longest < window:
                raise InputError(f"prompts in segments of {longest} tokens: {self.policy} looks at the last {window}")
            # the last segment brings all the queries that are looked at
            missing = max(window - sizes[-1], 0)
            sizes[-2:] = [sizes[-2] - missing, sizes[-1] + missing]
        return [size for size in sizes if size]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held = self._lengths[layer]
        self._check_append(held, len(k), positions)
        total = max(self._expected, held + len(k))
        fresh = held == 0 or self._whole is not None
        if self._whole is None and (not fresh or self.budget(total) >= total):
            self.inner.append(layer, k, v, positions - self._dropped)
        else:
            self._take(layer, k, v, total)
        self._lengths[layer] = held + len(k)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        if self._rows is None:
            return self.inner.attend(layer, q, positions - self._dropped, out, stats)
        keys, values = self._rows
        first = int(positions[0])
        if stats is None and self._parts:
            stats = np.empty((len(q), self.shape.num_heads, 2), np.float32)
        attend_float(q, keys, values, scale=self.shape.logit_scale, first_position=first, out=out, stats=stats)
        if self._parts and stats is not None:
            queries, found = self._parts[:2]
            place = first + len(q) - (len(keys) - len(queries))  # of this block's end in the window
            count = min(place, len(q))
            if count > 0:
                queries[place - count : place], found[place - count : place] = q[-count:], stats[-count:]
        return out

    def settle(self, layer: int) -> None:
        last = layer == self.shape.num_layers - 1
        if self._rows is None:
            self.inner.settle(layer)
        elif self._parts:
            self._prune(layer, *self._rows)
            if last:
                self._prompt, self._dropped = len(self._rows[0]), len(self._rows[0]) - len(self._parts[2])
                self._unstage()
                self._forget_whole()
        self._rows = None
        if last:
            self._forget_expected()

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        return InnerDecoding(caches, cast("Sequence[EvictingCache]", caches))

    @property
    def passes_on(self) -> bool:
        """Whether the next token goes to the inner cache as it comes: the prompt has been read."""
        return self._whole is None and self.length > 0

    def rewindable(self, length: int) -> int:
        if self._whole is not None:
            return length
        # what the pruned prompt's earlier tokens would see is gone
        kept = self.inner.rewindable(max(length - self._dropped, 0)) + self._dropped
        return kept if kept >= self._prompt and length else 0

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        if self._dropped and 0 < length < self._prompt:
            raise ValueError(
                f"the first {self._prompt} tokens were pruned together: truncate to 0 or to those at least"
            )
        self._rows, self._expected = None, 0
        self._unstage()
        if length == 0:
            self._prompt = self._dropped = 0
            self._forget_whole()
        for pair in self._whole or ():
            for rows in pair:
                rows.shrink(length)
        self.inner.truncate(0 if self._whole is not None else length - self._dropped)
        self._lengths = [length] * self.shape.num_layers

    def fork(self) -> EvictingCache:
        other = copy.copy(self)
        other.inner = self.inner.fork()
        other._lengths, other._whole, other._parts = list(self._lengths), None, []
        try:
            if self._whole is not None:
                other._whole = other._reserve_whole(self.length)
                for mine, theirs in zip(self._whole, other._whole):
                    for rows, copied in zip(mine, theirs):
                        copied.rows(0, self.length)[:] = rows.rows(0, self.length)
        except BaseException:
            other.inner.release()
            raise
        return other

    def report(self) -> dict[str, object]:
        return self.inner.report()

    def release(self) -> None:
        self._rows = None
        self._unstage()
        self._forget_whole()
        self.inner.release()

    def took_in(self, num_tokens: int) -> None:
        """The inner cache took in so many tokens."""
        self._lengths = [self.length + num_tokens] * self.shape.num_layers
        self._forget_expected()

    def _forget_expected(self) -> None:
        if self.length >= self._expected:
            self._expected = 0

    def _take(self, layer: int, k: np.ndarray, v: np.ndarray, total: int) -> None:
        """A layer's prompt, or a segment of it: the decoder's own arrays do when it comes whole."""
        held = self._lengths[layer]
        end = held + len(k)
        if layer == 0:
            if end < total or held:
                self._whole = self._reserve_whole(end)
            if end == total:
                self._stage(total)
        if self._whole is None:
            self._rows = (k, v)
            return
        keys, values = self._whole[layer]
        keys.rows(held, end)[:], values.rows(held, end)[:] = k, v
        self._rows = (keys.rows(0, end), values.rows(0, end))

    def _reserve_whole(self, num_tokens: int) -> list[tuple[GrowingRows, GrowingRows]]:
        make = lambda: GrowingRows(self.arena, STAGING, self.capacity_tokens, self.shape, np.dtype(np.float16))  # noqa: E731
        whole = self._whole if self._whole is not None else [(make(), make()) for _ in range(self.shape.num_layers)]
        try:
            for pair in whole:
                for rows in pair:
                    rows.reserve(num_tokens)
        except BaseException:
            if self._whole is None:
                _release(whole)
            raise
        return whole

    def _prune(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        queries, stats, kept_keys, kept_values = self._parts
        scores = self.scorer(layer, keys, queries, stats, self.shape.logit_scale)
        places = top_rows(scores, len(kept_keys))
        gather_rows(keys, places, kept_keys)
        gather_rows(values, places, kept_values)
        self.inner.append(layer, kept_keys, kept_values, np.arange(len(kept_keys)))
        self.inner.observe(layer, queries)
        self.inner.settle(layer)

    def _stage(self, total: int) -> None:
        shapes = staging_parts(self.shape, self.budget(total), self.scorer.window(total))
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        self._staging = self.arena.allocate(STAGING, int(ends[-1]), np.float32)
        self._parts = [part.reshape(shape) for part, shape in zip(np.split(self._staging, ends[:-1]), shapes)]

    def _unstage(self) -> None:
        self._parts = []
        if self._staging is not None:
            self.arena.free(self._staging)
            self._staging = None

    def _forget_whole(self) -> None:
        _release(self._whole or [])
        self._whole = None


def _release(whole: list[tuple[GrowingRows, GrowingRows]]) -> None:
    for pair in whole:
        for rows in pair:
            rows.release()
