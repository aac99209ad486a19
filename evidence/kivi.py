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
from memwall.engine.session import cache_shape
from memwall.errors import InputError
from memwall.kernels.attention import attend_float
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.plan.choose import held_out_text

CONTEXT_TOKENS = 1024
GROUP = 32
AXES = {"K channel, V token": (True, False), "K channel, V channel": (True, True),
        "K token, V token": (False, False), "K token, V channel": (False, True)}  # fmt: skip
NAMES = """Alice Tom Maria Oscar Nina Peter Laura Victor Emma David Sarah Henry Ruth Simon Clara Martin red blue green
silver tiger falcon otter badger alpha beta gamma delta sigma omega""".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    windows: int
    prompt_tokens: int
    decoded_tokens: int
    recall_tries: int
    recall_tokens: int
    layers: int
    lengths: tuple[int, ...]
    rounds: int


FULL = Sizes(windows=6, prompt_tokens=512, decoded_tokens=448, recall_tries=24, recall_tokens=512,
             layers=4, lengths=(2048, 8192, 32768), rounds=9)  # fmt: skip
QUICK = Sizes(windows=2, prompt_tokens=512, decoded_tokens=192, recall_tries=8, recall_tokens=512,
              layers=4, lengths=(2048, 16384), rounds=5)  # fmt: skip


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

    def release(self) -> None:
        pass


class OutlierCache(kv.KVCache):
    """Makes one key channel in 16 `factor` times larger in the cache inside, and the queries' smaller: the same model."""

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

    def release(self) -> None:
        self.inner.release()


# ---- the demo model ------------------------------------------------------------------------------------------------


class Demo:
    """The bundled model, decoding held-out windows through any cache."""

    def __init__(self, data: Path | None, sizes: Sizes) -> None:
        directory = model_directory("demo")
        self.sizes = sizes
        self.config = ModelConfig.from_directory(directory)
        self.shape = cache_shape(self.config)
        self.arena = Arena(1 << 40, Ledger())
        with Checkpoint(directory, self.config) as checkpoint:
            weights = load_weights(self.config, checkpoint, resolve(self.config, "float16"), self.arena)
        self.decoder = Decoder(self.config, weights, self.arena, segment_tokens=CONTEXT_TOKENS, exact=True)
        self.tokenizer = Tokenizer.from_directory(directory)
        text = held_out_text() if data is None else data.read_text(encoding="utf-8")
        self.tokens = np.array(self.tokenizer.encode(text, add_bos=False), np.int64)
        self.step_tokens = sizes.prompt_tokens + sizes.decoded_tokens
        if len(self.tokens) < sizes.windows * self.step_tokens + 1:
            raise InputError(
                f"{data or 'the bundled text'}: {len(self.tokens):,} tokens; "
                f"needs {sizes.windows * self.step_tokens + 1:,} at least"
            )
        self.truth: list[np.ndarray] = []

    def cache(self, policy: str) -> kv.KVCache:
        return kv.build(policy, self.shape, self.arena, CONTEXT_TOKENS)

    def windows(self) -> Iterator[np.ndarray]:
        stride = (len(self.tokens) - self.step_tokens - 1) // max(self.sizes.windows - 1, 1)
        for index in range(self.sizes.windows):
            begin = index * stride
            body = self.tokens[begin : begin + self.step_tokens]
            yield np.concatenate([[self.config.bos_token_id or 0], body])

    def decode(self, cache: kv.KVCache) -> Iterator[tuple[int, np.ndarray]]:
        """(token that came next, log-probabilities) of each decoded token; the prompt's own are not scored."""
        first = self.sizes.prompt_tokens
        for window in self.windows():
            cache.truncate(0)
            self.decoder.forward(window[:first], cache)
            for position in range(first, len(window) - 1):
                logits = self.decoder.forward(window[position : position + 1], cache).astype(np.float64)
                logits -= logits.max()
                yield int(window[position + 1]), (logits - math.log(np.exp(logits).sum())).astype(np.float32)

    def score(self, cache: kv.KVCache) -> Score:
        """The first call sets the truth (the float32 cache) that later ones are compared with."""
        loss, divergence, is_truth = 0.0, 0.0, not self.truth
        count = 0
        for target, mine in self.decode(cache):
            if is_truth:
                self.truth.append(mine)
            truth = self.truth[count]
            count += 1
            loss -= float(mine[target])
            divergence += float(np.exp(truth) @ (truth - mine))
        cache.release()
        return Score(loss / count, divergence / count)

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
        names = rng.choice(NAMES, 4, replace=False)
        numbers = [str(n) for n in rng.integers(1000, 100_000, 4)]
        encode = lambda text: self.tokenizer.encode(text, add_bos=False)  # noqa: E731
        facts = [encode(f"\nThe secret number of {name} is {n}.\n") for name, n in zip(names, numbers)]
        asked = int(rng.integers(4))
        question = encode(f"\nWhat is the secret number of {names[asked]}? The secret number of {names[asked]} is")
        filler = self.sizes.recall_tokens - 1 - len(question) - sum(map(len, facts))
        start = int(rng.integers(len(self.tokens) - filler))
        cuts = np.sort(rng.integers(0, filler, 4))
        pieces = np.split(self.tokens[start : start + filler], cuts)
        prompt = [self.config.bos_token_id or 0, *pieces[0].tolist()]
        for fact, piece in zip(facts, pieces[1:]):
            prompt += [*fact, *piece.tolist()]
        return prompt, question, numbers[asked]


