"""VPTQ's stored form: an index for several rows of a column, codebooks per group of columns, residuals, outliers.

Source: "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models" (Yifei Liu, 2024, arXiv
2409.17066), sections 3 and 4; official code: github.com/microsoft/VPTQ. `compress.vptq` finds what is stored here.

Idea: one index of log2 k bits stands for `v` rows of one column, so two bits a weight buy 256 levels of four rows
instead of four levels of one. A second, residual codebook adds to the first; the columns that meet the largest inputs
may have a codebook of their own.

    weight[v r ... v r + v, place] = scale[place] * (centroid + residual) + offset[place]

Units and shapes: weights [rows, cols]; columns may be stored in another `order`; places of outlier columns come first.
Streams of indices: the low log2 k bits of an index name the centroid, the high log2 r bits the residual; the indices of
a row of vectors and a group of columns are one stream of bits, lowest first, padded to 32 bits.

    indices            uint32 [groups * ceil(rows / v) * words + 16]: streams [groups, rows of vectors, words]
    centroids          float16 [books * k * v + 16], residuals float16 [books * r * v + 16] (where `-r{r}`)
    outlier_indices, outlier_centroids    the same with one group (where `-o...`)
    order              uint16 or uint32 [cols]: the column that stands at each place (where `-ordered`)
    scale_and_offset   float16 [2, cols], by place (where `-norm`)

There is a book per group; with `-b16` one per group and 16 rows, all groups of the first 16 rows first (as palettes of
vectors of one row have it, `compress.edkm`).

Differs from the paper: 64 bytes behind the indices and 32 behind each codebook, which vectors read past the end; where
there are no outlier columns to take up the rest, groups differ by one column. `vptq2.25` asks for the layout that a
matrix of given shape is laid out in with at most that many bits a weight (`laid_out`), everything counted.
Cost: (log2 k + log2 r) / v bits per weight, rows padded to v; 16 v (k + r) per group; 16 per column where ordered.
Holds when: centroids stay inside float16.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32
from memwall.formats.bitpack import matrix_shape
from memwall.formats.streams import pack_stream, unpack_stream
from memwall.formats.vector_parts import (
    BOOK_TAIL,
    INDEX_TAIL,
    Coded,
    Part,
    checked_halves,
    looked_up,
    vectors_of,
)

MOST_VECTOR, MOST_INDEX_BITS = 16, 16
_NARROW_COLUMNS = 1 << 16
_SPEC = re.compile(
    r"vptq(?P<bits>\d+(\.\d+)?)?(-v(?P<vector>\d+))?(-k(?P<codebook>\d+))?(-r(?P<residual>\d+))?(-g(?P<groups>\d+))?"
    r"(-b(?P<block>\d+))?(-o(?P<permille>\d+)v(?P<outlier_vector>\d+)k(?P<outlier_codebook>\d+))?(?P<ordered>-ordered)?(?P<norm>-norm)?"
)
# What coding Gaussian vectors loses against the limit of 6.02 dB a bit: the scalar quantizer's loss at 2 bits, which
# falls about with the cube root of the length (9.7, 10.2 and 10.7 dB of 12 at lengths 2, 4 and 8); and what two stages
# lose against one of as many bits, and twice as many groups gain (both measured on the demo model).
_SCALAR_LOSS_DB, _STAGE_LOSS_DB, _GROUPS_GAIN_DB, _BIT_DB = 2.74, 1.0, 0.05, 6.02
_GROUPS = (1, 2, 4, 8, 16)
_MOST_CHOSEN_BITS = 12  # larger codebooks leave the caches; they have to be asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class VptqCodec(Codec):
    """See the module's text.

    bits: 0 for a layout that is given in full, else the most bits a weight may take; then what is 0 is chosen (groups 0
    in a layout: one).
    codebook, residual, outlier_codebook: centroids, powers of two; residual 1 (or 0 in a layout): none.
    block: rows that share codebooks (outlier columns apart), a multiple of the vectors'; 0: all.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "vptq-v8-k256",
        "vptq-v4-k16-r16-g2-ordered",
        "vptq-v6-k64-g3-o10v4k32-ordered-norm",
        "vptq-v12-k8192",
        "vptq-v16-k4096-r4096-norm",
        "vptq-v1-k8-g2-b4-ordered",
        "vptq-v2-k16-r4-b6-o10v4k32",
    )
    method: ClassVar[str] = "vptq"

    bits: float = 0
    vector: int = 0
    codebook: int = 0
    residual: int = 0
    groups: int = 0
    block: int = 0
    outlier_permille: int = 0
    outlier_vector: int = 0
    outlier_codebook: int = 0
    ordered: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        for name, length in (("vector", self.vector), ("outlier vector", self.outlier_vector)):
            if not 0 <= length <= MOST_VECTOR:
                raise InputError(f"{self.spec}: {name} of {length} rows; it takes 1 to {MOST_VECTOR}")
        for name, count in (
            ("codebook", self.codebook),
            ("residual codebook", self.residual),
            ("outlier codebook", self.outlier_codebook),
        ):
            if count & (count - 1) or count > 1 << MOST_INDEX_BITS or (count == 1 and name != "residual codebook"):
                raise InputError(f"{self.spec}: {name} of {count}; take a power of two, 2 to {1 << MOST_INDEX_BITS}")
        if not self.bits and not (self.vector and self.codebook):
            raise InputError(f"{self.spec}: say how long vectors are and how many centroids there are: vptq-v8-k256")
        if self.bits and not 0.5 <= self.bits <= 8:
            raise InputError(f"{self.spec}: vptq takes 0.5 to 8 bits per weight, codebooks included, such as vptq2.25")
        if self.block and (not self.vector or self.block % self.vector or self.block > 1 << 20):
            raise InputError(f"{self.spec}: blocks are of whole vectors of rows that are given: vptq-v1-k8-b16")
        if self.groups > 4096 or not 0 <= self.outlier_permille <= 500:
            raise InputError(
                f"{self.spec}: at most 4096 groups, and at most 500 thousandths of the columns as outliers"
            )
        if self.outlier_permille and not (self.outlier_vector and self.outlier_codebook):
            raise InputError(f"{self.spec}: outlier columns need vectors and a codebook of their own: -o10v4k256")

    @classmethod
    def parse(cls, spec: str) -> VptqCodec:
        """`vptq2.25`, `vptq2.25-v8`, `vptq-v8-k4096-r256-g4-o10v4k1024-ordered-norm` (-o10: 1 % of the columns)."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(f"unknown format {spec!r}; write vptq2.25, or a layout such as vptq-v8-k4096-r256-ordered")

        def number(name: str) -> int:
            return int(match[name] or 0)

        return cls(
            bits=float(match["bits"] or 0),
            vector=number("vector"),
            codebook=number("codebook"),
            residual=number("residual") if match["bits"] or number("residual") != 1 else 0,
            groups=number("groups") if match["bits"] or number("groups") != 1 else 0,
            block=number("block"),
            outlier_permille=number("permille"),
            outlier_vector=number("outlier_vector"),
            outlier_codebook=number("outlier_codebook"),
            ordered=match["ordered"] is not None,
            norm=match["norm"] is not None,
        )

    @property
    def spec(self) -> str:
        text = f"vptq{self.bits:g}" if self.bits else "vptq"
        for letter, value in (("v", self.vector), ("k", self.codebook), ("r", self.residual)):
            text += f"-{letter}{value}" if value else ""
        text += f"-g{self.groups}" if self.groups else ""
        text += f"-b{self.block}" if self.block else ""
        if self.outlier_permille:
            text += f"-o{self.outlier_permille}v{self.outlier_vector}k{self.outlier_codebook}"
        return text + ("-ordered" if self.ordered else "") + ("-norm" if self.norm else "")

    @property
    def label(self) -> str:
        return "vptq"

    def parts(self, columns: int) -> tuple[Part | None, Part]:
        """Outlier columns and the others; the former take up what does not divide into groups."""
        count = math.ceil(self.outlier_permille * columns / 1000)
        if count:
            count += (columns - count) % max(self.groups, 1)
        outliers = None
        if count:
            outliers = Part(
                first=0, columns=count, groups=1, vector=self.outlier_vector,
                main_bits=_log2(self.outlier_codebook), residual_bits=0,
            )  # fmt: skip
        rest = Part(
            first=count, columns=columns - count, groups=max(self.groups, 1), vector=self.vector,
            main_bits=_log2(self.codebook), residual_bits=_log2(self.residual), block=self.block,
        )  # fmt: skip
        return outliers, rest

    def laid_out(self, shape: tuple[int, ...]) -> VptqCodec:
        """The layout given in full: this one, or the best that a matrix of this shape has bits for."""
        rows, columns = matrix_shape(self.spec, shape)
        return _chosen(self, rows, columns) if self.bits else self

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of a layout, everything counted."""
        index = 16 if columns <= _NARROW_COLUMNS else 32
        bits = sum(part.stored_bits(rows) for part in self.parts(columns) if part is not None)
        return bits + columns * (index * self.ordered + 32 * self.norm)

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        form = self.laid_out(shape)
        rows, columns = shape
        half, word = np.dtype(np.float16), np.dtype(np.uint32)
        found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for prefix, part in zip(("outlier_", ""), form.parts(columns), strict=True):
            if part is None:
                continue
            length = part.groups * part.vector_rows(rows) * part.words + INDEX_TAIL
            found[f"{prefix}indices"] = (length,), word
            for name, bits in (("centroids", part.main_bits), ("residuals", part.residual_bits)):
                if bits:
                    found[prefix + name] = ((part.books(rows) << bits) * part.vector + BOOK_TAIL,), half
        if form.ordered:
            found["order"] = (columns,), np.dtype(np.uint16) if columns <= _NARROW_COLUMNS else word
        if form.norm:
            found["scale_and_offset"] = (2, columns), half
        return found

    def encode(self, x: Any) -> Packed:
        """Codebooks of vectors of the matrix itself, evenly spread, and each vector to the nearest.

        Columns stay in order. What training and calibration add is up to `compress.vptq`.
        """
        values = real_float32(self.spec, x)
        form = self.laid_out(values.shape)
        if not np.isfinite(values).all():
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        norm = ranges(values) if form.norm else None
        if norm is not None:
            values = (values - norm[1].astype(np.float32)) / norm[0].astype(np.float32)
        held = []
        for part in form.parts(values.shape[1]):
            held.append(None if part is None else _encoded(part, values, form.spec))
        order = np.arange(values.shape[1]) if form.ordered else None
        assert held[1] is not None
        return pack(form, values.shape, held[1], outliers=held[0], order=order, norm=norm)

    def decode(self, packed: Packed) -> np.ndarray:
        """float32 [rows, cols], columns in their own order."""
        form, (rows, columns) = VptqCodec.parse(packed.spec), packed.shape
        stored = np.empty((rows, columns), np.float32)
        for part, coded in zip(form.parts(columns), unpack(packed), strict=True):
            if part is not None and coded is not None:
                stored[:, part.first : part.first + part.columns] = looked_up(part, coded, rows)
        if form.norm:
            scale, offset = packed.buffers["scale_and_offset"].astype(np.float32)
            stored = stored * scale + offset
        if not form.ordered:
            return stored
        values = np.empty_like(stored)
        values[:, packed.buffers["order"].astype(np.int64)] = stored
        return values


