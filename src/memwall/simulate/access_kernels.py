"""Kernels that are known to miss TLBs, run on real data and recorded: which addresses they touch, in order.

Each takes a number of accesses and a seed. Graph kernels walk a Kronecker graph; look-ups of cross sections search
sorted grids; embedding rows are drawn by Zipf's law; keys and values lie in pages that memwall's own page pool hands
out to sequences that grow together. `stream` is the control, `mixed` has data that stays cached and pages that do not.

An array begins at a multiple of 2 MiB, with 2 MiB free behind it. Code: every 64 accesses a line of a loop is fetched,
now and then one from 256 KiB of other code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from memwall.errors import InputError
from memwall.hardware.units import GIB, KIB, MIB
from memwall.memory.page_pool import PagePool
from memwall.simulate.access_traces import FETCH, READ, WRITE, Region, Trace, made_trace

LINE = 64
CODE_BYTES = 256 * KIB
FETCH_EVERY = 64
HUGE = 2 * MIB


class Layout:
    """Arrays of one process in its address space."""

    def __init__(self, process: int = 0) -> None:
        self.process, self.regions = process, [Region(process=process, start=HUGE, num_bytes=CODE_BYTES)]
        self._end = 16 * HUGE

    def array(self, num_bytes: int) -> int:
        """Its address."""
        start = self._end
        self.regions.append(Region(process=self.process, start=start, num_bytes=int(num_bytes)))
        self._end = start + -(-int(num_bytes) // HUGE) * HUGE + HUGE
        return start


class Recorder:
    """Accesses of loops, chunk by chunk, until there are enough."""

    def __init__(self, name: str, accesses: int, layout: Layout) -> None:
        self._name, self._want, self._layout = name, accesses, layout
        self._chunks: list[tuple[np.ndarray, ...]] = []
        self._have = 0

    @property
    def full(self) -> bool:
        """Whether there are as many as were asked for."""
        return self._have >= self._want

    def loop(self, steps: Sequence[tuple[np.ndarray, int, int, int]]) -> None:
        """Turns of a loop, each with the same steps: (addresses of all turns, kind, gap, depends)."""
        turns, width = len(steps[0][0]), len(steps)
        addresses = np.stack([step[0] for step in steps], axis=1).ravel()
        columns = (np.tile(np.array([step[at] for step in steps], np.uint8), turns) for at in (1, 2, 3))
        assert len(addresses) == turns * width
        self.add(addresses, *columns)

    def add(self, addresses: np.ndarray, kinds: np.ndarray, gaps: np.ndarray, depends: np.ndarray) -> None:
        """Accesses as they are."""
        left = self._want - self._have
        self._chunks.append(tuple(column[:left] for column in (addresses, kinds, gaps, depends)))
        self._have += len(self._chunks[-1][0])

    def trace(self, seed: int) -> Trace:
        """All of it, with fetches of code between."""
        columns = [np.concatenate(parts) for parts in zip(*self._chunks, strict=True)]
        at = np.arange(0, len(columns[0]), FETCH_EVERY)
        draw = np.random.default_rng(seed + 7)
        lines = np.where(np.arange(len(at)) % 16 == 15, draw.integers(0, CODE_BYTES // LINE, len(at)), at // 64 % 8)
        fetches = (HUGE + LINE * lines, np.full(len(at), FETCH), np.zeros(len(at)), np.zeros(len(at)))
        mixed = [np.insert(column.astype(np.uint64), at, new.astype(np.uint64))
                 for column, new in zip(columns, fetches, strict=True)]  # fmt: skip
        addresses, kinds, gaps, depends = mixed
        return made_trace(self._name, addresses, kinds=kinds, gaps=gaps, depends=depends,
                          processes=self._layout.process, regions=tuple(self._layout.regions))  # fmt: skip


def random_updates(accesses: int, seed: int, *, num_bytes: int = 1 * GIB) -> Trace:
    """Numbers of a large array, drawn evenly, read, changed and written back."""
    layout, draw = Layout(), np.random.default_rng(seed)
    start = layout.array(num_bytes)
    places = start + 8 * draw.integers(0, num_bytes // 8, -(-accesses // 2))
    record = Recorder("random", accesses, layout)
    record.loop([(places, READ, 6, 0), (places, WRITE, 1, 1)])
    return record.trace(seed)


# ---- graphs --------------------------------------------------------------------------------------------------------

VERTEX_BYTES = 256
"""Of a vertex's record, as property graphs keep it: bounds of its edges, a rank or a parent, properties."""
QUADRANTS = np.repeat(np.arange(4, dtype=np.uint8), (146, 49, 48, 13))
"""Of 256: a source's and a target's bit (0, 1: target, 2: source, 3: both), shares 0.57, 0.19, 0.19 and 0.05."""


