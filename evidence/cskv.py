"""CSKV's claims, on a model with heads of 128 channels (`models/wide-heads`: 512 of keys, 256 of inputs) and on caches
of a 1B shape.

Factors are found on the calibration text that ships with memwall, and judged on the held-out text: KL divergence and
perplexity against the float32 cache over tokens decoded through the cache after an exact prompt, squared errors of
rebuilt keys and values per layer, and recall of facts hidden in the prompt.

Changed after results on the demo model (heads of 32) were seen: the model; recall is judged at a fifth of the channels,
since half of them are all that inputs of 256 numbers have here; and codes are judged as the paper's code makes them
(clip=1). Ours widen a group's range to hold zero, and training with them gained nothing at 4 bits on the demo model.
The paper's do not: of key features that lie far from zero, which a few channels in every layer are, all is clipped, and
factors that were not trained with that lose seven times as much. `CODES` shows both. The order of ASVD and SVD, which
the demo model did not tell apart, is asked for again.

A finding, which is a claim that fails: here values bear the lower density, by KL (0.012 with a tenth of their channels,
0.027 with a tenth of keys'; in perplexity it is +0.9 % and -0.7 %, the other way round by 1.8 standard errors). The
model was grown from one whose keys and values have 128 channels, and three tenths of 512 are more than these: a fifth
of the directions has 98 to 100 % of the energy of either, and the side that gets three tenths loses next to nothing. On
the demo model, where both sides were cut, keys bore it better.

Text: `--data` a UTF-8 file to judge on; the held-out text that ships with the planner otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kv
from memwall.claims import Claim, Progress, main, not_run
from memwall.cli.evidence import load_experiment
from memwall.compress.calibration import BUNDLED_TEXT, LayerStream, read_text, token_sequences
from memwall.kv import cskv_fit
from memwall.kv.cskv import CskvCache, CskvSettings
from memwall.kv.latent import Factors
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.models import Checkpoint
from memwall.systems import find_system, wide_heads

bfp: Any = load_experiment(find_system("bfp-outlier-reorder"))  # the model with heads of 128 channels
xquant: Any = load_experiment(find_system("xquant"))
kivi: Any = xquant.kivi
FULL = kivi.Sizes(windows=3, step_tokens=8, recall_tries=16, rounds=7, recall_tokens=1024)
QUICK = kivi.Sizes(windows=2, step_tokens=16, recall_tries=1, rounds=3, decoded_tokens=256)
FULL_STEPS, QUICK_STEPS = cskv_fit.STEPS, 120
CODES = ("bits=4,clip=1", "bits=4", "bits=2")
"""The paper's rounding first, then ours, which clips nothing."""
DENSITIES = (0.3, 0.2, 0.1)
"""From half of 512 channels on all 256 numbers of an input are kept."""


class CskvDemo(bfp.FolderDemo, xquant.LatentDemo):  # type: ignore[misc]
    """A model with factors fitted here, so that nothing is left behind. steps: of training."""

    def __init__(self, directory: Path, data: Path | None, sizes: Any, steps: int) -> None:
        bfp.FolderDemo.__init__(self, directory, data, sizes)
        self.steps = steps
        self.layers = self._layers()
        self.heldout = self.inputs()[:, None].astype(np.float16)
        self._factors: dict[str, list[Any]] = {}

    def _layers(self) -> list[Any]:
        tokens = token_sequences(read_text(BUNDLED_TEXT), self.tokenizer, self.config, cskv_fit.CALIBRATION, "bundled")
        with Checkpoint(self.directory, self.config) as checkpoint:
            stream = LayerStream(self.config, checkpoint, tokens, Arena(1 << 62, Ledger()))
            stream.embed()
            return [
                cskv_fit.LayerData(self.config, checkpoint, layer, cskv_fit.layer_inputs(stream, layer))
                for layer in range(self.config.num_layers)
            ]

    def pairs(self, policy: str) -> list[Any]:
        """A and B of keys and of values, per layer."""
        settings = CskvSettings.from_policy(kv.parse(policy))
        key = CskvCache.fit_key(kv.parse(policy))
        if key not in self._factors:
            found = []
            for data in self.layers:
                pairs = [
                    cskv_fit.start(data, which, rank, settings.init)
                    for which, rank in enumerate(settings.ranks(self.shape))
                ]
                if settings.train:
                    pairs = cskv_fit.train(data, pairs, settings.forms(self.shape), None, self.steps)
                found.append(pairs)
            self._factors[key] = found
        return self._factors[key]

    def cache(self, policy: str) -> kv.KVCache:
        if not policy.startswith("cskv"):
            return super().cache(policy)  # type: ignore[no-any-return]
        arrays = {
            f"{layer}.{name}.{way}": np.ascontiguousarray(matrix.T)
            for layer, pairs in enumerate(self.pairs(policy))
            for name, pair in zip("kv", pairs)
            for way, matrix in zip(("in", "out"), pair)
        }
        factors = Factors(self.arena, arrays)
        return CskvCache(kv.parse(policy), self.shape, self.arena, bfp.CONTEXT_TOKENS, self.model, factors)

    def errors(self, policy: str) -> list[float]:
        """Squared error of rotated keys and of values on held-out text, per layer."""
        import torch

        settings, found = CskvSettings.from_policy(kv.parse(policy)), []
        for data, inputs, pairs in zip(self.layers, self.heldout, self.pairs(policy)):
            factors = [torch.from_numpy(matrix) for pair in pairs for matrix in pair]
            with torch.no_grad():
                target = cskv_fit.Target(with_inputs(data, inputs))
                found.append(float(target.loss(inputs, factors, settings.forms(self.shape))))
        return found


