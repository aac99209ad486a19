"""Kernels: what each touches is what its algorithm touches."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.simulate.access_kernels import (
    KERNELS,
    VERTEX_BYTES,
    breadth_first,
    cross_sections,
    embedding_bags,
    kernel_trace,
    key_value_pages,
    kronecker,
    page_rank,
    random_updates,
    stream,
)
from memwall.simulate.access_traces import FETCH, READ, WRITE, Trace


def data(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and kinds without fetches."""
    kept = trace.kinds != FETCH
    return trace.addresses[kept].astype(np.int64), trace.kinds[kept]


SMALL = {
    "random": lambda n, seed: random_updates(n, seed, num_bytes=1 << 20),
    "bfs": lambda n, seed: breadth_first(n, seed, scale=10),
    "pagerank": lambda n, seed: page_rank(n, seed, scale=10),
    "embeddings": lambda n, seed: embedding_bags(n, seed, tables=3, rows=500),
    "xsbench": lambda n, seed: cross_sections(n, seed, nuclides=40, points=64),
    "kv-pages": lambda n, seed: key_value_pages(n, seed, sequences=3, tokens=100),
    "stream": stream,
}


@pytest.mark.parametrize("name", SMALL)
def test_traces_are_as_long_as_asked_for_repeat_and_stay_in_their_arrays(name: str) -> None:
    trace, again, other = (SMALL[name](5000, seed) for seed in (1, 1, 2))
    addresses, _ = data(trace)
    assert len(addresses) == 5000
    assert np.array_equal(trace.addresses, again.addresses)
    assert name == "stream" or not np.array_equal(trace.addresses, other.addresses)
    inside = np.zeros(len(trace), bool)
    for region in trace.regions:
        inside |= (trace.addresses >= region.start) & (trace.addresses < region.start + region.num_bytes)
    assert inside.all()
    assert int((trace.kinds == FETCH).sum()) == -(-5000 // 64)


def test_a_search_reads_and_finds_what_plain_code_would() -> None:
    first, targets = kronecker(8, 4, 1)
    trace = breadth_first(3000, 5, scale=8)
    addresses, kinds = data(trace)
    vertices, edges, queue = (region.start for region in trace.regions[1:])
    source = int(addresses[1] - vertices) // VERTEX_BYTES
    found, waiting, told = {source}, [source], []
    for at, vertex in enumerate(waiting):
        told += [(queue + 4 * at, READ), (vertices + VERTEX_BYTES * vertex, READ)]
        for edge in range(first[vertex], first[vertex + 1]):
            end = int(targets[edge])
            told += [(edges + 4 * edge, READ), (vertices + VERTEX_BYTES * end, READ)]
            if end not in found:
                told += [(vertices + VERTEX_BYTES * end, WRITE), (queue + 4 * len(waiting), WRITE)]
                found.add(end)
                waiting.append(end)
    whole = min(len(told), 3000)
    assert whole > 1000
    assert list(zip(addresses[:whole].tolist(), kinds[:whole].tolist(), strict=True)) == told[:whole]


def test_page_rank_pulls_along_every_edge() -> None:
    first, targets = kronecker(8, 4, 1)
    trace = page_rank(2000, 5, scale=8)
    addresses, _ = data(trace)
    vertices, edges, bounds, ranks = (region.start for region in trace.regions[1:])
    vertex, told = int(addresses[0] - bounds) // 8, []
    while len(told) < 2000:
        told.append(bounds + 8 * vertex)
        for edge in range(first[vertex], first[vertex + 1]):
            told += [edges + 4 * edge, vertices + VERTEX_BYTES * int(targets[edge])]
        told.append(ranks + 8 * vertex)
        vertex = (vertex + 1) % 256
    assert addresses.tolist() == told[:2000]


def test_graphs_are_skewed_and_whole() -> None:
    first, targets = kronecker(10, 8, 1)
    degrees = np.diff(first)
    assert first[-1] == len(targets) == 8 << 10
    assert degrees.max() > 20 * 8
    assert (targets >= 0).all()
    assert (targets < 1 << 10).all()


def test_popular_rows_come_often() -> None:
    addresses, _ = data(embedding_bags(20_000, 0, tables=2, rows=1000))
    rows, counts = np.unique(addresses.reshape(-1, 5)[:, 1] // 256, return_counts=True)
    assert counts.max() > 20 * np.median(counts)
    assert len(rows) > 500


def test_names() -> None:
    assert kernel_trace("mixed", 100, 0).name == "mixed"
    assert "random-4g" in KERNELS
    with pytest.raises(InputError, match="there are random"):
        kernel_trace("rand", 100, 0)
    with pytest.raises(InputError, match="1 or more"):
        kernel_trace("mixed", 0, 0)
