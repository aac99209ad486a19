"""Eviction by one predicted bit an access: near the optimum where bits are right, never far from a classic policy.

Source: Paging with Succinct Predictions, Antoniadis 2022, arXiv 2210.02775 (ICML 2023). Robust forms: Fiat 1991 (follow
the cheaper of two), Blum and Burch 2000 (weights). In their company: predictive marking, Lykouris and Vassilvitskii
2018, and its simpler form LMarker, Rohatgi 2020, which are told next accesses.

Idea: a bit says either that LFD would discard the key before it is accessed again (*discard* bit 1; 0: it would keep
it), or that the key does not come in the next phase (*phase* bit 1). A phase is a longest run of accesses to k keys, k
being `slots`. With A faults, OPT those of LFD, e0 and e1 the numbers of wrong zeros and wrong ones (phase bits count
once for a key and phase, by the last one), the expected A is at most OPT times the first number, and so many for each
wrong zero and one:

    Flush            (1, k - 1, 1)    discard bits, deterministic
    MarkZero         (1, 2 H_k, 1)    discard bits, random
    MarkAndPredict   (2, H_k, 1)      phase bits, random; O(log k) whatever the bits are
      in_order       (2, k - 1, 1)    phase bits, deterministic

Units: one slot a key; a hint is 0 or 1, given with every access, hits too.

Differs from the paper: the deterministic form for phase bits follows from its argument, and may not stand in it.

Cost: two dictionary entries a key, constant time an access; robust forms run both policies, and they and predictive
marking look through the slots at a fault.

Holds when: keys take one slot each and cost the same to fetch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from memwall.errors import InputError
from memwall.memory.cache_policy import (
    CLASSIC,
    Bag,
    CachePolicy,
    Farthest,
    Hint,
    Key,
    Lru,
    Marker,
    Paging,
    Store,
    next_accesses,
)


class Flush(Paging):
    """FLUSH-WHEN-ALL-0s: a key with bit 1 leaves; where there is none some bit was wrong, and all leave."""

    hint: Hint = "discard"

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self._kept: dict[Key, None] = {}
        self._spare: OrderedDict[Key, None] = OrderedDict()

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        if key not in self._kept and key not in self._spare and len(self._kept) + len(self._spare) == self.slots:
            if self._spare:
                victims.append(self._spare.popitem(last=False)[0])
            else:
                victims.extend(self._kept)
                self._kept.clear()
        self._kept.pop(key, None)
        self._spare.pop(key, None)
        (self._spare if hint else self._kept)[key] = None
        return victims


class MarkZero(Paging):
    """MARK0: a key with bit 1 leaves at once; keys with bit 0 are marked and leave by lot, as in `Marker`."""

    hint: Hint = "discard"
    draws = True

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(slots, seed)
        self.held: dict[Key, None] = {}
        self.due: set[Key] = set()
        """Held when the phase began and not accessed in it, evicted ones too."""
        self.unmarked: Bag[Key] = Bag()
        """Those of them that are still held."""

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        if key not in self.held:
            # one that left unmarked comes back: another one leaves though there may be room, so that those that are
            # still unmarked are a fair sample of those that are due
            returns = key in self.due and len(self.unmarked) > 0
            if not returns and len(self.held) == self.slots and not self.unmarked:
                self.due, self.unmarked = set(self.held), Bag(list(self.held))
            if returns or len(self.held) == self.slots:
                victims.append(self.unmarked.draw(self.random))
                del self.held[victims[0]]
        self.due.discard(key)
        self.unmarked.discard(key)
        if hint:
            self.held.pop(key, None)
            victims.append(key)
        else:
            self.held[key] = None
        return victims


class MarkAndPredict(Paging):
    """MARK&PREDICT: of unmarked keys one with bit 1 leaves, else any; by lot, or in_order the one used longest ago."""

    hint: Hint = "phase"

    def __init__(self, slots: int, seed: int = 0, *, in_order: bool = False) -> None:
        super().__init__(slots, seed)
        self.in_order, self.draws = in_order, not in_order
        self.phases = 1
        self._marked: OrderedDict[Key, int] = OrderedDict()
        """Key to its last bit, by the last access."""
        self._unmarked: dict[Key, int] = {}
        self._ready: tuple[list[Key], list[Key]] = ([], [])
        """Unmarked keys with bit 0 and with bit 1, in the order in which they will leave; some may be marked by now."""

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        held = len(self._marked) + len(self._unmarked)
        if key not in self._marked and key not in self._unmarked and held == self.slots:
            if not self._unmarked:
                self._begin()
            victims.append(self._next_victim())
        self._unmarked.pop(key, None)
        self._marked[key] = hint
        self._marked.move_to_end(key)
        return victims

    def _begin(self) -> None:
        self.phases += 1
        self._unmarked, self._marked = dict(self._marked), OrderedDict()
        ready: tuple[list[Key], list[Key]] = ([], [])
        for key, bit in reversed(self._unmarked.items()):  # the end of a list leaves first
            ready[bool(bit)].append(key)
        if not self.in_order:
            for keys in ready:
                self.random.shuffle(keys)
        self._ready = ready

    def _next_victim(self) -> Key:
        for keys in reversed(self._ready):
            while keys:
                key = keys.pop()
                if key in self._unmarked:
                    del self._unmarked[key]
                    return key
        raise AssertionError("every key is marked")


class PredictiveMarker(Marker):
    """Marking that trusts next accesses: the unmarked key that is said to come last leaves, until one eviction has led
    to another H_k times in a row; then any. trust: False is LMarker, which trusts only where a new key came.
    """

    hint: Hint = "arrival"

    def __init__(self, slots: int, seed: int = 0, *, trust: bool = True) -> None:
        super().__init__(slots, seed)
        self._longest = sum(1 / n for n in range(1, slots + 1)) if trust else 1.0
        self._arrival: dict[Key, int] = {}
        self._chain: dict[Key, int] = {}
        """Keys that were held when the phase began and have left in it: how many evictions led to it, itself too."""

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        victims: list[Key] = []
        if key not in self._marked and key not in self._unmarked and self._num_held == self.slots:
            if not self._unmarked:
                self.phases += 1
                self._unmarked, self._marked, self._chain = Bag(list(self._marked)), {}, {}
            length = self._chain.pop(key, 0) + 1
            if length <= self._longest:
                last = max(self._unmarked, key=lambda one: self._arrival[one])
                self._unmarked.discard(last)
            else:
                last = self._unmarked.draw(self.random)
            del self._arrival[last]
            self._chain[last] = length
            victims.append(last)
        self._unmarked.discard(key)
        self._marked[key] = None
        self._arrival[key] = hint
        return victims


class Robust(Paging):
    """Holds what the cheaper of two policies would hold: the other one is followed as soon as the followed one's faults
    are more than twice its own. Keys are changed only where one is fetched anyhow, so it never faults where the
    followed policy, from the same contents, would not.
    """

    def __init__(self, policy: CachePolicy, other: CachePolicy, factor: float = 2.0) -> None:
        super().__init__(policy.slots)
        self.hint, self.draws = policy.hint, policy.draws or other.draws
        self.factor = factor
        self.stores = (Store(policy), Store(other))
        self.followed = 0
        self._held: OrderedDict[Key, None] = OrderedDict()

    def _access(self, key: Key, hint: int) -> Sequence[Key]:
        for store in self.stores:
            store.access(key, hint)
        self._choose()
        if key in self._held:
            self._held.move_to_end(key)
            return ()
        victims: list[Key] = []
        if len(self._held) == self.slots:
            wanted = self.stores[self.followed].held
            victims.append(next(one for one in self._held if one not in wanted))
            del self._held[victims[0]]
        self._held[key] = None
        return victims

    def _choose(self) -> None:
        other = 1 - self.followed
        if self.stores[self.followed].faults > self.factor * self.stores[other].faults:
            self.followed = other


class Weighted(Robust):
    """The same by weights: each fault takes a policy's weight down to `beta` of it, and the followed one is left with
    the probability that its share has lost. In expectation (1 + eps) times the better one, and some more, where eps
    goes to zero as beta goes to one.
    """

    def __init__(self, policy: CachePolicy, other: CachePolicy, beta: float = 0.9, seed: int = 0) -> None:
        super().__init__(policy, other)
        if not 0 < beta < 1:
            raise InputError(f"beta {beta:g}: a fault must leave a policy more than nothing of its weight, and less")
        self.draws = True
        self.random.seed(seed)
        self._log_beta = math.log(beta)
        self._share = 0.5

    def _choose(self) -> None:
        gap = self._log_beta * (self.stores[1 - self.followed].faults - self.stores[self.followed].faults)
        share = 1 / (1 + math.exp(min(gap, 700.0)))
        if share < self._share and self.random.random() < 1 - share / self._share:
            self.followed = 1 - self.followed
            share = 1 - share
        self._share = share


# ---- bits of a sequence --------------------------------------------------------------------------------------------


def discard_bits(keys: Sequence[Key], slots: int, arrivals: Sequence[int] | None = None) -> list[int]:
    """Discard bits of all accesses by LFD. arrivals: places of next accesses that are predicted instead of true ones;
    the bits are then those of blind trust in them.
    """
    bits = [0] * len(keys)
    last: dict[Key, int] = {}
    policy = Farthest(slots)
    for at, (key, arrival) in enumerate(zip(keys, arrivals or next_accesses(keys), strict=True)):
        for victim in policy.on_access(key, 1, arrival):
            bits[last[victim]] = 1
        last[key] = at
    return bits


def phases_of(keys: Sequence[Key], slots: int) -> list[int]:
    """The phase of each access, from 0: a new one begins with the (slots + 1)-th key of the one before."""
    found: list[int] = []
    seen: set[Key] = set()
    phase = 0
    for key in keys:
        if key not in seen and len(seen) == slots:
            seen, phase = set(), phase + 1
        seen.add(key)
        found.append(phase)
    return found


def phase_bits(keys: Sequence[Key], slots: int) -> list[int]:
    """0 where the key comes again in the phase after this one's, else 1."""
    phases = phases_of(keys, slots)
    come = set(zip(keys, phases, strict=True))
    return [int((key, phase + 1) not in come) for key, phase in zip(keys, phases, strict=True)]


