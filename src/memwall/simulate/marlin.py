"""What batches cost a product whose weights are narrow and whose activations are not: MARLIN's roofline.

Source: "MARLIN" (Elias Frantar, 2024, arXiv 2408.11743), section 3.1 and figure 1.

Idea: decoding reads all weights for each step, whatever the batch; b-bit weights are read 16 / b times faster than half
floats, until the arithmetic of the batch takes longer than that:

    t = max((K N b/8 + 2 M K r + 2 M N) / bandwidth, 2 M N K / FLOP rate, dequantizing / its rate)

b counts scales (4.125 for groups of 128), r says how often activations are read again. Up to M* = FLOP rate b / (16
bandwidth) tokens a batch is free; from there on the gain over half floats falls, to 1 or what a slower product leaves.

A processor's library that is given plain rows lays them out anew in every call of more than one token: it takes all
weights through the cache once more, and the arithmetic begins when a panel is done, so that both times add up.
Units: seconds, bytes, FLOP (a multiply-add is two); shape (K, N) is inputs and outputs of the matrix.
Differs from the paper: the terms for dequantizing (the kernel hides it) and for laying out are not in its formula.
Holds when: one product at a time fills the machine; near the knee real ones take longer than the longest term.
"""

from __future__ import annotations

from dataclasses import dataclass

from memwall.errors import InputError
from memwall.simulate.base import Device

FLOAT_BITS = 16.0
DENSE_BITS = 4 + 16 / 128
SPARSE_BITS = 3 + 16 / 128
"""Two of four weights kept: 4-bit codes and 2-bit positions of half of them, and scales."""
SPARSE_FLOP = 0.5
"""Share of the arithmetic that is left where the machine skips what is pruned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What products reach on a machine. dequantized_per_s: weights per second, None where hidden behind the rest.

    value_bytes: of an activation and of a result; 0 where they stay in a cache. lays_out: weights are laid out anew in
    every call of more than one token.
    """

    bytes_per_s: float
    flop_per_s: float
    dequantized_per_s: float | None = None
    value_bytes: float = 2.0
    lays_out: bool = False

    def __post_init__(self) -> None:
        for name in ("bytes_per_s", "flop_per_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name):g}; it must be positive")
        if not self.value_bytes >= 0:
            raise InputError(f"value_bytes is {self.value_bytes:g}; it must be 0 or more")

    @staticmethod
    def of(device: Device, dtype: str = "float16") -> Engine:
        """At a data sheet's rates."""
        return Engine(bytes_per_s=device.bytes_per_s, flop_per_s=device.rate(dtype))

    @staticmethod
    def fitted(
        shape: tuple[int, int],
        bits: float,
        first: tuple[int, float],
        last: tuple[int, float],
        *,
        value_bytes: float = 2.0,
        flop_share: float = 1.0,
        lays_out: bool = False,
    ) -> Engine:
        """From two measured points (tokens, seconds): one that waits for memory and one that waits for arithmetic."""
        if not first[0] < last[0] or min(first[1], last[1]) <= 0:
            raise InputError(
                f"the model is fitted on a small and a large batch with their times, got {first} and {last}"
            )
        if lays_out and first[0] != 1:
            raise InputError(f"what lays weights out is fitted on one token and many, got {first[0]} and {last[0]}")
        rate = moved_bytes(shape, first[0], bits, value_bytes) / first[1]
        laying = moved_bytes(shape, 0, bits) / rate if lays_out else 0.0
        if last[1] <= laying:
            raise InputError(f"{last[0]} tokens take {last[1]:g} s, no longer than laying their weights out")
        flop = 2.0 * last[0] * shape[0] * shape[1] * flop_share
        rates = {"bytes_per_s": rate, "flop_per_s": flop / (last[1] - laying)}
        return Engine(**rates, value_bytes=value_bytes, lays_out=lays_out)


def moved_bytes(
    shape: tuple[int, int], tokens: int, bits: float, value_bytes: float = 2.0, reuse: float = 1.0
) -> float:
    """Weights once, activations `reuse` times, results once."""
    size_k, size_n = shape
    return size_k * size_n * bits / 8 + value_bytes * tokens * (size_k * reuse + size_n)


def seconds(
    engine: Engine, shape: tuple[int, int], tokens: int, bits: float = DENSE_BITS, *, flop_share: float = 1.0
) -> float:
    """Time of one product."""
    size_k, size_n = shape
    moving = moved_bytes(shape, tokens, bits, engine.value_bytes) / engine.bytes_per_s
    arithmetic = 2.0 * tokens * size_k * size_n * flop_share / engine.flop_per_s
    unpacking = size_k * size_n / engine.dequantized_per_s if engine.dequantized_per_s else 0.0
    laying = moved_bytes(shape, 0, bits) / engine.bytes_per_s if engine.lays_out and tokens > 1 else 0.0
    return laying + max(moving, arithmetic, unpacking)


def knee(engine: Engine, bits: float = DENSE_BITS, *, flop_share: float = 1.0) -> float:
    """Tokens from which arithmetic takes longer than reading the weights: M*."""
    return engine.flop_per_s * bits / (FLOAT_BITS * engine.bytes_per_s * flop_share)


def speedup(
    narrow: Engine,
    shape: tuple[int, int],
    tokens: int,
    bits: float = DENSE_BITS,
    *,
    floats: Engine | None = None,
    float_bits: float = FLOAT_BITS,
    flop_share: float = 1.0,
) -> float:
    """How many times faster than with float weights; floats: what those products reach, the same by default."""
    wide = seconds(floats or narrow, shape, tokens, float_bits)
    return wide / seconds(narrow, shape, tokens, bits, flop_share=flop_share)


def step_seconds(weight_bytes: float, bytes_per_s: float, macs: float, macs_per_s: float) -> float:
    """The same for a whole step of decoding: all weights once, or the batch's multiply-adds, whichever takes longer."""
    return max(weight_bytes / bytes_per_s, macs / macs_per_s)
