"""Keys and values on their way from prefill to decode: which rank reads what from which, and the copies.

Source: DistServe, Zhong 2024, arXiv 2401.09670, section 4.3 (pull-based transfer), with the released code's mapping of
blocks per layer, tensor rank and pipeline stage.

Idea: both sides number their pages alike on all of their ranks, but a rank's page holds only its own layers and heads.
A rank of the decode side reads each of them from the rank of the prefill side that has it. With equal degrees a piece
is a whole page and one copy; with unequal ones it is a stretch of layers and heads of it.

Layout of a rank's page: [its layers][keys, values][page_tokens][its heads][a token's row].

Cost: 2 * layers * heads * head_dim * 2 bytes * page_tokens are read and written once for each page, whatever the
degrees; replicated heads (more ranks than heads) are written once for each replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.memory import PagePool
from memwall.memory.page_groups import paired_runs


@dataclass(frozen=True, slots=True)
class Pull:
    """`count` pages from `source` on in the prefill side's memory go to `target` and on in the decode side's."""

    source: int
    target: int
    count: int


def pulls_of(source: Sequence[int], target: Sequence[int]) -> tuple[Pull, ...]:
    """Copies of pages to as many others, neighbours together."""
    return tuple(Pull(*run) for run in paired_runs(source, target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Keys and values of a whole model in pages of `page_tokens` tokens. heads: those of keys and values; head_bytes: a
    token's key, or value, of one of them, its scale included.
    """

    layers: int
    heads: int
    head_bytes: int
    page_tokens: int

    def page_bytes(self, part: Part) -> int:
        """Bytes of a page on a rank that holds so much of it."""
        return 2 * len(part.layers) * self.page_tokens * len(part.heads) * self.head_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds."""

    layers: range
    heads: range


def parts_of(layout: Layout, tensor: int, pipeline: int) -> tuple[Part, ...]:
    """What the ranks hold, stage by stage, in each the ranks of its tensor group.

    With more ranks than heads, each head is on as many ranks. InputError where layers or heads cannot be divided.
    """
    layers, heads = layout.layers, layout.heads
    if tensor < 1 or pipeline < 1 or layers % pipeline:
        raise InputError(f"{layers} layers cannot be divided among {pipeline} stages; take a divisor of {layers}")
    if heads % tensor and tensor % heads:
        raise InputError(
            f"{heads} heads of keys and values cannot be divided among {tensor} ranks; take a divisor or a multiple"
        )
    deep, wide, copies = layers // pipeline, max(heads // tensor, 1), max(tensor // heads, 1)
    return tuple(
        Part(
            range(stage * deep, (stage + 1) * deep),
            range(rank // copies * wide, (rank // copies + 1) * wide),
        )
        for stage in range(pipeline)
        for rank in range(tensor)
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """`target` reads these layers and heads, counted over the whole model, from `source`; both are places of ranks."""

    source: int
    target: int
    layers: range
    heads: range


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """The copies between two sides of given (tensor, pipeline) degrees."""

    layout: Layout
    source: tuple[int, int] = (1, 1)
    target: tuple[int, int] = (1, 1)

    @property
    def sources(self) -> tuple[Part, ...]:
        """Ranks of the prefill side."""
        return parts_of(self.layout, *self.source)

    @property
    def targets(self) -> tuple[Part, ...]:
        """Ranks of the decode side."""
        return parts_of(self.layout, *self.target)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Every layer and head of every rank of the decode side, exactly once.

        Where several ranks of the prefill side hold a head, those that read it are spread over them.
        """
        found = []
        for place, part in enumerate(self.targets):
            holders: dict[tuple[range, range], list[int]] = {}
            for other, held in enumerate(self.sources):
                layers, heads = _both(part.layers, held.layers), _both(part.heads, held.heads)
                if layers and heads:
                    holders.setdefault((layers, heads), []).append(other)
            for (layers, heads), places in holders.items():
                found.append(Piece(places[place % len(places)], place, layers, heads))
        return tuple(found)

    def copy(self, sources: Sequence[PagePool], targets: Sequence[PagePool], pulls: Sequence[Pull]) -> int:
        """Copies pages of all ranks; gives the bytes written. Pools are in the order of `sources` and `targets`."""
        nbytes = 0
        held, wanted = self.sources, self.targets
        for piece in self.pieces:
            one, other = held[piece.source], wanted[piece.target]
            for pull in pulls:
                view = self._view(targets[piece.target], other, pull.target, pull.count, piece)
                view[...] = self._view(sources[piece.source], one, pull.source, pull.count, piece)
                nbytes += view.nbytes
        return nbytes

    def _view(self, pool: PagePool, part: Part, page: int, count: int, piece: Piece) -> np.ndarray:
        """A piece's layers and heads of pages beside each other: [count, layers, 2, page_tokens, heads, head_bytes]."""
        layout = self.layout
        shape = (count, len(part.layers), 2, layout.page_tokens, len(part.heads), layout.head_bytes)
        whole = pool.run(page, count).reshape(shape)
        layer, head = piece.layers.start - part.layers.start, piece.heads.start - part.heads.start
        return whole[:, layer : layer + len(piece.layers), :, :, head : head + len(piece.heads)]


def _both(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
