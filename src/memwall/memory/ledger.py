"""The ledger: who holds how many bytes on which tier.

Every long-lived buffer has an entry, and the sum must agree with the system.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Bytes of one owner on one tier, all its entries together."""

    owner: str
    tier: str
    nbytes: int

    def to_json(self) -> dict[str, str | int]:
        """`{"owner": ..., "tier": ..., "bytes": ...}`."""
        row = asdict(self)
        row["bytes"] = row.pop("nbytes")
        return row


class Entry:
    """One buffer on the ledger. `release` takes it off; doing so twice does nothing."""

    __slots__ = ("_ledger", "nbytes", "owner", "tier")

    def __init__(self, ledger: Ledger, owner: str, tier: str, nbytes: int) -> None:
        self._ledger = ledger
        self.owner = owner
        self.tier = tier
        self.nbytes = nbytes

    def resize(self, nbytes: int) -> None:
        """The buffer now holds `nbytes`."""
        self._ledger._resize(self, nbytes)

    def release(self) -> None:
        """The buffer is gone."""
        self._ledger._release(self)


class Ledger:
    """Entries of all owners, safe to use from several threads.

    Owners are paths such as `weights/int4` or `kv/layer 3`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: set[Entry] = set()
        self._named: dict[tuple[str, str], Entry] = {}

    def add(self, owner: str, tier: str, nbytes: int) -> Entry:
        """A new buffer of `nbytes` bytes."""
        entry = Entry(self, owner, tier, _checked(owner, nbytes))
        with self._lock:
            self._entries.add(entry)
        return entry

    def put(self, owner: str, tier: str, nbytes: int) -> Entry:
        """The one entry of an owner whose bytes are measured again and again (`runtime`): made first, resized
        afterwards.
        """
        _checked(owner, nbytes)
        with self._lock:
            entry = self._named.get((owner, tier))
            if entry is None or entry not in self._entries:
                entry = self._named[owner, tier] = Entry(self, owner, tier, nbytes)
                self._entries.add(entry)
            entry.nbytes = nbytes
        return entry

    def rows(self) -> list[Row]:
        """Rows merged by owner and tier, sorted by tier and owner; owners that hold nothing are left out."""
        sums: dict[tuple[str, str], int] = {}
        with self._lock:
            for entry in self._entries:
                key = (entry.tier, entry.owner)
                sums[key] = sums.get(key, 0) + entry.nbytes
        return [Row(owner=owner, tier=tier, nbytes=size) for (tier, owner), size in sorted(sums.items()) if size]

    def total(self, tier: str | None = None) -> int:
        """Bytes on one tier, or on all."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries if tier is None or entry.tier == tier)

    def owned(self, prefix: str, tier: str | None = None) -> int:
        """Bytes of the owner `prefix` and of all below it (`weights` counts `weights/int4`)."""
        with self._lock:
            return sum(
                entry.nbytes
                for entry in self._entries
                if (tier is None or entry.tier == tier)
                and (entry.owner == prefix or entry.owner.startswith(prefix + "/"))
            )

    def to_json(self) -> list[dict[str, str | int]]:
        """The rows as plain data."""
        return [row.to_json() for row in self.rows()]

    def _resize(self, entry: Entry, nbytes: int) -> None:
        _checked(entry.owner, nbytes)
        with self._lock:
            if entry not in self._entries:
                raise ValueError(f"ledger entry {entry.owner!r} was released and cannot be resized")
            entry.nbytes = nbytes

    def _release(self, entry: Entry) -> None:
        with self._lock:
            self._entries.discard(entry)
            entry.nbytes = 0


def _checked(owner: str, nbytes: int) -> int:
    if nbytes < 0:
        raise ValueError(f"ledger entry {owner!r}: {nbytes} bytes; must be zero or more")
    return nbytes
