"""How a tile program's loads, stores and copies are written in C++: the widest access that the layouts allow.

For each slot the offsets of neighbouring threads are known when the source is written. Where they count up, lanes are
one vector load; where they repeat, one broadcast; pieces of one, two or four bytes per thread are widened to words.
Bounds are checked only along dimensions where a tile can reach over the end of its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_interpreter import first_owners
from memwall.kernels.tile_program import Instruction, Scalar, Tensor, TileProgram, written

Range = dict[str, int]
"""Largest value of each scalar variable."""


class Emission(Protocol):
    """What is needed of the emitter."""

    program: TileProgram
    lanes: int
    places: dict[int, int]
    ranges: Range
    regular: dict[int, bool]

    def table(self, numbers: Sequence[int]) -> str:
        """Name of a constant array."""


def upper(scalar: Scalar, ranges: Range) -> int:
    """Largest value of a scalar whose parts are not negative."""
    if isinstance(scalar, int):
        return scalar
    if scalar.op == "var":
        return ranges[scalar.args[0]]
    a, b = (upper(arg, ranges) for arg in scalar.args)
    if scalar.op == "%":
        return min(a, b - 1)
    return {"+": a + b, "*": a * b, "-": a, "//": a // max(b, 1)}.get(scalar.op, 1)


def where(test: Scalar, ranges: Range) -> Range:
    """The ranges where a condition holds: `variable + constant < bound` lowers the variable's largest value."""
    if isinstance(test, int) or test.op != "<" or not isinstance(test.args[1], int):
        return dict(ranges)
    left, more = test.args[0], 0
    if not isinstance(left, int) and left.op == "+" and isinstance(left.args[1], int):
        left, more = left.args
    if isinstance(left, int) or left.op != "var":
        return dict(ranges)
    name = left.args[0]
    return {**ranges, name: max(min(ranges[name], test.args[1] - 1 - more), 0)}


def base(emission: Emission, tensor: Tensor) -> str:
    """Pointer to a tensor's first byte."""
    return f"g_{tensor.name}" if tensor.space == "global" else f"(shared + {emission.places[id(tensor)]})"


def linear(tensor: Tensor, offsets: tuple[Scalar, ...]) -> str:
    """Offset in elements, swizzle apart."""
    terms = [f"{written(o)} * {s}L" for o, s in zip(offsets, tensor.placed.strides, strict=True) if o != 0]
    return " + ".join(terms) or "0"


def pointer(emission: Emission, step: Instruction, tensor: Tensor, name: str) -> str:
    """Declares the pointer to the tile."""
    if tensor.placed.swizzle is not None:
        bits, low, shift = tensor.placed.swizzle
        for offset, stride in zip(step.attrs["offsets"], tensor.placed.strides, strict=True):
            if offset != 0 and stride % (1 << (bits + low + shift)):
                raise InputError(f"{step}: a tile of swizzled memory begins where its pattern does")
    size = tensor.dtype.bits // 8
    if not size:
        raise InputError(f"{step}: the C++ back end loads whole bytes; load u8 and view it")
    return f"uint8_t* const {name} = {base(emission, tensor)} + ({linear(tensor, step.attrs['offsets'])}) * {size};"


