"""KIVI's claims, on the bundled demo model and on caches of a 1B model's shape.

Quality: perplexity and KL divergence to the float32 cache of held-out tokens that are decoded one at a time through
the cache, after an exact prompt; for the four choices of axes, for 2 to 8 bits and for three residuals. Caches with a
wrong axis exist only here, as plain arrays that are rounded in place on KIVI's own schedule. Then recall of facts
hidden in the prompt, real bytes, and time per decode step.

Text: `--data` a UTF-8 file; the held-out text that ships with the planner (documentation of Python's standard library)
otherwise.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall import kernels, kv
from memwall.claims import Claim, Progress, main, not_run
from memwall.engine.loading import cache_shape
from memwall.engine.quality import log_softmax
from memwall.errors import InputError
from memwall.kernels.attention import attend_float
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.plan.choose import held_out_text
from memwall.studies.recall_task import hide_facts

CONTEXT_TOKENS = 1024
GROUP = 32
AXES = {"K channel, V token": (True, False), "K channel, V channel": (True, True),
        "K token, V token": (False, False), "K token, V channel": (False, True)}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """step_tokens: held-out tokens decoded at once; the quick form takes several, which see one another exactly."""

    windows: int
    step_tokens: int
    recall_tries: int
    rounds: int
    prompt_tokens: int = 512
    decoded_tokens: int = 448
    recall_tokens: int = 512


FULL = Sizes(windows=6, step_tokens=1, recall_tries=24, rounds=9)
QUICK = Sizes(windows=6, step_tokens=8, recall_tries=8, rounds=9)


# ---- caches of the study -------------------------------------------------------------------------------------------


def round_groups(x: np.ndarray, bits: int, *, along_tokens: bool) -> np.ndarray:
    """x [n, Hkv, D] rounded as KIVI rounds, its groups along tokens or along channels."""
    n, heads, dim = x.shape
    grouped = x.reshape(-1, GROUP, heads, dim) if along_tokens else x.reshape(n, heads, -1, GROUP)
    axis, levels = (1 if along_tokens else 3), 2**bits - 1
    low, high = grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True)
    scale, minimum = (y.astype(np.float16).astype(np.float32) for y in ((high - low) / levels, low))
    codes = np.rint(np.clip((grouped - minimum) / np.where(scale > 0, scale, 1), 0, levels)) * (scale > 0)
    return (codes * scale + minimum).reshape(x.shape)


class AxesCache(kv.KVCache):
    """Float rows, rounded in place when KIVI would code them: groups along tokens R at once, along channels singly."""

    policy = "study"

    def __init__(self, shape: kv.CacheShape, bits: int, residual: int, key_tokens: bool, value_tokens: bool) -> None:
        super().__init__(shape, Arena(1 << 40, Ledger()), CONTEXT_TOKENS)
        self.bits, self.residual, self.along = bits, residual, (key_tokens, value_tokens)
        rows = (shape.num_layers, CONTEXT_TOKENS, shape.num_kv_heads, shape.head_dim)
        self.rows = (np.zeros(rows, np.float32), np.zeros(rows, np.float32))
        self.lengths = [0] * shape.num_layers
        self.coded = [[0, 0] for _ in range(shape.num_layers)]

    @property
    def length(self) -> int:
        return min(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        begin, self.lengths[layer] = self.lengths[layer], self.lengths[layer] + len(k)
        for rows, new in zip(self.rows, (k, v)):
            rows[layer, begin : self.lengths[layer]] = new.astype(np.float16)

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        keys, values = (rows[layer, : self.lengths[layer]] for rows in self.rows)
        return attend_float(q, keys, values, scale=self.shape.logit_scale, first_position=int(positions[0]), out=out)

    def settle(self, layer: int) -> None:
        length, cycle = self.lengths[layer], max(self.residual, GROUP)
        for index, (rows, along_tokens) in enumerate(zip(self.rows, self.along)):
            begin = self.coded[layer][index]
            end = max(begin, length - length % cycle if along_tokens else length - self.residual)
            if end > begin:
                rows[layer, begin:end] = round_groups(rows[layer, begin:end], self.bits, along_tokens=along_tokens)
                self.coded[layer][index] = end

    def truncate(self, length: int) -> None:
        if length:
            raise ValueError("this cache only starts anew")
        self.lengths = [0] * self.shape.num_layers
        self.coded = [[0, 0] for _ in range(self.shape.num_layers)]

    def fork(self) -> kv.KVCache:
        raise NotImplementedError("the study decodes one sequence")

    def release(self) -> None:
        pass


class OutlierCache(kv.KVCache):
    """In the cache inside one key channel in 16 is `factor` times larger, and smaller in queries: the same model."""

    policy = "study"

    def __init__(self, inner: kv.KVCache, factor: float) -> None:
        super().__init__(inner.shape, inner.arena, inner.capacity_tokens)
        self.inner = inner
        self.factors = np.ones(inner.shape.head_dim, np.float32)
        self.factors[3::16] = factor

    @property
    def length(self) -> int:
        return self.inner.length

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        self.inner.append(layer, k * self.factors, v, positions)

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        return self.inner.attend(layer, q / self.factors, positions, out)

    def settle(self, layer: int) -> None:
        self.inner.settle(layer)

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)

    def fork(self) -> kv.KVCache:
        return OutlierCache(self.inner.fork(), float(self.factors[3]))

    def release(self) -> None:
        self.inner.release()


# ---- the demo model ------------------------------------------------------------------------------------------------


class Demo:
    """The bundled model or another one, decoding held-out windows through any cache."""

    def __init__(
        self,
        data: Path | None,
        sizes: Sizes,
        directory: Path | None = None,
        *,
        form: str = "float16",
        context_tokens: int = CONTEXT_TOKENS,
    ) -> None:
        self.directory = directory = directory or model_directory("demo")
        self.sizes, self.context_tokens = sizes, context_tokens
        self.config = ModelConfig.from_directory(directory)
        self.shape = cache_shape(self.config)
        self.arena = Arena(1 << 40, Ledger())
        with Checkpoint(directory, self.config) as checkpoint:
            weights = load_weights(self.config, checkpoint, resolve(self.config, form), self.arena)
        self.model = kv.CacheModel(config=self.config, weights=weights, directory=directory)
        self.decoder = Decoder(
            self.config,
            weights,
            self.arena,
            segment_tokens=context_tokens,
            logit_rows=sizes.step_tokens,
            exact=True,
        )
        self.tokenizer = Tokenizer.from_directory(directory)
        text = held_out_text() if data is None else data.read_text(encoding="utf-8")
        self.tokens = np.array(self.tokenizer.encode(text, add_bos=False), np.int64)
        self.window_tokens = sizes.prompt_tokens + sizes.decoded_tokens
        if len(self.tokens) < sizes.windows * self.window_tokens + 1:
            raise InputError(
                f"{data or 'the bundled text'}: {len(self.tokens):,} tokens; "
                f"needs {sizes.windows * self.window_tokens + 1:,} at least"
            )
        self.truth: list[np.ndarray] = []

    def cache(self, policy: str) -> kv.KVCache:
        return kv.build(policy, self.shape, self.arena, self.context_tokens, self.model)

    def windows(self) -> Iterator[np.ndarray]:
        stride = (len(self.tokens) - self.window_tokens - 1) // max(self.sizes.windows - 1, 1)
        for index in range(self.sizes.windows):
            begin = index * stride
            body = self.tokens[begin : begin + self.window_tokens]
            yield np.concatenate([[self.config.bos_token_id or 0], body])

    def decode(self, cache: kv.KVCache) -> Iterator[tuple[int, np.ndarray]]:
        """(token that came next, log-probabilities) of each decoded token; the prompt's own are not scored."""
        first, step = self.sizes.prompt_tokens, self.sizes.step_tokens
        for window in self.windows():
            cache.truncate(0)
            self.decoder.forward(window[:first], cache)
            for position in range(first, len(window) - 1, step):
                end = min(position + step, len(window) - 1)
                logits = self.decoder.forward(window[position:end], cache, all_logits=True)
                for target, row in zip(window[position + 1 : end + 1], log_softmax(logits)):
                    yield int(target), row

    def score(self, cache: kv.KVCache) -> Score:
        """The first call sets the truth (the float32 cache) that later ones are compared with."""
        is_truth, losses, divergences = not self.truth, [], []
        for index, (target, mine) in enumerate(self.decode(cache)):
            if is_truth:
                self.truth.append(mine)
            truth = self.truth[index]
            losses.append(-float(mine[target]))
            divergences.append(float(np.exp(truth) @ (truth - mine)))
        cache.release()
        return Score(np.array(losses), np.array(divergences))

    def outlier_ratio(self) -> float:
        """Largest |mean| of a key channel over the median one, in the median layer and head."""
        cache = AxesCache(self.shape, 8, CONTEXT_TOKENS, False, False)
        self.decoder.forward(next(self.windows())[: self.sizes.prompt_tokens], cache)
        means = np.abs(cache.rows[0][:, : self.sizes.prompt_tokens].mean(axis=1))
        return float(np.median(means.max(-1) / np.median(means, axis=-1)))

    def recall(self, policy: str) -> float:
        """Share of right answers: four facts in real text, the question decoded through the cache, greedy."""
        cache, right = self.cache(policy), 0
        for attempt in range(self.sizes.recall_tries):
            rng = np.random.default_rng(attempt)
            prompt, question, answer = self._facts(rng)
            cache.truncate(0)
            self.decoder.forward(np.array(prompt), cache)
            for token in question:
                logits = self.decoder.forward(np.array([token]), cache)
            said: list[int] = []
            for _ in range(8):
                said.append(int(logits.argmax()))
                logits = self.decoder.forward(np.array(said[-1:]), cache)
            right += self.tokenizer.decode(said).strip().startswith(answer)
        cache.release()
        return right / self.sizes.recall_tries

    def _facts(self, rng: np.random.Generator) -> tuple[list[int], list[int], str]:
        hidden = hide_facts(
            self.tokenizer,
            self.tokens,
            rng,
            num_tokens=self.sizes.recall_tokens,
            opening=self.config.bos_token_id or 0,
        )
        return hidden.prompt, *hidden.questions[0]


