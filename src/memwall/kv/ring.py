"""Rows of the newest tokens in a ring that never grows, with keys rotated by their place in a frame of tokens.

A rotary logit knows only the distance of a query from a key, so a key may carry any rotation that the query's own can
be matched with. Tokens are cut in frames; a key is rotated by its place in its frame. A query is rotated by its place
in its own frame for the keys of that frame, and once more by the length of a frame for those of the one before. So a
key is written once and never turned again, no angle grows with the stream, and a query needs two rotations however long
the ring is. It is what rotating all keys anew by their places in the cache at each step gives (StreamingLLM).

`RingLayout` says where tokens are; `FloatRing` holds float rows, `KiviRing` rows that KIVI codes once they are R tokens
old. Both hold the newest tokens of one layer, in pieces that attention can take whole: neither wrapped nor of two
frames.

Shapes: rows [tokens, Hkv, D]; tokens are counted from the start of the stream, of which the first `sinks` are not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.errors import InputError
from memwall.kernels import attention
from memwall.kernels.parts import CachePart, coded_part, float_part
from memwall.kv.base import CacheShape
from memwall.kv.coded_state import CODED, RECENT, Blocks, Recent
from memwall.kv.float_store import OWNER, GrowingRows, float_dtype
from memwall.kv.kivi_state import KiviSettings
from memwall.kv.policy import Policy
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

SPARE_TOKENS = 16
"""Tokens held beyond the window: so many can be written before the pass that brings them is over, and be taken back."""


@dataclass(frozen=True, slots=True)
class RingLayout:
    """sinks: tokens before the ring's first; slots: tokens it holds; frame: tokens of a frame, a multiple of `slots`,
    so that a frame begins at slot 0.
    """

    sinks: int
    slots: int
    frame: int

    def frame_of(self, token: int) -> int:
        """The frame of a token; sinks are in the first."""
        return max(token - self.sinks, 0) // self.frame

    def place(self, token: int, frame: int) -> int:
        """What a token is rotated by, seen from a frame: its distance from that frame's start, after the sinks."""
        return token - frame * self.frame

    def slot(self, token: int) -> int:
        """Where a token that is no sink lies in the ring."""
        return (token - self.sinks) % self.slots

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Tokens [begin, end) cut where the ring wraps, which is also where frames end."""
        while begin < end:
            stop = min(end, begin + self.slots - self.slot(begin))
            yield begin, stop
            begin = stop

    def frames(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Tokens [begin, end) cut where frames end, each with its frame."""
        while begin < end:
            frame = self.frame_of(begin)
            stop = min(end, self.sinks + (frame + 1) * self.frame)
            yield begin, stop, frame
            begin = stop


Run = tuple[int, int, tuple[int, int]]
"""Consecutive tokens of one frame: coded ones [begin, stop), if any, and the exact ones [begin, stop) behind them."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """What a ring does for the next token: the row that it goes to; the exact row, how many from there on, and the slot
    of what is coded before it attends; the runs that it then sees, as `parts.attend_parts` wants them: with the token
    that each begins at.
    """

    row: int
    coding: tuple[int, int, int]
    runs: list[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one frame: the first of them, and what attends to them (arguments of `attention`)."""

    begin: int
    frame: int
    arguments: dict[str, Any]

    def attend(self, q: np.ndarray, **where: Any) -> None:
        """Attention of q [T, H, D], rotated for the piece's frame."""
        call = attention.attend_kivi if "bits" in self.arguments else attention.attend_float
        call(q, **self.arguments, key_start=self.begin, **where)


