"""Several narrow products in one multiplier of an FPGA, bit for bit, and how long they may add up before they mix.

Source: AccLLM (Liang 2025, arXiv 2505.03745), flexible packing of 8 x 8, 4 x 8 and 2 x 8 bit products; the slice is
that of AMD's UltraScale architecture (DSP48E2, UG579): a signed 27 x 18 multiplier and a 48-bit accumulator. Two 8-bit
products at an offset of 18 are AMD's own (WP486).
Idea: codes that meet the same activation are put side by side in the wide port, `spacing` bits apart; one product then
holds a product per lane, and so do its sums. A lane that turns negative borrows from the one above, which is given back
when lanes are split, from the lowest up. A lane's sum must stay a signed number of `spacing` bits, or it runs into the
next: so after `limit` products the accumulator is split and starts anew (a flush).
Units and shapes: codes [..., lanes, K], activations [..., K], integers; sums [..., lanes] int64; K products each.
Differs from the paper: which lanes, spacing and interval it uses is not known; here all three are parameters, and the
longest safe interval follows from them and from the numbers' ranges.
Cost: a flush takes `flush_cycles` of the slice, so that a slice makes lanes * limit / (limit + flush_cycles) products a
cycle.
Holds when: codes and activations are within their ranges; zero points are taken off outside, from the sum of
activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError

PORT_BITS, OTHER_PORT_BITS, ACCUMULATOR_BITS = 27, 18, 48
"""Of DSP48E2 (UG579): the wide port, the narrow one, the accumulator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """lanes codes of `code_bits` bits, `spacing` bits apart, times one activation in [activation_low, activation_high].

    signed: whether codes are two's complement; those of a zero point kept outside are not.
    """

    code_bits: int
    lanes: int
    spacing: int
    signed: bool = False
    activation_low: int = -128
    activation_high: int = 127

    def __post_init__(self) -> None:
        if self.code_bits < 1 or self.lanes < 1 or self.spacing < 1:
            raise InputError(f"{self.name}: code bits, lanes and spacing must be at least 1")
        # a sign that is not used, or the borrow that lower lanes take from the highest
        spare = not self.signed or self.lanes > 1
        width = (self.lanes - 1) * self.spacing + self.code_bits + spare
        if width > PORT_BITS:
            raise InputError(f"{self.name}: takes {width} bits of a port of {PORT_BITS}; fewer lanes or less spacing")
        limits = -(1 << (OTHER_PORT_BITS - 1)), (1 << (OTHER_PORT_BITS - 1)) - 1
        if not limits[0] <= self.activation_low <= self.activation_high <= limits[1]:
            raise InputError(f"{self.name}: activations must be a range within {limits[0]} to {limits[1]}")
        if self.limit < 1:
            raise InputError(f"{self.name}: one product already runs into the next lane; more spacing or fewer lanes")

    @property
    def name(self) -> str:
        """Such as `3 lanes of 2 bits, 12 apart`."""
        return f"{self.lanes} lanes of {self.code_bits} bits, {self.spacing} apart"

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        half = 1 << (self.code_bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    @property
    def product_range(self) -> tuple[int, int]:
        """Smallest and largest product of a lane."""
        corners = [code * x for code in self.codes for x in (self.activation_low, self.activation_high)]
        return min(corners), max(corners)

    def lane_bits(self, lane: int) -> int:
        """Bits that a lane's sum has; the highest one has all that is left."""
        return self.spacing if lane < self.lanes - 1 else ACCUMULATOR_BITS - lane * self.spacing

    @property
    def limit(self) -> int:
        """Most products that may add up before the accumulator is split: then no lane can have left its bits."""
        low, high = self.product_range
        counts = []
        for lane in {0, self.lanes - 1}:
            room = 1 << (self.lane_bits(lane) - 1)
            counts += [room // -low] if low < 0 else []
            counts += [(room - 1) // high] if high > 0 else []
        return min(counts, default=1)

    def rate(self, flush_cycles: int = 1) -> float:
        """Products of a slice in a cycle, flushes counted."""
        return self.lanes * self.limit / (self.limit + flush_cycles)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """The wide port's word [...] of codes [..., lanes]."""
        low, high = self.codes
        if codes.size and not (low <= codes.min() and codes.max() <= high):
            raise InputError(f"{self.name}: codes must be {low} to {high}, not {codes.min()} to {codes.max()}")
        shifts = np.int64(1) << (np.arange(self.lanes, dtype=np.int64) * self.spacing)
        words: np.ndarray = (codes.astype(np.int64) * shifts).sum(axis=-1)
        assert np.array_equal(words, wrapped(words, PORT_BITS))
        return words

    def split(self, sums: np.ndarray) -> np.ndarray:
        """The lanes' sums [..., lanes] of accumulators [...]: each is cut off and its borrow given back."""
        rest, lanes = np.asarray(sums, np.int64), []
        for lane in range(self.lanes):
            own = wrapped(rest, self.lane_bits(lane))
            lanes.append(own)
            rest = (rest - own) >> self.spacing
        return np.stack(lanes, axis=-1)


def wrapped(numbers: np.ndarray, bits: int) -> np.ndarray:
    """The low `bits` bits of int64 numbers as two's complement."""
    shift = np.int64(64 - bits)
    return (np.asarray(numbers, np.int64) << shift) >> shift


def packed_dot(
    packing: Packing, codes: np.ndarray, activations: np.ndarray, *, interval: int | None = None
) -> np.ndarray:
    """sum over k of codes[..., lanes, k] * activations[..., k], as a slice computes it: [..., lanes] int64.

    interval: products between flushes, the longest safe one unless given; a longer one gives what the slice would give,
    which may be wrong.
    """
    interval = packing.limit if interval is None else interval
    if interval < 1:
        raise InputError(f"a flush every {interval} products: must be at least 1")
    words = packing.pack(np.moveaxis(codes, -2, -1))
    products = words * activations.astype(np.int64)
    total = np.zeros((*products.shape[:-1], packing.lanes), np.int64)
    for begin in range(0, products.shape[-1], interval):
        accumulator = np.zeros(products.shape[:-1], np.int64)
        for place in range(begin, min(begin + interval, products.shape[-1])):
            accumulator = wrapped(accumulator + products[..., place], ACCUMULATOR_BITS)
        total += packing.split(accumulator)
    return total


def packed_product(
    packing: Packing,
    codes: np.ndarray,
    zeros: np.ndarray,
    activations: np.ndarray,
    *,
    interval: int | None = None,
) -> np.ndarray:
    """sum over k of (codes[rows, k] - zeros[rows]) * activations[k], codes packed `lanes` rows at a time: [rows] int64.

    The zero point is taken off the sum once: z * sum of activations.
    """
    rows = len(codes)
    missing = -rows % packing.lanes
    padded = np.concatenate([codes, np.full((missing, codes.shape[1]), packing.codes[0], codes.dtype)])
    grouped = padded.reshape(-1, packing.lanes, codes.shape[1])
    sums = packed_dot(
        packing, grouped, np.broadcast_to(activations, (len(grouped), len(activations))), interval=interval
    )
    return sums.reshape(-1)[:rows] - zeros.astype(np.int64) * int(activations.astype(np.int64).sum())


def best_packing(code_bits: int, *, signed: bool = False, activation_low: int = -128, flush_cycles: int = 1) -> Packing:
    """The packing that makes most products a cycle for codes of so many bits and 8-bit activations."""
    found: list[Packing] = []
    for lanes in range(1, PORT_BITS + 1):
        free = PORT_BITS - code_bits - (not signed or lanes > 1)
        spacing = PORT_BITS if lanes == 1 else free // (lanes - 1)
        try:
            found.append(
                Packing(code_bits=code_bits, lanes=lanes, spacing=spacing, signed=signed, activation_low=activation_low)
            )
        except InputError:
            continue
    if not found:
        raise InputError(f"codes of {code_bits} bits do not fit a port of {PORT_BITS} bits")
    return max(found, key=lambda packing: (packing.rate(flush_cycles), -packing.lanes))


def worst_case(packing: Packing, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [lanes, count] and activations [count] whose lanes' sums are as far out as they can be."""
    low, high = packing.product_range
    room = 1 << (packing.spacing - 1)
    code_low, code_high = packing.codes
    # the side that leaves its bits first, products counted
    down = low < 0 and (high <= 0 or room // -low <= (room - 1) // high)
    target = low if down else high
    pairs = [(c, x) for c in (code_low, code_high) for x in (packing.activation_low, packing.activation_high)]
    code, x = next((c, x) for c, x in pairs if c * x == target)
    return np.full((packing.lanes, count), code), np.full(count, x)
