"""CUDA of a tile program: every thread of a block runs what the layouts give it, on words of raw bits.

A register tile is an array of 32-bit words, whatever its type: a view is the same array under another name. Loads and
stores are as wide as layout and alignment allow, 16-bit fragments come by ldmatrix, copies to shared memory by
cp.async, narrow codes become float16 two at a time by their recipe, and products are mma.m16n8k16.

Compiled by nvcc and executed thread by thread on a CPU (tests/kernels/cuda_on_cpu.h); not yet run on a GPU.
Source: Tilus (2025, arXiv 2504.12984), code generation; PTX ISA for the instructions.
Holds when: compute capability 8.0 or later; sums over threads stay within a warp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_casts import Recipe, both, byte_recipe, nibble_recipes, pair_recipe, place_masks
from memwall.kernels.tile_cost import MATRIX, base_alignment, vector_bytes
from memwall.kernels.tile_cpp_memory import Range, linear, reaching_over, where
from memwall.kernels.tile_cuda_prelude import PRELUDE
from memwall.kernels.tile_infer import plan_shared, slot_map
from memwall.kernels.tile_layout import MMA_A, MMA_B, MMA_C, Entry
from memwall.kernels.tile_program import (
    WARP,
    Condition,
    Instruction,
    Loop,
    Node,
    Tensor,
    TileProgram,
    instructions,
    written,
)

_FUNCTIONS = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})", "max": "fmaxf({0}, {1})",
    "min": "fminf({0}, {1})", "lt": "({0} < {1} ? 1.0f : 0.0f)", "neg": "(-{0})", "abs": "fabsf({0})",
    "exp": "expf({0})", "sqrt": "sqrtf({0})", "where": "({0} != 0.0f ? {1} : {2})",
}  # fmt: skip


def emit(program: TileProgram, prelude: str = PRELUDE) -> str:
    """A translation unit with the kernel `tile_kernel` and, in comments, how to launch it.

    prelude: the functions that the kernel calls; others stand in for them where it is tried out without a GPU.
    """
    return _Emitter(program).source(prelude)


def words(tensor: Tensor) -> int:
    """Registers of a tile."""
    return -(-tensor.held.num_slots * tensor.dtype.bits // 32)


class _Emitter:
    def __init__(self, program: TileProgram) -> None:
        if len(program.grid) > 3:
            raise InputError(f"{program.name}: CUDA has grids of three axes")
        self.program = program
        self.places, self.shared_bytes = plan_shared(program, 227 * 1024)
        self.ranges: Range = {f"block{axis}": n - 1 for axis, n in enumerate(program.grid)}
        self.lines: list[str] = []
        self.changed = {id(step.out) for step in instructions(program.body) if step.op in ("assign", "dot")}

    def source(self, prelude: str) -> str:
        self.nodes(self.program.body)
        params = ", ".join(f"uint8_t* __restrict__ g_{param.name}" for param in self.program.params)
        grid = ", ".join(map(str, self.program.grid))
        axes = [f"    const int block{axis} = blockIdx.{'xyz'[axis]};" for axis in range(len(self.program.grid))]
        return "\n".join(
            [
                f"// {self.program.name}, written by memwall.kernels.tile_cuda: tile_kernel<<<dim3({grid}), "
                f"{self.program.threads}, {self.shared_bytes}>>>",
                "// semaphores: int per output tile, zero at the start",
                prelude,
                f'extern "C" __global__ void __launch_bounds__({self.program.threads})',
                f"tile_kernel({params}, int* semaphores) {{",
                "    SHARED",
                "    const int thread = threadIdx.x;",
                *axes,
                *("    " + line for line in self.lines),
                "}",
                "",
            ]
        )

    def nodes(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(node, Instruction):
                getattr(self, f"on_{node.op}")(node)
                continue
            if isinstance(node, Loop):
                self.ranges[node.variable] = node.count - 1
                v = node.variable
                if node.unroll:
                    self.lines.append("#pragma unroll")
                self.lines.append(f"for (int {v} = 0; {v} < {node.count}; ++{v}) {{")
            else:
                assert isinstance(node, Condition)
                self.lines.append(f"if ({written(node.test)}) {{")
            outside = self.ranges
            if isinstance(node, Condition):
                self.ranges = where(node.test, outside)
            self.nodes(node.body)
            self.ranges = outside
            self.lines.append("}")

    # -- addresses -----------------------------------------------------------------------------------------------------

    def digits(self, entries: list[Entry], strides: dict[int, int], number: str) -> str:
        """What a thread's number adds to an offset."""
        terms, rest = [], math.prod(n for _, n, _ in entries)
        for d, n, stride in entries:
            rest //= n
            if d >= 0 and strides.get(d, 0):
                terms.append(f"({number} / {rest}) % {n} * {stride * strides[d]}")
        return " + ".join(terms) or "0"

    def open(self, step: Instruction, memory: Tensor, tile: Tensor, name: str) -> list[int]:
        """Declares what all slots share; the offsets of the slots, in elements."""
        strides = {j: memory.placed.strides[d] for j, d in enumerate(step.attrs["dims"])}
        thread = self.digits(tile.held.spatial_entries(), strides, "thread")
        self.lines.append(f"const long at_{name} = {linear(memory, step.attrs['offsets'])} + {thread};")
        for j, d in enumerate(step.attrs["dims"]):
            if d in reaching_over(self, step, memory, tile.shape):  # type: ignore[arg-type]
                index = self.digits(tile.held.spatial_entries(), {j: 1}, "thread")
                self.lines.append(f"const int i{d}_{name} = {written(step.attrs['offsets'][d])} + {index};")
        part = tile.held.slot_part()
        return [int(sum(row[j] * s for j, s in strides.items())) for row in part]

    def inside(self, step: Instruction, memory: Tensor, tile: Tensor, slot: int, name: str) -> str:
        dims = {d: j for j, d in enumerate(step.attrs["dims"])}
        row, tests = tile.held.slot_part()[slot], []
        for d in reaching_over(self, step, memory, tile.shape):  # type: ignore[arg-type]
            at = f"i{d}_{name} + {row[dims[d]]}" if d in dims else written(step.attrs["offsets"][d])
            tests.append(f"{at} < {memory.shape[d]}")
        return " && ".join(tests)

    def address(self, memory: Tensor, offset: str) -> str:
        size = memory.dtype.bits // 8
        if not size:
            raise InputError(f"{self.program.name}: {memory}: CUDA loads whole bytes; load u8 and view it")
        if memory.placed.swizzle is not None:
            bits, low, shift = memory.placed.swizzle
            offset = f"swizzle<{bits}, {low}, {shift}>({offset})"
        base = f"g_{memory.name}" if memory.space == "global" else f"shared + {self.places[id(memory)]}"
        return f"{base} + ({offset}) * {size}"

    def vectors(self, step: Instruction, memory: Tensor, tile: Tensor) -> int:
        """Bytes of each access; single elements where a tile may reach over the end of its last dimension."""
        last = step.attrs["dims"][-1] if step.attrs["dims"] else -1
        if last in reaching_over(self, step, memory, tile.shape):  # type: ignore[arg-type]
            return memory.dtype.bits // 8
        return vector_bytes(step)

    # -- memory --------------------------------------------------------------------------------------------------------

    def declare(self, tensor: Tensor) -> None:
        self.lines.append(f"uint32_t {tensor.name}[{words(tensor)}];")

    def on_load_global(self, step: Instruction) -> None:
        assert step.out is not None
        out, memory = step.out, step.args[0]
        self.declare(out)
        offsets = self.open(step, memory, out, out.name)
        width = self.vectors(step, memory, out)
        each = max(width * 8 // out.dtype.bits, 1)
        if width < 4:
            self.lines.append(f"for (auto& word : {out.name}) word = 0;")
        for slot in range(0, out.held.num_slots, each):
            bit = slot * out.dtype.bits
            place = f"{out.name} + {bit // 32}" if width >= 4 else f"{out.name}[{bit // 32}], {bit % 32}"
            load = f"load_{width}({place}, {self.address(memory, f'at_{out.name} + {offsets[slot]}')});"
            test = self.inside(step, memory, out, slot, out.name)
            empty = f" else zero_{width}({out.name} + {bit // 32});" if test and width >= 4 else ""
            self.lines.append(f"if ({test}) {load}{empty}" if test else load)

    def on_load_shared(self, step: Instruction) -> None:
        assert step.out is not None
        tile = step.out
        if tile.dtype.bits == 16 and len(tile.shape) == 2:
            try:
                tiles = tile.held.divide(MATRIX)
            except InputError:
                return self.on_load_global(step)
            if tiles.num_threads == self.program.warps:
                return self.ldmatrix(step, tiles)
        return self.on_load_global(step)

    def ldmatrix(self, step: Instruction, tiles: Any) -> None:
        """Up to four matrices of 8 x 8 at once: lane l hands in the address of row l mod 8 of matrix l div 8."""
        assert step.out is not None
        out, memory = step.out, step.args[0]
        self.declare(out)
        strides = {j: memory.placed.strides[d] * 8 for j, d in enumerate(step.attrs["dims"])}
        row = memory.placed.strides[step.attrs["dims"][0]]
        warp = self.digits(tiles.spatial_entries(), strides, f"(thread / {WARP})")
        name = out.name
        self.lines.append(
            f"const long at_{name} = {linear(memory, step.attrs['offsets'])} + {warp} + thread % 8 * {row};"
        )
        slots = [int(sum(r[j] * s for j, s in strides.items())) for r in tiles.slot_part()]
        first = 0
        while first < len(slots):
            count = next(c for c in (4, 2, 1) if first + c <= len(slots))
            chosen = str(slots[first + count - 1])
            for matrix in reversed(range(count - 1)):
                chosen = f"(thread % 32 / 8 == {matrix} ? {slots[first + matrix]} : {chosen})"
            self.lines.append(f"ldmatrix_{count}({name} + {first}, {self.address(memory, f'at_{name} + {chosen}')});")
            first += count

    def on_store_global(self, step: Instruction) -> None:
        memory, tile = step.args
        name = f"{tile.name}_{len(self.lines)}"
        offsets = self.open(step, memory, tile, name)
        width = self.vectors(step, memory, tile)
        each = max(width * 8 // tile.dtype.bits, 1)
        for slot in range(0, tile.held.num_slots, each):
            bit = slot * tile.dtype.bits
            place = f"{tile.name} + {bit // 32}" if width >= 4 else f"{tile.name}[{bit // 32}] >> {bit % 32}"
            test = self.inside(step, memory, tile, slot, name)
            store = f"store_{width}({self.address(memory, f'at_{name} + {offsets[slot]}')}, {place});"
            self.lines.append(f"if ({test}) {store}" if test else store)

    on_store_shared = on_store_global

    def on_copy_async(self, step: Instruction) -> None:
        target, source = step.args
        shape, size = step.attrs["shape"], source.dtype.bits // 8
        width = math.gcd(shape[-1] * size, 16)
        for tensor, key in ((target, "target_offsets"), (source, "source_offsets")):
            width = math.gcd(width, base_alignment(tensor, step.attrs[key]))
        ahead = len(source.shape) - len(shape)
        read = Instruction("load_global", None, (source,), {
            "offsets": step.attrs["source_offsets"], "dims": tuple(range(ahead, len(source.shape))),
        })  # fmt: skip
        unsafe = reaching_over(self, read, source, shape)  # type: ignore[arg-type]
        if len(source.shape) - 1 in unsafe or width < 4:
            raise InputError(f"{self.program.name}: {step}: rows of whole 4-byte pieces are copied asynchronously")
        per, inner = width // size, math.prod(shape) * size // width
        self.lines.append(f"for (int v = thread; v < {inner}; v += {self.program.threads}) {{")
        rest = inner * per
        for d, n in enumerate(shape):
            rest //= n
            self.lines.append(f"const int c{d} = v * {per} / {rest} % {n};")
        for tensor, kind, key in ((target, "to", "target_offsets"), (source, "come", "source_offsets")):
            lead = len(tensor.shape) - len(shape)
            moved = " + ".join(f"c{d} * {tensor.placed.strides[lead + d]}L" for d in range(len(shape)))
            self.lines.append(f"const long {kind} = {linear(tensor, step.attrs[key])} + {moved};")
        tests = [
            f"{written(at)} + {f'c{d - ahead}' if d >= ahead else 0} < {source.shape[d]}"
            for d, at in enumerate(step.attrs["source_offsets"])
            if d in unsafe
        ]
        come = self.address(source, "come")
        there = f"({' && '.join(tests)})" if tests else "true"
        safe = f"{there} ? {come} : g_{source.name}" if tests else come
        self.lines.append(f"copy_async<{width}>({self.address(target, 'to')}, {safe}, {there} ? {width} : 0);")
        self.lines.append("}")

    def on_commit_group(self, step: Instruction) -> None:
        self.lines.append("commit_group();")

    def on_wait_group(self, step: Instruction) -> None:
        self.lines.append(f"wait_group<{step.attrs['left']}>();")

    def on_sync(self, step: Instruction) -> None:
        self.lines.append("__syncthreads();")

    def on_lock(self, step: Instruction) -> None:
        self.lines.append(f"lock(semaphores + {written(step.attrs['semaphore'])}, {written(step.attrs['value'])});")

    def on_release(self, step: Instruction) -> None:
        self.lines.append(f"release(semaphores + {written(step.attrs['semaphore'])}, {written(step.attrs['value'])});")

    def on_shared_tensor(self, step: Instruction) -> None:
        """Planned before."""

    on_free_shared = on_shared_tensor

    # -- computing -----------------------------------------------------------------------------------------------------

    def on_register_tensor(self, step: Instruction) -> None:
        assert step.out is not None
        out = step.out
        if out.dtype.narrow:
            raise InputError(f"{self.program.name}: {out}: tiles of packed bits are loaded and viewed, not filled")
        self.declare(out)
        for slot in range(out.held.num_slots):
            self.lines.append(self.put(out, slot, f"{float(step.attrs['init'])!r}f"))

    def put(self, tensor: Tensor, slot: int, number: str) -> str:
        kind = tensor.dtype.name
        if kind == "f32":
            return f"{tensor.name}[{slot}] = __float_as_uint({number});"
        return f"put_{kind}<{slot % 2}>({tensor.name}[{slot // 2}], {number});"

    def get(self, tensor: Tensor, slot: int) -> str:
        kind = tensor.dtype.name
        if kind == "f32":
            return f"__uint_as_float({tensor.name}[{slot}])"
        return f"get_{kind}<{slot % 2}>({tensor.name}[{slot // 2}])"

    def on_view(self, step: Instruction) -> None:
        """Another name for the same registers; a copy of those that the program changes."""
        assert step.out is not None
        out, source = step.out, step.args[0]
        if id(source) in self.changed:
            self.declare(out)
            self.lines.append(f"for (int i = 0; i < {words(out)}; ++i) {out.name}[i] = {source.name}[i];")
            return
        self.lines.append(f"uint32_t (&{out.name})[{words(out)}] = {source.name};")

    on_reshape = on_view

    def on_cast(self, step: Instruction) -> None:
        assert step.out is not None
        arg, out = step.args[0], step.out
        self.declare(out)
        if not arg.dtype.narrow:
            order = slot_map(arg, out)
            self.lines += [self.put(out, slot, self.get(arg, order[slot])) for slot in range(out.held.num_slots)]
            return
        if out.held.num_slots % 2 or not arg.held.same_as(out.held):
            raise InputError(f"{self.program.name}: {step}: codes are converted two by two, in one layout")
        if arg.dtype.kind != "float" and out.dtype.name == "f16" and out.held.num_slots * arg.dtype.bits % 32 == 0:
            whole = {4: self.nibbles, 8: self.bytes}.get(arg.dtype.bits)
            if whole is not None:
                whole(arg, out)
                return
        for pair in range(out.held.num_slots // 2):
            code = f"({self.code(arg, 2 * pair)} | {self.code(arg, 2 * pair + 1)} << 16)"
            halves = self.recipe(pair_recipe(arg.dtype), code)
            if out.dtype.name == "f16":
                self.lines.append(f"{out.name}[{pair}] = {halves};")
                continue
            self.lines.append(f"{{ const uint32_t halves = {halves};")
            self.lines += [self.put(out, 2 * pair + half, f"get_f16<{half}>(halves)") for half in range(2)]
            self.lines.append("}")

    def nibbles(self, arg: Tensor, out: Tensor) -> None:
        """Eight 4-bit integers of a word by four recipes; two permutations a pair bring them in order."""
        for word in range(words(arg)):
            pairs = [
                self.recipe(recipe, f"({arg.name}[{word}] >> {shift})" if shift else f"{arg.name}[{word}]")
                for shift, recipe in nibble_recipes(arg.dtype)
            ]
            self.lines.append(f"{{ const uint32_t pairs[4] = {{{', '.join(pairs)}}};")
            for first in (0, 2):
                for at, selector in ((first // 2, "0x5410"), (2 + first // 2, "0x7632")):
                    made = f"__byte_perm(pairs[{first}], pairs[{first + 1}], {selector})"
                    self.lines.append(f"{out.name}[{4 * word + at}] = {made};")
            self.lines.append("}")

    def bytes(self, arg: Tensor, out: Tensor) -> None:
        """Bytes permuted under the exponent of 1024."""
        for pair in range(out.held.num_slots // 2):
            selector = "0x4342" if pair % 2 else "0x4140"
            halves = f"__byte_perm({arg.name}[{pair // 2}], 0x64646464u, {selector})"
            self.lines.append(f"{out.name}[{pair}] = {self.recipe(byte_recipe(arg.dtype), halves)};")

    def code(self, tensor: Tensor, slot: int) -> str:
        bits = tensor.dtype.bits
        word, shift = divmod(slot * bits, 32)
        if shift + bits <= 32:
            return f"({tensor.name}[{word}] >> {shift} & {(1 << bits) - 1}u)"
        return f"(__funnelshift_r({tensor.name}[{word}], {tensor.name}[{word + 1}], {shift}) & {(1 << bits) - 1}u)"

    def recipe(self, steps: Recipe, word: str) -> str:
        for name, operand in steps:
            if name in ("xor", "and", "or", "shr"):
                word = f"({word} {({'xor': '^', 'and': '&', 'or': '|', 'shr': '>>'})[name]} {operand:#x}u)"
            elif name in ("sub", "mul"):
                word = f"half2_{name}({word}, {both(operand):#x}u)"
            elif name == "fma":
                word = f"half2_fma({word}, {both(operand & 0xFFFF):#x}u, {both(operand >> 16):#x}u)"
            elif name == "place":
                signs, shift, mask = place_masks(*divmod(operand, 16))
                word = f"place<{16 - operand // 16}, {shift}>({word}, {signs:#x}u, {mask:#x}u)"
            else:
                assert name == "nan143"
                word = f"place_e4m3({word})"
        return word

    def on_elementwise(self, step: Instruction) -> None:
        assert step.out is not None
        out = step.out
        self.declare(out)
        orders = [slot_map(arg, out) for arg in step.args]
        for slot in range(out.held.num_slots):
            values = [self.get(arg, order[slot]) for arg, order in zip(step.args, orders, strict=True)]
            self.lines.append(self.put(out, slot, _FUNCTIONS[step.attrs["fn"]].format(*values)))

    def on_assign(self, step: Instruction) -> None:
        assert step.out is not None
        order = slot_map(step.args[0], step.out)
        for slot in range(step.out.held.num_slots):
            self.lines.append(self.put(step.out, slot, self.get(step.args[0], order[slot])))

    def on_reduce(self, step: Instruction) -> None:
        """A thread's own slots, then the threads of its warp by exchange."""
        assert step.out is not None
        arg, out, fn = step.args[0], step.out, "add" if step.attrs["fn"] == "sum" else "max"
        self.declare(out)
        groups = arg.held.slot_part()
        groups[:, list(step.attrs["dims"])] = 0
        partners, rest = [], self.program.threads
        for d, n, _ in arg.held.spatial_entries():
            rest //= n
            if d in step.attrs["dims"]:
                if rest * n > WARP or n & (n - 1):
                    raise InputError(f"{self.program.name}: {step}: sums over threads stay within a warp here")
                partners += [rest << i for i in range(n.bit_length() - 1)]
        for slot, wanted in enumerate(out.held.slot_part()):
            terms = [self.get(arg, int(s)) for s in np.flatnonzero((groups == wanted).all(axis=1))]
            total = terms[0]
            for term in terms[1:]:
                total = _FUNCTIONS[fn].format(total, term)
            self.lines.append(f"{{ float total = {total};")
            for partner in partners:
                other = f"__shfl_xor_sync(~0u, total, {partner})"
                self.lines.append(f"total = {_FUNCTIONS[fn].format('total', other)};")
            self.lines.append(f"{self.put(out, slot, 'total')} }}")

    def on_dot(self, step: Instruction) -> None:
        a, b, acc = step.args
        sums, rows, columns = acc.held.divide(MMA_C), a.held.divide(MMA_A), b.held.divide(MMA_B)
        kind = a.dtype.name
        for slot, (m, n) in enumerate(sums.table()[0]):
            for k in range(a.shape[1] // MMA_A.shape[1]):
                left = np.flatnonzero((rows.table()[0] == (m, k)).all(axis=1))[0]
                right = np.flatnonzero((columns.table()[0] == (k, n)).all(axis=1))[0]
                self.lines.append(
                    f"mma_{kind}({acc.name} + {4 * slot}, {a.name} + {4 * left}, {b.name} + {2 * right});"
                )
