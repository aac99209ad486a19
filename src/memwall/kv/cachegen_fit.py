"""What CacheGen learns of a model from a text: spreads, distributions of symbols, what each third of layers matters.

Three facts that the method rests on are measured, not assumed: whether tokens resemble their group's anchor (else they
are predicted from the channel's mean), how symbols are distributed in each channel, and what rounding in each third of
the layers costs (else the paper's bin widths, finer in early layers, would be spent where nothing needs them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.compress.calibration import BUNDLED_TEXT, CalibrationSettings, read_text, token_sequences
from memwall.kv.base import CacheShape
from memwall.kv.cachegen_profile import (
    ANCHOR_SYMBOLS,
    BIN_SYMBOLS,
    DIRECT_SYMBOLS,
    GROUP_TOKENS,
    LEVELS,
    WIDTHS,
    Moments,
    counts,
    identity,
    is_anchor,
    plane_coder,
    plane_width,
    smoothed,
    third_of,
    turn,
    typical,
)
from memwall.kv.float_store import FloatCache
from memwall.kv.policy import Policy
from memwall.memory import Arena, Ledger
from memwall.models import precision
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights

FIT_TOKENS = 12_288
WINDOW_TOKENS = 1024
SCORED_TOKENS = 128
"""Tokens at the end of a window, whose predictions tell what rounding the rest costs."""
SCORED_WINDOWS = 6
ANCHOR_BLUR = 1.5
"""Symbols over which counts of anchors are blurred: little is seen of each of their 255."""
MOST_UNEVEN = 3.0
"""Bin widths stay within this factor of their mean: sensitivities are measured on little text."""


Progress = Callable[[str, int, int], None]


class ModelText:
    """A model and the windows of a text that it reads, as often as asked."""

    def __init__(
        self,
        directory: Path,
        text: str | None,
        threads: int | None = None,
        progress: Progress | None = None,
        *,
        max_tokens: int | None = None,
    ) -> None:
        if threads is not None:
            kernels.set_num_threads(threads)
        self.config = config = ModelConfig.from_directory(directory)
        self._progress = progress
        shape = CacheShape(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            windows=config.sliding_windows,
        )
        arena = Arena(1 << 62, Ledger())
        with Checkpoint(directory, config) as checkpoint:
            plain = "bfloat16" if config.dtype == "bfloat16" else "float16"
            choice = "saved" if checkpoint.manifest is not None else plain
            weights = load_weights(config, checkpoint, precision.resolve(config, choice, checkpoint), arena)
        window = min(WINDOW_TOKENS, config.max_position)
        source = text if text is not None else read_text(BUNDLED_TEXT)
        settings = CalibrationSettings(max_tokens=max_tokens or FIT_TOKENS, sequence_tokens=window)
        self.sequences = token_sequences(source, Tokenizer.from_directory(directory), config, settings, "to fit on")
        self.scored = min(SCORED_TOKENS, len(self.sequences[0]) // 2)
        self._decoder = Decoder(config, weights, arena, segment_tokens=window, logit_rows=self.scored)
        self._cache = FloatCache(Policy("float32"), shape, arena, window)

    def rows(self, stage: str) -> Iterator[tuple[int, np.ndarray]]:
        """(plane, its rows [T, C], keys not rotated) of every window, planes in order."""
        for done, tokens in enumerate(self.sequences):
            self._tell(stage, done, len(self.sequences))
            self._cache.truncate(0)
            self._decoder.hidden(tokens, self._cache)
            for layer in range(self.config.num_layers):
                k, v = self._planes(layer, len(tokens))
                yield 2 * layer, k
                yield 2 * layer + 1, v

    def divergence(self, rounded: Sequence[Callable[[int, np.ndarray], np.ndarray]]) -> list[float]:
        """Nats a token that predictions lose, for each way to round what comes before: rows of a plane -> rows."""
        sums = [0.0] * len(rounded)
        windows = self.sequences[:SCORED_WINDOWS]
        before = len(windows[0]) - self.scored
        for done, tokens in enumerate(windows):
            self._cache.truncate(0)
            self._decoder.hidden(tokens[:before], self._cache)
            planes = [x for layer in range(self.config.num_layers) for x in self._planes(layer, before)]
            truth = self._score(tokens[before:])
            for index, function in enumerate(rounded):
                self._tell("measuring sensitivity", done * len(rounded) + index, len(windows) * len(rounded))
                self._fill([function(plane, x) for plane, x in enumerate(planes)])
                lost = self._score(tokens[before:])
                sums[index] += float((np.exp(truth) * (truth - lost)).sum(axis=1).mean())
        return [max(total / len(windows), 1e-9) for total in sums]

    def _planes(self, layer: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        k, v = (x.reshape(num_tokens, -1) for x in self._cache.rows(layer, 0, num_tokens))
        turn(self.config, k, np.arange(num_tokens), back=True)
        return k, v

    def _fill(self, planes: list[np.ndarray]) -> None:
        self._cache.truncate(0)
        positions = np.arange(len(planes[0]))
        form = (len(positions), self.config.num_kv_heads, self.config.head_dim)
        for layer in range(self.config.num_layers):
            keys = planes[2 * layer].copy()
            turn(self.config, keys, positions)
            self._cache.append(layer, keys.reshape(form), planes[2 * layer + 1].reshape(form), positions)

    def _score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probabilities after each token, which the cache forgets again."""
        held = self._cache.length
        logits = self._decoder.forward(tokens, self._cache, all_logits=True).astype(np.float64)
        self._cache.truncate(held)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def _tell(self, stage: str, done: int, whole: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, whole)


