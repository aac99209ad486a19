"""C++ of a tile program: a block's threads become lanes of vectors, its blocks are shared out over the cores.

Idea: slot s of a register tile is `threads / lanes` vectors. Tiles are computed on demand, slot by slot: a load, a
view, a cast and a product of one slot follow each other in registers, and no whole tile of decoded weights is ever
made. What several instructions use, what a loop carries, and what a later store could change is kept in arrays.

Representation: narrow codes are 32-bit words of packed bits, so that `view` is free here as well; floats of every width
are float32 lanes, rounded after each operation of a narrower type.
Holds when: the compiler has GCC's vector extensions (tried with GCC 12); 32-bit floats behave as in IEEE 754. The same
source compiles for any processor: AVX-512 and AVX2 only choose the lanes, and how a float16 is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memwall.errors import InputError
from memwall.kernels.tile_cpp_dot import PRELUDE as DOT_PRELUDE
from memwall.kernels.tile_cpp_memory import (
    copy_code,
    is_regular,
    pointer,
    table_load,
    table_store,
    upper,
    vector_store,
    where,
)
from memwall.kernels.tile_cpp_prelude import PRELUDE, RUNNER
from memwall.kernels.tile_cpp_values import SlotValues
from memwall.kernels.tile_infer import plan_shared
from memwall.kernels.tile_interpreter import first_owners
from memwall.kernels.tile_program import Condition, Instruction, Loop, Node, Tensor, TileProgram, instructions, written

LAZY = {"load_global", "load_shared", "view", "cast", "elementwise", "reshape", "reduce"}
BARRIERS = {"store_global", "store_shared", "copy_async", "wait_group", "sync", "lock", "release"}


def emit(program: TileProgram, lanes: int) -> str:
    """The whole source; `lanes` float32 per vector: 4, 8 or 16."""
    if program.threads % lanes or lanes not in (4, 8, 16):
        raise InputError(f"{program.name}: {program.threads} threads in vectors of {lanes}")
    return _Emitter(program, lanes).source()


class _Emitter(SlotValues):
    def __init__(self, program: TileProgram, lanes: int) -> None:
        places, self.shared_bytes = plan_shared(program)
        made_by = {id(s.out): s for s in instructions(program.body) if s.out is not None and s.op in LAZY}
        super().__init__(program, lanes, made_by, places)
        self.uses: dict[int, int] = {}
        for step in instructions(program.body):
            for arg in step.args:
                self.uses[id(arg)] = self.uses.get(id(arg), 0) + 1
        self.pending: dict[int, Instruction] = {}  # lazy tiles that are still to be used
        self.num_semaphores = 1

    def source(self) -> str:
        self.nodes(self.program.body)
        names = ", ".join(f"uint8_t* g_{param.name}" for param in self.program.params)
        axes = len(self.program.grid)
        indices = ", ".join(f"long block{axis}" for axis in range(axes))
        calls = ", ".join(f"static_cast<uint8_t*>(arrays[{i}])" for i in range(len(self.program.params)))
        split, rest = [], "number"
        for axis in reversed(range(axes)):
            split.append(f"    const long block{axis} = ({rest}) % {self.program.grid[axis]};")
            rest = f"({rest}) / {self.program.grid[axis]}"
        total = 1
        for n in self.program.grid:
            total *= n
        body = "\n".join(["    " + line for line in self.lines])
        return "\n".join(
            [
                (PRELUDE + DOT_PRELUDE).replace("@LANES@", str(self.lanes)),
                *self.tables,
                f"static void block({names}, Semaphores& semaphores, uint8_t* shared, {indices}) {{",
                body,
                "}",
                "static void one(void* const* arrays, Semaphores& semaphores, uint8_t* shared, long number) {",
                *split,
                f"    block({calls}, semaphores, shared, {', '.join(f'block{a}' for a in range(axes))});",
                "}",
                RUNNER.replace("@BLOCKS@", str(total))
                .replace("@SEMAPHORES@", str(self.num_semaphores))
                .replace("@SHARED@", str(max(self.shared_bytes, 64))),
            ]
        )

    # -- control flow --------------------------------------------------------------------------------------------------

    def nodes(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(node, Instruction):
                self.step(node)
                continue
            self.settle()
            if isinstance(node, Loop):
                self.ranges[node.variable] = node.count - 1
                v = node.variable
                self.lines.append(f"for (long {v} = 0; {v} < {node.count}; ++{v}) {{")
            else:
                assert isinstance(node, Condition)
                self.lines.append(f"if ({written(node.test)}) {{")
            self.memo.append({})
            outside = self.ranges
            if isinstance(node, Condition):
                self.ranges = where(node.test, outside)
            self.nodes(node.body)
            self.ranges = outside
            self.settle()
            self.memo.pop()
            self.lines.append("}")

    def step(self, step: Instruction) -> None:
        if step.op in BARRIERS:
            self.settle()
        if step.op in ("load_global", "load_shared"):
            assert step.out is not None
            self.lines.append(pointer(self, step, step.args[0], f"p_{step.out.name}"))
            if step.attrs["prefetch"]:
                self.lines.append(self.prefetch(step))
        if step.op in LAZY:
            assert step.out is not None
            if step.op == "reduce" and self.crosses_threads(step):
                self.reduce_threads(step)
            else:
                self.pending[id(step.out)] = step
        else:
            handler = getattr(self, f"on_{step.op}", None)
            if handler is None:
                return  # shared tensors are planned; a block is one thread here, which never waits for itself
            handler(step)

    def settle(self) -> None:
        """Tiles that are used later are made now: what they read may change, or they would be made again and again."""
        while self.pending:
            step = next(reversed(self.pending.values()))
            assert step.out is not None
            if self.uses.get(id(step.out), 0) > 0:
                self.keep(step.out)
            else:
                self.finish(step.out)

    def used(self, step: Instruction) -> None:
        """These arguments have been read by this instruction."""
        for arg in step.args:
            self.uses[id(arg)] -= 1
            if not self.uses[id(arg)]:
                self.finish(arg)

    def finish(self, tensor: Tensor) -> None:
        """Nothing is to be computed for this tile any more: it is in an array, or has been read for the last time."""
        step = self.pending.pop(id(tensor), None)
        if step is not None:
            self.used(step)

    def prefetch(self, step: Instruction) -> str:
        """Ask for the bytes that this load will want rounds of its loop later; a step of k is one of the first axis."""
        assert step.out is not None
        source, ahead = step.args[0], step.attrs["prefetch"]
        size = source.dtype.bits // 8
        stride = source.placed.strides[0] * size * ahead
        extent, apart, place = size, "", f"p_{step.out.name} + {stride} + at"
        sides = [(source.placed.strides[d] * size, n) for d, n in zip(step.attrs["dims"], step.out.shape, strict=True)]
        for bytes_apart, n in sorted(side for side in sides if side[1] > 1):
            if bytes_apart <= extent:
                extent += (n - 1) * bytes_apart
                continue
            index = self.fresh("run")
            apart += f"for (long {index} = 0; {index} < {n}; ++{index}) "
            place += f" + {index} * {bytes_apart}L"
        return f"{apart}for (long at = 0; at < {extent}; at += 64) __builtin_prefetch({place});"

    # -- tiles in arrays -----------------------------------------------------------------------------------------------

    def declare(self, tensor: Tensor) -> tuple[str, int]:
        kind, count = (
            ("VU", -(-tensor.held.num_slots * tensor.dtype.bits // 32))
            if tensor.dtype.narrow
            else (
                "VF",
                tensor.held.num_slots,
            )
        )
        self.lines.append(f"{kind} {tensor.name}[{count}][{self.chunks}];")
        return kind, count

    def keep(self, tensor: Tensor) -> None:
        """Make a whole tile."""
        if id(tensor) in self.kept:
            return
        _, count = self.declare(tensor)
        step = self.made_by.get(id(tensor))
        by_table = step is not None and step.op.startswith("load") and not tensor.dtype.narrow
        if step is not None and by_table and not is_regular(self, step):
            self.lines.append(table_load(self, step))
            count = 0
        for i in range(count):
            for chunk in range(self.chunks):
                made = self.word(tensor, i, chunk) if tensor.dtype.narrow else self.value(tensor, i, chunk)
                self.lines.append(f"{tensor.name}[{i}][{chunk}] = {made};")
        self.kept.add(id(tensor))
        self.finish(tensor)

    def on_register_tensor(self, step: Instruction) -> None:
        assert step.out is not None
        kind, count = self.declare(step.out)
        if kind == "VU" and step.attrs["init"]:
            raise InputError(f"{self.program.name}: {step.out} of packed bits starts as 0 in C++")
        start = "none()" if kind == "VU" else f"all({float(step.attrs['init'])!r}f)"
        self.lines.append(f"for (auto& row : {step.out.name}) for (auto& each : row) each = {start};")
        self.lines.append(f"(void){count};")
        self.kept.add(id(step.out))

    def depends(self, tensor: Tensor, on: Tensor) -> bool:
        if tensor is on:
            return True
        step = None if id(tensor) in self.kept else self.made_by.get(id(tensor))
        return step is not None and any(self.depends(arg, on) for arg in step.args)

    def on_assign(self, step: Instruction) -> None:
        target, value = step.out, step.args[0]
        assert target is not None
        if target.dtype.narrow:
            raise InputError(f"{self.program.name}: {target} of packed bits cannot be assigned in C++")
        for other in list(self.pending.values()):
            if other.out is not None and other.out is not value and self.depends(other.out, target):
                self.keep(other.out)
        order = self.order(value, target)
        if self.depends(value, target) and not self.slotwise(value, target, order):
            self.keep(value)
        for slot in range(target.held.num_slots):
            for chunk in range(self.chunks):
                made = self.value(value, order[slot], chunk)
                self.lines.append(f"{target.name}[{slot}][{chunk}] = {made};")
        self.used(step)
        for level in self.memo:
            for key in [k for k in level if self.stale(k, target)]:
                del level[key]

    def stale(self, key: tuple[Any, ...], target: Tensor) -> bool:
        step = self.made_by.get(key[0])
        return step is not None and step.out is not None and self.depends(step.out, target)

    def slotwise(self, value: Tensor, target: Tensor, order: list[int]) -> bool:
        """Whether slot s of the value reads slot s of the target only, so that it can be overwritten at once."""
        if order != list(range(len(order))):
            return False
        step = self.made_by.get(id(value))
        if value is target or step is None:
            return value is target
        if step.op not in ("elementwise", "cast"):
            return False
        touched = [arg for arg in step.args if self.depends(arg, target)]
        return all(arg.shape == value.shape and self.slotwise(arg, target, self.order(arg, value)) for arg in touched)

    # -- instructions that are more than their slots -------------------------------------------------------------------

    def gather(self, tensor: Tensor, name: str) -> None:
        """The tile as a row-major array."""
        self.keep(tensor)
        size = 1
        for n in tensor.shape:
            size *= n
        order = self.table(tensor.held.flat_table().T.ravel().tolist())
        count = tensor.held.num_slots * self.program.threads
        self.lines.append(f"float {name}[{size}];")
        self.lines.append(
            f"for (int i = 0; i < {count}; ++i) {name}[{order}[i]] = reinterpret_cast<const float*>({tensor.name})[i];"
        )

    def scatter(self, tensor: Tensor, name: str) -> None:
        order = self.table(tensor.held.flat_table().T.ravel().tolist())
        count = tensor.held.num_slots * self.program.threads
        self.lines.append(
            f"for (int i = 0; i < {count}; ++i) reinterpret_cast<float*>({tensor.name})[i] = {name}[{order}[i]];"
        )

    def on_dot(self, step: Instruction) -> None:
        a, b, acc = step.args
        for tensor in (a, b):
            self.keep(tensor)
        self.settle()
        names = [self.fresh(tensor.name + "_") for tensor in step.args]
        for tensor, name in zip(step.args, names, strict=True):
            self.gather(tensor, name)
        (m, k), n = a.shape, b.shape[1]
        self.lines.append(f"multiply<{m}, {n}, {k}>({', '.join(names)});")
        self.scatter(acc, names[2])
        self.used(step)

    def reduce_threads(self, step: Instruction) -> None:
        """Sums over threads: through an array, thread after thread, each that is the first of its copies."""
        assert step.out is not None
        arg, out = step.args[0], step.out
        self.keep(arg)
        groups = arg.held.table()
        groups[..., list(step.attrs["dims"])] = 0
        flat = (groups @ [_product(out.shape[d + 1 :]) for d in range(len(out.shape))]).tolist()
        owners = [t for t, first in enumerate(first_owners(arg.held)) if first]
        goes, who = self.table([each for t in owners for each in flat[t]]), self.table(owners)
        fn = "Sum" if step.attrs["fn"] == "sum" else "Most"
        name = self.fresh("sums_")
        self.lines.append(f"float {name}[{_product(out.shape)}];")
        self.lines.append(
            f"over_threads<{fn}, {_product(out.shape)}, {len(owners)}, {arg.held.num_slots}, {self.program.threads}>"
            f"({name}, reinterpret_cast<const float*>({arg.name}), {goes}, {who});"
        )
        self.declare(out)
        self.scatter(out, name)
        self.kept.add(id(out))
        self.used(step)

    def store(self, step: Instruction) -> None:
        target, tile = step.args
        name = self.fresh("q")
        self.lines.append(pointer(self, step, target, f"p_{name}"))
        if tile.dtype.bits % 8:
            raise InputError(f"{self.program.name}: stores write whole bytes; view {tile} as u8 first")
        self.keep(tile)
        lines = [
            vector_store(self, step, name, slot, chunk, f"{tile.name}[{slot}][{chunk}]")
            for chunk in range(self.chunks)
            for slot in range(tile.held.num_slots)
        ]
        regular = [line for line in lines if line is not None]
        self.lines += regular if len(regular) == len(lines) else [table_store(self, step, name)]
        self.used(step)

    on_store_global = on_store_shared = store

    def on_copy_async(self, step: Instruction) -> None:
        self.lines += copy_code(self, step)

    def on_lock(self, step: Instruction) -> None:
        self.num_semaphores = max(self.num_semaphores, upper(step.attrs["semaphore"], self.ranges) + 1)
        self.lines.append(f"semaphores.lock({written(step.attrs['semaphore'])}, {written(step.attrs['value'])});")

    def on_release(self, step: Instruction) -> None:
        self.num_semaphores = max(self.num_semaphores, upper(step.attrs["semaphore"], self.ranges) + 1)
        self.lines.append(f"semaphores.release({written(step.attrs['semaphore'])}, {written(step.attrs['value'])});")


def _product(numbers: Sequence[int]) -> int:
    found = 1
    for n in numbers:
        found *= n
    return found
