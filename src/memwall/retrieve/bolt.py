"""An oblivious map: a key-value store on a host that sees every access, and learns nothing of which keys are used.

Source: BOLT, Guo 2025, arXiv 2509.01742; official host programs and simulation: GitHub skiphoop/BOLT-benchmark (its
kernels are binary, so steps of an access follow from data structures, simulation and bounds).

Idea: items lie in bins of about c; a share alpha of the bins is private memory, the others are pages on the host, each
of one length, sealed anew at every write. An item has two bins, drawn at random at its last access and used once: an
access reads those of the two that are pages, whichever has the item, and if there is none; then the item gets two new
ones, and goes to the emptier. If that is a page, it waits in private memory until an access of any key reads the page,
which writes it back with all that waits for it. So a host sees pages drawn evenly at random, each read and written.

Units and shapes: keys uint32 [n]; values uint8 [n, value_bytes], a length for all; ops uint8 [n] of GET, PUT, DELETE.

Differs from the paper: an entry of the position map (12 bytes: key and two bins) does not tell where the item is now:
that follows from its bin (its list of frames, else its page), so that merging changes no entries. The map has buckets
of 4, two for each key, and an entry moves to its other bucket where both are full. A batch reads each page it needs
once and writes it once; commands of one key in it are carried out in order, but nothing of that can be seen: pages are
known before the first is read. Private lists have links (4 bytes a frame, the free list is among them) and keys (4),
bins a load (1) and pages the count at their last write (8); the paper's formula leaves these out, `model_bytes` has it.

Cost: 2 (1 - alpha) pages are read and as many written per access, of l_max = c + log2 log2 N + 1 items; private bytes
48 N + (8 + V) (K c + (1 + alpha) M / 2 + l_max (sqrt(K ln N) + sqrt(M ln N))) + 5 B + 8 M, with B = N / c bins, K =
alpha B of them private and M pages.

Holds when: whoever watches sees the host's side only, and not when a batch begins for reasons that depend on keys. A
page overflows with a probability that nobody will meet at large N; then the map stops, and says so.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall import _native
from memwall.errors import DoesNotFit, InputError, MemwallError
from memwall.retrieve.untrusted import TAG_BYTES, Entropy, SealedPages, Tampered, UntrustedStore

GET, PUT, DELETE = 0, 1, 2
ABSENT, FOUND, FULL = 0, 1, 2
NONE = 0xFFFFFFFF
BUCKET_SLOTS, ENTRY_BYTES, MOST_PAGE_SLOTS = 4, 12, 32
COUNTS = (
    "items", "private_items", "pending", "free_frames", "free_head", "free_tail", "max_load", "max_private",
    "max_pending", "max_frames", "sum_pending", "accesses",
)  # fmt: skip
"""What the native half counts, in its order."""
MOST_AT_ONCE = 1 << 12
MOST_ITEMS = 1 << 29
_PLACED_AT_ONCE = 1 << 16
_DRAWN_AT_ONCE = 1 << 12


class MapOverflow(MemwallError):
    """Something that overflows with a negligible probability has: the map stops."""

    exit_status = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSettings:
    """A map's shape. capacity: items, N. bin_items: of a bin on average, c. private_share: of the bins, alpha."""

    capacity: int
    value_bytes: int = 8
    bin_items: int = 8
    private_share: float = 0.2
    slots_per_item: float = 4.0
    """Entries of the position map for each item: 4 in the paper; fewer (1.25 at least) take fewer private bytes."""
    page_slots: int | None = None
    """Items that a page can hold; None: the paper's bound. Below it pages overflow."""

    def __post_init__(self) -> None:
        for name, least, most in (("capacity", 4, MOST_ITEMS), ("value_bytes", 1, 1 << 20), ("bin_items", 1, 24)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} {getattr(self, name)}: from {least} to {most:,}")
        if not 0 <= self.private_share <= 1:
            raise InputError(f"private_share {self.private_share:g}: a share of the bins, from 0 to 1")
        if not 1.25 <= self.slots_per_item <= 64:
            raise InputError(f"slots_per_item {self.slots_per_item:g}: from 1.25 to 64")
        if self.page_slots is not None and not 1 <= self.page_slots <= MOST_PAGE_SLOTS:
            raise InputError(f"page_slots {self.page_slots}: from 1 to {MOST_PAGE_SLOTS}")

    @property
    def bins(self) -> int:
        """B; two at least."""
        return max(2, -(-self.capacity // self.bin_items))

    @property
    def private_bins(self) -> int:
        """K."""
        return round(self.private_share * self.bins)

    @property
    def num_pages(self) -> int:
        """M."""
        return self.bins - self.private_bins

    @property
    def load_bound(self) -> float:
        """Items of a bin, with high probability: l_max."""
        return self.bin_items + math.log2(math.log2(self.capacity)) + 1

    @property
    def slots(self) -> int:
        """Items that a page has room for."""
        return int(self.load_bound) if self.page_slots is None else self.page_slots

    @property
    def private_bound(self) -> float:
        """Items in private bins, with high probability."""
        spread = math.sqrt(self.private_bins * math.log(self.capacity))
        return self.private_bins * self.bin_items + self.load_bound * spread

    @property
    def pending_bound(self) -> float:
        """Items that wait for their pages, with high probability."""
        spread = math.sqrt(self.num_pages * math.log(self.capacity))
        share = self.private_bins / self.bins
        return (1 + share) * self.num_pages / 2 + self.load_bound * spread

    @property
    def frames(self) -> int:
        """Places for items in private memory."""
        return min(math.ceil(self.private_bound + self.pending_bound), self.capacity)

    @property
    def buckets(self) -> int:
        return math.ceil(self.slots_per_item * self.capacity / BUCKET_SLOTS)

    @property
    def plain_bytes(self) -> int:
        """Of a page: which slots hold items (4), then a key (4) and a value each."""
        return 4 + self.slots * (4 + self.value_bytes)

    @property
    def page_bytes(self) -> int:
        """Of a sealed page, as the host has it."""
        return self.plain_bytes + TAG_BYTES

    @property
    def host_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def bytes_per_access(self) -> float:
        """Visible ones, in both directions, on average; exact for two different bins of B."""
        return 4 * self.num_pages / self.bins * self.page_bytes

    def private_bytes(self) -> dict[str, int]:
        """What the private arrays take, by part."""
        return {
            "position map": self.buckets * BUCKET_SLOTS * ENTRY_BYTES,
            "values": self.frames * self.value_bytes,
            "keys and links": self.frames * 8,
            "reverse index": 4 * self.bins,
            "loads": self.bins,
            "versions": 8 * self.num_pages,
            "counts": 8 * len(COUNTS),
        }

    def model_bytes(self) -> dict[str, float]:
        """The paper's formulas. Its `host pages` have room for c + l_max items, and no seal."""
        return {
            "position map": self.capacity * 4 * ENTRY_BYTES,
            "values": self.private_bound * self.value_bytes,
            "reverse index": 4 * self.bins,
            "host pages": self.num_pages * (self.bin_items + self.load_bound) * (4 + self.value_bytes),
        }


class PrivateStore:
    """All private memory of a map: NumPy arrays, none of which the host sees. `core` works on them."""

    def __init__(self, settings: MapSettings, arrays: dict[str, np.ndarray] | None = None, seed: int = 0) -> None:
        """arrays: of a store that was saved; seed: of the position map's hash."""
        self.settings, self.seed = settings, seed
        self.arrays = self._empty(settings) if arrays is None else arrays
        parts = ("table", "heads", "loads", "frame_keys", "frame_next", "frame_values", "counts")
        self.core = _native.ObliviousCore(
            settings.capacity, settings.private_bins, settings.slots, *(self.arrays[name] for name in parts), seed
        )

    @staticmethod
    def shapes(settings: MapSettings) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name to shape and element type of every array."""
        bins, frames = settings.bins, settings.frames
        return {
            "table": ((settings.buckets, BUCKET_SLOTS, 3), np.uint32),
            "heads": ((bins,), np.uint32),
            "loads": ((bins,), np.uint8),
            "frame_keys": ((frames,), np.uint32),
            "frame_next": ((frames,), np.uint32),
            "frame_values": ((frames, settings.value_bytes), np.uint8),
            "counts": ((len(COUNTS),), np.int64),
            "versions": ((settings.num_pages,), np.uint64),
        }

    @classmethod
    def _empty(cls, settings: MapSettings) -> dict[str, np.ndarray]:
        found = {name: np.zeros(shape, dtype) for name, (shape, dtype) in cls.shapes(settings).items()}
        for name in ("table", "heads"):
            found[name].fill(NONE)
        frames = settings.frames
        found["frame_next"][:] = np.arange(1, frames + 1, dtype=np.int64) % (NONE + 1)
        found["frame_next"][-1] = NONE
        for name, value in (("free_frames", frames), ("free_head", 0), ("free_tail", frames - 1)):
            found["counts"][COUNTS.index(name)] = value
        return found

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def count(self, name: str) -> int:
        """One of COUNTS."""
        return int(self.arrays["counts"][COUNTS.index(name)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """statuses uint8 [n]: whether the key was there (ABSENT, FOUND), or FULL. values [n, V]: what it had, or zeros."""

    statuses: np.ndarray
    values: np.ndarray


class ObliviousMap:
    """A map over a store that is not trusted, which must have `settings.num_pages` pages of `settings.page_bytes`."""

    def __init__(
        self,
        settings: MapSettings,
        store: UntrustedStore,
        key: bytes,
        *,
        private: PrivateStore | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        """key: 32 bytes that pages are sealed with, of no other map. private: of a map that goes on; else `fill` comes
        first.
        """
        if (store.num_pages, store.page_bytes) != (settings.num_pages, settings.page_bytes):
            raise InputError(
                f"the store has {store.num_pages} pages of {store.page_bytes} bytes; this map needs "
                f"{settings.num_pages} of {settings.page_bytes}"
            )
        self.settings, self.entropy, self._drawn = settings, entropy, np.zeros(0, np.uint64)
        self.private = private or PrivateStore(settings, seed=int.from_bytes(entropy(8), "little"))
        self.pages = SealedPages(store, key, self.private.arrays["versions"])
        self._stopped = "" if private is not None else "it has not been filled: call fill(), with items or without"

    def __len__(self) -> int:
        return self.private.count("items")

    def _words(self, count: int, each: int) -> np.ndarray:
        """uint64 [count, each], fetched some at a time: the system's call costs more than its bytes."""
        wanted = count * each
        if len(self._drawn) < wanted:
            self._drawn = np.frombuffer(self.entropy(8 * max(wanted, _DRAWN_AT_ONCE)), np.uint64)
        found, self._drawn = self._drawn[:wanted], self._drawn[wanted:]
        return found.reshape(count, each)

    def _failed(self, failure: str) -> MemwallError:
        settings = self.settings
        told = {
            "page": f"a page would hold more than {settings.slots} items",
            "frames": f"more than {settings.frames:,} items in private memory",
            "table": f"no room for a key in a position map of {settings.buckets:,} buckets: raise slots_per_item",
        }
        self._stopped = told.get(failure, "an item is not where the position map says")
        return MapOverflow(f"the map stops: {self._stopped}") if failure in told else Tampered(self._stopped)

    # ---- all at once -----------------------------------------------------------------------------------------------

    def fill(self, keys: np.ndarray | None = None, values: np.ndarray | None = None) -> None:
        """Places items into a new map and writes every page once, in order. keys [n] all different; values [n, V]."""
        keys = np.zeros(0, np.uint32) if keys is None else checked_keys(keys)
        values = np.zeros((0, self.settings.value_bytes), np.uint8) if values is None else values
        values = self._checked_values(values, len(keys))
        if self.private.count("items") or self.private.count("accesses"):
            raise InputError("fill places the first items of a map, and this one has been used")
        if len(keys) > self.settings.capacity:
            raise DoesNotFit(f"{len(keys):,} items; the map holds {self.settings.capacity:,}")
        if len(np.unique(keys)) != len(keys):
            raise InputError("a key comes twice among the items to fill a map with")
        bins = np.empty(len(keys), np.uint32)
        for start in range(0, len(keys), _PLACED_AT_ONCE):
            part = slice(start, start + _PLACED_AT_ONCE)
            words = self._words(len(keys[part]), 2)
            if failure := self.private.core.place(keys[part], values[part], words, bins[part]):
                raise self._failed(failure)
        for pages, plain in self._filled(keys, values, bins):
            self.pages.write(pages, plain)
        self._stopped = ""

    def _filled(
        self, keys: np.ndarray, values: np.ndarray, bins: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Plain pages, some thousands at a time."""
        settings = self.settings
        order = np.argsort(bins, kind="stable")
        starts = np.searchsorted(bins[order], np.arange(settings.private_bins, settings.bins + 1))
        for first in range(0, settings.num_pages, _PLACED_AT_ONCE):
            pages = np.arange(first, min(first + _PLACED_AT_ONCE, settings.num_pages), dtype=np.uint32)
            begins = starts[pages]
            counts = starts[pages + 1] - begins
            plain = np.zeros((len(pages), settings.plain_bytes), np.uint8)
            plain[:, :4] = ((1 << counts.astype(np.int64)) - 1).astype(np.uint32).view(np.uint8).reshape(-1, 4)
            items = order[begins[0] : starts[pages[-1] + 1]]
            page = np.repeat(np.arange(len(pages)), counts)
            slot = np.arange(len(items)) - np.repeat(begins - begins[0], counts)
            tuples = plain[:, 4:].reshape(len(pages), settings.slots, 4 + settings.value_bytes)
            tuples[page, slot, :4] = keys[items].view(np.uint8).reshape(-1, 4)
            tuples[page, slot, 4:] = values[items]
            yield pages, plain

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """All keys and values, in no order; every page is read once, in order, whatever it holds."""
        self._check_running()
        settings = self.settings
        found = settings.frames - self.private.count("free_frames")
        keys, values = [np.empty(found, np.uint32)], [np.empty((found, settings.value_bytes), np.uint8)]
        self.private.core.private_items(keys[0], values[0])
        for first in range(0, settings.num_pages, _PLACED_AT_ONCE):
            pages = np.arange(first, min(first + _PLACED_AT_ONCE, settings.num_pages), dtype=np.uint32)
            plain = self.pages.read(pages)
            used = np.ascontiguousarray(plain[:, :4]).view(np.uint32)
            held = (used >> np.arange(settings.slots, dtype=np.uint32)) & 1 == 1
            tuples = plain[:, 4:].reshape(len(pages), settings.slots, -1)[held]
            keys.append(np.ascontiguousarray(tuples[:, :4]).view(np.uint32)[:, 0])
            values.append(tuples[:, 4:])
        return np.concatenate(keys), np.concatenate(values)

    # ---- access ----------------------------------------------------------------------------------------------------

    def access(self, ops: np.ndarray, keys: np.ndarray, values: np.ndarray | None = None) -> Replies:
        """Commands in order. values: what PUTs bring, one row a command (rows of others do not matter).

        MapOverflow and Tampered stop the map: its private state and its pages no longer agree.
        """
        keys, ops = checked_keys(keys), np.ascontiguousarray(ops, np.uint8)
        if ops.shape != keys.shape or (ops > DELETE).any():
            raise InputError(f"ops of shape {list(ops.shape)}: one for each of {len(keys)} keys, of GET, PUT, DELETE")
        if values is None:
            if (ops == PUT).any():
                raise InputError("PUT brings a value: give values, one row a command")
            values = np.zeros((len(keys), self.settings.value_bytes), np.uint8)
        replies = self._checked_values(values, len(keys)).copy()
        statuses = np.empty(len(keys), np.uint8)
        for start in range(0, len(keys), MOST_AT_ONCE):
            part = slice(start, start + MOST_AT_ONCE)
            self._batch(ops[part], keys[part], replies[part], statuses[part])
        return Replies(statuses=statuses, values=replies)

    def _batch(self, ops: np.ndarray, keys: np.ndarray, values: np.ndarray, statuses: np.ndarray) -> None:
        self._check_running()
        # until all is written, state and pages disagree
        self._stopped = "an access was broken off"
        core, room = self.private.core, np.empty(2 * len(keys), np.uint32)
        count, failure = core.plan(ops, keys, self._words(len(keys), 4), room, statuses)
        if failure:
            raise self._failed(failure)
        pages = room[:count]
        plain = self.pages.read(pages)
        if failure := core.apply(ops, keys, plain, values):
            raise self._failed(failure)
        self.pages.write(pages, plain)
        self._stopped = ""

    def get(self, key: int) -> bytes | None:
        """The value of a key, or None."""
        return self._one(GET, key, None)

    def put(self, key: int, value: bytes) -> bytes | None:
        """Gives a key a value of `value_bytes` bytes; returns what it had. DoesNotFit for a new key in a full map."""
        return self._one(PUT, key, value)

    def delete(self, key: int) -> bytes | None:
        """Takes a key out; returns what it had."""
        return self._one(DELETE, key, None)

    def _one(self, op: int, key: int, value: bytes | None) -> bytes | None:
        values = None if value is None else np.frombuffer(value, np.uint8)[None]
        found = self.access(np.array([op]), np.array([key]), values)
        if found.statuses[0] == FULL:
            raise DoesNotFit(f"the map is full: {self.settings.capacity:,} items")
        return found.values[0].tobytes() if found.statuses[0] == FOUND else None

    def _check_running(self) -> None:
        if self._stopped:
            raise MemwallError(f"the map cannot be used: {self._stopped}")

    def _checked_values(self, values: np.ndarray, count: int) -> np.ndarray:
        wanted = (count, self.settings.value_bytes)
        if values.shape != wanted or values.dtype != np.uint8:
            raise InputError(f"values are {values.dtype}{list(values.shape)}; expected uint8{list(wanted)}")
        return np.ascontiguousarray(values)


def checked_keys(keys: np.ndarray) -> np.ndarray:
    """uint32 [n]; InputError for other numbers."""
    found = np.asarray(keys)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise InputError(f"keys are {found.dtype}{list(found.shape)}; expected whole numbers, one dimension")
    if found.size and (int(found.min()) < 0 or int(found.max()) > NONE):
        raise InputError(f"keys from {found.min()} to {found.max()}; they are from 0 to {NONE:,}")
    return np.ascontiguousarray(found, np.uint32)


def largest_share(settings: MapSettings, memory_bytes: int) -> MapSettings:
    """The same map with as many private bins as fit; DoesNotFit that names what the least takes."""
    from dataclasses import replace

    def taken(thousandths: int) -> int:
        return sum(replace(settings, private_share=thousandths / 1000).private_bytes().values())

    if (least := min(taken(0), taken(1000))) > memory_bytes:
        raise DoesNotFit(
            f"a map of {settings.capacity:,} items needs {least:,} bytes of private memory, and may take "
            f"{memory_bytes:,}: with slots_per_item 1.25 its position map is {settings.slots_per_item / 1.25:.3g} "
            "times smaller"
        )
    best = max(share for share in range(1001) if taken(share) <= memory_bytes)
    return replace(settings, private_share=best / 1000)
