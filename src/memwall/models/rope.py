"""Rotary position embedding: inverse frequencies of the four supported scalings, and tables of cos and sin.

All in float32 and in the order of operations of the published models, because at long positions one rounding of a
frequency already turns a head visibly. Tables hold half a head ([count, head_dim / 2]): the element i turns with the
element i + head_dim / 2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from memwall.models.config import RopeConfig

BLOCK_POSITIONS = 512
"""Positions of which tables are made at once, and kept."""

SINGLES = 64
"""Positions asked for by themselves whose tables are kept."""


@lru_cache(maxsize=16)
def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each pair, float32 [head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # the power in double, rounded once: within one unit in the last place of any float32 library
    powers = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1.0) / powers
    if rope.type == "linear":
        result = plain / np.float32(rope.factor)
    elif rope.type == "llama3":
        result = _llama3(rope, plain)
    elif rope.type == "yarn":
        result = _yarn(rope, powers, head_dim)
    else:
        result = plain
    result.flags.writeable = False
    return result


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: np.ndarray, out: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [len(positions), head_dim / 2], the attention factor included; into `out` where given.

    Some rows at a time: the angles of a long prompt would be megabytes.
    """
    frequencies, factor = inverse_frequencies(rope, head_dim), np.float32(rope.attention_factor)
    shape = (len(positions), head_dim // 2)
    cos, sin = out if out is not None else (np.empty(shape, np.float32), np.empty(shape, np.float32))
    for begin in range(0, len(positions), BLOCK_POSITIONS):
        rows = slice(begin, begin + BLOCK_POSITIONS)
        angles = np.asarray(positions)[rows].astype(np.float32)[:, None] * frequencies
        for table, function in ((cos, np.cos), (sin, np.sin)):
            function(angles, out=table[rows])
            table[rows] *= factor
    return cos, sin


class RotaryTable:
    """The tables of one model, computed for the positions asked for: nothing is kept that grows with the context."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.rope = rope
        self.head_dim = head_dim
        self._block = (-1, (np.empty(0, np.float32), np.empty(0, np.float32)))
        self._singles: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float32 [len(positions), head_dim / 2]; not to be written to."""
        if len(positions) != 1:
            return rope_tables(self.rope, self.head_dim, positions)
        place = float(positions[0])
        table = self._singles.get(place)
        if table is None:  # every layer asks for a new token's again
            if len(self._singles) >= SINGLES:
                self._singles.clear()
            table = self._singles[place] = rope_tables(self.rope, self.head_dim, positions)
        return table

    def block(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for BLOCK_POSITIONS positions from `first` on; the latest one is kept."""
        begin, table = self._block
        if begin != first:
            table = self.at(np.arange(first, first + BLOCK_POSITIONS))
            self._block = (first, table)
        return table


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    original = rope.original_max_position
    wavelength = np.float32(2 * math.pi) / plain
    stretched = plain / np.float32(rope.factor)
    span = rope.high_freq_factor - rope.low_freq_factor
    blend = (np.float32(original) / wavelength - np.float32(rope.low_freq_factor)) / np.float32(span)
    blended = (np.float32(1.0) - blend) * stretched + blend * plain
    is_long = wavelength > original / rope.low_freq_factor
    is_short = wavelength < original / rope.high_freq_factor
    return np.where(is_long, stretched, np.where(is_short, plain, blended)).astype(np.float32)


def _yarn(rope: RopeConfig, powers: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (Peng 2023, section 3.2): a ramp over the dimensions from kept to stretched frequencies."""

    def dimension_of(num_rotations: float) -> float:
        ratio = rope.original_max_position / (num_rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1.0) - np.clip(ramp, 0, 1)
    stretched = np.float32(1.0) / (np.float32(rope.factor) * powers)
    plain = np.float32(1.0) / powers
    return (stretched * (np.float32(1.0) - kept) + plain * kept).astype(np.float32)
