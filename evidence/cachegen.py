"""CacheGen's claims, on the bundled demo model and, where only bytes and seconds matter, on a model of random weights.

Quality: a context of 512 held-out tokens is saved by each codec, loaded again, and the tokens behind it are scored, all
at once, against the exact cache: perplexity and KL divergence. Bytes are those of the whole chunk, its header, scales,
stream sizes and checksum included. The demo model was trained on 1,024 tokens, so contexts are shorter than the
paper's; bits per number do not depend on that.

Time: a server process (`memwall stream`) sends chunks through an emulated link, a token bucket at the rates given; the
client decodes or recomputes them in an engine with 26 million random weights, on this machine's processor. Rates are
the repository's bandwidth traces (`--data` a directory with cachegen-bandwidth.jsonl, or rates drawn alike), scaled to
this model: the finest level takes as long at the mean rate as there is time.

Changed after results were seen, and to be read so: an earlier controller left no time to spare, and over sockets
missed as many deadlines as level 1 or more (24 against 14 % of 70). Its margins were chosen on drawn traces of other
seeds, the one it begins with raised once after recorded traces, and sockets go through all three speeds of the virtual
clock now, as the claim says, instead of the middle one, which is told apart. On 1,260 tries of a seed looked at only
afterwards, on the virtual clock, the controller missed 11.6 %, level 1 21.5; at the middle speed 19 against 26 of 420.

Text: `--data` a UTF-8 file, or a directory with one; the planner's held-out text otherwise. Profiles are fitted on the
bundled calibration text, never on the text that is scored.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import lzma
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memwall import kernels, kv
from memwall.claims import Claim, Progress, main, not_run
from memwall.engine.loading import cache_shape
from memwall.engine.quality import log_softmax
from memwall.errors import InputError
from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.kernels import range_coder
from memwall.kv import cachegen_profile as profiles
from memwall.kv.cachegen import Chunk, Shape, cache_planes, encode_chunk
from memwall.kv.cachegen_costs import Backlog, Costs, Pace, Task
from memwall.kv.cachegen_file import chunk_name
from memwall.kv.cachegen_fit import ModelText, anchors_pay, learn
from memwall.kv.cachegen_profile import GROUP_TOKENS, LEVELS, Moments, PlaneCoder, turn
from memwall.kv.link import ChunkLink, Index, Trace
from memwall.kv.saved import Origin, write
from memwall.kv.streaming import LEAST_MEASURED_BYTES, QUEUED_CHUNKS, TEXT, Receiver, Request, StreamingController
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.plan.choose import held_out_text

CONTEXT_TOKENS = 512
MODEL = "e" * 64
TEXT_NAMES = ("text/wikitext2-valid.txt", "wikitext2-valid.txt")
TRACE_NAMES = ("traces/cachegen-bandwidth.jsonl", "cachegen-bandwidth.jsonl")
Tick = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured. traces, deadlines: over sockets; deadlines in seconds of the official scripts."""

    windows: int
    scored: int
    fit_tokens: int
    traces: int
    deadlines: tuple[float, ...]
    stream_chunks: int = 6
    chunk_tokens: int = 128


FULL = Sizes(windows=12, scored=448, fit_tokens=12_288, traces=5, deadlines=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0))
QUICK = Sizes(windows=4, scored=256, fit_tokens=3072, traces=2, deadlines=(0.5, 1.25, 2.0))


def found_file(data: Path | None, names: tuple[str, ...]) -> Path | None:
    """The first of these files in the directory given, if one was."""
    if data is None or not data.is_dir():
        return None
    return next((data / name for name in names if (data / name).is_file()), None)


def text_of(data: Path | None) -> str:
    """Text to score: the file given, one in the directory given, or the bundled one."""
    path = found_file(data, TEXT_NAMES) if data is None or data.is_dir() else data
    return path.read_text(encoding="utf-8")[:600_000] if path is not None else held_out_text()


def traces_of(data: Path | None, count: int) -> tuple[list[list[float]], str]:
    """Rates in Gbit/s, as the repository has them, and where they are from."""
    path = found_file(data, TRACE_NAMES)
    if path is not None:
        return [json.loads(line)["bw"] for line in path.read_text().splitlines()[:count]], path.name
    rng = np.random.default_rng(0)
    return [rng.uniform(0.1, 10, 10).tolist() for _ in range(count)], "rates drawn evenly from 0.1 to 10"


# ---- quality -------------------------------------------------------------------------------------------------------


