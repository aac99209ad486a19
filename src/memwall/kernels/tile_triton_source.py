"""Triton of a tile program: tiles become Triton's tensors, and a view becomes the address of every code.

Triton decides itself which thread holds what, so a layout cannot be handed to it. What a layout says is still needed
where bytes are viewed as codes: thread and slot of each element give the byte and bit it lies at, in the same packed
weights that the other back ends read. Shared memory and copies are Triton's own business: programs with such
instructions are refused (`tilus.direct_program` and `tilus.matvec_program` have none).

Holds when: shapes of tiles are powers of two (but for the bytes of packed weights, which are never a tensor here).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from memwall.errors import InputError, MissingDependency
from memwall.hardware.system import cache_directory
from memwall.kernels.tile_cpp_memory import Range, reaching_over, where
from memwall.kernels.tile_layout import Entry
from memwall.kernels.tile_program import Condition, Instruction, Loop, Node, Tensor, TileProgram, instructions, written
from memwall.kernels.tile_types import TileType

TYPES = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}
_FUNCTIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "max": "tl.maximum({0}, {1})",
    "min": "tl.minimum({0}, {1})", "lt": "({0} < {1}).to({0}.dtype)", "neg": "-{0}", "abs": "tl.abs({0})",
    "exp": "tl.exp({0})", "sqrt": "tl.sqrt({0})", "where": "tl.where({0} != 0, {1}, {2})",
}  # fmt: skip


def emit(program: TileProgram) -> str:
    """A Python module with one kernel called `kernel`."""
    return _Emitter(program).source()


class _Emitter:
    def __init__(self, program: TileProgram) -> None:
        self.program = program
        self.lines: list[str] = []
        self.indent = 1
        self.ranges: Range = {f"block{axis}": n - 1 for axis, n in enumerate(program.grid)}
        self.viewed = {id(s.args[0]) for s in instructions(program.body) if s.op == "view"}
        self.loads: dict[int, Instruction] = {}
        self.counter = 0
        if len(program.grid) > 3:
            raise InputError(f"{program.name}: Triton has grids of three axes")

    def source(self) -> str:
        names = ", ".join(param.name for param in self.program.params)
        for axis in range(len(self.program.grid)):
            self.say(f"block{axis} = tl.program_id({axis}).to(tl.int64)")
        self.nodes(self.program.body)
        head = f'"""{self.program.name}, written by memwall.kernels.tile_triton_source."""'
        return "\n".join(
            [
                *(head, "", "import triton", "import triton.language as tl", "", ""),
                *("@triton.jit", f"def kernel({names}):", *self.lines, ""),
            ]
        )

    def say(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def nodes(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(node, Instruction):
                handler = getattr(self, f"on_{node.op}", None)
                if handler is None:
                    raise InputError(
                        f"{self.program.name}: {node.op} is not for Triton, which manages shared memory itself: build "
                        "the program without stages and splits"
                    )
                handler(node)
                continue
            if isinstance(node, Loop):
                self.ranges[node.variable] = node.count - 1
                self.say(f"for {node.variable} in range({node.count}):")
            else:
                assert isinstance(node, Condition)
                self.say(f"if {written(node.test, '//')}:")
            self.indent += 1
            outside = self.ranges
            if isinstance(node, Condition):
                self.ranges = where(node.test, outside)
            self.nodes(node.body)
            self.ranges = outside
            self.indent -= 1

    # -- indices -------------------------------------------------------------------------------------------------------

    def axis(self, tensor: Tensor, dim: int) -> str:
        """Index along one dimension, spread over the others."""
        size, rank = tensor.shape[dim], len(tensor.shape)
        if size & (size - 1):
            raise InputError(f"{self.program.name}: {tensor} in Triton: sizes of tiles are powers of two")
        spread = ", ".join(":" if d == dim else "None" for d in range(rank))
        return f"tl.arange(0, {size})[{spread}]" if rank > 1 else f"tl.arange(0, {size})"

    def address(self, step: Instruction, memory: Tensor, tile: Tensor, index: Sequence[str]) -> tuple[str, str]:
        """(offset in elements, mask or nothing) of the tile's elements, whose indices are given."""
        if memory.placed.swizzle is not None:
            raise InputError(f"{self.program.name}: {memory} is swizzled")
        along = dict(zip(step.attrs["dims"], index, strict=True))
        unsafe = reaching_over(self, step, memory, tile.shape)  # type: ignore[arg-type]
        terms, tests = [], []
        for d, (offset, stride) in enumerate(zip(step.attrs["offsets"], memory.placed.strides, strict=True)):
            at = " + ".join([written(offset, "//"), *([along[d]] if d in along else [])])
            terms.append(f"({at}) * {stride}")
            if d in unsafe:
                tests.append(f"(({at}) < {memory.shape[d]})")
        return " + ".join(terms), " & ".join(tests)

    def digits(self, entries: list[Entry], number: str) -> dict[int, str]:
        """Parts of the index, by dimension, that these entries take from a number (a thread or a slot)."""
        found: dict[int, list[str]] = {}
        rest = math.prod(n for _, n, _ in entries)
        for d, n, stride in entries:
            rest //= n
            if d >= 0:
                found.setdefault(d, []).append(f"({number} // {rest}) % {n} * {stride}")
        return {d: " + ".join(parts) for d, parts in found.items()}

    def number(self, entries: list[Entry], index: Sequence[str]) -> str:
        """Number of the thread or slot that holds an index; the first of copies."""
        terms, rest = [], math.prod(n for _, n, _ in entries)
        for d, n, stride in entries:
            rest //= n
            if d >= 0:
                terms.append(f"({index[d]} // {stride}) % {n} * {rest}")
        return " + ".join(terms) or "0"

    # -- instructions --------------------------------------------------------------------------------------------------

    def on_register_tensor(self, step: Instruction) -> None:
        assert step.out is not None
        shape = ", ".join(map(str, step.out.shape))
        self.say(f"{step.out.name} = tl.full([{shape}], {step.attrs['init']!r}, {self.type(step.out.dtype)})")

    def type(self, dtype: TileType) -> str:
        if dtype.name not in TYPES:
            raise InputError(f"{self.program.name}: a tile of {dtype.name} is no tensor in Triton: view, then cast it")
        return TYPES[dtype.name]

    def on_load_global(self, step: Instruction) -> None:
        assert step.out is not None
        if id(step.out) in self.viewed:
            self.loads[id(step.out)] = step
            # the place may move before the view: offsets are taken now
            return
        self.type(step.out.dtype)
        index = [self.axis(step.out, d) for d in range(len(step.out.shape))]
        at, mask = self.address(step, step.args[0], step.out, index)
        more = f", mask={mask}, other=0.0" if mask else ""
        self.say(f"{step.out.name} = tl.load({step.args[0].name} + {at}{more})")

    def on_store_global(self, step: Instruction) -> None:
        target, tile = step.args
        index = [self.axis(tile, d) for d in range(len(tile.shape))]
        at, mask = self.address(step, target, tile, index)
        self.say(f"tl.store({target.name} + {at}, {tile.name}{f', mask={mask}' if mask else ''})")

    def on_view(self, step: Instruction) -> None:
        assert step.out is not None
        out, raw = step.out, step.args[0]
        load = self.loads.get(id(raw))
        if load is None or raw.dtype.bits != 8 or not out.dtype.narrow:
            raise InputError(f"{self.program.name}: {step}: Triton views only bytes loaded from global memory as codes")
        name, bits = out.name, out.dtype.bits
        self.say(f"{name}_k = {self.axis(out, 0)}")
        index = [f"{name}_k"]
        for d in range(1, len(out.shape)):
            self.say(f"{name}_{d} = {self.axis(out, d)}")
            index.append(f"{name}_{d}")
        self.say(f"{name}_t = {self.number(out.held.spatial_entries(), index)}")
        self.say(f"{name}_bit = ({self.number(out.held.local_entries(), index)}) * {bits}")
        self.say(f"{name}_byte = {name}_bit // 8")
        code = self.byte(load, raw, f"{name}_t", f"{name}_byte")
        if 8 % bits:  # codes may begin in one byte and end in the next
            last = raw.held.num_slots - 1
            high = self.byte(load, raw, f"{name}_t", f"tl.minimum({name}_byte + 1, {last})")
            code = f"({code} | ({high} << 8))"
        self.say(f"{name} = ({code} >> ({name}_bit % 8)) & {(1 << bits) - 1}")

    def byte(self, load: Instruction, raw: Tensor, thread: str, slot: str) -> str:
        parts = [self.digits(raw.held.spatial_entries(), thread), self.digits(raw.held.local_entries(), f"({slot})")]
        index = [" + ".join(p[d] for p in parts if d in p) or "0" for d in range(len(raw.shape))]
        at, mask = self.address(load, load.args[0], raw, index)
        if mask:
            raise InputError(f"{self.program.name}: {load}: packed bytes reach over their end")
        return f"tl.load({load.args[0].name} + {at}).to(tl.int32)"

    def on_cast(self, step: Instruction) -> None:
        assert step.out is not None
        arg, out = step.args[0], step.out
        to = self.type(out.dtype)
        self.say(f"{out.name} = ({self.number_of(arg) if arg.dtype.narrow else arg.name}).to({to})")

    def number_of(self, tensor: Tensor) -> str:
        """Codes to numbers, exactly."""
        form, code = tensor.dtype, tensor.name
        if form.kind == "uint":
            return code
        if form.kind == "int":
            return f"({code} ^ {1 << (form.bits - 1)}) - {1 << (form.bits - 1)}"
        e, m = form.exponent_bits, form.mantissa_bits
        size = f"({code} & {(1 << (e + m)) - 1})"
        self.say(f"{code}_w = ({size} << {23 - m}) + {(127 - form.bias) << 23}")
        if e == 5:
            self.say(f"{code}_w = tl.where({size} >= {31 << m}, ({size} << {23 - m}) | 0x7F800000, {code}_w)")
        if (e, m) == (4, 3):
            self.say(f"{code}_w = tl.where({size} == 127, 0x7FC00000, {code}_w)")
        self.say(f"{code}_v = {code}_w.to(tl.float32, bitcast=True)")
        small = f"{size}.to(tl.float32) * {2.0 ** (1 - form.bias - m)!r}"
        self.say(f"{code}_v = tl.where({size} < {1 << m}, {small}, {code}_v)")
        return f"tl.where({code} >= {1 << (e + m)}, -{code}_v, {code}_v)"

    def on_elementwise(self, step: Instruction) -> None:
        assert step.out is not None
        self.type(step.out.dtype)
        text = _FUNCTIONS[step.attrs["fn"]].format(*(arg.name for arg in step.args))
        if step.attrs["fn"] in ("exp", "sqrt") and step.out.dtype.bits == 16:
            text = _FUNCTIONS[step.attrs["fn"]].format(f"{step.args[0].name}.to(tl.float32)")
            text += f".to({self.type(step.out.dtype)})"
        self.say(f"{step.out.name} = {text}")

    def on_assign(self, step: Instruction) -> None:
        assert step.out is not None
        self.say(f"{step.out.name} = {step.args[0].name}")

    def on_reshape(self, step: Instruction) -> None:
        assert step.out is not None
        self.say(f"{step.out.name} = tl.reshape({step.args[0].name}, [{', '.join(map(str, step.out.shape))}])")

    def on_reduce(self, step: Instruction) -> None:
        assert step.out is not None
        text = step.args[0].name
        for d in step.attrs["dims"]:
            text = f"tl.{step.attrs['fn']}({text}, axis={d}, keep_dims=True)"
        self.say(f"{step.out.name} = {text}")

    def on_dot(self, step: Instruction) -> None:
        a, b, acc = step.args
        self.say(f"{acc.name} = tl.dot({a.name}, {b.name}, {acc.name})")

    def on_sync(self, step: Instruction) -> None:
        """Triton's programs are one block in step."""


class Launch:
    """The kernel of a program, on torch tensors of a GPU (or of the CPU, in Triton's interpreter)."""

    def __init__(self, program: TileProgram) -> None:
        self.program, self.source = program, emit(program)
        name = f"tile_{program.name}_{hashlib.sha256(self.source.encode()).hexdigest()[:16]}"
        path = cache_directory() / "tiles" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.source, encoding="utf-8")
        if importlib.util.find_spec("triton") is None:
            raise MissingDependency("triton", "torch")
        spec = importlib.util.spec_from_file_location(name, path)  # Triton reads a kernel's source from its file
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        self._kernel = module.kernel

    def __call__(self, tensors: Mapping[str, Any]) -> None:
        grid = (*self.program.grid, 1, 1)[:3]
        self._kernel[grid](*(tensors[param.name] for param in self.program.params), num_warps=self.program.warps)
