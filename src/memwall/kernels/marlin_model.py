"""MARLIN's kernel in NumPy, register by register where that decides the result: the oracle of the GPU kernel.

Source: "MARLIN" (Elias Frantar, 2024, arXiv 2408.11743), section 3; official code: github.com/IST-DASLab/marlin.

What is modelled: fragments by thread as `marlin` packs them, integers to half floats by bit operations, grouped scales
multiplied into fragments as half floats, products of half floats summed in float32, warps that split K inside a tile
and are summed as a tree, stripes over the processors with serial reduction through the half-float output, a scale per
column applied to results once, and copies of a 64-row problem (`par`) for more rows.
Shapes: x float16 [M, K] -> float16 [M, N].
Not modelled: asynchronous copies, the swizzle of shared memory and cache hints, none of which changes a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.kernels.marlin import (
    FRAGMENT_COLUMNS,
    K_MULTIPLE,
    N_MULTIPLE,
    TILE,
    WORDS,
    MarlinWeight,
    dequantize_words,
    restore_scales,
)
from memwall.kernels.stripes import Stripes

WARPS, MOST_ROWS, MOST_PAR = 8, 64, 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles [k_tile, n_tile] of B that a block of 8 warps works on at once, and rows of x at once."""

    k_tile: int
    n_tile: int
    rows: int

    @staticmethod
    def of(num_rows: int) -> Tiling:
        """As published: narrow for up to 16 rows, 64 by 256 for more."""
        rows = min(-(-num_rows // TILE) * TILE, MOST_ROWS)
        return Tiling(128, 128, rows) if num_rows <= TILE else Tiling(64, 256, rows)

    @property
    def warps_along_k(self) -> int:
        """Each warp has 64 columns; those left over split K."""
        return WARPS // (self.n_tile // FRAGMENT_COLUMNS)


def copies(num_rows: int) -> list[tuple[int, int]]:
    """Launches as (rows, par): par copies of a 64-row problem share one launch, what is left takes another."""
    whole = num_rows // MOST_ROWS
    launches = [(MOST_ROWS * par, par) for par in _runs(whole)]
    rest = num_rows - whole * MOST_ROWS
    return [*launches, (rest, 1)] if rest else launches


def _runs(whole: int) -> list[int]:
    return [MOST_PAR] * (whole // MOST_PAR) + ([whole % MOST_PAR] if whole % MOST_PAR else [])


def multiply(x: np.ndarray, weight: MarlinWeight, processors: int) -> np.ndarray:
    """x float16 [M, K] times a packed matrix, on so many processors -> float16 [M, N]."""
    size_k, size_n = weight.shape
    if x.ndim != 2 or x.shape[1] != size_k or x.dtype != np.float16:
        raise InputError(f"x must be float16 [M, {size_k}], got {x.dtype} {list(x.shape)}")
    if size_k % K_MULTIPLE or size_n % N_MULTIPLE:
        raise InputError(
            f"the kernel takes K in multiples of {K_MULTIPLE} and N of {N_MULTIPLE}, got {[size_k, size_n]}"
        )
    out = np.empty((len(x), size_n), np.float16)
    start = 0
    for rows, par in copies(len(x)):
        each = rows // par
        tiling = Tiling.of(each)
        stripes = Stripes(
            k_tiles=size_k // tiling.k_tile,
            slices=size_n // tiling.n_tile * par,
            workers=processors,
            group_tiles=weight.group // tiling.k_tile if len(weight.scales) > 1 else 1,
        )
        for index in range(stripes.slices):
            copy, column = divmod(index, size_n // tiling.n_tile)
            first = start + copy * each
            block, n = x[first : first + each], slice(column * tiling.n_tile, (column + 1) * tiling.n_tile)
            out[first : first + each, n] = _slice(block, weight, tiling, column, stripes, index)
        start += rows
    return out


def _slice(
    x: np.ndarray, weight: MarlinWeight, tiling: Tiling, column: int, stripes: Stripes, index: int
) -> np.ndarray:
    """One slice: each processor's part in float32, passed on in half floats."""
    held: np.ndarray | None = None
    for part in stripes.reduction(index):
        sums = np.zeros((len(x), tiling.n_tile), np.float32)
        warps = np.zeros((tiling.warps_along_k, len(x), tiling.n_tile), np.float32)
        for k in range(part.first, part.stop):
            for step in range(tiling.k_tile // TILE):
                at = k * tiling.k_tile // TILE + step
                values = x[:, at * TILE : (at + 1) * TILE].astype(np.float32)
                warps[step % tiling.warps_along_k] += values @ fragment_tile(weight, at, column, tiling.n_tile)
        while len(warps) > 1:
            warps = warps[: len(warps) // 2] + warps[len(warps) // 2 :]
        sums = warps[0] if held is None else warps[0] + held.astype(np.float32)
        held = sums.astype(np.float16)
    assert held is not None
    if len(weight.scales) == 1:
        scales = restore_scales(weight.scales)[0, column * tiling.n_tile : (column + 1) * tiling.n_tile]
        held = held * scales
    return held


def fragment_tile(weight: MarlinWeight, k_tile: int, column: int, n_tile: int) -> np.ndarray:
    """What 32 threads hold of 16 rows by n_tile columns, put where the m16n8k16 instruction reads it: float32.

    Thread t has, of each of four tiles side by side, column t div 4 and the one 8 on, rows 2 (t mod 4), the next, and
    those 8 on.
    """
    words = weight.words[k_tile, 2 * column * n_tile : 2 * (column + 1) * n_tile]
    threads = words.reshape(n_tile // FRAGMENT_COLUMNS, 8, 4, WORDS)
    fragments = dequantize_words(threads)  # [n, c, pair, word, block, (half, low)] float16
    if len(weight.scales) > 1:
        group = k_tile * TILE // weight.group
        stored = weight.scales[group, column * n_tile : (column + 1) * n_tile]
        # thread c reads eight scales at once: by word and block, columns c + 8 (2 word + block) of 64
        mine = stored.reshape(n_tile // FRAGMENT_COLUMNS, 8, 1, WORDS, 2, 1)
        fragments = fragments * mine
    parts = fragments.reshape(n_tile // FRAGMENT_COLUMNS, 8, 4, WORDS, 2, 2, 2)
    # [n, c, pair, word, block, half, low] -> rows (half, pair, low), columns (n, word, block, c)
    return np.ascontiguousarray(parts.transpose(5, 2, 6, 0, 3, 4, 1)).reshape(TILE, n_tile).astype(np.float32)
