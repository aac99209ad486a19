"""Numbers and bits of one slot of a tile in C++: the part of the emitter that decodes in registers.

A vector of float32 lanes for numbers, of 32-bit words for packed codes. What is computed is remembered for as long as
its scope and its sources last, so that a word is loaded, and a code converted, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_cpp_dot import integer_sum
from memwall.kernels.tile_cpp_memory import Range, float_load, is_regular, word_load
from memwall.kernels.tile_infer import slot_map
from memwall.kernels.tile_program import Instruction, Tensor, TileProgram

MOST_LISTED = 32
"""Vectors of a load that are put together lane by lane where it is used; larger irregular tiles are read by a loop."""
_BINARY = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})",
    "max": "select({0} > {1}, {0}, {1})", "min": "select({0} < {1}, {0}, {1})",
    "lt": "select({0} < {1}, all(1.0f), all(0.0f))", "neg": "(-{0})", "abs": "select({0} < all(0.0f), -{0}, {0})",
    "where": "select({0} != all(0.0f), {1}, {2})", "exp": "each_exp({0})", "sqrt": "each_sqrt({0})",
}  # fmt: skip


class SlotValues:
    """State that the emitter fills: which tiles lie in arrays, how others are made, and what is known in this scope."""

    def __init__(
        self, program: TileProgram, lanes: int, made_by: dict[int, Instruction], places: dict[int, int]
    ) -> None:
        self.program, self.lanes, self.made_by, self.places = program, lanes, made_by, places
        self.chunks = program.threads // lanes
        self.lines: list[str] = []
        self.tables: list[str] = []
        self.kept: set[int] = set()  # tiles that lie in arrays
        self.memo: list[dict[tuple[Any, ...], str]] = [{}]
        self.maps: dict[tuple[int, int], list[int]] = {}
        self.ranges: Range = {f"block{axis}": n - 1 for axis, n in enumerate(program.grid)}
        self.regular: dict[int, bool] = {}
        self.counter = 0

    def keep(self, tensor: Tensor) -> None:
        """Make a whole tile; the emitter knows how."""
        raise NotImplementedError

    def table(self, numbers: Sequence[int]) -> str:
        """Name of a constant array."""
        name = self.fresh("table")
        self.tables.append(f"static const int {name}[] = {{{', '.join(map(str, numbers))}}};")
        return name

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
            summed = integer_sum(self, step, slot, chunk)
            if summed is not None:
                return summed
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
            return (
                self.word(step.args[0], number, chunk)
                if step.args[0].dtype.narrow
                else self.remember(key, "VU", self.packed(step.args[0], number, chunk))
            )
        if step.op in ("load_global", "load_shared"):
            return self.remember(key, "VU", word_load(self, step, number, chunk))
        raise InputError(
            f"{self.program.name}: {step.op} to {tensor.dtype.name}: the C++ back end only views such types"
        )

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
        return self.remember(key, "VF", f"small_float<{form.exponent_bits}, {form.mantissa_bits}, {special}>({code})")
