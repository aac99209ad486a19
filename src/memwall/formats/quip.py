"""QuIP's stored form: a turned matrix in a few bits with one scale, and what turns activations to meet it.

Source: "QuIP: 2-Bit Quantization of Large Language Models With Guarantees" (Jerry Chee, 2023, arXiv 2307.13304),
section 4 and algorithms 1 and 2; official code: github.com/Cornell-RelaxML/QuIP. `compress.quip` finds the codes.

Idea: weights turned by random orthogonal matrices on both sides have no outliers left, so one scale serves the whole
matrix. The turns cost little because each is made of two small factors: of n = p * q numbers, put in a random order and
laid out as p x q, all columns are multiplied by a p x p matrix and all rows by a q x q one.

    y = scale * U^T (Q (V (columns * x)))          Q: odd integers, as `bipolar` has them

Units and shapes: weights [rows, cols]; U turns rows, V cols.

    codes     uint8 [row tiles, groups of 128 columns, 4, 64 * bits]: tiles as `bitpack` has them
    columns   float16 [cols], what x is multiplied by first; scale float32 [1]
    seed      uint64 [1]: of both turns; with their size it is all that is stored of them

Differs from the paper: p and q are the divisors next to the square root, whatever they are, and the random numbers are
defined here (splitmix64 and QR), so that a file means the same everywhere. `-hadamard`: factors whose size is a power
of two are Hadamard matrices with random signs.
Cost: bits per weight, 16 bits per column; p^2 + q^2 + n numbers for every size that a model has, shared by its
matrices; (p + q) n multiplications a turn and token.
Holds when: sizes have divisors near their square root (a prime size has a full matrix).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32
from memwall.formats.bitpack import TILE_ROWS, matrix_shape, pack_tiles, unpack_tiles
from memwall.formats.leveled import LevelCodec
from memwall.formats.levels import LevelSet

GROUP = 128
RANGE = 2.4
"""Of the root mean square of a turned matrix: where its outer levels lie (the published code's number)."""
_SPEC = re.compile(r"quip(?P<bits>[0-9])(?P<hadamard>-hadamard)?")
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """An orthogonal turn of n numbers: order [n], then left [p, p] and right [q, q], all float32."""

    order: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def turn(self, x: np.ndarray) -> np.ndarray:
        """x [..., n] -> turned."""
        p, q = len(self.left), len(self.right)
        laid = x[..., self.order].reshape(*x.shape[:-1], p, q)
        return np.asarray(self.left @ laid @ self.right.T).reshape(x.shape)

    def turn_back(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `turn`."""
        p, q = len(self.left), len(self.right)
        found = np.empty_like(x)
        found[..., self.order] = (self.left.T @ x.reshape(*x.shape[:-1], p, q) @ self.right).reshape(x.shape)
        return found


@lru_cache(maxsize=32)
def factors(size: int, side: str, seed: int, hadamard: bool) -> Factors:
    """The turn of `size` numbers; side: `rows` or `cols`, so that a square matrix has two."""
    p = next(p for p in range(math.isqrt(max(size, 1)), 0, -1) if size % p == 0)
    q = size // p
    stream = (seed * 4 + 2 * (side == "rows") + hadamard) & 0xFFFFFFFFFFFFFFFF
    count = size + 2 * (p * p + q * q)
    noise = _splitmix(np.uint64(stream), count)
    normal = _normal(noise[size:])
    return Factors(
        order=np.argsort(noise[:size], kind="stable").astype(np.int32),
        left=_orthogonal(normal[: p * p].reshape(p, p), hadamard),
        right=_orthogonal(normal[p * p :].reshape(q, q), hadamard),
    )


def _splitmix(seed: np.uint64, count: int) -> np.ndarray:
    """uint64 [count] of the generator splitmix64."""
    with np.errstate(over="ignore"):
        state = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def _normal(noise: np.ndarray) -> np.ndarray:
    """Half as many normal numbers, float64."""
    uniform = (noise >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = uniform.reshape(2, -1)
    return np.asarray(np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle))


def _orthogonal(normal: np.ndarray, hadamard: bool) -> np.ndarray:
    """An orthogonal matrix out of a normal one."""
    size = len(normal)
    if hadamard and size and size & (size - 1) == 0:
        matrix = np.ones((1, 1))
        while len(matrix) < size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return (matrix * np.sign(normal[0]) / math.sqrt(size)).astype(np.float32)
    turned, triangle = np.linalg.qr(normal)
    return np.asarray(turned * np.sign(np.diagonal(triangle)), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuipCodec(Codec):
    """`quip2` to `quip8`, `-hadamard`."""

    examples: ClassVar[tuple[str, ...]] = ("quip2", "quip4", "quip3-hadamard", "quip8")
    method: ClassVar[str] = "quip"
    rows_apart: ClassVar[bool] = False
    group: ClassVar[int] = GROUP

    bits: int
    hadamard: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"quip{self.bits}: bits must be 2 to 8")

    @classmethod
    def parse(cls, spec: str) -> QuipCodec:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(f"unknown format {spec!r}; known are quip2 to quip8, such as quip2 or quip2-hadamard")
        return cls(bits=int(match["bits"]), hadamard=match["hadamard"] is not None)

    @property
    def spec(self) -> str:
        return f"quip{self.bits}{'-hadamard' if self.hadamard else ''}"

    @property
    def inner(self) -> LevelCodec:
        """The format whose codes and levels these are."""
        return LevelCodec.parse(f"bipolar{self.bits}-g{GROUP}")

    @property
    def levels(self) -> LevelSet:
        """What codes are worth before the scale."""
        return self.inner.levels

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        rows, columns = matrix_shape(self.spec, shape)
        tiles, groups = -(-rows // TILE_ROWS), -(-columns // GROUP)
        return {
            "codes": ((tiles, groups, 4, 64 * self.bits), np.dtype(np.uint8)),
            "columns": ((columns,), np.dtype(np.float16)),
            "scale": ((1,), np.dtype(np.float32)),
            "seed": ((1,), np.dtype(np.uint64)),
        }

    def turns(self, shape: tuple[int, ...], seed: int) -> tuple[Factors, Factors]:
        """U and V."""
        rows, columns = shape
        return factors(rows, "rows", seed, self.hadamard), factors(columns, "cols", seed, self.hadamard)

    def scale_of(self, turned: np.ndarray, spread: float = RANGE) -> float:
        """What a turned matrix' levels are multiplied by."""
        size = math.sqrt(float(np.mean(np.square(turned, dtype=np.float64)))) if turned.size else 0.0
        return float(np.float32(spread * size / self.levels.largest))

    def quantize(self, turned: np.ndarray, scale: float) -> np.ndarray:
        """Turned values -> codes uint8, the nearest level's."""
        codes: np.ndarray = self.levels.encode(turned * np.float32(1 / scale if scale > 0 else 0))
        return codes

    def encode(self, x: Any) -> Packed:
        """Turned, and each number to its nearest level. What calibration adds is up to `compress.quip`."""
        values = real_float32(self.spec, x)
        matrix_shape(self.spec, values.shape)
        if not np.isfinite(values).all():
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        rows, cols = self.turns(values.shape, 0)
        turned = rows.turn(cols.turn(values).T).T if values.size else values
        scale = self.scale_of(turned)
        return self.pack(self.quantize(turned, scale), np.ones(values.shape[1], np.float16), scale, 0)

    def pack(self, codes: np.ndarray, columns: np.ndarray, scale: float, seed: int) -> Packed:
        """codes uint8 [rows, cols] of the turned matrix, columns float16 [cols]."""
        sizes = self.buffers(codes.shape)
        tiles, groups = sizes["codes"][0][:2]
        padded = np.zeros((tiles * TILE_ROWS, groups * GROUP), np.uint8)
        padded[: codes.shape[0], : codes.shape[1]] = codes
        buffers = {
            "codes": pack_tiles(padded, self.bits, GROUP),
            "columns": columns,
            "scale": np.array([scale], np.float32),
            "seed": np.array([seed], np.uint64),
        }
        return Packed(spec=self.spec, shape=codes.shape, buffers=buffers)

    def unpack(self, packed: Packed) -> np.ndarray:
        """The codes."""
        rows, columns = packed.shape
        return unpack_tiles(packed.buffers["codes"], self.bits, GROUP)[:rows, :columns]

    def decode(self, packed: Packed) -> np.ndarray:
        if not packed.size:
            return np.empty(packed.shape, np.float32)
        rows, cols = self.turns(packed.shape, int(packed.buffers["seed"][0]))
        values = packed.buffers["scale"][0] * self.levels.decode(self.unpack(packed))
        values = cols.turn_back(rows.turn_back(values.T).T)
        return np.asarray(values * packed.buffers["columns"].astype(np.float32), np.float32)
