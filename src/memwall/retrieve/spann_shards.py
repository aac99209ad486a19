"""Lists on several machines: heads are clustered once more, each machine has the lists of a cluster, and a query goes
only to machines whose lists it would read.

Source: SPANN, 2021, arXiv 2111.08566, section on the distributed form.

Idea: near heads lie on one machine, so the lists that survive pruning lie on few. Whoever asks holds all heads and
their graph and no list; a machine holds lists, and the heads they belong to. Vectors near a border between machines are
in lists of both, by the closure that put them into several lists.

    OUT             all heads, in the order of machines, and their graph; its lists are empty
    OUT.0, OUT.1    of each machine: an index of its own, whose ids are those of the whole

A machine answers over TCP: int32 top, number of lists and of dimensions, the query as float32, the lists as int32; it
sends back int64 pages, rounds and compared vectors, ids as int32, and squared distances as float32. Loopback by
default, and there is no key: a network that others use needs a tunnel.

Cost: a message of a few kB to each machine that is asked, at the same time.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from memwall.errors import InputError
from memwall.kernels.vector_search import VectorGraph
from memwall.retrieve.base import Hits
from memwall.retrieve.closure import Lists, Progress
from memwall.retrieve.head_tree import HeadSettings, graph_over, grow
from memwall.retrieve.spann import Built, Reads, SearchSettings, SpannMetric
from memwall.retrieve.spann_file import SpannFile, write_spann

MOST_TOP = 10_000
_WAIT_SECONDS = 30.0


def owners(heads: np.ndarray, parts: int, settings: HeadSettings | None = None) -> np.ndarray:
    """int32 [h]: the machine of each head, by balanced clustering of the heads into so many parts."""
    if not 1 <= parts <= max(len(heads), 1):
        raise InputError(f"{parts} machines for {len(heads)} heads: at least 1, and no more than heads")
    found = np.zeros(len(heads), np.int32)
    if parts == 1:
        return found
    base = settings or HeadSettings()
    tree = grow(heads, replace(base, children=parts, leaf=1, samples=max(base.samples, 64 * parts)))
    part_of = np.zeros(len(tree.points), np.int32)
    part_of[tree.begins[0] : tree.ends[0]] = np.arange(tree.ends[0] - tree.begins[0])
    for node in range(int(tree.begins[0]), len(tree.points)):  # parents come first
        part_of[tree.begins[node] : tree.ends[node]] = part_of[node]
    found[tree.points[1:]] = part_of[1:]
    return found


def shard_path(path: Path, part: int) -> Path:
    return path.with_name(f"{path.name}.{part}")


def write_shards(
    path: Path,
    built: Built,
    owner: np.ndarray,
    *,
    metric: SpannMetric,
    texts: Sequence[str] | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes what is asked first, and a file for each machine; gives the machines' files. owner: int [h]."""
    order = np.argsort(owner, kind="stable").astype(np.int32)
    parts, made = int(owner.max(initial=0)) + 1, []
    for part in range(parts):
        mine = order[owner[order] == part]
        made.append(shard_path(path, part))
        write_spann(made[-1], _some(built, mine), metric=metric)
        if progress is not None:
            progress(part + 1, parts)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    graph = built.graph
    edges = np.where(graph.edges >= 0, place[graph.edges], -1)[order].astype(np.int32)
    moved = VectorGraph(
        graph.vectors[order], np.ascontiguousarray(edges), place[graph.pivots], graph.pivot_ends, place[graph.seeds]
    )
    none = Lists(members=np.zeros(0, np.int32), ends=np.zeros(len(order), np.int64))
    front = replace(built, head_ids=built.head_ids[order], graph=moved, lists=none)
    write_spann(path, front, metric=metric, texts=texts, model=model, machines=parts)
    return made