@dataclass(frozen=True, slots=True)
class Score:
    """Of each decoded token: its loss, and the KL divergence from the float32 cache, in nats."""

    losses: np.ndarray
    divergences: np.ndarray

    @property
    def divergence(self) -> float:
        return float(self.divergences.mean())

    def gap(self, exact: Score) -> float:
        """Perplexity lost, relative to the float32 cache."""
        return math.expm1(float((self.losses - exact.losses).mean()))

    def errors_above(self, other: Score) -> float:
        """How much more KL this has than the other on the same tokens, in standard errors of that difference."""
        difference = self.divergences - other.divergences
        return float(difference.mean() / (difference.std() / math.sqrt(len(difference))))


class Quality:
    """Scores caches over the same tokens and says what they lost."""

    def __init__(self, demo: Demo, tick: Callable[[str], None]) -> None:
        self.demo, self.tick = demo, tick
        self.exact = self.score("float32", demo.cache("float32"))

    def score(self, what: str, cache: kv.KVCache) -> Score:
        self.tick(what)
        return self.demo.score(cache)

    def kivi(self, bits: int, residual: int = GROUP) -> Score:
        cache = self.demo.cache(f"kivi(bits={bits},group={GROUP},residual={residual})")
        return self.score(f"{bits} bits, residual {residual}", cache)

    def shown(self, scores: dict[str, Score]) -> str:
        return "; ".join(f"{key}: {s.gap(self.exact):+.2%}, KL {s.divergence:.5f}" for key, s in scores.items())


