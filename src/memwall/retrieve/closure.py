"""Which lists a vector joins: the near heads' that do not lie in one direction; and how long a list may be.

Source: SPANN, 2021, arXiv 2111.08566, section 3.3; microsoft/SPTAG for the factor of the second rule and the cut.

Idea: a vector between two clusters is missed if only one of them holds it, so it joins several. Of its nearest heads,
from near to far, one is taken if it is not much farther than the nearest (closure), and if no head taken before is
nearer to it than the vector is (relative neighbourhood): a list behind another adds little that is new.

Units and shapes: all distances are squared, as the released code has them; closure is the paper's 1 + eps1, infinity
for that code's own rule. taken int32 and apart float32 [n, replicas], -1 and infinity behind the last.

Cost: `candidates` * `replicas` comparisons a vector at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.kernels import vector_search
from memwall.kernels.vector_search import VectorGraph

AT_ONCE = 8192
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosureSettings:
    """candidates: near heads that are looked at. nearest: how many lists each vector joins on average by nearness
    alone, without either rule, which only comparisons want.
    """

    candidates: int = 64
    replicas: int = 8
    closure: float = 11.0
    rng_factor: float = 1.0
    nearest: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= self.candidates:
            raise InputError(f"replicas {self.replicas} of {self.candidates} candidates: at least 1, at most those")
        if not self.closure >= 1:
            raise InputError(f"closure is {self.closure}: at least 1, times the nearest head's squared distance")
        if not (self.rng_factor > 0 and math.isfinite(self.rng_factor)):
            raise InputError(f"rng_factor is {self.rng_factor}: a number above 0, such as 1")
        if self.nearest is not None and not 1 <= self.nearest <= self.candidates:
            raise InputError(f"nearest is {self.nearest}: at least 1, at most the {self.candidates} candidates")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """members: int32, ids of all lists one behind another, each from near to far; list i ends at ends[i].

    cut: entries that the bound on a list's length took. orphans: vectors that no list holds any more.
    """

    members: np.ndarray
    ends: np.ndarray
    cut: int = 0
    orphans: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, at: int) -> np.ndarray:
        return self.members[self.ends[at - 1] if at else 0 : self.ends[at]]


def nearest_heads(
    vectors: np.ndarray,
    ids: np.ndarray,
    graph: VectorGraph,
    count: int,
    budget: int,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """int32 and float32 [ids, count]: of the vectors `ids`, by a search of the graph."""
    found, apart = np.empty((len(ids), count), np.int32), np.empty((len(ids), count), np.float32)
    for begin in range(0, len(ids), AT_ONCE):
        some = slice(begin, begin + AT_ONCE)
        found[some], apart[some], _ = graph.search(np.asarray(vectors[ids[some]], np.float32), count, budget)
        if progress is not None:
            progress(min(begin + AT_ONCE, len(ids)), len(ids))
    return found, apart


def assign(
    heads: np.ndarray, found: np.ndarray, apart: np.ndarray, settings: ClosureSettings
) -> tuple[np.ndarray, np.ndarray]:
    """taken and apart of vectors whose near heads are `found`."""
    if settings.nearest is None:
        return vector_search.closure_assign(
            heads, found, apart, closure=settings.closure, rng_factor=settings.rng_factor, replicas=settings.replicas
        )
    most = math.ceil(settings.nearest)
    taken, near = vector_search.closure_assign(
        heads, found, apart, closure=math.inf, rng_factor=1, replicas=most, nearest_only=True
    )
    # every so many vectors join one list more, so that the mean is met
    share = settings.nearest - (most - 1)
    fewer = np.floor(np.arange(1, len(taken) + 1) * share) == np.floor(np.arange(len(taken)) * share)
    taken[fewer, most - 1], near[fewer, most - 1] = -1, np.inf
    return taken, near


def gather(ids: np.ndarray, taken: np.ndarray, apart: np.ndarray, num_lists: int, longest: int | None) -> Lists:
    """Lists of the vectors `ids` that joined them, from near to far, at most so long."""
    rows, places = np.nonzero(taken >= 0)
    heads, distances, members = taken[rows, places], apart[rows, places], ids[rows]
    order = np.lexsort((members, distances, heads))
    heads, members = heads[order], members[order]
    lengths = np.bincount(heads, minlength=num_lists)
    starts = np.cumsum(lengths) - lengths
    kept = np.ones(len(heads), bool)
    if longest is not None:
        kept = np.arange(len(heads)) - starts[heads] < longest
        lengths = np.minimum(lengths, longest)
    held = members[kept]
    return Lists(
        members=held.astype(np.int32),
        ends=np.cumsum(lengths),
        cut=int(len(kept) - len(held)),
        orphans=len(ids) - len(np.unique(held)),
    )
