"""Entropy coding of small symbols: one short stream a channel, static distributions, all streams independent.

A distribution over S symbols is given by its cumulative counts in units of 2^-16: S numbers, the first 0, each larger
than the one before; 65,536 is understood behind them. Symbols are [planes, tokens, channels]; a stream holds the
symbols of one plane and channel over `cut` tokens, streams are in the order plane, cut, channel. With `anchors`, every
`group`-th symbol of a stream, its first one included, follows the channel's distribution of anchors instead.
"""

from __future__ import annotations

import numpy as np

from memwall import _native

__all__ = ["TOTAL", "cumulative", "decode", "encode", "num_streams"]

TOTAL = 1 << 16
"""Counts of a whole distribution."""


def num_streams(shape: tuple[int, int, int], cut: int) -> int:
    """Streams of symbols of that shape."""
    planes, tokens, channels = shape
    return planes * -(-tokens // cut) * channels


def cumulative(weights: np.ndarray) -> np.ndarray:
    """uint16 cumulative counts [..., S] of weights [..., S] (any scale, none negative, not all zero).

    Each symbol keeps one count at least, however rare: round(cdf * (2^16 - S)) plus one for each symbol before.
    """
    num_symbols = weights.shape[-1]
    sums = np.cumsum(weights, axis=-1, dtype=np.float64)
    before = np.zeros_like(sums)
    before[..., 1:] = sums[..., :-1] / sums[..., -1:]
    return (np.rint(before * (TOTAL - num_symbols)) + np.arange(num_symbols)).astype(np.uint16)


def encode(
    symbols: np.ndarray, starts: np.ndarray, *, cut: int, anchors: np.ndarray | None = None, group: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, size of each stream) of uint8 symbols [planes, tokens, channels].

    starts, anchors: uint16 cumulative counts [planes, channels, symbols].
    """
    parts: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for plane in range(len(symbols)):  # one at a time: room for the worst case is several times what comes out
        one = slice(plane, plane + 1)
        streams = num_streams((1, *symbols.shape[1:]), cut)
        room, lengths = np.empty((streams, 2 * cut + 8), np.uint8), np.empty(streams, np.uint32)
        own = None if anchors is None else anchors[one]
        _native.range_encode(symbols[one], starts[one], own, cut, group, room, lengths)
        parts.append(room[np.arange(room.shape[1]) < lengths[:, None]])
        sizes.append(lengths)
    if not parts:
        return np.empty(0, np.uint8), np.empty(0, np.uint32)
    return np.concatenate(parts), np.concatenate(sizes)


def decode(
    data: np.ndarray,
    sizes: np.ndarray,
    starts: np.ndarray,
    out: np.ndarray,
    *,
    cut: int,
    anchors: np.ndarray | None = None,
    group: int = 0,
) -> np.ndarray:
    """What `encode` was given, into `out` [planes, tokens, channels] uint8. Returns `out`.

    Any bytes decode to something, always inside the alphabet; whether they are the right ones, a checksum must say.
    """
    _native.range_decode(data, sizes, starts, anchors, cut, group, out)
    return out