class FloatRing:
    """Float rows of one layer."""

    def __init__(self, layout: RingLayout, arena: Arena, shape: CacheShape, capacity_tokens: int, dtype: str) -> None:
        self.layout = layout
        rows = min(layout.slots, capacity_tokens)
        self._parts = [GrowingRows(arena, OWNER, rows, shape, float_dtype(dtype)) for _ in range(2)]
        self.first = self.end = layout.sinks

    @staticmethod
    def layout_of(policy: Policy, shape: CacheShape, sinks: int, window: int) -> RingLayout:
        """The ring that a window needs."""
        return RingLayout(sinks, window + SPARE_TOKENS, window + SPARE_TOKENS)

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, layout: RingLayout, num_tokens: int, capacity: int
    ) -> dict[str, int]:
        """Bytes per ledger owner of all layers, with `num_tokens` of the ring's taken in."""
        row_bytes = shape.row_values * float_dtype(policy.name).itemsize
        return {OWNER: 2 * shape.num_layers * round_up(min(num_tokens, layout.slots) * row_bytes)}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, layout: RingLayout, num_tokens: int) -> int:
        """Bytes of so many of the newest tokens, of all layers."""
        return 2 * shape.num_layers * num_tokens * shape.row_values * float_dtype(policy.name).itemsize

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._parts)

    @property
    def spare(self) -> int:
        """New tokens that may be put before their pass is over."""
        return SPARE_TOKENS

    def reserve(self, end: int) -> None:
        """Room for the tokens up to `end`; BudgetExceeded before anything is touched."""
        for rows in self._parts:
            rows.reserve(min(max(end - self.layout.sinks, 0), self.layout.slots))

    def put(self, k: np.ndarray, v: np.ndarray) -> None:
        """The next tokens, keys rotated by their places in their frames; of many only the last are kept."""
        layout, begin, end = self.layout, self.end, self.end + len(k)
        for first, stop in layout.pieces(max(begin, end - layout.slots), end):
            slot = layout.slot(first)
            for rows, new in zip(self._parts, (k, v)):
                rows.rows(slot, slot + stop - first)[:] = new[first - begin : stop - begin]
        self.first, self.end = max(self.first, end - layout.slots), end

    def part(self) -> CachePart:
        """See `parts`; the same rows as long as the ring lives."""
        return float_part(*(rows.capacity() for rows in self._parts))

    def has(self, end: int) -> bool:
        """Whether there is room for the tokens up to `end`."""
        return self._parts[-1].has(min(max(end - self.layout.sinks, 0), self.layout.slots))

    def next_token(self, begin: int) -> NextToken:
        """For the one at `end`, which sees tokens from `begin` on."""
        layout, token = self.layout, self.end
        runs: list[tuple[int, tuple[int, ...]]] = []
        for first, stop in layout.pieces(max(begin, self.first, token + 1 - layout.slots), token + 1):
            slot = layout.slot(first)
            runs.append((first, (0, 0, 0, slot, slot, stop - first, token - first, max(begin - first, 0))))
        return NextToken(layout.slot(token), (0, 0, 0), runs)

    def take_next(self) -> None:
        """That was done."""
        self.end += 1
        self.first = max(self.first, self.end - self.layout.slots)

    def make_room(self) -> None:
        """Rows stay where they are."""

    def pieces(self, begin: int) -> Iterator[Piece]:
        """What is held of the tokens from `begin` on."""
        layout = self.layout
        for first, stop in layout.pieces(max(begin, self.first), self.end):
            slot = layout.slot(first)
            k, v = (rows.rows(slot, slot + stop - first) for rows in self._parts)
            yield Piece(first, layout.frame_of(first), {"k": k, "v": v})

    def truncate(self, end: int) -> None:
        """Forgets the tokens from `end` on."""
        self.end = max(min(self.end, end), self.layout.sinks)
        self.first = min(self.first, self.end)
        if self.first == self.layout.sinks:
            for rows in self._parts:
                rows.shrink(min(self.end - self.layout.sinks, self.layout.slots))

    def copy_from(self, other: FloatRing) -> None:
        self.reserve(other.end)
        count = min(other.end - other.layout.sinks, other.layout.slots)
        count = count if other.first == other.layout.sinks else other.layout.slots
        self.reserve(other.layout.sinks + count)
        for mine, theirs in zip(self._parts, other._parts):
            mine.rows(0, count)[:] = theirs.rows(0, count)
        self.first, self.end = other.first, other.end

    def release(self) -> None:
        for rows in self._parts:
            rows.release()


