"""Attention where the pages are: dense over all token pages, or SparF, which reads channel pages first.

SparF, per key-value head (its query heads choose together): the r channels with the largest |q|; logits of all tokens
from these channels alone, read from channel pages; the k tokens with the largest share; exact attention over these,
read from token pages; what they leave out is stood in for by the mean of all values.

Units and shapes: q [Hkv, T, H / Hkv, D] float32; outputs alike, stats [Hkv, T, H / Hkv, 2] as `kernels.attention` has
them. Chunks of pages are read while the one before is worked on; memory is that of `FlashLayout.fixed_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.kernels.attention import attend_float, attend_paged, attend_ragged, merge_partials
from memwall.kv.flash import QUERY_ROWS, FlashFile, FlashLayout
from memwall.kv.flash_sequence import OWNER, FlashSequence
from memwall.memory import Arena
from memwall.memory.arena import SMALL_BYTES

MERGED_PARTS = 16
"""Chunks' parts of one query that are joined at once."""
Partial = tuple[np.ndarray, np.ndarray]
"""Outputs and stats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseSettings:
    """channels: r of D that are looked at first. tokens: k of S that are attended to, or a share of S (below 1).

    least: tokens attended to in any case, where `tokens` is a share: a sixteenth of a short context is next to nothing.
    mean: whether the mean of the values stands in for the rest.
    """

    channels: int
    tokens: float
    least: int = 1
    mean: bool = True

    def count(self, num_tokens: int) -> int:
        """k for so many tokens."""
        wanted = max(round(self.tokens * num_tokens), self.least) if self.tokens < 1 else int(self.tokens)
        return min(max(wanted, 1), num_tokens)


def pick_channels(q: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels [Hkv, r] with the largest |q| summed over the head's queries, and each query's share in them.

    q [Hkv, rep, D]. The share, ||q[i]||_1 / ||q||_1 [Hkv, rep], widens the softmax as SparQ's temperature does.
    """
    size = np.abs(q)
    best = np.sort(np.argpartition(size.sum(axis=1), -count, axis=1)[:, -count:], axis=1)
    picked = np.take_along_axis(size, best[:, None, :], axis=2).sum(axis=2)
    whole = size.sum(axis=2)
    return best, np.where(whole > 0, picked / np.where(whole > 0, whole, 1), 1.0)


def softmax(logits: np.ndarray) -> None:
    """Over the last axis, in place."""
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)


