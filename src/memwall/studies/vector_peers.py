"""Other libraries' indexes over the same vectors, each in a process of its own: what they hold, and what they read.

    faiss    IVF-Flat with its lists on disk: where each lies, and every query's lists in order
    hnswlib  a graph with all vectors in memory: its bytes, and its recall
    diskannpy  a graph on disk with codes in memory: bytes that its process reads, by the system's count

`python -m memwall.studies.vector_peers JOB` runs a job, a JSON object on standard input, and prints its answer. Arrays
go through .npy files. A library that is not there ends with status 3.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memwall.hardware.units import GIB

PAGE_BYTES = 4096
_ABSENT = 3
_ID_BYTES = 8


class PeerAbsent(Exception):
    """The library is not installed, or did not work; the message says which."""


def ask(job: str, x: np.ndarray, queries: np.ndarray, *, seconds: float | None = None, **told: Any) -> dict[str, Any]:
    """Runs a job on vectors [n, d] and queries [q, d]. The answer's arrays are given as arrays. PeerAbsent where the
    library is not there, fails, or takes longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", x)
        np.save(folder / "queries.npy", queries)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "memwall.studies.vector_peers", job],
                input=json.dumps({"folder": name, **told}), capture_output=True, text=True, env=environment,
                check=False, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise PeerAbsent(f"{job} took more than {seconds} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise PeerAbsent(lines[-1])
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        arrays = {path.stem: np.load(path) for path in folder.glob("answer-*.npy")}
        return answer | {name.removeprefix("answer-"): array for name, array in arrays.items()}


def faiss(folder: Path, x: np.ndarray, queries: np.ndarray, lists: int, rounds: int, ranked: int) -> dict[str, Any]:
    """owner [n]: the list of each vector; pages [lists]: that each touches in the file; ranking, apart [q, ranked]."""
    library: Any = importlib.import_module("faiss")

    quantizer = library.IndexFlatL2(x.shape[1])
    index = library.IndexIVFFlat(quantizer, x.shape[1], lists)
    index.cp.niter, index.cp.min_points_per_centroid = rounds, 1
    index.train(x)
    index.add(x)
    stored = library.OnDiskInvertedLists(lists, index.code_size, str(folder / "lists"))
    pointers = library.InvertedListsPtrVector()
    pointers.push_back(index.invlists)
    stored.merge_from_multiple(pointers.data(), pointers.size(), False)
    owner, pages = np.zeros(len(x), np.int64), np.zeros(lists, np.int64)
    for at in range(lists):
        size = stored.list_size(at)
        if size:
            owner[library.rev_swig_ptr(index.invlists.get_ids(at), size)] = at
            place = stored.lists.at(at)
            codes = place.offset, size * index.code_size
            ids = place.offset + place.capacity * index.code_size, size * _ID_BYTES
            pages[at] = len({page for start, count in (codes, ids) for page in _pages(start, count)})
    apart, ranking = quantizer.search(queries, ranked)
    for name, array in (("owner", owner), ("pages", pages), ("ranking", ranking), ("apart", apart)):
        np.save(folder / f"answer-{name}.npy", array)
    return {"version": library.__version__, "file_bytes": (folder / "lists").stat().st_size}


def hnswlib(folder: Path, x: np.ndarray, queries: np.ndarray, edges: int, ef: int, top: int) -> dict[str, Any]:
    """index_bytes: of the index, all of which it holds in memory. found [q, top]."""
    library: Any = importlib.import_module("hnswlib")

    index = library.Index(space="l2", dim=x.shape[1])
    index.init_index(max_elements=len(x), M=edges, ef_construction=100, random_seed=1)
    index.add_items(x)
    index.set_ef(ef)
    found, _ = index.knn_query(queries, k=top)
    np.save(folder / "answer-found.npy", found.astype(np.int64))
    index.save_index(str(folder / "index"))
    return {"index_bytes": (folder / "index").stat().st_size}


def diskannpy(
    folder: Path,
    x: np.ndarray,
    queries: np.ndarray,
    edges: int,
    search_bytes: int,
    tried: list[int],
    beam: int,
    top: int,
) -> dict[str, Any]:
    """found-L [q, top] and bytes read of searches with lists of L candidates. search_bytes: that its codes may take."""
    library: Any = importlib.import_module("diskannpy")

    where = folder / "graph"
    where.mkdir()
    library.build_disk_index(
        data=x, distance_metric="l2", index_directory=str(where), complexity=2 * edges, graph_degree=edges,
        search_memory_maximum=search_bytes / GIB, build_memory_maximum=8.0, num_threads=os.cpu_count() or 1,
        pq_disk_bytes=0, vector_dtype=np.float32,
    )  # fmt: skip
    index = library.StaticDiskIndex(
        index_directory=str(where), num_threads=1, num_nodes_to_cache=0, cache_mechanism=0, distance_metric="l2",
        vector_dtype=np.float32, dimensions=x.shape[1],
    )  # fmt: skip
    read = []
    for complexity in tried:
        before, found = _read_bytes(), []
        for query in queries:
            found.append(index.search(query, k_neighbors=top, complexity=complexity, beam_width=beam).identifiers)
        read.append(_read_bytes() - before)
        np.save(folder / f"answer-found-{complexity}.npy", np.array(found, np.int64))
    return {"read_bytes": read}


def _pages(start: int, count: int) -> range:
    return range(start // PAGE_BYTES, (start + count - 1) // PAGE_BYTES + 1)


def _read_bytes() -> int:
    """Bytes that this process has fetched from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"faiss": faiss, "hnswlib": hnswlib, "diskannpy": diskannpy}


def main() -> int:
    told = json.loads(sys.stdin.read())
    folder = Path(told.pop("folder"))
    x, queries = np.load(folder / "x.npy"), np.load(folder / "queries.npy")
    kept = os.dup(1)
    os.dup2(2, 1)  # libraries print what they do
    try:
        answer = JOBS[sys.argv[1]](folder, x, queries, **told)
    except ImportError as error:
        sys.stderr.write(f"\n{sys.argv[1]} ({error})\n")
        return _ABSENT
    sys.stderr.flush()
    os.write(kept, ("\n" + json.dumps(answer) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
