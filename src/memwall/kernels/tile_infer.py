"""Layouts for the registers a program leaves open, then a check that every instruction can run with what was found.

Rules fill one layout at a time, in order of priority, and start again after each success; the last rules choose
defaults. A layout that no rule finds, and one that contradicts an instruction, are errors that name the tensor.

Source: Tilus (2025, arXiv 2504.12984), layout inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_layout import MMA_A, MMA_B, MMA_C, Layout, build, local, replicated, spatial
from memwall.kernels.tile_memory import VECTOR_BYTES
from memwall.kernels.tile_program import WARP, Instruction, Node, Tensor, TileProgram, instructions
from memwall.kernels.tile_types import slice_bytes

Rule = Callable[[TileProgram, Instruction], bool]


def infer(program: TileProgram) -> TileProgram:
    """Fills the open layouts of the program, in place, and checks it."""
    steps = list(instructions(program.body))
    while _one_success(program, steps):
        pass
    unknown = [str(t) for t in program.tensors if t.space == "register" and t.layout is None]
    if unknown:
        raise InputError(f"{program.name}: no rule finds a layout for {', '.join(unknown)}; give one with layout=")
    check(program)
    return program


def _one_success(program: TileProgram, steps: list[Instruction]) -> bool:
    return any(rule(program, step) for rule in RULES for step in steps)


def _give(tensor: Tensor, layout: Layout) -> bool:
    tensor.layout = layout
    return True


def _repeated(arg: Tensor, out: Tensor) -> list[int]:
    return [d for d, (n, m) in enumerate(zip(arg.shape, out.shape, strict=True)) if n == 1 and m > 1]


# -- rules -----------------------------------------------------------------------------------------------------------


def _same(program: TileProgram, step: Instruction) -> bool:
    """cast and assign: one layout for both."""
    if step.op not in ("cast", "assign") or step.out is None:
        return False
    arg, out = step.args[0], step.out
    if out.layout is None and arg.layout is not None:
        return _give(out, arg.layout)
    return arg.layout is None and out.layout is not None and _give(arg, out.layout)


def _elementwise(program: TileProgram, step: Instruction) -> bool:
    """The result is held as an operand of its shape is; operands as the result, with repeated dimensions reduced."""
    if step.op != "elementwise" or step.out is None:
        return False
    out = step.out
    if out.layout is None:
        for arg in step.args:
            if arg.layout is not None and arg.shape == out.shape:
                return _give(out, arg.layout)
        return False
    for arg in step.args:
        if arg.layout is None:
            return _give(arg, out.layout.reduce(_repeated(arg, out)))
    return False


def _reduce(program: TileProgram, step: Instruction) -> bool:
    if step.op != "reduce" or step.out is None or step.out.layout is not None or step.args[0].layout is None:
        return False
    return _give(step.out, step.args[0].layout.reduce(step.attrs["dims"]))


def _reshape(program: TileProgram, step: Instruction) -> bool:
    if step.op != "reshape" or step.out is None:
        return False
    arg, out = step.args[0], step.out
    if out.layout is None and arg.layout is not None:
        return _give(out, arg.layout.reshape(out.shape))
    return arg.layout is None and out.layout is not None and _give(arg, out.layout.reshape(arg.shape))


def _dot(program: TileProgram, step: Instruction) -> bool:
    """Operands of a product follow from its sums: each warp needs their rows of a and their columns of b."""
    if step.op != "dot":
        return False
    a, b, acc = step.args
    if acc.layout is None or (a.layout is not None and b.layout is not None):
        return False
    tiles = acc.layout.divide(MMA_C)
    steps = a.shape[1] // MMA_A.shape[1]
    if a.layout is None:
        return _give(a, tiles.reduce((1,)).compose(local(1, steps)).compose(MMA_A))
    # [k, n]: k tiles of the warp before its n tiles, as weights are stored
    rows = tiles.reduce((0,))
    with_k = build((steps, rows.shape[1]), rows.spatial_entries(), [(0, steps, 1), *rows.local_entries()])
    return _give(b, with_k.compose(MMA_B))


def _dot_default(program: TileProgram, step: Instruction) -> bool:
    """Sums without a layout: warps side by side along n as far as they go, then along m."""
    if step.op != "dot" or step.args[2].layout is not None:
        return False
    acc = step.args[2]
    m, n = acc.shape[0] // MMA_C.shape[0], acc.shape[1] // MMA_C.shape[1]
    if acc.shape[0] % MMA_C.shape[0] or acc.shape[1] % MMA_C.shape[1]:
        raise InputError(f"{acc}: products come in tiles of {MMA_C.shape[0]} x {MMA_C.shape[1]}")
    along_n = math.gcd(program.warps, n)
    along_m = program.warps // along_n
    if m % along_m:
        raise InputError(f"{acc}: {program.warps} warps do not divide it; give the sums a layout")
    warps = spatial(along_m, along_n).compose(local(m // along_m, n // along_n))
    return _give(acc, warps.compose(MMA_C))


def _default(program: TileProgram, step: Instruction) -> bool:
    """Loads and new tiles: neighbouring threads along the last dimension, each with up to 16 bytes in a row."""
    if step.op not in ("load_global", "load_shared", "register_tensor") or step.out is None:
        return False
    return step.out.layout is None and _give(step.out, default_layout(step.out, program.threads))


RULES: tuple[Rule, ...] = (_same, _elementwise, _reshape, _reduce, _dot, _dot_default, _default)
"""By priority."""


def default_layout(tensor: Tensor, threads: int) -> Layout:
    """Coalesced: up to 16 bytes per thread and row; the rest of the threads hold copies."""
    rank = len(tensor.shape)
    most = max(VECTOR_BYTES * 8 // max(tensor.dtype.bits, 8), 1)
    vector = math.gcd(tensor.shape[-1], most) if rank else 1
    inner = local(*[1] * (rank - 1), vector)
    rest = [*tensor.shape[:-1], tensor.shape[-1] // vector]
    along = [1] * rank
    left = threads
    for d in reversed(range(rank)):
        along[d] = math.gcd(rest[d], left)
        left //= along[d]
    outer = local(*(n // k for n, k in zip(rest, along, strict=True)))
    found = outer.compose(spatial(*along)).compose(inner)
    return replicated(left, rank).compose(found) if left > 1 else found


# -- checks ----------------------------------------------------------------------------------------------------------


def check(program: TileProgram) -> None:
    """InputError for the first instruction that cannot run."""
    for tensor in program.tensors:
        if tensor.space == "register":
            layout = tensor.held
            if layout.num_threads != program.threads:
                raise InputError(
                    f"{program.name}: {tensor} is held by {layout.num_threads} threads of {program.threads}"
                )
    _check_shared(program)
    for step in instructions(program.body):
        try:
            CHECKS.get(step.op, lambda program, step: None)(program, step)
        except InputError as error:
            raise InputError(f"{program.name}: {step}: {error}") from error


def _check_view(program: TileProgram, step: Instruction) -> None:
    assert step.out is not None
    arg, out = step.args[0], step.out
    held, wanted = (slice_bytes(t.dtype, t.held.num_slots) for t in (arg, out))
    if held != wanted:
        raise InputError(f"a thread holds {held} bytes of {arg}, but {out} takes {wanted}")


def _check_alike(program: TileProgram, step: Instruction) -> None:
    assert step.out is not None
    for arg in step.args:
        slot_map(arg, step.out)


def _check_reshape(program: TileProgram, step: Instruction) -> None:
    assert step.out is not None
    if not step.args[0].held.reshape(step.out.shape).same_as(step.out.held):
        raise InputError(f"{step.out} is not held as {step.args[0]} is")


def _check_reduce(program: TileProgram, step: Instruction) -> None:
    assert step.out is not None
    if not step.args[0].held.reduce(step.attrs["dims"]).same_as(step.out.held):
        raise InputError(f"{step.out} is not held as what is left of {step.args[0]}")


def _check_dot(program: TileProgram, step: Instruction) -> None:
    """Each warp holds fragments of one instruction, and all the operands that its sums need."""
    a, b, acc = step.args
    for tensor, atom in ((a, MMA_A), (b, MMA_B), (acc, MMA_C)):
        try:
            tensor.held.divide(atom)
        except InputError:
            raise InputError(f"{tensor} is not held in fragments of m16n8k16") from None
    tiles = acc.held.divide(MMA_C).table()
    rows, columns = a.held.divide(MMA_A).table(), b.held.divide(MMA_B).table()
    steps = a.shape[1] // MMA_A.shape[1]
    for warp in range(program.warps):
        for m, n in tiles[warp]:
            if (rows[warp, :, 0] == m).sum() != steps or (columns[warp, :, 1] == n).sum() != steps:
                raise InputError(f"warp {warp} lacks operands of its tile ({m}, {n})")


CHECKS: dict[str, Callable[[TileProgram, Instruction], None]] = {
    "view": _check_view,
    "elementwise": _check_alike,
    "cast": _check_alike,
    "assign": _check_alike,
    "reshape": _check_reshape,
    "reduce": _check_reduce,
    "dot": _check_dot,
}


def slot_map(arg: Tensor, out: Tensor) -> list[int]:
    """The slot of `arg` that a thread reads for each slot of `out`; InputError where a thread lacks an element."""
    wanted = out.held.table().copy()
    wanted[..., _repeated(arg, out)] = 0
    held = arg.held.table()
    found = []
    for slot in range(wanted.shape[1]):
        match = np.flatnonzero((held[0] == wanted[0, slot]).all(axis=-1))
        if not len(match) or not (held[:, match[0]] == wanted[:, slot]).all():
            raise InputError(f"threads lack elements of {arg} that {out} needs: their layouts differ")
        found.append(int(match[0]))
    return found


def _check_shared(program: TileProgram) -> None:
    freed: set[int] = set()
    for step in instructions(program.body):
        used = [t for t in step.args if t.space == "shared"]
        for tensor in used:
            if id(tensor) in freed:
                raise InputError(f"{program.name}: {step}: {tensor} has been freed")
        if step.op == "free_shared":
            freed |= {id(tensor) for tensor in used}


# -- shared memory ---------------------------------------------------------------------------------------------------

SHARED_ALIGNMENT = 128


def plan_shared(program: TileProgram, limit_bytes: int = 100 * 1024) -> tuple[dict[int, int], int]:
    """Offsets of the shared tensors, by id, and the bytes a block needs.

    A tensor takes the lowest place that is free from its making until it is freed (what is made in a loop or condition
    lives through all of it). InputError where more than `limit_bytes` are needed.
    """
    placed: dict[int, tuple[int, int]] = {}
    live: set[int] = set()
    peak = 0
    for step in _in_order(program.body):
        if step.op == "free_shared":
            live.discard(id(step.args[0]))
        elif step.op == "shared_tensor" and step.out is not None:
            size = step.out.placed.num_elements * step.out.dtype.bits // 8
            size = -(-size // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
            taken = sorted(placed[each] for each in live)
            at = 0
            for begin, end in taken:
                if at + size <= begin:
                    break
                at = max(at, end)
            placed[id(step.out)] = (at, at + size)
            live.add(id(step.out))
            peak = max(peak, at + size)
    if peak > limit_bytes:
        raise InputError(
            f"{program.name} needs {peak:,} bytes of shared memory, a block has {limit_bytes:,}: fewer stages or "
            "smaller tiles take less"
        )
    return {key: begin for key, (begin, _) in placed.items()}, peak


def _in_order(nodes: list[Node]) -> Iterator[Instruction]:
    """As `instructions`, but a loop's frees come after the loop: its next round still uses the tensor."""
    for node in nodes:
        if isinstance(node, Instruction):
            yield node
        else:
            inside = list(_in_order(node.body))
            yield from (step for step in inside if step.op != "free_shared")
            yield from (step for step in inside if step.op == "free_shared")


def register_bytes(tensor: Tensor) -> int:
    """Bytes of 32-bit registers that a thread spends on a tile."""
    return -(-tensor.held.num_slots * tensor.dtype.bits // WARP) * 4