def axes_claims(quality: Quality, best: Score) -> Iterator[Claim]:
    demo, names = quality.demo, list(AXES)
    axes = {names[0]: best}
    for name in names[1:]:
        axes[name] = quality.score(name, AxesCache(demo.shape, 2, GROUP, *AXES[name]))
    _, value_wrong, key_wrong, both_wrong = axes.values()
    above = {name: axes[name].errors_above(best) for name in names[1:]}
    perplexity = math.exp(float(quality.exact.losses.mean()))
    which = f"{len(best.losses):,} tokens, {demo.sizes.step_tokens} a step"
    yield Claim(
        claim="at 2 bits no other choice of axes loses less than keys per channel with values per token",
        measured=f"perplexity over the float32 cache's {perplexity:.2f} and KL, {which}: "
        f"{quality.shown(axes)}; KL above it in standard errors: "
        + ", ".join(f"{n}: {e:+.1f}" for n, e in above.items()),
        required="lowest, or level with the lowest (2 standard errors); more than that below keys per token",
        passed=min(above.values()) > -2 and above["K token, V token"] > 2,
    )
    by_key, by_value = key_wrong.divergence - best.divergence, value_wrong.divergence - best.divergence
    yield Claim(
        claim="the axis of keys matters more than the axis of values",
        measured=f"KL added by the wrong axis: of keys {by_key:.5f}, of values {by_value:.5f}, of both "
        f"{both_wrong.divergence - best.divergence:.5f}; outlier ratio of this model's keys {demo.outlier_ratio():.1f}",
        required="keys' share larger",
        passed=by_key > by_value,
    )
    planted = {
        name: quality.score(f"outliers, {name}", OutlierCache(AxesCache(demo.shape, 2, GROUP, along, False), 32.0))
        for name, along in (("K channel", True), ("K token", False))
    }
    ratio = planted["K token"].divergence / planted["K channel"].divergence
    yield Claim(
        claim="with planted outliers (2 of 32 key channels times 32) the order of the axes is large",
        measured=f"{quality.shown(planted)}; {ratio:.0f} times the KL",
        required="at least 10 times the KL with keys per token",
        passed=ratio >= 10,
    )
    study = quality.score("study cache", AxesCache(demo.shape, 2, GROUP, True, False))
    yield Claim(
        claim="the shipped store decodes as the plain arrays of this study do on the same axes",
        measured=f"KL {best.divergence:.5f} against {study.divergence:.5f}",
        required="within 2 %",
        passed=abs(best.divergence / study.divergence - 1) < 0.02,
    )


