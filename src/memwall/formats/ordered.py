"""Group-wise integers whose columns stand in an order of their own: what GPTQ's activation order makes.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Elias Frantar, 2022, arXiv
2210.17323); the order of columns is an option of its official code (github.com/IST-DASLab/gptq, `--act-order`), files
of others keep it as `g_idx` (`desc_act` in their settings).

Idea: columns that meet the largest inputs are rounded first, and a group is made of columns that were rounded one after
another, wherever they stand in the matrix. Stored in that order such groups are the groups of neighbours that products
read; what has to follow is the input, whose columns are gathered in that order while they are rounded to 8 bits, once
for all matrices that share an order.

Units and shapes: weights [rows, cols] as `formats.integer` has them in tiles, columns in stored order, and `order`
uint16 [cols] (uint32 above 65,536 columns): the column at each stored place. Specs: `ordered-int4-g64`,
`ordered-int3-g128-asym`. By itself `encode` keeps columns where they are.
Differs from the paper: nothing known; others keep a group's number per column and look scales up by it.
Cost: that of the integers and 16 bits a column: 16 / rows bits a weight.
Holds when: groups have 32, 64 or 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed
from memwall.formats.bitpack import matrix_shape
from memwall.formats.integer import IntegerCodec

PREFIX = "ordered-"
MOST_SHORT = 1 << 16
"""Columns that two bytes can name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedCodec(Codec):
    """inner: how the weights themselves are stored."""

    examples: ClassVar[tuple[str, ...]] = ("ordered-int4-g64", "ordered-int3-g32-asym", "ordered-int8-g128")
    method: ClassVar[str | None] = "gptq"

    inner: IntegerCodec

    def __post_init__(self) -> None:
        if self.inner.layout != "tiles":
            raise InputError(f"{self.spec}: columns in an order of their own are kept in tiles; leave out -rows")

    @classmethod
    def parse(cls, spec: str) -> OrderedCodec:
        name = spec.removeprefix(PREFIX)
        if name == spec or not name.startswith("int"):
            raise InputError(f"unknown format {spec!r}; integers with columns in another order are called {PREFIX}int4")
        return cls(inner=IntegerCodec.parse(name))

    @property
    def spec(self) -> str:
        return PREFIX + self.inner.spec

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.inner.bits

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.inner.group

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        _, columns = matrix_shape(self.spec, shape)
        return {**self.inner.buffers(shape), "order": ((columns,), _index_type(columns))}

    def encode(self, x: Any) -> Packed:
        packed = self.inner.encode(x)
        return self.around(packed, np.arange(packed.shape[1]))

    def around(self, inner: Packed, order: np.ndarray) -> Packed:
        """Packed of weights that `inner` holds with columns in stored order; order [cols]: the column at each place."""
        columns = inner.shape[1]
        if inner.spec != self.inner.spec or order.shape != (columns,):
            raise InputError(f"{self.spec}: {inner.spec} with an order of {order.size} does not fit {columns} columns")
        held = np.ascontiguousarray(order, _index_type(columns))
        return Packed(spec=self.spec, shape=inner.shape, buffers={**inner.buffers, "order": held})

    def decode(self, packed: Packed) -> np.ndarray:
        stored = self.inner.decode(weights_of(packed))
        values = np.empty_like(stored)
        values[:, packed.buffers["order"]] = stored
        return values


def weights_of(packed: Packed) -> Packed:
    """The integers alone, columns as they are stored."""
    form = OrderedCodec.parse(packed.spec)
    buffers = {name: packed.buffers[name] for name in form.inner.buffers(packed.shape)}
    return Packed(spec=form.inner.spec, shape=packed.shape, buffers=buffers)


def check(packed: Packed) -> None:
    """InputError where the order does not name each column once; asked before kernels read it."""
    if not np.array_equal(np.sort(packed.buffers["order"]), np.arange(packed.shape[1])):
        raise InputError(f"{packed.spec}: the order of columns must name each once")


def _index_type(columns: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if columns <= MOST_SHORT else np.uint32)
