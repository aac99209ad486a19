"""Tiles of unequal cost over equal workers: who works what, and when the last one is done.

A product of matrices is cut in tiles; where some are multiplied in 4 bits and others in 8 their costs differ, and an
equal number for each worker is no longer an equal share. Schedules here are exact objects: a list of tiles for each
worker, from which the time of the last (`makespan`) follows, with and without helping each other; kernels run them as
they are (`kernels.comet.linear_scheduled`).

Source: COMET (Liu 2024, arXiv 2410.12168), the scheduling of tiles over multiprocessors; the longest-first rule is
Graham's (1969), at most 4/3 of the best.

Units: costs in any unit of time, such as that of one 4-bit tile; `work` says which tile is meant and is not looked at,
except that `cut` and `split` share the range of its last two numbers (first block, block after the last).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from memwall.errors import InputError

NARROW_COST, WIDE_COST = 1.0, 2.0
"""Of a 4-bit and of an 8-bit tile on tensor cores: 1,248 against 624 tera-operations per second on an A100 (paper)."""
MULTIPROCESSORS = 108
"""Of an A100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A piece of work. parts: into how many equal slices along the inner dimension it may be cut at most."""

    cost: float
    work: tuple[int, ...] = ()
    parts: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost >= 0) or self.parts < 1:
            raise InputError(
                f"a tile of cost {self.cost} in {self.parts} parts: costs are at least 0, parts at least 1"
            )

    def cut(self, parts: int) -> tuple[Tile, Tile | None]:
        """The first `parts` slices, and the others, if any."""
        if parts >= self.parts:
            return self, None
        first, last = self.work[-2:] if self.work else (0, self.parts)
        if last - first != self.parts:
            raise InputError(f"a tile of blocks {first} to {last} has not {self.parts} parts")

        def slices(begin: int, end: int) -> Tile:
            work = (*self.work[:-2], first + begin, first + end) if self.work else ()
            return Tile(cost=self.cost * (end - begin) / self.parts, work=work, parts=end - begin)

        return slices(0, parts), slices(parts, self.parts)

    def split(self, into: int) -> list[Tile]:
        """Slices of nearly equal cost, at most `parts` of them, which together are the tile."""
        into = max(1, min(into, self.parts))
        found: list[Tile] = []
        rest: Tile | None = self
        for left in range(into, 0, -1):
            assert rest is not None
            piece, rest = rest.cut(rest.parts // left)
            found.append(piece)
        return found


@dataclass(frozen=True, slots=True)
class Schedule:
    """workers[w]: the tiles of worker w, in the order in which they are worked."""

    workers: tuple[tuple[Tile, ...], ...]

    @property
    def loads(self) -> list[float]:
        """The cost of each worker's tiles."""
        return [math.fsum(tile.cost for tile in tiles) for tiles in self.workers]

    @property
    def makespan(self) -> float:
        """When the last worker is done, each with its own tiles only."""
        return max(self.loads, default=0.0)

    def makespan_with_stealing(self) -> float:
        """When the last is done if one who runs out takes the next tile of whoever has the most waiting."""
        waiting = [list(reversed(tiles)) for tiles in self.workers]
        left = self.loads
        free = [(0.0, worker) for worker in range(len(waiting))]
        heapq.heapify(free)
        done = 0.0
        while free:
            now, worker = heapq.heappop(free)
            done = max(done, now)
            source = worker if waiting[worker] else max(range(len(left)), key=lambda w: (len(waiting[w]) > 0, left[w]))
            if not waiting[source]:
                continue
            tile = waiting[source].pop()
            left[source] -= tile.cost
            heapq.heappush(free, (now + tile.cost, worker))
        return done


def lower_bound(tiles: Sequence[Tile], workers: int) -> float:
    """No schedule of whole tiles ends earlier."""
    return max(math.fsum(tile.cost for tile in tiles) / _checked(workers), max((t.cost for t in tiles), default=0.0))


def equal_count(tiles: Sequence[Tile], workers: int) -> Schedule:
    """Neighbours in equal numbers, whatever they cost: what a launch over a plain grid does."""
    cuts = [len(tiles) * w // _checked(workers) for w in range(workers + 1)]
    return Schedule(tuple(tuple(tiles[a:b]) for a, b in itertools.pairwise(cuts)))


def striped(tiles: Sequence[Tile], workers: int) -> Schedule:
    """Neighbours in stripes of equal cost: a tile goes to the worker in whose stripe its middle lies."""
    lists: list[list[Tile]] = [[] for _ in range(_checked(workers))]
    share = math.fsum(tile.cost for tile in tiles) / workers
    begun = 0.0
    for tile in tiles:
        place = int((begun + tile.cost / 2) / share) if share > 0 else 0
        lists[min(place, workers - 1)].append(tile)
        begun += tile.cost
    return Schedule(tuple(map(tuple, lists)))


def longest_first(tiles: Iterable[Tile], workers: int) -> Schedule:
    """The longest tile that is left goes to the worker with the least so far."""
    lists: list[list[Tile]] = [[] for _ in range(_checked(workers))]
    least = [(0.0, worker) for worker in range(workers)]
    for tile in sorted(tiles, key=lambda tile: -tile.cost):
        load, worker = heapq.heappop(least)
        lists[worker].append(tile)
        heapq.heappush(least, (load + tile.cost, worker))
    return Schedule(tuple(map(tuple, lists)))


def balanced(tiles: Sequence[Tile], workers: int, *, within: float = 0.01) -> Schedule:
    """Longest first while that ends at most `within` above the even share (or the largest tile, if that is more). What
    would end later is the tail: it is cut along the inner dimension (split-k), and the slices fill up what is left.
    """
    whole = longest_first(tiles, workers)
    share = lower_bound(tiles, workers)
    if whole.makespan <= share * (1 + within):
        return whole
    lists: list[list[Tile]] = [[] for _ in range(workers)]
    least = [(0.0, worker) for worker in range(workers)]
    tail = []
    for tile in sorted(tiles, key=lambda tile: -tile.cost):
        load, worker = least[0]
        if tile.parts > 1 and load + tile.cost > share:
            tail.append(tile)
            continue
        lists[worker].append(tile)
        heapq.heapreplace(least, (load + tile.cost, worker))
    for tile in tail:
        rest: Tile | None = tile
        while rest is not None:
            load, worker = least[0]
            each = rest.cost / rest.parts
            fitting = round((share - load) / each) if each > 0 else rest.parts
            piece, rest = rest.cut(max(1, fitting))
            lists[worker].append(piece)
            heapq.heapreplace(least, (load + piece.cost, worker))
    cut = Schedule(tuple(map(tuple, lists)))
    return cut if cut.makespan < whole.makespan else whole


def with_barrier(tiles: Sequence[Tile], workers: int, kinds: Sequence[int]) -> float:
    """When the last is done if all tiles of one kind must be done before the next kind begins, in equal numbers.

    kinds: of each tile; two passes over one output, a 4-bit and an 8-bit one, are such kinds.
    """
    phases = [[tile for tile, k in zip(tiles, kinds, strict=True) if k == kind] for kind in sorted(set(kinds))]
    return math.fsum(equal_count(phase, workers).makespan for phase in phases)


def relabelled(tiles: Iterable[Tile], product: int) -> list[Tile]:
    """The tiles as those of product number `product`: the first number of their `work`."""
    return [replace(tile, work=(product, *tile.work[1:])) for tile in tiles]


def _checked(workers: int) -> int:
    if workers < 1:
        raise InputError(f"{workers} workers: there must be one at least")
    return workers
