"""Vectors on disk in lists around heads in memory: a search reads the lists of the near heads, all in one batch.

Source: SPANN: Highly-efficient Billion-scale Approximate Nearest Neighbor Search, Chen et al., 2021, arXiv 2111.08566;
constants and file layout of the released code, microsoft/SPTAG.

Idea: some of the vectors, heads, stay in memory with a graph over them (`head_tree`); every other one lies in the lists
of several near heads (`closure`), which are short, of like length, and packed in pages (`list_file`). A query is
compared with heads; lists whose heads are not much farther than the nearest one are read, all at once, and scored in
full precision. An easy query reads few lists and a hard one many.

Units and shapes: vectors [n, d] float32, float16, int8 or uint8; queries [q, d] float32; distances squared, so a ratio
of 8 is one of 2.8 between plain distances, as in the released code. Scores: cosines (of vectors brought to length 1),
or squared distances times -1.

Differs from the released code: the closure rule is the paper's (`closure`, infinity for that code's way); two lists
that share a page have it read once.

Cost: resident d * element + 4 * degree + 20 bytes a head. Read: at most `lists` lists a query, in one round.

Holds when: near vectors of a query lie in the lists of near heads; vectors that change are not provided for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from memwall.errors import InputError
from memwall.kernels import vector_search
from memwall.kernels.vector_search import VectorGraph
from memwall.memory.direct_reader import DirectReader, aligned_bytes
from memwall.retrieve.base import Hits, VectorIndex, checked_vectors, unit
from memwall.retrieve.closure import ClosureSettings, Lists, Progress, assign, gather, nearest_heads
from memwall.retrieve.head_tree import HeadSettings, graph_over, select_heads
from memwall.retrieve.list_file import LIST_PAGE_BYTES, Directory, ListFormat, checksum, stored_bytes

SpannMetric = Literal["cosine", "l2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpannSettings:
    """How an index is built. page_limit: of a list, None for none; degree: of the graph over heads; budget: heads that
    a vector is compared with to find its near ones.
    """

    heads: HeadSettings = field(default_factory=HeadSettings)
    closure: ClosureSettings = field(default_factory=ClosureSettings)
    page_limit: int | None = 12
    degree: int = 32
    budget: int = 1024
    ids_last: bool = False
    delta: bool = False
    compress: bool = False

    def __post_init__(self) -> None:
        if self.page_limit is not None and self.page_limit < 1:
            raise InputError(f"a list of {self.page_limit} pages holds nothing: allow 1 at least, such as 12")
        if not 1 <= self.degree <= 1024:
            raise InputError(f"degree is {self.degree}: a head has 1 to 1024 edges, such as 32")
        if self.budget < self.closure.candidates:
            raise InputError(f"budget {self.budget}: at least the {self.closure.candidates} candidates")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """lists: that are read at most. ratio: times the nearest head's squared distance, beyond which a list is left
    alone (infinity: none is). unpruned: a limit so low leaves none alone: what is nearly a head itself says nothing of
    how far its neighbours are. budget: heads that a query is compared with. From as many lists as there are on, all
    heads are compared.
    """

    lists: int = 32
    ratio: float = 8.0
    unpruned: float = 0.1
    budget: int = 2048

    def __post_init__(self) -> None:
        if self.lists < 1 or self.budget < self.lists:
            raise InputError(f"{self.lists} lists and a budget of {self.budget}: at least 1, and as many as lists")
        if not self.ratio >= 1:
            raise InputError(f"ratio is {self.ratio}: at least 1, times the nearest head's squared distance")
        if not self.unpruned >= 0:
            raise InputError(f"unpruned is {self.unpruned}: a squared distance, 0 at least")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An index before it is written. lists hold places of `vectors`, which are those to store."""

    vectors: np.ndarray
    head_ids: np.ndarray
    graph: VectorGraph
    lists: Lists
    settings: SpannSettings
    format: ListFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What each query took, int64 [q]. pages: distinct ones; rounds: reads that waited for others; compared: vectors
    of lists that were scored, each once; machines: that were asked, where lists lie on several.
    """

    lists: np.ndarray
    pages: np.ndarray
    rounds: np.ndarray
    compared: np.ndarray
    machines: np.ndarray | None = None

    @property
    def nbytes(self) -> np.ndarray:
        return self.pages * LIST_PAGE_BYTES


def head_bytes(vector_bytes: int, degree: int, *, packed: bool = False) -> int:
    """Resident bytes of one head: its vector, edges, id, place as a seed or pivot, its list's record and checksum."""
    return vector_bytes + 4 * degree + 4 + 8 + (20 if packed else 12) + 4


