"""Where a tensor lies in its storage, and which copies, views and clamps made it: what `saved_tensors_torch` shares by.

Views are not done again one by one: sizes, strides and offset say what any chain of them comes to. Copies and clamps
leave the storage; their history is read from autograd's graph, with what it keeps of each operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[Tensor], Tensor]
"""An operation that is done again, on the values of the tensor it was done on."""


@dataclass(frozen=True, slots=True)
class Place:
    """Sizes, strides and offset of a tensor in its storage, in elements; low, high: the elements it reaches."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Place:
        return Place(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @property
    def high(self) -> int:
        """One past the last element."""
        steps = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return self.offset + steps + 1 if math.prod(self.sizes) else self.offset

    @property
    def is_dense(self) -> bool:
        """Whether it reaches each element from the offset to `high` once."""
        return (
            self.high - self.offset == math.prod(self.sizes)
            and all(stride > 0 for size, stride in zip(self.sizes, self.strides, strict=True) if size > 1)
            and _covers_all(self)
        )

    def covers(self, other: Place) -> bool:
        """Whether what is kept of this place holds the other."""
        return self == other or (self.is_dense and self.offset <= other.offset and other.high <= self.high)

    def within(self, flat: Tensor, kept: Place) -> Tensor:
        """This place out of what is kept of another that covers it, in memory order [n]."""
        if not kept.is_dense:
            return flat.view(self.sizes)
        return flat.as_strided(self.sizes, self.strides, self.offset - kept.offset)


def _covers_all(place: Place) -> bool:
    """No two indices meet: going up by strides, each is as long as all before it."""
    length = 1
    for stride, size in sorted((t, s) for s, t in zip(place.sizes, place.strides, strict=True) if s > 1):
        if stride != length:
            return False
        length *= size
    return True


def memory_order(values: Tensor, place: Place) -> tuple[Tensor, Place]:
    """A tensor's elements [n] as they lie in memory (with gaps: as they are counted), and the place they keep."""
    if place.is_dense:
        return values.as_strided((values.numel(),), (1,), place.offset), place
    return values.reshape(-1), place


@dataclass(frozen=True, slots=True)
class Origin:
    """An operation whose `output` a tensor was made of by values alone. replay: what is done to it again to get the
    tensor. saved: whether the operation that took it keeps it, so that it was offered to be saved at that moment.
    """

    node: Any
    output: int
    replay: tuple[Replay, ...]
    saved: bool


def history(tensor: Tensor, hops: int) -> Iterator[Origin]:
    """Where a tensor comes from, nearest first, at most so many hops back."""
    node, output, sizes = tensor.grad_fn, tensor.output_nr, tuple(tensor.shape)
    steps: tuple[Replay, ...] = ()
    for _ in range(hops):
        if node is None or output != 0:
            return
        known = _replay(node, sizes)
        if known is None:
            return
        step, sizes = known
        steps = (step, *steps)
        saved = node.name().startswith("Clamp")
        node, output = node.next_functions[0]
        if node is not None:
            yield Origin(node, output, steps, saved)


def _replay(node: Any, sizes: tuple[int, ...]) -> tuple[Replay, tuple[int, ...]] | None:
    """What an operation does, and the sizes of what it does it to; None for one that is more than values moved.

    sizes: of its output.
    """
    name = node.name().rstrip("0123456789")
    if name == "CloneBackward":
        return lambda x: x, sizes
    if name == "TBackward":
        return lambda x: x.t(), sizes[::-1]
    if name == "TransposeBackward":
        first, second = (_signed(each, len(sizes)) for each in (node._saved_dim0, node._saved_dim1))
        swapped = list(sizes)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        return lambda x: x.transpose(first, second), tuple(swapped)
    if name == "PermuteBackward":
        dims = tuple(_signed(each, len(sizes)) for each in node._saved_dims)
        before = [0] * len(sizes)
        for at, dim in enumerate(dims):
            before[dim] = sizes[at]
        return lambda x: x.permute(dims), tuple(before)
    if name in ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward"):
        return lambda x: x.reshape(sizes), tuple(int(each) for each in node._saved_self_sym_sizes)
    if name == "ClampBackward":
        low, high = node._saved_min, node._saved_max
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return None
        return lambda x: torch.clamp(x, min=low, max=high), sizes
    if name == "ClampMinBackward":
        least = node._saved_min
        return (lambda x: torch.clamp(x, min=least)), sizes
    return None


def _signed(dim: int, count: int) -> int:
    """A dimension counted from the front: autograd's notes hold negative ones as unsigned 64-bit numbers."""
    if dim >= 1 << 63:
        dim -= 1 << 64
    return dim % count