class Demo:
    """Held-out windows of the demo model: the planes of their contexts, and what follows scored through any planes."""

    def __init__(self, data: Path | None, sizes: Sizes) -> None:
        directory = model_directory("demo")
        self.sizes, self.directory = sizes, directory
        self.config = ModelConfig.from_directory(directory)
        self.shape = Shape.of(self.config)
        arena = Arena(1 << 40, Ledger())
        with Checkpoint(directory, self.config) as checkpoint:
            weights = load_weights(self.config, checkpoint, resolve(self.config, "float16"), arena)
        self.decoder = Decoder(
            self.config, weights, arena, segment_tokens=CONTEXT_TOKENS, logit_rows=sizes.scored, exact=True
        )
        self.cache = kv.build("float32", cache_shape(self.config), arena, CONTEXT_TOKENS + sizes.scored + 1)
        tokens = np.array(Tokenizer.from_directory(directory).encode(text_of(data), add_bos=False), np.int64)
        size = CONTEXT_TOKENS + sizes.scored
        if len(tokens) < size * sizes.windows:
            raise InputError(f"{data or 'the bundled text'}: {len(tokens):,} tokens; needs {size * sizes.windows:,}")
        stride = (len(tokens) - size) // max(sizes.windows - 1, 1)
        self.windows = [
            np.concatenate([[self.config.bos_token_id or 0], tokens[i * stride : i * stride + size]])
            for i in range(sizes.windows)
        ]
        self.contexts: list[list[np.ndarray]] = []
        self.rotated: list[list[np.ndarray]] = []
        self.truth: list[np.ndarray] = []
        for window in self.windows:
            self.cache.truncate(0)
            self.decoder.hidden(window[:CONTEXT_TOKENS], self.cache)
            planes = cache_planes(self.cache, self.config, 0, CONTEXT_TOKENS)
            self.contexts.append([planes(p).copy() for p in range(self.shape.planes)])
            layers = [self.cache.rows(layer, 0, CONTEXT_TOKENS) for layer in range(self.config.num_layers)]
            self.rotated.append([x.reshape(CONTEXT_TOKENS, -1).copy() for pair in layers for x in pair])
            self.truth.append(self._follow(window, self.cache))

    @property
    def numbers(self) -> int:
        """Keys and values of one context."""
        return self.shape.planes * CONTEXT_TOKENS * self.shape.channels

    def _follow(self, window: np.ndarray, cache: kv.KVCache) -> np.ndarray:
        logits = self.decoder.forward(window[CONTEXT_TOKENS:-1], cache, all_logits=True)
        return log_softmax(logits.copy())

    def score(self, planes_of: Callable[[int], list[np.ndarray]], *, rotated: bool = False) -> Score:
        """What is lost where each window's context is these planes; rotated: keys already are."""

        def filled(index: int) -> kv.KVCache:
            self.cache.truncate(0)
            positions, form = np.arange(CONTEXT_TOKENS), (CONTEXT_TOKENS, -1, self.config.head_dim)
            planes = planes_of(index)
            for layer in range(self.config.num_layers):
                keys = planes[2 * layer].astype(np.float32, copy=True)
                if not rotated:
                    turn(self.config, keys, positions)
                values = planes[2 * layer + 1].astype(np.float32)
                self.cache.append(layer, keys.reshape(form), values.reshape(form), positions)
            return self.cache

        return self.score_caches(filled)

    def score_caches(self, filled: Callable[[int], kv.KVCache]) -> Score:
        """What is lost where each window's context is in that cache."""
        losses, divergences = [], []
        for index, (window, truth) in enumerate(zip(self.windows, self.truth)):
            mine = self._follow(window, filled(index))
            rows, targets = np.arange(len(mine)), window[CONTEXT_TOKENS + 1 :]
            losses.append(truth[rows, targets] - mine[rows, targets])
            divergences.append((np.exp(truth) * (truth - mine)).sum(axis=1))
        return Score(math.expm1(float(np.concatenate(losses).mean())), float(np.concatenate(divergences).mean()))


@dataclass(frozen=True, slots=True)
class Score:
    """gap: perplexity over the exact cache's, less one. divergence: from its predictions, in nats a token."""

    gap: float
    divergence: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One way to store a context: bits a number with everything that is stored, and what is lost."""

    bits: float
    score: Score

    def __str__(self) -> str:
        return f"{self.bits:.2f} bits ({self.score.gap:+.2%}, KL {self.score.divergence:.4f})"


def coded(demo: Demo, form: str, level: int, profile: Mapping[str, np.ndarray] | None) -> Entry:
    """CacheGen at one level: real chunks, decoded."""
    found = [
        encode_chunk(context.__getitem__, demo.shape, model=MODEL, first=0, level=level, form=form, profile=profile)
        for context in demo.contexts
    ]

    def planes(index: int) -> list[np.ndarray]:
        chunk = Chunk(found[index], demo.shape, model=MODEL, profile=profile)
        return [chunk.plane(p) for p in range(demo.shape.planes)]

    return Entry(8 * sum(map(len, found)) / len(found) / demo.numbers, demo.score(planes))


def uniform(demo: Demo, bits: int) -> tuple[Entry, float]:
    """Vector-wise uniform rounding of rotated rows, packed; and its bits after a general compressor."""
    bins, packed = 2**bits, []

    def planes(index: int) -> list[np.ndarray]:
        out = []
        for x in demo.rotated[index]:
            symbols, scales = profiles.round_vectors(x, bins)
            spread = np.unpackbits(symbols[..., None], axis=-1, count=8, bitorder="little")[..., :bits]
            packed.append((np.packbits(spread.reshape(-1)).tobytes(), scales.tobytes()))
            out.append(profiles.vectors(symbols, scales, bins))
        return out

    score = demo.score(planes, rotated=True)
    per = 8 / len(demo.windows) / demo.numbers
    whole = b"".join(codes + scales for codes, scales in packed)
    return Entry(per * len(whole), score), per * min(len(squeeze(whole)) for squeeze in compressors().values())


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    """zstd where it is installed, and LZMA, which packs tighter and takes longer."""
    found: dict[str, Callable[[bytes], bytes]] = {"lzma": lambda data: lzma.compress(data, preset=6)}
    with contextlib.suppress(ImportError):
        import zstandard

        found["zstd"] = zstandard.ZstdCompressor(level=19).compress
    return found


def kivi(demo: Demo, bits: int) -> Entry:
    """KIVI with its exact part, as the cache holds it."""
    cache = kv.build(f"kivi(bits={bits},group=32,residual=32)", cache_shape(demo.config), Arena(1 << 40, Ledger()),
                     CONTEXT_TOKENS + demo.sizes.scored + 1)  # fmt: skip
    held = 0.0

    def filled(index: int) -> kv.KVCache:
        nonlocal held
        cache.truncate(0)
        form = (CONTEXT_TOKENS, -1, demo.config.head_dim)
        for layer in range(demo.config.num_layers):
            keys, values = (demo.rotated[index][2 * layer + i].reshape(form) for i in range(2))
            cache.append(layer, keys, values, np.arange(CONTEXT_TOKENS))
            cache.settle(layer)
        held = sum(array.nbytes for array in cache.dump()[0].values()) * 8 / demo.numbers
        return cache

    score = demo.score_caches(filled)
    return Entry(held, score)


class Coded:
    """The demo model's profiles and what its forms cost, measured once."""

    def __init__(self, demo: Demo, tick: Tick) -> None:
        self.demo = demo
        tick("fitting profiles")
        self.text = ModelText(demo.directory, None, max_tokens=demo.sizes.fit_tokens)
        self.profiles = {form: learn(self.text, form) for form in ("auto", "mean", "direct")}
        self.levels = {}
        for level in LEVELS:
            tick(f"quality, level {level}")
            self.levels[level] = coded(demo, "auto", level, self.profiles["auto"])


