"""What CacheGen knows of a model: mean and spread of every channel, and the distributions of its symbols.

Planes are [2 * layers], keys (not rotated) and values of a layer next to each other; C channels of all heads. Fitted
once per model on text by `memwall fit MODEL cachegen`; or taken from one chunk and sent along with it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
MULTIPLIERS = {1: 1.5, 2: 1.0, 3: 0.5}
"""What the level makes of them."""
FIT_TOKENS = 12_288
WINDOW_TOKENS = 1024
_SMOOTHING_COUNTS = 8.0
"""Weight of the whole plane's distribution in that of a channel, in symbols seen."""


def anchor_places(num_tokens: int) -> np.ndarray:
    """Index of each token's anchor among the anchors, [T]; a new index is where an anchor stands."""
    return np.cumsum(np.arange(num_tokens) % CUT_TOKENS % GROUP_TOKENS == 0) - 1


def is_anchor(num_tokens: int) -> np.ndarray:
    """Which of the tokens are anchors."""
    return np.diff(anchor_places(num_tokens), prepend=-1) > 0


def layer_width(layer: int, num_layers: int, level: int) -> float:
    """Bin width of a layer, in units of the channel's spread."""
    return WIDTHS[min(3 * layer // num_layers, 2)] * MULTIPLIERS[level]


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


@dataclass(frozen=True, slots=True, eq=False)
class PlaneProfile:
    """One plane: how its rows are predicted, and the distribution of each channel's symbols.

    anchored: whether rows are predicted from their group's anchor, not from the channel's mean. means, units: [C], the
    unit being the spread of what is left. starts, anchors: cumulative counts (`kernels.range_coder`).
    """

    anchored: bool
    means: np.ndarray
    units: np.ndarray
    starts: np.ndarray
    anchors: np.ndarray | None


def fitted_plane(arrays: Mapping[str, np.ndarray], plane: int, form: str, level: int) -> PlaneProfile:
    """A plane of the profile that `fit` made."""
    if form == "auto":
        form = "delta" if arrays["anchored"][plane] else "mean"
    empty = np.empty(0, np.float32)
    if form == "direct":
        return PlaneProfile(False, empty, empty, arrays[f"direct.{level}"][plane], None)
    anchored = form == "delta"
    units, anchors = arrays[f"{form}.units"][plane], arrays["anchors"][plane] if anchored else None
    return PlaneProfile(anchored, arrays["means"][plane], units, arrays[f"{form}.{level}"][plane], anchors)


def table_names(form: str, level: int) -> list[str]:
    """The arrays that `fitted_plane` looks at."""
    if form == "direct":
        return [f"direct.{level}"]
    used = ("delta", "mean") if form == "auto" else (form,)
    names = ["anchored", "means", *(name for one in used for name in (f"{one}.units", f"{one}.{level}"))]
    return [*names, "anchors"] if "delta" in used else names


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


def entropy_bits(seen: np.ndarray) -> float:
    """Bits a symbol of channels [C, S] under their own distributions."""
    shares = seen / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    return float(-(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1).mean())


class OwnTables:
    """Means, units and counts of one chunk, as they travel with it: compressed by zlib, counted in its bytes."""

    @staticmethod
    def pack(means: np.ndarray, units: np.ndarray, seen: np.ndarray, anchors: np.ndarray | None) -> bytes:
        """Bytes of one plane: float16 means and units [C] (none for the direct form), uint16 counts."""
        parts = [means.astype(np.float16), units.astype(np.float16), seen.astype(np.uint16)]
        parts += [] if anchors is None else [anchors.astype(np.uint16)]
        return b"".join(part.tobytes() for part in parts)

    @staticmethod
    def length(channels: int, form: str) -> int:
        """Bytes of one plane before compression."""
        if form == "direct":
            return 2 * channels * DIRECT_SYMBOLS
        return 2 * channels * (2 + BIN_SYMBOLS + (ANCHOR_SYMBOLS if form == "delta" else 0))

    @staticmethod
    def unpack(data: bytes, channels: int, form: str) -> PlaneProfile:
        """The plane that `pack` was given."""
        numbers = np.frombuffer(data, np.uint16)
        if form == "direct":
            empty = np.empty(0, np.float32)
            seen = numbers.reshape(channels, DIRECT_SYMBOLS)
            return PlaneProfile(False, empty, empty, range_coder.cumulative(seen + 1e-9), None)
        means, units = numbers[: 2 * channels].view(np.float16).reshape(2, channels).astype(np.float32)
        rest = numbers[2 * channels :]
        seen, anchors = rest[: channels * BIN_SYMBOLS], rest[channels * BIN_SYMBOLS :]
        starts = range_coder.cumulative(seen.reshape(channels, BIN_SYMBOLS) + 1e-9)
        if form != "delta":
            return PlaneProfile(False, means, units, starts, None)
        own = range_coder.cumulative(anchors.reshape(channels, ANCHOR_SYMBOLS) + 1e-9)
        return PlaneProfile(True, means, units, starts, own)


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


# ---- fitting -------------------------------------------------------------------------------------------------------


class _Moments:
    """Sums over tokens of each plane and channel: values, squares, squared differences to the group's anchor."""

    def __init__(self, planes: int, channels: int) -> None:
        self.sums, self.squares, self.deltas = (np.zeros((planes, channels)) for _ in range(3))
        self.num_values = self.num_deltas = 0

    def add(self, plane: int, x: np.ndarray) -> None:
        places = anchor_places(len(x))
        anchors = x[is_anchor(len(x))]
        delta = x - anchors[places]
        self.sums[plane] += x.sum(axis=0, dtype=np.float64)
        self.squares[plane] += np.square(x, dtype=np.float64).sum(axis=0)
        self.deltas[plane] += np.square(delta, dtype=np.float64).sum(axis=0)
        if plane == 0:
            self.num_values += len(x)
            self.num_deltas += len(x) - len(anchors)

    def finish(self) -> dict[str, np.ndarray]:
        """Means, and spreads of values about them and of deltas."""
        means = self.sums / self.num_values
        spread = np.sqrt(np.maximum(self.squares / self.num_values - means**2, 0))
        delta = np.sqrt(self.deltas / max(self.num_deltas, 1))
        arrays = {"means": means, "mean.units": _positive(spread), "delta.units": _positive(delta)}
        return {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}


def _positive(units: np.ndarray) -> np.ndarray:
    """A channel that never changes still needs a bin width: a little of its plane's spread."""
    floor = 1e-3 * units.mean(axis=-1, keepdims=True) + 2.0**-14
    return np.maximum(units, floor)


def plane_symbols(
    x: np.ndarray, form: str, profile: PlaneProfile, width: float, direct: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(symbols [T, C], float16 scales, int16 far bins) of one plane's rows x [T, C].

    width: the layer's bin width in units; direct: bins of the direct form. Differences are to the anchor as it will be
    decoded, so that its own error does not add to theirs.
    """
    none = np.empty(0, np.int16)
    if form == "direct":
        symbols, scales = round_vectors(x, direct)
        return symbols, scales, none
    steps = profile.units * np.float32(width)
    if not profile.anchored:
        symbols, far = round_bins(x - profile.means, steps)
        return symbols, np.empty(0, np.float16), far
    places = anchor_places(len(x))
    first = np.flatnonzero(is_anchor(len(x)))
    anchors, scales = round_vectors(x[first], ANCHOR_SYMBOLS + 1)
    held = vectors(anchors, scales, ANCHOR_SYMBOLS + 1)
    delta = x - held[places]
    delta[first] = 0
    symbols, far = round_bins(delta, steps)
    symbols[first] = anchors
    return symbols, scales, far


def plane_rows(
    symbols: np.ndarray, scales: np.ndarray, far: np.ndarray, form: str, profile: PlaneProfile, width: float, direct: int
) -> np.ndarray:
    """The rows [T, C] float32 that those symbols stand for."""
    if form == "direct":
        return vectors(symbols, scales, direct)
    steps = profile.units * np.float32(width)
    if not profile.anchored:
        return bins(symbols, far, steps) + profile.means
    places = anchor_places(len(symbols))
    first = np.flatnonzero(is_anchor(len(symbols)))
    held = vectors(symbols[first], scales, ANCHOR_SYMBOLS + 1)
    symbols = symbols.copy()
    symbols[first] = REACH
    return bins(symbols, far, steps) + held[places]


def plane_moments(x: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and units of each channel of rows x [T, C]."""
    moments = _Moments(1, x.shape[1])
    moments.add(0, x)
    return {name: array[0] for name, array in moments.finish().items()}


Rows = Callable[[], Iterator[tuple[int, np.ndarray]]]
"""Every call goes over the same text: (plane, its rows [T, C]) window by window, planes in order."""


def learn(rows: Rows, planes: int, channels: int) -> dict[str, np.ndarray]:
    """The profile of a model from two passes over its keys and values."""
    moments = _Moments(planes, channels)
    for plane, x in rows():
        moments.add(plane, x)
    arrays = moments.finish()
    num_layers = planes // 2
    sizes = {"anchors": ANCHOR_SYMBOLS}
    sizes |= {f"{form}.{level}": BIN_SYMBOLS for form in ("delta", "mean") for level in LEVELS}
    sizes |= {f"direct.{level}": DIRECT_SYMBOLS for level in LEVELS}
    seen = {name: np.zeros((planes, channels, size), np.int64) for name, size in sizes.items()}
    for plane, x in rows():
        for form in ("delta", "mean", "direct"):
            for level in LEVELS:
                own = None if form == "direct" else arrays[f"{form}.units"][plane]
                profile = PlaneProfile(form == "delta", arrays["means"][plane], own, seen["anchors"], None)  # type: ignore[arg-type]
                bins_of = direct_bins(plane // 2, num_layers, level)[plane % 2]
                width = layer_width(plane // 2, num_layers, level)
                symbols, _, _ = plane_symbols(x, form, profile, width, bins_of)
                if form == "delta":
                    anchors = is_anchor(len(x))
                    if level == LEVELS[0]:
                        seen["anchors"][plane] += counts(symbols[anchors], ANCHOR_SYMBOLS)
                    symbols = symbols[~anchors]
                seen[f"{form}.{level}"][plane] += counts(symbols, sizes[f"{form}.{level}"])
    arrays["anchored"] = np.array([_anchors_pay(arrays, seen, plane) for plane in range(planes)], np.uint8)
    for name, all_counts in seen.items():
        blur = 1.5 if name == "anchors" else 0.0
        arrays[name] = np.stack([smoothed(one, blur) for one in all_counts])
    arrays["id"] = np.frombuffer(bytes.fromhex(identity(arrays)), np.uint8)
    return arrays


def _anchors_pay(arrays: Mapping[str, np.ndarray], seen: Mapping[str, np.ndarray], plane: int) -> bool:
    """Whether predicting a plane's rows from anchors takes fewer bits than from means, at the same bin width.

    Narrower differences save half a bit for each halving of their variance; the anchors' own 8 bits cost.
    """
    spread, delta = arrays["mean.units"][plane], arrays["delta.units"][plane]
    saved = float(np.log2(spread / delta).mean())
    extra = entropy_bits(seen["anchors"][plane]) - entropy_bits(seen["mean.2"][plane])
    return (1 - 1 / GROUP_TOKENS) * saved > extra / GROUP_TOKENS


def identity(arrays: Mapping[str, np.ndarray]) -> str:
    """Names a profile: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:32]


def model_rows(directory: Path, text: str | None, threads: int | None, tick: Callable[[int, int], None]) -> Rows:
    """Keys (not rotated) and values that a model makes of a text, window by window."""
    from memwall.compress.calibration import BUNDLED_TEXT, CalibrationSettings, read_text, token_sequences
    from memwall.kv.base import CacheShape
    from memwall.kv.float_store import FloatCache
    from memwall.kv.policy import Policy
    from memwall.memory import Arena, Ledger
    from memwall.models.checkpoint import Checkpoint
    from memwall.models.decoder import Decoder
    from memwall.models.precision import resolve
    from memwall.models.tokenizer import Tokenizer
    from memwall.models.weights import load_weights

    if threads is not None:
        kernels.set_num_threads(threads)
    config = ModelConfig.from_directory(directory)
    shape = CacheShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        windows=config.sliding_windows,
    )
    arena = Arena(1 << 62, Ledger())
    with Checkpoint(directory, config) as checkpoint:
        choice = "saved" if checkpoint.manifest is not None else "bfloat16" if config.dtype == "bfloat16" else "float16"
        weights = load_weights(config, checkpoint, resolve(config, choice, checkpoint), arena)
    window = min(WINDOW_TOKENS, config.max_position)
    decoder = Decoder(config, weights, arena, segment_tokens=window)
    source = text if text is not None else read_text(BUNDLED_TEXT)
    settings = CalibrationSettings(max_tokens=FIT_TOKENS, sequence_tokens=window)
    sequences = token_sequences(source, Tokenizer.from_directory(directory), config, settings, "for cachegen")
    cache = FloatCache(Policy("float32"), shape, arena, window)
    done = 0

    def rows() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal done
        for tokens in sequences:
            cache.truncate(0)
            decoder.hidden(tokens, cache)
            positions = np.arange(len(tokens))
            for layer in range(config.num_layers):
                k, v = (x.reshape(len(tokens), -1) for x in cache.rows(layer, 0, len(tokens)))
                turn(config, k, positions, back=True)
                yield 2 * layer, k
                yield 2 * layer + 1, v
            done += 1
            tick(done, 2 * len(sequences))

    return rows
