"""MARLIN's product on a GPU, in Triton: half-float activations times the published packed 4-bit weights, in stripes.

Source: "MARLIN" (Elias Frantar, 2024, arXiv 2408.11743), section 3; official code: github.com/IST-DASLab/marlin.

Idea: the packed words are read as they lie, 16 bytes a thread. The eight codes of a word belong to two columns and four
rows, so each of the eight nibble planes of a tile is an operand of its own: it multiplies the columns of x that its
rows want, and no weight is ever moved to another thread. A code becomes a half float by one OR (1024 + v) and one
subtraction; scales of groups are multiplied into weights as half floats, a scale per column into results once. Each
program takes one stripe (`stripes`); parts of slices that several have are summed from the last to the first.

Shapes: x [M, K] float16 on the GPU (or a CPU, in Triton's interpreter), weights as in `marlin` -> [M, N] float16.
Differs from the paper: Triton places operands and pipelines copies itself, so the XOR swizzle and warps that split K
are its matter; parts are summed in float32 by a second, small launch in place of locks and half floats.
Cost: K N / 2 bytes and scales read once per 64 rows; 8 M n_tile bytes of room per program for parts.
Holds when: K is a multiple of 128 and N of 256, groups of 128 or one of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from memwall.errors import InputError
from memwall.formats import Packed
from memwall.kernels import marlin
from memwall.kernels.marlin_model import MOST_ROWS, WARPS, Tiling, copies
from memwall.kernels.stripes import Stripes

STAGES = 4
DEFAULT_PROCESSORS = 8
"""Programs where no GPU says how many it runs at once."""


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    x, words, scales, row, live, size_k, size_n, k, n, group, sum_0, sum_1,
    K_TILE: tl.constexpr, N_TILE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Adds tile (k, n) to the sums of the columns of both blocks, [rows, N_TILE / 2]: n64, c, word."""
    pairs: tl.constexpr = K_TILE // 4
    depth, width = tl.arange(0, pairs), tl.arange(0, N_TILE // 2)
    k_16, pair = k * (K_TILE // 16) + depth // 4, depth % 4
    n_64, c, word = n * (N_TILE // 64) + width // 32, width % 32 // 4, width % 4
    at = k_16[:, None] * (2 * size_n) + pair[:, None] * 4 + n_64[None, :] * 128 + c[None, :] * 16 + word[None, :]
    held = tl.load(words + at, eviction_policy="evict_first")  # read once: the cache is for x and results
    scale_at = group * size_n + n_64 * 64 + c * 8 + word * 2
    for low in tl.static_range(2):
        for half in tl.static_range(2):
            column = k_16 * 16 + half * 8 + pair * 2 + low
            value = tl.load(x + row[:, None] * size_k + column[None, :], mask=live[:, None], other=0.0)
            for block in tl.static_range(2):
                code = (held >> (4 * (4 * low + 2 * block + half))) & 15
                weight = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0
                weight = weight.to(tl.float16)
                if GROUPED:
                    weight = weight * tl.load(scales + scale_at + block)[None, :]
                if block == 0:
                    sum_0 = tl.dot(value, weight, sum_0)
                else:
                    sum_1 = tl.dot(value, weight, sum_1)
    return sum_0, sum_1


@triton.jit
def _columns(width, n, BLOCK: tl.constexpr, N_TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The columns that results of a block are of."""
    return n * N_TILE + width // 32 * 64 + width % 4 * 16 + BLOCK * 8 + width % 32 // 4


@triton.jit
def _scaled(total, scales, column, GROUPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Results in half floats, times the scale of their column where there is one group."""
    result = total.to(tl.float16)
    if not GROUPED:
        within = column % 32
        stored = column // 32 * 32 + within % 8 // 2 * 8 + within // 8 * 2 + within % 2
        result = result * tl.load(scales + stored)[None, :]
    return result


@triton.jit
def _stripe(  # type: ignore[no-untyped-def]
    x, words, scales, out, room, num_rows, size_k, size_n, k_tiles, n_tiles, num_tiles, stripe, group_tiles,
    ROWS: tl.constexpr, K_TILE: tl.constexpr, N_TILE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """One program's tiles [stripe * program, + stripe): whole slices into `out`, parts of others into `room`."""
    program = tl.program_id(0)
    at = program * stripe
    end = tl.minimum(at + stripe, num_tiles)
    width = tl.arange(0, N_TILE // 2)
    local = tl.arange(0, ROWS)
    while at < end:
        index, first = at // k_tiles, at % k_tiles
        stop = tl.minimum(k_tiles, first + end - at)
        row = index // n_tiles * ROWS + local
        n, live = index % n_tiles, row < num_rows
        sum_0, sum_1 = tl.zeros([ROWS, N_TILE // 2], tl.float32), tl.zeros([ROWS, N_TILE // 2], tl.float32)
        for k in range(first, stop):
            sum_0, sum_1 = _tile(
                x, words, scales, row, live, size_k, size_n, k, n, k // group_tiles, sum_0, sum_1,
                K_TILE, N_TILE, GROUPED,
            )  # fmt: skip
        if (first == 0) & (stop == k_tiles):
            for block in tl.static_range(2):
                column = _columns(width, n, block, N_TILE)
                result = _scaled(sum_0 if block == 0 else sum_1, scales, column, GROUPED)
                tl.store(out + row[:, None] * size_n + column[None, :], result, mask=live[:, None])
        else:
            # of a stripe at most one part begins inside a slice, and one ends inside
            part = room + (program * 2 + (first == 0)) * (ROWS * N_TILE)
            place = local[:, None] * N_TILE + width[None, :]
            tl.store(part + place, sum_0)
            tl.store(part + place + N_TILE // 2, sum_1)
        at += stop - first


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    scales, out, room, num_rows, size_n, k_tiles, n_tiles, stripe,
    ROWS: tl.constexpr, N_TILE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """One slice: its parts, from that of the last program to that of the first."""
    index = tl.program_id(0)
    first, last = index * k_tiles // stripe, (index * k_tiles + k_tiles - 1) // stripe
    if first < last:
        local, width = tl.arange(0, ROWS), tl.arange(0, N_TILE // 2)
        row, n = index // n_tiles * ROWS + local, index % n_tiles
        place = local[:, None] * N_TILE + width[None, :]
        for block in tl.static_range(2):
            total = tl.zeros([ROWS, N_TILE // 2], tl.float32)
            for back in range(last - first + 1):
                program = last - back
                part = room + (program * 2 + (program == first)) * (ROWS * N_TILE)
                total += tl.load(part + place + block * (N_TILE // 2))
            column = _columns(width, n, block, N_TILE)
            result = _scaled(total, scales, column, GROUPED)
            tl.store(out + row[:, None] * size_n + column[None, :], result, mask=(row < num_rows)[:, None])


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch over rows [first, first + rows) of x."""

    first: int
    rows: int
    tiling: Tiling
    stripes: Stripes


def _launches(num_rows: int, shape: tuple[int, int], group: int, processors: int) -> list[_Launch]:
    size_k, size_n = shape
    first, found = 0, []
    for rows, par in copies(num_rows):
        tiling = Tiling.of(rows // par)
        grouped = max(group // tiling.k_tile, 1) if group < size_k else 1
        stripes = Stripes(
            k_tiles=size_k // tiling.k_tile,
            slices=size_n // tiling.n_tile * par,
            workers=processors,
            group_tiles=grouped,
        )
        found.append(_Launch(first, rows, tiling, stripes))
        first += rows
    return found


def multiply(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, group: int, processors: int | None = None
) -> torch.Tensor:
    """x [M, K] float16 times packed weights -> [M, N] float16. processors: programs, by default those of the GPU."""
    size_k, size_n = words.shape[0] * marlin.TILE, words.shape[1] // 2
    if x.dtype != torch.float16 or x.shape[1] != size_k:
        raise InputError(f"x must be float16 [M, {size_k}], got {x.dtype} {list(x.shape)}")
    x, out = x.contiguous(), torch.empty(len(x), size_n, dtype=torch.float16, device=x.device)
    if processors is None:
        on_gpu = x.device.type == "cuda"
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if on_gpu else DEFAULT_PROCESSORS
    for launch in _launches(len(x), (size_k, size_n), group, processors):
        tiling, stripes = launch.tiling, launch.stripes
        rows = min(MOST_ROWS, triton.next_power_of_2(tiling.rows))
        settings: dict[str, Any] = {"ROWS": rows, "N_TILE": tiling.n_tile, "GROUPED": len(scales) > 1}
        programs = -(-stripes.num_tiles // stripes.stripe_tiles)
        room = torch.empty(programs * 2 * rows * tiling.n_tile, dtype=torch.float32, device=x.device)
        part, result = x[launch.first :], out[launch.first :]
        n_tiles, group_tiles = size_n // tiling.n_tile, max(group // tiling.k_tile, 1)
        _stripe[(programs,)](
            part, words, scales, result, room, launch.rows, size_k, size_n, stripes.k_tiles, n_tiles,
            stripes.num_tiles, stripes.stripe_tiles, group_tiles, K_TILE=tiling.k_tile, num_warps=WARPS,
            num_stages=STAGES, **settings,
        )  # fmt: skip
        if stripes.reductions:
            _reduce[(stripes.slices,)](
                scales, result, room, launch.rows, size_n, stripes.k_tiles, n_tiles, stripes.stripe_tiles, **settings
            )
    return out


class MarlinLinear(torch.nn.Module):
    """A linear layer whose weight [rows, cols] stays in MARLIN's form, for half-float activations."""

    words: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, packed: Packed, bias: torch.Tensor | None = None, device: str | torch.device = "cuda") -> None:
        super().__init__()
        if not fits(packed.shape):
            raise InputError(
                f"MARLIN multiplies with inputs in multiples of {marlin.K_MULTIPLE} and outputs of "
                f"{marlin.N_MULTIPLE}; a layer of {packed.shape[1]} and {packed.shape[0]} takes PackedLinear"
            )
        weight = marlin.from_packed(packed)
        if weight.group not in (marlin.GROUP, packed.shape[1]):
            raise InputError(f"{packed.spec}: MARLIN multiplies with groups of {marlin.GROUP}, such as int4-g128")
        self.group, self.num_rows = weight.group, packed.shape[0]
        self.register_buffer("words", torch.from_numpy(weight.words).to(device))
        self.register_buffer("scales", torch.from_numpy(np.ascontiguousarray(weight.scales)).to(device))
        self.register_buffer("bias", None if bias is None else bias.to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., cols] float16 -> [..., rows]."""
        flat = x.reshape(-1, x.shape[-1])
        out = multiply(flat, self.words, self.scales, self.group).reshape(*x.shape[:-1], self.num_rows)
        return out if self.bias is None else out + self.bias.to(x.dtype)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a matrix [rows, cols] is made of whole tiles."""
    return len(shape) == 2 and shape[0] % marlin.N_MULTIPLE == 0 and shape[1] % marlin.K_MULTIPLE == 0
