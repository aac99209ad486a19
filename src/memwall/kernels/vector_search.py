"""Trees, graphs and lists of vectors: what an index whose heads lie in memory and whose lists lie on disk is made with.

Distances are squared. Vectors [n, d] are float32, float16, int8 or uint8 and are compared as they lie, in a file that
is mapped too; queries are float32. Equal distances go by id, and threads change no bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall import _native
from memwall.kernels.row_scores import padded

__all__ = ["ELEMENTS", "Tree", "VectorGraph", "balanced_tree", "closure_assign", "padded", "pick_heads", "scan_lists"]

ELEMENTS = ("float32", "float16", "int8", "uint8")


def _rows(vectors: np.ndarray) -> tuple[np.ndarray, int, str]:
    """Vectors as the kernels take them: bytes, numbers of a vector, element."""
    assert vectors.dtype.name in ELEMENTS, vectors.dtype
    whole = np.ascontiguousarray(vectors)
    return whole.view(np.uint8).reshape(len(whole), -1), whole.shape[1], whole.dtype.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Nodes from the root on, each the children of a node beside each other. points: the vector that a node stands for,
    -1 for the root; children of a node are begins[node] to ends[node]. factor: of the penalty, as it was chosen.
    """

    points: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    factor: float


def balanced_tree(
    vectors: np.ndarray,
    *,
    children: int = 32,
    leaf: int = 8,
    samples: int = 1000,
    value_range: float = 1.0,
    factor: float = -1.0,
    seed: int = 0,
) -> Tree:
    """Balanced k-means, split by split, until a node has `leaf` vectors. factor: -1 for the best of seven at the root,
    infinity for no penalty on sizes.
    """
    points, begins, ends, chosen = _native.balanced_tree(
        *_rows(vectors), children, leaf, samples, value_range, factor, seed
    )
    return Tree(points=points, begins=begins, ends=ends, factor=chosen)


def pick_heads(tree: Tree, count: int, *, select: int, split: int, split_factor: int) -> np.ndarray:
    """bool [count]: the vectors that become heads."""
    heads = np.zeros(count, np.uint8)
    _native.pick_heads(tree.points, tree.begins, tree.ends, select, split, split_factor, heads)
    return heads.astype(bool)


class VectorGraph:
    """A relative-neighbourhood graph over vectors in memory. edges: int32 [n, degree], -1 behind the last of each.

    pivots, pivot_ends, seeds: where a search begins; those under pivot p are seeds[pivot_ends[p - 1]:pivot_ends[p]].
    """

    def __init__(
        self, vectors: np.ndarray, edges: np.ndarray, pivots: np.ndarray, pivot_ends: np.ndarray, seeds: np.ndarray
    ) -> None:
        self.vectors, self.edges = np.ascontiguousarray(vectors), edges
        self.pivots, self.pivot_ends, self.seeds = pivots, pivot_ends, seeds
        self._rows = _rows(self.vectors)

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        starts: tuple[np.ndarray, np.ndarray, np.ndarray],
        *,
        degree: int = 32,
        budget: int = 768,
        candidates: int = 128,
        seed: int = 0,
    ) -> VectorGraph:
        """starts: pivots, pivot_ends and seeds. budget: vectors that each is compared with; of them, the nearest
        `candidates` may become its neighbours.
        """
        rows = _rows(vectors)
        order = np.random.default_rng(seed).permutation(len(vectors)).astype(np.int32)
        edges = np.full((len(vectors), degree), -1, np.int32)
        if len(vectors):
            _native.vector_graph_build(*rows, order, budget, candidates, edges)
            _native.vector_graph_connect(*rows, edges, *starts, budget)
        return cls(vectors, edges, *starts)

    @property
    def edge_bytes(self) -> int:
        """Of edges and of the places where searches begin."""
        return self.edges.nbytes + self.pivots.nbytes + self.pivot_ends.nbytes + self.seeds.nbytes

    def search(self, queries: np.ndarray, found: int, budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids int32 and squared distances float32 [q, found], nearest first (-1 and infinity where fewer were reached),
        and how many vectors' edges were followed, int32 [q]. budget: vectors that a query is compared with.
        """
        asked = padded(np.asarray(queries, np.float32))
        ids = np.empty((len(asked), found), np.int32)
        distances = np.empty((len(asked), found), np.float32)
        checked, expanded = np.empty(len(asked), np.int32), np.empty(len(asked), np.int32)
        _native.vector_graph_search(
            *self._rows, self.edges, self.pivots, self.pivot_ends, self.seeds, asked, budget, ids, distances, checked,
            expanded,
        )  # fmt: skip
        return ids, distances, expanded


def closure_assign(
    heads: np.ndarray,
    candidates: np.ndarray,
    distances: np.ndarray,
    *,
    closure: float,
    rng_factor: float,
    replicas: int,
    nearest_only: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """int32 and float32 [n, replicas]: the heads that each vector joins, nearest first, -1 behind the last.

    candidates, distances [n, c]: heads from near to far. A head is taken if its distance is at most `closure` times the
    nearest one's, and `rng_factor` times its distance from each taken head at least its own. nearest_only: the nearest
    heads instead.
    """
    taken = np.empty((len(candidates), replicas), np.int32)
    apart = np.empty((len(candidates), replicas), np.float32)
    _native.closure_assign(
        *_rows(heads), np.ascontiguousarray(candidates), np.ascontiguousarray(distances), closure, rng_factor,
        nearest_only, taken, apart,
    )  # fmt: skip
    return taken, apart


def scan_lists(
    room: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    dtype: np.dtype,
    query: np.ndarray,
    ids: np.ndarray,
    distances: np.ndarray,
    *,
    size: int,
    ids_last: bool,
    most_id: int,
) -> int:
    """Puts the nearest of lists among the best so far, `ids` int32 and `distances` float32 [top], each vector once.

    room: uint8, what was read; starts int64 and counts int32: where each list begins in it, and its vectors of `size`
    numbers. ids_last: whether ids stand behind all vectors, not before each. query: `padded`. Gives how many vectors
    were compared, -1 where an id is larger than `most_id`.
    """
    return int(_native.scan_lists(room, starts, counts, size, dtype.name, ids_last, query, most_id, ids, distances))
