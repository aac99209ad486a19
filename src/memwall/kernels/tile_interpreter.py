"""Runs a tile program in NumPy on bytes: each thread's registers, shared memory and global memory.

A register tile is uint8 [threads, bytes]; `view` hands the same bytes on, so a wrong layout gives wrong numbers.
Shared memory is filled with a pattern first, and an asynchronous copy arrives only when its group has been waited for:
a wait that is missing reads the pattern. Blocks run in any order (`seed`), one after another until they meet a
semaphore.

Source: Tilus (2025, arXiv 2504.12984), the virtual machine's semantics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_casts import cast_codes
from memwall.kernels.tile_infer import plan_shared, slot_map
from memwall.kernels.tile_program import Condition, Instruction, Loop, Node, Tensor, TileProgram, evaluate
from memwall.kernels.tile_types import TileType, from_numbers, pack, to_numbers, unpack

UNWRITTEN = 0xCD
"""What shared memory holds before anything is stored: a NaN in float16 it is not, but far from any sum."""


@dataclass(slots=True)
class Block:
    """One block's state. variables: block indices and loop variables; groups: copies under way, oldest first."""

    variables: dict[str, int]
    registers: dict[int, np.ndarray]
    shared: np.ndarray
    pending: list[Any] = field(default_factory=list)
    groups: list[list[Any]] = field(default_factory=list)


def run(program: TileProgram, arrays: Mapping[str, np.ndarray], *, seed: int | None = 0) -> None:
    """Execute on the caller's arrays, which stores change.

    arrays: by parameter; wide types as arrays of that type, narrow ones as uint8 streams of bits; C-contiguous.
    seed: order of the blocks; None for ascending.
    """
    machine = _Machine(program, as_bytes(program, arrays))
    order = list(np.ndindex(*program.grid))
    if seed is not None:
        order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    waiting = [machine.start(index) for index in order]
    while waiting:
        left = [block for block in waiting if next(block, "done") != "done"]
        if len(left) == len(waiting) and not machine.moved:
            raise InputError(f"{program.name}: {len(left)} blocks wait for semaphores that nobody releases")
        machine.moved = False
        waiting = left