def with_inputs(data: Any, inputs: np.ndarray) -> Any:
    """The same layer with other inputs."""
    other = object.__new__(type(data))
    other.__dict__.update(data.__dict__, inputs=inputs)
    return other


# ---- quality -------------------------------------------------------------------------------------------------------


def order_claims(scores: Any, densities: tuple[float, ...]) -> Iterator[Claim]:
    demo = scores.demo
    trained, asvd, svd = "cskv({})", "cskv({},train=0)", "cskv({},init=svd,train=0)"
    table = "; ".join(
        f"{density:g}: "
        + ", ".join(f"{name} {scores.of(p.format(density)).divergence:.4f}" for name, p in
                    (("trained", trained), ("ASVD", asvd), ("SVD", svd)))
        for density in densities
    )  # fmt: skip
    at = {name: scores.of(p.format(0.2)) for name, p in (("t", trained), ("a", asvd), ("s", svd))}
    yield Claim(
        claim="at a fifth of the channels training repairs what SVD of the weights breaks; ASVD is a better start",
        measured=f"KL by density: {table}; at 0.2 perplexity "
        + ", ".join(f"{at[n].gap(scores.exact):+.1%}" for n in "tas")
        + f"; SVD's KL above ASVD's in standard errors: {at['s'].errors_above(at['a']):+.1f}",
        required="at 0.2: trained less than half of ASVD's KL; ASVD's below SVD's by two standard errors",
        passed=2 * at["t"].divergence < at["a"].divergence and at["s"].errors_above(at["a"]) > 2,
    )
    best = scores.of("cskv(0.2,init=pca,train=0)")
    yield Claim(
        claim="training comes near the best projection there is: the outputs' own principal directions",
        measured=f"KL {at['t'].divergence:.4f} after {demo.steps} steps, {best.divergence:.4f} from the principal "
        "directions (rotation keeps lengths, so that without codes these minimize the very loss that is trained)",
        required="at most 1.3 times",
        passed=at["t"].divergence < 1.3 * best.divergence,
    )
    yield Claim(
        claim="a window of 32 whole tokens loses less than none",
        measured=scores.shown("cskv(0.2)", "cskv(0.2,window=0)", "cskv(0.2,sliding=1)"),
        required="KL lower with it",
        passed=at["t"].divergence < scores.of("cskv(0.2,window=0)").divergence,
    )
    few_keys, few_values = (f"cskv(k={k},v={v},init=pca,train=0)" for k, v in ((0.1, 0.3), (0.3, 0.1)))
    yield Claim(
        claim="keys bear a lower density than values do",
        measured=scores.shown(few_keys, few_values, "cskv(0.2,init=pca,train=0)"),
        required="KL with a tenth of keys' channels below that with a tenth of values'",
        passed=scores.of(few_keys).divergence < scores.of(few_values).divergence,
    )


def layer_claim(demo: CskvDemo) -> Claim:
    before, after = demo.errors("cskv(0.2,train=0)"), demo.errors("cskv(0.2)")
    return Claim(
        claim="training lowers the error of keys and values in every layer, on text it has not seen",
        measured="squared error before and after, per layer: "
        + "; ".join(f"{a:.3f} {b:.3f}" for a, b in zip(before, after)),
        required="lower in every layer",
        passed=all(b < a for a, b in zip(before, after)),
    )


