"""The executor with a model: one step's tokens of all sequences go through each matrix together.

Keys and values lie in pages of the pool (`page_forms`): one page holds `page_tokens` tokens of all layers, so that
moving, sharing or swapping a page is one copy. Native attention finds tokens through page tables (`attend_paged`): the
cost over rows that lie in a line is a table look-up every 16 tokens, and in return any page can be anywhere, which
adapters, shared prefixes of any length and copies in groups need. Where these are not wanted, plain rows in a range of
addresses for each sequence do without tables (`slots`). All decoding sequences of a step are attended in one parallel
region, and so are all those that go on from shared prefixes, which are read once for all of them.

Numbers: attention and packed weights give a sequence the same bits whatever else is in its batch; dense float weights
are summed in an order that depends on how many tokens are multiplied at once, so their last bits may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from memwall.engine.executor import Entry, Output
from memwall.engine.page_forms import PAGED as PAGED
from memwall.engine.page_forms import held_as
from memwall.engine.page_forms import page_bytes as page_bytes
from memwall.engine.pooling import Pooler
from memwall.engine.sampling import Sampler, bend, picks
from memwall.engine.sequence import Sequence as EngineSequence
from memwall.engine.sequence import TokenLogprobs
from memwall.kernels.lora import LoraBatch, LoraRoom, PagedLora
from memwall.kv import CacheShape
from memwall.memory import PagePool
from memwall.models.decoder import Decoder

if TYPE_CHECKING:
    from memwall.engine.guide import Cursor, Guide


def lora_room(shape: CacheShape, page_tokens: int, kv: str = "float16") -> LoraRoom:
    """How adapters lie in these pages: a unit is as long as one token's keys, or values, of a layer."""
    units = 2 * shape.num_layers * page_tokens
    unit_bytes = page_bytes(shape, page_tokens, kv) // units // 4 * 4  # of whole float32 numbers
    return LoraRoom(num_layers=shape.num_layers, unit_bytes=unit_bytes, units_per_block=2 * page_tokens)


@dataclass(slots=True)
class _Segment:
    """Rows [row, row + count) of the batch are tokens [first, first + count) of one sequence, or what comes after
    `base` tokens of a prefix: then they are counted from there.
    """

    row: int
    count: int
    first: int
    table: np.ndarray
    base: int = 0
    prefix: np.ndarray | None = None


def batch_order(entry: Entry) -> tuple[bool, int, int, bool]:
    """Where an entry goes in a step's batch: sequences by themselves first, one token before many, then those that go
    on from one prefix after as many of its tokens side by side.
    """
    one = entry.sequence
    return (one.parent is not None, one.parent.id if one.parent is not None else 0, one.base, entry.count > 1)


