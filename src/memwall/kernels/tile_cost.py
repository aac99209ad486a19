"""What a tile program costs on a GPU, counted from its layouts without running it.

Per instruction: the widest vector that the layout, the memory's order and the alignment of its offsets allow; requests
of warps; 32-byte sectors of global memory that they touch; extra cycles for bank conflicts in shared memory. Per
program: bytes that move, times that each instruction runs (conditions evaluated), registers per thread, shared bytes.

Loads of 16-bit tiles in fragments count as ldmatrix: eight rows of 16 bytes a phase. All figures are a model of the
memory system as its manuals describe it, not measurements.
Source: Tilus (2025, arXiv 2504.12984), vectorization by layout and alignment; CUDA C++ programming guide, memory
accesses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_casts import operations
from memwall.kernels.tile_infer import plan_shared, register_bytes
from memwall.kernels.tile_layout import local, spatial
from memwall.kernels.tile_memory import SECTOR_BYTES, bank_conflicts, sectors
from memwall.kernels.tile_program import (
    WARP,
    Condition,
    Expr,
    Instruction,
    Loop,
    Node,
    Scalar,
    Tensor,
    TileProgram,
    evaluate,
    instructions,
)

MATRIX = spatial(8, 4).compose(local(1, 2))
"""What one matrix of ldmatrix hands to a warp."""
WIDTHS = (16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One instruction that moves a tile. times: runs in the whole grid; the rest is of one run.

    vector_bytes: moved by a thread at once; requests: of warps; sectors: of global memory; conflicts: extra cycles.
    """

    text: str
    op: str
    memory: str
    times: int
    tile_bytes: int
    vector_bytes: int
    requests: int
    sectors: int
    conflicts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A program's cost. read_bytes: by global parameter, whole grid; cast_operations: of a thread, whole grid."""

    name: str
    accesses: tuple[Access, ...]
    read_bytes: dict[str, int]
    registers: int
    shared_bytes: int
    multiply_adds: int
    cast_operations: int

    @property
    def conflicts(self) -> int:
        """Extra cycles in the whole grid."""
        return sum(access.conflicts * access.times for access in self.accesses)

    @property
    def sectors(self) -> int:
        return sum(access.sectors * access.times for access in self.accesses)


def cost(program: TileProgram) -> Cost:
    """Counts a program whose layouts are known."""
    times = run_counts(program)
    accesses = []
    read: dict[str, int] = {}
    products = casts = 0
    for step in instructions(program.body):
        n = times.get(id(step), 0)
        if step.op in ("load_global", "store_global", "load_shared", "store_shared"):
            accesses.append(_register_access(program, step, n))
        elif step.op == "copy_async":
            accesses.append(_copy_access(step, n))
        elif step.op == "dot":
            products += n * step.args[0].shape[0] * step.args[0].shape[1] * step.args[1].shape[1]
        elif step.op == "cast" and step.out is not None and step.args[0].dtype.narrow:
            casts += n * (operations(step.args[0].dtype) + 2) * step.out.held.num_slots // 2
        source = step.args[0] if step.op == "load_global" else step.args[1] if step.op == "copy_async" else None
        if source is not None:
            read[source.name] = read.get(source.name, 0) + n * accesses[-1].tile_bytes
    _, shared = plan_shared(program)
    return Cost(
        name=program.name,
        accesses=tuple(accesses),
        read_bytes=read,
        registers=registers(program),
        shared_bytes=shared,
        multiply_adds=products,
        cast_operations=casts,
    )


# -- how often -------------------------------------------------------------------------------------------------------


def run_counts(program: TileProgram) -> dict[int, int]:
    """How often each instruction runs in the whole grid, by id; loops are walked where a condition asks for it."""
    found: dict[int, int] = {}

    def walk(nodes: Sequence[Node], variables: dict[str, int], weight: int) -> None:
        for node in nodes:
            if isinstance(node, Loop):
                if _asked(node.body, node.variable):
                    for value in range(node.count):
                        walk(node.body, variables | {node.variable: value}, weight)
                else:
                    walk(node.body, variables | {node.variable: 0}, weight * node.count)
            elif isinstance(node, Condition):
                if evaluate(node.test, variables):
                    walk(node.body, variables, weight)
            else:
                found[id(node)] = found.get(id(node), 0) + weight

    axes = [f"block{axis}" for axis in range(len(program.grid))]
    free = [not _asked(program.body, axis) for axis in axes]
    weight = math.prod(n for n, unasked in zip(program.grid, free, strict=True) if unasked)
    for index in np.ndindex(*(1 if unasked else n for n, unasked in zip(program.grid, free, strict=True))):
        walk(program.body, dict(zip(axes, index, strict=True)), weight)
    return found


