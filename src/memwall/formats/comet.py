"""COMET's stored form: 4-bit weights in tiles, and for each block of columns the width that activations take there.

Source: "COMET: Towards Practical W4A4KV4 LLMs Serving" (Lian Liu, 2024, ASPLOS 2025, arXiv 2410.12168), fine-grained
mixed-precision quantization; no official code was found. `compress.comet` finds what is stored here, `kernels.comet`
says how it is multiplied.

Idea: 4-bit integers ruin activations where a channel is far larger than the rest. A product is cut along its inner
dimension in blocks; channels are put in an order that has the large ones together, and only the blocks that hold them
are multiplied with 8-bit activations. A width belongs to a block for all tokens, so blocks stay whole tiles.

Units and shapes: weights [rows, cols] as `int4` has them in groups of g columns (`formats.integer`), a group being a
block: codes from -8 to 7, a float16 scale per row and block, in tiles of 16 rows that serve both widths. Beside them
`wide` uint8 [blocks], 1 where activations are rounded to 8 bits and 0 where to 4, and with `-gather`, where the order
of the channels could not be folded into what produces them, `order` uint16 [cols]: the column at each stored place.
Specs: `comet`, `comet-g64`, `comet-g128-x3` (three wide blocks), `comet-g128-x3-gather`. By itself `encode` makes the
first blocks wide, where sorted channels have their largest.

Differs from the paper: nothing known; it leaves the layout of its tensor-core tiles to figures, here tiles are those
that a vector unit reads.
Cost: 4 + 16 / g bits per weight, a byte per block, 16 bits per column where gathered.
Holds when: at most 65,536 columns; weights inside float16 (as `int4`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed
from memwall.formats.bitpack import matrix_shape
from memwall.formats.integer import TILE_GROUPS, IntegerCodec

BLOCK = 128
MOST_COLUMNS = 1 << 16
_SPEC = re.compile(r"comet(?:-g(?P<group>[0-9]{1,4}))?(?:-x(?P<wide>[0-9]{1,4}))?(?P<gather>-gather)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class CometCodec(Codec):
    """group: columns of a block; wide: blocks that take 8-bit activations; gather: columns stand in another order."""

    examples: ClassVar[tuple[str, ...]] = ("comet", "comet-g64", "comet-g32-x1", "comet-g128-x2-gather")
    method: ClassVar[str | None] = "comet"

    group: int = BLOCK
    wide: int = 0
    gather: bool = False

    def __post_init__(self) -> None:
        if self.group not in TILE_GROUPS:
            raise InputError(f"{self.spec}: a block has 32, 64 or 128 columns, not {self.group}")

    @classmethod
    def parse(cls, spec: str) -> CometCodec:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(
                f"unknown format {spec!r}; mixed 4/8-bit activations are called comet, comet-g64, comet-g128-x3"
            )
        group, wide = int(match["group"] or BLOCK), int(match["wide"] or 0)
        return cls(group=group, wide=wide, gather=match["gather"] is not None)

    @property
    def spec(self) -> str:
        wide = f"-x{self.wide}" if self.wide else ""
        return f"comet-g{self.group}{wide}{'-gather' if self.gather else ''}"

    @property
    def label(self) -> str:
        return f"comet-g{self.group}"

    @property
    def timed(self) -> str:
        return replace(self, wide=0, gather=False).spec

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4

    @property
    def inner(self) -> IntegerCodec:
        """How the weights themselves are stored."""
        return IntegerCodec(bits=4, group=self.group)

    def blocks(self, columns: int) -> int:
        """Along a row."""
        return -(-columns // self.group)

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        _, columns = matrix_shape(self.spec, shape)
        if columns > MOST_COLUMNS:
            raise InputError(f"{self.spec} holds at most {MOST_COLUMNS} columns, got {columns}")
        found = {**self.inner.buffers(shape), "wide": ((self.blocks(columns),), np.dtype(np.uint8))}
        return {**found, "order": ((columns,), np.dtype(np.uint16))} if self.gather else found

    def encode(self, x: Any) -> Packed:
        packed = self.inner.encode(x)
        blocks = self.blocks(packed.shape[1])
        return self.around(packed, np.arange(blocks) < self.wide, np.arange(packed.shape[1]) if self.gather else None)

    def around(self, inner: Packed, wide: np.ndarray, order: np.ndarray | None = None) -> Packed:
        """Packed of weights that `inner` has encoded, with the widths of blocks [blocks] and the order of columns."""
        buffers = {**inner.buffers, "wide": np.ascontiguousarray(wide, np.uint8)}
        if order is not None:
            buffers["order"] = np.ascontiguousarray(order, np.uint16)
        return Packed(spec=self.spec, shape=inner.shape, buffers=buffers)

    def decode(self, packed: Packed) -> np.ndarray:
        stored = self.stored(packed)
        if not self.gather:
            return stored
        values = np.empty_like(stored)
        values[:, packed.buffers["order"]] = stored
        return values

    def stored(self, packed: Packed) -> np.ndarray:
        """float32 weights [rows, cols], columns in the order in which they are stored."""
        values: np.ndarray = self.inner.decode(weights_of(packed))
        return values


def weights_of(packed: Packed) -> Packed:
    """The 4-bit weights alone."""
    form = CometCodec.parse(packed.spec)
    buffers = {name: packed.buffers[name] for name in ("codes", "scales")}
    return Packed(spec=form.inner.spec, shape=packed.shape, buffers=buffers)


def with_wide(packed: Packed, wide: np.ndarray) -> Packed:
    """The same weights with other widths of blocks [blocks]; the spec says how many are wide."""
    form = replace(CometCodec.parse(packed.spec), wide=int(np.count_nonzero(wide)))
    return form.around(weights_of(packed), np.asarray(wide) != 0, packed.buffers.get("order"))


def check(packed: Packed) -> None:
    """InputError where widths or order of a packed matrix cannot be; asked before kernels read them."""
    form = CometCodec.parse(packed.spec)
    wide, order = packed.buffers["wide"], packed.buffers.get("order")
    if wide.max(initial=0) > 1 or int(wide.sum()) != min(form.wide, len(wide)):
        raise InputError(f"{packed.spec}: the widths of blocks must be 0 or 1, with {form.wide} ones")
    if order is not None and not np.array_equal(np.sort(order), np.arange(packed.shape[1])):
        raise InputError(f"{packed.spec}: the order of columns must name each once")