def round_trip_claim(known: Coded) -> Claim:
    """Chunks of all lengths, in every form, against the quantizer alone."""
    demo, wrong, tried = known.demo, 0, 0
    for tokens in (1, 9, 10, 11, 255, 256, 257):
        context = [x[:tokens] for x in demo.contexts[0]]
        for form, profile in known.profiles.items():
            data = encode_chunk(
                context.__getitem__, demo.shape, model=MODEL, first=0, level=2, form=form, profile=profile
            )
            chunk = Chunk(data, demo.shape, model=MODEL, profile=profile)
            for plane, x in enumerate(context):
                coder = profiles.plane_coder(profile, plane, form, 2, demo.config.num_layers)
                wrong += int(np.count_nonzero(chunk.plane(plane) != coder.rows(*coder.symbols(x))))
                tried += x.size
    return Claim(
        claim="the coder loses nothing: a decoded chunk is what the quantizer rounded to, at 1 to 257 tokens",
        measured=f"{wrong} of {tried:,} numbers differ",
        required="none",
        passed=wrong == 0 and tried > 0,
    )


def size_claims(known: Coded, tick: Tick) -> Iterator[Claim]:
    """At equal perplexity, against packed uniform rounding, the same compressed, and KIVI."""
    demo = known.demo
    plain: dict[str, Entry] = {}
    squeezed: dict[str, float] = {}
    for bits in (8, 4, 3):
        tick(f"quality, uniform {bits} bits")
        plain[f"uniform {bits}"], squeezed[f"uniform {bits}"] = uniform(demo, bits)
    for bits in (4, 2):
        tick(f"quality, KIVI {bits} bits")
        plain[f"KIVI {bits}"] = kivi(demo, bits)
    shown = "; ".join(f"{name} {entry}" for name, entry in plain.items())
    levels = "; ".join(f"level {level} {entry}" for level, entry in known.levels.items())
    best = {name: equal(entry, known.levels) for name, entry in plain.items()}
    ratios = {name: plain[name].bits / known.levels[level].bits if level else 0.0 for name, level in best.items()}
    told = ", ".join(f"{name}: level {best[name]}, {ratio:.2f} times" for name, ratio in ratios.items() if best[name])
    none = [name for name in best if not best[name]]
    told += f"; no level is as good as {', '.join(none)}" if none else ""
    yield Claim(
        claim="at equal perplexity the stream is smaller than packed uniform rounding (vector-wise, 8, 4 and 3 bits)",
        measured=f"{told}. Bits a number with all that is stored (perplexity lost, divergence): {levels}; {shown}",
        required="a level within 1 % (divergence at most 0.00995 higher) and at least 1.3 times smaller, for each",
        passed=all(ratios[f"uniform {bits}"] >= 1.3 for bits in (8, 4, 3)),
    )
    against = {name: squeezed[name] / known.levels[best[name]].bits for name in squeezed if best[name]}
    yield Claim(
        claim=f"and smaller than the same codes compressed by {' or '.join(compressors())}, whichever packs tighter",
        measured=", ".join(f"{name}: {squeezed[name]:.2f} bits, {ratio:.2f} times" for name, ratio in against.items()),
        required="more than 1 time",
        passed=len(against) == len(squeezed) and all(ratio > 1 for ratio in against.values()),
    )
    yield Claim(
        claim="at equal perplexity the stream is smaller than KIVI's cache (residual 32) on disk",
        measured=", ".join(f"{n}: {r:.2f} times" for n, r in ratios.items() if n.startswith("KIVI")),
        required="more than 1 time",
        passed=all(ratio > 1 for name, ratio in ratios.items() if name.startswith("KIVI")),
    )


def equal(entry: Entry, levels: Mapping[int, Entry]) -> int | None:
    """The coarsest level whose perplexity is within 1 % of the entry's, or None.

    The perplexity of a few thousand tokens is known to about 1 %; the divergence says much closer by how much it grows
    on text like the model's own.
    """
    good = [v for v, e in levels.items() if e.score.divergence <= entry.score.divergence + math.log(1.01)]
    return min(good, default=None)


def grouping_claim(known: Coded) -> Claim:
    """Bytes of the same symbols under distributions of each channel, of each plane, and of all."""
    demo, profile = known.demo, known.profiles["direct"]
    starts = profile["plain.2"].astype(np.int64)
    widths = np.diff(starts, axis=-1, append=range_coder.TOTAL).astype(np.float64)
    pooled = {
        "each channel of each layer": widths,
        "each layer": np.broadcast_to(widths.mean(axis=1, keepdims=True), widths.shape),
        "one": np.broadcast_to(widths.mean(axis=(0, 1)), widths.shape),
    }
    sizes = []
    for weights in pooled.values():
        mine = {**profile, "plain.2": range_coder.cumulative(weights)}
        sizes.append(sum(
            len(encode_chunk(c.__getitem__, demo.shape, model=MODEL, first=0, level=2, form="direct", profile=mine))
            for c in demo.contexts
        ))  # fmt: skip
    per = 8 / len(demo.contexts) / demo.numbers
    return Claim(
        claim="distributions of each channel and layer code in fewer bytes than one a layer, these than one for all",
        measured=", ".join(f"{name}: {per * size:.3f} bits" for name, size in zip(pooled, sizes))
        + " (official code's bins, level 2)",
        required="each smaller than the next",
        passed=sizes[0] < sizes[1] < sizes[2],
    )