def _some(built: Built, heads: np.ndarray) -> Built:
    """The index of some heads only."""
    members = [built.lists[at] for at in heads.tolist()]
    vectors = np.ascontiguousarray(built.graph.vectors[heads])
    lists = Lists(
        members=np.concatenate([*members, np.zeros(0, np.int32)]).astype(np.int32),
        ends=np.cumsum([len(one) for one in members], dtype=np.int64),
    )
    graph = graph_over(vectors, built.settings.heads, built.settings.degree)
    return replace(built, head_ids=built.head_ids[heads], graph=graph, lists=lists)


Answer = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids int32 and squared distances float32 [top], and int64 pages, rounds and compared vectors."""


class Shard(Protocol):
    """A machine: the best of some of its lists."""

    def scan(self, lists: np.ndarray, query: np.ndarray, top: int) -> Answer: ...


class LocalShard:
    """A machine's file, opened here."""

    def __init__(self, file: SpannFile) -> None:
        self.file = file
        self._turn = threading.Lock()  # a file's lists are read into one room

    def scan(self, lists: np.ndarray, query: np.ndarray, top: int) -> Answer:
        ids, distances = np.full(top, -1, np.int32), np.full(top, np.inf, np.float32)
        reader = self.file.lists
        with self._turn:
            before = reader.reader.stats.batches
            pages, compared = reader.scan(lists, self.file.vectors.graph.vectors[lists], query, ids, distances)
            rounds = reader.reader.stats.batches - before
        return ids, distances, np.array([pages, rounds, compared], np.int64)


class RemoteShard:
    """A machine that answers at an address."""

    def __init__(self, host: str, port: int) -> None:
        try:
            self._socket = socket.create_connection((host, port), _WAIT_SECONDS)
        except OSError as error:
            raise InputError(f"{host}:{port}: no machine answers there: {error}") from None
        self._name, self._turn = f"{host}:{port}", threading.Lock()

    def scan(self, lists: np.ndarray, query: np.ndarray, top: int) -> Answer:
        told = np.array([top, len(lists), len(query)], "<i4").tobytes()
        with self._turn:
            try:
                self._socket.sendall(told + query.astype("<f4").tobytes() + lists.astype("<i4").tobytes())
                counted = np.frombuffer(_exactly(self._socket, 24), "<i8")
                ids = np.frombuffer(_exactly(self._socket, 4 * top), "<i4")
                distances = np.frombuffer(_exactly(self._socket, 4 * top), "<f4")
            except OSError as error:
                raise InputError(f"{self._name}: the machine gave no answer: {error}") from None
        return ids, distances, counted

    def close(self) -> None:
        self._socket.close()


def _exactly(connection: socket.socket, nbytes: int) -> bytes:
    found = bytearray()
    while len(found) < nbytes:
        part = connection.recv(nbytes - len(found))
        if not part:
            raise ConnectionError("it ended the connection")
        found += part
    return bytes(found)


