"""What stays in a cache of equal slots: one seam for every store that lets go of things, and the classic policies.

A store asks its policy at each access and is told who leaves. After `on_access(key)` it holds what it held and `key`,
less the victims; the key itself may be one (it is used once and not kept). Whether an access was a fault the store
knows by what it held. `hint` is what was predicted of this access, of the kind that the policy's class names: nothing,
a bit (`succinct_paging`), or the place of the key's next access in the sequence.

`Farthest` with true places is LFD (Belady's rule), which no policy beats: the yardstick for all others.

Units: one slot a key. Cost: a dictionary entry or two a key; constant time an access, but for `Farthest` and `Lfu`,
whose heaps take the logarithm of the slots.
"""

from __future__ import annotations

import heapq
import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from memwall.errors import InputError

Key = Hashable
Hint = Literal["none", "discard", "phase", "arrival"]
T = TypeVar("T", bound=Hashable)


class CachePolicy(Protocol):
    """Decides who leaves."""

    hint: Hint
    """What `on_access` wants to be told: "discard" and "phase" are bits (`succinct_paging`), "arrival" is a place."""
    slots: int
    draws: bool

    def on_access(self, key: Key, size: int = 1, hint: int = 0) -> Sequence[Key]:
        """The keys that must leave, `key` among them if it is not to stay. size: slots of the key, 1."""


class Paging(ABC):
    """What policies of equal slots share: checks, and the number of slots."""

    hint: Hint = "none"
    draws = False
    """Whether it draws lots, so that another seed gives other faults."""

    def __init__(self, slots: int, seed: int = 0) -> None:
        if slots < 1:
            raise InputError(f"{slots} slots: a cache needs one at least")
        self.slots = slots
        self.random = random.Random(seed)

    def on_access(self, key: Key, size: int = 1, hint: int = 0) -> Sequence[Key]:
        """See `CachePolicy`."""
        if size != 1:
            raise InputError(f"{type(self).__name__} keeps keys of one slot, not of {size}")
        return self._access(key, hint)

    @abstractmethod
    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        """The victims."""


class Bag(Generic[T]):
    """A set that any member can be drawn from, each as likely as the others, in constant time."""

    def __init__(self, members: Sequence[T] = ()) -> None:
        self._members = list(members)
        self._place = {member: place for place, member in enumerate(self._members)}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[T]:
        return iter(self._members)

    def __contains__(self, member: object) -> bool:
        return member in self._place

    def add(self, member: T) -> None:
        """Adds one; nothing changes if it is there."""
        if member not in self._place:
            self._place[member] = len(self._members)
            self._members.append(member)

    def discard(self, member: T) -> None:
        """Takes one out, if it is there."""
        place = self._place.pop(member, None)
        if place is None:
            return
        last = self._members.pop()
        if last != member:
            self._members[place] = last
            self._place[last] = place

    def draw(self, rng: random.Random) -> T:
        """Takes any member out."""
        member = self._members[rng.randrange(len(self._members))]
        self.discard(member)
        return member


class Fifo(Paging):
    """Who came first leaves first."""

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self._held: OrderedDict[Key, None] = OrderedDict()

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        if key in self._held:
            return ()
        victims = [self._held.popitem(last=False)[0]] if len(self._held) == self.slots else []
        self._held[key] = None
        return victims


class Lru(Fifo):
    """Who was used longest ago leaves first: at most `slots` times the faults of LFD."""

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        if key in self._held:
            self._held.move_to_end(key)
            return ()
        return super()._access(key, hint)


def without_old(heap: list[tuple[int, int, Key]], held: dict[Key, tuple[int, int]]) -> list[tuple[int, int, Key]]:
    """The heap, or where most of it is out of date another one, of what is held alone."""
    if len(heap) <= 4 * len(held) + 64:
        return heap
    heap = [(*order, key) for key, order in held.items()]
    heapq.heapify(heap)
    return heap


