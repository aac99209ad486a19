"""What CacheGen knows of a model: mean and spread of every channel, and the distributions of its symbols.

Planes are [2 * layers], keys (not rotated) and values of a layer next to each other; C channels of all heads. Fitted
once per model on text by `memwall fit MODEL cachegen`; or taken from one chunk and sent along with it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.kernels import range_coder
from memwall.models.config import ModelConfig
from memwall.models.rope import rope_tables

GROUP_TOKENS = 10
"""Tokens of a group: an anchor and those that store their difference to it (paper)."""
CUT_TOKENS = 256
"""Tokens of one coded stream (official code); groups begin anew with it."""
LEVELS = (1, 2, 3)
"""Coarse to fine."""
FORMS = ("auto", "delta", "mean", "direct")
ANCHOR_SYMBOLS = 255
REACH = 31
"""Bins on each side of zero; what lies beyond is stored apart."""
BIN_SYMBOLS = 2 * REACH + 2
DIRECT_SYMBOLS = 31
WIDTHS = (0.5, 1.0, 1.5)
"""Bin widths of the first, middle and last third of the layers (paper)."""
MULTIPLIERS = {1: 2.0, 2: 1.0, 3: 0.5}
"""What the level makes of them."""
_SMOOTHING_COUNTS = 8.0
"""Weight of the whole plane's distribution in that of a channel, in symbols seen."""


def anchor_places(num_tokens: int) -> np.ndarray:
    """Index of each token's anchor among the anchors, [T]; a new index is where an anchor stands."""
    return np.cumsum(np.arange(num_tokens) % CUT_TOKENS % GROUP_TOKENS == 0) - 1


def is_anchor(num_tokens: int) -> np.ndarray:
    """Which of the tokens are anchors."""
    return np.diff(anchor_places(num_tokens), prepend=-1) > 0