def top_tokens(shares: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest shares [S], in the order of tokens."""
    if count >= len(shares):
        return np.arange(len(shares))
    return np.sort(np.argpartition(shares, len(shares) - count)[len(shares) - count :])


def with_mean(part: Partial, alpha: np.ndarray, mean: np.ndarray) -> Partial:
    """Attention over the chosen tokens, stretched to all: the chosen carry the share alpha, the mean the rest.

    part: outputs [Hkv, 1, rep, D]; alpha [Hkv, rep]; mean [Hkv, D]. The sum of exponentials grows to what all tokens
    are taken to have, so that the result can be merged with attention over others.
    """
    share = alpha[:, None, :, None].astype(np.float32)
    out = share * part[0] + (1 - share) * mean[:, None, None, :]
    stats = part[1].copy()
    stats[..., 1] /= np.maximum(share[..., 0], np.finfo(np.float32).tiny)
    return out, stats


class StorageAttention:
    """See the module's text."""

    def __init__(self, layout: FlashLayout, file: FlashFile, arena: Arena, scale: float) -> None:
        self.layout, self.file, self.scale = layout, file, scale
        page, slots = layout.page_bytes, layout.slots

        def pages(*sizes: int) -> np.ndarray:
            count = int(np.prod(sizes))
            # direct I/O wants whole pages of memory, which small arrays are not given
            whole = arena.allocate(OWNER, max(count * page, SMALL_BYTES), np.uint8)
            return whole[: count * page].reshape(*sizes, page)

        self.halves = pages(2, slots)
        self._gathered = pages(slots).reshape(-1).view(np.float16).reshape(2, -1, layout.head_dim)
        self.images = pages(2, max(2, layout.channel_pages) * layout.kv_heads)
        self._floats = arena.allocate(OWNER, slots * page // 2, np.float32) if layout.sparse else None
        self.inbox = arena.allocate(OWNER, layout.inbox_bytes(), np.uint8)
        rows = QUERY_ROWS * layout.heads
        self._rows = arena.allocate(OWNER, (3, rows * layout.head_dim), np.float32)
        self._stats = arena.allocate(OWNER, (2, rows * 2), np.float32)

    def queries(self, q: np.ndarray) -> np.ndarray:
        """q [T, H, D] as they came, in the form that attention takes."""
        layout = self.layout
        shape = (len(q), layout.kv_heads, layout.heads // layout.kv_heads, layout.head_dim)
        out = self._room(0, len(q))
        out[:] = q.reshape(shape).transpose(1, 0, 2, 3)
        return out

    def _room(self, which: int, num_queries: int) -> np.ndarray:
        layout = self.layout
        shape = (layout.kv_heads, num_queries, layout.heads // layout.kv_heads, layout.head_dim)
        return self._rows[which, : int(np.prod(shape))].reshape(shape)

    def _stats_room(self, which: int, num_queries: int) -> np.ndarray:
        layout = self.layout
        shape = (layout.kv_heads, num_queries, layout.heads // layout.kv_heads, 2)
        return self._stats[which, : int(np.prod(shape))].reshape(shape)

    def _merge(self, result: Partial, parts: list[Partial]) -> Partial:
        """Joins parts to what was found before them, in the room for results."""
        every = [result, *parts]
        outs = [out.reshape(-1, *out.shape[2:]) for out, _ in every]
        out, stats = merge_partials(outs, [found.reshape(-1, *found.shape[2:]) for _, found in every])
        result[0][:], result[1][:] = out.reshape(result[0].shape), stats.reshape(result[1].shape)
        return result

    # ---- all tokens --------------------------------------------------------------------------------------------------

    def dense(
        self, sequence: FlashSequence, layer: int, q: np.ndarray, first_position: int, window: int | None
    ) -> Partial:
        """Attention of queries at consecutive positions over all tokens that the layer holds."""
        layout, num_queries = self.layout, q.shape[1]
        sequence.wait(layer)
        written, last = sequence.written[layer] // layout.group, first_position + num_queries - 1
        begin = 0 if window is None else max(first_position - window + 1, 0) // layout.group
        end = min(written, last // layout.group + 1)
        step = layout.slots // (2 * layout.kv_heads)
        bounds = [(a, min(a + step, end)) for a in range(begin, end, step)]
        result = self._nothing(num_queries)
        chunks = self.file.chunks([sequence.group_pages(layer, a, b) for a, b in bounds], self.halves)
        parts: list[Partial] = []
        for (a, b), pages in zip(bounds, chunks):
            out, stats = self._attend_groups(q, pages, a, b, first_position, window)
            if num_queries > 1:
                self._merge(result, [(out, stats)])
                continue
            parts.append((out.copy(), stats.copy()))
            if len(parts) == MERGED_PARTS:
                self._merge(result, parts)
                parts.clear()
        if sequence.lengths[layer] > sequence.written[layer]:
            parts.append(self._attend_waiting(sequence, layer, q, first_position, window))
        return self._merge(result, parts) if parts else result

    def _nothing(self, num_queries: int) -> Partial:
        out, stats = self._room(1, num_queries), self._stats_room(0, num_queries)
        out[:], stats[..., 0], stats[..., 1] = 0, -np.inf, 0
        return out, stats

    def _attend_groups(
        self, q: np.ndarray, pages: np.ndarray, begin: int, end: int, first_position: int, window: int | None
    ) -> Partial:
        layout, heads = self.layout, self.layout.kv_heads
        out, stats = self._room(2, q.shape[1]), self._stats_room(1, q.shape[1])
        rows = pages.view(np.float16).reshape(-1, 1, layout.head_dim)
        apart = heads * layout.group  # from a group's keys to its values
        numbers = np.arange(begin, end)
        for head in range(heads):
            table = ((numbers - begin) * 2 * heads + (head + numbers) % heads).astype(np.int32)
            attend_paged(
                q[head], rows[:-apart], rows[apart:], table, page_tokens=layout.group,
                length=(end - begin) * layout.group, scale=self.scale,
                first_position=first_position - begin * layout.group, window=window, out=out[head], stats=stats[head],
            )  # fmt: skip
        return out, stats

    def _attend_waiting(
        self, sequence: FlashSequence, layer: int, q: np.ndarray, first_position: int, window: int | None
    ) -> Partial:
        """Over the rows that no token page holds yet."""
        out, stats = self._room(2, q.shape[1]), self._stats_room(1, q.shape[1])
        written = sequence.written[layer]
        at, count = written - sequence.spanned[layer], sequence.lengths[layer] - written
        for head in range(self.layout.kv_heads):
            own = slice(head, head + 1)
            attend_float(
                q[head], sequence.keys[layer, at : at + count, own], sequence.values[layer, :count, own],
                scale=self.scale, first_position=first_position, window=window, key_start=written, out=out[head],
                stats=stats[head],
            )  # fmt: skip
        return out, stats

    # ---- chosen tokens -----------------------------------------------------------------------------------------------

    def sparse(self, sequence: FlashSequence, layer: int, q: np.ndarray, settings: SparseSettings) -> Partial:
        """SparF of one query q [Hkv, 1, rep, D] that sees all tokens of the layer."""
        sequence.wait(layer)
        length = sequence.lengths[layer]
        shares, together = sequence.logits(length)
        self._scores(sequence, layer, q[:, 0], settings.channels, shares)
        softmax(shares)
        np.sum(shares, axis=1, out=together)
        chosen = [top_tokens(own, settings.count(length)) for own in together]
        part = self._attend_chosen(sequence, layer, q, chosen)
        if not settings.mean:
            return part
        alpha = np.stack([own[:, places].sum(axis=1) for own, places in zip(shares, chosen)])
        waiting = sequence.values[layer, : length - sequence.written[layer]].sum(axis=0, dtype=np.float32)
        return with_mean(part, alpha, (sequence.sums[layer] + waiting) / np.float32(length))

    def _scores(self, sequence: FlashSequence, layer: int, q: np.ndarray, count: int, out: np.ndarray) -> None:
        """Logits [Hkv, rep, S] from the r channels that weigh most (steps 1 to 3)."""
        layout, per_page, span = self.layout, self.layout.channels, self.layout.span
        channels, share = pick_channels(q, count)
        picked = np.take_along_axis(q, channels[:, None, :], axis=2)
        picked *= (self.scale / np.sqrt(share))[..., None]
        heads = np.arange(layout.kv_heads)
        wanted, place = np.unique(heads[:, None] * layout.channel_pages + channels // per_page, return_inverse=True)
        columns = (place.reshape(channels.shape) * per_page + channels % per_page).reshape(-1)
        spans = sequence.spanned[layer] // span
        step = max(min(layout.slots // len(wanted), layout.slots * per_page // len(columns)), 1)
        bounds = [(a, min(a + step, spans)) for a in range(0, spans, step)]
        table = sequence.channel_table(spans)[:, layer].reshape(spans, layout.kv_heads * layout.channel_pages)
        parts = [table[a:b][:, wanted].reshape(-1) for a, b in bounds]
        for (a, b), pages in zip(bounds, self.file.chunks(parts, self.halves, by_channel=True)):
            self._score_spans(picked, pages, columns, (a, b), out)
        begin = sequence.spanned[layer]
        waiting = sequence.keys[layer, : sequence.lengths[layer] - begin]
        for head in heads:
            np.matmul(picked[head], waiting[:, head, channels[head]].T.astype(np.float32), out=out[head, :, begin:])

    def _score_spans(
        self, picked: np.ndarray, pages: np.ndarray, columns: np.ndarray, bounds: tuple[int, int], out: np.ndarray
    ) -> None:
        """The filter drops what came along in a page but was not picked; then one product a head."""
        assert self._floats is not None
        (a, b), span = bounds, self.layout.span
        read = pages.view(np.float16).reshape(b - a, -1, span)
        heads, _, count = picked.shape
        floats = self._floats[: (b - a) * len(columns) * span].reshape(heads, b - a, count, span)
        for number in range(b - a):
            floats[:, number] = read[number, columns].reshape(heads, count, span)
        for head in range(heads):
            logits = np.matmul(picked[head], floats[head])  # [spans, rep, span]
            out[head, :, a * span : b * span] = logits.transpose(1, 0, 2).reshape(len(picked[head]), -1)

    def _attend_chosen(self, sequence: FlashSequence, layer: int, q: np.ndarray, chosen: list[np.ndarray]) -> Partial:
        """Exact attention of each head over its own tokens, from the pages that hold one (steps 5 and 6)."""
        layout, heads, group = self.layout, self.layout.kv_heads, self.layout.group
        tokens = np.concatenate(chosen)
        head = np.repeat(np.arange(heads), [len(own) for own in chosen])
        result = self._nothing(1)
        paged = tokens < sequence.written[layer]
        if not paged.all():
            own, late = head[~paged], tokens[~paged]
            keys = sequence.keys[layer, late - sequence.spanned[layer], own]
            values = sequence.values[layer, late - sequence.written[layer], own]
            self._merge(result, [self._attend_rows(q, keys, values, own)])
            tokens, head = tokens[paged], head[paged]
        if not len(tokens):
            return result
        # pages in the order of the file: by group, and inside by the turn that the head has there
        number = tokens // group
        pairs, place = np.unique(number * heads + (head + number) % heads, return_inverse=True)
        step = layout.slots // 2
        bounds = [(a, min(a + step, len(pairs))) for a in range(0, len(pairs), step)]
        plans = [self._pair_pages(sequence, layer, pairs[a:b]) for a, b in bounds]
        for (a, b), (_, slots), pages in zip(bounds, plans, self.file.chunks([p for p, _ in plans], self.halves)):
            mine = np.flatnonzero((place >= a) & (place < b))
            rows = pages.view(np.float16).reshape(-1, layout.head_dim)
            found = []
            for which in range(2):
                places = slots[which, place[mine] - a] * group + tokens[mine] % group
                found.append(np.take(rows, places, axis=0, out=self._gathered[which, : len(mine)], mode="clip"))
            self._merge(result, [self._attend_rows(q, found[0], found[1], head[mine])])
        return result

    def _pair_pages(self, sequence: FlashSequence, layer: int, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Key and value pages of (group, turn) pairs in the order of the file, and where each came to be [2, n]."""
        heads = self.layout.kv_heads
        number, turn = pairs // heads, pairs % heads
        table = sequence.token_table(sequence.written[layer] // self.layout.group)
        own = [table[number, layer, which, (turn - number) % heads] for which in range(2)]
        order = np.argsort(np.concatenate([number * 2 * heads + turn, number * 2 * heads + heads + turn]))
        slots = np.empty(len(order), np.int64)
        slots[order] = np.arange(len(order))
        return np.concatenate(own)[order], slots.reshape(2, -1)

    def _attend_rows(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, head: np.ndarray) -> Partial:
        """Over rows [n, D] that belong to the heads named, head by head."""
        layout = self.layout
        offsets = np.zeros(layout.kv_heads + 1, np.int64)
        np.cumsum(np.bincount(head, minlength=layout.kv_heads), out=offsets[1:])
        out, stats = self._room(2, 1), self._stats_room(1, 1)
        none = np.empty((0, layout.kv_heads, layout.head_dim), np.float16)
        flat = (1, layout.heads, layout.head_dim)
        attend_ragged(
            q.reshape(flat), keys, values, offsets, none, none, scale=self.scale, first_query=0,
            out=out.reshape(flat), stats=stats.reshape(1, layout.heads, 2),
        )  # fmt: skip
        return out, stats
