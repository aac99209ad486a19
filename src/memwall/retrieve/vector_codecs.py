"""Element types of stored vectors: how one number of a vector becomes 1 to 32 bits, and how rows of them are scored.

    name             bits  what a number becomes
    float32, float16, bfloat16
    e4m3, e5m2          8  the nearest 8-bit float, ties to even, no scale; what is too large becomes the largest
    e2m1                4  the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives, no scale
    e2m1-vector         4  the same of x times 6 over its vector's largest magnitude (a float16 a vector beside)
    e2m1-dimension      4  the same of x times 6 over its dimension's largest magnitude in what was fitted
    int8                8  the nearest of 256 steps from its dimension's least to its largest number in what was fitted;
                           numbers outside are clipped; scored as the numbers they stand for
    int8-paper          8  the same steps counted towards zero, modulo 256 outside, scored as bare codes of 0 to 255
    binary              1  1 where x > 0, scored as vectors of 0 and 1
    signs               1  the same bits, scored as vectors of -1 and 1

Floats and minifloats are those of `memwall.formats`. `int8-paper` is what the released code of arXiv 2505.00105 does
by way of sentence-transformers' `quantize_embeddings`, whose cast to uint8 counts towards zero and takes what is left
modulo 256; a number just below the least is 0, one further below is 255 or less.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.base import PLAIN_BUFFER, Packed
from memwall.formats.bitpack import pack_rows, row_bytes, unpack_rows
from memwall.kernels.row_scores import bit_scores, padded, row_scores

Arrays = Mapping[str, np.ndarray]
STEPS = 255
E2M1_LARGEST = np.float32(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorCodec(ABC):
    """One element type. What is stored: `rows`, uint8 [n, row_bytes(m)], and for some `scales`, float16 [n]."""

    name: str
    bits: int

    fitted: ClassVar[bool] = False
    """Whether `tables` must be learned from vectors."""
    only_cosine: ClassVar[bool] = False
    """Whether inner products of what it stores mean nothing."""
    scale_bytes: ClassVar[int] = 0
    """Bytes beside each vector's row."""

    def row_bytes(self, m: int) -> int:
        """Bytes of a vector's row, the last byte filled up."""
        return row_bytes(m, self.bits) if self.bits <= 8 else m * self.bits // 8

    def vector_bytes(self, m: int) -> int:
        """All bytes of one vector."""
        return self.row_bytes(m) + self.scale_bytes

    def tables(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """float32 tables [m] learned from x [n, m]; none for most."""
        return {}

    def table_shapes(self, m: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tables."""
        return {}

    @abstractmethod
    def encode(self, x: np.ndarray, tables: Arrays) -> dict[str, np.ndarray]:
        """float32 [n, m] -> what is stored."""

    @abstractmethod
    def decode(self, stored: Arrays, m: int, tables: Arrays) -> np.ndarray:
        """What is stored -> the float32 [n, m] that scores are made of."""

    @abstractmethod
    def scores(self, stored: Arrays, m: int, tables: Arrays, queries: np.ndarray, *, cosine: bool) -> np.ndarray:
        """float32 [q, n] of `queries` [q, m], decoded ones, with rows as they are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats(VectorCodec):
    """Floats and minifloats without a scale. form: of `memwall.formats`."""

    form: str

    def encode(self, x: np.ndarray, tables: Arrays) -> dict[str, np.ndarray]:
        buffers = codec(self.form).encode(x).buffers
        if PLAIN_BUFFER in buffers:
            held = np.ascontiguousarray(buffers[PLAIN_BUFFER]).view(np.uint8)
            return {"rows": held.reshape(len(x), self.row_bytes(x.shape[1]))}
        return {"rows": buffers["codes"]}

    def decode(self, stored: Arrays, m: int, tables: Arrays) -> np.ndarray:
        rows, form = stored["rows"], codec(self.form)
        ((buffer, (shape, dtype)),) = form.buffers((len(rows), m)).items()
        held = np.ascontiguousarray(rows).view(dtype).reshape(shape)
        found: np.ndarray = form.decode(Packed(spec=form.spec, shape=(len(rows), m), buffers={buffer: held}))
        return found

    def scores(self, stored: Arrays, m: int, tables: Arrays, queries: np.ndarray, *, cosine: bool) -> np.ndarray:
        return row_scores(self.form.removesuffix("-raw"), m, stored["rows"], padded(queries), cosine=cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorScaled(Floats):
    """E2M1 with a scale of each vector."""

    scale_bytes: ClassVar[int] = 2

    def encode(self, x: np.ndarray, tables: Arrays) -> dict[str, np.ndarray]:
        scales = (np.abs(x).max(axis=1, initial=0) / E2M1_LARGEST).astype(np.float16)
        held = scales.astype(np.float32)[:, None]
        levels = np.divide(x, held, out=np.zeros_like(x), where=held > 0)
        return {**Floats.encode(self, levels, tables), "scales": scales}

    def decode(self, stored: Arrays, m: int, tables: Arrays) -> np.ndarray:
        return Floats.decode(self, stored, m, tables) * stored["scales"].astype(np.float32)[:, None]

    def scores(self, stored: Arrays, m: int, tables: Arrays, queries: np.ndarray, *, cosine: bool) -> np.ndarray:
        found = Floats.scores(self, stored, m, tables, queries, cosine=cosine)
        return found if cosine else found * stored["scales"].astype(np.float32)  # of directions, lengths are no part


@dataclass(frozen=True, slots=True, kw_only=True)
class DimensionScaled(Floats):
    """E2M1 with a step for each dimension."""

    fitted: ClassVar[bool] = True

    def tables(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {"step": np.abs(x).max(axis=0) / E2M1_LARGEST}

    def table_shapes(self, m: int) -> dict[str, tuple[int, ...]]:
        return {"step": (m,)}

    def encode(self, x: np.ndarray, tables: Arrays) -> dict[str, np.ndarray]:
        step = tables["step"]
        return Floats.encode(self, np.divide(x, step, out=np.zeros_like(x), where=step > 0), tables)

    def decode(self, stored: Arrays, m: int, tables: Arrays) -> np.ndarray:
        return Floats.decode(self, stored, m, tables) * tables["step"]

    def scores(self, stored: Arrays, m: int, tables: Arrays, queries: np.ndarray, *, cosine: bool) -> np.ndarray:
        step = padded(tables["step"])
        none = np.zeros_like(step)
        return row_scores("e2m1", m, stored["rows"], padded(queries), cosine=cosine, steps=step, offsets=none)


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers(VectorCodec):
    """256 steps between a dimension's least and largest number, clipped, rounded and mapped back."""

    fitted: ClassVar[bool] = True

    def tables(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {"least": x.min(axis=0), "largest": x.max(axis=0)}

    def table_shapes(self, m: int) -> dict[str, tuple[int, ...]]:
        return {"least": (m,), "largest": (m,)}

    def steps(self, tables: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Steps and least numbers, float32 [m]. A dimension that was always the same has a step of 0."""
        least: np.ndarray = tables["least"]
        return (tables["largest"] - least) / np.float32(STEPS), least

    def places(self, x: np.ndarray, tables: Arrays) -> np.ndarray:
        """Where numbers lie between 0 and 255 or outside, float32."""
        step, least = self.steps(tables)
        return np.divide(x - least, step, out=np.zeros_like(x), where=step > 0)

    def encode(self, x: np.ndarray, tables: Arrays) -> dict[str, np.ndarray]:
        return {"rows": np.rint(self.places(x, tables).clip(0, STEPS)).astype(np.uint8)}

    def decode(self, stored: Arrays, m: int, tables: Arrays) -> np.ndarray:
        step, least = self.steps(tables)
        return stored["rows"].astype(np.float32) * step + least

    def scores(self, stored: Arrays, m: int, tables: Arrays, queries: np.ndarray, *, cosine: bool) -> np.ndarray:
        step, least = self.steps(tables)
        steps, offsets = padded(step), padded(least)
        return row_scores("bytes", m, stored["rows"], padded(queries), cosine=cosine, steps=steps, offsets=offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperIntegers(Integers):
    """The same steps as the paper's released code uses them."""

    only_cosine: ClassVar[bool] = True

    def encode(self, x: np.ndarray, tables: Arrays) -> dict[str, np.ndarray]:
        # by way of 64-bit integers, whose low byte is taken: the cast of C is undefined outside 0 to 255
        return {"rows": self.places(x, tables).clip(-(2.0**62), 2.0**62).astype(np.int64).astype(np.uint8)}

    def decode(self, stored: Arrays, m: int, tables: Arrays) -> np.ndarray:
        return stored["rows"].astype(np.float32)

    def scores(self, stored: Arrays, m: int, tables: Arrays, queries: np.ndarray, *, cosine: bool) -> np.ndarray:
        return row_scores("bytes", m, stored["rows"], padded(queries), cosine=cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bits(VectorCodec):
    """x > 0, by counting equal bits."""

    only_cosine: ClassVar[bool] = True
    signs: bool

    def encode(self, x: np.ndarray, tables: Arrays) -> dict[str, np.ndarray]:
        return {"rows": np.ascontiguousarray(pack_rows((x > 0).astype(np.uint8), 1))}

    def decode(self, stored: Arrays, m: int, tables: Arrays) -> np.ndarray:
        ones = unpack_rows(stored["rows"], m, 1).astype(np.float32)
        return 2 * ones - 1 if self.signs else ones

    def scores(self, stored: Arrays, m: int, tables: Arrays, queries: np.ndarray, *, cosine: bool) -> np.ndarray:
        return bit_scores(m, stored["rows"], self.encode(queries, tables)["rows"], signs=self.signs)


VECTOR_CODECS: dict[str, VectorCodec] = {
    one.name: one
    for one in (
        Floats(name="float32", bits=32, form="float32"),
        Floats(name="float16", bits=16, form="float16"),
        Floats(name="bfloat16", bits=16, form="bfloat16"),
        Floats(name="e4m3", bits=8, form="e4m3-raw"),
        Floats(name="e5m2", bits=8, form="e5m2-raw"),
        Integers(name="int8", bits=8),
        PaperIntegers(name="int8-paper", bits=8),
        Floats(name="e2m1", bits=4, form="e2m1-raw"),
        VectorScaled(name="e2m1-vector", bits=4, form="e2m1-raw"),
        DimensionScaled(name="e2m1-dimension", bits=4, form="e2m1-raw"),
        Bits(name="binary", bits=1, signs=False),
        Bits(name="signs", bits=1, signs=True),
    )
}


def vector_codec(name: str) -> VectorCodec:
    """An element type by its name; InputError that says which there are."""
    if name not in VECTOR_CODECS:
        raise InputError(f"no element type {name!r}; there are {', '.join(VECTOR_CODECS)}")
    return VECTOR_CODECS[name]


def stored_arrays(one: VectorCodec, count: int, m: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of what is stored of `count` vectors."""
    found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {"rows": ((count, one.row_bytes(m)), np.dtype(np.uint8))}
    if one.scale_bytes:
        found["scales"] = ((count,), np.dtype(np.float16))
    return found