def quality_claims(quality: Quality) -> Iterator[Claim]:
    best, exact = quality.kivi(2), quality.exact
    yield from axes_claims(quality, best)
    residuals = {"R=0": quality.kivi(2, 0), "R=32": best, "R=128": quality.kivi(2, 128)}
    none, most = residuals["R=0"], residuals["R=128"]
    yield Claim(
        claim="128 exact tokens lose less than none",
        measured=quality.shown(residuals),
        required="R=128 below R=0 in KL and perplexity",
        passed=most.divergence < none.divergence and most.gap(exact) < none.gap(exact),
    )
    bits = {b: best if b == 2 else quality.kivi(b) for b in (2, 3, 4, 8)}
    shares = bits[4].divergence / best.divergence, bits[4].gap(exact) / best.gap(exact)
    yield Claim(
        claim="4 bits lose less than a tenth of what 2 bits lose",
        measured=quality.shown({f"{b} bits": s for b, s in bits.items()})
        + f"; 4 bits over 2 bits: KL {shares[0]:.3f}, perplexity {shares[1]:.3f}",
        required="both under 0.1",
        passed=max(shares) < 0.1,
    )


def first_token_claim(demo: Demo) -> Claim:
    window = next(demo.windows())[: demo.sizes.prompt_tokens]
    logits = []
    for policy in ("float16", "kivi"):
        cache = demo.cache(policy)
        logits.append(demo.decoder.forward(window, cache).copy())
        cache.release()
    difference = float(np.abs(logits[0] - logits[1]).max())
    return Claim(
        claim="the prompt attends exactly: the first token's logits are those of the float16 cache",
        measured=f"largest difference {difference:g}",
        required="0",
        passed=difference == 0,
    )


