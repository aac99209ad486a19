"""Tile programs: what a block of threads does with tiles in global, shared and register memory.

A program is built by calling the methods of `TileProgram`: each adds one instruction on whole tiles, control flow is
scalar (block indices, loops, conditions). Registers are distributed over the block's threads by a `Layout`, which may
be left open and is then inferred (`tile_infer`). Back ends: `tile_interpreter` (NumPy), `tile_cpp` (C++ for CPUs),
`tile_triton_source` (Triton) and `tile_cuda` (CUDA); `tile_cost` counts without running.

Source: Tilus (2025, arXiv 2504.12984), the virtual machine's model and instructions.
Shapes are static. Offsets are in elements; what a load reads beyond a global tensor is zero, what a store would write
there is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from memwall.errors import InputError
from memwall.kernels.tile_layout import Layout
from memwall.kernels.tile_memory import MemoryLayout, row_major_memory
from memwall.kernels.tile_types import TileType, tile_type

WARP = 32
UNARY = ("neg", "exp", "abs", "sqrt")
BINARY = ("add", "sub", "mul", "div", "max", "min", "lt")
REDUCTIONS = ("sum", "max")

Scalar: TypeAlias = "int | Expr"


@dataclass(frozen=True, slots=True)
class Expr:
    """A scalar of the program: a variable by name, or an operation on two scalars."""

    op: str
    args: tuple[Any, ...]

    def __add__(self, other: Scalar) -> Expr:
        return Expr("+", (self, other))

    __radd__ = __add__

    def __sub__(self, other: Scalar) -> Expr:
        return Expr("-", (self, other))

    def __mul__(self, other: Scalar) -> Expr:
        return Expr("*", (self, other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Scalar) -> Expr:
        return Expr("//", (self, other))

    def __mod__(self, other: Scalar) -> Expr:
        return Expr("%", (self, other))

    def __lt__(self, other: Scalar) -> Expr:
        return Expr("<", (self, other))

    def equals(self, other: Scalar) -> Expr:
        """Condition: both are the same number (== compares expressions, not numbers)."""
        return Expr("==", (self, other))


def evaluate(scalar: Scalar, variables: dict[str, int]) -> int:
    """Its value."""
    if isinstance(scalar, int):
        return scalar
    if scalar.op == "var":
        return variables[scalar.args[0]]
    a, b = (evaluate(arg, variables) for arg in scalar.args)
    operations = {"+": a + b, "-": a - b, "*": a * b, "<": int(a < b), "==": int(a == b)}
    if scalar.op in operations:
        return operations[scalar.op]
    return a // b if scalar.op == "//" else a % b


def written(scalar: Scalar, division: str = "/") -> str:
    """The scalar as source text; all numbers are non-negative, so that C divides as Python does."""
    if isinstance(scalar, int):
        return str(scalar)
    if scalar.op == "var":
        return str(scalar.args[0])
    a, b = (written(arg, division) for arg in scalar.args)
    return f"({a} {division if scalar.op == '//' else scalar.op} {b})"


@dataclass(eq=False, slots=True)
class Tensor:
    """A tile or a global array. layout: of registers, None while unknown; memory: of the other spaces."""

    name: str
    space: Literal["global", "shared", "register"]
    dtype: TileType
    shape: tuple[int, ...]
    layout: Layout | None = None
    memory: MemoryLayout | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.space} {self.dtype.name}{list(self.shape)}"

    @property
    def held(self) -> Layout:
        """The layout, which inference has found."""
        if self.layout is None:
            raise InputError(f"{self} has no layout yet: infer layouts first")
        return self.layout

    @property
    def placed(self) -> MemoryLayout:
        if self.memory is None:
            raise InputError(f"{self} is not in memory")
        return self.memory


@dataclass(eq=False, slots=True)
class Instruction:
    """op with the tensor it makes (or changes: dot, assign), those it reads, and what else it needs."""

    op: str
    out: Tensor | None = None
    args: tuple[Tensor, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        made = f"{self.out.name} = " if self.out is not None else ""
        told = ", ".join(
            [arg.name for arg in self.args]
            + [f"{k}={_shown(v)}" for k, v in self.attrs.items() if v not in (None, (), False)]
        )
        return f"{made}{self.op}({told})"


@dataclass(eq=False, slots=True)
class Loop:
    """Body for variable = 0 .. count - 1."""

    variable: str
    count: int
    body: list[Node]
    unroll: bool = False


@dataclass(eq=False, slots=True)
class Condition:
    """Body where the scalar is not 0."""

    test: Scalar
    body: list[Node]


Node: TypeAlias = "Instruction | Loop | Condition"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(each) for each in value) + "]"
    return written(value) if isinstance(value, Expr) else getattr(value, "name", str(value))


class TileProgram:
    """A program and its builder. grid: blocks along each axis; warps: of 32 threads per block."""

    def __init__(self, name: str, *, grid: Sequence[int], warps: int = 1) -> None:
        if not 1 <= warps <= 32 or not grid or any(n < 1 for n in grid):
            raise InputError(f"{name}: grid {list(grid)} of blocks with {warps} warps; there are 1 to 32 warps")
        self.name, self.grid, self.warps = name, tuple(grid), warps
        self.params: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self.num_semaphores = 0
        self.body: list[Node] = []
        self._at = [self.body]
        self._names: dict[str, int] = {}

    @property
    def threads(self) -> int:
        return self.warps * WARP

    def block(self, axis: int) -> Expr:
        """The block's index along an axis of the grid."""
        return Expr("var", (f"block{axis}",))

    # -- control flow --------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: int, *, unroll: bool = False) -> Iterator[Expr]:
        """for variable in range(count)."""
        variable = self._fresh("i")
        body: list[Node] = []
        self._at[-1].append(Loop(variable, count, body, unroll))
        self._at.append(body)
        yield Expr("var", (variable,))
        self._at.pop()

    @contextmanager
    def when(self, test: Scalar) -> Iterator[None]:
        """if test."""
        body: list[Node] = []
        self._at[-1].append(Condition(test, body))
        self._at.append(body)
        yield
        self._at.pop()

    # -- tensors -------------------------------------------------------------------------------------------------------

    def global_view(self, name: str, dtype: str, shape: Sequence[int], memory: MemoryLayout | None = None) -> Tensor:
        """A parameter of the program: an array of the caller."""
        tensor = Tensor(name, "global", tile_type(dtype), tuple(shape), None, memory or row_major_memory(tuple(shape)))
        if any(tensor.name == other.name for other in self.params):
            raise InputError(f"{self.name} has two parameters called {name}")
        self.params.append(tensor)
        return tensor

    def shared_tensor(self, dtype: str, shape: Sequence[int], memory: MemoryLayout | None = None) -> Tensor:
        """Memory that the block's threads share; a leading dimension may count stages."""
        tensor = self._new("shared", tile_type(dtype), tuple(shape))
        tensor.memory = memory or row_major_memory(tuple(shape))
        if tensor.dtype.bits % 8:
            raise InputError(f"{tensor}: shared memory holds whole bytes; store bits as u8 and view them in registers")
        self._add("shared_tensor", tensor)
        return tensor

    def free_shared(self, tensor: Tensor) -> None:
        """Its bytes may be given to tensors made later."""
        self._add("free_shared", None, tensor)

    def register_tensor(
        self, dtype: str, shape: Sequence[int], *, init: float = 0.0, layout: Layout | None = None
    ) -> Tensor:
        """A register tile, all of it `init`."""
        return self._make("register_tensor", (), tile_type(dtype), tuple(shape), layout, init=init)

    # -- memory --------------------------------------------------------------------------------------------------------

    def load_global(
        self,
        source: Tensor,
        offsets: Sequence[Scalar],
        shape: Sequence[int],
        *,
        dims: Sequence[int] | None = None,
        layout: Layout | None = None,
        prefetch: int = 0,
    ) -> Tensor:
        """Tile at `offsets`. dims: the source's dimension along each of the tile's (default: its last ones).
        prefetch: steps of the innermost loop ahead of which a CPU asks for the bytes.
        """
        return self._load("load_global", source, offsets, shape, dims, layout, prefetch)

    def store_global(
        self, target: Tensor, tile: Tensor, offsets: Sequence[Scalar], *, dims: Sequence[int] | None = None
    ) -> None:
        self._store("store_global", target, tile, offsets, dims)

    def load_shared(
        self,
        source: Tensor,
        offsets: Sequence[Scalar],
        shape: Sequence[int],
        *,
        dims: Sequence[int] | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        return self._load("load_shared", source, offsets, shape, dims, layout, 0)

    def store_shared(
        self, target: Tensor, tile: Tensor, offsets: Sequence[Scalar], *, dims: Sequence[int] | None = None
    ) -> None:
        self._store("store_shared", target, tile, offsets, dims)

    def copy_async(
        self,
        target: Tensor,
        source: Tensor,
        target_offsets: Sequence[Scalar],
        source_offsets: Sequence[Scalar],
        shape: Sequence[int],
    ) -> None:
        """Global to shared, along the last dimensions of both; there once its group has been waited for."""
        if target.space != "shared" or source.space != "global" or target.dtype is not source.dtype:
            raise InputError(f"copy_async goes from global to shared of one type, not {source} to {target}")
        at = (tuple(target_offsets), tuple(source_offsets))
        if any(len(each) != len(tensor.shape) for each, tensor in zip(at, (target, source), strict=True)):
            raise InputError(f"copy_async of {source}: an offset for each dimension of both")
        self._add("copy_async", None, target, source, target_offsets=at[0], source_offsets=at[1], shape=tuple(shape))

    def commit_group(self) -> None:
        """The copies since the last commit become one group."""
        self._add("commit_group")

    def wait_group(self, left: int) -> None:
        """Wait until at most `left` groups are on their way."""
        self._add("wait_group", left=left)

    def wait_all(self) -> None:
        self._add("wait_group", left=0)

    def sync(self) -> None:
        """All threads of the block have come here."""
        self._add("sync")

    def lock(self, semaphore: Scalar, value: Scalar) -> None:
        """Wait until the semaphore has this value."""
        self._add("lock", semaphore=semaphore, value=value)

    def release(self, semaphore: Scalar, value: Scalar) -> None:
        """Give the semaphore this value; what the block stored before is seen by whoever waits for it."""
        self._add("release", semaphore=semaphore, value=value)

    # -- computing -----------------------------------------------------------------------------------------------------

    def view(self, tile: Tensor, dtype: str, layout: Layout) -> Tensor:
        """The same bits of every thread read as another type and layout; no instruction is executed."""
        return self._make("view", (tile,), tile_type(dtype), layout.shape, layout)

    def cast(self, tile: Tensor, dtype: str) -> Tensor:
        """The same numbers in another type, rounded to nearest even."""
        return self._make("cast", (tile,), tile_type(dtype), tile.shape)

    def unary(self, op: str, tile: Tensor) -> Tensor:
        if op not in UNARY:
            raise InputError(f"no operation on one tile is called {op!r}: {', '.join(UNARY)}")
        return self._make("elementwise", (tile,), tile.dtype, tile.shape, fn=op)

    def binary(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        """Element by element; dimensions of size 1 are repeated. `lt` gives 1 or 0."""
        if op not in BINARY:
            raise InputError(f"no operation on two tiles is called {op!r}: {', '.join(BINARY)}")
        if a.dtype is not b.dtype:
            raise InputError(f"{op} of {a} and {b}: cast one of them first")
        return self._make("elementwise", (a, b), a.dtype, _broadcast(op, a, b), fn=op)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self.binary("add", a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self.binary("mul", a, b)

    def where(self, test: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """a where test is not 0, else b."""
        if not (test.dtype is a.dtype is b.dtype):
            raise InputError(f"where of {test}, {a} and {b}: one type for all")
        shape = _broadcast("where", a, b)
        if test.shape != shape:
            raise InputError(f"where: the test {test} has not the shape {list(shape)}")
        return self._make("elementwise", (test, a, b), a.dtype, shape, fn="where")

    def assign(self, target: Tensor, value: Tensor) -> None:
        """Put value into target."""
        if target.dtype is not value.dtype or target.shape != value.shape or target.space != "register":
            raise InputError(f"{target} cannot take {value}")
        self._add("assign", target, value)

    def reduce(self, op: str, tile: Tensor, dims: Sequence[int]) -> Tensor:
        """Sum or maximum over dimensions, which stay with size 1 (slots in order, then threads in order)."""
        if op not in REDUCTIONS:
            raise InputError(f"no reduction is called {op!r}: {', '.join(REDUCTIONS)}")
        if any(not 0 <= d < len(tile.shape) for d in dims):
            raise InputError(f"reduce {tile} over {list(dims)}: no such dimension")
        shape = tuple(1 if d in dims else n for d, n in enumerate(tile.shape))
        return self._make("reduce", (tile,), tile.dtype, shape, fn=op, dims=tuple(dims))

    def reshape(self, tile: Tensor, shape: Sequence[int]) -> Tensor:
        """The same elements in row-major order; no instruction is executed."""
        return self._make("reshape", (tile,), tile.dtype, tuple(shape))

    def dot(self, a: Tensor, b: Tensor, acc: Tensor) -> None:
        """acc += a @ b: for ascending k, one float32 addition of each product."""
        if a.shape[-1] != b.shape[0] or acc.shape != (a.shape[0], b.shape[1]) or acc.dtype.name != "f32":
            raise InputError(f"dot of {a} and {b} into {acc}: [m, k] and [k, n] into f32 [m, n]")
        if a.dtype is not b.dtype or a.dtype.name not in ("f16", "bf16"):
            raise InputError(f"dot of {a} and {b}: both f16 or both bf16")
        self._add("dot", acc, a, b, acc)

    def annotate(self, tile: Tensor, layout: Layout) -> Tensor:
        """Fix the layout of a tile that was left open."""
        if layout.shape != tile.shape:
            raise InputError(f"{tile} cannot have a layout of {list(layout.shape)}")
        tile.layout = layout
        return tile

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _fresh(self, kind: str) -> str:
        number = self._names[kind] = self._names.get(kind, -1) + 1
        return f"{kind}{number}"

    def _new(self, space: Any, dtype: TileType, shape: tuple[int, ...], layout: Layout | None = None) -> Tensor:
        tensor = Tensor(self._fresh("s" if space == "shared" else "r"), space, dtype, shape, layout)
        if layout is not None and layout.shape != shape:
            raise InputError(f"{tensor} cannot have a layout of {list(layout.shape)}")
        self.tensors.append(tensor)
        return tensor

    def _add(self, op: str, out: Tensor | None = None, *args: Tensor, **attrs: Any) -> None:
        self._at[-1].append(Instruction(op, out, args, attrs))

    def _make(
        self,
        op: str,
        args: tuple[Tensor, ...],
        dtype: TileType,
        shape: tuple[int, ...],
        layout: Layout | None = None,
        **attrs: Any,
    ) -> Tensor:
        if any(arg.space != "register" for arg in args):
            raise InputError(f"{op} works on registers, not on {', '.join(map(str, args))}: load first")
        out = self._new("register", dtype, shape, layout)
        self._add(op, out, *args, **attrs)
        return out

    def _load(
        self, op: str, source: Tensor, offsets: Any, shape: Any, dims: Any, layout: Layout | None, prefetch: int
    ) -> Tensor:
        attrs = _place(op, source, offsets, tuple(shape), dims)
        out = self._new("register", source.dtype, tuple(shape), layout)
        self._add(op, out, source, **attrs, prefetch=prefetch)
        return out

    def _store(self, op: str, target: Tensor, tile: Tensor, offsets: Any, dims: Any) -> None:
        if target.dtype is not tile.dtype:
            raise InputError(f"{op}: {tile} into {target}: cast first")
        self._add(op, None, target, tile, **_place(op, target, offsets, tile.shape, dims))


def _place(op: str, memory: Tensor, offsets: Any, shape: tuple[int, ...], dims: Any) -> dict[str, Any]:
    rank = len(memory.shape)
    dims = tuple(range(rank - len(shape), rank)) if dims is None else tuple(dims)
    if memory.space != op.split("_")[1]:
        raise InputError(f"{op} of {memory}")
    if len(offsets) != rank or len(dims) != len(shape) or len(set(dims)) != len(dims) or min(dims, default=0) < 0:
        raise InputError(f"{op} of {list(shape)} at {list(map(str, offsets))} along {dims} of {memory}")
    return {"offsets": tuple(offsets), "dims": dims}


def _broadcast(op: str, a: Tensor, b: Tensor) -> tuple[int, ...]:
    if len(a.shape) != len(b.shape) or any(m != n and 1 not in (m, n) for m, n in zip(a.shape, b.shape, strict=True)):
        raise InputError(f"{op}: shapes of {a} and {b} do not match")
    return tuple(max(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def instructions(nodes: Sequence[Node]) -> Iterator[Instruction]:
    """All instructions, in the order they are written."""
    for node in nodes:
        if isinstance(node, Instruction):
            yield node
        else:
            yield from instructions(node.body)


def listing(program: TileProgram) -> str:
    """The program as text."""
    lines = [f"program {program.name}: grid {list(program.grid)}, {program.warps} warps"]
    lines += [f"  {param}" for param in program.params]

    def show(nodes: Sequence[Node], indent: int) -> None:
        for node in nodes:
            if isinstance(node, Instruction):
                made = f"    # {node.out.dtype.name}{list(node.out.shape)}" if node.out is not None else ""
                lines.append("  " * indent + str(node) + made)
            else:
                head = f"for {node.variable} in range({node.count})" if isinstance(node, Loop) else "if "
                lines.append("  " * indent + (head if isinstance(node, Loop) else head + written(node.test)) + ":")
                show(node.body, indent + 1)

    show(program.body, 1)
    return "\n".join(lines)
