"""Which vectors become heads of lists, and a graph over them: a balanced tree of clusters, and a choice from it.

A tree is grown over all vectors by k-means that pays for uneven sizes; every cluster is stood for by its most central
vector. Walked from the leaves up, a node whose unclaimed vectors are enough becomes a head and claims them, and a node
of very many has its biggest children as heads too: dense regions get more heads, and a head is always a vector.

Source: SPANN, 2021, arXiv 2111.08566, section 3.2; the rules of the released code (microsoft/SPTAG) for thresholds.

Differs from that code: a node's clusters are learned from one sample, not from a new one each round; final labels carry
no penalty, since a query too goes to what is nearest.

Units and shapes: vectors [n, d] of one of `kernels.vector_search.ELEMENTS`; heads by their places, ascending.

Cost: about 12 bytes a vector while the tree stands; each vector is compared with `children` centers on every level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.kernels import vector_search
from memwall.kernels.vector_search import Tree, VectorGraph

VALUE_RANGE = {"float32": 1.0, "float16": 1.0, "int8": 127.0, "uint8": 255.0}
"""By element, as the released code has it: the scale of the penalty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """share: of vectors that become heads. factor: of the penalty on sizes, as `kernels.vector_search.balanced_tree`
    takes it. select_most, split_most, split_factor: bounds of the thresholds that are tried to meet the share. most:
    heads that there may be, where memory is bounded. random: heads that are drawn, which only comparisons want.
    """

    share: float = 0.16
    most: int | None = None
    children: int = 32
    leaf: int = 8
    samples: int = 1000
    factor: float = -1.0
    select_most: int = 50
    split_most: int = 100
    split_factor: int = 6
    random: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"heads are {self.share} of the vectors; give a share above 0 and at most 1, such as 0.16")
        if self.most is not None and self.most < 1:
            raise InputError(f"{self.most} heads are too few: allow 1 at least")
        if self.children < 2 or self.leaf < 1 or self.samples < self.children:
            raise InputError(
                f"children {self.children}, leaf {self.leaf}, samples {self.samples}: at least 2, 1 and the children"
            )
        if not (self.factor == -1 or self.factor > 0):
            raise InputError(f"the penalty's factor is {self.factor}; give -1 for the best of seven, or one above 0")
        if self.select_most < 2 or self.split_factor < 1 or self.split_most <= self.split_factor:
            raise InputError(
                f"thresholds {self.select_most} and {self.split_most}, split factor {self.split_factor}: at least 2, "
                "above the factor, and 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """ids: int32, ascending. select, split: the thresholds that came nearest to the share; factor: of the penalty."""

    ids: np.ndarray
    select: int = 0
    split: int = 0
    factor: float = math.nan


def grow(vectors: np.ndarray, settings: HeadSettings) -> Tree:
    """The balanced tree."""
    return vector_search.balanced_tree(
        vectors,
        children=settings.children,
        leaf=settings.leaf,
        samples=settings.samples,
        value_range=VALUE_RANGE[vectors.dtype.name],
        factor=settings.factor,
        seed=settings.seed,
    )


def select_heads(vectors: np.ndarray, settings: HeadSettings, tree: Tree | None = None) -> Heads:
    """Heads as near to the share as thresholds bring them. tree: what `grow` gave, where it is at hand."""
    count = len(vectors)
    most = count if settings.most is None else min(settings.most, count)
    wanted = min(max(round(settings.share * count), 1), most)
    if settings.random:
        drawn = np.random.default_rng(settings.seed).choice(count, wanted, replace=False)
        return Heads(ids=np.sort(drawn).astype(np.int32))
    if count <= settings.leaf or settings.share == 1:
        return Heads(ids=np.arange(wanted, dtype=np.int32))
    tree = grow(vectors, settings) if tree is None else tree
    best, least, thresholds = np.zeros(count, bool), math.inf, (0, 0)
    for select in range(2, settings.select_most + 1):
        low, high = settings.split_factor, settings.split_most
        while low < high - 1:
            split = (low + high) // 2
            heads = vector_search.pick_heads(
                tree, count, select=select, split=split, split_factor=settings.split_factor
            )
            apart = float(heads.mean()) - settings.share
            if abs(apart) < least and 0 < heads.sum() <= most:
                best, least, thresholds = heads, abs(apart), (select, split)
            low, high = (split, high) if apart > 0 else (low, split)
    if math.isinf(least):  # no thresholds do: clusters of the upper levels, then, as the tree has them
        best[tree.points[1 : wanted + 1]] = True
    return Heads(
        ids=np.flatnonzero(best).astype(np.int32), select=thresholds[0], split=thresholds[1], factor=tree.factor
    )


def graph_over(heads: np.ndarray, settings: HeadSettings, degree: int) -> VectorGraph:
    """A graph over heads [h, d]; searches begin at the upper levels of a balanced tree over them."""
    return VectorGraph.build(heads, starts(heads, settings), degree=degree, seed=settings.seed)


def starts(heads: np.ndarray, settings: HeadSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pivots (the root's children), the ends of the seeds under each (its children), and the seeds, all int32."""
    if len(heads) <= settings.leaf:
        return np.arange(len(heads), dtype=np.int32), np.zeros(len(heads), np.int32), np.zeros(0, np.int32)
    tree = grow(heads, settings)
    top = range(int(tree.begins[0]), int(tree.ends[0]))
    below = [tree.points[tree.begins[node] : tree.ends[node]][: settings.children] for node in top]
    ends = np.cumsum([len(one) for one in below]).astype(np.int32)
    return np.array(tree.points[top.start : top.stop]), ends, np.concatenate(below).astype(np.int32)