def recall_claim(demo: Demo, tick: Callable[[str], None]) -> Claim:
    policies = ("float16", *(f"kivi(bits={b},group={GROUP},residual={GROUP})" for b in (8, 4, 3, 2)))
    found = {}
    for policy in policies:
        tick(f"recall, {policy}")
        found[policy] = demo.recall(policy)
    exact, four = found[policies[0]], found[policies[2]]
    tries = demo.sizes.recall_tries
    return Claim(
        claim=f"facts hidden among {demo.sizes.recall_tokens} tokens are still found at 4 bits",
        measured=", ".join(
            f"{policy.split(',')[0].removeprefix('kivi(')}: {share:.0%}" for policy, share in found.items()
        )
        + f" of {tries}",
        required="4 bits at most one answer in 12 below float16",
        passed=four >= exact - 1 / 12,
    )


# ---- bytes and time ------------------------------------------------------------------------------------------------

ONE_B = kv.CacheShape(num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64)
ONE_B_TOKENS = 8192
SPEED_SHAPES = (
    (kv.CacheShape(num_layers=2, num_heads=16, num_kv_heads=16, head_dim=128), (512, 4096, 16384)),
    (kv.CacheShape(num_layers=4, num_heads=32, num_kv_heads=8, head_dim=64), (1024, 8192, 32768)),
)


def random_rows(shape: kv.CacheShape, num_tokens: int = 2048) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num_tokens, shape.num_kv_heads, shape.head_dim), np.float32)


def fill(cache: kv.KVCache, rows: np.ndarray, num_tokens: int) -> None:
    """So many tokens: `rows` again and again."""
    for begin in range(0, num_tokens, len(rows)):
        count = min(len(rows), num_tokens - begin)
        for layer in range(cache.shape.num_layers):
            cache.append(layer, rows[:count], rows[:count], np.arange(begin, begin + count))
            cache.settle(layer)


def bytes_claims(tick: Callable[[str], None]) -> Iterator[Claim]:
    row_numbers = 2 * ONE_B.num_layers * ONE_B.row_values
    held: dict[str, tuple[int, int]] = {}
    rows = random_rows(ONE_B)
    warm = kv.build("kivi", ONE_B, Arena(1 << 40, Ledger()), 512)
    fill(warm, rows, 512)  # so that what first calls allocate is there before anything is measured
    warm.release()
    for policy in ("float16", "kivi(4bit)", "kivi(2bit)"):
        tick(f"bytes, {policy}")
        ledger = Ledger()
        before = resident_bytes()
        cache = kv.build(policy, ONE_B, Arena(1 << 40, ledger), ONE_B_TOKENS)
        fill(cache, rows, ONE_B_TOKENS)
        held[policy] = ledger.total(), resident_bytes() - before
        cache.release()
    formulas = {p: row_numbers * (ONE_B_TOKENS * (b + 32 / 32) + 128 * 16) / 8 for p, b in
                (("kivi(4bit)", 4), ("kivi(2bit)", 2))}  # fmt: skip
    off = {policy: held[policy][0] / formula - 1 for policy, formula in formulas.items()}
    yield Claim(
        claim="bytes held are those of the formula (1B shape: 16 layers, 8 kv heads of 64, 8,192 tokens, R = 128)",
        measured=", ".join(
            f"{p}: {held[p][0]:,} ({off[p]:+.2%}), {held['float16'][0] / held[p][0]:.2f} times less than float16"
            for p in off
        ),
        required="within 3 %",
        passed=all(abs(x) < 0.03 for x in off.values()),
    )
    apart = {policy: resident / ledger - 1 for policy, (ledger, resident) in held.items()}
    yield Claim(
        claim="the process grows by what the ledger says, so the saving is real",
        measured=", ".join(f"{p}: resident set +{held[p][1]:,} ({apart[p]:+.2%})" for p in held),
        required="within 3 %",
        passed=all(abs(x) < 0.03 for x in apart.values()),
    )
    tick("bytes, transformers")
    yield peer_claim({bits: kv.predict(f"kivi({bits}bit)", ONE_B, ONE_B_TOKENS)["kv/coded"] for bits in (4, 2)})