def as_bytes(program: TileProgram, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters' bytes; InputError for one that is missing, of another type, or too small."""
    found = {}
    for param in program.params:
        if param.name not in arrays:
            raise InputError(f"{program.name} needs an array for {param}")
        array = arrays[param.name]
        data = array.view(np.uint8).reshape(-1) if array.flags.c_contiguous else np.empty(0, np.uint8)
        need = -(-param.placed.num_elements * param.dtype.bits // 8)
        if array.dtype != param.dtype.dtype or len(data) < need:
            raise InputError(
                f"{program.name}: {param} takes a contiguous {param.dtype.dtype} array of {need:,} bytes or more, got "
                f"{array.dtype} {list(array.shape)}"
            )
        found[param.name] = data
    return found


class _Machine:
    def __init__(self, program: TileProgram, memory: dict[str, np.ndarray]) -> None:
        self.program, self.memory = program, memory
        self.places, self.shared_bytes = plan_shared(program)
        self.semaphores: dict[int, int] = {}
        self.moved = False

    def start(self, index: tuple[int, ...]) -> Iterator[None]:
        block = Block(
            {f"block{axis}": at for axis, at in enumerate(index)},
            {},
            np.full(self.shared_bytes, UNWRITTEN, np.uint8),
        )
        return self._run(self.program.body, block)

    def _run(self, nodes: list[Node], block: Block) -> Iterator[None]:
        for node in nodes:
            if isinstance(node, Loop):
                for value in range(node.count):
                    block.variables[node.variable] = value
                    yield from self._run(node.body, block)
            elif isinstance(node, Condition):
                if evaluate(node.test, block.variables):
                    yield from self._run(node.body, block)
            elif node.op == "lock":
                semaphore, value = (evaluate(node.attrs[k], block.variables) for k in ("semaphore", "value"))
                while self.semaphores.get(semaphore, 0) != value:
                    yield
            else:
                getattr(self, f"_{node.op}")(node, block)

    # -- registers -----------------------------------------------------------------------------------------------------

    def _read(self, block: Block, tensor: Tensor) -> np.ndarray:
        """Numbers [threads, slots]."""
        held = unpack(tensor.dtype, block.registers[id(tensor)], tensor.held.num_slots)
        return to_numbers(tensor.dtype, held)

    def _write(self, block: Block, tensor: Tensor, numbers: np.ndarray) -> None:
        block.registers[id(tensor)] = pack(tensor.dtype, from_numbers(tensor.dtype, numbers))

    def _register_tensor(self, step: Instruction, block: Block) -> None:
        assert step.out is not None
        shape = (self.program.threads, step.out.held.num_slots)
        self._write(block, step.out, np.full(shape, step.attrs["init"], np.float32))

    def _view(self, step: Instruction, block: Block) -> None:
        block.registers[id(step.out)] = block.registers[id(step.args[0])]

    _reshape = _view

    def _assign(self, step: Instruction, block: Block) -> None:
        assert step.out is not None
        self._write(block, step.out, self._read(block, step.args[0])[:, slot_map(step.args[0], step.out)])

    def _cast(self, step: Instruction, block: Block) -> None:
        assert step.out is not None
        arg, out = step.args[0], step.out
        order = slot_map(arg, out)
        if arg.dtype.narrow and out.dtype.name == "f16":
            codes = unpack(arg.dtype, block.registers[id(arg)], arg.held.num_slots)
            self._write(block, out, cast_codes(arg.dtype, codes)[:, order])
        else:
            self._write(block, out, self._read(block, arg)[:, order].astype(np.float32))

    def _elementwise(self, step: Instruction, block: Block) -> None:
        assert step.out is not None
        values = [self._read(block, arg)[:, slot_map(arg, step.out)] for arg in step.args]
        self._write(block, step.out, apply(step.attrs["fn"], step.out.dtype, values))

    def _reduce(self, step: Instruction, block: Block) -> None:
        assert step.out is not None
        arg, out = step.args[0], step.out
        values = self._read(block, arg).astype(np.float32)
        groups = arg.held.table()
        groups[..., list(step.attrs["dims"])] = 0
        flat = np.ravel_multi_index(tuple(np.moveaxis(groups, -1, 0)), out.shape)
        owned = first_owners(arg.held)
        found = np.full(int(np.prod(out.shape)), -np.inf if step.attrs["fn"] == "max" else 0.0, np.float32)
        combine = np.maximum if step.attrs["fn"] == "max" else np.add
        for thread in range(values.shape[0]):  # a thread's slots in order, then thread after thread
            if owned[thread]:
                partial: dict[int, np.float32] = {}
                for slot in range(values.shape[1]):
                    key = int(flat[thread, slot])
                    partial[key] = (
                        combine(partial[key], values[thread, slot]) if key in partial else values[thread, slot]
                    )
                for key, value in partial.items():
                    found[key] = combine(found[key], value)
        self._write(block, out, found[out.held.flat_table()])

    def _dot(self, step: Instruction, block: Block) -> None:
        a, b, acc = (self._gathered(block, tensor) for tensor in step.args)
        for k in range(a.shape[1]):
            acc += a[:, k : k + 1] * b[k]
        out = step.args[2]
        self._write(block, out, acc.reshape(-1)[out.held.flat_table()])

    def _gathered(self, block: Block, tensor: Tensor) -> np.ndarray:
        found = np.empty(tensor.held.flat_table().max() + 1, np.float32)
        found[tensor.held.flat_table()] = self._read(block, tensor).astype(np.float32)
        return found.reshape(tensor.shape)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _bytes_of(self, block: Block, tensor: Tensor) -> np.ndarray:
        if tensor.space == "global":
            return self.memory[tensor.name]
        return block.shared[self.places[id(tensor)] :]

    def _index(self, tensor: Tensor, tile: np.ndarray, step: Instruction, block: Block, kind: str = "") -> Any:
        """(element offsets, whether they are inside) of tile indices [..., rank]."""
        offsets = [evaluate(each, block.variables) for each in step.attrs[f"{kind}offsets"]]
        dims = step.attrs.get("dims") or tuple(range(len(offsets) - tile.shape[-1], len(offsets)))
        index = np.broadcast_to(np.asarray(offsets, np.int64), (*tile.shape[:-1], len(offsets))).copy()
        for along, dim in enumerate(dims):
            index[..., dim] += tile[..., along]
        inside = ((index >= 0) & (index < np.asarray(tensor.shape))).all(axis=-1)
        if tensor.space == "shared" and not inside.all():
            raise InputError(f"{step}: outside of {tensor}")
        return tensor.placed.offset(index), inside

    def _load_global(self, step: Instruction, block: Block) -> None:
        assert step.out is not None
        source, out = step.args[0], step.out
        at, inside = self._index(source, out.held.table(), step, block)
        data = self._bytes_of(block, source)
        if source.dtype.narrow and source.dtype.bits < 8:
            codes = read_bits(data, np.where(inside, at, 0) * source.dtype.bits, source.dtype.bits)
            block.registers[id(out)] = pack(source.dtype, np.where(inside, codes, 0).astype(np.uint8))
            return
        size = source.dtype.bits // 8
        got = data[np.where(inside, at, 0)[..., None] * size + np.arange(size)]
        got[~inside] = 0
        block.registers[id(out)] = got.reshape(len(got), -1)

    _load_shared = _load_global

    def _store_global(self, step: Instruction, block: Block) -> None:
        target, tile = step.args
        at, inside = self._index(target, tile.held.table(), step, block)
        size = target.dtype.bits // 8
        if not size:
            raise InputError(f"{step}: stores write whole bytes; view {tile} as u8 first")
        held = block.registers[id(tile)].reshape(*at.shape, size)
        where = at[..., None] * size + np.arange(size)
        self._bytes_of(block, target)[where[inside]] = held[inside]

    _store_shared = _store_global

    def _copy_async(self, step: Instruction, block: Block) -> None:
        target, source = step.args
        tile = np.stack(np.meshgrid(*map(np.arange, step.attrs["shape"]), indexing="ij"), axis=-1)
        to, _ = self._index(target, tile, step, block, "target_")
        at, inside = self._index(source, tile, step, block, "source_")
        size = source.dtype.bits // 8
        block.pending.append((target, source, to, np.where(inside, at, 0), inside, size))

    def _commit_group(self, step: Instruction, block: Block) -> None:
        block.groups.append(block.pending)
        block.pending = []

    def _wait_group(self, step: Instruction, block: Block) -> None:
        while len(block.groups) > step.attrs["left"]:
            for target, source, to, at, inside, size in block.groups.pop(0):
                each = np.arange(size)
                got = self._bytes_of(block, source)[at[..., None] * size + each]
                got[~inside] = 0
                self._bytes_of(block, target)[to[..., None] * size + each] = got

    def _release(self, step: Instruction, block: Block) -> None:
        semaphore, value = (evaluate(step.attrs[k], block.variables) for k in ("semaphore", "value"))
        self.semaphores[semaphore] = value
        self.moved = True

    def _nothing(self, step: Instruction, block: Block) -> None:
        """Threads run in step here, and shared memory is planned before."""

    _sync = _shared_tensor = _free_shared = _nothing


def first_owners(layout: Any) -> np.ndarray:
    """Whether a thread is the first of those that hold the same: bool [threads]."""
    seen: set[bytes] = set()
    rows = [row.tobytes() for row in layout.thread_part()]
    return np.asarray([not (row in seen or seen.add(row)) for row in rows])  # type: ignore[func-returns-value]


def read_bits(data: np.ndarray, first_bit: np.ndarray, bits: int) -> np.ndarray:
    """Codes of `bits` that begin at these bits of a little-endian stream."""
    byte, shift = first_bit // 8, first_bit % 8
    low = data[byte].astype(np.uint32)
    high = data[np.minimum(byte + 1, len(data) - 1)].astype(np.uint32)
    return ((low | high << np.uint32(8)) >> shift.astype(np.uint32)) & np.uint32((1 << bits) - 1)


def apply(function: str, dtype: TileType, values: list[np.ndarray]) -> np.ndarray:
    """An elementwise operation in the tile's own type (bfloat16 and narrow ones: computed in float32, then rounded)."""
    if dtype.name not in ("f32", "f16"):
        values = [value.astype(np.float32) for value in values]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found: np.ndarray = _FUNCTIONS[function](*values)
    return found


_FUNCTIONS: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "lt": lambda a, b: (a < b).astype(a.dtype),
    "neg": np.negative,
    "exp": np.exp,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "where": lambda test, a, b: np.where(test != 0, a, b),
}
