"""Carries out any cascade of extended Einsums in NumPy: what its formulas say, before anybody writes a kernel.

Einsums run over whole arrays. Those of an iteration that depend on each other run step by step, and end with the rank,
or earlier where a `stop` holds for all points. Sums of plain products go through `numpy.einsum`, that is, BLAS.

Shapes: an input has an axis for each of its indices; what is written step by step has one step more, its first value.
A rank that is split is padded to whole tiles: what lies in the padding is written as zero and reduced as the
reduction's neutral value, so a short last tile changes nothing.

Cost: an Einsum that is no product holds an array of all its points while it runs; `MOST_BYTES` bounds it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.hardware.units import format_bytes
from memwall.simulate.einsum import Call, Einsum, Expression, Index, Number, Read, Size, Step, walk
from memwall.simulate.einsum_cascade import Cascade

MOST_BYTES = 1 << 31
REDUCE: dict[str, tuple[Any, float]] = {
    "sum": (np.sum, 0.0), "max": (np.max, -math.inf), "min": (np.min, math.inf), "prod": (np.prod, 1.0),
}  # fmt: skip
MAPS: dict[str, Any] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "max": np.maximum, "min": np.minimum,
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "square": np.square, "abs": np.abs, "tanh": np.tanh,
    "neg": np.negative, "rsqrt": lambda x: 1 / np.sqrt(x), "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}  # fmt: skip
COMPARE: dict[str, Any] = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


def sizes_of(
    cascade: Cascade, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Sizes of all ranks, from the shapes of the inputs and those that are given (tiles, steps).

    InputError for an input that is missing, has other axes, or disagrees with another, and for a rank of no size.
    """
    found: dict[str, int] = {}

    def settle(rank: str, size: int, where: str) -> None:
        if size < 1:
            raise InputError(f"{where}: rank {rank} has {size} points; 1 is the least")
        if found.setdefault(rank, size) != size:
            raise InputError(f"{where}: rank {rank} has {size} points, and {found[rank]} elsewhere")

    for rank, size in (sizes or {}).items():
        if rank not in cascade.ranks and cascade.split_of(rank) is None:
            raise InputError(f"no rank {rank!r} to have {size} points; there are {', '.join(cascade.ranks)}")
        settle(rank, size, "sizes")
    missing = [name for name in cascade.inputs if name not in shapes]
    if missing:
        raise InputError(f"inputs {', '.join(missing)} are missing; they are {', '.join(cascade.inputs)}")
    for name in shapes:
        if name not in cascade.inputs:
            raise InputError(f"{name} is no input; they are {', '.join(cascade.inputs)}")
    for read in cascade.reads:
        if read.tensor not in cascade.inputs:
            continue
        shape = shapes[read.tensor]
        if len(shape) != len(read.indices):
            raise InputError(f"{read.tensor} has shape {shape}; {read} wants {len(read.indices)} axes")
        for index, size in zip(read.indices, shape, strict=True):
            settle(cascade.whole(index), size, read.tensor)
    for split in cascade.splits:
        if split.whole in found and split.inner in found:
            settle(split.outer, -(-found[split.whole] // found[split.inner]), str(split))
    unknown = [rank for rank in cascade.ranks if rank not in found]
    if unknown:
        raise InputError(f"sizes of {', '.join(unknown)} are wanted: no input has them")
    return found


def run_cascade(
    cascade: Cascade, inputs: Mapping[str, Any], sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """All tensors that a cascade writes. inputs: arrays by name, of one float type, which results have too; sizes: of
    ranks that no input has, such as tiles.

    InputError as `sizes_of`, and where an Einsum's points would not fit `MOST_BYTES`.
    """
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    dtype = np.result_type(np.float32, *arrays.values())
    found = sizes_of(cascade, {name: array.shape for name, array in arrays.items()}, sizes)
    return _Run(cascade, found, {name: array.astype(dtype, copy=False) for name, array in arrays.items()}, dtype).all()


class _Run:
    """One execution. at: steps of the iteration that is going on, by rank; ended: steps that iterations took."""

    def __init__(self, cascade: Cascade, sizes: dict[str, int], arrays: dict[str, np.ndarray], dtype: np.dtype) -> None:
        self.cascade, self.sizes, self.dtype = cascade, sizes, dtype
        self.arrays = arrays
        self.at: dict[str, int] = {}
        self.masks: dict[frozenset[str], tuple[str, str, np.ndarray]] = {}
        for split in cascade.splits:
            outer, inner = sizes.get(split.outer, 1), sizes.get(split.inner, 1)
            if split.whole in sizes and outer * inner != sizes[split.whole]:
                mask = np.arange(outer * inner).reshape(outer, inner) < sizes[split.whole]
                self.masks[frozenset((split.outer, split.inner))] = (split.outer, split.inner, mask)

    def all(self) -> dict[str, np.ndarray]:
        with np.errstate(all="ignore"):  # what a formula makes of zero and infinity is its own affair
            for group in self.cascade.order:
                if any(einsum.step is not None for einsum in group):
                    self._iterate(group)
                else:
                    self._write(group[0])
        return {name: self.arrays[name] for name in self.cascade.writers}

    def _iterate(self, group: tuple[Einsum, ...]) -> None:
        rank = next(einsum.step for einsum in group if einsum.step is not None)
        assert rank is not None
        steps = self.sizes[rank]
        stops = [stop for stop in self.cascade.stops if stop.rank == rank]
        for einsum in group:
            if einsum.step is None:
                self.arrays[einsum.name] = np.zeros([self.sizes[each] for each in einsum.out.ranks], self.dtype)
        for step in range(steps):
            self.at[rank] = step
            for einsum in group:
                self._write(einsum)
            if stops and all(self._holds(stop.left, stop.comparison, stop.right) for stop in stops):
                steps = step + 1
                break
        del self.at[rank]
        if steps < self.sizes[rank]:
            self._shorten(rank, steps)

    def _shorten(self, rank: str, steps: int) -> None:
        """An iteration ended early: the rank has so many points from now on, in whatever has been made."""
        self.sizes[rank] = steps
        for name in self.arrays:
            axes = self._axes(name)
            if rank in axes:
                axis = axes.index(rank)
                length = steps + (self.cascade.iterative.get(name) == axis)
                self.arrays[name] = self.arrays[name].take(range(length), axis)

    def _axes(self, name: str) -> tuple[str, ...]:
        writers = self.cascade.writers.get(name)
        return self.cascade.axes(writers[0]) if writers else self.cascade.inputs[name]

    def _holds(self, left: Expression, comparison: str, right: Expression) -> bool:
        space = tuple(dict.fromkeys(rank for side in (left, right) for rank in _free(side) if rank not in self.at))
        sides = (self._value(left, space), self._value(right, space))
        return bool(np.all(COMPARE[comparison](*sides)))

    # ---- one Einsum ----

    def _write(self, einsum: Einsum) -> None:
        out = tuple(rank for rank in einsum.out.ranks if rank not in self.at)
        space = tuple(rank for rank in einsum.space if rank not in self.at)
        if einsum.starts:
            # a first value has all axes but that of the steps
            axes = tuple(rank for rank, index in zip(self._axes(einsum.name), einsum.out.indices, strict=True)
                         if not index.first)  # fmt: skip
            value = np.broadcast_to(self._value(einsum.value, axes), [self.sizes[rank] for rank in axes])
        else:
            value = self._reduced(einsum, space, out)
        steps = self.cascade.iterative.get(einsum.name)
        if steps is None and not self.at:
            self.arrays[einsum.name] = np.asarray(value, self.dtype, order="C")
            return
        if steps is not None and einsum.name not in self.arrays:
            axes = self._axes(einsum.name)
            shape = [self.sizes[rank] + (axis == steps) for axis, rank in enumerate(axes)]
            self.arrays[einsum.name] = np.zeros(shape, self.dtype)
        place = tuple(0 if index.first else self._along(index) for index in einsum.out.indices)
        self.arrays[einsum.name][place] = value

    def _along(self, index: Index) -> int | slice:
        """An axis that is written: the step that is going on, or all of it."""
        return self.at[index.rank] + index.ahead if index.rank in self.at else slice(None)

    def _reduced(self, einsum: Einsum, space: tuple[str, ...], out: tuple[str, ...]) -> np.ndarray:
        masks = [mask for ranks, mask in self.masks.items() if ranks <= set(einsum.space)]
        product = _factors(einsum.value)
        if einsum.reduction == "sum" and len(space) > len(out) and product is not None:
            covered = all(any({mask[0], mask[1]} <= set(read.ranks) for read in product) for mask in masks)
            if covered and len(space) <= len(string.ascii_letters):
                self._check_size(einsum, out)
                return self._masked(self._contract(product, space, out), einsum, out, 0.0)
        self._check_size(einsum, space)
        value = np.broadcast_to(self._value(einsum.value, space), [self.sizes[rank] for rank in space])
        if len(space) == len(out):
            return self._masked(value, einsum, out, 0.0)
        reduce, neutral = REDUCE[einsum.reduction]
        value = self._masked(value, einsum, space, neutral)
        return self._masked(reduce(value, axis=tuple(range(len(out), len(space)))), einsum, out, 0.0)

    def _masked(self, value: np.ndarray, einsum: Einsum, axes: tuple[str, ...], fill: float) -> np.ndarray:
        """A value with what lies in a short tile's padding replaced; the step of an iteration picks a tile."""
        for outer, inner, mask in self.masks.values():
            if {outer, inner} <= {*axes, *self.at} and {outer, inner} <= set(einsum.space):
                kept = mask[self.at[outer]] if outer in self.at else mask
                kept = kept[..., self.at[inner]] if inner in self.at else kept
                ranks = [rank for rank in (outer, inner) if rank not in self.at]
                if kept.all() or not ranks:
                    continue
                value = np.where(_aligned(kept, ranks, axes), value, value.dtype.type(fill))
        return value

    def _contract(self, product: list[Read], space: tuple[str, ...], out: tuple[str, ...]) -> np.ndarray:
        letters = dict(zip(space, string.ascii_letters, strict=False))
        terms, arrays = [], []
        for read in product:
            array, ranks = self._load(read)
            terms.append("".join(letters[rank] for rank in ranks))
            arrays.append(array)
        formula = f"{','.join(terms)}->{''.join(letters[rank] for rank in out)}"
        return np.einsum(formula, *arrays, optimize=("greedy", MOST_BYTES // self.dtype.itemsize))

    def _check_size(self, einsum: Einsum, space: tuple[str, ...]) -> None:
        """Refuses points, or results, of these ranks that are too many."""
        needed = math.prod(self.sizes[rank] for rank in space) * self.dtype.itemsize
        if needed > MOST_BYTES:
            raise InputError(
                f"{einsum}: its points would take {format_bytes(needed)} at once; {format_bytes(MOST_BYTES)} are the "
                "most: take smaller sizes"
            )

    # ---- values ----

    def _value(self, value: Expression, space: tuple[str, ...]) -> Any:
        """A value over the ranks of a space, of shape that broadcasts to it."""
        if isinstance(value, Number):
            return self.dtype.type(value.value)
        if isinstance(value, Size):
            return self.dtype.type(self.sizes[value.rank])
        if isinstance(value, Step):
            if value.rank in self.at:
                return self.dtype.type(self.at[value.rank])
            return _aligned(np.arange(self.sizes[value.rank], dtype=self.dtype), [value.rank], space)
        if isinstance(value, Read):
            array, ranks = self._load(value)
            return _aligned(array, ranks, space)
        return MAPS[value.name](*(self._value(each, space) for each in value.arguments))

    def _load(self, read: Read) -> tuple[np.ndarray, list[str]]:
        """What an access names: a view where it can be, and the ranks of its axes."""
        array = self.arrays[read.tensor]
        place: list[int | slice] = []
        ranks: list[str] = []
        for axis, index in enumerate(read.indices):
            carried = self.cascade.iterative.get(read.tensor) == axis
            if index.first or index.last:
                place.append(0 if index.first else self.sizes[index.rank])
            elif index.split is None and index.rank in self.at:
                place.append(self.at[index.rank] + index.ahead)
            elif index.split is None:
                start = int(index.ahead)
                place.append(slice(start, start + self.sizes[index.rank]) if carried else slice(None))
                ranks.append(index.rank)
            else:
                array = self._tiled(array, len(place), index)
                for rank in index.split:
                    place.append(self.at[rank] if rank in self.at else slice(None))
                    ranks += [rank] * (rank not in self.at)
        return array[tuple(place)], ranks

    def _tiled(self, array: np.ndarray, axis: int, index: Index) -> np.ndarray:
        """An input with an axis cut in tiles, zeros in the padding."""
        assert index.split is not None
        outer, inner = (self.sizes[rank] for rank in index.split)
        short = outer * inner - array.shape[axis]
        if short > 0:
            array = np.pad(array, [(0, short if each == axis else 0) for each in range(array.ndim)])
        return array.reshape(*array.shape[:axis], outer, inner, *array.shape[axis + 1 :])


def _aligned(array: np.ndarray, ranks: list[str], space: tuple[str, ...]) -> np.ndarray:
    """Axes in the order of a space, of length 1 where they are missing."""
    ordered = array.transpose([ranks.index(rank) for rank in space if rank in ranks])
    return ordered[tuple(slice(None) if rank in ranks else None for rank in space)]


def _factors(value: Expression) -> list[Read] | None:
    """The tensors of a plain product, None for anything else."""
    parts = list(walk(value))
    if any(not isinstance(each, Read) and not (isinstance(each, Call) and each.name == "*") for each in parts):
        return None
    return [each for each in parts if isinstance(each, Read)]


def _free(value: Expression) -> list[str]:
    return [rank for each in walk(value) if isinstance(each, Read | Step)
            for rank in (each.ranks if isinstance(each, Read) else (each.rank,))]  # fmt: skip
