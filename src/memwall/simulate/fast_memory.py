"""A fast memory of M words over an unbounded slow one: what a schedule holds is placed by hand, and words moved count.

This is the two-level model of Hong and Kung (1981) with its capacity enforced. A schedule loads pieces of slow arrays,
makes new blocks, works on blocks, stores them and lets them go; a block that would not fit is refused, and one that was
let go cannot be used. Operands of one scalar operation are in registers and count nowhere; all arrays do.

Units: words, one number each whatever its type. Slow arrays start as they are given, scratch in slow memory as zeros.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from memwall.errors import DoesNotFit, InputError


class FastMemoryFull(DoesNotFit):
    """A block was to be placed where there is no room for it."""

    def __init__(self, wanted: int, held: int, words: int) -> None:
        self.wanted, self.held, self.words = wanted, held, words
        super().__init__(f"{wanted:,} words more do not fit: {held:,} of the fast memory's {words:,} are held")


class Block:
    """A piece of a slow array, or a new array, in fast memory."""

    __slots__ = ("_array",)

    def __init__(self, array: np.ndarray) -> None:
        self._array: np.ndarray | None = array

    @property
    def array(self) -> np.ndarray:
        """What it holds; AssertionError once it was let go."""
        assert self._array is not None, "a block is used after it was let go"
        return self._array

    def drop(self) -> int:
        """Lets go; returns its words."""
        size = self.array.size
        self._array = None
        return size


class Memory(Protocol):
    """What schedules are written against: `FastMemory` counts, `memory_trace.TracedMemory` records addresses."""

    def load(self, view: np.ndarray) -> Block:
        """A piece of a slow array, brought in."""

    def create(self, shape: tuple[int, ...]) -> Block:
        """A new block of zeros, float32 as all slow arrays are."""

    def store(self, block: Block, view: np.ndarray) -> None:
        """Writes a block to a piece of a slow array of its shape; it stays."""

    def evict(self, *blocks: Block) -> None:
        """Lets blocks go. What was not stored is lost."""

    def multiply(self, out: Block, a: Block, b: Block, *, turned_a: bool = False, turned_b: bool = False) -> None:
        """out += a b, all held; turned: a (or b) is transposed first."""

    def touch(self, *blocks: Block, written: bool = True) -> None:
        """Says that blocks are read, and written, element by element."""


class FastMemory:
    """The counting memory. words: its capacity M."""

    def __init__(self, words: int) -> None:
        if words < 1:
            raise InputError(f"{words} words: a fast memory holds one at least")
        self.words = words
        self.held = 0
        self.peak = 0
        self.loaded = 0
        self.stored = 0

    @property
    def moved(self) -> int:
        """Words loaded and stored so far."""
        return self.loaded + self.stored

    def load(self, view: np.ndarray) -> Block:
        """See `Memory`. Raises FastMemoryFull, before anything is moved."""
        self._take(view.size)
        self.loaded += view.size
        return Block(view.copy())

    def create(self, shape: tuple[int, ...]) -> Block:
        """See `Memory`. Raises FastMemoryFull."""
        block = np.zeros(shape, np.float32)
        self._take(block.size)
        return Block(block)

    def store(self, block: Block, view: np.ndarray) -> None:
        """See `Memory`."""
        assert block.array.shape == view.shape, "a block is stored to a piece of another shape"
        view[...] = block.array
        self.stored += view.size

    def evict(self, *blocks: Block) -> None:
        """See `Memory`."""
        for block in blocks:
            self.held -= block.drop()

    def multiply(self, out: Block, a: Block, b: Block, *, turned_a: bool = False, turned_b: bool = False) -> None:
        """See `Memory`."""
        out.array[...] += (a.array.T if turned_a else a.array) @ (b.array.T if turned_b else b.array)

    def touch(self, *blocks: Block, written: bool = True) -> None:
        """See `Memory`: here they must merely be held."""
        for block in blocks:
            assert block.array is not None

    def _take(self, size: int) -> None:
        if self.held + size > self.words:
            raise FastMemoryFull(size, self.held, self.words)
        self.held += size
        self.peak = max(self.peak, self.held)