def learn(model: ModelText, form: str) -> dict[str, np.ndarray]:
    """The profile of one form: what `cachegen_profile.fitted_plane` reads."""
    config = model.config
    planes, channels = 2 * config.num_layers, config.num_kv_heads * config.head_dim
    arrays: dict[str, np.ndarray] = {}
    if form != "direct":
        moments = Moments(planes, channels)
        for plane, x in model.rows("measuring spread"):
            moments.add(plane, x)
        found = moments.finish()
        widths = measured_widths(model, found) if form == "auto" else np.array([WIDTHS, WIDTHS])
        pays = anchors_pay(found, widths, config.num_layers)
        anchored = {"auto": pays, "delta": np.ones_like(pays), "mean": np.zeros_like(pays)}[form]
        spreads = np.where(anchored[:, None], found["delta.spreads"], found["mean.spreads"])
        arrays = {"means": found["means"], "spreads": spreads, "widths": widths.astype(np.float32),
                  "anchored": anchored.astype(np.uint8)}  # fmt: skip
    arrays |= distributions(model, form, arrays)
    arrays["id"] = np.frombuffer(bytes.fromhex(identity(arrays)), np.uint8)
    return arrays


def distributions(model: ModelText, form: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cumulative counts of each channel's symbols as the rest of a profile makes them, for every level."""
    layers, channels = model.config.num_layers, model.config.num_kv_heads * model.config.head_dim
    size = DIRECT_SYMBOLS if form == "direct" else BIN_SYMBOLS
    seen = {f"plain.{level}": np.zeros((2 * layers, channels, size), np.int64) for level in LEVELS}
    if form != "direct" and arrays["anchored"].any():
        seen["anchors"] = np.zeros((2 * layers, channels, ANCHOR_SYMBOLS), np.int64)
    for plane, x in model.rows("counting symbols"):
        for level in LEVELS:
            coder = plane_coder(arrays, plane, form, level, layers)
            symbols = coder.symbols(x)[0]
            if coder.anchored:
                first = is_anchor(len(x))
                if level == LEVELS[0]:
                    seen["anchors"][plane] += counts(symbols[first], ANCHOR_SYMBOLS)
                symbols = symbols[~first]
            seen[f"plain.{level}"][plane] += counts(symbols, size)
    blurs = {"anchors": ANCHOR_BLUR}
    return {name: np.stack([smoothed(one, blurs.get(name, 0.0)) for one in seen[name]]) for name in seen}


def measured_widths(model: ModelText, found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Bin widths [keys or values, third] that spread the loss evenly, with the paper's mean.

    At small widths w the loss grows as s w^2, with a sensitivity s of each part; for a given number of bits, the sum of
    log w, the least loss has s w^2 equal everywhere.
    """
    parts = [(kind, third) for kind in range(2) for third in range(3)]
    layers = model.config.num_layers

    def rounded(kind: int, third: int) -> Callable[[int, np.ndarray], np.ndarray]:
        def function(plane: int, x: np.ndarray) -> np.ndarray:
            if (plane % 2, third_of(plane, layers)) != (kind, third):
                return x
            step = np.float32(typical(found["mean.spreads"][plane]))
            means = found["means"][plane]
            return np.rint((x - means) / step) * step + means

        return function

    present = [part for part in parts if any(third_of(2 * layer, layers) == part[1] for layer in range(layers))]
    losses = dict(zip(present, model.divergence([rounded(*part) for part in present])))
    widths = np.array([losses.get(part, np.nan) for part in parts]).reshape(2, 3) ** -0.5
    middle = np.exp(np.nanmean(np.log(widths)))
    paper = math.prod(WIDTHS) ** (1 / len(WIDTHS))
    return np.clip(np.nan_to_num(widths / middle, nan=1.0), 1 / MOST_UNEVEN, MOST_UNEVEN) * paper


def anchors_pay(found: Mapping[str, np.ndarray], widths: np.ndarray, num_layers: int) -> np.ndarray:
    """For each plane, whether predicting rows from anchors takes fewer bits than from means, at level 2's bin width.

    Differences of half the variance save half a bit; an anchor costs the bits that its finer steps have over a bin's.
    """
    pays = []
    for plane, (spread, delta) in enumerate(zip(found["mean.spreads"], found["delta.spreads"])):
        saved = float(np.log2(spread / delta).mean())
        width = typical(spread) * plane_width(plane, num_layers, 2, widths)
        extra = math.log2(max(width / max(float(found["anchor.steps"][plane]), 1e-9), 1e-9))
        pays.append((1 - 1 / GROUP_TOKENS) * saved > extra / GROUP_TOKENS)
    return np.array(pays)
