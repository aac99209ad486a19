"""Weight-only products for every type of 1 to 8 bits, written once as tile programs.

Source: "Tilus: A Virtual Machine for Arbitrary Low-Precision GPGPU Computation in LLM Serving" (2025, arXiv 2504.12984;
later "A Tile-Level GPGPU Programming Language for Low-Precision Computation", ASPLOS 2026), weight layout, matmul.
Idea: weights are stored so that the bytes which a thread loads in wide vectors *are*, read as codes of b bits, the part of
the tile that the matrix instruction wants in that thread: `view` costs nothing, for any b. The same bytes run on a GPU
(`matmul_program`, `direct_program`) and on a CPU (`matvec_program`), where 32 threads are lanes of vectors.
Units and shapes: codes uint8 [K, N]; packed uint8 [K / tile_k, N / tile_n, bytes]; scales float16 [K / group, N];
activations [M, K]; results [M, N]. Value of a weight = type's value of its code times its group's scale.
Differs from the paper: shapes are static; no ldmatrix, only its addresses are counted (`tile_cost`); Triton's program has
no shared memory of its own, since Triton manages that itself.
Cost: K N b / 8 bytes of codes and 2 K N / group of scales, read once per ceil(M / block rows).
Holds when: tile sizes are multiples of 16, the group one of the tile's k; K and N are filled up to whole blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_infer import infer
from memwall.kernels.tile_layout import MMA_B, MMA_C, Layout, build, local, spatial
from memwall.kernels.tile_memory import MemoryLayout, swizzled_memory
from memwall.kernels.tile_program import Expr, Scalar, Tensor, TileProgram
from memwall.kernels.tile_types import pack, slice_bytes, tile_type, unpack

LANES = 32
DEFAULT_GROUP = 128
WEIGHT_TILE = (16, 16)


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
    cpu_tiles: int = 8

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A matrix ready for the programs. shape: [K, N] as given; the buffers are filled up to whole tiles and groups."""

    dtype: str
    shape: tuple[int, int]
    group: int
    weight_tile: tuple[int, int]
    packed: np.ndarray
    scales: np.ndarray

    @property
    def padded(self) -> tuple[int, int]:
        return self.packed.shape[0] * self.weight_tile[0], self.packed.shape[1] * self.weight_tile[1]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def decode(self) -> np.ndarray:
        """float32 [K, N], code's value times scale."""
        codes = unpack_weights(self.packed, self.dtype, self.weight_tile)
        values = tile_type(self.dtype).decode(codes) * np.repeat(self.scales.astype(np.float32), self.group, axis=0)
        found: np.ndarray = values[: self.shape[0], : self.shape[1]]
        return found


# -- weights ---------------------------------------------------------------------------------------------------------


