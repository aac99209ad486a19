"""The arena: all large buffers come from here, and it refuses one byte over its cap before touching it.

Every allocation is on the ledger from the moment it is made, in whole pages, and its pages are made resident at once,
so that the ledger says what the process really holds. Small arrays come from the heap and count as what they ask for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.hardware.units import KIB
from memwall.memory.ledger import Entry, Ledger
from memwall.memory.pages import HUGE_PAGE_BYTES, Pages, round_up

ALIGNMENT_BYTES = 64
SMALL_BYTES = 32 * KIB
"""Arrays below this come from the heap: a mapping each would waste most of its last page."""
UNLIMITED_BYTES = 1 << 62
HUGE_FROM_BYTES = 4 * HUGE_PAGE_BYTES
"""Ranges from here on use huge pages unless told otherwise."""


def allocated_bytes(nbytes: int) -> int:
    """What `Arena.allocate` counts for an array of `nbytes`: whole pages, or aligned units for small ones."""
    if nbytes >= SMALL_BYTES:
        return round_up(nbytes)
    # at least one unit, so that two empty arrays never share an address
    return max(round_up(nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES)


class Charge:
    """Bytes that count against the cap although something else allocated them (a mapped file, a library's buffers)."""

    __slots__ = ("_arena", "_entry")

    def __init__(self, arena: Arena, entry: Entry) -> None:
        self._arena = arena
        self._entry = entry

    @property
    def owner(self) -> str:
        """The owner on the ledger."""
        return self._entry.owner

    @property
    def nbytes(self) -> int:
        """Bytes counted now."""
        return self._entry.nbytes

    def resize(self, nbytes: int) -> None:
        """Counts `nbytes` from now on; BudgetExceeded when that is over the cap, and then nothing changes."""
        self._arena._resize(self._entry, nbytes)

    def move_to(self, other: Charge, nbytes: int) -> None:
        """Counts `nbytes` of this charge under the other's owner from now on; what the arena holds stays the same."""
        self._arena._move(self._entry, other._entry, nbytes)

    def release(self) -> None:
        """Counts nothing any more."""
        self._arena._resize(self._entry, 0)
        self._entry.release()


class Region:
    """A contiguous address range of which a growing prefix is committed. Made by `Arena.reserve`."""

    def __init__(self, owner: str, capacity_bytes: int, charge: Charge, pages: Pages) -> None:
        self.owner = owner
        self.capacity_bytes = capacity_bytes
        self._charge = charge
        self._pages: Pages | None = pages
        self._lent = 0
        self._followed: int | None = None
        self._lock = threading.Lock()

    @property
    def committed_bytes(self) -> int:
        """Bytes that are resident, in whole pages."""
        return self._charge.nbytes + self._lent if self._followed is None else self._followed

    def follow(self, committed_bytes: int) -> None:
        """In a forked process, over shared pages: so many are resident by now, says the process that owns them."""
        self._followed = committed_bytes

    def lend(self, charge: Charge, nbytes: int) -> None:
        """Counts `nbytes` of what is committed under another owner; a negative number takes them back."""
        with self._lock:
            source, target = (self._charge, charge) if nbytes >= 0 else (charge, self._charge)
            source.move_to(target, abs(nbytes))
            self._lent += nbytes

    def commit(self, nbytes: int) -> None:
        """Makes the first `nbytes` resident; new bytes are zero.

        Raises BudgetExceeded before touching a page over the cap.
        """
        with self._lock:
            pages = self._live()
            if not 0 <= nbytes <= self.capacity_bytes:
                raise ValueError(f"{self.owner}: cannot commit {nbytes:,} bytes of {self.capacity_bytes:,} reserved")
            before, after = self.committed_bytes, round_up(nbytes)
            if after <= before:
                return
            self._charge.resize(after - self._lent)
            try:
                pages.populate(before, after)
            except MemoryError:
                self._charge.resize(before - self._lent)
                raise

    def shrink(self, nbytes: int) -> None:
        """Keeps the first `nbytes` and gives the pages behind them back; arrays over those read zeros from then on."""
        with self._lock:
            pages = self._live()
            before, after = self.committed_bytes, round_up(nbytes)
            if nbytes < 0:
                raise ValueError(f"{self.owner}: cannot shrink to {nbytes} bytes")
            if after < before:
                self._charge.resize(after - self._lent)
                pages.discard(after, before)

    def array(self, shape: tuple[int, ...] | int, dtype: DTypeLike, offset_bytes: int = 0) -> np.ndarray:
        """An array over committed bytes. It does not move when the region grows."""
        pages = self._live()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        end = offset_bytes + math.prod(shape) * kind.itemsize
        if offset_bytes < 0 or offset_bytes % kind.itemsize:
            raise ValueError(f"{self.owner}: offset {offset_bytes} is not a multiple of {kind.itemsize} bytes ({kind})")
        if end > self.committed_bytes:
            raise ValueError(
                f"{self.owner}: an array up to byte {end:,}, but only {self.committed_bytes:,} are committed"
            )
        return pages.view(shape, kind, offset_bytes)

    def whole(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """An array over the range's start whatever is committed: who holds it touches no more than that."""
        kind = np.dtype(dtype)
        if math.prod(shape) * kind.itemsize > self.capacity_bytes:
            raise ValueError(
                f"{self.owner}: an array {shape} of {kind} is larger than the {self.capacity_bytes:,} reserved"
            )
        return self._live().view(tuple(shape), kind, 0)

    def release(self) -> None:
        """Gives everything back; the region is of no more use. Doing so twice does nothing."""
        with self._lock:
            if self._pages is not None:
                self._pages.discard(0, self.committed_bytes)
                self._charge.release()
                self._pages = None

    def _live(self) -> Pages:
        if self._pages is None:
            raise ValueError(f"{self.owner}: the region was released")
        return self._pages


@dataclass(frozen=True, slots=True)
class _Held:
    """What stands behind an array that was handed out; `keep` holds a heap array so that its address stays taken."""

    charge: Charge
    pages: Pages | None
    keep: np.ndarray | None


class Arena:
    """Memory on one tier with a hard cap. `used_bytes <= cap_bytes` holds at every moment, in every thread."""

    def __init__(
        self, cap_bytes: int, ledger: Ledger, tier: str = "ram", *, other_caps: Mapping[str, int] | None = None
    ) -> None:
        """other_caps: bytes allowed on other tiers, for the arenas that `beside` gives."""
        self.ledger = ledger
        self._other_caps = dict(other_caps or {})
        self._others: dict[str, Arena] = {}
        self.tier = tier
        self._cap_bytes = _checked_cap(cap_bytes)
        self._used_bytes = 0
        self._peak_bytes = 0
        self._lock = threading.Lock()
        self._held: dict[int, _Held] = {}

    @property
    def cap_bytes(self) -> int:
        """The most this arena may hold."""
        return self._cap_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes held now: the sum of this arena's ledger entries."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that may still be taken."""
        return self._cap_bytes - self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once."""
        return self._peak_bytes

    def beside(self, tier: str) -> Arena:
        """The arena of another tier, on the same ledger; without a cap where none was given."""
        if tier == self.tier:
            return self
        with self._lock:
            if tier not in self._others:
                self._others[tier] = Arena(self._other_caps.get(tier, UNLIMITED_BYTES), self.ledger, tier)
            return self._others[tier]

    def set_cap(self, cap_bytes: int) -> None:
        """Moves the cap. It cannot go below what is held: give something back first."""
        _checked_cap(cap_bytes)
        with self._lock:
            if cap_bytes < self._used_bytes:
                raise DoesNotFit(
                    f"the cap on {self.tier} cannot be {cap_bytes:,} bytes while {self._used_bytes:,} are in use; "
                    f"free {self._used_bytes - cap_bytes:,} bytes first"
                )
            self._cap_bytes = cap_bytes

    def allocate(
        self, owner: str, shape: tuple[int, ...] | int, dtype: DTypeLike, *, huge: bool | None = None
    ) -> np.ndarray:
        """A zeroed, 64-byte aligned array whose pages are resident. BudgetExceeded instead of going over the cap.

        Give it back with `free`; dropping the array alone keeps its bytes on the ledger.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes < 0 or any(size < 0 for size in shape):
            raise ValueError(f"{owner}: shape {shape} has a negative size")
        if nbytes < SMALL_BYTES:
            return self._allocate_small(owner, shape, kind, nbytes)
        charge = self.charge(owner, allocated_bytes(nbytes))
        try:
            pages = Pages(nbytes, huge=_wants_huge(nbytes, huge))
            pages.populate(0, pages.capacity_bytes)
        except MemoryError:
            charge.release()
            raise
        array = pages.view(shape, kind, 0)
        with self._lock:
            self._held[_address(array)] = _Held(charge, pages, None)
        return array

    def allocate_all(self, owner: str, forms: Mapping[str, tuple[tuple[int, ...], DTypeLike]]) -> dict[str, np.ndarray]:
        """An array for each name; where one is refused, none of them is held."""
        made: dict[str, np.ndarray] = {}
        try:
            for name, (shape, dtype) in forms.items():
                made[name] = self.allocate(owner, shape, dtype)
        except BaseException:
            for array in made.values():
                self.free(array)
            raise
        return made

    def free(self, array: np.ndarray) -> None:
        """Gives an array of `allocate` back.

        Large ones leave the resident set at once, even if views of them are still about.
        """
        with self._lock:
            held = self._held.pop(_address(array), None)
        if held is None:
            raise ValueError("this array was not allocated from this arena, or was freed before")
        if held.pages is not None:
            held.pages.discard(0, held.pages.capacity_bytes)
        held.charge.release()

    @contextmanager
    def scratch(self, owner: str, shape: tuple[int, ...] | int, dtype: DTypeLike) -> Iterator[np.ndarray]:
        """An array that is freed when the block ends."""
        array = self.allocate(owner, shape, dtype)
        try:
            yield array
        finally:
            self.free(array)

    def reserve(self, owner: str, capacity_bytes: int, *, huge: bool | None = None, shared: bool = False) -> Region:
        """A contiguous address range that costs nothing until `commit`. It may be larger than the cap.

        huge: whether to use 2 MiB pages where whole ones are committed (None: for ranges of 8 MiB and more). shared:
        forked processes see the same bytes (see `Region.follow`).
        """
        if capacity_bytes <= 0:
            raise ValueError(f"{owner}: cannot reserve {capacity_bytes} bytes; must be more than zero")
        pages = Pages(capacity_bytes, huge=_wants_huge(capacity_bytes, huge), shared=shared)
        return Region(owner, capacity_bytes, self.charge(owner, 0), pages)

    def charge(self, owner: str, nbytes: int) -> Charge:
        """Counts bytes that something else allocates against the cap. Call it before they are touched."""
        entry = self.ledger.add(owner, self.tier, 0)
        try:
            self._resize(entry, nbytes)
        except BaseException:
            entry.release()
            raise
        return Charge(self, entry)

    def _allocate_small(self, owner: str, shape: tuple[int, ...], kind: np.dtype[Any], nbytes: int) -> np.ndarray:
        size = allocated_bytes(nbytes)
        charge = self.charge(owner, size)
        raw = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
        raw.fill(0)  # zeros alone may leave the pages untouched
        start = -raw.ctypes.data % ALIGNMENT_BYTES
        array = raw[start : start + nbytes].view(kind).reshape(shape)
        with self._lock:
            self._held[_address(array)] = _Held(charge, None, raw)
        return array

    def _resize(self, entry: Entry, nbytes: int) -> None:
        """The one place where `used_bytes` changes; the ledger changes in the same locked step."""
        if nbytes < 0:
            raise ValueError(f"{entry.owner}: {nbytes} bytes; must be zero or more")
        with self._lock:
            delta = nbytes - entry.nbytes
            if delta > self._cap_bytes - self._used_bytes:
                free_bytes = self._cap_bytes - self._used_bytes
                raise BudgetExceeded(entry.owner, delta, free_bytes, self._cap_bytes, self.tier)
            if delta:
                entry.resize(nbytes)
                self._used_bytes += delta
                self._peak_bytes = max(self._peak_bytes, self._used_bytes)

    def _move(self, source: Entry, target: Entry, nbytes: int) -> None:
        if not 0 <= nbytes <= source.nbytes:
            raise ValueError(f"{source.owner}: {nbytes:,} of {source.nbytes:,} bytes cannot go to {target.owner}")
        with self._lock:
            source.resize(source.nbytes - nbytes)
            target.resize(target.nbytes + nbytes)


def _wants_huge(nbytes: int, huge: bool | None) -> bool:
    return nbytes >= HUGE_FROM_BYTES if huge is None else huge


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])  # array.ctypes.data is a made-up address for empty arrays


def _checked_cap(cap_bytes: int) -> int:
    if cap_bytes <= 0:
        raise InputError(f"a cap of {cap_bytes} bytes: must be more than zero")
    return cap_bytes
