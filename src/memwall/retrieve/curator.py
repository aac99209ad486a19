"""One index and one copy of vectors for many tenants, in which each tenant searches what is in effect its own index.

Source: Curator: Efficient Indexing for Multi-Tenant Vector Databases, 2024, arXiv 2401.07119; code: github.com/
hatsu3/curator.

Idea: all vectors, whoever may read them, lie in the leaves of one tree of clusters (`cluster_tree`), learned once.
A tenant's own tree is that tree cut back: a node where a Bloom filter does not know the tenant is not in it, and one
that holds a short list of the tenant's vectors below it is a leaf of it. Lists split downwards when they grow over
`max_list` and merge upwards when those of siblings fit one. A search goes best node first through the tenant's tree
until it has found enough vectors, keeps the nearest nodes, and compares their vectors exactly. A second design (hatsu3/
curator-v2) searches what any filter lets through: ids in the order of the tree's leaves are a tree for that question.

Units and shapes: vectors [n, d] float32, queries [q, d]; labels are int64, given to vectors as they come and never
used again. Scores: cosines, or with the metric `l2` squared distances, negative. A tenant is a name.

Differs from the paper: children that do not know the tenant are left out before their distances are computed, not
after. Filters of all nodes that a tenant left are made anew together, every `rebuild_interval` such events, and a
node's new filter is that of its children and of the tenants of its own short lists, which these need not know. A leaf's
filter is not stored: its counts say the same, and never too much. Siblings that surely have no vector of a tenant do
not keep the others' lists from merging; a leaf whose list had overflowed gets one again at half of `max_list`. A search
that drops far nodes keeps `top` vectors at least. Only a vector's owner may delete it, or whoever runs the index. The
second design's ids spell their way through the tree in 6 bits a level; here the places of leaves from left to right do
that, made when they are needed. Not there: its leaves of at most 128 vectors, and its ids as they are stored.

Cost: n * d * 4 bytes for vectors, nodes * d * 4 for the tree and a filter for each node that is no leaf; for each
permission 4 bytes for who may read the vector, 4 in one short list at most, and 4 for each tenant of a leaf. A search
computes distances to at most `scan_factor` * top vectors.

Holds when: the vectors to come resemble those that the tree was learned from; filters are made for `filter_capacity`
tenants, and know more of them than they should where there are more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from memwall import _native
from memwall.errors import InputError
from memwall.retrieve.base import Hits, VectorIndex, checked_vectors, unit
from memwall.retrieve.cluster_tree import ClusterTree, TreeShape, train_tree

Metric = Literal["cosine", "l2"]
METRICS = ("cosine", "l2")
MOST_TENANTS, MOST_TOP, LONGEST_NAME, MOST_EFFORT = 1 << 20, 1 << 16, 200, 1 << 20
MOST_INTERVAL = 1 << 31
_WORD_BITS = 64
_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class CuratorSettings:
    """shape: of the tree. max_list: vectors of a short list (the paper's max_sl: 128 in its code, 256 in its runs).

    filter_capacity, filter_error: tenants a Bloom filter is made for, and how often it then knows one wrongly (0.001 in
    the paper's runs). rebuild_interval: times that a tenant lost its last vector of a leaf, after which filters are
    made anew. bucket_factor (gamma1), scan_factor (gamma2): a search for the `top` best looks at nodes until they hold
    bucket_factor * scan_factor * top vectors, and compares the nearest scan_factor * top of them (the paper's code: 16
    and 256; its runs: 2, and 128 or 384).
    """

    shape: TreeShape = field(default_factory=TreeShape)
    max_list: int = 128
    filter_capacity: int = 1000
    filter_error: float = 0.01
    rebuild_interval: int = 100
    bucket_factor: int = 16
    scan_factor: int = 256

    def __post_init__(self) -> None:
        limits = {
            "max_list": (1, 1 << 16), "filter_capacity": (1, MOST_TENANTS), "filter_error": (1e-6, 0.5),
            "rebuild_interval": (1, MOST_INTERVAL), "bucket_factor": (1, MOST_EFFORT), "scan_factor": (1, MOST_EFFORT),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")

    @property
    def filter_words(self) -> int:
        """Of 64 bits, in the filter of a node: -n ln p / (ln 2)^2 bits for n tenants and a share p of wrong answers."""
        bits = -self.filter_capacity * math.log(self.filter_error) / math.log(2) ** 2
        return -(-math.ceil(bits) // _WORD_BITS)

    @property
    def filter_hashes(self) -> int:
        """Bits that a tenant sets."""
        return max(1, round(self.filter_words * _WORD_BITS / self.filter_capacity * math.log(2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How far a search goes. scan_factor, bucket_factor: instead of those of the settings.

    The rest is the second design's (see `curator`): spread_weight takes a node's spread, so many times, off its
    distance (0.2 to 0.4 there); prune ends the search of the tree at nodes so many times as far as the nearest bucket
    (1.6 there); most_buckets ends it at so many buckets; beam goes on from so many nodes of each level, instead of from
    the nearest first.
    """

    scan_factor: int | None = None
    bucket_factor: int | None = None
    spread_weight: float = 0.0
    prune: float = math.inf
    most_buckets: int | None = None
    beam: int | None = None

    def __post_init__(self) -> None:
        for name in ("scan_factor", "bucket_factor", "most_buckets", "beam"):
            given = getattr(self, name)
            if given is not None and not 1 <= given <= MOST_EFFORT:
                raise InputError(f"{name} is {given}; it must be from 1 to {MOST_EFFORT:,}")
        if not 0 <= self.spread_weight <= 1 or not self.prune >= 1:
            raise InputError(f"spread_weight {self.spread_weight} must be from 0 to 1, prune {self.prune} 1 at least")

    def limits(self, settings: CuratorSettings, top: int) -> tuple[int, int, int, int]:
        """As the kernel takes them."""
        scanned = (self.scan_factor or settings.scan_factor) * top
        found = (self.bucket_factor or settings.bucket_factor) * scanned
        return found, scanned, self.most_buckets or MOST_EFFORT, self.beam or 0


_USUAL = Effort()


@dataclass(frozen=True, slots=True)
class Work:
    """What searches took, int64 [q] each: nodes of the tree looked at, distances to centroids, to vectors, and nodes
    whose vectors were compared.
    """

    nodes: np.ndarray
    centroid_distances: np.ndarray
    vector_distances: np.ndarray
    buckets: np.ndarray


class Curator:
    """The shared index. Many threads may search it at once; what changes it waits for them, and they for it."""

    def __init__(self, clusters: ClusterTree, settings: CuratorSettings, metric: Metric = "cosine") -> None:
        """Without vectors."""
        if metric not in METRICS:
            raise InputError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
        self.settings, self.metric, self.clusters = settings, metric, clusters
        self.tenants: list[str] = []
        self.next_label = 0
        self._numbers: dict[str, int] = {}
        try:
            self.tree = _native.TenantTree(
                clusters.centroids, clusters.spreads, clusters.parents, settings.max_list,
                settings.filter_words, settings.filter_hashes, settings.rebuild_interval,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(f"no tree of clusters: {error}") from None

    @classmethod
    def train(
        cls,
        x: np.ndarray,
        settings: CuratorSettings | None = None,
        *,
        metric: Metric = "cosine",
        progress: Callable[[int, int], None] | None = None,
    ) -> Curator:
        """An index without vectors, its tree learned from x, [n, d]: samples of what is to come, whoever will read
        them.
        """
        settings = settings or CuratorSettings()
        return cls(train_tree(_prepared(x, None, metric, "sample"), settings.shape, progress), settings, metric)

    # ---- what there is ----

    @property
    def count(self) -> int:
        """Vectors held."""
        return int(self.tree.count())

    @property
    def dimensions(self) -> int:
        return int(self.clusters.centroids.shape[1])

    def bytes(self) -> dict[str, int]:
        """Held, by part: `vectors` here and those `mapped` from a file, and what comes on top of them: the `tree`,
        `filters`, short `lists`, `access` (who may read what) and `labels`.
        """
        return dict(self.tree.bytes())

    def number(self, tenant: str) -> int:
        """Of a tenant that is known; InputError otherwise, with the nearest name."""
        found = self._numbers.get(tenant)
        if found is None:
            near = get_close_matches(str(tenant)[:LONGEST_NAME], self.tenants, 1)
            known = f"did you mean {near[0]}?" if near else f"there are {len(self.tenants)} others"
            raise InputError(f"no tenant {ascii(tenant)[:LONGEST_NAME]} in this index; {known}")
        return found

    def add_tenant(self, tenant: str) -> int:
        """Its number; a name that is known keeps its own."""
        if tenant in self._numbers:
            return self._numbers[tenant]
        if not 0 < len(tenant) <= LONGEST_NAME or not tenant.isprintable() or any(c in tenant for c in " ,:="):
            raise InputError(
                f"{ascii(tenant)[:LONGEST_NAME]} names no tenant: a name has 1 to {LONGEST_NAME} printable characters, "
                "and no space, comma, colon or equals sign"
            )
        if len(self.tenants) == MOST_TENANTS:
            raise InputError(f"an index has {MOST_TENANTS:,} tenants at most")
        self._numbers[tenant] = len(self.tenants)
        self.tenants.append(tenant)
        return self._numbers[tenant]

    def of(self, tenant: str) -> TenantVectors:
        """What a tenant may read, as an index of its own."""
        self.number(tenant)
        return TenantVectors(self, tenant)

    def readable(self, tenant: str) -> np.ndarray:
        """Labels of what a tenant may read, int64, rising."""
        return np.asarray(self.tree.readable(self.number(tenant)))

    def readers(self, label: int) -> list[str]:
        """Tenants that may read a vector."""
        self._known(np.array([label], np.int64))
        return [self.tenants[number] for number in self.tree.readers(label)]

    def owner(self, label: int) -> str | None:
        """Who may delete it, besides whoever runs the index."""
        (number,) = self._known(np.array([label], np.int64))
        return None if number < 0 else self.tenants[number]

    def vectors(self, labels: np.ndarray) -> np.ndarray:
        """float32 [m, d], as they are compared: of length 1 with the metric `cosine`."""
        labels = _labels(labels)
        self._known(labels)
        out = np.empty((len(labels), self.dimensions), np.float32)
        self.tree.rows(labels, out)
        return out

    # ---- what changes ----

    def add(
        self,
        x: np.ndarray,
        *,
        owner: str | None = None,
        readers: Sequence[Iterable[str]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Takes vectors [n, d] in; gives their labels, int64 [n]. owner: may read and delete them. readers: tenants
        that may read each; where there is no owner, the first of them owns the vector.
        """
        if x.ndim == 2 and readers is not None and len(readers) != len(x):
            raise InputError(f"{len(readers):,} lines of readers for {len(x):,} vectors: there must be one each")
        if len(x) > _AT_ONCE:  # all of them before anything is changed
            for start in range(0, len(x), _AT_ONCE):
                _prepared(x[start : start + _AT_ONCE], self.dimensions, self.metric, "vectors", start)
        told_all = [[self.add_tenant(name) for name in names] for names in readers or ()]
        first = self.next_label
        for start in range(0, max(len(x), 1), _AT_ONCE):
            part, told = x[start : start + _AT_ONCE], told_all[start : start + _AT_ONCE]
            labels = np.arange(self.next_label, self.next_label + len(part), dtype=np.int64)
            owners = np.full(len(part), -1 if owner is None else self.add_tenant(owner), np.int32)
            if owner is None and told:
                owners[:] = [names[0] if names else -1 for names in told]
            try:
                self.tree.insert(part, labels, owners, self.metric == "cosine")
            except (TypeError, ValueError):  # as in a search
                part = _prepared(part, self.dimensions, self.metric, "vectors", start)
                self.tree.insert(part, labels, owners, self.metric == "cosine")
            self.next_label += len(part)
            if told:
                counts = [len(names) for names in told]
                each = np.fromiter(itertools.chain.from_iterable(told), np.uint32, sum(counts))
                self.tree.grant(np.repeat(labels, counts), each)
            if progress is not None:
                progress(start + len(part), len(x))
        return np.arange(first, self.next_label, dtype=np.int64)

    def grant(self, labels: Any, tenant: str) -> int:
        """Lets a tenant, who may be new, read vectors; gives how many of them it could not before."""
        labels = _labels(labels)
        self._known(labels)
        return int(self.tree.grant(labels, np.full(len(labels), self.add_tenant(tenant), np.uint32)))

    def revoke(self, labels: Any, tenant: str) -> int:
        """Takes that back; gives how many of them it could read before."""
        labels = _labels(labels)
        self._known(labels)
        return int(self.tree.revoke(labels, np.full(len(labels), self.number(tenant), np.uint32)))

    def delete(self, labels: Any, *, by: str | None = None) -> int:
        """Removes vectors for everybody; gives how many. by: a tenant, who must own all of them; None: whoever runs the
        index.
        """
        labels = np.unique(_labels(labels))
        owners = self._known(labels)
        if by is not None and (owners != self.number(by)).any():
            label = int(labels[np.argmax(owners != self.number(by))])
            raise InputError(f"{by} does not own vector {label}, so it may not delete it; revoking needs no owner")
        return int(self.tree.remove(labels))

    def _known(self, labels: np.ndarray) -> np.ndarray:
        """Owners of vectors, -1 for none; InputError for labels that are none."""
        owners = np.asarray(self.tree.owners_of(labels))
        if (owners == -2).any():
            raise InputError(f"no vector {int(labels[np.argmax(owners == -2)])} in this index; was it deleted?")
        return owners

    # ---- searches ----

    def search(self, queries: np.ndarray, top: int, tenant: str | Sequence[str], effort: Effort | None = None) -> Hits:
        """The `top` best of what the tenant may read; ids are labels. tenant: of all queries, or one each."""
        return self.search_with_work(queries, top, tenant, effort)[0]

    def search_with_work(
        self, queries: np.ndarray, top: int, tenant: str | Sequence[str], effort: Effort | None = None
    ) -> tuple[Hits, Work]:
        """The same, and what it took."""
        if isinstance(tenant, str):
            return self._searched(self.tree.search, queries, self.number(tenant), top, effort)
        if len(tenant) != len(queries):
            raise InputError(f"{len(tenant):,} tenants for {len(queries):,} queries: name one, or one each")
        each = np.array([self.number(one) for one in tenant], np.uint32)
        return self._searched(self.tree.search_each, queries, each, top, effort)

    def search_among(
        self, queries: np.ndarray, top: int, labels: Any, *, tenant: str | None = None, effort: Effort | None = None
    ) -> tuple[Hits, Work]:
        """The `top` best of the vectors with these labels, of which a tenant sees those it may read: for filters of any
        kind, such as what two tenants share (`readable`, `np.intersect1d`). A tree of the labels is made for the call.
        """
        among = _labels(labels)
        if tenant is not None:
            among = np.intersect1d(among, self.readable(tenant))
        return self._searched(self.tree.search_among, queries, among, top, effort)

    def _searched(
        self, search: Callable[..., Any], queries: np.ndarray, where: Any, top: int, effort: Effort | None
    ) -> tuple[Hits, Work]:
        if not 1 <= top <= MOST_TOP:
            raise InputError(f"top is {top}: ask for 1 to {MOST_TOP:,} vectors")
        effort = effort or _USUAL
        rest = top, effort.limits(self.settings, top), effort.spread_weight, effort.prune, self.metric == "cosine"
        try:
            labels, scores, told = search(queries, where, *rest)
        except (TypeError, ValueError):  # no float32 rows of that size that lie close, or no numbers: look closer
            labels, scores, told = search(_prepared(queries, self.dimensions, self.metric, "queries"), where, *rest)
        return Hits(ids=labels, scores=scores), Work(*told.T)


class TenantVectors(VectorIndex):
    """What one tenant may read of a shared index, as an index of its own: ids are the shared index's labels."""

    def __init__(self, index: Curator, tenant: str) -> None:
        self.index, self.tenant = index, tenant

    @property
    def count(self) -> int:
        return int(self.index.tree.count_of(self.index.number(self.tenant)))

    @property
    def dimensions(self) -> int:
        return self.index.dimensions

    @property
    def nbytes(self) -> int:
        return self.count * self.dimensions * np.dtype(np.float32).itemsize + self.index.clusters.centroids.nbytes

    def search(self, queries: np.ndarray, top: int) -> Hits:
        return self.index.search(queries, top, self.tenant)


def _prepared(x: np.ndarray, dimensions: int | None, metric: Metric, what: str, first: int = 0) -> np.ndarray:
    """float32, of length 1 where cosines are asked for."""
    found = checked_vectors(x, dimensions, what, first)
    if metric != "cosine":
        return found
    if not (found != 0).any(axis=1).all():
        place = first + int(np.argmin((found != 0).any(axis=1)))
        raise InputError(f"{what}: vector {place} is all zeros, and has no direction; leave it out, or take metric l2")
    return unit(found)


def _labels(labels: Any) -> np.ndarray:
    found = np.atleast_1d(np.asarray(labels))
    if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
        raise InputError(f"labels are whole numbers in one row, got {found.dtype}{list(found.shape)}")
    return np.ascontiguousarray(found, np.int64)