def code_claim(scores: Any, codes: tuple[str, ...]) -> Claim:
    """The same factors' cache in few bits, trained without and with the rounding."""
    demo, plain, shown, wins = scores.demo, "cskv(0.2)", [], []
    for each in codes:
        policy = f"cskv(0.2,{each},window=32)"
        with_codes, errors = scores.of(policy), [sum(demo.errors(policy))]
        key = CskvCache.fit_key(kv.parse(policy))
        trained, demo._factors[key] = demo.pairs(policy), demo.pairs(plain)
        afterwards = scores.of(f"{policy} afterwards", demo.cache(policy))
        errors.append(sum(demo.errors(policy)))
        demo._factors[key] = trained
        wins.append(afterwards.errors_above(with_codes))
        shown.append(
            f"{each}: KL {with_codes.divergence:.4f} trained with codes, {afterwards.divergence:.4f} without "
            f"({wins[-1]:+.1f} standard errors of the difference), squared error of keys and values {errors[0]:.2f} "
            f"and {errors[1]:.2f}"
        )
    return Claim(
        claim="features trained with their codes lose less than features coded afterwards",
        measured="; ".join(shown)
        + f"; without codes {scores.of(plain).divergence:.4f}; "
        + scores.shown(f"cskv(0.2,{codes[0]},window=32)"),
        required="KL lower at 4 bits, rounded as the paper rounds (clip=1), by 2 standard errors",
        passed=wins[0] > 2,
    )


def others_claim(scores: Any) -> Claim:
    two = kv.parse("kivi(bits=2,group=32,residual=32)")
    ours, theirs = scores.of("cskv(0.2)"), scores.of(str(two))
    four = "kivi(bits=4,group=32,residual=32)"
    return Claim(
        claim="a fifth of the channels, trained, loses no more than KIVI at 2 bits in about the same bytes",
        measured=scores.shown("cskv(0.2)", str(two), four)
        + f"; KL above KIVI's in standard errors of the difference: {ours.errors_above(theirs):+.1f}",
        required="at most 1 % more bytes; KL not above by two standard errors",
        passed=scores.demo.bytes_of("cskv(0.2)") <= 1.01 * scores.demo.bytes_of(str(two))
        and ours.errors_above(theirs) < 2,
    )


def exact_claim(scores: Any) -> Claim:
    found = {density: scores.of(f"cskv({density},init=svd,train=0)") for density in (1.0, 0.8, 0.5)}
    return Claim(
        claim="with all channels kept the model's predictions come back",
        measured="; ".join(
            f"density {density:g}: KL {score.divergence:.2g}, perplexity {score.gap(scores.exact):+.4%}"
            for density, score in found.items()
        )
        + f" (inputs have {scores.demo.config.hidden_size} numbers, keys {scores.demo.shape.row_values})",
        required="KL below 0.0001",
        passed=all(score.divergence < 1e-4 for score in found.values()),
    )


