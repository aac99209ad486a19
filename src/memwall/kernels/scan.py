"""What a state space layer (Mamba) does between its products, and products of static 8-bit numbers; NumPy arrays.

Floats are float32; int8 stands for integer times a scale that is known beforehand. T tokens, H heads of P channels, N
numbers of state per channel, G groups of heads that share B and C.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from memwall import _native
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.static8 import StaticCodec

MOST_STATE = 1024
MOST_TAPS = 8
MOST_TOKENS = 256
"""Of one static product."""
STATE_PAD = 16
MIXES = (1, 12, 20)
"""Hadamard matrices are a power of two times one of these."""


def conv_silu(
    x: np.ndarray,
    state: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    out: np.ndarray,
    *,
    in_scale: np.ndarray | None = None,
    out_inverse: np.ndarray | None = None,
) -> np.ndarray:
    """Causal depthwise convolution and SiLU of x [T, C]; weight [C, taps]; returns `out` [T, C].

    state [taps - 1, C]: the inputs before, oldest first, and afterwards the newest. All three float32, or all int8
    with in_scale [C] and one over the results' scales, out_inverse [C].
    """
    _native.conv_silu(x, state, weight, bias, in_scale, out_inverse, out)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanTables:
    """Scales of int8 inputs: range [H * P] int32 names each channel's row of x [R] and state [R, N]; b, c [G].

    state: None where the state is float32.
    """

    range: np.ndarray
    x: np.ndarray
    b: np.ndarray
    c: np.ndarray
    dt: float
    state: np.ndarray | None


def selective_scan(
    x: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    dt: np.ndarray,
    *,
    dt_bias: np.ndarray,
    decay: np.ndarray,
    skip: np.ndarray,
    dt_limits: tuple[float, float],
    state: np.ndarray,
    y: np.ndarray,
    scratch: np.ndarray,
    peak: np.ndarray | None = None,
    tables: ScanTables | None = None,
) -> np.ndarray:
    """h = exp(d A) h + d x B, y = C h + D x over the tokens, d = softplus(dt + dt_bias) within dt_limits; returns `y`.

    x [T, H * P], b and c [T, G * N], dt [T, H]: float32 (rows may have gaps), or int8 with `tables`. decay: A, [H, 1]
    or [H, N]. skip: D [H]. state [H, P, N] is moved on: an int8 state is read once and rounded once per call, in
    between it is float32. y [T, H * P] float32. scratch [threads, P * N padded]. peak [H * P, N] takes the largest |h|.
    """
    common = (x, b, c, dt, dt_bias, decay, skip, *dt_limits, state, y, scratch, peak)
    if tables is None:
        _native.selective_scan(*common)
    else:
        _native.selective_scan(*common, tables.range, tables.x, tables.b, tables.c, tables.dt, tables.state)
    return y


def scan_scratch_shape(head_size: int, state_size: int, threads: int) -> tuple[int, int]:
    """Of `selective_scan`'s scratch."""
    return threads, head_size * -(-state_size // STATE_PAD) * STATE_PAD


def gated_norm(
    y: np.ndarray,
    z: np.ndarray,
    weight: np.ndarray | None,
    eps: float,
    out: np.ndarray,
    *,
    groups: int = 1,
    z_scale: float = 0.0,
) -> np.ndarray:
    """y * silu(z), then, where there is a weight, an RMS norm over each of `groups` parts of a row [T, n].

    z float32, or int8 with its scale. `out` may be `y`. Returns `out`.
    """
    _native.gated_norm(y, z, z_scale, weight, eps, out, groups)
    return out


def hadamard_size(width: int) -> int:
    """The part of `width` that is no power of two, one of MIXES; InputError where there is no such transform."""
    for mix in MIXES:
        power = width // mix
        if power >= 1 and power * mix == width and power & (power - 1) == 0:
            return mix
    raise InputError(f"no Hadamard transform of {width} channels: it must be a power of two, or 12 or 20 times one")


def hadamard_rows(x: np.ndarray) -> np.ndarray:
    """Each row of x [T, n] float32 times the orthogonal Hadamard matrix, in place; n: see `hadamard_size`."""
    _native.hadamard(x, hadamard_signs(hadamard_size(x.shape[1])))
    return x


@lru_cache(maxsize=4)
def hadamard_signs(size: int) -> np.ndarray:
    """The matrix of +1 and -1 behind sizes that are no powers of two: Paley's first construction over size - 1."""
    if size == 1:
        return np.ones((1, 1), np.int8)
    prime = size - 1
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)], np.int8)
    core = character[(np.arange(prime)[:, None] - np.arange(prime)[None, :]) % prime]
    signs = np.ones((size, size), np.int8)
    signs[1:, 0] = -1
    signs[1:, 1:] = core + np.eye(prime, dtype=np.int8)
    return signs


def round_static(x: np.ndarray, scale: float, out: np.ndarray) -> np.ndarray:
    """out int8 = x [T, n] over the scale, rounded and kept within 127. Returns `out`."""
    _native.round_static(x, 1.0 / scale, out)
    return out


class StaticMatrix:
    """Weights of `formats.static8` [rows, cols], ready for products with int8 inputs; the buffers are not copied."""

    def __init__(self, packed: Packed) -> None:
        form = codec(packed.spec)
        if not isinstance(form, StaticCodec) or packed.shape[1] % form.group:
            raise InputError(f"{packed.spec} {list(packed.shape)}: static products take static formats in whole groups")
        form.buffers(packed.shape)  # refuses rows so long that their sums would overflow
        self.spec, self.shape = packed.spec, packed.shape
        groups = packed.buffers.get("groups")
        self._codes, self._channels = packed.buffers["codes"], packed.buffers["channels"]
        self._groups = None if groups is None else groups.view(np.uint16)

    def multiply(self, x: np.ndarray, scale: float, out: np.ndarray, *, accumulate: bool = False) -> None:
        """out [T, rows] float32 = (or += ) x [T, cols] int8 times its scale, times the weights; T at most 256."""
        _native.static_product(x, scale, self._codes, self._groups, self._channels, out, accumulate, None, None)

    def multiply_rounded(self, x: np.ndarray, scale: float, out: np.ndarray, out_inverse: np.ndarray) -> None:
        """The same as int8; out_inverse [rows]: one over the scale of each result."""
        _native.static_product(x, scale, self._codes, self._groups, self._channels, None, False, out, out_inverse)
