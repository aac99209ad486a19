"""A BitStack model's further blocks in memory: a stack whose top moves with the budget while the model runs.

The blocks lie in one address range in the order in which they are worth having, as they do in their file. Growing reads
the next ones behind those that are there; shrinking gives the pages behind the new top back to the system. Nothing is
reordered, decoded or kept elsewhere: bytes read are the difference, and a matrix sees the blocks that are there.
(BitStack, arXiv 2410.23918, section 3.4.)
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.formats import Packed
from memwall.formats.bitstack import BitStackCodec, block_bytes
from memwall.memory.pages import PAGE_BYTES, round_up
from memwall.models.precision import aligned, weight_owner
from memwall.models.stack_index import StackIndex

if TYPE_CHECKING:
    from memwall.memory import Arena
    from memwall.models.checkpoint import Checkpoint
    from memwall.models.weights import Weights


class BlockStack:
    """The stack of one loaded model. first: matrix -> its first block, which is always there."""

    def __init__(
        self, index: StackIndex, checkpoint: Checkpoint, arena: Arena, weights: Weights, first: Mapping[str, np.ndarray]
    ) -> None:
        self.index = index
        self.bytes_read = 0
        """Bytes that growing has read from the file, in all."""
        self._weights = weights
        shapes = {tensor.name: tensor.shape for tensor in checkpoint.config.tensors()}
        self._shapes = {name: shapes[name] for name in index.tensors}
        self._buffers = {name: [block] for name, block in first.items()}
        self._names = [index.tensors[at] for at in index.order]
        self._sizes = [block_bytes(self._shapes[name], index.rank) for name in self._names]
        self._ends = [0, *accumulate(aligned(size) for size in self._sizes)]
        self._places: list[int] = []
        self._file = -1
        counts = dict.fromkeys(index.tensors, 0)
        path: Path | None = None
        for name in self._names:
            counts[name] += 1
            path, start = checkpoint.place_of(name, f"block{counts[name]}")
            self._places.append(start)
        self.num_blocks = 0
        owner = weight_owner(BitStackCodec(rank=index.rank).spec)
        self._region = arena.reserve(owner, max(self._ends[-1], 1), huge=False)
        if path is not None:
            self._file = os.open(path, os.O_RDONLY)
        self._bind(index.tensors)

    @property
    def most_blocks(self) -> int:
        """Blocks that there are in the file."""
        return len(self._names)

    @property
    def nbytes(self) -> int:
        """Resident bytes of the blocks that are here."""
        return self._region.committed_bytes

    def nbytes_of(self, num_blocks: int) -> int:
        """Resident bytes of so many blocks."""
        return round_up(self._ends[num_blocks])

    def longest(self, room_bytes: int) -> int:
        """The most blocks that take at most `room_bytes`."""
        return max(bisect_right(self._ends, max(room_bytes, 0) // PAGE_BYTES * PAGE_BYTES) - 1, 0)

    @property
    def specs(self) -> dict[str, str]:
        """What each matrix is now."""
        return self.index.specs(self.num_blocks)

    def resize(self, num_blocks: int) -> None:
        """Hold the first `num_blocks`, no more and no fewer. BudgetExceeded, with nothing changed, where the arena has
        no room for them; InputError where the file can no longer be read.
        """
        if not 0 <= num_blocks <= self.most_blocks:
            raise InputError(f"{num_blocks} blocks: this stack has 0 to {self.most_blocks}")
        before = self.num_blocks
        if num_blocks > before:
            self._region.commit(self._ends[num_blocks])
            try:
                for at in range(before, num_blocks):
                    self._read(at)
            except BaseException:
                self._drop(before)
                raise
        names = {self._names[at] for at in range(min(before, num_blocks), max(before, num_blocks))}
        if num_blocks < before:
            self._drop(num_blocks, names)
        else:
            self.num_blocks = num_blocks
            self._bind(names)

    def release(self) -> None:
        """Gives everything back; the stack is of no more use."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._buffers = {}
        self._region.release()

    def _read(self, at: int) -> None:
        data = self._region.array(self._sizes[at], np.uint8, self._ends[at])
        view, done = data.data, 0
        while done < len(view):
            try:
                count = os.preadv(self._file, [view[done:]], self._places[at] + done)
            except OSError as error:
                raise InputError(f"a block of the stack cannot be read: {error.strerror or error}") from None
            if count == 0:
                raise InputError("the file of the stack became shorter while the model ran")
            done += count
        self.bytes_read += done
        self._buffers[self._names[at]].append(data)

    def _drop(self, num_blocks: int, names: set[str] | None = None) -> None:
        """Keeps the first `num_blocks`. Matrices let go of the others before their pages go."""
        counts = self.index.counts(num_blocks)
        for name, blocks in self._buffers.items():
            del blocks[counts[name] :]
        self.num_blocks = num_blocks
        if names:
            self._bind(names)
        self._region.shrink(self._ends[num_blocks])

    def _bind(self, names: set[str] | tuple[str, ...]) -> None:
        for name in names:
            blocks = self._buffers[name]
            spec = BitStackCodec(rank=self.index.rank, blocks=len(blocks)).spec
            buffers = {f"block{index}": block for index, block in enumerate(blocks)}
            self._weights.replace(name, Packed(spec=spec, shape=self._shapes[name], buffers=buffers))
        self._weights.specs = {**self._weights.specs, **self.specs}