def tile_layout(weight_tile: tuple[int, int]) -> Layout:
    """How a warp holds a weight tile: fragments of the matrix instruction, k before n."""
    k, n = weight_tile
    if k % MMA_B.shape[0] or n % MMA_B.shape[1]:
        raise InputError(f"weight tile {weight_tile}: multiples of {MMA_B.shape}")
    return local(k // MMA_B.shape[0], n // MMA_B.shape[1]).compose(MMA_B)


def flat_layout(thread_bytes: int) -> Layout:
    """The tile as bytes: vectors of up to 16 bytes, neighbouring threads side by side."""
    inner = math.gcd(thread_bytes, 16)
    return local(thread_bytes // inner).compose(spatial(LANES)).compose(local(inner))


def thread_bytes(dtype: str, weight_tile: tuple[int, int]) -> int:
    """Bytes of a tile that each of the 32 threads holds."""
    return slice_bytes(tile_type(dtype), tile_layout(weight_tile).num_slots)


def pack_weights(codes: np.ndarray, dtype: str, weight_tile: tuple[int, int] = WEIGHT_TILE) -> np.ndarray:
    """uint8 codes [K, N], multiples of the tile -> uint8 [K / tile_k, N / tile_n, bytes of a tile]."""
    tile_k, tile_n = weight_tile
    rows, columns = codes.shape
    if rows % tile_k or columns % tile_n:
        raise InputError(f"weights [{rows}, {columns}] are no multiple of the tile {weight_tile}")
    tiles = codes.reshape(rows // tile_k, tile_k, columns // tile_n, tile_n).transpose(0, 2, 1, 3)
    table = tile_layout(weight_tile).table()
    held = pack(tile_type(dtype), tiles[:, :, table[..., 0], table[..., 1]])
    at = flat_layout(held.shape[-1]).flat_table()
    packed = np.empty((*held.shape[:2], LANES * held.shape[-1]), np.uint8)
    packed[..., at] = held
    return packed


def unpack_weights(packed: np.ndarray, dtype: str, weight_tile: tuple[int, int] = WEIGHT_TILE) -> np.ndarray:
    """The inverse of `pack_weights`."""
    tile_k, tile_n = weight_tile
    layout = tile_layout(weight_tile)
    at = flat_layout(packed.shape[-1] // LANES).flat_table()
    held = unpack(tile_type(dtype), packed[..., at], layout.num_slots)
    tiles = np.empty((*packed.shape[:2], tile_k, tile_n), np.uint8)
    table = layout.table()
    tiles[:, :, table[..., 0], table[..., 1]] = held
    return tiles.transpose(0, 2, 1, 3).reshape(packed.shape[0] * tile_k, packed.shape[1] * tile_n)


def quantize(weights: np.ndarray, dtype: str, group: int = DEFAULT_GROUP) -> tuple[np.ndarray, np.ndarray]:
    """float [K, N], K a multiple of the group -> codes, scales: the largest magnitude of a group is the type's largest."""
    form = tile_type(dtype)
    if not form.narrow:
        raise InputError(f"{dtype} is no type of 1 to 8 bits")
    if form.kind == "uint" and (weights < 0).any():
        raise InputError(f"{dtype} has no negative numbers: take i{form.bits} or a float of {form.bits} bits")
    if not np.isfinite(weights).all():
        raise InputError(f"{dtype} cannot hold NaN or infinite values")
    grouped = np.asarray(weights, np.float32).reshape(-1, group, weights.shape[1])
    top = np.abs(grouped).max(axis=1) / np.float32(form.largest)
    scales = np.maximum(top, np.float32(2.0**-24)).astype(np.float16)  # a scale of zero has no quotient
    if not np.isfinite(scales).all():
        raise InputError(f"{dtype}: weights up to {np.abs(weights).max():.3g} need scales beyond float16")
    codes = form.encode(grouped / scales[:, None].astype(np.float32))
    return codes.reshape(weights.shape), scales


def prepare(
    codes: np.ndarray,
    scales: np.ndarray,
    dtype: str,
    *,
    group: int = DEFAULT_GROUP,
    weight_tile: tuple[int, int] = WEIGHT_TILE,
    columns: int = 128,
) -> Weights:
    """Codes [K, N] and scales [K / group, N] in the stored form, filled with zeros to whole groups and `columns`."""
    k, n = codes.shape
    if group % weight_tile[0] or scales.shape != (-(-k // group), n) or not k or not n:
        raise InputError(
            f"codes [{k}, {n}] in groups of {group}: a multiple of the tile's {weight_tile[0]}, with scales "
            f"[{-(-k // group)}, {n}], got {list(scales.shape)}"
        )
    if int(codes.max()) >> tile_type(dtype).bits:
        raise InputError(f"codes up to {codes.max()} do not fit {dtype}")
    more = ((0, -k % group), (0, -n % math.lcm(columns, weight_tile[1])))
    packed = pack_weights(np.pad(codes, more), dtype, weight_tile)
    held = np.ascontiguousarray(np.pad(scales.astype(np.float16), ((0, 0), more[1])))
    return Weights(dtype=dtype, shape=(k, n), group=group, weight_tile=weight_tile, packed=packed, scales=held)


def encode(weights: np.ndarray, dtype: str, group: int = DEFAULT_GROUP) -> Weights:
    """float [K, N] -> Weights: `quantize` and `prepare`."""
    if weights.ndim != 2:
        raise InputError(f"weights are a matrix [K, N], got shape {list(weights.shape)}")
    filled = np.pad(np.asarray(weights, np.float32), ((0, -weights.shape[0] % group), (0, 0)))
    codes, scales = quantize(filled, dtype, group)
    made = prepare(codes, scales, dtype, group=group)
    return replace(made, shape=(int(weights.shape[0]), int(weights.shape[1])))


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
    """The paper's product: stages in shared memory, bytes viewed as codes, fragments multiplied, split k added in order.

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
        stage = step % stages
        a = p.load_shared(x_shared, (stage, 0, 0), (block_m, block_k))
        raw = p.load_shared(packed_shared, (stage, 0, 0, 0), (*tiles, held), layout=bytes_layout)
        weights = p.cast(p.view(raw, dtype, codes_layout), activations)
        scale = p.load_shared(scales_shared, (stage, 0, 0), (1, block_n))
        if activations != "f16":
            scale = p.cast(scale, activations)
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
    with p.when(p.block(2).equals(config.split_k - 1)):
        rows_shared = p.shared_tensor(activations, (block_m, block_n))
        p.store_shared(rows_shared, p.cast(acc, activations), (0, 0))
        p.sync()
        p.store_global(out, p.load_shared(rows_shared, (0, 0), (block_m, block_n)), (row, column))
    if config.split_k > 1:
        p.release(p.block(0) * grid[1] + p.block(1), p.block(2) + 1)
    return infer(p)


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
    p = TileProgram(
        f"direct_{dtype}", grid=(-(-m // block_m), n // block_n), warps=math.prod(config.warp_spatial)
    )
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
) -> TileProgram:
    """Few tokens, all in float32: each code is read and converted once, and multiplied with its x of every token.

    Parameters: x float32 [m, k], packed, scales, out float32 [m, n]. A group's sum is multiplied by its scale once. The
    k of a tile is cut in (places of a thread, 4 threads, places): the places are summed in the thread, threads at the end.
    """
    config = config or Config()
    tile_k, tile_n = weight_tile
    block_n = tile_n * config.cpu_tiles
    _check("matvec", k, n, group, (block_n, tile_k), weight_tile)
    if not 1 <= m <= 16:
        raise InputError(f"matvec takes 1 to 16 tokens, got {m}: more go through matmul")
    p = TileProgram(f"matvec_{dtype}", grid=(n // block_n,))
    held = thread_bytes(dtype, weight_tile)
    x = p.global_view("x", "f32", (k, 1, m), MemoryLayout((k, 1, m), (1, 1, k)))
    packed = p.global_view("packed", "u8", (k // tile_k, n // tile_n, LANES * held))
    scales = p.global_view("scales", "f16", (k // group, n))
    out = p.global_view("out", "f32", (n, m), MemoryLayout((n, m), (1, n)))
    side_by_side = local(1, config.cpu_tiles)
    bytes_layout = side_by_side.unsqueeze(2).compose(flat_layout(held).reshape((1, 1, LANES * held)))
    codes_layout = side_by_side.compose(tile_layout(weight_tile))
    places = (tile_k // 8, 4, 2, block_n, m)
    total = p.register_tensor("f32", (1, 4, 1, block_n, m))
    column = p.block(0) * block_n
    with p.loop(k // group) as part:
        acc = p.register_tensor("f32", (1, 4, 1, block_n, m))
        with p.loop(group // tile_k) as inner:
            step = part * (group // tile_k) + inner
            raw = p.load_global(
                packed,
                (step, p.block(0) * config.cpu_tiles, 0),
                (1, config.cpu_tiles, LANES * held),
                layout=bytes_layout,
                prefetch=4,
            )
            codes = p.cast(p.view(raw, dtype, codes_layout), "f32")
            values = p.load_global(x, (step * tile_k, 0, 0), (tile_k, 1, m))
            products = p.mul(p.reshape(codes, (tile_k, block_n, 1)), values)
            p.annotate(products, codes_layout.concat(local(m)))
            p.assign(acc, p.add(acc, p.reduce("sum", p.reshape(products, places), (0, 2))))
        scale = p.cast(p.load_global(scales, (part, column), (1, block_n)), "f32")
        p.assign(total, p.add(total, p.mul(acc, p.reshape(scale, (1, 1, 1, block_n, 1)))))
    sums = p.reshape(p.reduce("sum", total, (1,)), (block_n, m))
    p.store_global(out, sums, (column, 0))
    return infer(p)