def _log2(count: int) -> int:
    return count.bit_length() - 1 if count > 1 else 0


@lru_cache(maxsize=256)
def _chosen(form: VptqCodec, rows: int, columns: int) -> VptqCodec:
    lengths = (form.vector,) if form.vector else range(1, MOST_VECTOR + 1)
    books = (form.codebook,) if form.codebook else [1 << bits for bits in range(1, _MOST_CHOSEN_BITS + 1)]
    seconds = (form.residual,) if form.residual else [1, *(1 << bits for bits in range(2, _MOST_CHOSEN_BITS + 1))]
    groups = (form.groups,) if form.groups else _GROUPS

    def loss_db(vector: int, book: int, second: int, count: int) -> float:
        rate = (_log2(book) + _log2(second)) / vector
        stages_db = _STAGE_LOSS_DB * (second > 1) - _GROUPS_GAIN_DB * math.log2(count)
        return _SCALAR_LOSS_DB * vector ** (-1 / 3) + stages_db - _BIT_DB * rate

    def made(vector: int, book: int, second: int, count: int) -> VptqCodec:
        residual, several = second if second > 1 else 0, count if count > 1 else 0
        return replace(form, bits=0, vector=vector, codebook=book, residual=residual, groups=several)

    layouts = sorted(product(lengths, books, seconds, groups), key=lambda each: loss_db(*each))
    for each in layouts:
        if (_log2(each[1]) + _log2(each[2])) / each[0] < form.bits:  # else indices alone are too many
            one = made(*each)
            if one.stored_bits(rows, columns) <= form.bits * rows * columns:
                return one
    least = min(made(*each).stored_bits(rows, columns) for each in layouts)
    needed = math.ceil(100 * least / max(rows * columns, 1)) / 100
    raise InputError(
        f"{form.spec}: a matrix of {rows} x {columns} takes at least {needed:g} bits per weight so, codebooks included"
    )