def lane_offsets(emission: Emission, step: Instruction, tensor: Tensor, tile: Tensor, slot: int, chunk: int) -> Any:
    """(byte offsets of the lanes from the tile's pointer, condition of each lane or None)."""
    part = tile.held.thread_part()[chunk * emission.lanes : (chunk + 1) * emission.lanes] + tile.held.slot_part()[slot]
    index = np.zeros((len(part), len(tensor.shape)), np.int64)
    for along, dim in enumerate(step.attrs["dims"]):
        index[:, dim] = part[:, along]
    offsets = tensor.placed.offset(index) * (tensor.dtype.bits // 8)
    unsafe = reaching_over(emission, step, tensor, tile.shape)
    conditions: list[str | None] = [None] * len(part)
    if unsafe:
        for lane in range(len(part)):
            tests = [f"{written(step.attrs['offsets'][d])} + {index[lane, d]} < {tensor.shape[d]}" for d in unsafe]
            conditions[lane] = " && ".join(tests)
    return offsets.tolist(), conditions


def reaching_over(emission: Emission, step: Instruction, tensor: Tensor, shape: tuple[int, ...]) -> list[int]:
    """Dimensions along which a tile can end behind the tensor."""
    extent = dict(zip(step.attrs["dims"], shape, strict=True))
    return [
        d
        for d, offset in enumerate(step.attrs["offsets"])
        if upper(offset, emission.ranges) + extent.get(d, 1) > tensor.shape[d]
    ]


def float_load(emission: Emission, step: Instruction, slot: int, chunk: int) -> tuple[str, tuple[int, ...] | None]:
    """(expression, its offsets where that is all it depends on)."""
    assert step.out is not None
    at, conditions = lane_offsets(emission, step, step.args[0], step.out, slot, chunk)
    kind, size, p = step.out.dtype.name, step.out.dtype.bits // 8, f"p_{step.out.name}"
    if conditions[0] is not None:
        each = [f"({c}) ? one_{kind}({p} + {o}) : 0.0f" for o, c in zip(at, conditions, strict=True)]
        return f"VF{{{', '.join(each)}}}", None
    pattern = tuple(at)
    if all(o == at[0] + lane * size for lane, o in enumerate(at)):
        return f"load_{kind}({p} + {at[0]})", pattern
    if len(set(at)) == 1:
        return f"all(one_{kind}({p} + {at[0]}))", pattern
    if all(o == at[lane % 4] for lane, o in enumerate(at)):
        return f"repeat4({', '.join(f'one_{kind}({p} + {o})' for o in at[:4])})", pattern
    return f"VF{{{', '.join(f'one_{kind}({p} + {o})' for o in at)}}}", pattern


def word_load(emission: Emission, step: Instruction, number: int, chunk: int) -> str:
    """32-bit words of bytes 4 number .. 4 number + 3 of each thread's slice."""
    assert step.out is not None
    if step.out.dtype.bits != 8:
        raise InputError(f"{step}: the C++ back end loads whole bytes; load u8 and view it")
    slots = range(4 * number, min(4 * number + 4, step.out.held.num_slots))
    p, parts = f"p_{step.out.name}", []
    found = [lane_offsets(emission, step, step.args[0], step.out, slot, chunk) for slot in slots]
    if found[0][1][0] is not None:
        return " | ".join(_checked_bytes(p, j, *each) for j, each in enumerate(found))
    at = [each[0] for each in found]
    first = 0
    while first < len(at):
        width = next(w for w in (4, 2, 1) if first + w <= len(at) and _in_a_row(at[first : first + w]))
        piece = _lanes_load(p, at[first], width)
        parts.append(f"({piece} << {8 * first})" if first else piece)
        first += width
    return " | ".join(parts)


def _in_a_row(at: list[list[int]]) -> bool:
    return all([o + j for o in at[0]] == each for j, each in enumerate(at))


def _lanes_load(p: str, at: list[int], width: int) -> str:
    name = {4: "words", 2: "halves", 1: "bytes"}[width]
    apart = at[1] - at[0]
    if all(o == at[0] + lane * apart for lane, o in enumerate(at)) and apart in (width, 2 * width, 4 * width):
        return f"load_{name}{'' if apart == width else f'_{apart // width}'}({p} + {at[0]})"
    if len(set(at)) > 1 and all(o == at[lane % 4] for lane, o in enumerate(at)):
        return f"repeat4w({', '.join(f'one_{name}({p} + {o})' for o in at[:4])})"
    return f"VU{{{', '.join(f'one_{name}({p} + {o})' for o in at)}}}"


def _checked_bytes(p: str, j: int, at: list[int], conditions: list[str]) -> str:
    each = [f"({c}) ? one_bytes({p} + {o}) : 0u" for o, c in zip(at, conditions, strict=True)]
    return f"(VU{{{', '.join(each)}}} << {8 * j})"


def is_regular(emission: Emission, step: Instruction) -> bool:
    """Whether every slot of a float load is a vector, a broadcast or a repetition of four, without a check."""
    assert step.out is not None
    if id(step) in emission.regular:
        return emission.regular[id(step)]
    if reaching_over(emission, step, step.args[0], step.out.shape):
        return emission.regular.setdefault(id(step), False)
    slots, chunks = step.out.held.num_slots, emission.program.threads // emission.lanes
    lists = [float_load(emission, step, slot, chunk)[0] for slot in range(slots) for chunk in range(chunks)]
    return emission.regular.setdefault(id(step), not any(each.startswith("VF{") for each in lists))


def table_load(emission: Emission, step: Instruction) -> str:
    """A loop over all slots and threads that fills the tile's array, which is declared already."""
    assert step.out is not None
    out = step.out
    offsets, test, count = _tables(emission, step, step.args[0], out, None)
    read = f"one_{out.dtype.name}(p_{out.name} + {offsets}[i])"
    value = f"({test}) ? {read} : 0.0f" if test else read
    return f"for (int i = 0; i < {count}; ++i) reinterpret_cast<float*>({out.name})[i] = {value};"


def table_store(emission: Emission, step: Instruction, name: str) -> str:
    """A loop that stores a kept tile, each element once; bytes lie in words."""
    target, tile = step.args
    threads = np.flatnonzero(first_owners(tile.held))
    offsets, test, count = _tables(emission, step, target, tile, threads)
    places = np.arange(tile.held.num_slots)[:, None] * emission.program.threads + threads
    condition = f"if ({test}) " if test else ""
    at, to = emission.table(places.ravel().tolist()), f"p_{name} + {offsets}[i]"
    if tile.dtype.narrow:  # byte s of a thread is byte s % 4 of its word s / 4
        slot = f"{at}[i] / {emission.program.threads}"
        word = f"reinterpret_cast<const uint32_t*>({tile.name})[{slot} / 4 * {emission.program.threads}"
        word += f" + {at}[i] % {emission.program.threads}]"
        put = f"*({to}) = static_cast<uint8_t>({word} >> 8 * ({slot} % 4));"
    else:
        put = f"put_{tile.dtype.name}({to}, reinterpret_cast<const float*>({tile.name})[{at}[i]]);"
    return f"for (int i = 0; i < {count}; ++i) {condition}{put}"


def _tables(
    emission: Emission, step: Instruction, memory: Tensor, tile: Tensor, threads: np.ndarray | None
) -> tuple[str, str, int]:
    """(name of the table of byte offsets by slot and thread, test of entry i or nothing, entries)."""
    part = tile.held.table().transpose(1, 0, 2)
    part = (part if threads is None else part[:, threads]).reshape(-1, len(tile.shape))
    index = np.zeros((len(part), len(memory.shape)), np.int64)
    for along, dim in enumerate(step.attrs["dims"]):
        index[:, dim] = part[:, along]
    offsets = emission.table((memory.placed.offset(index) * (memory.dtype.bits // 8)).tolist())
    tests = []
    for d in reaching_over(emission, step, memory, tile.shape):
        tests.append(
            f"{written(step.attrs['offsets'][d])} + {emission.table(index[:, d].tolist())}[i] < {memory.shape[d]}"
        )
    return offsets, " && ".join(tests), len(index)


def vector_store(emission: Emission, step: Instruction, name: str, slot: int, chunk: int, value: str) -> str | None:
    """The line that stores a slot's float32 lanes as one vector; None where they do not lie in a row."""
    target, tile = step.args
    at, conditions = lane_offsets(emission, step, target, tile, slot, chunk)
    in_a_row = all(o == at[0] + 4 * lane for lane, o in enumerate(at))
    if tile.dtype.name != "f32" or conditions[0] is not None or not in_a_row:
        return None
    return f"store_f32(p_{name} + {at[0]}, {value});"


def copy_code(emission: Emission, step: Instruction) -> list[str]:
    """A copy from global to shared memory: done at once, in pieces of up to 16 bytes."""
    target, source = step.args
    shape, size = step.attrs["shape"], source.dtype.bits // 8
    ahead = len(source.shape) - len(shape)
    dims = tuple(range(ahead, len(source.shape)))
    read = Instruction("load_global", None, (source,), {"offsets": step.attrs["source_offsets"], "dims": dims})
    unsafe = reaching_over(emission, read, source, shape)
    vector = 1 if len(source.shape) - 1 in unsafe else math.gcd(shape[-1], max(16 // size, 1))
    lines, variables = [], [f"c{d}" for d in range(len(shape))]
    for d, n in enumerate(shape):
        step_size = vector if d == len(shape) - 1 else 1
        v = variables[d]
        lines.append(f"for (long {v} = 0; {v} < {n}; {v} += {step_size}) {{")
    for tensor, kind, key in ((target, "to", "target_offsets"), (source, "from", "source_offsets")):
        lead = len(tensor.shape) - len(shape)
        moved = " + ".join(f"{v} * {tensor.placed.strides[lead + d]}L" for d, v in enumerate(variables))
        lines.append(f"long {kind} = {linear(tensor, step.attrs[key])} + {moved};")
        if tensor.placed.swizzle is not None:
            bits, low, shift = tensor.placed.swizzle
            lines.append(f"{kind} ^= (({kind} >> {low + shift}) & {(1 << bits) - 1}) << {low};")
    to, come = f"{base(emission, target)} + to * {size}", f"{base(emission, source)} + from * {size}"
    move = f"std::memcpy({to}, {come}, {vector * size});"
    if unsafe:
        tests = [
            f"{written(at)} + {variables[d - ahead] if d >= ahead else 0} < {source.shape[d]}"
            for d, at in enumerate(step.attrs["source_offsets"])
            if d in unsafe
        ]
        move = f"if ({' && '.join(tests)}) {move} else std::memset({to}, 0, {vector * size});"
    return [*lines, move, "}" * len(shape)]
