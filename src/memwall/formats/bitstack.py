"""BitStack's stored form: a matrix as a sum of sign matrices times small low-rank magnitudes, one block per term.

Source: "BitStack: Fine-Grained Size Control for Compressed LLMs in Variable Memory Environments" (Xinghao Wang, 2024,
arXiv 2410.23918), section 3; official code: github.com/xinghaow99/BitStack. `compress.bitstack` finds what is stored.

Idea: a matrix's magnitudes, all positive, are far closer to low rank than the matrix; so one bit per weight goes to the
sign and a few vectors to the rest, and what remains is taken apart in the same way, again and again. Any number of
first blocks is a coarser form of the matrix.

    W = sum over blocks i of S_i * (A_i B_i^T)      S_i: signs, A_i [rows, rank], B_i [cols, rank] float16

Units and shapes: weights [rows, cols]; block i is one buffer `block{i}` of bytes: A_i, B_i, then signs in panels of 64
columns, in a panel eight bytes per row (as many as its columns need in the last one), first column in the lowest bit,
1 for numbers from zero on.
Differs from the paper: each row's signs end on a byte (ceil(cols / 8) per row, where the paper has ceil(rows * cols /
8) in all), panels instead of row-major order, which products read. The residual is taken with the factors as stored.
Cost: rows * ceil(cols / 8) + 2 * rank * (rows + cols) bytes a block; decoding, 2 * rank operations per weight a block.
Holds when: factors stay inside float16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32
from memwall.formats.bitpack import matrix_shape

PANEL_COLUMNS = 64
_PANEL_BYTES = PANEL_COLUMNS // 8
MOST_BLOCKS = 16
MOST_RANK = 64
DEFAULT_RANK = 16
_SPEC = re.compile(r"bitstack(?:-r(?P<rank>[0-9]{1,2}))?(?:-b(?P<blocks>[0-9]{1,2}))?")
# extra directions and passes of the subspace iteration: with these it loses under a thousandth to a full SVD
_OVERSAMPLING, _PASSES = 8, 4
_FULL_SVD_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One term. positive [rows, cols] bool; left [rows, rank], right [cols, rank] float16."""

    positive: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def decode(self) -> np.ndarray:
        """float32 [rows, cols]."""
        magnitudes = self.left.astype(np.float32) @ self.right.astype(np.float32).T
        np.negative(magnitudes, out=magnitudes, where=~self.positive)
        return magnitudes


