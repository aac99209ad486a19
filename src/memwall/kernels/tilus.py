"""Weight-only products for every type of 1 to 8 bits, written once as tile programs.

Source: "Tilus: A Virtual Machine for Arbitrary Low-Precision GPGPU Computation in LLM Serving" (2025, arXiv 2504.12984;
later "A Tile-Level GPGPU Programming Language for Low-Precision Computation", ASPLOS 2026), weight layout, matmul.
Idea: weights are stored so that the bytes which a thread loads in wide vectors *are*, read as codes of b bits, the part
of the tile that the matrix instruction wants in that thread: `view` costs nothing, for any b. The same bytes run on a
GPU (`matmul_program`, `direct_program`) and on a CPU (`matvec_program`), where 32 threads are lanes of vectors and
tiles may lie column by column.
Units and shapes: codes uint8 [K, N]; packed uint8 [K / tile_k, N / tile_n, bytes]; scales float16 [K / group, N];
activations [M, K]; results [M, N]. Value of a weight = type's value of its code times its group's scale.
Differs from the paper: shapes are static; the NumPy and C++ forms count ldmatrix only (`tile_cost`); Triton's program
has no shared memory of its own, since Triton manages that itself.
Cost: K N b / 8 bytes of codes and 2 K N / group of scales, read once per ceil(M / block rows).
Holds when: tile sizes are multiples of 16, the group one of the tile's k; K and N are filled up to whole blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memwall.errors import InputError
from memwall.kernels.tile_infer import infer
from memwall.kernels.tile_layout import MMA_C, Layout, build, local, spatial
from memwall.kernels.tile_memory import MemoryLayout, swizzled_memory
from memwall.kernels.tile_program import Expr, Scalar, Tensor, TileProgram
from memwall.kernels.tilus_weights import (
    DEFAULT_GROUP,
    LANES,
    WEIGHT_TILE,
    Weights,
    encode,
    flat_layout,
    pack_weights,
    prepare,
    quantize,
    round_activations,
    thread_bytes,
    tile_layout,
    unpack_weights,
)

__all__ = [
    "WEIGHT_TILE",
    "Config",
    "Weights",
    "direct_program",
    "encode",
    "flat_layout",
    "matmul_program",
    "matvec_program",
    "pack_weights",
    "prelayout_program",
    "prepare",
    "quantize",
    "round_activations",
    "thread_bytes",
    "tile_layout",
    "unpack_weights",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Tunable settings; the lists are those of the authors' example.

    warp_spatial: warps along m and n; warp_repeat: their 16 x 8 x 16 tiles along m, n, k; split_k: blocks that share an
    output tile, in order; cpu_tiles: weight tiles side by side in a block of `matvec_program`.
    """

    warp_spatial: tuple[int, int] = (1, 4)
    warp_repeat: tuple[int, int, int] = (1, 4, 2)
    num_stages: int = 3
    split_k: int = 1
    cpu_tiles: int = 4

    @property
    def block(self) -> tuple[int, int, int]:
        """Rows, columns and k of a block's step."""
        (m, n), (rm, rn, rk) = self.warp_spatial, self.warp_repeat
        return m * rm * 16, n * rn * 8, rk * 16


WARP_SPATIALS = ((1, 4), (1, 8), (2, 4))
WARP_REPEATS = ((2, 4, 1), (1, 8, 1), (2, 4, 2), (4, 2, 2), (1, 8, 2))
NUM_STAGES = (3, 4)
SPLITS = (1, 8, 16)
CPU_TILES = (4, 8, 16)
AHEAD_BYTES = 1024
"""Of a run of tiles along k that a processor asks for before they are read."""


# -- programs --------------------------------------------------------------------------------------------------------


