"""Where the bits of `succinct_paging` come from: truth with errors put in, next accesses that are guessed, or a model.

What looks ahead is for experiments and says so; `first_times`, `popu`, `pleco` and `learned` know the past alone.
`popu` guesses that a key that made up a share p of the past comes once in 1 / p accesses; `pleco` weighs past accesses
by their age (Anderson 2014, by way of the literature on paging with predictions). Their guesses become bits by a limit
that is learned from the beginning of the sequence: farther than it is 1. `learned` has features of the kind of LRB
(Song 2020): gaps between a key's last accesses, how often it came with several half-lives, and its age; trees are
boosted on LFD's bits of the beginning, which is all that they are shown.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from memwall.errors import InputError, MissingDependency
from memwall.memory.cache_policy import Key, next_accesses

NUM_GAPS = 6
HALF_LIVES = (8, 64, 512, 4096)
"""Accesses in which a count that decays has lost half."""
MOST_SIGMA = 20
"""Of the logarithm of a distance: beyond it nothing is told any more, and numbers run out."""
PLECO_POWER, PLECO_OFFSET, PLECO_SCALE = 1.8, 10.0, 670.0
"""As the literature uses them for check-ins, from memory."""
PLECO_REACH = 64
"""Past accesses of a key that are looked at; older ones weigh next to nothing."""


def flipped(bits: Sequence[int], seed: int, *, zeros: float, ones: float) -> list[int]:
    """True bits with errors: a zero is told as one with probability `zeros`, a one as zero with `ones`."""
    for name, value in (("zeros", zeros), ("ones", ones)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} {value:g}: a probability lies between 0 and 1")
    draw = random.Random(seed)
    return [bit ^ (draw.random() < (ones if bit else zeros)) for bit in bits]


def noisy_arrivals(keys: Sequence[Key], sigma: float, seed: int) -> list[int]:
    """Places of next accesses whose distances are off by a log-normal factor; they look ahead."""
    if not 0 <= sigma <= MOST_SIGMA:
        raise InputError(f"sigma {sigma:g}: the deviation of a logarithm lies between 0 and {MOST_SIGMA} here")
    draw, end = random.Random(seed), len(keys)
    return [
        end if arrival == end else at + max(1, round((arrival - at) * math.exp(sigma * draw.gauss(0, 1))))
        for at, arrival in enumerate(next_accesses(keys))
    ]


def first_times(keys: Sequence[Key]) -> list[int]:
    """1 where a key comes for the first time: most keys of many caches come once."""
    seen: set[Key] = set()
    found = []
    for key in keys:
        found.append(int(key not in seen))
        seen.add(key)
    return found


def popu(keys: Sequence[Key]) -> list[int]:
    """Guessed places of next accesses, by how often each key came so far."""
    count: dict[Key, int] = defaultdict(int)
    found = []
    for at, key in enumerate(keys):
        count[key] += 1
        found.append(at + math.ceil((at + 1) / count[key]))
    return found


def pleco(keys: Sequence[Key]) -> list[int]:
    """The same, by when it came: the chance of an access now is the key's share of all past accesses' weights."""
    weights = (np.arange(1, len(keys) + 1) + PLECO_OFFSET) ** -PLECO_POWER
    weights *= np.exp(-np.arange(1, len(keys) + 1) / PLECO_SCALE)
    whole = np.cumsum(weights)
    past: dict[Key, list[int]] = defaultdict(list)
    found = []
    for at, key in enumerate(keys):
        mine = past[key]
        mine.append(at)
        share = float(sum(weights[at - each] for each in mine[-PLECO_REACH:]) / whole[at])
        found.append(at + math.ceil(1 / share))
    return found


def bits_beyond(arrivals: Sequence[int], labels: Sequence[int], train: int) -> list[int]:
    """Bits of guessed places: 1 beyond the distance that agrees best with the labels of the first `train` accesses."""
    distances = np.asarray(arrivals) - np.arange(len(arrivals))
    truth = np.asarray(labels[:train])
    limits = np.unique(np.quantile(distances[:train], np.linspace(0, 1, 65)))
    right = [float(((distances[:train] > limit) == truth).mean()) for limit in limits]
    return [int(far) for far in distances > limits[int(np.argmax(right))]]


def features(keys: Sequence[Key]) -> np.ndarray:
    """float32 [accesses, ...]: logarithms of the last gaps between a key's accesses, of the time since its first, of
    how often it came with several half-lives; of a key's first access the gaps are not known (NaN).
    """
    found = np.full((len(keys), NUM_GAPS + 1 + len(HALF_LIVES)), np.nan, np.float32)
    decay = 0.5 ** (1 / np.array(HALF_LIVES))
    counts: dict[Key, np.ndarray] = {}
    seen: dict[Key, list[int]] = {}
    for at, key in enumerate(keys):
        places = seen.setdefault(key, [at, at])  # first, then the last ones, newest first
        gap = at - places[1]
        counts[key] = counts.get(key, np.zeros(len(HALF_LIVES))) * decay**gap + 1
        recent = [at, *places[1:]]
        gaps = [a - b for a, b in itertools.pairwise(recent) if a > b]
        found[at, : len(gaps)] = np.log1p(gaps)
        found[at, NUM_GAPS] = np.log1p(at - places[0])
        found[at, NUM_GAPS + 1 :] = np.log(counts[key])
        seen[key] = [places[0], *recent[: NUM_GAPS + 1]]
    return found


def learned(keys: Sequence[Key], labels: Sequence[int], train: int, seed: int = 0) -> list[int]:
    """Bits from boosted trees that were shown the labels of the first `train` accesses; of these themselves the bits
    are the trees' too.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError:
        raise MissingDependency("scikit-learn", "learn") from None
    table, truth = features(keys), np.asarray(labels[:train])
    if len(np.unique(truth)) < 2:
        return [int(truth[0]) if len(truth) else 0] * len(keys)
    trees = HistGradientBoostingClassifier(max_iter=100, learning_rate=0.1, random_state=seed)
    trees.fit(table[:train], truth)
    return [int(bit) for bit in trees.predict(table)]