class BatchCache:
    """The decoder's view of one step: rows in, rows attended; whose they are is known here."""

    takes_inputs: ClassVar[bool] = False
    records: ClassVar[bool] = False
    length = next_position = 0  # positions come with the tokens

    def __init__(self, shape: CacheShape, pool: PagePool, page_tokens: int, kv: str = "float16") -> None:
        self.shape = shape
        self.pool = pool
        self.page_tokens = page_tokens
        self.kv = kv
        self._held = held_as(kv, shape, page_tokens)
        self._committed = -1
        self._fresh: tuple[np.ndarray, np.ndarray] | None = None
        self._segments: list[_Segment] = []
        self._grouped: list[_Segment] = []
        self._pieces: dict[tuple[int, int, bool], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._at = 0

    def begin(self, batch: list[Entry]) -> np.ndarray:
        """The batch of the next forward pass, in `batch_order`; gives all positions."""
        self._look()
        step, self._fresh = self._held.step, None
        tables = [np.asarray(entry.sequence.pages, np.int32) * np.int32(step) for entry in batch]
        self._singles = sum(entry.count == 1 and entry.sequence.parent is None for entry in batch)
        singles = batch[: self._singles]
        width = max((len(table) for table in tables[: self._singles]), default=0)
        self._tables = np.zeros((self._singles, width), np.int32)
        for row, table in enumerate(tables[: self._singles]):
            self._tables[row, : len(table)] = table
        self._lengths = np.array([entry.first + 1 for entry in singles], np.int64)
        self._segments, self._grouped, self._pieces, row = [], [], {}, 0
        prefixes: dict[int, np.ndarray] = {}
        positions, rows = [], []
        for entry, table in zip(batch, tables):
            one, base = entry.sequence, entry.sequence.base
            at = np.arange(entry.first, entry.first + entry.count, dtype=np.int64)
            positions.append(at)
            at = at - base
            rows.append(table[at // self.page_tokens].astype(np.int64) * self.page_tokens + at % self.page_tokens)
            if one.parent is not None:
                if one.parent.id not in prefixes:
                    prefixes[one.parent.id] = np.asarray(one.parent.pages, np.int32) * np.int32(step)
                held = prefixes[one.parent.id]
                self._grouped.append(_Segment(row, entry.count, entry.first - base, table, base, held))
            elif entry.count > 1:
                self._segments.append(_Segment(row, entry.count, entry.first, table))
            row += entry.count
        self._rows = np.concatenate(rows)
        self._at = 0
        return np.concatenate(positions)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """Keys and values [B, Hkv, D] of all rows go to their pages, some of them when the layer settles."""
        now = [slice(0, len(k))]
        if self._held.defers and self._segments and not self._grouped:  # whose prefixes may be among these rows
            self._fresh = (k, v)
            first, last = self._segments[0], self._segments[-1]
            now = [slice(0, first.row), slice(last.row + last.count, len(k))]
            for one in self._segments:
                page, held = divmod(one.first, self.page_tokens)
                if held:
                    self._held.cut(layer, int(one.table[page]), held)
        for rows in now:
            if rows.start < rows.stop:
                self.append_rows(layer, k[rows], v[rows], rows.start)
        self._at = 0

    def append_rows(self, layer: int, k: np.ndarray, v: np.ndarray, begin: int) -> None:
        """The same for rows [begin, begin + n) of the batch, which go to their pages now."""
        self._held.store(layer, k, v, self._rows[begin : begin + len(k)])

    @property
    def singles(self) -> int:
        """Rows at the batch's beginning that are one token of a sequence by itself each."""
        return self._singles

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Attention of the next rows of the batch [n, H, D]; rows come in order, blocks of them at a time."""
        begin, self._at = self._at, self._at + len(q)
        return self.attend_rows(layer, q, begin, out)

    def attend_rows(self, layer: int, q: np.ndarray, begin: int, out: np.ndarray) -> np.ndarray:
        """Attention of rows [begin, begin + n) of the batch; threads may attend different rows at once."""
        stop, window = begin + len(q), self.shape.window(layer)
        end = min(self._singles, stop)
        if begin < end:
            self._held.attend_singles(
                layer, q[: end - begin], self._tables[begin:end], self._lengths[begin:end], out[: end - begin]
            )
        for segment in self._segments:
            first, last = max(segment.row, begin), min(segment.row + segment.count, stop)
            if first >= last:
                continue
            place, fresh = slice(first - begin, last - begin), None
            if self._fresh is not None:
                mine = slice(segment.row, segment.row + segment.count)
                fresh = (self._fresh[0][mine], self._fresh[1][mine])
            span = (segment.first + segment.count, segment.first + first - segment.row)
            self._held.attend_rows(layer, q[place], segment.table, span, out[place], fresh)
        grouped = max(self._grouped[0].row, begin) if self._grouped else stop
        if grouped < stop:
            pieces = self._group_pieces(grouped, stop, window)
            self._held.attend_groups(layer, q[grouped - begin :], pieces, out[grouped - begin :])
        return out

    def _group_pieces(self, begin: int, end: int, window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `attend_shared` is told of rows [begin, end): the same in every layer."""
        key = (begin, end, window is not None)
        if key not in self._pieces:
            self._pieces[key] = group_pieces(self._grouped, begin, end, windowed=window is not None)
        return self._pieces[key]

    def settle(self, layer: int) -> None:
        """All rows are stored as they will stay."""
        if self._fresh is not None:
            first, last = self._segments[0], self._segments[-1]
            rows = slice(first.row, last.row + last.count)
            self.append_rows(layer, self._fresh[0][rows], self._fresh[1][rows], first.row)
            self._fresh = None

    def truncate(self, length: int) -> None:
        """What a failed step wrote lies beyond every sequence's computed tokens and is written again."""

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        raise NotImplementedError

    def _look(self) -> None:
        """The pages that are resident now."""
        if self.pool.committed_bytes != self._committed:
            self._committed = self.pool.committed_bytes
            self._held.look(self.pool)


def group_pieces(
    segments: Sequence[_Segment], begin: int, end: int, *, windowed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables, own pieces and prefix pieces of rows [begin, end) of segments that go on from prefixes.

    Neighbours that go on from the same prefix after as many tokens are one piece of it; with a window each sees another
    part of it, and is a piece for itself.
    """
    tables: list[np.ndarray] = []
    own: list[list[int]] = []
    shared: list[list[int]] = []
    place, at, last = 0, 0, None
    for one in segments:
        first, stop = max(one.row, begin), min(one.row + one.count, end)
        if first >= stop or one.prefix is None:
            continue
        key = one.first + first - one.row
        own.append([first - begin, stop - first, place, one.first + one.count, key])
        tables.append(one.table)
        place += len(one.table)
        if last is not None and last.prefix is one.prefix and last.base == one.base and not windowed:
            shared[-1][1] += stop - first
            continue
        if last is None or last.prefix is not one.prefix:
            tables.append(one.prefix)
            at, place = place, place + len(one.prefix)
        shared.append([first - begin, stop - first, at, one.base, one.base + key])
        last = one
    return np.concatenate(tables), np.array(own, np.int64), np.array(shared, np.int64)


class HeldAdapters(Protocol):
    """Adapters in pages."""

    def paged(self, key: str) -> PagedLora:
        """Where an adapter that is held lies."""

    def array(self) -> np.ndarray:
        """All resident pages, uint8 [pages, page bytes]."""


class ModelExecutor:
    """Runs steps on a decoder."""

    def __init__(
        self,
        decoder: Decoder,
        cache: BatchCache,
        *,
        logit_rows: int,
        scratch: np.ndarray,
        adapters: HeldAdapters | None = None,
        lora: LoraBatch | None = None,
    ) -> None:
        """logit_rows: as the decoder was built with; scratch: of `Sampler.scratch_shape`, for all requests in turn.

        adapters, lora: both, where requests may have adapters.
        """
        self.decoder = decoder
        self.adapters, self.lora = adapters, lora
        if lora is not None:
            decoder.adapt(lora)
        self.cache = cache
        self._logit_rows = logit_rows
        self._scratch = scratch
        self._samplers: dict[int, Sampler] = {}
        self._cursors: dict[int, Cursor] = {}
        self._pooler = Pooler()

    def run(self, batch: list[Entry]) -> list[Output | None]:
        """See `Executor`."""
        # rows of one adapter lie together, so that its weights are read once for all of them
        order = sorted(
            range(len(batch)), key=lambda i: (*batch_order(batch[i]), batch[i].sequence.request.adapter or "")
        )
        sorted_batch = [batch[i] for i in order]
        positions = self.cache.begin(sorted_batch)
        self.assign(sorted_batch)
        tokens = [t for entry in sorted_batch for t in entry.sequence.tokens[entry.first : entry.first + entry.count]]
        hidden = self.decoder.batch(np.array(tokens, np.int64), positions, self.cache)
        lasts = np.cumsum([entry.count for entry in sorted_batch]) - 1
        outputs: list[Output | None] = [None] * len(batch)
        asking = []
        for place, (entry, last) in enumerate(zip(sorted_batch, lasts)):
            if entry.sequence.request.pooling is not None:
                vector = self._pooler.take(entry, hidden[last + 1 - entry.count : last + 1])
                outputs[order[place]] = None if vector is None else Output(-1, vector=vector)
            elif entry.sample:
                asking.append(place)
        for begin in range(0, len(asking), self._logit_rows):
            some = asking[begin : begin + self._logit_rows]
            logits = self.decoder.logits(np.ascontiguousarray(hidden[lasts[some]]))
            for row, place in zip(logits, some):
                entry = sorted_batch[place]
                asked = entry.sequence.request
                plain = asked.guide is None and not asked.sampling.bends
                outputs[order[place]] = self._draw(entry.sequence, row) if plain else self._draw_bent(entry, row)
        return outputs

    def forget(self, sequence: EngineSequence) -> None:
        """See `Executor`."""
        self._samplers.pop(sequence.id, None)
        self._cursors.pop(sequence.id, None)
        self._pooler.forget(sequence.id)

    def assign(self, batch: list[Entry]) -> None:
        """Tells which rows of the step belong to which adapter."""
        if self.lora is None or self.adapters is None:
            return
        segments: list[tuple[int, int, PagedLora]] = []
        row, last = 0, None
        for entry in batch:
            key = entry.sequence.request.adapter
            if key is not None and key == last:
                first, count, paged = segments[-1]
                segments[-1] = (first, count + entry.count, paged)
            elif key is not None:
                assert entry.sequence.holds_adapter
                segments.append((row, entry.count, self.adapters.paged(key)))
            row, last = row + entry.count, key
        if segments:
            self.lora.assign(self.adapters.array(), segments)
        else:
            self.lora.clear()

    def _draw(self, sequence: EngineSequence, logits: np.ndarray) -> Output:
        token = self._sampler(sequence).pick(logits)
        wanted = sequence.request.logprobs
        return Output(token, None if wanted is None else self._logprobs(logits, token, wanted))

    def _draw_bent(self, entry: Entry, logits: np.ndarray) -> Output:
        """The same where the answer so far has a say: penalties, and the form it keeps to. Log-probabilities stay the
        model's own.
        """
        sequence, asked = entry.sequence, entry.sequence.request
        made = sequence.tokens[sequence.num_prompt : entry.first + entry.count]
        own = logits if asked.logprobs is None else logits.copy()
        bend(logits, made, asked.sampling)
        pick = self._picks(sequence)
        token = pick(logits) if asked.guide is None else self._cursor(sequence, asked.guide).pick(made, logits, pick)
        return Output(token, None if asked.logprobs is None else self._logprobs(own, token, asked.logprobs))

    def _picks(self, sequence: EngineSequence) -> Callable[[np.ndarray], int]:
        """Draws for the next token of a sequence."""
        sampler = self._sampler(sequence)
        return picks(sampler, sampler.draw())

    def _cursor(self, sequence: EngineSequence, guide: Guide) -> Cursor:
        """Where its answer stands in its form."""
        if sequence.id not in self._cursors:
            self._cursors[sequence.id] = guide.cursor()
        return self._cursors[sequence.id]

    def _sampler(self, sequence: EngineSequence) -> Sampler:
        if sequence.id not in self._samplers:
            self._samplers[sequence.id] = Sampler(sequence.request.sampling, self._scratch)
        return self._samplers[sequence.id]

    def _logprobs(self, logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
        peak = logits.max()
        shares = np.subtract(logits, peak, out=self._scratch[0])
        np.exp(shares, out=shares)
        total = float(peak) + float(np.log(shares.sum(dtype=np.float64)))
        top: tuple[tuple[int, float], ...] = ()
        if count:
            best = np.argpartition(logits, len(logits) - count)[len(logits) - count :]
            best = best[np.lexsort((best, -logits[best]))]
            top = tuple((int(i), float(logits[i]) - total) for i in best)
        return TokenLogprobs(own=float(logits[token]) - total, top=top)