def peer_claim(coded_bytes: dict[int, int]) -> Claim:
    """transformers' QuantizedCache (quanto) right after the same prompt, when it holds codes alone."""
    claim = "the coded part is no larger than transformers' quantized cache (quanto) of the same bits and group"
    required = "at most 1.03 of its bytes"
    missing = [name for name in ("torch", "transformers", "optimum.quanto") if not _installed(name)]
    if missing:
        return not_run(claim, required, needs=", ".join(missing))
    sizes = {bits: ONE_B.num_layers * quanto_layer_bytes(bits) for bits in coded_bytes}
    ratios = {bits: coded_bytes[bits] / sizes[bits] for bits in sizes}
    return Claim(
        claim=claim,
        measured=", ".join(f"{b} bits: {ratios[b]:.3f} of its {sizes[b]:,} bytes" for b in ratios),
        required=required,
        passed=all(ratio <= 1.03 for ratio in ratios.values()),
    )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def quanto_layer_bytes(bits: int) -> int:
    """Bytes of all tensors that the peer's cache holds after one layer's prompt."""
    import torch
    from transformers import LlamaConfig, QuantizedCache

    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=ONE_B.num_heads, num_key_value_heads=ONE_B.num_kv_heads,
        head_dim=ONE_B.head_dim, hidden_size=ONE_B.num_heads * ONE_B.head_dim, vocab_size=64,
    )  # fmt: skip
    cache = QuantizedCache("quanto", config, nbits=bits, axis_key=0, axis_value=0, q_group_size=32, residual_length=128)
    rows = torch.randn(1, ONE_B.num_kv_heads, ONE_B_TOKENS, ONE_B.head_dim).half()
    cache.update(rows, rows.clone(), 0)
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache, set())}.values())


def _tensors(value: object, seen: set[int]) -> Iterator:
    """Every plain tensor reachable from a cache object, through wrapper tensors, lists and attributes."""
    import torch

    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        inner = [getattr(value, name) for name in ("_data", "_scale", "_shift") if hasattr(value, name)]
        if not inner:
            yield value
        for each in inner:
            yield from _tensors(each, seen)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each, seen)
    elif type(value).__module__.startswith("transformers.cache_utils"):
        for each in vars(value).values():
            yield from _tensors(each, seen)


def step_milliseconds(shape: kv.CacheShape, length: int, rounds: int) -> np.ndarray:
    """[rounds, 3]: float32, float16 and 2-bit caches of `length` tokens, taking turns inside a round."""
    caches = [
        kv.build(policy, shape, Arena(1 << 40, Ledger()), length) for policy in ("float32", "float16", "kivi(2bit)")
    ]
    rows = random_rows(shape)
    for cache in caches:
        fill(cache, rows, length)
    q = np.random.default_rng(1).standard_normal((1, shape.num_heads, shape.head_dim), np.float32)
    out, positions = np.empty_like(q), np.array([length - 1])
    seconds = np.empty((rounds + 1, len(caches)))
    for turn in seconds:
        for index, cache in enumerate(caches):
            began = time.perf_counter()
            for layer in range(shape.num_layers):
                cache.attend(layer, q, positions, out)
            turn[index] = time.perf_counter() - began
    for cache in caches:
        cache.release()
    return 1e3 * seconds[1:]