class KiviRing:
    """Rows of one layer that are coded in units of `unit` tokens once R newer ones are there; those wait, exact."""

    def __init__(
        self, layout: RingLayout, arena: Arena, shape: CacheShape, settings: KiviSettings, recent: np.ndarray
    ) -> None:
        """recent: [2, rows, Hkv, D] for exact keys and values, `recent_rows` of them."""
        self.layout, self.settings, self.shape = layout, settings, shape
        self.unit = unit_of(settings)
        sizes = (settings.key_bytes(shape, layout.slots), settings.value_bytes(shape, layout.slots))
        self.key_blocks, self.value_blocks = (Blocks(arena, size) for size in sizes)
        self._recent = [Recent(rows) for rows in recent]
        self.first = self.end = self.coded = layout.sinks

    @staticmethod
    def layout_of(policy: Policy, shape: CacheShape, sinks: int, window: int) -> RingLayout:
        """Coded tokens are R old at least, so that the ring need not hold the newest R of the window."""
        settings = KiviSettings.from_policy(policy, shape.head_dim)
        unit = unit_of(settings)
        if settings.residual >= window:
            raise InputError(
                f"policy {policy}: a residual of {settings.residual} exact tokens leaves nothing to code in a window "
                f"of {window}; try residual={max(window // 4 // settings.group, 1) * settings.group}"
            )
        slots = round_up(window - settings.residual + SPARE_TOKENS, unit) + unit
        return RingLayout(sinks, slots, slots * math.ceil((slots + recent_rows(settings)) / slots))

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, layout: RingLayout, num_tokens: int, capacity: int
    ) -> dict[str, int]:
        """Bytes per ledger owner of all layers, with `num_tokens` of the ring's taken in."""
        settings = KiviSettings.from_policy(policy, shape.head_dim)
        coded = min(coded_of(settings, num_tokens), layout.slots)
        recent = shape.num_layers * 2 * recent_rows(settings) * shape.row_values * float_dtype(settings.exact).itemsize
        keys, values = settings.key_bytes(shape, coded), settings.value_bytes(shape, coded)
        return {
            CODED: shape.num_layers * (round_up(keys) + round_up(values)),
            RECENT: round_up(recent, ALIGNMENT_BYTES) if recent < SMALL_BYTES else round_up(recent),
        }

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, layout: RingLayout, num_tokens: int) -> int:
        """Bytes of so many of the newest tokens, of all layers."""
        settings = KiviSettings.from_policy(policy, shape.head_dim)
        coded = coded_of(settings, num_tokens)
        exact_bytes = 2 * (num_tokens - coded) * shape.row_values * float_dtype(settings.exact).itemsize
        coded_bytes = coded * shape.row_values * sum(settings.bits_per_value) / 8
        return shape.num_layers * math.ceil(exact_bytes + coded_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the coded part; exact rows are of an array that all layers share."""
        return sum(blocks.region.committed_bytes for blocks in (self.key_blocks, self.value_blocks))

    @property
    def spare(self) -> int:
        """New tokens that may be put before their pass is over."""
        return SPARE_TOKENS

    def reserve(self, end: int) -> None:
        """Room for the tokens up to `end`; BudgetExceeded before anything is touched."""
        coded = min(coded_of(self.settings, end - self.layout.sinks), self.layout.slots)
        self.key_blocks.reserve(self.settings.key_bytes(self.shape, coded))
        self.value_blocks.reserve(self.settings.value_bytes(self.shape, coded))

    def put(self, k: np.ndarray, v: np.ndarray) -> None:
        """The next tokens, keys rotated by their places in their frames."""
        done = 0
        while done < len(k):
            recent = self._recent[0]
            count = min(len(recent.buffer) - recent.count, len(k) - done)
            for rows, new in zip(self._recent, (k, v)):
                rows.push(new[done : done + count])
            done += count
            self.end += count
            self._code()
        self.first = max(self.first, self.coded - self.layout.slots)

    def part(self) -> CachePart:
        """See `parts`; the same rows and blocks as long as the ring lives."""
        return coded_part(
            (self._recent[0].buffer, self._recent[1].buffer),
            (self.key_blocks.capacity(), self.value_blocks.capacity()),
            self.settings.form,
        )

    def has(self, end: int) -> bool:
        """Whether there is room for the tokens up to `end`."""
        coded = min(coded_of(self.settings, end - self.layout.sinks), self.layout.slots)
        key_bytes, value_bytes = (
            self.settings.key_bytes(self.shape, coded),
            self.settings.value_bytes(self.shape, coded),
        )
        return key_bytes <= len(self.key_blocks.bytes) and value_bytes <= len(self.value_blocks.bytes)

    def make_room(self) -> None:
        """For the row of another token, which may move the others."""
        for rows in self._recent:
            rows.make_room(1)

    def next_token(self, begin: int) -> NextToken:
        """For the one at `end`, which sees tokens from `begin` on; there must be a row for it. What has R newer tokens
        then, one unit at most, is coded.
        """
        layout, token, row = self.layout, self.end, self._recent[0].first
        target = layout.sinks + coded_of(self.settings, token + 1 - layout.sinks)
        coding = (row, target - self.coded, layout.slot(self.coded)) if target > self.coded else (0, 0, 0)
        first = max(self.first, target - layout.slots)
        runs: list[tuple[int, tuple[int, ...]]] = []
        for at, stop, exact in self._runs(begin, first, target, token + 1):
            exact_row = row + exact[0] - self.coded if exact[1] > exact[0] else 0
            places = (stop - at, stop - at, layout.slot(at) if stop > at else 0, exact_row, exact_row)
            runs.append((at, (*places, stop - at + exact[1] - exact[0], token - at, max(begin - at, 0))))
        return NextToken(self._recent[0].end, coding, runs)

    def take_next(self) -> None:
        """That was done."""
        self.end += 1
        coded = self.layout.sinks + coded_of(self.settings, self.end - self.layout.sinks) - self.coded
        for rows in self._recent:
            rows.count += 1
            if coded > 0:
                rows.drop(coded)
        self.coded += max(coded, 0)
        self.first = max(self.first, self.coded - self.layout.slots)

    def pieces(self, begin: int) -> Iterator[Piece]:
        """What is held of the tokens from `begin` on; coded ones in whole units."""
        return (self._piece(*run) for run in self._runs(begin, self.first, self.coded, self.end))

    def _runs(self, begin: int, first: int, last: int, end: int) -> Iterator[Run]:
        """Of the tokens from `begin` on, where those held are [first, end) and coded up to `last`."""
        layout, unit = self.layout, self.unit
        begin = max(begin, first)
        aligned = layout.sinks + (begin - layout.sinks) // unit * unit
        coded = list(layout.pieces(aligned, last))
        exact = list(layout.frames(max(begin, last), end))
        if coded and exact and layout.frame_of(coded[-1][0]) == exact[0][2]:
            yield from ((*each, (each[1], each[1])) for each in coded[:-1])
            yield (*coded[-1], exact.pop(0)[:2])
        else:
            yield from ((*each, (each[1], each[1])) for each in coded)
        yield from ((at, at, (at, stop)) for at, stop, _ in exact)

    def truncate(self, end: int) -> None:
        """Forgets the tokens from `end` on; what is left of a coded unit waits, exact, to be coded anew."""
        layout, unit = self.layout, self.unit
        end = max(min(self.end, end), layout.sinks)
        if end < self.coded:
            whole = layout.sinks + (end - layout.sinks) // unit * unit
            rest = np.empty((2, end - whole, *self._recent[0].buffer.shape[1:]), np.float32)
            if end > whole and whole >= self.first:
                form = {"bits": self.settings.bits, "group": self.settings.group}
                slot = layout.slot(whole)
                attention.kivi_decode_keys(self.key_blocks.bytes, slot, rest[0], **form)
                attention.kivi_decode_values(self.value_blocks.bytes, slot, rest[1], **form)
            for rows, decoded in zip(self._recent, rest):
                rows.set(decoded)
            self.coded = whole
        for rows in self._recent:
            rows.count = end - self.coded
        self.end = end
        self.first = min(self.first, end)
        if self.first == layout.sinks:
            coded = self.coded - layout.sinks
            self.key_blocks.shrink(self.settings.key_bytes(self.shape, coded))
            self.value_blocks.shrink(self.settings.value_bytes(self.shape, coded))

    def copy_from(self, other: KiviRing) -> None:
        self.key_blocks.copy_from(other.key_blocks)
        self.value_blocks.copy_from(other.value_blocks)
        for mine, theirs in zip(self._recent, other._recent):
            mine.set(theirs.rows)
        self.first, self.end, self.coded = other.first, other.end, other.coded

    def release(self) -> None:
        self.key_blocks.region.release()
        self.value_blocks.region.release()

    def _code(self) -> None:
        """Codes what has R newer tokens, unit by unit."""
        settings, layout = self.settings, self.layout
        target = layout.sinks + coded_of(settings, self.end - layout.sinks)
        form = {"bits": settings.bits, "group": settings.group}
        while self.coded < target:
            slot = layout.slot(self.coded)
            keys, values = (rows.rows[: self.unit] for rows in self._recent)
            blocks = self.key_blocks.bytes[settings.key_bytes(self.shape, slot) :]
            attention.kivi_encode_keys(keys, blocks, **form)
            attention.kivi_encode_values(values, slot, self.value_blocks.bytes, **form)
            for rows in self._recent:
                rows.drop(self.unit)
            self.coded += self.unit

    def _piece(self, begin: int, stop: int, exact: tuple[int, int]) -> Piece:
        """Coded tokens [begin, stop), if any, and the exact ones that follow them."""
        settings, slot = self.settings, self.layout.slot(begin)
        keys, values = (rows.rows[exact[0] - self.coded : exact[1] - self.coded] for rows in self._recent)
        arguments = {
            "key_blocks": self.key_blocks.bytes[settings.key_bytes(self.shape, slot) :],
            "value_blocks": self.value_blocks.bytes[settings.value_bytes(self.shape, slot) :],
            "k": keys,
            "v": values,
            "coded_keys": stop - begin,
            "coded_values": stop - begin,
            "bits": settings.bits,
            "group": settings.group,
            "integers": settings.integers,
        }
        return Piece(begin, self.layout.frame_of(begin), arguments)


def unit_of(settings: KiviSettings) -> int:
    """Tokens coded together: a group of keys, and whole blocks of values."""
    return max(settings.group, attention.VALUE_BLOCK_TOKENS)


def recent_rows(settings: KiviSettings) -> int:
    """Rows for exact tokens: R and a unit that fills, and room for one more."""
    return settings.residual + 2 * unit_of(settings)


def coded_of(settings: KiviSettings, num_tokens: int) -> int:
    """Of so many tokens in a row, those that are coded."""
    unit = unit_of(settings)
    return max(num_tokens - settings.residual, 0) // unit * unit