def _asked(nodes: Sequence[Node], variable: str) -> bool:
    """Whether a condition below depends on this variable."""
    for node in nodes:
        if isinstance(node, Condition) and _mentions(node.test, variable):
            return True
        if not isinstance(node, Instruction) and _asked(node.body, variable):
            return True
    return False


def _mentions(scalar: Scalar, variable: str) -> bool:
    if isinstance(scalar, int):
        return False
    return scalar.args[0] == variable if scalar.op == "var" else any(_mentions(arg, variable) for arg in scalar.args)


# -- one access ------------------------------------------------------------------------------------------------------


def divisor(scalar: Scalar) -> int:
    """A number that surely divides the scalar; 0 for zero itself."""
    if isinstance(scalar, int):
        return scalar
    if scalar.op in ("+", "-", "%"):
        return math.gcd(*(divisor(arg) for arg in scalar.args))
    if scalar.op == "*":
        return divisor(scalar.args[0]) * divisor(scalar.args[1])
    return 1


def base_alignment(memory: Tensor, offsets: Sequence[Scalar], most: int = 16) -> int:
    """Bytes, up to `most`, that the tile surely begins at a multiple of; tensors begin at multiples of `most`."""
    size = memory.dtype.bits // 8
    total: Scalar = 0
    for offset, stride in zip(offsets, memory.placed.strides, strict=True):
        total = Expr("+", (total, Expr("*", (offset, stride * size))))
    return math.gcd(divisor(total), most)


def _phase(memory: Tensor, offsets: Sequence[Scalar]) -> int:
    """Where in a sector a tile of global memory can begin at worst."""
    return base_alignment(memory, offsets, SECTOR_BYTES) % SECTOR_BYTES if memory.space == "global" else 0


