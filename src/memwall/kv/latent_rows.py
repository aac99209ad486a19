"""Rows of a latent cache: floats, or codes in groups along channels or along tokens with an exact tail.

`LatentForm` says how rows are kept and in how many bytes, `LatentRows` keeps one layer's, `LatentStack` all layers'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.kernels import latent
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

CODED_BITS = (2, 3, 4, 8)
LATENTS, RECENT = "kv/latents", "kv/recent"


def allocated_bytes(nbytes: int) -> int:
    """What `Arena.allocate` puts on the ledger for an array of so many bytes."""
    return max(round_up(nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES) if nbytes < SMALL_BYTES else round_up(nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentForm:
    """How rows of `width` numbers are kept: in `bits` each, those of a `group` sharing a scale and a zero point.

    along_tokens: groups are `group` tokens of one channel, coded together once they are full; until then their rows
    wait in float16. zero_inside: see `kernels.latent`. 16 and 32 bits are plain floats.
    """

    width: int
    bits: int
    group: int = 128
    along_tokens: bool = False
    zero_inside: bool = False
    coded: bool = field(init=False, compare=False, repr=False)
    """Whether rows are codes, not floats."""
    cycle: int = field(init=False, compare=False, repr=False)
    """Tokens that are coded together."""
    record_bytes: int = field(init=False, compare=False, repr=False)
    """Bytes of `cycle` tokens."""

    def __post_init__(self) -> None:
        # asked for several times a token and layer
        coded = self.bits in CODED_BITS
        along = coded and self.along_tokens
        size = self.width * self.bits // 8
        if coded:
            size = latent.record_bytes(self.width, self.bits, self.group, along_tokens=along)
        for name, value in (("coded", coded), ("cycle", self.group if along else 1), ("record_bytes", size)):
            object.__setattr__(self, name, value)

    def nbytes(self, tokens: int) -> int:
        """Bytes of the records of so many tokens; those of a group that is not full wait elsewhere."""
        return tokens // self.cycle * self.record_bytes

    def tail_bytes(self) -> int:
        """Bytes of one layer's waiting rows."""
        return 2 * self.cycle * self.width if self.cycle > 1 else 0

    def encode(self, rows: np.ndarray, first: int, records: np.ndarray) -> None:
        """Float32 rows as tokens `first ..` (a multiple of `cycle`) of `records`."""
        at = self.nbytes(first)
        if not self.coded:
            records[at : at + self.nbytes(len(rows))].view(f"f{self.bits // 8}")[:] = rows.reshape(-1)
            return
        latent.encode_rows(rows, records[at:], **self._terms)

    def decode(self, records: np.ndarray, first: int, out: np.ndarray) -> None:
        """Tokens `first ..` into out [n, width] float32."""
        if self.coded:
            latent.decode_rows(records, first, out, **self._terms)
            return
        at = self.nbytes(first)
        out.reshape(-1)[:] = records[at : at + self.nbytes(len(out))].view(f"f{self.bits // 8}")

    @property
    def _terms(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group": self.group,
            "along_tokens": self.along_tokens,
            "zero_inside": self.zero_inside,
        }


