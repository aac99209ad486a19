"""SpQR's claims: perplexity at equal measured bits, what each part of the mechanism is worth, bytes, and speed.

Forms are compared on the bundled demo model. Every variant goes through the whole model layer by layer, each layer
calibrated on what the compressed ones before it hand on; the same held-out tokens are scored in exact arithmetic, so
differences are those of the weights. Bits are the bytes of the stored form over the weights of the linear layers, row
offsets, order of columns and padding included (embedding and head stay float16 in all variants). The threshold is the
one whose forms take as many bits as GPTQ's groups of 32: found in steps of a half, as in an earlier form of this file,
it left them a tenth of a bit short, and SpQR, over one draw of the calibration text, 0.04 % above GPTQ.

A finding, which is a claim that fails in the run of 29 November 2026: at the published damping of 1 SpQR's statistics
are 0.07 % +- 0.25 % behind GPTQ's groups of 52 at its own damping of 0.01, which is no difference; they are ahead of
its groups of 64 and 128, and of all three at equal dampings. The code's own 0.01 is better than 1 on this model and no
better on one of 11.7 million weights calibrated on other text (92.25 and 92.23), so the recipe's stays.

Ablations compare output errors over one set of calibration statistics. Speed is that of products with random weights in
the shapes of a model of a thousand million weights, one token at a time, taken alternately.

Text: `--data` a UTF-8 file (its first half calibrates, the second is scored); the bundled calibration text and the
planner's held-out text otherwise.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kernels
from memwall.claims import Claim, Progress, alternately, main, not_run
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.calibration import (
    BUNDLED_TEXT,
    CalibrationSettings,
    LayerStream,
    PromptCache,
    shared_input,
    token_sequences,
)
from memwall.compress.gptq import Gptq
from memwall.compress.model import compress_model
from memwall.compress.rtn import RoundToNearest
from memwall.compress.spqr import Costly, Spqr, SpqrColumns, mean_cost
from memwall.compress.sweep import Factor, sweep
from memwall.engine.quality import log_softmax
from memwall.formats import Packed, codec
from memwall.formats.spqr import Outliers, Parts, SpqrCodec, pack, second_level, unpack
from memwall.memory import Arena, Ledger
from memwall.models import model_directory
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.plan.choose import held_out_text

NONE = 1e30
PICKED = 0.3  # about 1 % of this model's weights are outliers then
MATCHED_BITS = 4.0
WINDOW = 512
# hidden, feed-forward and key widths of a model of 973 million weights in 16 layers
SHAPES_1B = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))
OUTLIERS_1B = 0.01
DECODED = "decoded, then CSR"

Compress = Callable[[np.ndarray, Statistics], Packed]


DRAWS = 4
"""Of calibration windows, where margins are narrow."""


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    study = Study(data, 2048 if quick else 16_384, 1024 if quick else 8192, 2 if quick else 1 << 30)
    steps: list[tuple[str, Callable[[], list[Claim]]]] = [
        ("matched bits", lambda: matched_bits(study, quick)),
        ("bilevel", lambda: bilevel(study, 1 if quick else DRAWS)),
        ("ablations", lambda: ablations(study)),
        ("outliers", lambda: outliers(study)),
        ("order of second level", lambda: second_level_order(study)),
        ("files", lambda: files(study)),
        ("speed", lambda: speed(2 if quick else 16, 3 if quick else 9)),
    ]
    claims: list[Claim] = []
    for index, (name, step) in enumerate(steps):
        if progress is not None:
            progress(index, len(steps), name)
        claims += step()
    return [
        *claims,
        not_run("on a GPU a 7B model generates faster than in 16 bits, and slower with a generic sparse library",
                "at least 1.15 times; below 1"),
    ]  # fmt: skip


# ---- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Perplexity, and bits per weight of the linear layers as stored."""

    perplexity: float
    bits: float

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} at {self.bits:.2f} bits"


@dataclass(frozen=True)
class Drawn:
    """One variant over several draws of the calibration text, the same ones for all. logs: of perplexities [draws]."""

    logs: np.ndarray
    bits: float

    def __str__(self) -> str:
        return str(Result(float(np.exp(self.logs.mean())), self.bits))

    def below(self, other: Drawn) -> tuple[float, float]:
        """How far below the other in log-perplexity, draw by draw: the mean and its standard error (0 of one draw)."""
        gaps = other.logs - self.logs
        return float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0