def speed_claims(sizes: Sizes, tick: Callable[[str], None]) -> Iterator[Claim]:
    """Medians of the rounds' ratios, from a cache inside the last-level cache to one far beyond."""
    found: dict[str, list[float]] = {}
    lines: dict[str, list[str]] = {}
    for shape, lengths in SPEED_SHAPES:
        name = f"{shape.num_heads} query and {shape.num_kv_heads} kv heads of {shape.head_dim}"
        for length in lengths:
            tick(f"time at {length:,} tokens")
            turns = step_milliseconds(shape, length, sizes.rounds)
            over_full, over_half = (float(np.median(turns[:, i] / turns[:, 2])) for i in (0, 1))
            full, half, coded = np.median(turns, axis=0)
            mebibytes = 2 * shape.num_layers * shape.row_values * 2 * length >> 20
            found.setdefault(name, []).append(over_half)
            lines.setdefault(name, []).append(
                f"{length:,} tokens ({mebibytes} MiB as float16): float32 {full:.2f}, float16 {half:.2f}, 2 bits "
                f"{coded:.2f} ms: {over_full:.2f} and {over_half:.2f} times faster"
            )
    threads = f"{kernels.num_threads()} threads, {kernels.isa()}"
    yield Claim(
        claim=f"past the last-level cache, a decode step attends faster over 2-bit codes than over float16 ({threads})",
        measured="; ".join(f"{name}: {lines[name][-1]}" for name in lines),
        required="more than 1 time in both shapes",
        passed=all(ratios[-1] > 1 for ratios in found.values()),
    )
    alone, shared = (
        found  # where several query heads share a key, arithmetic on the codes bounds the gain at any length
    )
    yield Claim(
        claim=f"the gain grows with the context where one query head has a key to itself ({alone})",
        measured="; ".join(lines[alone]) + "; for comparison, " + shared + ": " + "; ".join(lines[shared]),
        required="larger at the longest context than at the shortest",
        passed=found[alone][-1] > found[alone][0],
    )


def gpu_claim() -> Claim:
    """Decode attention of one token at 16K tokens, coded against torch's fused float16, where there is a GPU."""
    name = "on a GPU, decode attention at 16K tokens is faster than float16's, and twice the batch fits"
    required = "ratio above 1, and at least 2"
    if not _installed("torch"):
        return not_run(name, required)
    import torch

    if not torch.cuda.is_available():
        return not_run(name, required)
    from memwall.kernels import attention
    from memwall.kernels.triton_attention import attend_kivi

    length, heads, kv_heads, dim, form = 16384, 32, 8, 128, {"bits": 2, "group": GROUP}
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((length, kv_heads, dim)).astype(np.float16) for _ in range(2))
    key_bytes, value_bytes = attention.kivi_block_bytes(2, GROUP, dim)
    keys = np.zeros(length // GROUP * kv_heads * key_bytes, np.uint8)
    values = np.zeros(length // attention.VALUE_BLOCK_TOKENS * kv_heads * value_bytes, np.uint8)
    attention.kivi_encode_keys(k, keys, **form)
    attention.kivi_encode_values(v, 0, values, **form)
    coded = [torch.from_numpy(x).cuda() for x in (keys, values, k[length:], v[length:])]
    exact = [torch.from_numpy(x).cuda().transpose(0, 1)[None].contiguous() for x in (k, v)]
    q = torch.randn(heads, dim, device="cuda")

    def milliseconds(step: Callable[[], object]) -> float:
        times = []
        for _ in range(60):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return float(np.median(times[10:]))

    counts = {"coded_keys": length, "coded_values": length, "scale": dim**-0.5, **form}
    fused = torch.nn.functional.scaled_dot_product_attention
    half = q.half()[None, :, None]
    ours = milliseconds(lambda: attend_kivi(q, *coded, **counts))
    theirs = milliseconds(lambda: fused(half, *exact, enable_gqa=True))
    batch = (k.nbytes + v.nbytes) / (keys.nbytes + values.nbytes)
    return Claim(
        claim=name,
        measured=f"{torch.cuda.get_device_name()}: {theirs:.3f} against {ours:.3f} ms, {batch:.2f} times the batch",
        required=required,
        passed=theirs > ours and batch >= 2,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """All claims; quick: fewer tokens and rounds."""
    sizes = QUICK if quick else FULL
    steps, done = 23 + sum(len(lengths) for _, lengths in SPEED_SHAPES), 0

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, steps), steps, what)
        done += 1

    demo = Demo(data, sizes)
    return [
        *quality_claims(Quality(demo, tick)),
        first_token_claim(demo),
        recall_claim(demo, tick),
        *bytes_claims(tick),
        *speed_claims(sizes, tick),
        gpu_claim(),
    ]


if __name__ == "__main__":
    sys.exit(main("kivi", sys.modules[__name__]))