def prelayout_program(dtype: str, rows: int, columns: int, weight_tile: tuple[int, int] = WEIGHT_TILE) -> TileProgram:
    """`pack_weights` as a tile program: codes [K, N] as one stream of bits -> stored form."""
    tile_k, tile_n = weight_tile
    held = thread_bytes(dtype, weight_tile)
    p = TileProgram(f"prelayout_{dtype}", grid=(rows // tile_k, columns // tile_n))
    source = p.global_view("codes", dtype, (rows, columns))
    target = p.global_view("packed", "u8", (rows // tile_k, columns // tile_n, LANES * held))
    at = (p.block(0), p.block(1))
    tile = p.load_global(source, (at[0] * tile_k, at[1] * tile_n), weight_tile, layout=tile_layout(weight_tile))
    p.store_global(target, p.view(tile, "u8", flat_layout(held)), (*at, 0))
    return infer(p)


def _check(name: str, k: int, n: int, group: int, block: tuple[int, int], weight_tile: tuple[int, int]) -> None:
    block_n, block_k = block
    if k % (block_k) or n % block_n or group % block_k or block_k % weight_tile[0] or block_n % weight_tile[1]:
        raise InputError(
            f"{name} of K {k}, N {n}, group {group} does not divide into steps of k {block_k}, n {block_n} of weight "
            f"tiles {weight_tile}"
        )


def _weight_layouts(config: Config, dtype: str, weight_tile: tuple[int, int]) -> tuple[Layout, Layout]:
    """(bytes [k tiles, n tiles, tile bytes], codes [k, n]) of a block's step: the same bits in every thread."""
    _, block_n, block_k = config.block
    wm, wn = config.warp_spatial
    tiles_k, tiles_n = block_k // weight_tile[0], block_n // weight_tile[1] // wn
    if config.warp_repeat[1] * 8 % weight_tile[1]:
        raise InputError(f"{config}: a warp's columns are no multiple of the weight tile {weight_tile}")
    warps = spatial(wm, wn).reduce((0,))
    held = thread_bytes(dtype, weight_tile)
    flat = flat_layout(held).reshape((1, 1, LANES * held))
    outer = build((tiles_k, wn * tiles_n), [(-1, wm, 0), (1, wn, tiles_n)], [(0, tiles_k, 1), (1, tiles_n, 1)])
    assert warps.num_threads == outer.num_threads
    return outer.unsqueeze(2).compose(flat), outer.compose(tile_layout(weight_tile))


def _sums_layout(config: Config) -> Layout:
    return spatial(*config.warp_spatial).compose(local(*config.warp_repeat[:2])).compose(MMA_C)


def matmul_program(
    dtype: str,
    m: int,
    n: int,
    k: int,
    *,
    group: int = DEFAULT_GROUP,
    config: Config | None = None,
    activations: str = "f16",
    weight_tile: tuple[int, int] = WEIGHT_TILE,
) -> TileProgram:
    """The paper's product: stages in shared memory, bytes viewed as codes, fragments multiplied, splits added in order.

    Parameters: x [m, k], packed, scales, out [m, n]; partial float32 [m, n] where split_k is above 1.
    """
    config = config or Config()
    block_m, block_n, block_k = config.block
    _check("matmul", k // config.split_k, n, group, (block_n, block_k), weight_tile)
    grid = (-(-m // block_m), n // block_n, config.split_k)
    p = TileProgram(f"matmul_{dtype}", grid=grid, warps=math.prod(config.warp_spatial))
    held = LANES * thread_bytes(dtype, weight_tile)
    tiles = (block_k // weight_tile[0], block_n // weight_tile[1])
    x = p.global_view("x", activations, (m, k))
    packed = p.global_view("packed", "u8", (k // weight_tile[0], n // weight_tile[1], held))
    scales = p.global_view("scales", "f16", (k // group, n))
    out = p.global_view("out", activations, (m, n))
    stages, steps = config.num_stages, k // block_k // config.split_k
    rows = swizzled_memory((stages, block_m, block_k), 2)
    x_shared = p.shared_tensor(activations, (stages, block_m, block_k), rows)
    packed_shared = p.shared_tensor("u8", (stages, *tiles, held))
    scales_shared = p.shared_tensor("f16", (stages, 1, block_n))
    row, column, first = p.block(0) * block_m, p.block(1) * block_n, p.block(2) * steps

    def fetch(step: Scalar, stage: Scalar) -> None:
        at = first + step
        p.copy_async(x_shared, x, (stage, 0, 0), (row, at * block_k), (block_m, block_k))
        p.copy_async(packed_shared, packed, (stage, 0, 0, 0), (at * tiles[0], p.block(1) * tiles[1], 0), (*tiles, held))
        p.copy_async(scales_shared, scales, (stage, 0, 0), (at * block_k // group, column), (1, block_n))

    acc = p.register_tensor("f32", (block_m, block_n), layout=_sums_layout(config))
    for stage in range(stages - 1):
        if stage < steps:
            fetch(stage, stage)
        p.commit_group()
    p.wait_group(stages - 2)
    p.sync()
    bytes_layout, codes_layout = _weight_layouts(config, dtype, weight_tile)
    with p.loop(steps) as step:
        at = step % stages
        a = p.load_shared(x_shared, (at, 0, 0), (block_m, block_k))
        raw = p.load_shared(packed_shared, (at, 0, 0, 0), (*tiles, held), layout=bytes_layout)
        weights = p.cast(p.view(raw, dtype, codes_layout), activations)
        scale = p.load_shared(scales_shared, (at, 0, 0), (1, block_n))
        scale = scale if activations == "f16" else p.cast(scale, activations)
        p.dot(a, p.mul(weights, scale), acc)
        with p.when(step + (stages - 1) < steps):
            fetch(step + (stages - 1), (step + (stages - 1)) % stages)
        p.commit_group()
        p.wait_group(stages - 2)
        p.sync()
    p.wait_all()
    for tensor in (x_shared, packed_shared, scales_shared):
        p.free_shared(tensor)
    _add_in_order(p, config, acc, (m, n), (row, column))
    _store_rows(p, out, acc, (row, column))
    return infer(p)


def _store_rows(p: TileProgram, out: Tensor, acc: Tensor, at: tuple[Scalar, Scalar]) -> None:
    """The last block of an output tile turns fragments into rows in shared memory, and stores those."""
    tile = (acc.shape[0], acc.shape[1])
    with p.when(p.block(2).equals(p.grid[2] - 1)):
        rows = p.shared_tensor(out.dtype.name, tile, swizzled_memory(tile, 2))
        p.store_shared(rows, p.cast(acc, out.dtype.name), (0, 0))
        p.sync()
        p.store_global(out, p.load_shared(rows, (0, 0), tile), at)
    if p.grid[2] > 1:
        p.release(p.block(0) * p.grid[1] + p.block(1), p.block(2) + 1)


def _add_in_order(
    p: TileProgram, config: Config, acc: Tensor, shape: tuple[int, int], at: tuple[Scalar, Scalar]
) -> None:
    """Blocks of one output tile wait for the one before, add what it left, and leave their sums to the next."""
    if config.split_k == 1:
        return
    partial = p.global_view("partial", "f32", shape)
    tile = (acc.shape[0], acc.shape[1])
    p.lock(p.block(0) * p.grid[1] + p.block(1), p.block(2))
    with p.when(Expr("<", (0, p.block(2)))):
        p.assign(acc, p.add(p.load_global(partial, at, tile, layout=acc.layout), acc))
    with p.when(p.block(2) < config.split_k - 1):
        p.store_global(partial, acc, at)


def direct_program(
    dtype: str,
    m: int,
    n: int,
    k: int,
    *,
    group: int = DEFAULT_GROUP,
    config: Config | None = None,
    activations: str = "f16",
    weight_tile: tuple[int, int] = WEIGHT_TILE,
) -> TileProgram:
    """The same product without shared memory: what Triton is given, which pipelines loads itself. Sums in one block."""
    config = config or Config()
    block_m, block_n, block_k = config.block
    _check("direct product", k, n, group, (block_n, block_k), weight_tile)
    p = TileProgram(f"direct_{dtype}", grid=(-(-m // block_m), n // block_n), warps=math.prod(config.warp_spatial))
    held = LANES * thread_bytes(dtype, weight_tile)
    tiles = (block_k // weight_tile[0], block_n // weight_tile[1])
    x = p.global_view("x", activations, (m, k))
    packed = p.global_view("packed", "u8", (k // weight_tile[0], n // weight_tile[1], held))
    scales = p.global_view("scales", "f16", (k // group, n))
    out = p.global_view("out", activations, (m, n))
    row, column = p.block(0) * block_m, p.block(1) * block_n
    bytes_layout, codes_layout = _weight_layouts(config, dtype, weight_tile)
    acc = p.register_tensor("f32", (block_m, block_n), layout=_sums_layout(config))
    with p.loop(k // block_k) as step:
        a = p.load_global(x, (row, step * block_k), (block_m, block_k))
        raw = p.load_global(packed, (step * tiles[0], p.block(1) * tiles[1], 0), (*tiles, held), layout=bytes_layout)
        weights = p.cast(p.view(raw, dtype, codes_layout), activations)
        scale = p.load_global(scales, (step * block_k // group, column), (1, block_n))
        if activations != "f16":
            scale = p.cast(scale, activations)
        p.dot(a, p.mul(weights, scale), acc)
    p.store_global(out, p.cast(acc, activations), (row, column))
    return infer(p)


def matvec_program(
    dtype: str,
    m: int,
    n: int,
    k: int,
    *,
    group: int = DEFAULT_GROUP,
    config: Config | None = None,
    weight_tile: tuple[int, int] = WEIGHT_TILE,
    by_columns: bool = False,
    rounded: bool = False,
) -> TileProgram:
    """Few tokens: each code is read and converted once, and multiplied with its x of every token, in float32.

    Parameters: x float32 [m, k], packed, scales, out float32 [m, n]. A group's sum is multiplied by its scale once. The
    k of a tile is cut in (places of a thread, 4 threads, places): the places are summed in the thread, threads at the
    end. by_columns: packed lies as `Weights.by_columns` has it, the tiles of a block one after the other along k; a
    processor reads such runs up to twice as fast as pieces of some hundred bytes a power of two apart. rounded: x as
    `round_activations` makes it, i8 [m, k] with x_scales float32 [m, k / group]; products of integers of up to 8 bits
    then are integer dot products.
    """
    config = config or Config()
    tile_k, tile_n = weight_tile
    block_n = tile_n * config.cpu_tiles
    _check("matvec", k, n, group, (block_n, tile_k), weight_tile)
    if not 1 <= m <= 16:
        raise InputError(f"matvec takes 1 to 16 tokens, got {m}: more go through matmul")
    p = TileProgram(f"matvec_{dtype}", grid=(n // block_n,))
    held = thread_bytes(dtype, weight_tile)
    x = p.global_view("x", "i8" if rounded else "f32", (m, k, 1))
    tiles, tile_bytes = (k // tile_k, n // tile_n, LANES * held), LANES * held
    along = MemoryLayout(tiles, (tile_bytes, tiles[0] * tile_bytes, 1)) if by_columns else None
    packed = p.global_view("packed", "u8", tiles, along)
    scales = p.global_view("scales", "f16", (k // group, n))
    out = p.global_view("out", "f32", (m, n))
    side_by_side = local(1, config.cpu_tiles)
    bytes_layout = side_by_side.unsqueeze(2).compose(flat_layout(held).reshape((1, 1, LANES * held)))
    codes_layout = side_by_side.compose(tile_layout(weight_tile))
    places, sums = (m, tile_k // 8, 4, 2, block_n), (m, 1, 4, 1, block_n)
    total = p.register_tensor("f32", sums)
    if rounded:
        x_scales = p.global_view("x_scales", "f32", (m, k // group, 1, 1, 1))
    column = p.block(0) * block_n
    with p.loop(k // group) as part:
        acc = p.register_tensor("f32", sums)
        with p.loop(group // tile_k) as inner:
            step = part * (group // tile_k) + inner
            raw = p.load_global(
                packed,
                (step, p.block(0) * config.cpu_tiles, 0),
                (1, config.cpu_tiles, LANES * held),
                layout=bytes_layout,
                prefetch=-(-AHEAD_BYTES // tile_bytes) if by_columns else 4,
            )
            codes = p.cast(p.view(raw, dtype, codes_layout), "f32")
            values = p.load_global(x, (0, step * tile_k, 0), (m, tile_k, 1))
            if rounded:
                values = p.cast(values, "f32")
            products = p.mul(p.reshape(codes, (1, tile_k, block_n)), values)
            p.annotate(products, local(m).concat(codes_layout))
            p.assign(acc, p.add(acc, p.reduce("sum", p.reshape(products, places), (1, 3))))
        scale = p.cast(p.load_global(scales, (part, column), (1, block_n)), "f32")
        scaled = p.mul(acc, p.reshape(scale, (1, 1, 1, 1, block_n)))
        if rounded:
            scaled = p.mul(scaled, p.load_global(x_scales, (0, part, 0, 0, 0), (m, 1, 1, 1, 1)))
        p.assign(total, p.add(total, scaled))
    p.store_global(out, p.reshape(p.reduce("sum", total, (2,)), (m, block_n)), (0, column))
    return infer(p)
