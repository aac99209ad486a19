"""Sums of products of small integers, four at a time: what a reduction over a thread's slots becomes in C++.

`reduce("sum", mul(cast(codes), cast(x)))` where both are integers of up to 8 bits is a dot product that processors have
an instruction for: four bytes of a lane times four bytes, added in 32 bits. Codes of b bits are spread to bytes first,
whatever bit they begin at. Products and sums of integers below 2^24 are exact in float32, so the numbers are those of
the separate instructions (a sum of four products is below 2^18; the program adds such sums in float32).
Source of the casts: Tilus (2025, arXiv 2504.12984), vectorized casts; the instruction is vpdpbusd where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memwall.kernels.tile_program import Instruction, Tensor

if TYPE_CHECKING:
    from memwall.kernels.tile_cpp_values import SlotValues

TOGETHER = 4
Place = tuple[Tensor, int]
"""A tile of narrow integers and one of its slots."""

PRELUDE = r"""
// ---- four codes of each lane as unsigned bytes, and their products with signed bytes

template <int bits, int shift>
static inline VU four_codes(VU low, VU high) {
    constexpr uint32_t mask = ((1u << bits) - 1) * 0x01010101u;
    constexpr bool crosses = shift + 4 * bits > 32;
    constexpr int first = crosses ? 0 : shift;
    VU word = low;
    if (crosses) word = (low >> shift) | (high << ((32 - shift) % 32));
    if (bits == 8) return word;
#if defined(__AVX512VBMI__) && @LANES@ == 16
    uint64_t from = 0;
    for (int j = 0; j < 4; ++j)
        from |= uint64_t(first + j * bits) << (8 * j) | uint64_t(32 + first + j * bits) << (32 + 8 * j);
    return (VU)_mm512_multishift_epi64_epi8(_mm512_set1_epi64(from), (__m512i)word) & mask;
#else
    VU found = none();
    for (int j = 0; j < 4; ++j) found |= ((word >> (first + j * bits)) & ((1u << bits) - 1)) << (8 * j);
    return found;
#endif
}
static inline VI dot4(VI sum, VU codes, VU x) {
#if defined(__AVX512VNNI__) && @LANES@ == 16
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVX2__) && @LANES@ == 8
    const __m256i even = (__m256i)(codes & 0x00FF00FFu), odd = (__m256i)((codes >> 8) & 0x00FF00FFu);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8);
    const __m256i x_odd = _mm256_srai_epi16((__m256i)x, 8);
    return sum + (VI)_mm256_madd_epi16(even, x_even) + (VI)_mm256_madd_epi16(odd, x_odd);
#else
    for (int j = 0; j < 4; ++j) sum += (VI)((codes >> (8 * j)) & 255u) * ((VI)(x << (24 - 8 * j)) >> 24);
    return sum;
#endif
}
"""


def integer_sum(values: SlotValues, step: Instruction, slot: int, chunk: int) -> str | None:
    """C++ of a reduced slot, float32 lanes; None where the sum is not of this kind."""
    if step.attrs["fn"] != "sum":
        return None
    product = step.args[0]
    while (made := values.made_by.get(id(product))) is not None and made.op == "reshape":
        product = made.args[0]
    if made is None or made.op != "elementwise" or made.attrs["fn"] != "mul" or id(product) in values.kept:
        return None
    pairs: list[tuple[Place, Place]] = []
    for term in values.terms(step, slot):
        a, b = (_source(values, arg, values.order(arg, product)[term]) for arg in made.args)
        if a is None or b is None:
            return None
        pair = (a, b) if _signed_byte(b[0]) else (b, a)
        if not _signed_byte(pair[1][0]):
            return None
        pairs.append(pair)
    if not pairs or len(pairs) % TOGETHER:
        return None
    found, starts = "VI{}", []
    for first in range(0, len(pairs), TOGETHER):
        (codes, code), (x, place) = pairs[first]
        in_a_row = all(
            ours is codes and theirs is x and at == code + j and where == place + j
            for j, ((ours, at), (theirs, where)) in enumerate(pairs[first : first + TOGETHER])
        )
        if not in_a_row or place % TOGETHER:
            return None
        word = values.word(x, place // TOGETHER, chunk)
        if codes.dtype.kind == "int":
            starts.append(_offset(values, x, word, place, codes.dtype.bits, chunk))
        found = f"dot4({found}, {_codes(values, codes, code, chunk)}, {word})"
    for start in starts:
        found = f"({found} - {start})"
    return f"numbers({found})"


def _signed_byte(tensor: Tensor) -> bool:
    return tensor.dtype.kind == "int" and tensor.dtype.bits == 8


def _source(values: SlotValues, tensor: Tensor, slot: int) -> Place | None:
    """The narrow integers and the slot that a number is the float32 of."""
    while not tensor.dtype.narrow:
        step = values.made_by.get(id(tensor))
        if step is None or id(tensor) in values.kept or tensor.dtype.name != "f32":
            return None
        if step.op == "cast":
            slot = values.order(step.args[0], tensor)[slot]
        elif step.op != "reshape":
            return None
        tensor = step.args[0]
    return (tensor, slot) if tensor.dtype.kind in ("int", "uint") else None


def _codes(values: SlotValues, codes: Tensor, slot: int, chunk: int) -> str:
    """Name of the bytes of four codes, those with a sign raised by half their range."""
    key = (id(codes), "four", slot, chunk)
    found = values.known(key)
    if found is not None:
        return found
    bits = codes.dtype.bits
    at, shift = divmod(slot * bits, 32)
    low = values.word(codes, at, chunk)
    high = values.word(codes, at + 1, chunk) if shift + TOGETHER * bits > 32 else low
    expression = f"four_codes<{bits}, {shift}>({low}, {high})"
    if codes.dtype.kind == "int":
        expression = f"({expression} ^ {_repeated(1 << (bits - 1))})"
    return values.remember(key, "VU", expression)


def _offset(values: SlotValues, x: Tensor, word: str, place: int, bits: int, chunk: int) -> str:
    """Name of what raising the codes adds to the sum."""
    key = (id(x), "offset", place, bits, chunk)
    found = values.known(key)
    return found or values.remember(key, "VI", f"dot4(VI{{}}, VU{{}} + {_repeated(1 << (bits - 1))}, {word})")


def _repeated(byte: int) -> str:
    return f"0x{byte * 0x01010101:08X}u"
