"""Conversions of narrow codes to float16 as a processor does them: two codes in a word, a few operations for both.

Integers: the code under the exponent of 1024 is the number 1024 + code, exactly; a subtraction brings it down. Floats:
exponent and mantissa are shifted to their float16 places, and a product with 2^(difference of the biases) makes the
number, subnormals included, since float16 has them too. Every step is exact for all codes.

A recipe is a tuple of steps, each with its operand; `run` executes it on NumPy words, `tile_cuda` writes it out.
Source: Tilus (2025, arXiv 2504.12984), vectorized casts; the integer forms are those known from FasterTransformer.
Shapes: words are uint32, a float16 pair each, the first number in the low half.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from memwall.errors import InputError
from memwall.kernels.tile_types import TileType

Step = tuple[str, int]
Recipe = tuple[Step, ...]
"""Steps: xor, and, or, shr with a 32-bit constant; sub, mul with a float16 constant given by its bits (both halves);
fma with two such constants in one word (factor low, addend high); place with bits * 16 + mantissa bits; nan143."""


def half_bits(value: float) -> int:
    """Bits of a number as float16."""
    return int(np.float16(value).view(np.uint16))


def both(half: int) -> int:
    """The same 16 bits in both halves."""
    return half * 0x10001


@lru_cache(maxsize=256)
def pair_recipe(type_: TileType) -> Recipe:
    """Codes in bits [b - 1 : 0] and [16 + b - 1 : 16] -> a float16 pair."""
    if type_.kind == "uint":
        return ("or", 0x64006400), ("sub", half_bits(1024.0))
    if type_.kind == "int" and type_.narrow:
        sign = 1 << (type_.bits - 1)
        return ("xor", both(sign)), ("or", 0x64006400), ("sub", half_bits(1024.0 + sign))
    if not type_.narrow:
        raise InputError(f"{type_.name} is no narrow type")
    steps: list[Step] = []
    if (type_.exponent_bits, type_.mantissa_bits) == (4, 3):
        steps.append(("nan143", 0))
    else:
        steps.append(("place", type_.bits * 16 + type_.mantissa_bits))
    if type_.exponent_bits != 5:
        steps.append(("mul", half_bits(2.0 ** (15 - type_.bias))))
    return tuple(steps)


def nibble_recipes(type_: TileType) -> tuple[tuple[int, Recipe], ...]:
    """Eight 4-bit integers of a word -> pairs of codes (j, j + 4): no extraction, one logical operation a pair.

    Each is (shift of the word, recipe): codes in the low nibbles of a byte subtract 1032, those in the high ones are
    1024 + 16 v and go through v = x / 16 - 72 (unsigned: 1024 and 64).
    """
    if type_.bits != 4 or type_.kind == "float":
        raise InputError(f"{type_.name} is no 4-bit integer")
    signed = type_.kind == "int"
    flip: Recipe = (("xor", 0x88888888),) if signed else ()
    low: Recipe = (*flip, ("and", 0x000F000F), ("or", 0x64006400), ("sub", half_bits(1032.0 if signed else 1024.0)))
    factor, addend = half_bits(1 / 16), half_bits(-72.0 if signed else -64.0)
    high: Recipe = (*flip, ("and", 0x00F000F0), ("or", 0x64006400), ("fma", factor | addend << 16))
    return (0, low), (0, high), (8, low), (8, high)


def byte_recipe(type_: TileType) -> Recipe:
    """Two bytes put by a byte permutation into 0x64xx64xx -> a pair."""
    if type_.bits != 8 or type_.kind == "float":
        raise InputError(f"{type_.name} is no 8-bit integer")
    signed = type_.kind == "int"
    flip: Recipe = (("xor", 0x00800080),) if signed else ()
    return (*flip, ("sub", half_bits(1152.0 if signed else 1024.0)))


def run(recipe: Recipe, words: np.ndarray) -> np.ndarray:
    """Execute the steps on uint32 words."""
    words = np.ascontiguousarray(words, np.uint32)
    for name, operand in recipe:
        words = _run_step(name, operand, words)
    return words


def _run_step(name: str, operand: int, words: np.ndarray) -> np.ndarray:
    if name in ("xor", "and", "or", "shr"):
        constant = np.uint32(operand)
        simple = {"xor": np.bitwise_xor, "and": np.bitwise_and, "or": np.bitwise_or, "shr": np.right_shift}
        found: np.ndarray = simple[name](words, constant)
        return found
    if name == "place":
        bits, mantissa = divmod(operand, 16)
        return _place(words, bits, mantissa)
    if name == "nan143":
        # all ones of exponent and mantissa carry into bit 7: there the number is none
        carry = (words & np.uint32(0x007F007F)) + np.uint32(0x00010001)
        return _place(words, 8, 3) | (((carry & np.uint32(0x00800080)) >> np.uint32(7)) * np.uint32(0x7E00))
    halves = words.view(np.float16)
    with np.errstate(invalid="ignore"):
        if name == "sub":
            result = halves - np.uint16(operand).view(np.float16)
        elif name == "mul":
            result = halves * np.uint16(operand).view(np.float16)
        elif name == "fma":  # rounded once: exact in float32 before
            factor, addend = (np.uint16(part).view(np.float16).astype(np.float32) for part in _halves(operand))
            result = (halves.astype(np.float32) * factor + addend).astype(np.float16)
        else:
            raise InputError(f"no step of a cast is called {name!r}")
    return np.ascontiguousarray(result).view(np.uint32)


def _halves(word: int) -> tuple[int, int]:
    return word & 0xFFFF, word >> 16


def place_masks(bits: int, mantissa: int) -> tuple[int, int, int]:
    """(mask of the signs, shift of the rest, its mask) of a float's way to float16 places."""
    return 0x80008000, 10 - mantissa, both(((1 << (bits - 1)) - 1) << (10 - mantissa))


def _place(words: np.ndarray, bits: int, mantissa: int) -> np.ndarray:
    signs, shift, mask = place_masks(bits, mantissa)
    sign = (words << np.uint32(16 - bits)) & np.uint32(signs)
    return sign | ((words << np.uint32(shift)) & np.uint32(mask))


def cast_codes(type_: TileType, codes: np.ndarray) -> np.ndarray:
    """uint8 codes [..., n] -> float16 by the type's recipe, two at a time."""
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    padded = np.append(flat, np.zeros(len(flat) % 2, np.uint8)).astype(np.uint32)
    words = run(pair_recipe(type_), padded[0::2] | padded[1::2] << np.uint32(16))
    return words.view(np.float16)[: len(flat)].reshape(np.shape(codes))


def operations(type_: TileType) -> int:
    """Operations for two codes, extraction (a shift and a mask) apart."""
    weights = {"place": 4, "nan143": 8}
    return sum(weights.get(name, 1) for name, _ in pair_recipe(type_))