@dataclass(frozen=True, slots=True)
class Score:
    """loss: nats per token; divergence: KL from the float32 cache, nats per token."""

    loss: float
    divergence: float

    def gap(self, exact: Score) -> float:
        """Perplexity lost, relative to the float32 cache."""
        return math.expm1(self.loss - exact.loss)


def quality_claims(demo: Demo, tick: Callable[[str], None]) -> Iterator[Claim]:
    def score(what: str, cache: kv.KVCache) -> Score:
        tick(what)
        return demo.score(cache)

    def shown(scores: dict[str, Score]) -> str:
        return "; ".join(f"{key}: {100 * s.gap(exact):+.2f} %, KL {s.divergence:.5f}" for key, s in scores.items())

    exact = score("float32", demo.cache("float32"))
    base = f"perplexity over {math.exp(exact.loss):.2f} of the float32 cache, {len(demo.truth)} tokens"
    axes = {
        name: score(name, AxesCache(demo.shape, 2, GROUP, *along) if name != next(iter(AXES)) else
                    demo.cache(f"kivi(bits=2,group={GROUP},residual={GROUP})"))
        for name, along in AXES.items()
    }  # fmt: skip
    best, value_wrong, key_wrong, _ = axes.values()
    yield Claim(
        claim="at 2 bits, keys per channel and values per token lose least of the four choices of axes",
        measured=f"{base}: {shown(axes)}",
        required="lowest perplexity and KL of the four",
        passed=best.loss == min(s.loss for s in axes.values())
        and best.divergence == min(s.divergence for s in axes.values()),
    )
    by_key = key_wrong.divergence - best.divergence
    by_value = value_wrong.divergence - best.divergence
    yield Claim(
        claim="the axis of keys matters more than the axis of values",
        measured=f"KL added by the wrong axis: of keys {by_key:.5f}, of values {by_value:.5f}; "
        f"outlier ratio of this model's keys {demo.outlier_ratio():.1f}",
        required="keys' share larger",
        passed=by_key > by_value,
    )
    tame = score("study cache", AxesCache(demo.shape, 2, GROUP, True, False))
    yield Claim(
        claim="the shipped store decodes as the plain arrays of the study do on the same axes",
        measured=f"KL {best.divergence:.5f} against {tame.divergence:.5f}",
        required="within 2 %",
        passed=abs(best.divergence / tame.divergence - 1) < 0.02,
    )
    planted = {
        name: score(f"outliers, {name}", OutlierCache(AxesCache(demo.shape, 2, GROUP, along, False), 32.0))
        for name, along in (("K channel", True), ("K token", False))
    }
    ratio = planted["K token"].divergence / planted["K channel"].divergence
    yield Claim(
        claim="with planted outlier channels (2 of 32 keys times 32) the order of the axes is large",
        measured=f"{shown(planted)}; {ratio:.0f} times the KL",
        required="at least 10 times the KL with keys per token",
        passed=ratio >= 10,
    )
    residuals = {
        f"R={r}": score(f"residual {r}", demo.cache(f"kivi(bits=2,group={GROUP},residual={r})")) for r in (0, 32, 128)
    }
    yield Claim(
        claim="128 exact tokens lose less than none",
        measured=shown(residuals),
        required="R=128 below R=0 in perplexity and KL",
        passed=residuals["R=128"].loss < residuals["R=0"].loss
        and residuals["R=128"].divergence < residuals["R=0"].divergence,
    )
    bits = {
        f"{b} bits": best
        if b == 2
        else score(f"{b} bits", demo.cache(f"kivi(bits={b},group={GROUP},residual={GROUP})"))
        for b in (2, 3, 4, 8)
    }
    gap_2, gap_4 = bits["2 bits"].gap(exact), bits["4 bits"].gap(exact)
    yield Claim(
        claim="4 bits lose less than a tenth of what 2 bits lose",
        measured=f"{shown(bits)}; perplexity gap {gap_4 / gap_2:.3f}, "
        f"KL {bits['4 bits'].divergence / bits['2 bits'].divergence:.3f} of that at 2 bits",
        required="both under 0.1",
        passed=gap_4 < 0.1 * gap_2 and bits["4 bits"].divergence < 0.1 * bits["2 bits"].divergence,
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


def fill(cache: kv.KVCache, num_tokens: int, chunk_tokens: int = 2048) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((chunk_tokens, cache.shape.num_kv_heads, cache.shape.head_dim), np.float32)
    for begin in range(0, num_tokens, chunk_tokens):
        count = min(chunk_tokens, num_tokens - begin)
        for layer in range(cache.shape.num_layers):
            cache.append(layer, rows[:count], rows[:count], np.arange(begin, begin + count))
            cache.settle(layer)


def bytes_claims(tick: Callable[[str], None]) -> Iterator[Claim]:
    row_numbers = 2 * ONE_B.num_layers * ONE_B.row_values
    held: dict[str, tuple[int, int]] = {}
    for policy in ("float16", "kivi(4bit)", "kivi(2bit)"):
        tick(f"bytes, {policy}")
        ledger = Ledger()
        before = resident_bytes()
        cache = kv.build(policy, ONE_B, Arena(1 << 40, ledger), ONE_B_TOKENS)
        fill(cache, ONE_B_TOKENS)
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
        ),  # fmt: skip
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
    yield peer_claim(held["kivi(4bit)"][0], held["kivi(2bit)"][0])


