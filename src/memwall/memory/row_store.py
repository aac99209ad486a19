"""Rows of equal size that come and go, packed without gaps: what is held is always the first `used` rows.

Source: LLM in a flash (Keivan Alizadeh, 2023, arXiv 2312.11514), section 3.3. Room for the most rows is taken once.
Those that leave are overwritten by the last ones, so nothing is allocated and no more rows move than leave; new ones
are appended. Where rows leave and come at once, new ones take the places of old ones and only the difference moves
(`exchange`), which the paper does not have.

Keys are numbers below `num_keys`. Rows begin at multiples of a sector, so that direct reads go straight to them. Cost:
rows * (row_bytes + 4 * side + 8) + 4 * num_keys bytes; finding a key takes one look-up.
"""

from __future__ import annotations

import numpy as np

from memwall.errors import InputError
from memwall.memory.arena import Arena, allocated_bytes

ALIGNMENT_BYTES = 4096


class RowStore:
    """data: uint8 [capacity, row_bytes]. side: float32 [capacity, side], numbers that belong to each row and move with
    it. used_at: int32 [capacity], when each row was last used, in whatever unit the caller counts.
    """

    def __init__(
        self, arena: Arena, owner: str, *, num_keys: int, capacity: int, row_bytes: int, side: int = 0
    ) -> None:
        """BudgetExceeded, with nothing held, where the arena has no room."""
        if capacity < 1 or row_bytes < 1 or num_keys < 1:
            raise InputError(
                f"a store of {capacity} rows of {row_bytes} bytes for {num_keys} keys: all must be above 0"
            )
        self._arena = arena
        forms = {
            "data": ((capacity * row_bytes + ALIGNMENT_BYTES,), np.uint8), "side": ((capacity, side), np.float32),
            "keys": ((capacity,), np.int32), "used_at": ((capacity,), np.int32), "places": ((num_keys,), np.int32),
        }  # fmt: skip
        self._held = arena.allocate_all(owner, {name: form for name, form in forms.items() if form[0][-1]})
        begin = -self._held["data"].ctypes.data % ALIGNMENT_BYTES
        self.data = self._held["data"][begin : begin + capacity * row_bytes].reshape(capacity, row_bytes)
        self.side = self._held["side"] if side else np.empty((capacity, 0), np.float32)
        self.keys, self.used_at, self.places = (self._held[name] for name in ("keys", "used_at", "places"))
        self.places.fill(-1)
        self.used = 0
        self.moved_rows = 0

    @staticmethod
    def predict_bytes(*, num_keys: int, capacity: int, row_bytes: int, side: int = 0) -> int:
        """What a store takes of its arena."""
        sizes = (capacity * row_bytes + ALIGNMENT_BYTES, 4 * capacity * side, 4 * capacity, 4 * capacity, 4 * num_keys)
        return sum(allocated_bytes(size) for size in sizes if size)

    @property
    def capacity(self) -> int:
        return len(self.data)

    def release(self) -> None:
        """Gives the memory back; the store is of no more use."""
        for array in self._held.values():
            self._arena.free(array)
        self._held = {}

    def missing(self, keys: np.ndarray, now: int) -> np.ndarray:
        """Those of the keys that are not held; the others count as used now."""
        places = self.places[keys]
        held = places >= 0
        self.used_at[places[held]] = now
        return keys[~held]

    def idle(self, oldest: int) -> np.ndarray:
        """Places of rows that were last used before `oldest`, ascending."""
        return np.flatnonzero(self.used_at[: self.used] < oldest)

    def least_used(self, count: int) -> np.ndarray:
        """Places of the `count` rows that were used longest ago, ascending."""
        if count >= self.used:
            return np.arange(self.used)
        return np.sort(np.argpartition(self.used_at[: self.used], count)[:count])

    def drop(self, places: np.ndarray) -> None:
        """Rows at `places` (ascending) leave: the last ones that stay move over them."""
        self.places[self.keys[places]] = -1
        left = self.used - len(places)
        holes = places[places < left]
        staying = np.ones(self.used - left, bool)
        staying[places[len(holes) :] - left] = False
        movers = np.flatnonzero(staying) + left
        if len(movers):
            self.data[holes] = self.data[movers]
            self.side[holes] = self.side[movers]
            self.keys[holes] = self.keys[movers]
            self.used_at[holes] = self.used_at[movers]
            self.places[self.keys[holes]] = holes
        self.moved_rows += len(movers)
        self.used = left

    def append(self, keys: np.ndarray, now: int) -> np.ndarray:
        """Places for rows of new keys, behind those that are held; the caller fills `data` and `side` there."""
        if self.used + len(keys) > self.capacity:
            raise InputError(f"{len(keys)} rows more than the {self.used} held: there is room for {self.capacity}")
        places = np.arange(self.used, self.used + len(keys))
        self.used += len(keys)
        self._settle(places, keys, now)
        return places

    def exchange(self, places: np.ndarray, keys: np.ndarray, now: int) -> np.ndarray:
        """Rows at `places` (ascending) leave and new keys come; gives where these are to be filled in."""
        both = min(len(places), len(keys))
        if len(keys) > both:
            behind = self.append(keys[both:], now)  # before anything changes: it may refuse
        taken = places[:both]
        self.places[self.keys[taken]] = -1
        self._settle(taken, keys[:both], now)
        if len(keys) > both:
            return np.concatenate([taken, behind])
        if len(places) > both:
            self.drop(places[both:])
            taken = self.places[keys].astype(np.int64)  # some of the last ones may have moved
        return taken

    def _settle(self, places: np.ndarray, keys: np.ndarray, now: int) -> None:
        self.keys[places] = keys
        self.used_at[places] = now
        self.places[keys] = places