class LatentRows:
    """One layer's rows: records, and behind them the tail that waits for its group to fill.

    Rows are pushed while a layer runs and settle after its attention: until then `read` gives the tail exact, and
    `truncate` to the length before undoes the push. Groups that fill wholly with new rows are coded at once.
    """

    def __init__(
        self,
        arena: Arena,
        form: LatentForm,
        capacity: int,
        tail: np.ndarray | None = None,
        spill: np.ndarray | None = None,
        owner: str = LATENTS,
    ) -> None:
        """tail [cycle, width] float16, this layer's own; spill the same, shared by all layers; for forms whose rows
        wait.
        """
        self.form = form
        self.region = arena.reserve(owner, round_up(max(form.nbytes(round_up(capacity, form.cycle)), 1)))
        self.records = self.region.array(0, np.uint8)
        none = np.empty((0, form.width), np.float16)
        self.tail, self._spill = (none if rows is None else rows for rows in (tail, spill))
        self.coded = 0  # tokens in records, those spilled ahead left out
        self.waiting = 0
        self._spilled_groups = self._spilled = 0
        self._store: latent.LatentStore | None = None

    @property
    def store(self) -> latent.LatentStore:
        """The rows as kernels take them: all that may ever come."""
        if self._store is None:
            form, size = self.form, self.region.capacity_bytes
            records, tail = self.region.whole((size,), np.uint8), self.tail.view(np.uint16)
            self._store = latent.LatentStore(
                records, tail, form.width, form.bits, form.group, form.along_tokens, form.zero_inside
            )
        return self._store

    @property
    def count(self) -> int:
        """Tokens taken in, settled or not."""
        return self.coded + self.waiting + self._spilled_groups * self.form.cycle + self._spilled

    @property
    def nbytes(self) -> int:
        """Bytes of the records, in whole pages."""
        return self.region.committed_bytes

    def reserve(self, tokens: int) -> None:
        """Room for the records of so many tokens in all; BudgetExceeded before anything is touched."""
        nbytes = self.form.nbytes(tokens)
        if nbytes > len(self.records):
            self.region.commit(nbytes)
            self.records = self.region.array(self.region.committed_bytes, np.uint8)

    def push(self, rows: np.ndarray) -> None:
        """Takes rows [n, width] float32 behind those there are; room must have been reserved."""
        if self.form.cycle == 1:
            self.form.encode(rows, self.coded, self.records)
            self.coded += len(rows)
            return
        taken = min(len(rows), self.form.cycle - self.waiting)
        self.tail[self.waiting : self.waiting + taken] = rows[:taken]
        self.waiting += taken
        while taken < len(rows):
            part = rows[taken : taken + self.form.cycle - self._spilled]
            self._spill[self._spilled : self._spilled + len(part)] = part
            self._spilled += len(part)
            taken += len(part)
            if self._spilled == self.form.cycle:
                self._spilled_groups += 1
                at = self.coded + self._spilled_groups * self.form.cycle
                self.form.encode(self._spill.astype(np.float32), at, self.records)
                self._spilled = 0

    def settle(self) -> None:
        """The layer's attention is done: a full tail is coded, what spilled over is the new tail."""
        if self.form.cycle > 1 and self.waiting == self.form.cycle:
            self.form.encode(self.tail.astype(np.float32), self.coded, self.records)
            self.coded += (1 + self._spilled_groups) * self.form.cycle
            self.tail[: self._spilled] = self._spill[: self._spilled]
            self.waiting, self._spilled, self._spilled_groups = self._spilled, 0, 0

    def read(self, begin: int, end: int, out: np.ndarray) -> np.ndarray:
        """Rows [begin, end), which were there before the latest push, into the front of out; gives that part."""
        rows = out[: end - begin]
        coded = min(max(self.coded - begin, 0), len(rows))
        if coded:
            self.form.decode(self.records, begin, rows[:coded])
        if coded < len(rows):
            rows[coded:] = self.tail[begin + coded - self.coded : end - self.coded]
        return rows

    def write(self, begin: int, rows: np.ndarray) -> None:
        """Puts float32 rows at [begin, begin + n) of reserved room; for forms whose rows are coded singly."""
        self.form.encode(rows, begin, self.records)
        self.coded = max(self.coded, begin + len(rows))

    def truncate(self, length: int) -> None:
        """Forgets rows from `length` on; what is left of a coded group waits again, as it was decoded."""
        self._spilled = self._spilled_groups = 0
        if length < self.coded:
            whole = length - length % self.form.cycle
            if length > whole:
                rest = np.empty((length - whole, self.form.width), np.float32)
                self.form.decode(self.records, whole, rest)
                self.tail[: len(rest)] = rest
            self.coded = whole
        self.waiting = length - self.coded
        self.records = self.records[:0]
        self.region.shrink(self.form.nbytes(length))
        self.records = self.region.array(self.region.committed_bytes, np.uint8)

    def copy_from(self, other: LatentRows) -> None:
        """The same rows as another store's; BudgetExceeded when there is no room."""
        self.reserve(other.coded)
        size = self.form.nbytes(other.coded)
        self.records[:size] = other.records[:size]
        self.tail[:] = other.tail
        self.coded, self.waiting = other.coded, other.waiting

    def release(self) -> None:
        """Gives the records back."""
        self._store = None
        self.records = self.records[:0]
        self.region.release()


class LatentStack:
    """The rows of all layers in one form, with their tails in one array."""

    def __init__(self, arena: Arena, forms: list[LatentForm], capacity: int) -> None:
        self.arena = arena
        cycle, width = max(form.cycle for form in forms), forms[0].width
        depth = len(forms) + 1 if cycle > 1 else 0  # one more: where rows of any layer go that its tail has no room for
        self._tails = arena.allocate(RECENT, (depth, cycle, width), np.float16)
        tails = list(self._tails) if depth else [None] * (len(forms) + 1)
        self.layers = [LatentRows(arena, form, capacity, tail, tails[-1]) for form, tail in zip(forms, tails)]

    @staticmethod
    def predict(forms: list[LatentForm], tokens: int) -> dict[str, int]:
        """Bytes per ledger owner with so many tokens held."""
        tail = max(form.tail_bytes() for form in forms)
        return {
            LATENTS: sum(round_up(form.nbytes(tokens)) for form in forms),
            RECENT: allocated_bytes((len(forms) + 1) * tail if tail else 0),
        }

    @staticmethod
    def read_bytes(forms: list[LatentForm], tokens: int) -> int:
        """Bytes that a decode step reads of them."""
        return sum(form.nbytes(tokens) + 2 * (tokens % form.cycle) * form.width for form in forms)

    @property
    def nbytes(self) -> int:
        """Bytes on the ledger."""
        return sum(layer.nbytes for layer in self.layers) + allocated_bytes(self._tails.nbytes)

    def reserve(self, tokens: int) -> None:
        for layer in self.layers:
            layer.reserve(tokens)

    def truncate(self, length: int) -> None:
        for layer in self.layers:
            layer.truncate(length)

    def copy_from(self, other: LatentStack) -> None:
        for mine, theirs in zip(self.layers, other.layers):
            mine.copy_from(theirs)

    def release(self) -> None:
        for layer in self.layers:
            layer.release()
        self.arena.free(self._tails)