def peer_claim(four_bits: int, two_bits: int) -> Claim:
    """transformers' QuantizedCache (quanto) with the same group and residual, over the same numbers."""
    claim, required = (
        "no larger than transformers' quantized cache (quanto) of the same bits, group and residual",
        "<= 1",
    )
    missing = [name for name in ("torch", "transformers", "optimum.quanto") if not _installed(name)]
    if missing:
        return not_run(claim, required, needs=", ".join(missing))
    sizes = {bits: quanto_bytes(bits) for bits in (4, 2)}
    ratios = {4: four_bits / sizes[4], 2: two_bits / sizes[2]}
    return Claim(
        claim=claim,
        measured=", ".join(f"{b} bits: {ratios[b]:.3f} of its {sizes[b]:,} bytes" for b in ratios),
        required=required,
        passed=all(ratio <= 1 for ratio in ratios.values()),
    )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def quanto_bytes(bits: int) -> int:
    """Bytes of all tensors that the peer's cache holds."""
    import torch
    from transformers import LlamaConfig, QuantizedCache

    config = LlamaConfig(
        num_hidden_layers=ONE_B.num_layers, num_attention_heads=ONE_B.num_heads, num_key_value_heads=ONE_B.num_kv_heads,
        head_dim=ONE_B.head_dim, hidden_size=ONE_B.num_heads * ONE_B.head_dim, vocab_size=64,
    )  # fmt: skip
    cache = QuantizedCache("quanto", config, nbits=bits, axis_key=0, axis_value=0, q_group_size=32, residual_length=128)
    rows = torch.randn(1, ONE_B.num_kv_heads, ONE_B_TOKENS, ONE_B.head_dim).half()
    for layer in range(ONE_B.num_layers):
        cache.update(rows, rows.clone(), layer)
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