def block_bytes(shape: tuple[int, ...], rank: int) -> int:
    """Bytes of one block of a matrix."""
    rows, columns = shape
    return rows * -(-columns // 8) + 2 * rank * (rows + columns)


def top_factors(magnitudes: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best A [rows, rank], B [cols, rank] float32 of a matrix, each with the root of the singular values in it.

    By subspace iteration from a fixed start, so the same matrix gives the same factors; small ones by a full SVD.
    """
    rows, columns = magnitudes.shape
    least, kept = min(rows, columns), min(rank, rows, columns)
    if least <= _FULL_SVD_ROWS:
        u, sizes, v = np.linalg.svd(magnitudes, full_matrices=False)
    else:
        width = min(kept + _OVERSAMPLING, least)
        basis = np.random.default_rng(0).standard_normal((columns, width), np.float32)
        for _ in range(_PASSES):
            basis = np.linalg.qr(magnitudes.T @ np.linalg.qr(magnitudes @ basis)[0])[0]
        u, sizes, v = np.linalg.svd(magnitudes @ basis, full_matrices=False)
        v = v @ basis.T
    roots = np.sqrt(sizes[:kept])
    left, right = np.zeros((rows, rank), np.float32), np.zeros((columns, rank), np.float32)
    left[:, :kept], right[:, :kept] = u[:, :kept] * roots, v[:kept].T * roots
    return left, right


def blocks_of(weight: np.ndarray, rank: int, most_blocks: int) -> Iterator[Block]:
    """The blocks of a float matrix [rows, cols] in turn; none makes what is left of it larger."""
    residual = np.array(weight, np.float32)
    if not np.isfinite(residual).all():
        raise InputError("bitstack cannot hold NaN or infinite values")
    left_over = float(np.einsum("ij,ij->", residual, residual, dtype=np.float64))
    for _ in range(most_blocks):
        positive = residual >= 0
        with np.errstate(over="ignore"):
            left, right = (each.astype(np.float16) for each in top_factors(np.abs(residual), rank))
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            raise InputError(f"bitstack: weights up to {np.abs(weight).max():g} overflow the factors' float16 (65504)")
        block = Block(positive=positive, left=left, right=right)
        next_residual = residual - block.decode()
        next_over = float(np.einsum("ij,ij->", next_residual, next_residual, dtype=np.float64))
        if next_over > left_over:  # only where float16 has no digits left for it
            yield replace(block, left=np.zeros_like(left), right=np.zeros_like(right))
            continue
        residual, left_over = next_residual, next_over
        yield block


def pack_block(block: Block) -> np.ndarray:
    """A block as the bytes it is stored in."""
    signs = np.packbits(block.positive, axis=1, bitorder="little")
    num_panels = block.positive.shape[1] // PANEL_COLUMNS
    whole = num_panels * _PANEL_BYTES
    panels = signs[:, :whole].reshape(len(signs), num_panels, _PANEL_BYTES).transpose(1, 0, 2)
    factors = (np.ascontiguousarray(each).view(np.uint8).reshape(-1) for each in (block.left, block.right))
    return np.concatenate([*factors, panels.reshape(-1), signs[:, whole:].reshape(-1)])


def unpack_block(data: np.ndarray, shape: tuple[int, ...], rank: int) -> Block:
    """The block of a matrix of `shape` from its bytes."""
    rows, columns = shape
    cuts = np.cumsum([2 * rank * rows, 2 * rank * columns])
    left, right, signs = np.split(data, cuts)
    num_panels = columns // PANEL_COLUMNS
    per_row, whole = -(-columns // 8), num_panels * _PANEL_BYTES
    packed = np.empty((rows, per_row), np.uint8)
    panels = signs[: rows * whole].reshape(num_panels, rows, _PANEL_BYTES)
    packed[:, :whole] = panels.transpose(1, 0, 2).reshape(rows, whole)
    packed[:, whole:] = signs[rows * whole :].reshape(rows, per_row - whole)
    return Block(
        positive=np.unpackbits(packed, axis=1, count=columns, bitorder="little").astype(bool),
        left=np.frombuffer(left.tobytes(), np.float16).reshape(rows, rank),
        right=np.frombuffer(right.tobytes(), np.float16).reshape(columns, rank),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BitStackCodec(Codec):
    """See the module's text. rank: of the magnitudes; blocks: how many there are."""

    examples: ClassVar[tuple[str, ...]] = ("bitstack-r16-b3", "bitstack-r1-b1", "bitstack-r2-b16", "bitstack-r20-b2")
    method: ClassVar[str] = "bitstack"

    rank: int = DEFAULT_RANK
    blocks: int = MOST_BLOCKS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise InputError(f"{self.spec}: the rank must be 1 to {MOST_RANK}")
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise InputError(f"{self.spec}: there are 1 to {MOST_BLOCKS} blocks")

    @classmethod
    def parse(cls, spec: str) -> BitStackCodec:
        """`bitstack`, `bitstack-r16-b4`."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(f"unknown format {spec!r}; a stack of 4 blocks of rank 16 is bitstack-r16-b4")
        return cls(rank=int(match["rank"] or DEFAULT_RANK), blocks=int(match["blocks"] or MOST_BLOCKS))

    @property
    def spec(self) -> str:
        return f"bitstack-r{self.rank}-b{self.blocks}"

    @property
    def label(self) -> str:
        return "bitstack"

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        matrix_shape(self.spec, shape)
        size = (block_bytes(shape, self.rank),)
        return {f"block{index}": (size, np.dtype(np.uint8)) for index in range(self.blocks)}

    def encode(self, x: Any) -> Packed:
        """Taken apart with all inputs alike. What calibration adds is up to `compress.bitstack`."""
        weight = real_float32(self.spec, x)
        shape = matrix_shape(self.spec, weight.shape)
        made = [pack_block(block) for block in blocks_of(weight, self.rank, self.blocks)]
        return Packed(spec=self.spec, shape=shape, buffers={f"block{i}": data for i, data in enumerate(made)})

    def decode(self, packed: Packed) -> np.ndarray:
        """float32 [rows, cols]."""
        values = np.zeros(packed.shape, np.float32)
        for index in range(self.blocks):
            values += unpack_block(packed.buffers[f"block{index}"], packed.shape, self.rank).decode()
        return values


def first_blocks(packed: Packed, count: int) -> Packed:
    """The same matrix by its first `count` blocks only; buffers are shared."""
    form = replace(BitStackCodec.parse(packed.spec), blocks=count)
    buffers = {name: packed.buffers[name] for name in form.buffers(packed.shape)}
    return Packed(spec=form.spec, shape=packed.shape, buffers=buffers)
