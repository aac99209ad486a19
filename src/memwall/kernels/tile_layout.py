"""Which thread holds which element of a tile, and in which of its places: an algebra of register layouts.

A layout maps (thread t, slot i) to an index of a tile. Each dimension of the tile is cut in sub-dimensions (modes);
some modes are counted out over threads (spatial), the others over a thread's slots (local). Thread and slot are
row-major numbers over their modes, in the order the layout lists them. A spatial entry -r stands for r threads that
hold the same. Since a thread's digits and a slot's digits belong to different modes, index(t, i) = index(t, 0) +
index(0, i).

Source: "Tilus: A Virtual Machine for Arbitrary Low-Precision GPGPU Computation in LLM Serving" (2025, arXiv
2504.12984), register layouts: primitives, composition, the unified form, canonical equality.
Shapes: tables are int64 [threads, slots, dimensions].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from memwall.errors import InputError

Entry = tuple[int, int, int]
"""(dimension, size, stride in that dimension); dimension -1 is a replication."""
REPLICATED = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """shape of the tile; mode_shape: its sub-dimensions, dimension by dimension; spatial, local: modes by number."""

    shape: tuple[int, ...]
    mode_shape: tuple[int, ...]
    spatial_modes: tuple[int, ...]
    local_modes: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape) or any(size < 2 for size in self.mode_shape):
            raise InputError(f"layout {self}: sizes are at least 1, those of modes at least 2")
        if -1 in self.spatial_modes:
            raise InputError(f"layout {self}: a replication is -2 or less")
        used = sorted([mode for mode in self.spatial_modes if mode >= 0] + list(self.local_modes))
        if used != list(range(len(self.mode_shape))):
            raise InputError(f"layout {self}: each of the {len(self.mode_shape)} modes is spatial or local, once")
        self._dimensions()

    def _dimensions(self) -> list[tuple[int, int]]:
        """(dimension, stride in it) of every mode."""
        found: list[tuple[int, int]] = []
        at = 0
        for dimension, size in enumerate(self.shape):
            first, product = at, 1
            while product < size and at < len(self.mode_shape):
                product *= self.mode_shape[at]
                at += 1
            if product != size:
                raise InputError(f"modes {self.mode_shape} do not multiply to the shape {self.shape}")
            inner = [math.prod(self.mode_shape[mode + 1 : at]) for mode in range(first, at)]
            found += [(dimension, stride) for stride in inner]
        if at != len(self.mode_shape):
            raise InputError(f"modes {self.mode_shape} do not multiply to the shape {self.shape}")
        return found

    @property
    def num_threads(self) -> int:
        return math.prod(-mode if mode < 0 else self.mode_shape[mode] for mode in self.spatial_modes)

    @property
    def num_slots(self) -> int:
        return math.prod(self.mode_shape[mode] for mode in self.local_modes)

    @property
    def replicas(self) -> int:
        """Threads that hold each element."""
        return math.prod(-mode for mode in self.spatial_modes if mode < 0)

    def spatial_entries(self) -> list[Entry]:
        """Entries of the thread number, the slowest first."""
        where = self._dimensions()
        return [
            (REPLICATED, -mode, 0) if mode < 0 else (where[mode][0], self.mode_shape[mode], where[mode][1])
            for mode in self.spatial_modes
        ]

    def local_entries(self) -> list[Entry]:
        """Entries of the slot number, the slowest first."""
        where = self._dimensions()
        return [(where[mode][0], self.mode_shape[mode], where[mode][1]) for mode in self.local_modes]

    def thread_part(self) -> np.ndarray:
        """index(t, 0): int64 [threads, dimensions]."""
        return _parts(self)[0].copy()

    def slot_part(self) -> np.ndarray:
        """index(0, i): int64 [slots, dimensions]."""
        return _parts(self)[1].copy()

    def table(self) -> np.ndarray:
        """index(t, i): int64 [threads, slots, dimensions]."""
        return self.thread_part()[:, None, :] + self.slot_part()[None, :, :]

    def flat_table(self) -> np.ndarray:
        """Row-major number of the element at (t, i): int64 [threads, slots]."""
        strides = np.asarray(row_major(self.shape), np.int64)
        flat: np.ndarray = self.table() @ strides
        return flat

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(threads, slot) of each element in row-major order: int64 [elements, replicas] and int64 [elements]."""
        flat = self.flat_table()
        order = np.argsort(flat, axis=None, kind="stable").reshape(math.prod(self.shape), self.replicas)
        thread, slot = np.divmod(order, self.num_slots)
        return np.sort(thread, axis=1), slot[:, 0]

    def canonical(self) -> Layout:
        """The one form of all layouts that map alike: neighbouring modes that count on as one are merged."""
        return build(self.shape, _merged(self.spatial_entries()), _merged(self.local_entries()))

    def same_as(self, other: Layout) -> bool:
        """Whether both map every (thread, slot) to the same element."""
        return self.canonical() == other.canonical()

    # -- operations ---------------------------------------------------------------------------------------------------

    def compose(self, inner: Layout) -> Layout:
        """self . inner: every element of self becomes a tile of `inner`."""
        if len(self.shape) != len(inner.shape):
            raise InputError(f"layouts of {len(self.shape)} and {len(inner.shape)} dimensions do not compose")
        shape = tuple(a * b for a, b in zip(self.shape, inner.shape, strict=True))

        def outer(entries: list[Entry]) -> list[Entry]:
            return [(d, n, stride * inner.shape[d]) if d >= 0 else (d, n, 0) for d, n, stride in entries]

        return build(
            shape,
            outer(self.spatial_entries()) + inner.spatial_entries(),
            outer(self.local_entries()) + inner.local_entries(),
        )

    def divide(self, inner: Layout) -> Layout:
        """The layout f with f . inner = self; InputError where there is none."""
        if len(self.shape) != len(inner.shape) or any(a % b for a, b in zip(self.shape, inner.shape, strict=True)):
            raise InputError(f"shape {self.shape} is no multiple of {inner.shape}")
        shape = tuple(a // b for a, b in zip(self.shape, inner.shape, strict=True))
        parts = []
        for whole, part in (
            (self.spatial_entries(), inner.spatial_entries()),
            (self.local_entries(), inner.local_entries()),
        ):
            rest = _without_tail(_merged(whole), _merged(part))
            for d, n, stride in rest:
                if d >= 0 and stride % inner.shape[d]:
                    raise InputError(f"{self} is no multiple of {inner}: a mode of {n} is inside its tile")
            parts.append([(d, n, stride // inner.shape[d]) if d >= 0 else (d, n, 0) for d, n, stride in rest])
        return build(shape, *parts)

    def concat(self, other: Layout) -> Layout:
        """Product over the dimensions of both: index = (self(t div T, i div m), other(t mod T, i mod m))."""
        ahead = len(self.shape)

        def moved(entries: list[Entry]) -> list[Entry]:
            return [(d + ahead if d >= 0 else d, n, stride) for d, n, stride in entries]

        return build(
            self.shape + other.shape,
            self.spatial_entries() + moved(other.spatial_entries()),
            self.local_entries() + moved(other.local_entries()),
        )

    def reduce(self, dimensions: Sequence[int]) -> Layout:
        """What is left where these dimensions become 1: their threads hold the same, their slots go."""
        gone = _checked(dimensions, len(self.shape))
        spatial = [(REPLICATED, n, 0) if d in gone else (d, n, s) for d, n, s in self.spatial_entries()]
        local = [entry for entry in self.local_entries() if entry[0] not in gone]
        return build(tuple(1 if d in gone else n for d, n in enumerate(self.shape)), spatial, local)

    def permute(self, order: Sequence[int]) -> Layout:
        """Dimension d of the result is dimension order[d] of this layout."""
        if sorted(order) != list(range(len(self.shape))):
            raise InputError(f"{list(order)} is no order of {len(self.shape)} dimensions")
        new = {old: at for at, old in enumerate(order)} | {REPLICATED: REPLICATED}

        def moved(entries: list[Entry]) -> list[Entry]:
            return [(new[d], n, stride) for d, n, stride in entries]

        return build(
            tuple(self.shape[old] for old in order), moved(self.spatial_entries()), moved(self.local_entries())
        )

    def reshape(self, shape: Sequence[int]) -> Layout:
        """The same elements in row-major order under another shape; InputError where a mode would be cut unevenly."""
        if math.prod(shape) != math.prod(self.shape):
            raise InputError(f"shape {self.shape} has not the elements of {tuple(shape)}")
        old, new = row_major(self.shape), row_major(shape)

        def cut(entries: list[Entry]) -> list[Entry]:
            found: list[Entry] = []
            for d, n, stride in entries:
                if d < 0:
                    found.append((d, n, stride))
                else:
                    found += _pieces(n, stride * old[d], new, shape)
            return found

        return build(tuple(shape), cut(self.spatial_entries()), cut(self.local_entries()))

    def flatten(self) -> Layout:
        """One dimension."""
        return self.reshape((math.prod(self.shape),))

    def squeeze(self, dimension: int) -> Layout:
        """Without a dimension of size 1."""
        if self.shape[dimension] != 1:
            raise InputError(f"dimension {dimension} of {self.shape} is not 1")
        return self.reshape(tuple(n for d, n in enumerate(self.shape) if d != dimension % len(self.shape)))

    def unsqueeze(self, dimension: int) -> Layout:
        """With one more dimension of size 1, before `dimension`."""
        return self.reshape((*self.shape[:dimension], 1, *self.shape[dimension:]))


# -- primitives ------------------------------------------------------------------------------------------------------


def local(*shape: int) -> Layout:
    """One thread holds all, row-major."""
    return build(shape, [], [(d, n, 1) for d, n in enumerate(shape)])


def column_local(*shape: int) -> Layout:
    """One thread holds all, the first dimension fastest."""
    return build(shape, [], [(d, n, 1) for d, n in reversed(list(enumerate(shape)))])


def spatial(*shape: int) -> Layout:
    """One element per thread, row-major."""
    return build(shape, [(d, n, 1) for d, n in enumerate(shape)], [])


def column_spatial(*shape: int) -> Layout:
    """One element per thread, the first dimension fastest."""
    return build(shape, [(d, n, 1) for d, n in reversed(list(enumerate(shape)))], [])


def replicated(threads: int, rank: int) -> Layout:
    """One element that all threads hold."""
    return build((1,) * rank, [(REPLICATED, threads, 0)], [])


# -- working on entries ----------------------------------------------------------------------------------------------


def build(shape: Sequence[int], spatial_entries: list[Entry], local_entries: list[Entry]) -> Layout:
    """The layout of these entries; InputError where they do not count each element once."""
    return _build(tuple(shape), tuple(spatial_entries), tuple(local_entries))


@lru_cache(maxsize=4096)
def _build(shape: tuple[int, ...], spatial_entries: tuple[Entry, ...], local_entries: tuple[Entry, ...]) -> Layout:
    kept = [[entry for entry in entries if entry[1] > 1] for entries in (spatial_entries, local_entries)]
    modes = sorted(
        ((d, -stride, n) for entries in kept for d, n, stride in entries if d >= 0),
    )
    number = {(d, n, -negative): at for at, (d, negative, n) in enumerate(modes)}
    for dimension, size in enumerate(shape):
        stride = 1
        for d, negative, n in reversed(modes):
            if d == dimension:
                if -negative != stride:
                    raise InputError(f"modes of dimension {dimension} leave gaps: stride {-negative}, not {stride}")
                stride *= n
        if stride != size:
            raise InputError(f"modes of dimension {dimension} count {stride} elements of {size}")
    return Layout(
        shape,
        tuple(n for _, _, n in modes),
        tuple(-n if d < 0 else number[d, n, stride] for d, n, stride in kept[0]),
        tuple(number[entry] for entry in kept[1]),
    )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major array, in elements."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


@lru_cache(maxsize=1024)
def _parts(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    rank = len(layout.shape)
    return _counted(layout.spatial_entries(), rank), _counted(layout.local_entries(), rank)


def _counted(entries: list[Entry], rank: int) -> np.ndarray:
    """Index of every number that these entries are the digits of."""
    total = math.prod(n for _, n, _ in entries)
    found = np.zeros((total, rank), np.int64)
    numbers = np.arange(total)
    for d, n, stride in reversed(entries):
        numbers, digit = np.divmod(numbers, n)
        if d >= 0:
            found[:, d] += digit * stride
    return found


def _merged(entries: list[Entry]) -> list[Entry]:
    found: list[Entry] = []
    for d, n, stride in entries:
        if n == 1:
            continue
        if found and found[-1][0] == d and (d < 0 or found[-1][2] == stride * n):
            found[-1] = (d, found[-1][1] * n, stride)
        else:
            found.append((d, n, stride))
    return found


def _without_tail(whole: list[Entry], tail: list[Entry]) -> list[Entry]:
    rest = list(whole)
    for d, n, stride in reversed(tail):
        if not rest or rest[-1][0] != d or rest[-1][2] != stride or rest[-1][1] % n:
            raise InputError(f"entries {whole} do not end in {tail}")
        _, size, _ = rest.pop()
        if size > n:
            rest.append((d, size // n, stride * n if d >= 0 else 0))
    return rest


def _pieces(size: int, stride: int, strides: Sequence[int], shape: Sequence[int]) -> list[Entry]:
    """A mode of the flattened tile, cut where dimensions of the new shape end; the slowest piece first."""
    found: list[Entry] = []
    for d in reversed(range(len(shape))):
        end = strides[d] * shape[d]
        if size > 1 and strides[d] <= stride < end:
            room = end // stride
            n = min(size, room)
            if stride % strides[d] or size % n or end % stride:
                raise InputError(f"a mode of {size} does not split over the shape {tuple(shape)}")
            found.insert(0, (d, n, stride // strides[d]))
            size, stride = size // n, stride * n
    if size > 1:
        raise InputError(f"a mode of {size} does not split over the shape {tuple(shape)}")
    return found


def _checked(dimensions: Sequence[int], rank: int) -> set[int]:
    if any(not 0 <= d < rank for d in dimensions):
        raise InputError(f"dimensions {list(dimensions)} of a tile with {rank}")
    return set(dimensions)


# -- fragments of the matrix instruction m16n8k16 (operands of 16 bits, sums of 32), as the PTX manual draws them -----

MMA_M, MMA_N, MMA_K = 16, 8, 16
MMA_A = column_local(2, 2).compose(spatial(8, 4)).compose(local(1, 2))
MMA_B = local(2, 1).compose(column_spatial(4, 8)).compose(local(2, 1))
MMA_C = local(2, 1).compose(spatial(8, 4)).compose(local(1, 2))