def build(vectors: np.ndarray, settings: SpannSettings, progress: Progress | None = None) -> Built:
    """Heads, their graph, and lists of all other vectors. vectors: as they are to be stored, mapped where they are too
    many for memory; progress counts vectors that have found their lists.
    """
    coded = ListFormat(
        dtype=vectors.dtype, dimensions=vectors.shape[1], ids_last=settings.ids_last, delta=settings.delta,
        compress=settings.compress,
    )  # fmt: skip
    longest = None if settings.page_limit is None else coded.longest(settings.page_limit)
    head_ids = select_heads(vectors, settings.heads).ids
    heads = np.ascontiguousarray(vectors[head_ids])
    graph = graph_over(heads, settings.heads, settings.degree)
    others = np.ones(len(vectors), bool)
    others[head_ids] = False
    ids = np.flatnonzero(others).astype(np.int32)
    count = min(settings.closure.candidates, len(heads))
    found, apart = nearest_heads(vectors, ids, graph, count, settings.budget, progress)
    taken, distances = assign(heads, found, apart, settings.closure)
    lists = gather(ids, taken, distances, len(heads), longest)
    return Built(vectors=vectors, head_ids=head_ids, graph=graph, lists=lists, settings=settings, format=coded)


def surviving(distances: np.ndarray, ratio: float, unpruned: float) -> np.ndarray:
    """bool [q, n]: lists that are read, by squared distances of their heads [q, n], nearest first (section 3.4)."""
    found = np.isfinite(distances)
    if np.isinf(ratio):
        return found
    limit = distances[:, :1] * np.float32(ratio)
    return found & ((distances <= limit) | (limit <= unpruned))