def ranges(values: np.ndarray) -> np.ndarray:
    """Scale and offset of each column by its range, float16 [2, cols]: what is left lies between 0 and 1."""
    if not values.size:
        return np.ones((2, values.shape[1]), np.float16)
    low, high = values.min(axis=0), values.max(axis=0)
    # a range that float16 would store as 0 could not be divided by
    spread = np.where(high - low >= np.finfo(np.float16).smallest_subnormal, high - low, 1)
    return checked_halves(np.stack([spread, low]), "a scale")


def _encoded(part: Part, values: np.ndarray, spec: str) -> Coded:
    if not np.isfinite(values).all():
        raise InputError(f"{spec} cannot hold NaN or infinite values")
    books = part.books(len(values))
    main = np.zeros((books, 1 << part.main_bits, part.vector), np.float16)
    codes = np.zeros((part.vector_rows(len(values)), part.columns), np.uint32)
    for book in range(books):
        block, group = divmod(book, part.groups)
        rows = part.in_block(block, len(values))
        vectors = vectors_of(part, values, group)[rows]
        flat = vectors.reshape(-1, part.vector)
        if not len(flat):
            continue
        picked = flat[np.linspace(0, len(flat) - 1, min(len(flat), main.shape[1])).astype(np.int64)]
        main[book, : len(picked)] = checked_halves(picked, "a weight")
        members = part.members(group)
        place = slice(members.start - part.first, members.stop - part.first)
        codes[rows, place] = _nearest(flat, main[book].astype(np.float32)).reshape(vectors.shape[:2])
    residual = np.zeros((books, 1 << part.residual_bits, part.vector), np.float16) if part.residual_bits else None
    return Coded(codes=codes, main=main, residual=residual)