def third_of(plane: int, num_layers: int) -> int:
    """0, 1 or 2: the third of the layers that a plane belongs to."""
    return min(3 * (plane // 2) // num_layers, 2)


def typical(spreads: np.ndarray) -> float:
    """The geometric mean of channels' spreads: a few wide channels do not make it."""
    return float(np.exp(np.log(spreads, dtype=np.float64).mean()))


def plane_width(plane: int, num_layers: int, level: int, widths: np.ndarray | None = None) -> float:
    """Bin width of a plane, in units of its spread. widths: [keys or values, third], else the paper's."""
    third = third_of(plane, num_layers)
    return float(WIDTHS[third] if widths is None else widths[plane % 2, third]) * MULTIPLIERS[level]


def direct_bins(layer: int, num_layers: int, level: int) -> tuple[int, int]:
    """Bins for keys and for values, the official code's table for 32 layers stretched to any number."""
    first, second = round(num_layers * 10 / 32), round(num_layers * 20 / 32)
    keys = {1: (16, 16, 12), 2: (32, 16, 16), 3: (32, 32, 32)}[level]
    values = {1: (16, 12), 2: (32, 16), 3: (32, 32)}[level]
    return keys[(layer >= first) + (layer >= second)], values[layer >= max(1, round(num_layers * 2 / 32))]


def turn(config: ModelConfig, x: np.ndarray, positions: np.ndarray, *, back: bool = False) -> None:
    """Rotates keys x [T, C] to their positions, or back, in place."""
    cos, sin = rope_tables(config.rope, config.head_dim, positions)
    if back:
        scale = np.float32(1 / config.rope.attention_factor**2)
        cos, sin = cos * scale, -sin * scale
    kernels.rope(x.reshape(len(x), -1, config.head_dim), cos, sin)


# ---- quantizers: rows of one plane to symbols and back -------------------------------------------------------------


def round_vectors(x: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(symbols, float16 scales [T]) of rows x [T, C]: each row to n - 1 steps up to its largest magnitude."""
    half = bins // 2 - 1
    scales = (np.abs(x).max(axis=1, initial=0.0) / half).astype(np.float16)
    steps = scales.astype(np.float32)
    safe = np.where(steps > 0, steps, 1)
    symbols = np.clip(np.rint(x / safe[:, None]), -half, half) + half
    return symbols.astype(np.uint8), scales


def vectors(symbols: np.ndarray, scales: np.ndarray, bins: int) -> np.ndarray:
    """Rows [T, C] float32 of such symbols."""
    half = bins // 2 - 1
    return (symbols.astype(np.float32) - np.float32(half)) * scales.astype(np.float32)[:, None]


def round_bins(x: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(symbols [T, C], int16 numbers of the bins beyond reach, in order) of x [T, C] by steps [C]."""
    bins = np.rint(x / steps)
    far = np.abs(bins) > REACH
    symbols = np.where(far, BIN_SYMBOLS - 1, bins + REACH).astype(np.uint8)
    return symbols, np.clip(bins[far], -32767, 32767).astype(np.int16)


def bins(symbols: np.ndarray, far: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Rows [T, C] float32 of such symbols; InputError where `far` is not as long as they say."""
    numbers = symbols.astype(np.float32) - np.float32(REACH)
    beyond = symbols == BIN_SYMBOLS - 1
    if np.count_nonzero(beyond) != len(far):
        raise InputError(f"damaged chunk: {len(far)} numbers for {np.count_nonzero(beyond)} symbols beyond reach")
    if len(far):
        numbers[beyond] = far
    return numbers * steps


# ---- the profile ---------------------------------------------------------------------------------------------------


_NO_NUMBERS = np.empty(0, np.float32)
_NO_COUNTS = np.empty((0, 0), np.uint16)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PlaneCoder:
    """How one plane's rows [T, C] become symbols, and how each channel's symbols are distributed.

    direct: bins of the direct form, 0 for the others. anchored: whether rows are predicted from their group's anchor,
    not from the channel's mean. steps: bin width of each channel. starts, anchors: cumulative counts.
    """

    direct: int = 0
    anchored: bool = False
    means: np.ndarray = field(default_factory=lambda: _NO_NUMBERS)
    steps: np.ndarray = field(default_factory=lambda: _NO_NUMBERS)
    starts: np.ndarray
    anchors: np.ndarray | None = None

    def symbols(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(symbols [T, C], float16 scales, int16 far bins) of rows x [T, C].

        Differences are to the anchor as it will be decoded, so that its own error does not add to theirs.
        """
        if self.direct:
            return *round_vectors(x, self.direct), np.empty(0, np.int16)
        if not self.anchored:
            symbols, far = round_bins(x - self.means, self.steps)
            return symbols, np.empty(0, np.float16), far
        first = np.flatnonzero(is_anchor(len(x)))
        anchors, scales = round_vectors(x[first], ANCHOR_SYMBOLS + 1)
        delta = x - vectors(anchors, scales, ANCHOR_SYMBOLS + 1)[anchor_places(len(x))]
        delta[first] = 0
        symbols, far = round_bins(delta, self.steps)
        symbols[first] = anchors
        return symbols, scales, far

    def rows(self, symbols: np.ndarray, scales: np.ndarray, far: np.ndarray) -> np.ndarray:
        """The rows [T, C] float32 that symbols stand for; InputError where the parts do not fit each other."""
        if self.direct or self.anchored:
            wanted = len(symbols) if self.direct else int(is_anchor(len(symbols)).sum())
            if len(scales) != wanted:
                raise InputError(f"damaged chunk: {len(scales)} scales instead of {wanted}")
        if self.direct:
            return vectors(symbols, scales, self.direct)
        if not self.anchored:
            return bins(symbols, far, self.steps) + self.means
        first = np.flatnonzero(is_anchor(len(symbols)))
        held = vectors(symbols[first], scales, ANCHOR_SYMBOLS + 1)
        symbols = symbols.copy()
        symbols[first] = REACH
        return bins(symbols, far, self.steps) + held[anchor_places(len(symbols))]


def bin_steps(spreads: np.ndarray, width: float) -> np.ndarray:
    """Bin width of each channel [C] float32, where `width` is in units of the plane's typical spread.

    One width for all channels loses least for its bits: widths by each channel's own spread cost 1.5 times the
    divergence (measured, demo model). Channels so wide that bins would not reach four deviations get more.
    """
    return np.maximum(np.float32(typical(spreads) * width), spreads * np.float32(4 / REACH)).astype(np.float32)


def plane_coder(arrays: Mapping[str, np.ndarray], plane: int, form: str, level: int, num_layers: int) -> PlaneCoder:
    """A plane's coder from the arrays of a profile; without its distributions where these are still to be counted."""
    starts = arrays[f"plain.{level}"][plane] if f"plain.{level}" in arrays else _NO_COUNTS
    if form == "direct":
        return PlaneCoder(direct=direct_bins(plane // 2, num_layers, level)[plane % 2], starts=starts)
    anchored = bool(arrays["anchored"][plane])
    return PlaneCoder(
        anchored=anchored,
        means=arrays["means"][plane],
        steps=bin_steps(arrays["spreads"][plane], plane_width(plane, num_layers, level, arrays["widths"])),
        starts=starts,
        anchors=arrays["anchors"][plane] if anchored and "anchors" in arrays else None,
    )


def table_names(form: str, level: int) -> list[str]:
    """The arrays of a profile that one level needs, where they are there."""
    shared = [] if form == "direct" else ["anchored", "means", "spreads", "widths", "anchors"]
    return ["id", f"plain.{level}", *shared]


def counts(symbols: np.ndarray, num_symbols: int) -> np.ndarray:
    """How often each symbol stands in each channel of symbols [T, C]: [C, S]."""
    channels = symbols.shape[1]
    flat = symbols + np.arange(channels) * num_symbols
    return np.bincount(flat.ravel(), minlength=channels * num_symbols).reshape(channels, num_symbols)


def smoothed(seen: np.ndarray, spread: float = 0.0) -> np.ndarray:
    """uint16 cumulative counts of what was seen [C, S], with a share of the whole plane's distribution.

    spread: standard deviation in symbols of a blur, for wide alphabets of which little was seen.
    """
    weights = seen.astype(np.float64)
    if spread:
        reach = int(3 * spread)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
        kernel /= kernel.sum()
        weights = np.stack([np.convolve(row, kernel, mode="same") for row in weights])
    whole = weights.sum(axis=0, keepdims=True)
    return range_coder.cumulative(weights + _SMOOTHING_COUNTS * whole / max(whole.sum(), 1) + 1e-9)


class OwnTables:
    """Coders of one chunk's own numbers, as they travel with it: means, spreads and counts, compressed by zlib."""

    @staticmethod
    def make(x: np.ndarray, form: str, level: int, plane: int, num_layers: int) -> bytes:
        """Bytes of one plane with rows x [T, C], before compression; `unpack` gives the coder that codes it."""
        if form == "direct":
            coder = plane_coder({}, plane, form, level, num_layers)
            return counts(coder.symbols(x)[0], DIRECT_SYMBOLS).astype(np.uint16).tobytes()
        moments = Moments(1, x.shape[1])
        moments.add(0, x)
        found = moments.finish()
        own = np.stack([found["means"][0], found[f"{form}.spreads"][0]]).astype(np.float16)
        coder = OwnTables._coder(own, form, level, plane, num_layers, _NO_COUNTS, None)
        symbols = coder.symbols(x)[0]
        parts = [own.tobytes()]
        if form == "delta":
            first = is_anchor(len(x))
            parts.append(counts(symbols[first], ANCHOR_SYMBOLS).astype(np.uint16).tobytes())
            symbols = symbols[~first]
        return b"".join([*parts, counts(symbols, BIN_SYMBOLS).astype(np.uint16).tobytes()])

    @staticmethod
    def length(channels: int, form: str) -> int:
        """Bytes of one plane before compression."""
        if form == "direct":
            return 2 * channels * DIRECT_SYMBOLS
        return 2 * channels * (2 + BIN_SYMBOLS + (ANCHOR_SYMBOLS if form == "delta" else 0))

    @staticmethod
    def unpack(data: bytes, channels: int, form: str, level: int, plane: int, num_layers: int) -> PlaneCoder:
        """The coder of one plane."""
        numbers = np.frombuffer(data, np.uint16)
        if form == "direct":
            starts = range_coder.cumulative(numbers.reshape(channels, DIRECT_SYMBOLS) + 1e-9)
            return PlaneCoder(direct=direct_bins(plane // 2, num_layers, level)[plane % 2], starts=starts)
        own, rest = numbers[: 2 * channels].view(np.float16).reshape(2, channels), numbers[2 * channels :]
        split = channels * (ANCHOR_SYMBOLS if form == "delta" else 0)
        anchors = range_coder.cumulative(rest[:split].reshape(channels, -1) + 1e-9) if split else None
        starts = range_coder.cumulative(rest[split:].reshape(channels, BIN_SYMBOLS) + 1e-9)
        return OwnTables._coder(own, form, level, plane, num_layers, starts, anchors)

    @staticmethod
    def _coder(
        own: np.ndarray,
        form: str,
        level: int,
        plane: int,
        num_layers: int,
        starts: np.ndarray,
        anchors: np.ndarray | None,
    ) -> PlaneCoder:
        means, spreads = own.astype(np.float32)
        if not (np.isfinite(means).all() and np.isfinite(spreads).all() and (spreads > 0).all()):
            raise InputError("damaged chunk: its means and spreads are no numbers")
        steps = bin_steps(spreads, plane_width(plane, num_layers, level))
        return PlaneCoder(anchored=form == "delta", means=means, steps=steps, starts=starts, anchors=anchors)


def inflate(data: bytes, expected: int) -> bytes:
    """What zlib made small, which must be exactly so long; nothing longer is ever held."""
    machine = zlib.decompressobj()
    try:
        found = machine.decompress(data, expected + 1)
    except zlib.error as error:
        raise InputError(f"damaged chunk: its tables cannot be read: {error}") from None
    if len(found) != expected or not machine.eof:
        raise InputError(f"damaged chunk: its tables are not {expected:,} bytes long")
    return found


class Moments:
    """Sums over tokens of each plane and channel: values, squares, squared differences to the group's anchor."""

    def __init__(self, planes: int, channels: int) -> None:
        self.sums, self.squares, self.deltas = (np.zeros((planes, channels)) for _ in range(3))
        self.peaks = np.zeros(planes)
        self.num_values = self.num_deltas = 0

    def add(self, plane: int, x: np.ndarray) -> None:
        places = anchor_places(len(x))
        anchors = x[is_anchor(len(x))]
        delta = x - anchors[places]
        self.peaks[plane] += np.abs(x).max(axis=1).sum(dtype=np.float64)
        self.sums[plane] += x.sum(axis=0, dtype=np.float64)
        self.squares[plane] += np.square(x, dtype=np.float64).sum(axis=0)
        self.deltas[plane] += np.square(delta, dtype=np.float64).sum(axis=0)
        if plane == 0:
            self.num_values += len(x)
            self.num_deltas += len(x) - len(anchors)

    def finish(self) -> dict[str, np.ndarray]:
        """Means, spreads of values about them and of differences to anchors, and the mean step of an anchor."""
        means = self.sums / self.num_values
        spread = np.sqrt(np.maximum(self.squares / self.num_values - means**2, 0))
        delta = np.sqrt(self.deltas / max(self.num_deltas, 1))
        steps = self.peaks / self.num_values / (ANCHOR_SYMBOLS // 2)
        arrays = {
            "means": means,
            "mean.spreads": _positive(spread),
            "delta.spreads": _positive(delta),
            "anchor.steps": steps,
        }
        return {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}


def _positive(spreads: np.ndarray) -> np.ndarray:
    """A channel that never changes still needs a bin width: a little of its plane's spread."""
    floor = 1e-3 * spreads.mean(axis=-1, keepdims=True) + 2.0**-14
    return np.maximum(spreads, floor)


def identity(arrays: Mapping[str, np.ndarray]) -> str:
    """Names a profile: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:32]