class Lfu(Paging):
    """Who was used least often while it was held leaves first, of these the one longest ago."""

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self._uses: dict[Key, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, Key]] = []
        self._now = 0

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        if key not in self._uses and len(self._uses) == self.slots:
            while True:
                count, at, oldest = heapq.heappop(self._heap)
                if self._uses.get(oldest) == (count, at):
                    break
            del self._uses[oldest]
            victims.append(oldest)
        self._now += 1
        mine = (self._uses.get(key, (0, 0))[0] + 1, self._now)
        self._uses[key] = mine
        heapq.heappush(self._heap, (*mine, key))
        self._heap = without_old(self._heap, self._uses)
        return victims


class Chance(Paging):
    """Anybody leaves."""

    draws = True

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self._held: Bag[Key] = Bag()

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        if key in self._held:
            return ()
        victims = [self._held.draw(self.random)] if len(self._held) == self.slots else []
        self._held.add(key)
        return victims


class Marker(Paging):
    """Accesses mark; anybody without a mark leaves, and where all have one, all lose it: 2 H_k times LFD's faults at
    most, in expectation, where k is `slots` and H_k = 1 + 1/2 + ... + 1/k (Fiat 1991).
    """

    draws = True

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self.phases = 1
        self._marked: dict[Key, None] = {}
        self._unmarked: Bag[Key] = Bag()

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        if key not in self._marked and key not in self._unmarked and self._num_held == self.slots:
            if not self._unmarked:
                self.phases += 1
                self._unmarked, self._marked = Bag(list(self._marked)), {}
            victims.append(self._unmarked.draw(self.random))
        self._unmarked.discard(key)
        self._marked[key] = None
        return victims

    @property
    def _num_held(self) -> int:
        return len(self._marked) + len(self._unmarked)


class Farthest(Paging):
    """Whose next access is said to be farthest leaves. Where it is true this is LFD, else what is called blind trust.

    Of keys that are never wanted again (or as far), the one used longest ago leaves: always the same one, so that the
    bits that LFD makes of a sequence are those of the LFD that policies are held against.
    """

    hint: Hint = "arrival"

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self._next: dict[Key, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, Key]] = []
        self._now = 0

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        if key not in self._next and len(self._next) == self.slots:
            while True:
                far, at, last = heapq.heappop(self._heap)
                if self._next.get(last) == (far, at):
                    break
            del self._next[last]
            victims.append(last)
        self._next[key] = mine = (-hint, self._now)
        self._now += 1
        heapq.heappush(self._heap, (*mine, key))
        self._heap = without_old(self._heap, self._next)
        return victims


def next_accesses(keys: Sequence[Key]) -> list[int]:
    """For each access the place of the next one of the same key; len(keys) where there is none."""
    found = [len(keys)] * len(keys)
    upcoming: dict[Key, int] = {}
    for at in range(len(keys) - 1, -1, -1):
        found[at] = upcoming.get(keys[at], len(keys))
        upcoming[keys[at]] = at
    return found


class Store:
    """What a store that heeds a policy holds, and how often it had to fetch."""

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.held: set[Key] = set()
        self.faults = 0

    def access(self, key: Key, hint: int = 0) -> Sequence[Key]:
        """Who leaves; `faults` has counted the key if it was not held."""
        victims = self.policy.on_access(key, 1, hint)
        if key not in self.held:
            self.faults += 1
            self.held.add(key)
        self.held.difference_update(victims)
        if len(self.held) > self.policy.slots:
            raise AssertionError(f"{type(self.policy).__name__} lets {len(self.held)} keys stay in {self.policy.slots}")
        return victims


def count_faults(
    policy: CachePolicy, keys: Sequence[Key], hints: Sequence[int] | None = None, *, first: int = 0
) -> int:
    """Of a sequence, from an empty cache; those of access `first` and later ones."""
    store, before = Store(policy), 0
    for at, key in enumerate(keys):
        if at == first:
            before = store.faults
        store.access(key, hints[at] if hints is not None else 0)
    return store.faults - before


def least_faults(keys: Sequence[Key], slots: int) -> int:
    """Those of LFD: no policy has fewer."""
    return count_faults(Farthest(slots), keys, next_accesses(keys))


CLASSIC: dict[str, Callable[..., CachePolicy]] = {
    "lru": Lru,
    "fifo": Fifo,
    "lfu": Lfu,
    "random": Chance,
    "marker": Marker,
    "lfd": Farthest,
    "blind-oracle": Farthest,
}