def _nearest(points: np.ndarray, centroids: np.ndarray, slab: int = 1 << 10) -> np.ndarray:
    lengths = np.einsum("kv,kv->k", centroids, centroids) / 2
    pieces = [points[start : start + slab] for start in range(0, len(points), slab)]
    return np.concatenate([(lengths - piece @ centroids.T).argmin(axis=1) for piece in pieces])


def pack(
    form: VptqCodec, shape: tuple[int, ...], rest: Coded, *,
    outliers: Coded | None = None, order: np.ndarray | None = None, norm: np.ndarray | None = None,
) -> Packed:  # fmt: skip
    """Parts to bytes. form: a layout given in full. norm: scale and offset by place, float16 [2, cols]."""
    buffers = {name: np.zeros(size, dtype) for name, (size, dtype) in form.buffers(shape).items()}
    for prefix, part, coded in zip(("outlier_", ""), form.parts(shape[1]), (outliers, rest), strict=True):
        if part is None or coded is None:
            continue
        streams = buffers[f"{prefix}indices"][:-INDEX_TAIL].reshape(part.groups, len(coded.codes), part.words)
        for group in range(part.groups if streams.size else 0):
            members = part.members(group)
            codes = coded.codes[:, members.start - part.first : members.stop - part.first]
            packed = pack_stream(codes, part.bits)
            streams[group, :, : packed.shape[1]] = packed
        buffers[f"{prefix}centroids"][:-BOOK_TAIL] = coded.main.reshape(-1)
        if coded.residual is not None:
            buffers[f"{prefix}residuals"][:-BOOK_TAIL] = coded.residual.reshape(-1)
    if order is not None:
        buffers["order"][:] = order
    if norm is not None:
        buffers["scale_and_offset"][:] = norm
    return Packed(spec=form.spec, shape=tuple(shape), buffers=buffers)


def unpack(packed: Packed) -> tuple[Coded | None, Coded]:
    """Contents of the outlier columns and of the rest."""
    form, (rows, columns) = VptqCodec.parse(packed.spec), packed.shape
    outliers, rest = form.parts(columns)
    return None if outliers is None else _unpacked(packed, "outlier_", outliers, rows), _unpacked(
        packed, "", rest, rows
    )


def _unpacked(packed: Packed, prefix: str, part: Part, rows: int) -> Coded:
    codes = np.zeros((part.vector_rows(rows), part.columns), np.uint32)
    streams = packed.buffers[f"{prefix}indices"][:-INDEX_TAIL].reshape(part.groups, len(codes), part.words)
    for group in range(part.groups):
        members = part.members(group)
        place = slice(members.start - part.first, members.stop - part.first)
        codes[:, place] = unpack_stream(streams[group], members.stop - members.start, part.bits)
    books = {
        name: packed.buffers[prefix + name][:-BOOK_TAIL].reshape(part.books(rows), 1 << bits, part.vector)
        for name, bits in (("centroids", part.main_bits), ("residuals", part.residual_bits))
        if bits
    }
    return Coded(codes=codes, main=books["centroids"], residual=books.get("residuals"))


def check(packed: Packed) -> None:
    """InputError where the order does not name each column once: kernels follow it without a look."""
    if "order" in packed.buffers and not np.array_equal(np.sort(packed.buffers["order"]), np.arange(packed.shape[1])):
        raise InputError(f"vptq of shape {list(packed.shape)}: `order` does not name each column once")
