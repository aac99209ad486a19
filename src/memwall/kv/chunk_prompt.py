"""A prompt made of an opening, chunks and a question: where its parts lie, what is done with each, and in which spans.

All of it is decided from the store alone, before anything is computed.
Units: positions and lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kv.cache_craft import Chooser, Reuse, chunk_id, decide
from memwall.kv.chunk_file import ROWS, ChunkWriter
from memwall.models.decoder import BLOCK_ROWS

if TYPE_CHECKING:
    from memwall.kv.base import CacheShape
    from memwall.kv.chunk_store import ChunkStore, Variant

LEAST_OPENING_TOKENS = 16
"""Shorter openings are computed every time: reading them would take as long."""
MOST_PARTS = 1024
"""A head's values may be so wide in the attention kernel, which sums the attention to each part."""


@dataclass(frozen=True, slots=True)
class ChunkPrompt:
    """Token ids of a prompt: what it always begins with, the chunks in order, and the question."""

    opening: Sequence[int]
    chunks: Sequence[Sequence[int]]
    question: Sequence[int]

    def __post_init__(self) -> None:
        if not self.question:
            raise InputError("the question is empty; give at least one word")
        if any(not chunk for chunk in self.chunks):
            raise InputError("a chunk is empty; leave it out")
        if len(self.chunks) >= MOST_PARTS:
            raise InputError(f"{len(self.chunks)} chunks in a prompt: at most {MOST_PARTS - 1} work")

    @property
    def tokens(self) -> list[int]:
        """All of it."""
        return [*self.opening, *(token for chunk in self.chunks for token in chunk), *self.question]


@dataclass(slots=True, eq=False)
class Part:
    """The opening or a chunk in a prompt: where it lies, what comes before it, and what is done with it."""

    index: int
    opening: bool
    begin: int
    tokens: np.ndarray
    name: str
    predecessors: tuple[str, ...]
    lengths: tuple[int, ...]
    reuse: Reuse
    variant: Variant | None = None
    writer: ChunkWriter | None = None
    inter: np.ndarray = field(default_factory=lambda: np.zeros(0))
    intra: float = 0.0
    token_inter: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    @property
    def kept(self) -> bool:
        """Whether it comes from the store."""
        return self.variant is not None


def arrange(
    store: ChunkStore, prompt: ChunkPrompt, alpha: float, segment_tokens: int, choose: Chooser | None = None
) -> list[Part]:
    """The parts of a prompt and what is done with each, decided from the store alone."""
    parts: list[Part] = []
    position, before, lengths = 0, list[str](), list[int]()
    pieces = [prompt.opening, *prompt.chunks] if prompt.opening else list(prompt.chunks)
    for index, piece in enumerate(pieces):
        tokens = np.asarray(piece, np.int32)
        name = chunk_id(tokens)
        opening = bool(prompt.opening) and index == 0
        short = opening and len(piece) < LEAST_OPENING_TOKENS
        candidates = {} if short else store.variants(name)
        reuse = decide(candidates, before, lengths, len(tokens), alpha, choose)
        if reuse.variant is not None and len(reuse.repair) > segment_tokens:
            reuse = decide({}, before, lengths, len(tokens), alpha)  # kept rows are repaired in one go or not at all
        parts.append(Part(index, opening, position, tokens, name, tuple(before), tuple(lengths), reuse))
        before.append(name)
        lengths.append(len(tokens) - (position == 0))  # the prompt's first token is no context
        position += len(tokens)
    return parts


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [begin, end) of the prompt that are worked together; chosen: those that run through the layers."""

    begin: int
    end: int
    chosen: np.ndarray


def cut_spans(parts: Sequence[Part], num_tokens: int, most: int) -> list[Span]:
    """Spans of at most `most` chosen tokens; a kept chunk lies in one of them whole."""
    spans: list[Span] = []
    begin, chosen = 0, np.zeros(0, np.int64)

    def close(end: int) -> None:
        nonlocal begin, chosen
        if len(chosen):
            spans.append(Span(begin, end, chosen))
            begin, chosen = end, np.zeros(0, np.int64)

    def add_whole(first: int, last: int) -> None:
        nonlocal chosen
        while first < last:
            if len(chosen) == most:
                close(first)
            count = min(most - len(chosen), last - first)
            chosen = np.concatenate([chosen, np.arange(first, first + count)])
            first += count

    for part in parts:
        if not part.kept:
            add_whole(part.begin, part.end)
            continue
        if len(chosen) + len(part.reuse.repair) > most:
            close(part.begin)
        chosen = np.concatenate([chosen, part.begin + part.reuse.repair])
    add_whole(parts[-1].end if parts else 0, num_tokens)
    close(num_tokens)
    return spans


def stage_bytes(shape: CacheShape, num_tokens: int, num_parts: int, loading_bytes: int = 0, ahead: int = 2) -> int:
    """What a prefill holds besides the cache, the decoder and the store's memory tier: one layer of `num_tokens` in
    float32 and what is handed on of it, marks of `num_parts`, statistics of a block of rows, and `ahead` layers of
    `loading_bytes` that arrive.
    """
    layer = 2 * num_tokens * shape.row_values
    marks = num_tokens * shape.num_kv_heads * num_parts
    watching = min(num_tokens, BLOCK_ROWS) * shape.num_heads * (2 * shape.head_dim + num_parts + 2)
    return 4 * (2 * layer + marks + 2 * watching) + ahead * loading_bytes


def layer_bytes(shape: CacheShape, num_tokens: int) -> int:
    """Bytes of one layer's keys and values as files hold them."""
    return 2 * num_tokens * shape.row_values * ROWS.itemsize


def predict_stage_bytes(shape: CacheShape, prompt: ChunkPrompt) -> int:
    """`stage_bytes` of a prompt all of whose chunks are kept."""
    loading = sum(map(len, prompt.chunks)) + len(prompt.opening)
    return stage_bytes(shape, len(prompt.tokens), len(prompt.chunks) + 1, layer_bytes(shape, loading))