def smooth_rows(tokens: int, channels: int, kept: float) -> np.ndarray:
    """Rows in which each token keeps a share of the one before: correlated as the paper finds real ones to be."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((tokens, channels)).astype(np.float32)
    for token in range(1, tokens):
        rows[token] = kept * rows[token - 1] + math.sqrt(1 - kept**2) * rows[token]
    return rows * np.exp(0.5 * rng.standard_normal(channels)).astype(np.float32)


def coded_bits(rows: np.ndarray, steps: np.ndarray, anchored: bool) -> tuple[float, float]:
    """(bits a number, root mean square error) of rows by their own distributions, which are not counted."""
    blank = np.empty((0, 0), np.uint16)
    coder = PlaneCoder(anchored=anchored, means=rows.mean(axis=0), steps=steps, starts=blank)
    symbols, scales, far = coder.symbols(rows)
    first = profiles.is_anchor(len(rows)) if anchored else np.zeros(len(rows), bool)
    starts = range_coder.cumulative(profiles.counts(symbols[~first], profiles.BIN_SYMBOLS) + 1e-9)[None]
    extra = {}
    if anchored:
        counts = profiles.counts(symbols[first], profiles.ANCHOR_SYMBOLS) + 1e-9
        extra = {"anchors": range_coder.cumulative(counts)[None], "group": GROUP_TOKENS}
    data, sizes = range_coder.encode(symbols[None], starts, cut=profiles.CUT_TOKENS, **extra)
    bits = 8 * (len(data) + len(sizes) + 2 * len(scales) + 2 * len(far)) / rows.size
    return bits, float(np.sqrt(np.square(coder.rows(symbols, scales, far) - rows).mean()))


def delta_claims(known: Coded) -> Iterator[Claim]:
    """Whether neighbouring tokens are alike, and what anchors do where they are and where not."""
    demo = known.demo
    moments = Moments(demo.shape.planes, demo.shape.channels)
    for context in demo.contexts:
        for plane, x in enumerate(context):
            moments.add(plane, x)
    found = moments.finish()
    ratios = np.square(found["mean.spreads"]).sum(axis=1) / np.square(found["delta.spreads"]).sum(axis=1)
    turned = Moments(demo.shape.planes, demo.shape.channels)
    for context in demo.rotated:
        for plane, x in enumerate(context):
            turned.add(plane, x)
    whole = turned.finish()
    after = (np.square(whole["mean.spreads"]).sum(axis=1) / np.square(whole["delta.spreads"]).sum(axis=1))[::2]
    locality = (
        f"demo model, variance of values over that of differences to the anchor: keys {ratios[::2].mean():.2f} "
        f"(rotated: {after.mean():.2f}), values {ratios[1::2].mean():.2f}; 0.50 is what unrelated tokens give, the "
        "paper finds 2.4 to 2.9 in large models"
    )
    cases = {f"rows that keep {kept:g} of the token before": smooth_rows(1024, 64, kept) for kept in (0.99, 0.5)}
    cases["keys of the demo model, layer 4"] = demo.contexts[0][8]
    good, lines = True, []
    for name, rows in cases.items():
        one = Moments(2, rows.shape[1])
        one.add(0, rows)
        one.add(1, rows)
        told = one.finish()
        ratio = float(np.square(told["mean.spreads"][0]).sum() / np.square(told["delta.spreads"][0]).sum())
        steps = profiles.bin_steps(told["mean.spreads"][0], 0.5)
        (by_anchor, error), (by_mean, other) = (coded_bits(rows, steps, anchored) for anchored in (True, False))
        picked = bool(anchors_pay(told, np.full((2, 3), 0.5), 1)[0])
        good &= picked == (by_anchor < by_mean) and (ratio < 2 or by_anchor < by_mean)
        good &= abs(error / other - 1) < 0.15
        lines.append(f"{name} (ratio {ratio:.2f}): {by_anchor:.2f} bits by anchors, {by_mean:.2f} by means")
    yield Claim(
        claim="anchors and differences are smaller than no differences where these vary less than half as much; the "
        "profile takes whichever is smaller",
        measured="; ".join(lines) + f" (same bin width). {locality}",
        required="smaller by anchors wherever the ratio is above 2, and the smaller one picked each time",
        passed=good,
    )


def sensitivity_claims(known: Coded, tick: Tick) -> Iterator[Claim]:
    """What rounding a third of the layers costs, and whether the widths made of it are worth their fit."""
    demo = known.demo
    tick("sensitivity")
    layers, profile = demo.config.num_layers, known.profiles["mean"]
    losses = []
    for third in range(3):

        def planes(index: int, third: int = third) -> list[np.ndarray]:
            out = []
            for plane, x in enumerate(demo.contexts[index]):
                if profiles.third_of(plane, layers) == third:
                    step = np.float32(profiles.typical(profile["spreads"][plane]))
                    x = np.rint((x - profile["means"][plane]) / step) * step + profile["means"][plane]
                out.append(x)
            return out

        losses.append(demo.score(planes).divergence)
    yield Claim(
        claim="loss sensitivity falls with depth: rounding the first third of the layers costs more than the last",
        measured=f"KL of thirds rounded to one deviation: {', '.join(f'{x:.4f}' for x in losses)}",
        required="first above last",
        passed=losses[0] > losses[2],
    )
    measured = [(known.levels[level], coded(demo, "mean", level, profile)) for level in (1, 2)]
    # the paper's widths at the bits of the measured ones: divergence falls by a factor per bit
    (mine_low, paper_low), (mine, paper) = measured
    slope = math.log(paper_low.score.divergence / paper.score.divergence) / (paper.bits - paper_low.bits)
    at_same = paper.score.divergence * math.exp(slope * (paper.bits - mine.bits))
    widths = [[round(float(w), 2) for w in row] for row in known.profiles["auto"]["widths"]]
    yield Claim(
        claim="bin widths from the measured sensitivity lose less than the paper's at equal bytes",
        measured=f"level 2: measured {mine}, paper's {paper}, the paper's at the same bits KL {at_same:.4f}; level 1: "
        f"{mine_low}, paper's {paper_low}; widths keys {widths[0]}, values {widths[1]}",
        required="less divergence at level 2",
        passed=mine.score.divergence < at_same,
    )


def tables_claim(known: Coded) -> Claim:
    """Profiled distributions against those of the chunk, counted."""
    demo = known.demo
    context = [np.concatenate([c[p] for c in demo.contexts[:2]]) for p in range(demo.shape.planes)]
    sizes = {}
    for tokens in (256, 1024):
        part = [x[:tokens] for x in context]
        for name, profile in (("profile", known.profiles["mean"]), ("own", None)):
            data = encode_chunk(
                part.__getitem__, demo.shape, model=MODEL, first=0, level=2, form="mean", profile=profile
            )
            sizes[name, tokens] = 8 * len(data) / (demo.shape.planes * tokens * demo.shape.channels)
    return Claim(
        claim="distributions profiled once take fewer bytes than each chunk's own, which travel with it",
        measured="; ".join(f"{tokens} tokens: {sizes['profile', tokens]:.2f} bits profiled, {sizes['own', tokens]:.2f} "
                           "with tables" for tokens in (256, 1024)),
        required="smaller at both lengths",
        passed=all(sizes["profile", tokens] < sizes["own", tokens] for tokens in (256, 1024)),
    )  # fmt: skip


def rotation_claim(known: Coded) -> Claim:
    """The official code's bins on keys as the cache holds them and on keys before rotation."""
    demo = known.demo
    sizes, scores = [], []
    for contexts, rotated in ((demo.rotated, True), (demo.contexts, False)):
        total = 0

        def planes(index: int, contexts: list[list[np.ndarray]] = contexts) -> list[np.ndarray]:
            return [rounded(x, plane) for plane, x in enumerate(contexts[index])]

        def rounded(x: np.ndarray, plane: int) -> np.ndarray:
            bins = profiles.direct_bins(plane // 2, demo.config.num_layers, 2)[plane % 2]
            return profiles.vectors(*profiles.round_vectors(x, bins), bins)

        for plane in range(0, demo.shape.planes, 2):
            bins = profiles.direct_bins(plane // 2, demo.config.num_layers, 2)[0]
            symbols = np.concatenate([profiles.round_vectors(c[plane], bins)[0] for c in contexts])
            starts = profiles.smoothed(profiles.counts(symbols, profiles.DIRECT_SYMBOLS))
            total += len(range_coder.encode(symbols[None], starts[None], cut=profiles.CUT_TOKENS)[0])
        sizes.append(8 * total / (len(contexts) * demo.numbers / 2))
        scores.append(demo.score(planes, rotated=rotated))
    return Claim(
        claim="keys are coded in fewer bits before rotation than after, and lose no more",
        measured=f"keys at level 2 of the official code's bins: {sizes[0]:.3f} bits rotated (KL "
        f"{scores[0].divergence:.4f}), {sizes[1]:.3f} bits before (KL {scores[1].divergence:.4f})",
        required="fewer bits and at most 1.05 times the divergence",
        passed=sizes[1] < sizes[0] and scores[1].divergence <= 1.05 * scores[0].divergence,
    )


# ---- time ----------------------------------------------------------------------------------------------------------

PAPER_DEADLINES, PAPER_CHUNK_SECONDS = np.linspace(0.5, 2.0, 7), 0.2
"""Seconds, of the official scripts: from the shorter to the longer of their deadlines; a chunk recomputed."""
RANDOM = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}


def random_model(folder: Path) -> ModelConfig:
    """A model of random weights, with the demo model's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RANDOM))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_directory("demo") / name).read_bytes())
    config = ModelConfig.from_directory(folder)
    rng = np.random.default_rng(0)
    specs = [(t.name, np.float16, t.shape) for t in config.tensors()]
    with SafetensorsWriter(folder / "model.safetensors", specs) as writer:
        for name, _, shape in specs:
            spread = shape[-1] ** -0.5
            numbers = 1 + 0 * rng.random(shape) if len(shape) == 1 else spread * rng.standard_normal(shape, np.float32)
            writer.write(name, numbers.astype(np.float16))
    return config


class Serving:
    """An engine with random weights, a context saved at all levels, and server processes for it."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes
        self.config = config = random_model(folder / "model")
        self.shape = Shape.of(config)
        with Checkpoint(folder / "model", config) as checkpoint:
            arena = Arena(1 << 40, Ledger())
            weights = load_weights(config, checkpoint, resolve(config, "float16"), arena)
            self.fingerprint = checkpoint.fingerprint()
        self.num_tokens = sizes.stream_chunks * sizes.chunk_tokens
        self.decoder = Decoder(config, weights, arena, segment_tokens=sizes.chunk_tokens)
        self.cache = kv.build("float16", cache_shape(config), arena, self.num_tokens + 16)
        self.profile = learn(ModelText(folder / "model", None, max_tokens=1024), "mean")
        self.tokens = np.random.default_rng(1).integers(3, config.vocab_size, self.num_tokens)
        self.recompute_seconds = min(self.recompute() for _ in range(3))
        self.file = folder / "context"
        self.bytes = self._save(weights.specs)
        self.decode_seconds = min(self.decode() for _ in range(5))
        self.cache.truncate(0)
        measured = self.receiver()
        measured.measure(self.num_tokens, sizes.chunk_tokens)
        self.costs = measured.costs

    def receiver(self) -> Receiver:
        return Receiver(
            self.cache, self.decoder, self.config, model=self.fingerprint, profile=self.profile, form="mean"
        )

    def recompute(self) -> float:
        """Seconds to prefill the whole context from text."""
        self.cache.truncate(0)
        began = time.perf_counter()
        for begin in range(0, self.num_tokens, self.sizes.chunk_tokens):
            self.decoder.hidden(self.tokens[begin : begin + self.sizes.chunk_tokens], self.cache)
        return time.perf_counter() - began

    def _save(self, specs: Mapping[str, str]) -> dict[int, int]:
        arrays, total, step = {}, dict.fromkeys(LEVELS, 0), self.sizes.chunk_tokens
        self.chunks: dict[int, list[bytes]] = {level: [] for level in LEVELS}
        for level in LEVELS:
            for index, begin in enumerate(range(0, self.num_tokens, step)):
                data = encode_chunk(
                    cache_planes(self.cache, self.config, begin, begin + step), self.shape, model=self.fingerprint,
                    first=begin, level=level, form="mean", profile=self.profile,
                )  # fmt: skip
                arrays[chunk_name(index, level)] = np.frombuffer(data, np.uint8)
                self.chunks[level].append(data)
                total[level] += len(data)
        origin = Origin(model=self.fingerprint, weights="float16", specs=specs)
        content = {"codec": "cachegen(form=mean)", "chunk_tokens": [step] * self.sizes.stream_chunks}
        write(self.file, arrays, self.tokens.tolist(), origin, content)
        return total

    def index(self) -> Index:
        """What a server of the context says of it."""
        return Index(model=self.fingerprint, weights="float16", weights_sha256="", codec="cachegen(form=mean)",
                     chunk_tokens=(self.sizes.chunk_tokens,) * self.sizes.stream_chunks, texts=(),
                     sizes={v: tuple(map(len, chunks)) for v, chunks in self.chunks.items()})  # fmt: skip

    @property
    def raw_bytes(self) -> int:
        """The context in float16."""
        return 2 * self.shape.planes * self.num_tokens * self.shape.channels

    def decode(self) -> float:
        """Seconds to decode the finest level into the engine's cache."""
        self.cache.truncate(0)
        began = time.perf_counter()
        for data in self.chunks[LEVELS[-1]]:
            chunk = Chunk(data, self.shape, model=self.fingerprint, profile=self.profile)
            chunk.append_to(self.cache, self.config)
        return time.perf_counter() - began

    @contextlib.contextmanager
    def server(self, rates: tuple[float, ...], step_seconds: float) -> Iterator[tuple[str, int]]:
        """Where a server process of its own can be reached."""
        joined = ",".join(f"{rate:.0f}B/s" for rate in rates)
        command = [sys.executable, "-m", "memwall", "stream", str(self.file), "--rate", joined,
                   "--rate-seconds", str(step_seconds), "--quiet"]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout is not None
                host, port = process.stdout.readline().strip().removeprefix("tcp://").split(":")
                yield host, int(port)
            finally:
                process.terminate()

    def request(self, link: ChunkLink, index: Index, slo_seconds: float) -> Request:
        """A context to fetch by an engine that knows what it measured at its start."""
        self.cache.truncate(0)
        receiver = self.receiver()
        receiver.costs = copy.deepcopy(self.costs)
        return Request(link=link, index=index, receiver=receiver, slo_seconds=slo_seconds,
                       num_chunks=self.sizes.stream_chunks)  # fmt: skip

    def on_clock(self, trace: Trace, slo: float, fixed: int | None) -> tuple[float, str]:
        """The same on a virtual clock, where all takes as long as it took alone."""
        truth = Costs(growth=self.costs.growth)
        truth.text = Pace(0.0, truth.work(0, self.num_tokens) / self.recompute_seconds)
        truth.decoding = Pace(0.0, self.num_tokens / self.decode_seconds)
        return simulated(self.request(ChunkLink(("", 0)), self.index(), slo), truth, trace, fixed)

    def fetch(self, address: tuple[str, int], slo: float, fixed: int | None, prior: float | None = None) -> Request:
        """One context; the trace begins anew with the connection. A controller of its own knows nothing of the link."""
        with ChunkLink(address) as link:
            one = self.request(link, link.index(), slo)
            StreamingController(fixed=fixed, prior_bytes_per_s=prior).run([one])
        return one

    def run(self, rates: tuple[float, ...], step: float, slo: float, fixed: int | None, prior: float | None) -> Request:
        """One context from a server of its own over a link of those rates."""
        with self.server(rates, step) as address:
            return self.fetch(address, slo, fixed, prior)


def forms_of(request: Request) -> str:
    """The chunks' forms in a word: T for text, digits for levels."""
    return "".join("T" if sent.form == TEXT else str(sent.form) for sent in request.sent)


def finest(forms: str) -> int:
    """The finest level among a context's forms, 0 where all of it came as text."""
    return max((int(form) for form in forms if form != "T"), default=0)


class VirtualProcessor:
    """Works through a backlog on a virtual clock, in the seconds that these costs say."""

    def __init__(self, backlog: Backlog, truth: Costs) -> None:
        self.backlog, self.truth = backlog, truth
        self.begins: list[float] = []
        self.free = 0.0
        self._under_way: list[tuple[float, float, Task]] = []

    def give(self, task: Task, now: float) -> None:
        """A chunk that has arrived."""
        begin = max(self.free, now)
        real = Task(costs=self.truth, text=task.text, first=task.first, num_tokens=task.num_tokens)
        self.free = begin + real.seconds()
        self.begins.append(begin)
        self._under_way.append((begin, self.free, task))
        self.backlog.add(task)

    def advance(self, now: float) -> None:
        """What happens until then: chunks begin and end, and their times become known."""
        while self._under_way and self._under_way[0][0] <= now:
            begin, end, task = self._under_way[0]
            self.backlog.begin(begin)
            if end > now:
                return
            self.backlog.end()
            if task.text:
                task.costs.text.saw(task.costs.work(task.first, task.num_tokens), end - begin)
            else:
                task.costs.decoding.saw(task.num_tokens, end - begin)
            self._under_way.pop(0)


def simulated(request: Request, truth: Costs, trace: Trace, fixed: int | None) -> tuple[float, str]:
    """(seconds, forms) of one context on a virtual clock: the controller itself, which knows the costs that the request
    brings, and a processor that takes those of `truth`."""
    now = 0.0
    controller = StreamingController(fixed=fixed, clock=lambda: now)
    processor, forms = VirtualProcessor(controller.backlog, truth), ""
    for chunk, tokens in enumerate(request.index.chunk_tokens):
        processor.advance(now)
        form = controller.form(request, chunk)
        nbytes = 4 * tokens if form == TEXT else request.index.sizes[form][chunk]
        arrives = trace.arrival(now, nbytes)
        if nbytes >= LEAST_MEASURED_BYTES:
            controller.link.saw(nbytes, arrives - now)
        processor.advance(arrives)
        processor.give(request.task(chunk, chunk + 1, form), arrives)
        # no more chunks wait than there is room for
        now = max(arrives, processor.begins[chunk - QUEUED_CHUNKS]) if chunk >= QUEUED_CHUNKS else arrives
        forms += "T" if form == TEXT else str(form)
    return processor.free, forms


def throughput_claim(serving: Serving, fastest_bytes_per_s: float) -> Claim:
    """What one machine decodes, beside the fastest link of these experiments."""
    fine = serving.bytes[LEVELS[-1]]
    made, taken = serving.raw_bytes / serving.decode_seconds, fine / serving.decode_seconds
    gain = serving.recompute_seconds / serving.decode_seconds
    return Claim(
        claim="decoding keeps up with the link, and is faster than recomputing",
        measured=f"finest level into the engine's cache: {made / 1e6:.0f} MB of float16 keys and values a second from "
        f"{taken / 1e6:.1f} MB/s of stream, {kernels.num_threads()} threads; the fastest link here brings "
        f"{fastest_bytes_per_s / 1e6:.1f} MB/s; recomputing takes {gain:.1f} times as long. A link of 10 Gbit/s would "
        f"bring {10e9 / 8 / 1e6:.0f} MB/s",
        required="more than the link brings, and more than 1 time",
        passed=taken > fastest_bytes_per_s and gain > 1,
    )


def first_token_claims(serving: Serving, tick: Tick, quick: bool) -> Iterator[Claim]:
    """Time to a ready context over bandwidths, for fixed forms; and what the controller picks for a deadline."""
    fine, seconds = serving.bytes[LEVELS[-1]], serving.recompute_seconds
    deadline = 0.6 * seconds
    shares = (
        (0.2, 1.0, 4.0) if quick else (0.1, 0.3, 1.0, 2.0, 4.0)
    )  # of the rate that brings the finest in the deadline
    rows: list[str] = []
    picked: list[str] = []
    text_first = bits_after = raw_gain = 0.0
    for share in shares:
        rate = share * fine / deadline
        tick(f"link of {rate * 8 / 1e6:.1f} Mbit/s")
        took = {fixed: serving.run((rate,), 1.0, deadline, fixed, rate).seconds for fixed in (TEXT, 1, 3)}
        adaptive = serving.run((rate,), 1.0, deadline, None, rate)
        raw = serving.raw_bytes / rate
        picked.append(forms_of(adaptive))
        rows.append(
            f"{rate * 8 / 1e6:.1f} Mbit/s: text {took[TEXT]:.2f}, level 1 {took[1]:.2f}, level 3 {took[3]:.2f}, raw "
            f"float16 {raw:.2f} s; controller {picked[-1]} {adaptive.seconds:.2f} s"
        )
        text_first = text_first or took[1] - took[TEXT]
        bits_after = took[TEXT] - took[3]
        raw_gain = raw / took[3]
    shown = f"deadline {deadline:.2f} s; " + "; ".join(rows)
    yield Claim(
        claim="text is ready first over a slow link, streams over a fast one (emulated; a server process on loopback)",
        measured=shown,
        required="text before level 1 at the lowest rate, level 3 before text at the highest",
        passed=text_first > 0 and bits_after > 0,
    )
    yield Claim(
        claim="the controller takes finer levels over faster links",
        measured=", ".join(f"{share:g} of the rate for level 3: {forms}" for share, forms in zip(shares, picked))
        + " (T text, 1 to 3 levels, chunk by chunk; text loses nothing and is taken once all that is left fits)",
        required="level 3 first at the highest rate, none above level 1 at the lowest, the finest never falls",
        passed=picked[-1][0] == "3"
        and finest(picked[0]) <= 1
        and all(finest(a) <= finest(b) for a, b in itertools.pairwise(picked)),
    )
    yield Claim(
        claim="the finest stream is ready before raw float16 keys and values could be sent over the same link",
        measured=f"at the highest rate raw takes {raw_gain:.2f} times as long, its decoding not counted",
        required="more than 1 time",
        passed=raw_gain > 1,
    )


WAYS: dict[str, int | None] = {"controller": None, "level 1": 1, "level 2": 2, "level 3": 3, "text": TEXT}
SPEEDS = (0.5, 1.0, 2.0)
"""Mean rates of a trace, in those that bring the finest level in the deadline."""


@dataclass(slots=True)
class Missed:
    """Contexts that were not ready in time, by way, and in what forms they came. speeds: misses of each of `SPEEDS`."""

    tries: int = 0
    short_tries: int = 0
    late: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    short: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    form: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
    speeds: dict[str, list[int]] = field(default_factory=lambda: {way: [0] * len(SPEEDS) for way in WAYS})

    def add(self, share: float, speed: float, took: Mapping[str, tuple[float, str]], deadline: float) -> None:
        """One context, fetched in each way: (seconds, forms)."""
        self.tries += 1
        self.short_tries += int(share < 1)
        for way, (seconds, forms) in took.items():
            late = int(seconds > deadline)
            self.late[way] += late
            self.short[way] += late if share < 1 else 0
            self.speeds[way][SPEEDS.index(speed)] += late
            self.form[way] += float(np.mean([4 if form == "T" else int(form) for form in forms]))

    @property
    def fewest_others(self) -> int:
        """Misses of the best of the fixed levels and text."""
        return min(missed for way, missed in self.late.items() if way != "controller")

    def told(self) -> str:
        """All ways, and how many they missed at each speed."""
        rates = (f"{way} {late / self.tries:.1%}" for way, late in self.late.items())
        slow, even, fast = (list(late) for late in zip(*self.speeds.values()))
        return (
            f"{', '.join(rates)} of {self.tries} (in this order, at half the rate {slow}, at the rate {even}, at twice "
            f"the rate {fast} of {self.tries // len(SPEEDS)} each)"
        )


def deadline_claims(serving: Serving, data: Path | None, tick: Tick) -> Iterator[Claim]:
    """Contexts not ready in time: the controller, each fixed level, and text alone, over the same traces.

    On a virtual clock, so that all deadlines and rates can be gone through, with this machine's costs; then some over
    sockets, to see whether the clock tells the truth. Deadlines are those of the official scripts, 0.5 to 2 s where a
    chunk takes 0.2 s to recompute: some of them leave time for text alone, some do not. (An earlier form had 0.3 to 0.9
    of the time for text only. There the controller missed 36 % and the coarsest level, which nothing but text can be
    quicker than, 27 %.)

    Over sockets an earlier controller missed 24 % of 70 at the middle speed, level 1 14 %: it left no time to spare,
    and took recomputing to cost the same behind any context. It then got a measured model of that cost and margins of
    past errors (`kv.cachegen_costs`), tried on drawn traces on a virtual clock with noise. In the same step sockets
    were given the clock's three speeds: at the middle one the coarsest level hardly ever fails, and a level that is
    fixed in advance is right for one speed.
    """
    sizes = serving.sizes
    traces, source = traces_of(data, 10)
    mean = float(np.mean(traces))
    shares = PAPER_DEADLINES / (PAPER_CHUNK_SECONDS * sizes.stream_chunks)
    clock = Missed()
    for share, speed, gbits in itertools.product(shares, SPEEDS, traces):
        trace, deadline = scaled(serving, gbits, share, speed / mean)
        clock.add(share, speed, {way: serving.on_clock(trace, deadline, x) for way, x in WAYS.items()}, deadline)
    shown = ", ".join(f"{way} {late / clock.tries:.1%} (mean form {clock.form[way] / clock.tries:.2f})"
                      for way, late in clock.late.items())  # fmt: skip
    yield Claim(
        claim="over recorded bandwidth the controller misses fewer deadlines than levels 2 and 3 and than text, in "
        "finer forms than level 1",
        measured=f"missed of {clock.tries}: {shown}; text counts as 4 ({source}, scaled, 7 deadlines, 3 speeds, "
        "virtual clock)",
        required="fewer than each of the three, mean form above 1",
        passed=all(clock.late["controller"] < clock.late[way] for way in ("level 2", "level 3", "text"))
        and clock.form["controller"] / clock.tries > 1,
    )
    yield Claim(
        claim="over recorded bandwidth the controller misses fewer deadlines than any fixed level, the coarsest too",
        measured=f"{clock.told()}; of the {clock.short_tries} whose deadline is too short for text: "
        + ", ".join(f"{way} {missed / clock.short_tries:.1%}" for way, missed in clock.short.items()),
        required="fewer",
        passed=clock.late["controller"] < clock.fewest_others,
    )
    shares = np.array(sizes.deadlines) / (PAPER_CHUNK_SECONDS * sizes.stream_chunks)
    real, ratios = over_sockets(serving, traces[: sizes.traces], mean, shares, tick)
    yield Claim(
        claim="so it does over sockets, by the clock on the wall",
        measured=f"{real.told()}; mean form of the controller {real.form['controller'] / real.tries:.2f}; it took "
        f"{np.median(ratios):.2f} times as long as the virtual clock says in the median",
        required="fewer than any fixed level and than text",
        passed=real.late["controller"] < real.fewest_others,
    )


def over_sockets(
    serving: Serving, traces: list[list[float]], mean: float, shares: np.ndarray, tick: Tick
) -> tuple[Missed, list[float]]:
    """(misses, the controller's seconds over those of the virtual clock) of contexts that a server process sends."""
    missed, ratios = Missed(), []
    for number, gbits in enumerate(traces):
        for share in shares:
            tick(f"trace {number + 1} over sockets")
            for speed in SPEEDS:
                trace, deadline = scaled(serving, gbits, share, speed / mean)
                with serving.server(trace.rates, trace.step_seconds) as address:
                    came = {way: serving.fetch(address, deadline, fixed) for way, fixed in WAYS.items()}
                missed.add(share, speed, {way: (r.seconds, forms_of(r)) for way, r in came.items()}, deadline)
                ratios.append(came["controller"].seconds / serving.on_clock(trace, deadline, None)[0])
    return missed, ratios


def scaled(serving: Serving, gbits: list[float], share: float, faster: float) -> tuple[Trace, float]:
    """(trace, deadline): rates at which the finest level takes the deadline, times `faster`; four steps in it."""
    deadline = share * serving.recompute_seconds
    scale = faster * serving.bytes[LEVELS[-1]] / deadline
    return Trace(tuple(scale * g for g in gbits), deadline / 4), deadline


def drop_claim(serving: Serving, tick: Tick) -> Claim:
    """The rate falls to a twentieth while the context is under way: nothing before the fall may know of it. It falls
    during the third of six chunks, since the controller begins with the coarsest level; at a quarter of the deadline,
    where it fell in an earlier form, five were chosen, and the claim hung on the last one.
    """
    tick("a sudden drop")
    deadline = 0.45 * serving.recompute_seconds
    rate = 2.0 * serving.bytes[LEVELS[-1]] / deadline
    step = deadline / 16
    steady = serving.run((rate,), step, deadline, None, rate)
    falling = (rate, *(rate / 20,) * 160)
    dropped = serving.run(falling, step, deadline, None, rate)
    fixed = serving.run(falling, step, deadline, LEVELS[-1], rate)
    return Claim(
        claim="a sudden drop changes what is chosen after it, not before, and less is lost than at a fixed level",
        measured=f"steady {forms_of(steady)}; dropped after {1e3 * step:.0f} ms {forms_of(dropped)}, ready in "
        f"{dropped.seconds:.2f} s of {deadline:.2f}; level 3 alone {fixed.seconds:.2f} s",
        required="the same first form, another later, and sooner than level 3 alone",
        passed=forms_of(steady)[0] == forms_of(dropped)[0]
        and forms_of(steady) != forms_of(dropped)
        and dropped.seconds < fixed.seconds,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """All claims; quick: fewer tokens, rates and traces."""
    sizes = QUICK if quick else FULL
    steps, done = 20 + sizes.traces * len(sizes.deadlines) + (3 if quick else 5), 0

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, steps), steps, what)
        done += 1

    tick("demo model")
    known = Coded(Demo(data, sizes), tick)
    claims = [round_trip_claim(known), *size_claims(known, tick), grouping_claim(known), *delta_claims(known)]
    claims += [*sensitivity_claims(known, tick), tables_claim(known), rotation_claim(known)]
    del known
    with tempfile.TemporaryDirectory() as folder:
        tick("model of random weights")
        serving = Serving(Path(folder), sizes)
        fastest = 4.0 * serving.bytes[LEVELS[-1]] / (0.6 * serving.recompute_seconds)
        claims += [throughput_claim(serving, fastest), *first_token_claims(serving, tick, quick)]
        claims += [*deadline_claims(serving, data, tick), drop_claim(serving, tick)]
    gpu = "on a GPU, decoding with a thread a stream beats a full prefill, and overlaps the copy"
    return [*claims, not_run(gpu, "ratio above 1")]


if __name__ == "__main__":
    sys.exit(main("cachegen", sys.modules[__name__]))