def wrong_bits(kind: Hint, keys: Sequence[Key], slots: int, bits: Sequence[int]) -> tuple[int, int]:
    """(wrong zeros, wrong ones) of discard or phase bits."""
    if kind == "discard":
        pairs = list(zip(bits, discard_bits(keys, slots), strict=True))
    else:
        judged = zip(keys, phases_of(keys, slots), bits, phase_bits(keys, slots), strict=True)
        pairs = list({(key, phase): (bit, truth) for key, phase, bit, truth in judged}.values())  # the last one counts
    return sum(1 for bit, truth in pairs if not bit and truth), sum(1 for bit, truth in pairs if bit and not truth)


# ---- by name -------------------------------------------------------------------------------------------------------

Maker = Callable[[int, int], CachePolicy]
"""(slots, seed) to a policy."""

NAMES: dict[str, Maker] = {
    **CLASSIC,
    "flush": Flush,
    "mark0": MarkZero,
    "mark-predict": MarkAndPredict,
    "mark-predict-in-order": lambda slots, seed: MarkAndPredict(slots, seed, in_order=True),
    "robust-flush": lambda slots, seed: Robust(Flush(slots), Lru(slots)),
    "robust-mark0": lambda slots, seed: Weighted(MarkZero(slots, seed), Marker(slots, seed + 1), seed=seed + 2),
    "robust-mark0-lru": lambda slots, seed: Weighted(MarkZero(slots, seed), Lru(slots), seed=seed + 2),
    "predictive-marker": PredictiveMarker,
    "lmarker": lambda slots, seed: PredictiveMarker(slots, seed, trust=False),
}


def make_policy(name: str, slots: int, seed: int = 0) -> CachePolicy:
    """A policy by its name; InputError that says which there are."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise InputError(f"no eviction policy {name!r}; {hint}")
    return NAMES[name](slots, seed)
