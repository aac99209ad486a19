"""C++ of a tile program: a block's threads become lanes of vectors, its blocks are shared out over the cores.

Idea: slot s of a register tile is `threads / lanes` vectors. Tiles are computed on demand, slot by slot: a load, a view, a
cast and a product of one slot follow each other in registers, and no whole tile of decoded weights is ever made. What
several instructions use, what a loop carries, and what a later store could change is kept in arrays.

Representation: narrow codes are 32-bit words of packed bits, so that `view` is free here as well; floats of every width
are float32 lanes, rounded after each operation of a narrower type.
Holds when: GCC or Clang compiles it (vector extensions); 32-bit floats behave as in IEEE 754. The same source compiles for
any processor: AVX-512 and AVX2 only choose the lanes, and how a float16 is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_cpp_memory import (
    Range,
    copy_code,
    float_load,
    is_regular,
    pointer,
    table_load,
    table_store,
    upper,
    vector_store,
    word_load,
)
from memwall.kernels.tile_cpp_prelude import PRELUDE, RUNNER
from memwall.kernels.tile_infer import plan_shared, slot_map
from memwall.kernels.tile_interpreter import first_owners
from memwall.kernels.tile_program import Condition, Instruction, Loop, Node, Tensor, TileProgram, instructions, written

LAZY = {"load_global", "load_shared", "view", "cast", "elementwise", "reshape", "reduce"}
BARRIERS = {"store_global", "store_shared", "copy_async", "wait_group", "sync", "lock", "release"}
MOST_LISTED = 32
"""Vectors of a load that are put together lane by lane where it is used; larger irregular tiles are read by a loop."""
_BINARY = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})",
    "max": "select({0} > {1}, {0}, {1})", "min": "select({0} < {1}, {0}, {1})",
    "lt": "select({0} < {1}, all(1.0f), all(0.0f))", "neg": "(-{0})", "abs": "select({0} < all(0.0f), -{0}, {0})",
    "where": "select({0} != all(0.0f), {1}, {2})", "exp": "each_exp({0})", "sqrt": "each_sqrt({0})",
}  # fmt: skip


def emit(program: TileProgram, lanes: int) -> str:
    """The whole source; `lanes` float32 per vector: 4, 8 or 16."""
    if program.threads % lanes or lanes not in (4, 8, 16):
        raise InputError(f"{program.name}: {program.threads} threads in vectors of {lanes}")
    return _Emitter(program, lanes).source()


class _Emitter:
    def __init__(self, program: TileProgram, lanes: int) -> None:
        self.program, self.lanes = program, lanes
        self.chunks = program.threads // lanes
        self.places, self.shared_bytes = plan_shared(program)
        self.lines: list[str] = []
        self.tables: list[str] = []
        self.made_by = {id(s.out): s for s in instructions(program.body) if s.out is not None and s.op in LAZY}
        self.uses: dict[int, int] = {}
        for step in instructions(program.body):
            for arg in step.args:
                self.uses[id(arg)] = self.uses.get(id(arg), 0) + 1
        self.kept: set[int] = set()  # tiles that lie in arrays
        self.pending: dict[int, Instruction] = {}  # lazy tiles that are still to be used
        self.memo: list[dict[tuple[Any, ...], str]] = [{}]
        self.ranges: Range = {f"block{axis}": n - 1 for axis, n in enumerate(program.grid)}
        self.maps: dict[tuple[int, int], list[int]] = {}
        self.counter = 0
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
                PRELUDE.replace("@LANES@", str(self.lanes)),
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
            self.nodes(node.body)
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
                return  # shared tensors are planned; a block is one thread of the processor, so it never waits for itself
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
        """Ask for the bytes that this load will want some rounds of its loop later; a step of k is a row of the source."""
        assert step.out is not None
        source, ahead = step.args[0], step.attrs["prefetch"]
        size = source.dtype.bits // 8
        stride = source.placed.strides[0] * size * ahead
        extent = 1
        for d, n in zip(step.attrs["dims"], step.out.shape, strict=True):
            extent += (n - 1) * source.placed.strides[d] * size
        return (
            f"for (long at = 0; at < {extent}; at += 64) __builtin_prefetch(p_{step.out.name} + {stride} + at);"
        )

    def order(self, arg: Tensor, out: Tensor) -> list[int]:
        """`slot_map`, found once."""
        key = (id(arg), id(out))
        if key not in self.maps:
            self.maps[key] = slot_map(arg, out)
        return self.maps[key]

    # -- numbers of one slot -------------------------------------------------------------------------------------------

    def fresh(self, kind: str) -> str:
        self.counter += 1
        return f"{kind}{self.counter}"

    def remember(self, key: tuple[Any, ...], kind: str, expression: str) -> str:
        name = self.fresh("t")
        self.lines.append(f"const {kind} {name} = {expression};")
        self.memo[-1][key] = name
        return name

    def known(self, key: tuple[Any, ...]) -> str | None:
        return next((level[key] for level in reversed(self.memo) if key in level), None)

    def value(self, tensor: Tensor, slot: int, chunk: int) -> str:
        """C++ name of the float32 vector of a slot."""
        if tensor.dtype.narrow:
            return self.decoded(tensor, slot, chunk)
        if id(tensor) in self.kept:
            return f"{tensor.name}[{slot}][{chunk}]"
        key = (id(tensor), slot, chunk)
        found = self.known(key)
        if found is not None:
            return found
        step = self.made_by.get(id(tensor))
        if step is None:
            raise InputError(f"{self.program.name}: {tensor} is used before it is made")
        if step.op in ("load_global", "load_shared"):
            if tensor.held.num_slots * self.chunks > MOST_LISTED and not is_regular(self, step):
                self.keep(tensor)
                return f"{tensor.name}[{slot}][{chunk}]"
            expression, pattern = float_load(self, step, slot, chunk)
            shared_key = (id(tensor), pattern)
            found = self.known(shared_key) if pattern is not None else None
            if found is None:
                found = self.remember(shared_key if pattern is not None else key, "VF", expression)
            return found
        return self.remember(key, "VF", self.expression(step, slot, chunk))

    def expression(self, step: Instruction, slot: int, chunk: int) -> str:
        assert step.out is not None
        out, arg = step.out, step.args[0]
        if step.op == "reshape":
            return self.value(arg, slot, chunk)
        if step.op == "view":
            return self.viewed(arg, out, slot, chunk)
        if step.op == "cast":
            source = self.value(arg, self.order(arg, out)[slot], chunk)
            return self.rounded(out, source) if arg.dtype.bits > out.dtype.bits or arg.dtype.bits == 16 else source
        if step.op == "reduce":
            terms = [self.value(arg, s, chunk) for s in self.terms(step, slot)]
            found = terms[0]
            for term in terms[1:]:
                found = f"({found} + {term})" if step.attrs["fn"] == "sum" else _BINARY["max"].format(found, term)
            return found
        values = [self.value(a, self.order(a, out)[slot], chunk) for a in step.args]
        return self.rounded(out, _BINARY[step.attrs["fn"]].format(*values))

    def rounded(self, tensor: Tensor, expression: str) -> str:
        return {"f16": "round_f16({})", "bf16": "round_bf16({})"}.get(tensor.dtype.name, "{}").format(expression)

    def terms(self, step: Instruction, slot: int) -> list[int]:
        """Slots of the argument that a reduced slot sums, in order."""
        assert step.out is not None
        groups = step.args[0].held.slot_part()
        groups[:, list(step.attrs["dims"])] = 0
        return [int(s) for s in np.flatnonzero((groups == step.out.held.slot_part()[slot]).all(axis=1))]

    def crosses_threads(self, step: Instruction) -> bool:
        return any(d in step.attrs["dims"] for d, n, _ in step.args[0].held.spatial_entries() if n > 1)

    # -- words of packed bits ------------------------------------------------------------------------------------------

    def word(self, tensor: Tensor, number: int, chunk: int) -> str:
        """C++ name of a vector of 32-bit words: bits [32 number, 32 number + 32) of each thread's slice."""
        if id(tensor) in self.kept:
            return f"{tensor.name}[{number}][{chunk}]"
        key = (id(tensor), "word", number, chunk)
        found = self.known(key)
        if found is not None:
            return found
        step = self.made_by.get(id(tensor))
        if step is None:
            raise InputError(f"{self.program.name}: {tensor} is used before it is made")
        if step.op in ("view", "reshape"):
            return self.word(step.args[0], number, chunk) if step.args[0].dtype.narrow else self.remember(
                key, "VU", self.packed(step.args[0], number, chunk)
            )
        if step.op in ("load_global", "load_shared"):
            return self.remember(key, "VU", word_load(self, step, number, chunk))
        raise InputError(f"{self.program.name}: {step.op} to {tensor.dtype.name}: the C++ back end only views such types")

    def packed(self, tensor: Tensor, number: int, chunk: int) -> str:
        if tensor.dtype.name == "f32":
            return f"as_words({self.value(tensor, number, chunk)})"
        low, high = (
            f"bits_{tensor.dtype.name}({self.value(tensor, slot, chunk)})" if slot < tensor.held.num_slots else "none()"
            for slot in (2 * number, 2 * number + 1)
        )
        return f"({low} | ({high} << 16))"

    def viewed(self, arg: Tensor, out: Tensor, slot: int, chunk: int) -> str:
        """A wide number out of words."""
        if not arg.dtype.narrow:
            word = self.packed(arg, slot * out.dtype.bits // 32, chunk)
        else:
            word = self.word(arg, slot * out.dtype.bits // 32, chunk)
        if out.dtype.bits == 32:
            return f"as_floats({word})"
        half = f"({word} >> 16)" if slot % 2 else f"({word} & 0xFFFFu)"
        return f"from_{out.dtype.name}({half})"

    def decoded(self, tensor: Tensor, slot: int, chunk: int) -> str:
        """The number a narrow code means."""
        key = (id(tensor), "number", slot, chunk)
        found = self.known(key)
        if found is not None:
            return found
        form, first = tensor.dtype, slot * tensor.dtype.bits
        at, shift, bits = first // 32, first % 32, form.bits
        word = self.word(tensor, at, chunk)
        crosses = shift + bits > 32
        if crosses:
            word = f"(({word} >> {shift}) | ({self.word(tensor, at + 1, chunk)} << {32 - shift}))"
            shift = 0
        if form.kind == "int":
            up = f"({word} << {32 - bits - shift})" if 32 - bits - shift else word
            return self.remember(key, "VF", f"numbers(VI({up}) >> {32 - bits})")
        code = f"(({word} >> {shift}) & {(1 << bits) - 1}u)" if shift + bits < 32 or crosses else f"({word} >> {shift})"
        if form.kind == "uint":
            return self.remember(key, "VF", f"numbers(VI({code}))")
        special = 3 if form.exponent_bits == 5 else 1 if (form.exponent_bits, form.mantissa_bits) == (4, 3) else 0
        return self.remember(
            key, "VF", f"small_float<{form.exponent_bits}, {form.mantissa_bits}, {special}>({code})"
        )

    # -- tiles in arrays -----------------------------------------------------------------------------------------------

    def declare(self, tensor: Tensor) -> tuple[str, int]:
        kind, count = ("VU", -(-tensor.held.num_slots * tensor.dtype.bits // 32)) if tensor.dtype.narrow else (
            "VF",
            tensor.held.num_slots,
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

    def table(self, numbers: Sequence[int]) -> str:
        name = self.fresh("table")
        self.tables.append(f"static const int {name}[] = {{{', '.join(map(str, numbers))}}};")
        return name

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
        where, who = self.table([each for t in owners for each in flat[t]]), self.table(owners)
        fn = "Sum" if step.attrs["fn"] == "sum" else "Most"
        name = self.fresh("sums_")
        self.lines.append(f"float {name}[{_product(out.shape)}];")
        self.lines.append(
            f"over_threads<{fn}, {_product(out.shape)}, {len(owners)}, {arg.held.num_slots}, {self.program.threads}>"
            f"({name}, reinterpret_cast<const float*>({arg.name}), {where}, {who});"
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