def whole_ranges(pages: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranges of pages [n] that lists touch -> begins and ends of disjoint ones, and which of them holds each list."""
    order = np.argsort(pages, kind="stable")
    first, ends = pages[order], np.maximum.accumulate((pages + counts)[order])
    fresh = np.ones(len(order), bool)
    fresh[1:] = first[1:] > ends[:-1]
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(fresh) - 1
    last = np.flatnonzero(np.append(fresh[1:], True)) if len(order) else np.zeros(0, np.int64)
    return first[fresh], ends[last], group


class ListReader:
    """Reads lists of a file by their directory and puts the nearest of them among the best so far.

    first_byte: of the lists in the file. checks: CRC-32 of each list, None to trust what is read.
    """

    def __init__(
        self, reader: DirectReader, first_byte: int, directory: Directory, coded: ListFormat, checks: np.ndarray | None
    ) -> None:
        self.reader, self.first_byte, self.directory = reader, first_byte, directory
        self.format, self.checks = coded, checks
        self._room = aligned_bytes(1 << 20)

    def scan(
        self, lists: np.ndarray, heads: np.ndarray, query: np.ndarray, ids: np.ndarray, distances: np.ndarray
    ) -> tuple[int, int]:
        """One batch of reads. lists: int [n]; heads: their vectors [n, d]; query: padded; ids, distances [top]: the
        best so far, changed. Gives distinct pages read and vectors compared.
        """
        rows = self.directory.records[lists]
        held = rows["count"] > 0
        rows, lists = rows[held], lists[held]
        if not len(rows):
            return 0, 0
        page = rows["page"].astype(np.int64)
        begins, ends, group = whole_ranges(page, rows["pages"].astype(np.int64))
        pages = ends - begins
        targets = (np.cumsum(pages) - pages) * LIST_PAGE_BYTES
        total = int(pages.sum())
        if total * LIST_PAGE_BYTES > len(self._room):
            self._room = aligned_bytes(2 * total * LIST_PAGE_BYTES)
        self.reader.read_to(
            self.first_byte + begins * LIST_PAGE_BYTES, pages * LIST_PAGE_BYTES, self._room.ctypes.data + targets
        )
        starts = targets[group] + (page - begins[group]) * LIST_PAGE_BYTES + rows["place"]
        return total, self._scan(rows, lists, heads[held], starts, query, ids, distances)

    def _scan(
        self, rows: np.ndarray, lists: np.ndarray, heads: np.ndarray, starts: np.ndarray, query: np.ndarray,
        ids: np.ndarray, distances: np.ndarray,
    ) -> int:  # fmt: skip
        room = self._room
        if self.checks is not None or self.format.delta or self.format.compress:
            sizes = stored_bytes(rows, self.format.entry_bytes)
            stored = [room[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
            for one, at in zip(stored, lists.tolist(), strict=True):
                if self.checks is not None and checksum(one.data) != self.checks[at]:
                    raise InputError(f"{self.reader.path}: list {at} is not what was written (its checksum differs)")
            if self.format.delta or self.format.compress:
                plain = [self.format.decode(one.data, int(count), head)
                         for one, count, head in zip(stored, rows["count"], heads, strict=True)]  # fmt: skip
                room = np.concatenate(plain)
                starts = np.cumsum([0, *(len(one) for one in plain[:-1])])
        compared = vector_search.scan_lists(
            room, starts.astype(np.int64), np.ascontiguousarray(rows["count"], np.int32), self.format.dtype, query, ids,
            distances, size=self.format.dimensions, ids_last=self.format.ids_last,
            most_id=self.directory.num_vectors - 1,
        )  # fmt: skip
        if compared < 0:
            raise InputError(f"{self.reader.path}: a list names a vector past {self.directory.num_vectors - 1}")
        return compared


class SpannIndex(VectorIndex):
    """A search of lists on disk by heads in memory. `search` reads with `settings`; `search_counted` tells what."""

    def __init__(
        self, *, lists: ListReader, graph: VectorGraph, head_ids: np.ndarray, metric: SpannMetric,
        settings: SearchSettings | None = None,
    ) -> None:  # fmt: skip
        self.lists, self.graph, self.head_ids, self.metric = lists, graph, head_ids, metric
        self.settings = settings or SearchSettings()
        every = np.arange(len(head_ids), dtype=np.int32)
        none = np.zeros(0, np.int32)
        self._all_heads = VectorGraph(graph.vectors, graph.edges, every, np.zeros(len(every), np.int32), none)

    @property
    def count(self) -> int:
        return self.lists.directory.num_vectors

    @property
    def dimensions(self) -> int:
        return self.lists.directory.dimensions

    @property
    def nbytes(self) -> int:
        """What is resident and all lists."""
        return self.resident_bytes + self.lists.directory.total_bytes

    @property
    def resident_bytes(self) -> int:
        """Heads, their ids and graph, the directory and checksums of lists."""
        checks = self.lists.checks
        held = self.graph.vectors.nbytes + self.graph.edge_bytes + self.head_ids.nbytes
        return held + self.lists.directory.records.nbytes + (0 if checks is None else checks.nbytes)

    def search(self, queries: np.ndarray, top: int) -> Hits:
        return self.search_counted(queries, top)[0]

    def search_counted(
        self, queries: np.ndarray, top: int, settings: SearchSettings | None = None, progress: Progress | None = None
    ) -> tuple[Hits, Reads]:
        """The best of each query, and what it read."""
        if top < 1:
            raise InputError(f"top is {top}: ask for one vector at least")
        asked = self.queries(queries)
        ids = np.full((len(asked), top), -1, np.int32)
        distances = np.full((len(asked), top), np.inf, np.float32)
        told = np.zeros((4, len(asked)), np.int64)
        for at, (heads, apart, survive) in enumerate(self.near_lists(asked, top, settings or self.settings)):
            best = min(top, len(heads))
            ids[at, :best], distances[at, :best] = self.head_ids[heads[:best]], apart[:best]
            chosen = heads[survive]
            before = self.lists.reader.stats.batches
            pages, compared = self.lists.scan(chosen, self.graph.vectors[chosen], asked[at], ids[at], distances[at])
            told[:, at] = len(chosen), pages, self.lists.reader.stats.batches - before, compared
            if progress is not None:
                progress(at + 1, len(asked))
        reads = Reads(lists=told[0], pages=told[1], rounds=told[2], compared=told[3])
        return Hits(ids=ids.astype(np.int64), scores=self.scores(distances)), reads

    def queries(self, queries: np.ndarray) -> np.ndarray:
        """As heads and lists are compared with: of length 1 for cosines, and padded."""
        asked = checked_vectors(queries, self.dimensions, "queries")
        if self.metric == "cosine" and not asked.any(axis=1).all():
            raise InputError(f"query {int(np.argmin(asked.any(axis=1)))} is all zeros, which has no cosine")
        return vector_search.padded(unit(asked) if self.metric == "cosine" else asked)

    def near_lists(
        self, asked: np.ndarray, top: int, settings: SearchSettings
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each query: heads found, at least `top` where there are, nearest first; their squared distances; and a
        mask of those whose lists are read.
        """
        most = min(settings.lists, len(self.head_ids))
        found = min(max(most, top), len(self.head_ids))
        graph = self._all_heads if settings.lists >= len(self.head_ids) else self.graph
        heads, apart, _ = graph.search(asked[:, : self.dimensions], found, max(settings.budget, found))
        survive = surviving(apart, settings.ratio, settings.unpruned)
        survive[:, most:] = False
        for row in range(len(asked)):
            real = heads[row] >= 0
            yield heads[row][real], apart[row][real], survive[row][real]

    def scores(self, distances: np.ndarray) -> np.ndarray:
        """float32: cosines, or distances times -1; -infinity where there is no vector."""
        return 1 - distances / 2 if self.metric == "cosine" else -distances