class ShardServer(socketserver.ThreadingTCPServer):
    """Answers for a machine's file while `serve_forever` runs; a question that it cannot answer ends the connection."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, file: SpannFile, host: str = "127.0.0.1", port: int = 0) -> None:
        """port: 0 for a free one; `server_address` says which."""
        self.shard = LocalShard(file)
        super().__init__((host, port), _Questions)


class _Questions(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        shard = self.server.shard  # type: ignore[attr-defined]
        held = shard.file.vectors
        width = held.queries(np.ones((1, held.dimensions), np.float32)).shape[1]
        while True:
            try:
                top, count, given = np.frombuffer(_exactly(self.request, 12), "<i4").tolist()
                if not (1 <= top <= MOST_TOP and 0 <= count <= len(held.head_ids) and given == width):
                    return
                query = np.frombuffer(_exactly(self.request, 4 * width), "<f4").copy()
                lists = np.frombuffer(_exactly(self.request, 4 * count), "<i4")
                if not np.isfinite(query).all() or (lists < 0).any() or (lists >= len(held.head_ids)).any():
                    return
                ids, distances, counted = shard.scan(lists, query, top)
                self.request.sendall(counted.tobytes() + ids.astype("<i4").tobytes() + distances.tobytes())
            except OSError:
                return


class ShardedIndex:
    """A search of several machines' lists. ends: heads up to each machine's last, in the order of `front`'s heads."""

    def __init__(self, front: SpannFile, shards: Sequence[Shard], heads_of: Sequence[int]) -> None:
        """heads_of: how many each machine has."""
        self.front, self.shards, self.ends = front.vectors, list(shards), np.cumsum(heads_of)
        if len(self.shards) != len(heads_of) or int(self.ends[-1]) != len(self.front.head_ids):
            raise InputError(
                f"{front.path}: {len(self.front.head_ids)} heads, and {len(self.shards)} machines with {list(heads_of)}"
            )
        self._pool = ThreadPoolExecutor(len(self.shards), "memwall-shard")

    @classmethod
    def local(cls, front: SpannFile, *, verify: bool = True) -> ShardedIndex:
        """All machines' files beside `front`, opened here."""
        paths = [shard_path(front.path, part) for part in range(front.machines)]
        absent = next((path for path in paths if not path.is_file()), None)
        if not paths or absent is not None:
            raise InputError(f"{front.path}: its lists are in {front.machines} files beside it; {absent} is not there")
        files = [SpannFile(path, verify=verify) for path in paths]
        return cls(front, [LocalShard(file) for file in files], [len(file.vectors.head_ids) for file in files])

    def close(self) -> None:
        self._pool.shutdown()

    def search_counted(
        self, queries: np.ndarray, top: int, settings: SearchSettings | None = None, progress: Progress | None = None
    ) -> tuple[Hits, Reads]:
        """The best of each query, and what it read. A vector that two machines hold counts as compared on both."""
        front = self.front
        asked = front.queries(queries)
        ids, distances = np.full((len(asked), top), -1, np.int32), np.full((len(asked), top), np.inf, np.float32)
        told, machines = np.zeros((4, len(asked)), np.int64), np.zeros(len(asked), np.int64)
        for at, (heads, apart, survive) in enumerate(front.near_lists(asked, top, settings or front.settings)):
            chosen = heads[survive]
            owner = np.searchsorted(self.ends, chosen, side="right")
            parts = np.unique(owner)
            tasks = []
            for part in parts.tolist():
                first = int(self.ends[part - 1]) if part else 0
                lists = chosen[owner == part] - first
                tasks.append(self._pool.submit(self.shards[part].scan, lists, asked[at], top))
            answers = [task.result() for task in tasks]
            ids[at], distances[at] = _merged(
                [front.head_ids[heads[:top]], *(one[0] for one in answers)],
                [apart[:top], *(one[1] for one in answers)],
                top,
            )
            counted = np.array([one[2] for one in answers]).reshape(-1, 3)
            told[:, at] = len(chosen), counted[:, 0].sum(), counted[:, 1].max(initial=0), counted[:, 2].sum()
            machines[at] = len(parts)
            if progress is not None:
                progress(at + 1, len(asked))
        reads = Reads(lists=told[0], pages=told[1], rounds=told[2], compared=told[3], machines=machines)
        return Hits(ids=ids.astype(np.int64), scores=front.scores(distances)), reads


def _merged(ids: list[np.ndarray], distances: list[np.ndarray], top: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of several answers, each vector once; equal distances go by id."""
    names, apart = np.concatenate(ids), np.concatenate(distances)
    names, first = np.unique(names, return_index=True)
    apart = apart[first]
    order = np.lexsort((names, apart))
    order = order[names[order] >= 0][:top]
    found, far = np.full(top, -1, np.int32), np.full(top, np.inf, np.float32)
    found[: len(order)], far[: len(order)] = names[order], apart[order]
    return found, far