@lru_cache(maxsize=1)
def kronecker(scale: int, edges_per_vertex: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(first edges int64 [n + 1], targets int32 [m]) of a directed Kronecker graph with 2^scale shuffled vertices."""
    draw = np.random.default_rng(seed)
    edges = edges_per_vertex << scale
    sources, targets = np.zeros(edges, np.uint32), np.zeros(edges, np.uint32)
    for begin in range(0, edges, 1 << 18):
        part = slice(begin, begin + (1 << 18))
        for bit in range(scale):
            quadrant = QUADRANTS[draw.integers(0, 256, len(sources[part]), np.uint8)]
            sources[part] |= (quadrant >> 1).astype(np.uint32) << np.uint32(bit)
            targets[part] |= (quadrant & 1).astype(np.uint32) << np.uint32(bit)
    names = draw.permutation(1 << scale).astype(np.uint32)
    keys = np.sort(names[sources].astype(np.uint64) << np.uint64(32) | names[targets])
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=1 << scale)
    return np.concatenate([[0], np.cumsum(counts)]), (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)


def breadth_first(
    accesses: int, seed: int, *, scale: int = 22, edges_per_vertex: int = 4, vertex_bytes: int = VERTEX_BYTES
) -> Trace:
    """Levels of a search from a vertex with many edges: queue, each vertex's record, its edges, their ends' records."""
    first, targets = kronecker(scale, edges_per_vertex, 1)
    draw, layout = np.random.default_rng(seed), Layout()
    record = Recorder("bfs", accesses, layout)
    vertices, edge_list = layout.array(vertex_bytes << scale), layout.array(4 * len(targets))
    queue = layout.array(4 << scale)
    degrees = np.diff(first)
    while not record.full:
        source = int(draw.choice(np.flatnonzero(degrees >= 8)))
        found, frontier, written, taken = np.zeros(1 << scale, bool), np.array([source]), 1, 0
        found[source] = True
        while len(frontier) and not record.full:
            following = []
            for chunk in np.array_split(frontier, -(-len(frontier) // 65536)):
                ends, fresh = _explored(chunk, first, targets, found)
                record.add(
                    *_search_steps(
                        chunk, first, ends, fresh, (vertices, edge_list, queue), taken, written, vertex_bytes
                    )
                )
                following.append(ends[fresh])
                taken, written = taken + len(chunk), written + int(fresh.sum())
                if record.full:
                    break
            frontier = np.concatenate(following)
    return record.trace(seed)


def _explored(
    chunk: np.ndarray, first: np.ndarray, targets: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of all edges of these vertices, and which of them are found by that edge."""
    ends = targets[_edges(chunk, first)]
    fresh = np.zeros(len(ends), bool)
    _, places = np.unique(ends, return_index=True)
    fresh[places] = ~found[ends[places]]
    found[ends] = True
    return ends, fresh


def _edges(chunk: np.ndarray, first: np.ndarray) -> np.ndarray:
    counts = first[chunk + 1] - first[chunk]
    return np.arange(counts.sum()) + np.repeat(first[chunk] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)


def _search_steps(
    chunk: np.ndarray, first: np.ndarray, ends: np.ndarray, fresh: np.ndarray, places: tuple[int, int, int],
    taken: int, written: int, vertex_bytes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Two accesses a vertex (queue, record), two an edge (its end, that vertex's record), two more where it is new."""
    vertices, edge_list, queue = places
    counts = first[chunk + 1] - first[chunk]
    per_edge = 2 + 2 * fresh.astype(np.int64)
    edge_start = np.concatenate([[0], np.cumsum(per_edge)])
    bounds = np.concatenate([[0], np.cumsum(counts)])
    vertex_at = edge_start[bounds[:-1]] + 2 * np.arange(len(chunk))
    edge_at = edge_start[:-1] + 2 * np.repeat(np.arange(1, len(chunk) + 1), counts)
    total = int(edge_start[-1]) + 2 * len(chunk)
    addresses, kinds = np.zeros(total, np.int64), np.full(total, READ, np.uint8)
    gaps, depends = np.full(total, 3, np.uint8), np.zeros(total, np.uint8)
    addresses[vertex_at] = queue + 4 * (taken + np.arange(len(chunk)))
    addresses[vertex_at + 1] = vertices + vertex_bytes * chunk
    addresses[edge_at] = edge_list + 4 * _edges(chunk, first)
    addresses[edge_at + 1] = vertices + vertex_bytes * ends.astype(np.int64)
    depends[vertex_at + 1], depends[edge_at + 1] = 1, 1
    new = edge_at[fresh]
    addresses[new + 2], addresses[new + 3] = addresses[new + 1], queue + 4 * (written + np.arange(len(new)))
    kinds[new + 2] = kinds[new + 3] = WRITE
    depends[new + 2] = 2
    return addresses, kinds, gaps, depends


def page_rank(
    accesses: int, seed: int, *, scale: int = 22, edges_per_vertex: int = 4, vertex_bytes: int = VERTEX_BYTES
) -> Trace:
    """An iteration that pulls: bounds of a vertex's edges, each edge's end and its record; the new rank is written."""
    first, targets = kronecker(scale, edges_per_vertex, 1)
    draw, layout = np.random.default_rng(seed), Layout()
    record = Recorder("pagerank", accesses, layout)
    vertices, edge_list = layout.array(vertex_bytes << scale), layout.array(4 * len(targets))
    bounds, ranks = layout.array(8 << scale), layout.array(8 << scale)
    at = int(draw.integers(0, 1 << scale))
    while not record.full:
        chunk = np.arange(at, min(at + 65536, 1 << scale))
        counts = first[chunk + 1] - first[chunk]
        per_vertex = 2 + 2 * counts
        start = np.concatenate([[0], np.cumsum(per_vertex)])
        edge_at = 2 * np.arange(counts.sum()) + np.repeat(2 * np.arange(len(chunk)) + 1, counts)
        total = int(start[-1])
        addresses, kinds = np.zeros(total, np.int64), np.full(total, READ, np.uint8)
        gaps, depends = np.full(total, 2, np.uint8), np.zeros(total, np.uint8)
        addresses[start[:-1]] = bounds + 8 * chunk
        addresses[edge_at] = edge_list + 4 * np.arange(first[chunk[0]], first[chunk[-1] + 1])
        addresses[edge_at + 1] = vertices + vertex_bytes * targets[first[chunk[0]] : first[chunk[-1] + 1]].astype(
            np.int64
        )
        depends[edge_at + 1] = 1
        addresses[start[1:] - 1], kinds[start[1:] - 1] = ranks + 8 * chunk, WRITE
        record.add(addresses, kinds, gaps, depends)
        at = (at + len(chunk)) % (1 << scale)
    return record.trace(seed)


# ---- tables --------------------------------------------------------------------------------------------------------


def embedding_bags(accesses: int, seed: int, *, tables: int = 26, rows: int = 1 << 18, row_bytes: int = 256,
                   exponent: float = 1.05) -> Trace:  # fmt: skip
    """Samples that take a row of each table: the index, then the row's lines; rows are popular by Zipf's law."""
    draw, layout = np.random.default_rng(seed), Layout()
    record = Recorder("embeddings", accesses, layout)
    bases = np.array([layout.array(rows * row_bytes) for _ in range(tables)])
    lines = row_bytes // LINE
    samples = -(-accesses // (tables * (1 + lines)))
    indexes = layout.array(8 * samples * tables)
    shares = np.cumsum(np.arange(1, rows + 1) ** -exponent)
    ranks = np.searchsorted(shares, shares[-1] * draw.random((samples, tables)))
    names = np.random.default_rng(1).permutation(rows)  # popular rows lie anywhere, in each table elsewhere
    row = (names[np.minimum(ranks, rows - 1)] + 7919 * np.arange(tables)) % rows
    places = (bases + row_bytes * row).ravel()
    steps = [(indexes + 8 * np.arange(samples * tables), READ, 3, 0)]
    steps += [(places + LINE * line, READ, 2, line + 1) for line in range(lines)]
    record.loop(steps)
    return record.trace(seed)


def cross_sections(accesses: int, seed: int, *, nuclides: int = 256, points: int = 6144) -> Trace:
    """Look-ups as reactor physics makes them: a binary search among all nuclides' energies, a row of indexes, and for
    each nuclide of the material two neighbouring points of its own grid (48 bytes each).
    """
    draw, layout = np.random.default_rng(seed), Layout()
    record = Recorder("xsbench", accesses, layout)
    grids = np.sort(np.random.default_rng(1).random((nuclides, points)), axis=1)
    union = np.sort(grids.ravel())
    energies, index_rows = layout.array(8 * union.size), layout.array(4 * nuclides * union.size)
    tables = layout.array(48 * grids.size)
    steps = int(np.ceil(np.log2(union.size)))
    materials = [np.sort(draw.choice(nuclides, count, replace=False)) for count in (34, 5, 4, 21, 9, 12)]
    batch = 4096
    while not record.full:
        energy = draw.random(batch)
        low, high = np.zeros(batch, np.int64), np.full(batch, union.size - 1)
        searched = []
        for _ in range(steps):
            middle = (low + high) // 2
            searched.append(energies + 8 * middle)
            below = union[middle] <= energy
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        which = draw.choice(len(materials), batch, p=(0.14, 0.05, 0.06, 0.13, 0.3, 0.32))
        for material, members in enumerate(materials):
            mine = np.flatnonzero(which == material)
            loop = [(search[mine], READ, 4, int(number > 0)) for number, search in enumerate(searched)]
            for at, nuclide in enumerate(members):
                point = np.clip(np.searchsorted(grids[nuclide], energy[mine], side="right") - 1, 0, points - 2)
                place = tables + 48 * (nuclide * points + point)
                loop.append((index_rows + 4 * (low[mine] * nuclides + nuclide), READ, 4, 1 + 3 * at))
                loop += [(place, READ, 2, 1), (place + 48, READ, 20, 2)]
            if len(mine):
                record.loop(loop)
    return record.trace(seed)


def key_value_pages(accesses: int, seed: int, *, sequences: int = 64, tokens: int = 4096, page_tokens: int = 16,
                    head_bytes: int = 64, heads: int = 8, layers: int = 8) -> Trace:  # fmt: skip
    """Decode attention of one head over paged keys and values: entries of the block table, then the head's part of each
    page. Pages are handed out by memwall's pool to sequences that grow in turn, each by a prompt's worth at once.
    """
    layout, draw = Layout(), np.random.default_rng(seed)
    record = Recorder("kv-pages", accesses, layout)
    page_bytes = 2 * page_tokens * heads * head_bytes
    lengths = draw.integers(tokens // 2, tokens + 1, sequences)
    pool = PagePool("kv", page_bytes=page_bytes, most_pages=int(np.sum(-(-lengths // page_tokens))))
    held: list[list[int]] = [[] for _ in range(sequences)]
    growing = [one for one in range(sequences) for _ in range(-(-int(lengths[one]) // page_tokens))]
    for one in draw.permutation(growing):
        held[int(one)] += pool.take("kv", 1)
    stores = [layout.array(pool.most_pages * page_bytes) for _ in range(layers)]
    table_start = layout.array(4 * sequences * (-(-tokens // page_tokens)))
    part = page_tokens * head_bytes
    while not record.full:
        for layer in range(layers):
            for sequence, pages in enumerate(held):
                place = stores[layer] + page_bytes * np.array(pages) + part * int(draw.integers(0, heads))
                entry = table_start + 4 * (sequence * -(-tokens // page_tokens) + np.arange(len(pages)))
                loop = [(entry, READ, 3, 0)]
                loop += [(place + side * heads * part + LINE * line, READ, 4, 1 + side * (part // LINE) + line)
                         for side in range(2) for line in range(part // LINE)]  # fmt: skip
                record.loop(loop)
                if record.full:
                    return record.trace(seed)
    return record.trace(seed)


# ---- controls ------------------------------------------------------------------------------------------------------


def stream(accesses: int, seed: int) -> Trace:
    """a = b + s c over long arrays, a line at a time."""
    layout = Layout()
    record = Recorder("stream", accesses, layout)
    lines = -(-accesses // 3)
    a, b, c = (layout.array(LINE * lines) + LINE * np.arange(lines) for _ in range(3))
    record.loop([(b, READ, 6, 0), (c, READ, 6, 0), (a, WRITE, 6, 1)])
    return record.trace(seed)


def mixed(accesses: int, seed: int, *, hot_bytes: int = 1 * MIB, records: int = 8192, every: int = 4) -> Trace:
    """Data that is used again and fits into the second level: an array, and records of a line that lie 32 KiB apart, as
    heads of lists or columns of wide tables do, so that their translations fit into no TLB.
    """
    layout, draw = Layout(), np.random.default_rng(seed)
    record = Recorder("mixed", accesses, layout)
    hot, sparse = layout.array(hot_bytes), layout.array(records * 32 * KIB)
    places = sparse + 32 * KIB * np.arange(records) + LINE * np.random.default_rng(1).integers(0, 512, records)
    turns = -(-accesses // every)
    steps = [(hot + LINE * draw.integers(0, hot_bytes // LINE, turns), READ, 8, 0) for _ in range(every - 1)]
    record.loop([*steps, (places[draw.integers(0, records, turns)], READ, 8, 0)])
    return record.trace(seed)


KERNELS: dict[str, Callable[[int, int], Trace]] = {
    "random": random_updates,
    "random-4g": partial(random_updates, num_bytes=4 * GIB),
    "bfs": breadth_first,
    "pagerank": page_rank,
    "embeddings": embedding_bags,
    "xsbench": cross_sections,
    "kv-pages": key_value_pages,
    "bfs-small": partial(breadth_first, vertex_bytes=64),
    "pagerank-small": partial(page_rank, vertex_bytes=64),
    "embeddings-small": partial(embedding_bags, rows=1 << 16),
    "xsbench-small": partial(cross_sections, nuclides=128, points=8192),
    "kv-pages-small": partial(key_value_pages, layers=2),
    "stream": stream,
    "mixed": mixed,
}
"""By name: kernel(accesses, seed). They reach over 1 to 4 GiB, small ones over a quarter to half of one."""
IRREGULAR = tuple(name for name in KERNELS if name not in ("stream", "mixed"))


def kernel_trace(name: str, accesses: int, seed: int) -> Trace:
    """A kernel's trace; InputError for a name that is not in the table."""
    if name not in KERNELS:
        raise InputError(f"no kernel {name!r}; there are {', '.join(KERNELS)}")
    if accesses < 1:
        raise InputError(f"{accesses} accesses; give 1 or more")
    return replace(KERNELS[name](accesses, seed), name=name)


def kernel_traces(names: Sequence[str], accesses: int, seed: int) -> Iterator[Trace]:
    """One after the other."""
    for name in names:
        yield kernel_trace(name, accesses, seed)