class Study:
    """The demo model, calibration and held-out tokens; only its first layers are compressed where fewer are asked."""

    def __init__(self, data: Path | None, calibration_tokens: int, scored_tokens: int, most_layers: int) -> None:
        self.folder = model_directory("demo")
        self.config = ModelConfig.from_directory(self.folder)
        self.checkpoint = Checkpoint(self.folder, self.config)
        tokenizer = Tokenizer.from_directory(self.folder, self.config.vocab_size)
        if data is None:
            calibration, scored, name = BUNDLED_TEXT.read_text(encoding="utf-8"), held_out_text(), "the bundled text"
        else:
            text = data.read_text(encoding="utf-8")
            calibration, scored, name = text[: len(text) // 2], text[len(text) // 2 :], str(data)
        read = CalibrationSettings(max_tokens=calibration_tokens, sequence_tokens=WINDOW)
        self.calibration = token_sequences(calibration, tokenizer, self.config, read, name)
        whole = CalibrationSettings(max_tokens=1 << 20, sequence_tokens=WINDOW)
        self._all_windows = token_sequences(calibration, tokenizer, self.config, whole, name)
        read = CalibrationSettings(max_tokens=scored_tokens, sequence_tokens=WINDOW)
        self.scored = token_sequences(scored, tokenizer, self.config, read, name)
        self.num_layers = min(self.config.num_layers, most_layers)
        self.linears = [t for t in self.config.tensors() if t.role == "linear" and (t.layer or 0) < self.num_layers]
        self._statistics: dict[str, Statistics] = {}
        self._known: dict[str, Result] = {}
        self.matched: Result | None = None
        self.float = self.perplexity({})

    def perplexity(self, packed: dict[str, Packed]) -> float:
        """Of the held-out tokens with these matrices in place, in exact arithmetic."""
        arena = Arena(1 << 40, Ledger())
        weights = load_weights(self.config, self.checkpoint, resolve(self.config, "float16"), arena)
        for name, form in packed.items():
            weights.replace(name, readable(form))
        decoder = Decoder(self.config, weights, arena, segment_tokens=WINDOW, logit_rows=WINDOW, exact=True)
        loss, count = 0.0, 0
        for window in self.scored:
            logits = decoder.forward(window[:-1], PromptCache(self.config), all_logits=True)
            loss -= float(log_softmax(logits)[np.arange(len(window) - 1), window[1:]].sum(dtype=np.float64))
            count += len(window) - 1
        decoder.release()
        weights.release()
        return float(np.exp(loss / count))

    def compressed(self, compress: Compress) -> dict[str, Packed]:
        """All linear layers in turn, each seeing what the compressed ones before it make of the calibration text."""
        stream = LayerStream(self.config, self.checkpoint, self.calibration, Arena(1 << 40, Ledger()))
        stream.embed()
        made: dict[str, Packed] = {}
        for layer in range(self.num_layers):
            names = [t.name for t in self.linears if t.layer == layer]
            collector = stream.collect(layer, names)
            statistics = collector.finish()
            forms = {n: compress(self.checkpoint.alone(n), statistics[shared_input(n)]) for n in names}
            collector.release()
            stream.advance(layer, {name: readable(form) for name, form in forms.items()})
            made.update(forms)
        return made

    def score(self, name: str, compress: Compress) -> Result:
        """Perplexity and bits of one variant; known ones are not made again."""
        if name not in self._known:
            made = self.compressed(compress)
            self._known[name] = Result(self.perplexity(made), bits_of(made))
        return self._known[name]

    def mean_score(self, name: str, compress: Compress, draws: int) -> Drawn:
        """The same over several draws of as many calibration windows out of the whole text, the first as they stand.
        One draw's differences are those of its roundings as much as of the methods.
        """
        usual, found = self.calibration, [self.score(name, compress)]
        try:
            for draw in range(1, draws):
                chosen = np.random.default_rng(draw).permutation(len(self._all_windows))[: len(usual)]
                self.calibration = self._all_windows[chosen]
                found.append(self.score(f"{name}, draw {draw}", compress))
        finally:
            self.calibration = usual
        return Drawn(np.log([each.perplexity for each in found]), float(np.mean([each.bits for each in found])))

    def layers(self) -> list[tuple[np.ndarray, Statistics]]:
        """Weight and input statistics of every linear layer of the float model, for comparisons of output errors."""
        if not self._statistics:
            stream = LayerStream(self.config, self.checkpoint, self.calibration, Arena(1 << 40, Ledger()))
            stream.embed()
            for layer in range(self.num_layers):
                names = [t.name for t in self.linears if t.layer == layer]
                for name, held in stream.collect(layer, names, advance=True).finish().items():
                    self._statistics[name] = Statistics(held.hessian.copy(), held.num_tokens)
        return [
            (self.checkpoint.alone(t.name).astype(np.float32), self._statistics[shared_input(t.name)])
            for t in self.linears
        ]


def readable(form: Packed) -> Packed:
    """The form itself where kernels read it, else its values: groups that no tile has, for comparison."""
    if form.spec.endswith("-rows"):
        return codec("float32").encode(codec(form.spec).decode(form))
    return form


def bits_of(made: Mapping[Any, Packed]) -> float:
    return 8 * sum(form.nbytes for form in made.values()) / sum(form.size for form in made.values())


def nearest(spec: str) -> Compress:
    return lambda weight, _: RoundToNearest().compress(weight, None, MethodConfig(spec=spec))


def gptq(spec: str, damping: float = Gptq.damping) -> Compress:
    """With columns in the order of their inputs, as memwall compresses."""
    form = MethodConfig(spec=spec, activation_order=True, damping=damping)
    return lambda weight, statistics: Gptq().compress(weight, statistics, form)


def spqr(bits: int, method: Spqr, damping: float = Spqr.damping) -> Compress:
    form = MethodConfig(spec=f"spqr{bits}", damping=damping)
    return lambda weight, statistics: method.compress(weight, statistics, form)


# ---- perplexity ----------------------------------------------------------------------------------------------------


def threshold_for(study: Study, bits: int, most_bits: float) -> float:
    """The smallest threshold, to 3 %, whose forms take at most `most_bits` on the float model's layers."""

    def taken(threshold: float) -> float:
        made = (spqr(bits, Spqr(outlier_threshold=threshold))(*layer) for layer in study.layers())
        return bits_of(dict(enumerate(made)))

    low = high = 0.2
    while taken(high) > most_bits:
        low, high = high, 1.5 * high
    while high > 1.03 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if taken(middle) > most_bits else (low, middle)
    return high


def matched_bits(study: Study, quick: bool) -> list[Claim]:
    """The narrow order by its means over draws of the calibration text, what stands beside it by the first."""
    draws = 1 if quick else DRAWS
    threshold = threshold_for(study, 3, MATCHED_BITS - 0.03)
    ours = study.mean_score("spqr3 matched", spqr(3, Spqr(outlier_threshold=threshold)), draws)
    study.matched = study.score("spqr3 matched", spqr(3, Spqr(outlier_threshold=threshold)))
    # at 4 bits a weight with 16-bit statistics: 3-bit codes in groups of 32, or 2-bit codes in groups of 16
    plain = study.score("rtn g32", nearest("int3-g32-asym"))
    rounded = Drawn(np.full(draws, np.log(plain.perplexity)), plain.bits)  # which no calibration text changes
    swept = study.mean_score("gptq g32", gptq("int3-g32-asym"), draws)
    tiny = study.mean_score("gptq 2 g16", gptq("int2-g16-asym-rows"), draws)
    large = study.score(f"gptq g128 {Gptq.damping}", gptq("int3-g128-asym"))
    four = study.score("spqr4", spqr(4, Spqr()))
    gap, error = ours.below(swept)
    shown = (
        f"float {study.float:.3f}; rounding {rounded}; GPTQ {swept}, 2-bit codes in groups of 16 {tiny}; SpQR {ours}, "
        f"{gap:.2%} +- {error:.2%} below GPTQ (means over {draws} draws of the calibration text)"
    )
    more = f"; beside it GPTQ in groups of 128 {large}"
    if not quick:
        more += f", 3-bit codes in groups of 16 {study.score('gptq 3 g16', gptq('int3-g16-asym-rows'))}"
        more += f", 4-bit codes by rows {study.score('gptq 4 rows', gptq('int4-g1024-rows'))}"
    order = rounded.below(swept)[0] < 0 < gap and ours.below(tiny)[0] > 0
    return [
        Claim(
            claim="at equal measured bits perplexity orders rounding > GPTQ > SpQR, and GPTQ's small groups lose too",
            measured=shown + more + f" (outlier threshold {threshold:.2f})",
            required="strictly, SpQR with at most the others' bits and 3.6 to 4.0",
            passed=order and 3.6 <= ours.bits <= min(rounded.bits, swept.bits, tiny.bits),
        ),
        Claim(
            claim="with 4-bit codes SpQR is within 1 % of the float model's perplexity near 4.6 bits",
            measured=f"{four}, {four.perplexity / study.float - 1:+.2%}",
            required="at most +1 %, at most 4.9 bits (rows of 256 weights pay 0.13 for their offsets)",
            passed=four.perplexity <= 1.01 * study.float and four.bits <= 4.9,
        ),
    ]


def bilevel(study: Study, draws: int) -> list[Claim]:
    """Each side under the damping of its own method, as first asked; and, added when that failed, both under the same.

    The second comparison lets only the statistics differ. It was set up after the first had been seen: it does not
    replace the first. Over one draw of the calibration text the margin of the first was 0.03 %, a tenth of what the
    order of float sums alone changes from run to run: both are judged by the mean over several draws.
    """
    groups = {52: "int3-g52-asym-rows", 64: "int3-g64-asym", 128: "int3-g128-asym"}
    ours: dict[float, Drawn] = {}
    others: dict[float, dict[int, Drawn]] = {}
    for damping in (Gptq.damping, Spqr.damping):
        plain = spqr(3, Spqr(outlier_threshold=NONE), damping)
        ours[damping] = study.mean_score(f"spqr3 none {damping}", plain, draws)
        others[damping] = {
            g: study.mean_score(f"gptq g{g} {damping}", gptq(spec, damping), draws) for g, spec in groups.items()
        }

    def shown(left: float, right: float) -> str:
        told = []
        for group, result in others[right].items():
            gap, error = ours[left].below(result)
            told.append(f"{result} in groups of {group} ({gap:+.2%} +- {error:.2%} above it)")
        return f"{ours[left]} at damping {left:g} against {', '.join(told)} at {right:g}"

    def below(left: float, right: float) -> bool:
        equal = ours[left].bits - others[right][52].bits < 0.1
        return equal and all(ours[left].below(each)[0] > 0 for each in others[right].values())

    title = "without outliers, 3-bit statistics of groups of 16 beat 16-bit ones of large groups at equal bits"
    required = "below groups of 52, which take as many bits to 0.1, and below all larger ones"
    over = f" (means over {draws} draws of the calibration text, standard errors of differences draw by draw)"
    same = (Gptq.damping, Spqr.damping)
    return [
        Claim(claim=title, measured=shown(Spqr.damping, Gptq.damping) + over, required=required,
              passed=below(Spqr.damping, Gptq.damping)),
        Claim(claim=title + ", under the same damping", measured="; ".join(shown(each, each) for each in same) + over,
              required=required + ", at both dampings", passed=all(below(each, each) for each in same)),
    ]  # fmt: skip


def ablations(study: Study) -> list[Claim]:
    full = study.score("spqr3", spqr(3, Spqr()))
    simplified = study.score("spqr3 simplified", spqr(3, Spqr(simplified=True)))
    matched = study.matched
    equal = "" if matched is None else f"; at nearly its bits the full method has {matched}"
    identity = study.score("spqr3 identity", spqr(3, Spqr(order="identity")))
    return [
        Claim(claim="without leaving members out perplexity is no better",
              measured=f"{simplified} against {full}, with more outliers{equal}", required="at least as high",
              passed=simplified.perplexity >= full.perplexity),
        Claim(claim="with columns as they stand perplexity is no better than in the order of their inputs",
              measured=f"{identity} against {full}", required="at least as high",
              passed=identity.perplexity >= full.perplexity),
    ]  # fmt: skip


# ---- outliers ------------------------------------------------------------------------------------------------------


class Chosen(SpqrColumns):
    """Groups whose outliers were chosen beforehand, and the rule that keeps just those. mask: [rows, cols]."""

    def __init__(self, bits: int, mask: np.ndarray) -> None:
        super().__init__(bits, *mask.shape, None)
        self.mask = mask

    def left_out(self, index: int, values: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
        first = index * self.group
        return self.mask[:, first : first + values.shape[1]]

    def keep(self, column: int, values: np.ndarray, rounded: np.ndarray, weight: float) -> np.ndarray | None:
        return self.mask[:, column] if self.mask[:, column].any() else None


def ordered_layer(weight: np.ndarray, statistics: Statistics) -> tuple[np.ndarray, Factor]:
    factored = statistics.factor(Spqr.damping, True)
    return weight[:, factored.order], factored


def with_mask(weight: np.ndarray, statistics: Statistics, mask: np.ndarray) -> Packed:
    """Mask in the order of the columns."""
    ordered, factored = ordered_layer(weight, statistics)
    columns = Chosen(3, mask)
    columns.order = factored.order
    return sweep(ordered, factored.arranged(), columns, outliers=columns)


def lost(weight: np.ndarray, statistics: Statistics, form: Packed) -> float:
    """Share of the outputs' squared size."""
    return statistics.error(codec(form.spec).decode(form) - weight) / statistics.error(weight)


def mask_of(form: Packed) -> np.ndarray:
    parts = unpack(form)
    mask = np.zeros(form.shape, bool)
    if parts.outliers is not None:
        mask[parts.outliers.rows, parts.outliers.places] = True
    return mask


def outliers(study: Study) -> list[Claim]:
    layers, random = study.layers(), np.random.default_rng(0)
    curve: dict[float, float] = {}
    for threshold in (NONE, 1.0, 0.5, PICKED, 0.2, 0.1, 0.05):
        forms = [spqr(3, Spqr(outlier_threshold=threshold))(*layer) for layer in layers]
        share = sum(SpqrCodec.parse(f.spec).num_outliers for f in forms) / sum(f.size for f in forms)
        curve[share] = float(np.mean([lost(*layer, form) for layer, form in zip(layers, forms, strict=True)]))
    shares = sorted(curve)
    near = min(shares[1:-1], key=lambda share: abs(share - 0.01))
    slopes = [(curve[a] - curve[b]) / (b - a) for a, b in ((0.0, near), (near, shares[-1]))]
    picked = [spqr(3, Spqr(outlier_threshold=PICKED))(*layer) for layer in layers]
    same: dict[str, list[float]] = {"ours": [], "chosen by cost": [], "by magnitude": [], "at random": []}
    overlap = []
    for (weight, statistics), form in zip(layers, picked, strict=True):
        mask = mask_of(form)
        size = np.abs(ordered_layer(weight, statistics)[0])
        largest = np.zeros(mask.size, bool)
        largest[np.argsort(-size, axis=None, kind="stable")[: mask.sum()]] = True
        largest = largest.reshape(mask.shape)
        anywhere = random.permutation(mask.reshape(-1)).reshape(mask.shape)
        overlap.append((mask & largest).sum())
        masks = {"chosen by cost": mask, "by magnitude": largest, "at random": anywhere}
        same["ours"].append(lost(weight, statistics, form))
        for name, each in masks.items():
            same[name].append(lost(weight, statistics, with_mask(weight, statistics, each)))
    mean = {name: float(np.mean(values)) for name, values in same.items()}
    count = sum(mask_of(form).sum() for form in picked)
    none, share, alike = curve[0.0], count / sum(form.size for form in picked), sum(overlap) / count
    gains = {name: none - value for name, value in mean.items()}
    shown = "; ".join(f"{name} {value:.4f}" for name, value in mean.items())
    return [
        Claim(
            claim="error falls steeply for the first outliers and then flattens",
            measured="share of outputs lost: " + ", ".join(f"{curve[s]:.4f} at {s:.2%}" for s in shares),
            required=f"per outlier, up to {near:.2%} at least twice what is gained beyond",
            passed=slopes[0] >= 2 * slopes[1],
        ),
        Claim(
            claim="as many outliers chosen at random give nearly nothing",
            measured=f"share of outputs lost at {share:.2%} outliers: none {none:.4f}; {shown}",
            required="a tenth of the gain at most",
            passed=gains["at random"] <= 0.1 * gains["ours"],
        ),
        Claim(
            claim="the largest weights are other ones than the costliest, and keeping them is worse",
            measured=f"{alike:.0%} are the same; {shown}",
            required="less than half the same, error higher",
            passed=alike < 0.5 and mean["by magnitude"] > max(mean["ours"], mean["chosen by cost"]),
        ),
    ]


class Late(SpqrColumns):
    """Scales and zeros stay as they are while columns are swept, and are rounded when all are done."""

    def __init__(self, bits: int, num_rows: int, num_columns: int, limit: float | None) -> None:
        super().__init__(bits, num_rows, num_columns, limit)
        self.exact: list[tuple[np.ndarray, np.ndarray]] = []

    def store_statistics(self, index: int, scales: np.ndarray, zeros: np.ndarray) -> None:
        super().store_statistics(index, scales, zeros)
        self._scales, self._zeros = scales, zeros
        self.exact.append((scales, zeros))


def second_level_order(study: Study) -> list[Claim]:
    errors: dict[str, list[float]] = {"within": [], "after": []}
    for weight, statistics in study.layers():
        ordered, factored = ordered_layer(weight, statistics)
        limit = Spqr().outlier_threshold * mean_cost(ordered, factored.pivots)
        for name, kind in (("within", SpqrColumns), ("after", Late)):
            columns = kind(3, *weight.shape, limit)
            columns.order = factored.order
            form = sweep(ordered, factored.arranged(), columns, outliers=Costly(limit))
            errors[name].append(lost(weight, statistics, form))
    within, after = (float(np.mean(errors[name])) for name in ("within", "after"))
    return [
        Claim(
            claim="scales rounded before a group is swept lose less than scales rounded afterwards",
            measured=f"share of outputs lost: {within:.4f} against {after:.4f}",
            required="less",
            passed=within < after,
        )
    ]


# ---- bytes ---------------------------------------------------------------------------------------------------------


def files(study: Study) -> list[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        compress_model(study.folder, out, bits=3, method="spqr")
        with Checkpoint(out, study.config) as saved:
            saved.verify(digests=True)
            stored, formula, weights, count, kernel_bytes = 0, 0, 0, 0, 0
            for tensor in study.linears:
                packed = saved.packed(tensor.name)
                assert packed is not None
                rows, cols = tensor.shape
                n = SpqrCodec.parse(packed.spec).num_outliers
                stored += saved.stored_bytes(tensor.name)
                kernel_bytes += kernels.matrix(packed).nbytes
                formula += -(-rows // 16) * -(-cols // 32) * (64 * 3 + 40) + 2 * cols + 4 * (rows + 1) + 4 * n
                weights, count = weights + tensor.size, count + n
    paper = 3 + 6 / 16 + 64 / 256 + 32 * count / weights
    return [
        Claim(
            claim="files hold what the count of bits says, and products read those bytes and no others",
            measured=f"{stored:,} bytes in files, {formula:,} counted, {kernel_bytes:,} read by products: "
            f"{8 * stored / weights:.3f} bits, where the paper counts {paper:.3f} without offsets and order",
            required="equal",
            passed=stored == formula == kernel_bytes,
        )
    ]


# ---- speed ---------------------------------------------------------------------------------------------------------


def random_form(shape: tuple[int, int], bits: int, random: np.random.Generator) -> Packed:
    """Random codes with scales as weights have them, and outliers spread evenly."""
    rows, cols = shape
    groups = cols // 16
    scales = (0.01 * (1 + random.random((rows, groups)))).astype(np.float32)
    parts = Parts(
        codes=random.integers(0, 1 << bits, shape, np.uint8),
        scale_codes=np.empty((rows, groups), np.uint8),
        zero_codes=np.empty((rows, groups), np.uint8),
        second=np.empty((rows // 16, groups, 4), np.float16),
        order=random.permutation(cols),
    )
    for group in range(groups):
        parts.scale_codes[:, group], parts.second[:, group, :2] = second_level(scales[:, group], bits, "scale")
        parts.zero_codes[:, group], parts.second[:, group, 2:] = second_level(scales[:, group] * 300, bits, "zero")
    mask = random.random(shape, np.float32) < OUTLIERS_1B
    where = np.nonzero(mask)
    kept = Outliers(rows=where[0], places=where[1], values=random.standard_normal(len(where[0])).astype(np.float16))
    return pack(bits, replace(parts, outliers=kept))


def speed(num_layers: int, rounds: int) -> list[Claim]:
    try:
        from scipy.sparse import csr_array
    except ImportError:
        csr_array = None
    random = np.random.default_rng(0)
    # one set of numbers a shape, copied for every layer: what is read is as large as the model
    made = {shape: random_form(shape, 3, random) for shape in set(SHAPES_1B)}
    x = {cols: random.standard_normal((1, cols)).astype(np.float32) for _, cols in SHAPES_1B}
    outs = {rows: np.empty((1, rows), np.float32) for rows, _ in SHAPES_1B}

    def copies(form: Packed) -> kernels.Matrix:
        return kernels.matrix(replace(form, buffers={name: each.copy() for name, each in form.buffers.items()}))

    def dense(spec: str) -> list[kernels.Matrix]:
        values = {shape: codec(spec).encode(codec(form.spec).decode(form)) for shape, form in made.items()}
        return [copies(values[shape]) for _ in range(num_layers) for shape in SHAPES_1B]

    def token(matrices: list[kernels.Matrix]) -> Callable[[], None]:
        def work() -> None:
            for matrix in matrices:
                kernels.linear(x[matrix.cols], [matrix], [outs[matrix.rows]])

        return work

    fused = [copies(made[shape]) for _ in range(num_layers) for shape in SHAPES_1B]
    plain = {shape: pack(3, replace(unpack(form), outliers=None)) for shape, form in made.items()}
    codes = [copies(plain[shape]) for _ in range(num_layers) for shape in SHAPES_1B]
    works = {"fused": token(fused), "float32": token(dense("float32")), "bfloat16": token(dense("bfloat16"))}
    if csr_array is not None:
        sparse = {}
        for shape, form in made.items():
            buffers, order = form.buffers, form.buffers["order"].astype(np.int64)
            places = order[buffers["outlier_columns"].astype(np.int64)].astype(np.int32)
            values = buffers["outlier_values"].astype(np.float32)
            sparse[shape] = csr_array((values, places, buffers["row_offsets"].astype(np.int32)), shape=shape)
        held = [sparse[shape].copy() for _ in range(num_layers) for shape in SHAPES_1B]
        room = {shape: np.empty(shape, np.float32) for shape in made}

        def two_products() -> None:
            for matrix, rest in zip(codes, held, strict=True):
                kernels.linear(x[matrix.cols], [matrix], [outs[matrix.rows]])
                outs[matrix.rows][0] += rest @ x[matrix.cols][0]

        def decoded() -> None:
            for matrix, rest in zip(codes[: len(SHAPES_1B)], held, strict=False):
                weight = room[matrix.rows, matrix.cols]
                kernels.gather_rows(matrix, np.arange(matrix.rows), weight)
                outs[matrix.rows][0] = weight @ x[matrix.cols][0] + rest @ x[matrix.cols][0]

        works |= {"codes, then CSR": two_products}
    seconds = alternately(works, rounds)
    if csr_array is not None:
        # apart, as it takes a hundred times as long; one layer is timed, and takes as long as each
        seconds |= {name: num_layers * each for name, each in alternately({DECODED: decoded}, 1).items()}
    nbytes = {name: sum(each.nbytes for each in ms) for name, ms in (("fused", fused), ("codes", codes))}
    halves = sum(2 * matrix.rows * matrix.cols for matrix in fused)
    shown = ", ".join(f"{name} {each * 1e3:.1f} ms" for name, each in seconds.items())
    title = f"one token of {num_layers} layers of a model of 16 that has 973 million weights"
    fast = Claim(
        claim="the fused product beats float32 and bfloat16",
        measured=f"{title}: {shown}; {nbytes['fused'] / halves:.3f} of 16-bit bytes, {kernels.num_threads()} threads",
        required="least time",
        passed=seconds["fused"] < min(seconds["float32"], seconds["bfloat16"]),
    )
    small = Claim(
        claim="a token reads at most 4.0/16 of 16-bit bytes and its outliers",
        measured=f"{nbytes['fused'] / halves:.4f}, codes and statistics alone {nbytes['codes'] / halves:.4f}",
        required=f"at most {4 / 16 + 2 * OUTLIERS_1B + 0.005:.3f} with {OUTLIERS_1B:.0%} outliers, 0.25 without",
        passed=nbytes["fused"] / halves <= 4 / 16 + 2 * OUTLIERS_1B + 0.005 and nbytes["codes"] / halves <= 0.25,
    )
    required = "both slower than the fused product"
    if csr_array is None:
        return [fast, small, not_run("outliers as a second pass lose", required, "scipy")]
    passes = ("codes, then CSR", DECODED)
    return [
        fast,
        small,
        Claim(claim="outliers as a second pass lose", measured=shown, required=required,
              passed=all(seconds[name] > seconds["fused"] for name in passes)),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("spqr", sys.modules[__name__]))