def spectrum_claim(demo: CskvDemo) -> Claim:
    """Energy of keys (before rotation) and of values in their first quarter of directions."""
    lines, wins = [], 0
    for layer, data in enumerate(demo.layers):
        flat = data.inputs.reshape(-1, data.inputs.shape[-1])[:8192].astype(np.float32)
        shares = []
        for weight in data.weights:
            energy = np.sort(np.linalg.eigvalsh((flat @ weight).T @ (flat @ weight)))[::-1]
            shares.append(float(energy[: len(energy) // 5].sum() / energy.sum()))
        wins += shares[0] > shares[1]
        lines.append(f"{layer}: {shares[0]:.0%} {shares[1]:.0%}")
    return Claim(
        claim="keys are more redundant than values",
        measured="energy in the first fifth of directions, keys and values, per layer: " + "; ".join(lines),
        required="keys above values in most layers",
        passed=wins > len(demo.layers) / 2,
    )


def recall_claim(demo: CskvDemo, tick: Callable[[str], None]) -> Claim:
    rows = round(0.2 * demo.sizes.recall_tokens) + 32  # of float16, in the bytes of a fifth of the channels
    policies = (
        *("float16", *(f"cskv({density})" for density in DENSITIES), "cskv(0.2,train=0)", "cskv(0.2,init=svd,train=0)"),
        *("kivi(bits=4,group=32,residual=32)", f"snapkv(tokens={rows})"),
    )
    found = {}
    for policy in policies:
        tick(f"recall, {policy}")
        found[policy] = demo.recall(policy)
    return Claim(
        claim=f"facts hidden among {demo.sizes.recall_tokens} tokens are still found with a fifth of the channels",
        measured=", ".join(f"{policy}: {share:.0%}" for policy, share in found.items())
        + f" of {demo.sizes.recall_tries}",
        required="trained, at density 0.2: at most one answer in 6 below float16",
        passed=found["cskv(0.2)"] >= found["float16"] - 1 / 6,
    )


# ---- bytes and time ------------------------------------------------------------------------------------------------


def random_factors(shape: kv.CacheShape, policy: str, arena: Arena) -> Factors:
    rng = np.random.default_rng(0)
    arrays = {
        name: (rng.standard_normal(size) * size[1] ** -0.5).astype(np.float16)
        for name, size in CskvSettings.from_policy(kv.parse(policy)).factor_shapes(shape).items()
    }
    return Factors(arena, {f"{i}.{name}": array for i in range(shape.num_layers) for name, array in arrays.items()})


def build(shape: kv.CacheShape, policy: str, ledger: Ledger, tokens: int) -> CskvCache:
    arena = Arena(1 << 40, ledger)
    return CskvCache(
        kv.parse(policy), shape, arena, tokens, xquant.bare_model(shape), random_factors(shape, policy, arena)
    )


def bytes_claim(tick: Callable[[str], None]) -> Claim:
    shape, tokens, policy = xquant.ONE_B, xquant.ONE_B_TOKENS, "cskv(0.2,4bit)"
    tick("bytes")
    warm = build(shape, policy, Ledger(), 1024)
    xquant.fill(warm, 1024)
    warm.release()
    ledger, before = Ledger(), resident_bytes()
    cache = build(shape, policy, ledger, tokens)
    xquant.fill(cache, tokens)
    sizes, grew = {row.owner: row.nbytes for row in ledger.rows()}, resident_bytes() - before
    cache.release()
    settings = CskvSettings.from_policy(kv.parse(policy))
    keys, values = settings.forms(shape)
    numbers = shape.num_layers * tokens
    formula = numbers * ((keys.width + values.width) * 4 + 24 * keys.width / 32 + 24 * values.width / values.group) / 8
    full = 2 * 2 * numbers * shape.row_values
    rows = sizes["kv/latents"] + sizes["kv/recent"]
    window = settings.window_bytes(shape)
    total = sum(sizes.values())
    return Claim(
        claim="a fifth of the channels in 4 bits takes the bytes of the formula, and the process grows by them",
        measured=f"16 layers, 32 heads of 64, 8,192 tokens: rows {rows:,} bytes, {full / rows:.1f} times less than "
        f"float16 ({rows / (formula + window) - 1:+.2%} of codes, scales and window; codes alone would be "
        f"{full * 0.05:,.0f}); factors {sizes['kv/factors']:,}; resident set +{grew:,} ({grew / total - 1:+.2%})",
        required="both within 3 %",
        passed=abs(rows / (formula + window) - 1) < 0.03 and abs(grew / total - 1) < 0.03,
    )


def speed_claim(sizes: Any, tick: Callable[[str], None]) -> Claim:
    shape, policy, lines, ratios = xquant.SPEED, "cskv(0.2)", [], []
    model = xquant.bare_model(shape, random=True)
    for length in (512, 2048):
        tick(f"time at {length} tokens")
        ours = build(shape, policy, Ledger(), length + 1)
        others = [kv.build(p, shape, Arena(1 << 40, Ledger()), length + 1, model) for p in ("xquant(4bit)", "float16")]
        works = []
        for cache in (ours, *others):
            xquant.fill(cache, length)
            works.append(xquant.attend_once(cache, length))
        mine, theirs, exact = xquant.seconds(*works, rounds=sizes.rounds)
        macs = kv.step_macs(policy, shape, length)
        ratios.append(theirs / mine)
        lines.append(
            f"{length} tokens: {1e3 * mine:.2f} ms with {macs / length / 1e3:.0f} thousand more multiply-adds a token, "
            f"XQuant {1e3 * theirs:.2f} ms, float16 {1e3 * exact:.2f} ms"
        )
    return Claim(
        claim="narrow features are rebuilt in less time than whole inputs; plain keys are read faster still",
        measured="; ".join(lines) + ": on this processor memory is bought with time",
        required="at least 1.5 times faster than XQuant at 2,048 tokens",
        passed=ratios[-1] > 1.5,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """All claims; quick: fewer tokens, fewer steps of training, one density, no recall."""
    sizes, done, steps = (QUICK if quick else FULL), 0, 18 if quick else 45

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, steps), steps, what)
        done += 1

    demo = CskvDemo(wide_heads(), data, sizes, QUICK_STEPS if quick else FULL_STEPS)
    scores = xquant.Scores(demo, tick)
    recall = not_run(
        "facts hidden in a prompt are still found", "at density 0.2, as with float16", needs="the full form"
    )
    return [
        exact_claim(scores),
        *order_claims(scores, (0.2,) if quick else DENSITIES),
        layer_claim(demo),
        code_claim(scores, CODES[:1] if quick else CODES),
        others_claim(scores),
        spectrum_claim(demo),
        recall if quick else recall_claim(demo, tick),
        bytes_claim(tick),
        speed_claim(sizes, tick),
        not_run("on 7B models a fifth of the memory keeps long-context scores", "trained large models",
                needs="a GPU and large trained models"),
        not_run("about 1 / density times the batch fits a GPU", "batch until out of memory"),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("cskv", sys.modules[__name__]))