def vector_bytes(step: Instruction) -> int:
    """The widest vector of a load or store between registers and memory."""
    memory, tile = (step.args[0], step.out if step.out is not None else step.args[1])
    size = memory.dtype.bits // 8
    if not size:
        return 1
    at = _byte_offsets(step, memory, tile)
    aligned = base_alignment(memory, step.attrs["offsets"])
    for width in WIDTHS:
        each = max(width // size, 1)
        if at.shape[1] % each or aligned % width or width < size:
            continue
        parts = at.reshape(len(at), -1, each)
        if (np.diff(parts, axis=2) == size).all() and (parts[:, :, 0] % width == 0).all():
            return width
    return size


def _byte_offsets(step: Instruction, memory: Tensor, tile: Tensor) -> np.ndarray:
    table = tile.held.table()
    index = np.zeros((*table.shape[:2], len(memory.shape)), np.int64)
    for along, dim in enumerate(step.attrs["dims"]):
        index[..., dim] = table[..., along]
    return memory.placed.offset(index) * memory.dtype.bits // 8


def _register_access(program: TileProgram, step: Instruction, times: int) -> Access:
    memory, tile = (step.args[0], step.out if step.out is not None else step.args[1])
    at = _byte_offsets(step, memory, tile)
    bits = memory.dtype.bits
    rows = _matrix_rows(step, memory, tile)
    if rows is not None:
        conflicts = sum(bank_conflicts(row, 16) for row in rows)
        return Access(
            text=str(step), op="ldmatrix", memory=memory.name, times=times,
            tile_bytes=math.prod(tile.shape) * bits // 8, vector_bytes=16, requests=-(-len(rows) // 4), sectors=0,
            conflicts=conflicts,
        )  # fmt: skip
    width = vector_bytes(step)
    each = max(width * 8 // bits, 1)
    starts = at[:, ::each] + _phase(memory, step.attrs["offsets"])
    touched = extra = 0
    for warp in range(program.warps):
        lanes = starts[warp * WARP : (warp + 1) * WARP]
        for request in range(lanes.shape[1]):
            if memory.space == "global":
                touched += sectors(lanes[:, request], width)
            else:
                extra += bank_conflicts(lanes[:, request], width)
    return Access(
        text=str(step), op=step.op, memory=memory.name, times=times, tile_bytes=math.prod(tile.shape) * bits // 8,
        vector_bytes=width, requests=program.warps * starts.shape[1], sectors=touched, conflicts=extra,
    )  # fmt: skip


def _matrix_rows(step: Instruction, memory: Tensor, tile: Tensor) -> list[np.ndarray] | None:
    """Addresses of eight rows for each 8 x 8 matrix of a load that ldmatrix can do; None for others."""
    if step.op != "load_shared" or memory.dtype.bits != 16 or len(tile.shape) != 2:
        return None
    try:
        tiles = tile.held.divide(MATRIX).table().reshape(-1, 2)
    except InputError:
        return None
    found = []
    for row, column in tiles * np.asarray(MATRIX.shape):
        index = np.zeros((8, len(memory.shape)), np.int64)
        index[:, step.attrs["dims"][0]] = row + np.arange(8)
        index[:, step.attrs["dims"][1]] = column
        found.append(memory.placed.offset(index) * 2)
    return found


def _copy_access(step: Instruction, times: int) -> Access:
    """copy_async: vectors of the tile in row-major order, thread after thread; 4, 8 or 16 bytes are asynchronous."""
    target, source = step.args
    shape, size = step.attrs["shape"], source.dtype.bits // 8
    sides: list[Any] = []
    width = math.gcd(shape[-1] * size, 16)
    for tensor, key in ((target, "target_offsets"), (source, "source_offsets")):
        ahead = len(tensor.shape) - len(shape)
        tile = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, len(shape))
        index = np.concatenate([np.zeros((len(tile), ahead), np.int64), tile], axis=1)
        sides.append(tensor.placed.offset(index) * size)
        width = math.gcd(width, base_alignment(tensor, step.attrs[key]))
    per = width // size
    to, come = (side[::per] for side in sides)
    come = come + _phase(source, step.attrs["source_offsets"])
    touched = sum(sectors(come[i : i + WARP], width) for i in range(0, len(come), WARP))
    extra = sum(bank_conflicts(to[i : i + WARP], width) for i in range(0, len(to), WARP))
    return Access(
        text=str(step), op="copy_async", memory=source.name, times=times, tile_bytes=math.prod(shape) * size,
        vector_bytes=width, requests=-(-len(come) // WARP), sectors=touched, conflicts=extra,
    )  # fmt: skip


# -- registers -------------------------------------------------------------------------------------------------------


def registers(program: TileProgram) -> int:
    """32-bit registers per thread that tiles take where most are alive; views share those of what they view.

    Tiles are counted whole: a compiler that decodes slot by slot needs fewer.
    """
    steps: list[Instruction] = []
    spans: list[tuple[int, int]] = []  # of loops

    def order(nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(node, Instruction):
                steps.append(node)
            else:
                first = len(steps)
                order(node.body)
                if isinstance(node, Loop):
                    spans.append((first, len(steps)))

    order(program.body)
    same: dict[int, int] = {}  # tile -> the one whose registers it shares
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    size: dict[int, int] = {}
    for at, step in enumerate(steps):
        for tensor in (*step.args, *([step.out] if step.out is not None else [])):
            if tensor.space != "register":
                continue
            if step.op in ("view", "reshape") and tensor is step.out:
                same[id(tensor)] = same.get(id(step.args[0]), id(step.args[0]))
            key = same.get(id(tensor), id(tensor))
            born.setdefault(key, at)
            size.setdefault(key, register_bytes(tensor))
            end = at
            for first, last in spans:  # what was made before a loop and is used in it lives to its end
                if born[key] < first <= at < last:
                    end = max(end, last - 1)
            dies[key] = max(dies.get(key, 0), end)
    alive = [sum(size[k] for k in born if born[k] <= at <= dies[k]) for at in range(len(steps))]
    return max(alive, default=0) // 4
