"""One sequence in the storage process: what waits in its memory, which pages hold the rest, and how it gets there.

New rows wait in memory: values until a token page is full, keys until a channel page is. A full group of tokens is
written as token pages (keys and values), a full span of keys once more as channel pages, by a thread, while the process
goes on. Two tables say where the pages are: by token group and head, by span, head and channel group.

Units and shapes: rows [n, Hkv, D] float16; lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from memwall.errors import DoesNotFit
from memwall.kv.flash import ENTRY_BYTES, FLOAT_BYTES, FlashFile, FlashLayout
from memwall.memory import Arena, Region

OWNER = "storage"
Fill = Callable[[np.ndarray], None]


class Writer:
    """Writes page images in the background: one is filled while the other is written."""

    def __init__(self, file: FlashFile, images: np.ndarray) -> None:
        self.file, self.images = file, images
        self._busy: list[Future[None] | None] = [None, None]
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, "flush")

    def submit(self, pages: np.ndarray, fill: Fill) -> Future[None]:
        """Lets `fill` make the image now and writes it soon."""
        before = self._busy[self._turn]
        if before is not None:
            before.result()
        image = self.images[self._turn][: len(pages)]
        fill(image)
        job = self._thread.submit(self.file.write, pages, image)
        self._busy[self._turn] = job
        self._turn = 1 - self._turn
        return job

    def close(self) -> None:
        self._thread.shutdown()


class FlashSequence:
    """See the module's text. `halves`: two chunks of pages to read into, shared by all sequences of the process."""

    def __init__(self, layout: FlashLayout, file: FlashFile, writer: Writer, arena: Arena, halves: np.ndarray) -> None:
        self.layout, self.file, self.writer, self.arena, self.halves = layout, file, writer, arena, halves
        rows = (layout.kv_heads, layout.head_dim)
        self.keys = arena.allocate(OWNER, (layout.layers, layout.key_rows, *rows), np.float16)
        self.values = arena.allocate(OWNER, (layout.layers, layout.group, *rows), np.float16)
        self.sums = arena.allocate(OWNER, (layout.layers, *rows), np.float32)
        groups, spans = layout.capacity // layout.group, layout.capacity // layout.span
        self._token_table = arena.reserve(OWNER, max(groups * layout.group_entries() * ENTRY_BYTES, 1))
        self._channel_table = arena.reserve(OWNER, max(spans * layout.span_entries() * ENTRY_BYTES, 1))
        self._logits = arena.reserve(OWNER, layout.capacity * (layout.heads + layout.kv_heads) * FLOAT_BYTES)
        self.lengths = [0] * layout.layers
        self.written = [0] * layout.layers
        """Tokens of each layer that are in token pages."""
        self.spanned = [0] * layout.layers
        """Tokens of each layer whose keys are in channel pages."""
        self.blocks: set[int] = set()
        self._open: int | None = None
        self._next = 0
        self._spare: list[int] = []
        self._pending: dict[int, list[Future[None]]] = {}

    # ---- room --------------------------------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that it will hold once every layer has so many tokens."""
        missing = self._missing_pages(num_tokens)
        return len(self.blocks) + max(-(-missing // self.layout.pages_per_block), 0)

    def reserve(self, num_tokens: int) -> None:
        """Takes the blocks for so many tokens; DoesNotFit, with none taken, when the disk is full."""
        fresh: list[int] = []
        try:
            while len(self.blocks) + len(fresh) < self.blocks_for(num_tokens):
                fresh.append(self.file.take_block())
        except DoesNotFit:
            for block in fresh:
                self.file.erase(block)
            raise
        self._spare += fresh
        self.blocks.update(fresh)

    def _missing_pages(self, num_tokens: int) -> int:
        layout = self.layout
        held = sum(
            layout.kv_heads * (2 * (w // layout.group) + layout.channel_pages * (s // layout.span))
            for w, s in zip(self.written, self.spanned)
        )
        room = len(self._spare) * layout.pages_per_block
        if self._open is not None:
            room += layout.pages_per_block - self._next
        return layout.pages(num_tokens) - held - room

    def _allocate(self, count: int) -> np.ndarray:
        """Numbers of the next pages of the open block, and of the next ones."""
        pages, per_block = np.empty(count, np.int32), self.layout.pages_per_block
        done = 0
        while done < count:
            if self._open is None or self._next == per_block:
                if not self._spare:
                    self._spare.append(self.file.take_block())
                    self.blocks.add(self._spare[-1])
                self._open, self._next = self._spare.pop(0), 0
            step = min(count - done, per_block - self._next)
            first = self._open * per_block + self._next
            pages[done : done + step] = np.arange(first, first + step)
            done, self._next = done + step, self._next + step
        return pages

    # ---- tables ------------------------------------------------------------------------------------------------------

    def token_table(self, groups: int) -> np.ndarray:
        """Pages [groups, layer, key or value, head]."""
        return self._table(self._token_table, groups, (self.layout.layers, 2, self.layout.kv_heads))

    def channel_table(self, spans: int) -> np.ndarray:
        """Pages [spans, layer, head, channel group]."""
        shape = (self.layout.layers, self.layout.kv_heads, self.layout.channel_pages)
        return self._table(self._channel_table, spans, shape)

    def logits(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Room for a score of every token: by query head [Hkv, H / Hkv, n], and of the head's group [Hkv, n]."""
        kv_heads, heads = self.layout.kv_heads, self.layout.heads
        self._logits.commit(num_tokens * (heads + kv_heads) * FLOAT_BYTES)
        scores = self._logits.array((kv_heads, heads // kv_heads, num_tokens), np.float32)
        return scores, self._logits.array((kv_heads, num_tokens), np.float32, scores.nbytes)

    def _table(self, region: Region, count: int, shape: tuple[int, ...]) -> np.ndarray:
        region.commit(count * int(np.prod(shape)) * ENTRY_BYTES)
        return region.array((count, *shape), np.int32)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        """Takes rows of any number of tokens; full pages are on their way when it returns."""
        done = 0
        while done < len(k):
            step = min(self.layout.group - (self.lengths[layer] - self.written[layer]), len(k) - done)
            self.put(layer, k[done : done + step], v[done : done + step])
            self.flush(layer)
            done += step

    def put(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        """Takes rows that a token page has room for. `flush` must follow before the next."""
        at, inside = self.lengths[layer] - self.spanned[layer], self.lengths[layer] - self.written[layer]
        self.keys[layer, at : at + len(k)] = k
        self.values[layer, inside : inside + len(v)] = v
        self.lengths[layer] += len(k)
        self.file.counters.new_bytes += k.nbytes + v.nbytes

    def flush(self, layer: int) -> None:
        """Writes what fills whole pages."""
        if self.lengths[layer] - self.written[layer] == self.layout.group:
            self._write_group(layer)
        if self.lengths[layer] - self.spanned[layer] == self.layout.span:
            self._write_span(layer)

    def _write_group(self, layer: int) -> None:
        layout, begin = self.layout, self.written[layer]
        number, heads = begin // layout.group, layout.kv_heads
        at = begin - self.spanned[layer]
        both = (self.keys[layer, at : at + layout.group], self.values[layer])
        pages = self._allocate(2 * heads)

        def fill(image: np.ndarray) -> None:
            rows = image.view(np.float16).reshape(2, heads, layout.group, layout.head_dim)
            for own, new in zip(rows, both):
                # heads take turns, so that the pages of one are not all on one flash channel
                own[:] = np.roll(new.transpose(1, 0, 2), number % heads, axis=0)

        self._wait_later(layer, self.writer.submit(pages, fill))
        turned = np.roll(pages.reshape(2, heads), -(number % heads), axis=1)
        self.token_table(number + 1)[number, layer] = turned
        self.sums[layer] += self.values[layer].sum(axis=0, dtype=np.float32)
        self.written[layer] += layout.group

    def _write_span(self, layer: int) -> None:
        layout, number = self.layout, self.spanned[layer] // self.layout.span
        shape = (layout.kv_heads, layout.channel_pages)
        pages = self._allocate(shape[0] * shape[1])

        def fill(image: np.ndarray) -> None:
            columns = image.view(np.float16).reshape(layout.kv_heads, layout.head_dim, layout.span)
            columns[:] = self.keys[layer].transpose(1, 2, 0)

        self._wait_later(layer, self.writer.submit(pages, fill))
        self.channel_table(number + 1)[number, layer] = pages.reshape(shape)
        self.spanned[layer] += layout.span

    def _wait_later(self, layer: int, job: Future[None]) -> None:
        self._pending.setdefault(layer, []).append(job)

    def wait(self, layer: int | None = None) -> None:
        """Until the pages of a layer, or of all, are in the file; raises what went wrong on the way."""
        for each in [layer] if layer is not None else list(self._pending):
            for job in self._pending.pop(each, []):
                job.result()

    def group_pages(self, layer: int, begin: int, end: int) -> np.ndarray:
        """Token pages of groups [begin, end) in the order of the file: keys of all heads, values of all heads."""
        heads = self.layout.kv_heads
        numbers = np.arange(begin, end)[:, None]
        order = (np.arange(heads) - numbers) % heads
        table = self.token_table(end)[begin:, layer]
        return np.take_along_axis(table, order[:, None, :], axis=2).reshape(-1)

    def group_rows(self, pages: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [n, Hkv, D] of such pages, read before: copies."""
        layout, heads = self.layout, self.layout.kv_heads
        rows = pages.view(np.float16).reshape(end - begin, 2, heads, layout.group, layout.head_dim)
        places = (np.arange(heads) + np.arange(begin, end)[:, None]) % heads
        rows = np.take_along_axis(rows, places[:, None, :, None, None], axis=2)
        keys, values = rows.transpose(1, 0, 3, 2, 4).reshape(2, -1, heads, layout.head_dim)
        return keys, values

    def rows(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [n, Hkv, D] of tokens [begin, end): as many as a chunk of pages holds at most."""
        self.wait(layer)
        written, group = self.written[layer], self.layout.group
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        if begin < written:
            first, last = begin // group, -(-min(end, written) // group)
            pages = self.group_pages(layer, first, last)
            self.file.read(pages, self.halves[0])
            keys, values = self.group_rows(self.halves[0][: len(pages)], first, last)
            inside = slice(begin - first * group, min(end, written) - first * group)
            parts.append((keys[inside], values[inside]))
        if end > written:
            own, at = slice(max(begin - written, 0), end - written), written - self.spanned[layer]
            parts.append((self.keys[layer, at:][own], self.values[layer][own]))
        return np.concatenate([k for k, _ in parts]), np.concatenate([v for _, v in parts])

    # ---- going back, copying, ending ---------------------------------------------------------------------------------

    def truncate(self, num_tokens: int) -> None:
        """Forgets what follows; rows of pages that are no longer whole come back to memory."""
        self.wait()
        for layer, length in enumerate(self.lengths):
            if length > num_tokens:
                self._cut(layer, num_tokens)
        for block in (*self._spare, *([self._open] if self._open is not None else [])):
            if self.file.is_empty(block):
                self.file.erase(block)
                self.blocks.discard(block)
                self._open = None if block == self._open else self._open
        self._spare = []
        longest = max(self.lengths)
        self._token_table.shrink(longest // self.layout.group * self.layout.group_entries() * ENTRY_BYTES)
        self._channel_table.shrink(longest // self.layout.span * self.layout.span_entries() * ENTRY_BYTES)
        self._logits.shrink(longest * (self.layout.heads + self.layout.kv_heads) * FLOAT_BYTES)

    def _cut(self, layer: int, num_tokens: int) -> None:
        group, span = self.layout.group, self.layout.span
        before = self.written[layer], self.spanned[layer]
        written = min(before[0], num_tokens // group * group)
        spanned = min(before[1], num_tokens // span * span)
        if written < before[0]:
            step = self.halves.shape[1] // (2 * self.layout.kv_heads) * group
            for begin in range(spanned, num_tokens, step):
                end = min(begin + step, num_tokens)
                keys, values = self.rows(layer, begin, end)
                self.keys[layer, begin - spanned : end - spanned] = keys
                if end > written:
                    self.values[layer, : end - written] = values[max(written - begin, 0) :]
            self.sums[layer] = 0
            for begin in range(0, written, step):
                _, values = self.rows(layer, begin, min(begin + step, written))
                for own in values.reshape(-1, group, *values.shape[1:]):
                    self.sums[layer] += own.sum(axis=0, dtype=np.float32)
            table = self.token_table(before[0] // group)
            self._drop(table[written // group :, layer].reshape(-1))
        if spanned < before[1]:
            table = self.channel_table(before[1] // span)
            self._drop(table[spanned // span :, layer].reshape(-1))
        self.lengths[layer], self.written[layer], self.spanned[layer] = num_tokens, written, spanned

    def _drop(self, pages: np.ndarray) -> None:
        self.blocks.difference_update(self.file.invalidate(pages, self._open))

    def copy_to(self, other: FlashSequence) -> None:
        """The other, still empty, becomes equal, in pages of its own: read and written here, none sent anywhere."""
        self.wait()
        other.reserve(max(self.lengths))
        for layer in range(self.layout.layers):
            groups, spans = self.written[layer] // self.layout.group, self.spanned[layer] // self.layout.span
            if groups:
                theirs, heads = other.token_table(groups), self.layout.kv_heads
                for number in range(groups):
                    fresh = other._copied(self.group_pages(layer, number, number + 1))
                    theirs[number, layer] = np.roll(fresh.reshape(2, heads), -(number % heads), axis=1)
            if spans:
                mine, theirs = self.channel_table(spans), other.channel_table(spans)
                for number in range(spans):
                    pages = mine[number, layer]
                    theirs[number, layer] = other._copied(pages.reshape(-1)).reshape(pages.shape)
        for name in ("keys", "values", "sums"):
            getattr(other, name)[:] = getattr(self, name)
        other.lengths, other.written = list(self.lengths), list(self.written)
        other.spanned = list(self.spanned)

    def _copied(self, pages: np.ndarray) -> np.ndarray:
        fresh = self._allocate(len(pages))
        self.file.read(pages, self.halves[0])
        self.file.write(fresh, self.halves[0][: len(pages)])
        return fresh

    def release(self) -> None:
        """Its blocks are erased whole, its memory goes back."""
        self.wait()
        for block in self.blocks:
            self.file.erase(block)
        self.blocks, self._spare, self._open = set(), [], None
        for region in (self._token_table, self._channel_table, self._logits):
            region.release()
        for array in (self.keys, self.values, self.sums):
            self.arena.free(array)
