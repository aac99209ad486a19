"""COMET: products of 4-bit weights with activations whose blocks of channels take 4 bits or, where large, 8.

Source: "COMET: Towards Practical W4A4KV4 LLMs Serving" (Lian Liu, 2024, ASPLOS 2025, arXiv 2410.12168): fine-grained
mixed-precision quantization, the W4Ax kernel and its scheduling over multiprocessors; no official code was found.

Idea: integer units multiply 4-bit numbers twice as fast as 8-bit ones, but few channels of activations are so large
that 4 bits lose the others. The inner dimension is cut in blocks of 128 channels, sorted so that the large ones fill
few blocks; those are multiplied in 8 bits and all others in 4, from one stored form of the weights. A block is also
what shares a scale, so sums inside it are integers. Its two kinds of tiles cost differently, and are shared among
multiprocessors, or threads, by their cost (`kernels.tile_schedule`).

Units and shapes: x float32 [tokens, cols] in the order of columns that the weights were made for; per token t and block
b, L = 7 or 127 by the block's width:

    scale s[t, b] = max |x[t, b]| / L      code = round(x * (L / max |x[t, b]|)), half to even
    out[t, n] = sum over b, in order, of (s[n, b] * s[t, b]) * (sum over the block of weight code * code)

each operation one float32 rounding, the inner sum an exact integer. Codes of 4 bits lie two in a byte: of eight
columns the first four in low nibbles, the others in high ones. Both widths read one layout of weights, and nibbles
become bytes by one shift and one mask, 16 times their number: powers of two go into the scale, and no sign is extended.
`linear` does all this for weights in the form `comet` (`formats.comet`); here is what tests hold it against, the stored
activations, and products by a schedule.

Differs from the paper: a processor's vectors in place of tensor cores; without 4-bit multipliers a block of 4 bits
saves bytes and, where sums of 16 bits suffice, nothing else. Where pairs of products are added in 16 bits (AVX2)
weights are widened without the factor 16, which would overflow.
Cost: activations of a product, (4 or 8) / 8 bytes a number and 8 bytes per token and block; weights as
`formats.comet`. A gather where an order could not be folded: it happens while rounding, at no pass of its own.
Holds when: 65,536 columns at most; numbers that are not finite make all results that they enter not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwall import _native
from memwall._native import Matrix
from memwall.errors import InputError
from memwall.formats import Packed
from memwall.formats.comet import CometCodec
from memwall.kernels.tile_schedule import Schedule

__all__ = [
    "Rounded",
    "codes_of",
    "linear_scheduled",
    "reference_product",
    "round_activations",
    "rounded",
    "strip_rows",
    "widen",
]

NARROW_LEVELS, WIDE_LEVELS = 7, 127
_LEAST_PEAK = np.float32(1e-30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Activations as products hold them. codes int8 [tokens, bytes], two of 4 bits in a byte; scales float32 and sums
    of codes int32 [tokens, blocks].
    """

    codes: np.ndarray
    scales: np.ndarray
    sums: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes really held."""
        return self.codes.nbytes + self.scales.nbytes + self.sums.nbytes


def round_activations(matrix: Matrix, x: np.ndarray) -> Rounded:
    """x [tokens, cols] as a product with `matrix` stores it, from the compiled code; tokens one after another."""
    tokens, groups = len(x), -(-matrix.cols // _group(matrix))
    codes = np.empty((tokens, _native.mixed_code_bytes(matrix)), np.int8)
    scales, sums = np.empty((tokens, groups), np.float32), np.empty((tokens, groups), np.int32)
    _native.quantize_mixed(matrix, np.ascontiguousarray(x, np.float32), codes, scales, sums)
    return Rounded(codes=codes, scales=scales, sums=sums)


def _group(matrix: Matrix) -> int:
    return CometCodec.parse(matrix.spec).group


def codes_of(x: np.ndarray, group: int, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The module's arithmetic in NumPy: codes int32 [tokens, blocks, group], scales float32 [tokens, blocks].

    x: columns in stored order; a short last block is filled with zeros. wide [blocks]: nonzero where 8 bits.
    """
    blocks = -(-x.shape[1] // group)
    padded = np.zeros((len(x), blocks * group), np.float32)
    padded[:, : x.shape[1]] = x
    padded = padded.reshape(len(x), blocks, group)
    levels = np.where(np.asarray(wide) != 0, np.float32(WIDE_LEVELS), np.float32(NARROW_LEVELS)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        peaks = np.abs(padded).max(axis=-1, initial=0)
    finite = np.isfinite(peaks)
    usable = finite & (peaks > _LEAST_PEAK)
    inverse = np.where(usable, levels / np.where(usable, peaks, np.float32(1)), np.float32(0))
    scales = np.where(finite, peaks / levels, np.float32(np.nan))
    codes = np.rint(np.where(finite[..., None], padded, np.float32(0)) * inverse[..., None])
    return codes.astype(np.int32), scales.astype(np.float32)


def rounded(x: np.ndarray, group: int, wide: np.ndarray) -> np.ndarray:
    """x [tokens, cols] as its codes stand for it, float32; columns in stored order."""
    codes, scales = codes_of(x, group, wide)
    values = codes.astype(np.float32) * scales[..., None]
    return np.asarray(values.reshape(len(x), -1)[:, : x.shape[1]])


def reference_product(packed: Packed, x: np.ndarray) -> np.ndarray:
    """out [tokens, rows] of a `comet` matrix in 64-bit integers, bit for bit what the kernels make."""
    form = CometCodec.parse(packed.spec)
    codes, scales, _ = form.inner.unpack(packed)  # its buffers are those of the inner form, and more
    order = packed.buffers.get("order")
    own, own_scales = codes_of(x if order is None else x[:, order], form.group, packed.buffers["wide"])
    weights = np.full((codes.shape[0], own.shape[1] * form.group), form.inner.zero_code, np.int64)
    weights[:, : codes.shape[1]] = codes
    weights = weights.reshape(codes.shape[0], -1, form.group) - form.inner.zero_code
    out = np.zeros((len(x), codes.shape[0]), np.float32)
    for block in range(own.shape[1]):
        sums = own[:, block].astype(np.int64) @ weights[:, block].T
        factors = scales[:, block].astype(np.float32)[None, :] * own_scales[:, block][:, None]
        out += factors * sums.astype(np.float32)
    return out


def widen(packed: np.ndarray) -> np.ndarray:
    """16 times the signed 4-bit codes of bytes [n], n whole fours, as int8 [2 n] in the order of their columns."""
    out = np.empty(2 * len(packed), np.int8)
    _native.widen_codes(np.ascontiguousarray(packed).view(np.int8), out)
    return out


def strip_rows() -> int:
    """Rows of the output that a tile of a schedule covers, by the instruction set in use."""
    return int(_native.mixed_strip_rows())


def linear_scheduled(
    xs: Sequence[np.ndarray],
    matrices: Sequence[Matrix],
    outs: Sequence[np.ndarray],
    schedule: Schedule,
    *,
    steal: bool,
) -> list[float]:
    """outs[i] = xs[i] @ matrices[i].T, worked tile by tile as `schedule` says: a worker's tiles in turn, then, with
    `steal`, those of the one with the most left. Returns when each worker was done, in seconds from
    the start.

    A tile's `work` is (product, strip of `strip_rows()` rows, first block, block after the last). Every strip's blocks
    must be covered once. Where a strip is one tile, results are those of `linear` to the bit; parts are added in order.
    """
    tiles = [tile.work for worker in schedule.workers for tile in worker]
    _check_cover(tiles, matrices)
    starts = np.cumsum([0, *(len(worker) for worker in schedule.workers)]).astype(np.int32)
    work = np.asarray(tiles, np.int32).reshape(-1, 4)
    return list(_native.linear_scheduled(list(xs), list(matrices), list(outs), work, starts, steal))


def _check_cover(tiles: Sequence[tuple[int, ...]], matrices: Sequence[Matrix]) -> None:
    """InputError unless every block of every strip is in one tile."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for product, strip, first, last in tiles:
        found.setdefault((product, strip), []).append((first, last))
    for product, matrix in enumerate(matrices):
        blocks = -(-matrix.cols // _group(matrix))
        for strip in range(-(-matrix.rows // strip_rows())):
            parts = sorted(found.pop((product, strip), []))
            ends = [0, *(last for _, last in parts)]
            if [first for first, _ in parts] != ends[:-1] or ends[-1] != blocks:
                raise InputError(f"schedule: the blocks of strip {strip} of product {product} are not covered once")
    if found:
        raise InputError(f"schedule: strip {min(found)} lies outside of the products")