def speed_claim(sizes: Sizes, tick: Callable[[str], None]) -> Claim:
    """Median of the rounds' ratios; the three caches take turns inside a round."""
    shape = kv.CacheShape(num_layers=sizes.layers, num_heads=32, num_kv_heads=8, head_dim=64)
    policies = ("float32", "float16", "kivi(2bit)")
    lines, ratios = [], []
    q = np.random.default_rng(1).standard_normal((1, 32, 64), np.float32)
    out = np.empty_like(q)
    for length in sizes.lengths:
        tick(f"time at {length:,} tokens")
        caches = [kv.build(policy, shape, Arena(1 << 40, Ledger()), length) for policy in policies]
        for cache in caches:
            fill(cache, length)
        seconds = np.empty((sizes.rounds + 1, len(caches)))
        for turn in seconds:
            for index, cache in enumerate(caches):
                began = time.perf_counter()
                for layer in range(shape.num_layers):
                    cache.attend(layer, q, np.array([length - 1]), out)
                turn[index] = time.perf_counter() - began
        for cache in caches:
            cache.release()
        full, half, coded = np.median(seconds[1:], axis=0)
        ratios.append(float(np.median(seconds[1:, 1] / seconds[1:, 2])))
        over_full = float(np.median(seconds[1:, 0] / seconds[1:, 2]))
        lines.append(
            f"{length:,} tokens ({caches[1].shape.num_layers * 2 * 1024 * length >> 20} MiB as float16): float32 "
            f"{1e3 * full:.2f}, float16 {1e3 * half:.2f}, 2 bits {1e3 * coded:.2f} ms: {over_full:.2f} and {ratios[-1]:.2f} times"
        )
    return Claim(
        claim=f"a decode step's attention is faster on 2-bit codes than over the full cache ({kernels.num_threads()} threads, "
        f"{kernels.isa()}, {sizes.layers} layers of 8 kv heads of 64, 32 query heads)",
        measured="; ".join(lines),
        required="more than 1 time float16 past the last-level cache, and growing from the shortest to the longest context",
        passed=ratios[-1] > 1 and ratios[-1] > ratios[0],
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """All claims; quick: fewer tokens and rounds."""
    sizes = QUICK if quick else FULL
    steps, done = 27 + len(sizes.lengths), 0

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, steps), steps, what)
        done += 1

    demo = Demo(data, sizes)
    claims = [*quality_claims(demo, tick), first_token_claim(demo), recall_claim(demo, tick)]
    claims += [*bytes_claims(tick), speed_claim(sizes, tick)]
    claims.append(
        not_run(
            "on a GPU, faster than float16 attention at 16K tokens and twice the batch before memory ends",
            "ratio > 1, >= 2",
        )
    )
    return claims


if __name__ == "__main__":
    sys.exit(main("kivi", sys.modules[__name__]))
