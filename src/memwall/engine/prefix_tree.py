"""Groups of prompts that begin alike: a compact prefix tree over all of them, brought down to one level of sharing.

*Source*: BatchLLM (Zheng 2024, arXiv 2412.03594), sections on global prefix identification; the gain rule is that of
the authors' clustering module.
*Idea*: in a tree of many levels a prompt would continue a prefix that continues another. One level is enough for nearly
all of the saving: from the leaves up, a node moves beside its parent when sharing all of its beginning among its own
prompts saves more tokens than storing the parent's span twice costs.
*Units*: tokens; prompts are rows of one flat array.
*Differs from the paper's code*: the tree is made from the prompts in sorted order and the common lengths of neighbours,
which closes every node after all nodes below it, so that merging happens on the way and nothing recurses.
*Cost*: sorting n prompts plus a walk over at most 2 n nodes; a node can move up once per level.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Tokenised prompts: prompt i is tokens[starts[i] : starts[i + 1]]; int32, none negative."""

    tokens: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(prompts: Iterable[Sequence[int]]) -> Prompts:
        """From lists of ids."""
        rows = [np.asarray(prompt, np.int32) for prompt in prompts]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
        return Prompts(tokens=np.concatenate(rows) if rows else np.zeros(0, np.int32), starts=starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        return np.diff(self.starts)


@dataclass(slots=True, eq=False)
class Node:
    """A span of tokens that several prompts share. depth: where it ends, counted from the root; span: its length, which
    grows when a parent's span is put in front. ends: prompts whose rest nobody shares.
    """

    depth: int
    span: int = 0
    num_prompts: int = 0
    ends: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def prompts(self) -> list[int]:
        """All prompts below, in the order they were given."""
        found, todo = [], [self]
        while todo:
            node = todo.pop()
            found += node.ends
            todo += node.children
        return sorted(found)


def sort_prompts(prompts: Prompts) -> tuple[list[int], np.ndarray]:
    """Prompts in the order of their tokens, and how many tokens each shares with the one before it [n] (0 first)."""
    raw = prompts.tokens.astype(">i4").tobytes()  # big end first: bytes compare as the numbers do
    bounds = (4 * prompts.starts).tolist()
    keys = [raw[begin:end] for begin, end in itertools.pairwise(bounds)]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    common = np.zeros(len(order), np.int64)
    for place in range(1, len(order)):
        common[place] = _common(prompts[order[place - 1]], prompts[order[place]])
    return order, common


def _common(one: np.ndarray, other: np.ndarray) -> int:
    shortest = min(len(one), len(other))
    differs = one[:shortest] != other[:shortest]
    first = int(differs.argmax()) if shortest else 0
    return first if shortest and differs[first] else shortest


def one_level(order: Sequence[int], common: np.ndarray) -> Node:
    """The root after merging: its children are the groups, its `ends` the prompts that share with nobody."""
    stack = [Node(depth=0)]
    following = [*common[1:].tolist(), 0]
    for prompt, shared in zip(order, following):
        if shared > stack[-1].depth:
            stack.append(Node(depth=shared))
        stack[-1].ends.append(prompt)
        while stack[-1].depth > shared:
            node = stack.pop()
            if stack[-1].depth < shared:
                stack.append(Node(depth=shared))
            _close(node, stack[-1])
    return stack[0]


def _close(node: Node, parent: Node) -> None:
    """The gain rule for the children of a node that is whole, and the node's own place under its parent."""
    length = node.depth - parent.depth
    staying = []
    for child in node.children:
        if (child.num_prompts - 1) * child.span - length > 0:
            child.span += length
            parent.children.append(child)
        else:
            staying.append(child)
    node.children, node.span = staying, length
    node.num_prompts = len(node.ends) + sum(child.num_prompts for child in staying)
    if len(node.ends) + len(staying) > 1:
        parent.children.append(node)
    elif staying:  # one child alone: both spans are one
        staying[0].span += length
        parent.children.append(staying[0])
    else:
        parent.ends += node.ends
