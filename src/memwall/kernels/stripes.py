"""Stripes: tiles of a matrix dealt to workers in one row, so that none waits, whatever the shape of the matrix.

Source: "MARLIN" (Elias Frantar, 2024, arXiv 2408.11743), section 3.3 (striped partitioning); official code:
github.com/IST-DASLab/marlin. The native products share work the same way where there are few strips for many threads.

Idea: a slice is a column of tiles whose results belong together. With a slice for each worker some wait while others
work on the last slices. In one row, k fastest, tiles are dealt in equal runs that may begin and end inside a slice; a
slice that several workers have parts of is summed up one after another.

Units: tiles. Differs from the paper: nothing known.
Holds when: a worker's parts are done in order, and sums of a slice are passed on from the last part to the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tiles [first, stop) of one slice, worked by one worker."""

    worker: int
    slice: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripes:
    """k_tiles: tiles of a slice. slices: how many, copies for more tokens included. group_tiles: tiles of a group of
    scales: each stripe is a whole number of groups.
    """

    k_tiles: int
    slices: int
    workers: int
    group_tiles: int = 1

    def __post_init__(self) -> None:
        for name in ("k_tiles", "slices", "workers", "group_tiles"):
            if getattr(self, name) < 1:
                raise InputError(f"stripes: {name} is {getattr(self, name)}; it must be 1 or more")
        if self.k_tiles % self.group_tiles:
            raise InputError(f"stripes: groups of {self.group_tiles} tiles do not divide {self.k_tiles}")

    @property
    def num_tiles(self) -> int:
        """Of all slices."""
        return self.k_tiles * self.slices

    @property
    def stripe_tiles(self) -> int:
        """Tiles of a worker: an equal share, rounded up to whole groups."""
        share = -(-self.num_tiles // self.workers)
        return -(-share // self.group_tiles) * self.group_tiles

    def parts(self, worker: int) -> list[Part]:
        """What a worker does, in order."""
        at, end = worker * self.stripe_tiles, min((worker + 1) * self.stripe_tiles, self.num_tiles)
        found = []
        while at < end:
            here, first = divmod(at, self.k_tiles)
            stop = min(self.k_tiles, first + end - at)
            found.append(Part(worker=worker, slice=here, first=first, stop=stop))
            at += stop - first
        return found

    def reduction(self, slice_index: int) -> list[Part]:
        """The parts of a slice in the order in which they are summed up: the one that begins last comes first."""
        start = slice_index * self.k_tiles
        first, last = start // self.stripe_tiles, (start + self.k_tiles - 1) // self.stripe_tiles
        parts = (part for worker in range(first, last + 1) for part in self.parts(worker) if part.slice == slice_index)
        return list(parts)[::-1]

    def load(self, worker: int) -> int:
        """Tiles of one worker."""
        start = worker * self.stripe_tiles
        return max(0, min(start + self.stripe_tiles, self.num_tiles) - start)

    @property
    def reductions(self) -> int:
        """How often a partial result is passed on: at most once per stripe that begins inside a slice."""
        starts = range(self.stripe_tiles, self.num_tiles, self.stripe_tiles)
        return sum(1 for start in starts if start % self.k_tiles)

    @property
    def utilisation(self) -> float:
        """Share of the workers' time in which there is work, reductions apart."""
        return self.num_tiles / (self.workers * max(self.load(worker) for worker in range(self.workers)))


def whole_slices(k_tiles: int, slices: int, workers: int) -> float:
    """Utilisation when each worker takes whole slices: the usual partition."""
    return slices / (workers * -(-slices // workers))
