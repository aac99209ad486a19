"""Locret's claims, on a model with heads of 128 channels (11.7M weights, 2,048 positions): what its trained heads keep,
against other ways of choosing in the same loop.

The heads are trained here, on the bundled calibration text; prompts are other text, with other facts. Every method
reads the prompt in the same chunks, keeps the same number of units with the same ones safe, and numbers them anew; only
the scores differ. Four facts are hidden in real text; when all of it has been read, each is asked for in turn, and the
question and its answer go again before the next. Questions and answers stay whole, as in the paper: in earlier forms of
this experiment an answer was folded like a prompt where a chunk was shorter than a question, so that windowed and
accumulated attention chose once more, knowing the question.

Orders are judged by the difference of the shares of right answers, prompt by prompt: "more" is more by over two
standard errors of its mean over prompts, "not above" is not more by over two.

Findings, which are claims that fail: accumulated and windowed attention answer no more than the last tokens (2 and 0
against 4 % at T / 16), as nothing looks at a fact before it is asked for; and without stabilizers 71 % are answered
against 81 %, which is 1.7 standard errors on 12 prompts.

Chunks and stabilizers have the paper's proportion to what is kept (c near b / 2, n_s near 0.4 b). In an earlier form
chunks were more than twice what is kept, and few facts lay across their borders: there stabilizers did not show. Until
this model was there, the bundled demo model was judged (heads of 32, prompts of 896 tokens, one question each): it
answered more with what Locret keeps than with the full cache (14 of 16 against 11), where every fact's neighbours
compete.

Text: `--data` a UTF-8 file; the held-out text that ships with the planner (documentation of Python's standard library)
otherwise.
"""

from __future__ import annotations

import gc
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kv
from memwall.claims import Claim, Progress, main, not_run
from memwall.compress.calibration import BUNDLED_TEXT, LayerStream
from memwall.engine.loading import cache_shape
from memwall.errors import InputError
from memwall.kv.blocks import BlockCache, Scorer, Step, Uniform, Units
from memwall.kv.locret import RetainingHeads
from memwall.kv.retaining import Lessons, TrainSettings, make_rows, train_heads
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.models.config import RopeConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.rope import RotaryTable
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import Weights, load_weights
from memwall.plan.choose import held_out_text
from memwall.studies.recall_task import hide_facts, is_right
from memwall.systems import wide_heads

MOST_TOKENS = 8192
CHUNK_SHARE, STABLE_SHARE = 3072 / 6000, 2500 / 6000  # paper: table 1, Phi-3, as shares of b
ANSWER_TOKENS = 6
FACTS = 4
FIRST_SEED = 1000
WINDOW, POOL = 32, 5  # SnapKV's defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """prompts: each with FACTS questions; shares: T over the units kept; long_tokens: a prompt beyond the positions the
    model was trained on.
    """

    prompts: int
    training: TrainSettings
    ablations: bool
    shares: tuple[int, ...]
    prompt_tokens: int = 1024
    long_tokens: int = 4096
    long_prompts: int = 2
    memory_tokens: tuple[int, ...] = (4096, 8192, 16384, 32768)


FULL = Sizes(prompts=12, training=TrainSettings(width=128), ablations=True, shares=(8, 16, 32))
QUICK = Sizes(
    prompts=3,
    training=TrainSettings(width=128, rows=24, row_tokens=320, epochs=4),
    ablations=False,
    shares=(16,),
    prompt_tokens=768,
    long_prompts=1,
    memory_tokens=(4096, 8192),
)


# ---- other scores in the same loop ---------------------------------------------------------------------------------


class Queries(Scorer):
    """Base of scores that look at attention: holds the queries of the block at hand."""

    keeps_scores = False
    most: int | None = None

    def __init__(self, shape: kv.CacheShape) -> None:
        self.shape = shape
        self.held: dict[int, list[np.ndarray]] = {}

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> None:
        self.held.setdefault(layer, []).append(q.copy())

    def attention(self, layer: int, units: Units) -> list[np.ndarray]:
        """Of each head the attention [queries, rep, units] of the block's last `most` queries; they see no later
        key.
        """
        q = np.concatenate(self.held.pop(layer))[-units.num_new :]
        q = q[-self.most :] if self.most else q
        rep, found = self.shape.num_heads // self.shape.num_kv_heads, []
        for head in range(self.shape.num_kv_heads):
            keys = units.keys(head)
            logits = self.shape.logit_scale * np.einsum("qrd,sd->qrs", q[:, head * rep : (head + 1) * rep], keys)
            own = np.arange(len(q)) + len(keys) - len(q)
            logits[np.broadcast_to((np.arange(len(keys)) > own[:, None])[:, None], logits.shape)] = -np.inf
            weights = np.exp(logits - logits.max(axis=2, keepdims=True))
            found.append(weights / weights.sum(axis=2, keepdims=True))
        return found


class WindowAttention(Queries):
    """SnapKV after each chunk: votes of the last queries, averaged over neighbours."""

    most = WINDOW

    def score(self, layer: int, units: Units) -> list[np.ndarray]:
        votes = [weights.sum(axis=(0, 1)) for weights in self.attention(layer, units)]
        return [np.convolve(vote, np.full(POOL, 1 / POOL), mode="same") for vote in votes]


class AccumulatedAttention(Queries):
    """H2O: all attention that a unit has received so far."""

    keeps_scores = True

    def score(self, layer: int, units: Units) -> list[np.ndarray]:
        found = [weights.sum(axis=(0, 1)) for weights in self.attention(layer, units)]
        for total, before in zip(found, units.past_scores):
            total[: len(before)] += before
        return found


class Newest(Scorer):
    """Recency, with the first tokens kept as sinks (StreamingLLM)."""

    is_final = True
    sinks = 4

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> np.ndarray:
        first = self.seen.get(layer, 0)
        self.seen[layer] = first + len(q)
        places = np.arange(first, first + len(q), dtype=np.float32)
        places[places < self.sinks] = np.float32(1e9)
        return np.repeat(places[:, None], k.shape[1], axis=1)


class Surprise(Newest):
    """SirLLM: tokens that the model did not expect, with the first ones as sinks; the same for all heads."""

    def __init__(self, surprise: np.ndarray) -> None:
        super().__init__()
        self.surprise = surprise

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> np.ndarray:
        scores = super().see(layer, q, k, v, turns)
        own = np.zeros(len(q), np.float32)  # of an answer, which is kept whole
        known = self.surprise[self.seen[layer] - len(q) : self.seen[layer]]
        own[: len(known)] = known
        return np.where(scores < np.float32(1e9), own[:, None], scores)


class Chance(Scorer):
    """Random scores, final."""

    is_final = True

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> np.ndarray:
        return self.rng.random((len(q), k.shape[1])).astype(np.float32)


class Study(BlockCache):
    """A block cache of the study, for any scorer; a question and its answer stay whole beside what was kept."""

    policy = "study"
    is_asking = False

    def begin_prompt(self, num_tokens: int, longest: int) -> list[int]:
        if not self.is_asking:
            return super().begin_prompt(num_tokens, longest)
        self._plan = deque([Step(num_tokens, folds=False)])
        return [num_tokens]

    def _unplanned(self, num_tokens: int) -> Step:
        return Step(num_tokens, folds=False) if self.is_asking else super()._unplanned(num_tokens)

    def fork(self) -> kv.KVCache:
        raise NotImplementedError("the study decodes one sequence")


# ---- the model and its heads ---------------------------------------------------------------------------------------


class Demo:
    """The model with heads of 128 channels, retaining heads for it, and the recall task."""

    def __init__(self, data: Path | None, sizes: Sizes, tick: Callable[[str], None]) -> None:
        self.directory, self.sizes, self.tick = wide_heads(), sizes, tick
        self.config = ModelConfig.from_directory(self.directory)
        self.shape = cache_shape(self.config)
        self.arena = Arena(1 << 40, Ledger())
        with Checkpoint(self.directory, self.config) as checkpoint:
            weights = load_weights(self.config, checkpoint, resolve(self.config, "float16"), self.arena)
        self.decoder = Decoder(self.config, weights, self.arena, segment_tokens=2048, logit_rows=128, exact=True)
        self.tokenizer = Tokenizer.from_directory(self.directory)
        self.rotary = RotaryTable(self.config.rope, self.config.head_dim)
        self.text = held_out_text() if data is None else data.read_text(encoding="utf-8")
        self.tokens = np.array(self.tokenizer.encode(self.text, add_bos=False), np.int64)
        if len(self.tokens) < sizes.long_tokens:
            raise InputError(f"{data or 'the bundled text'}: {len(self.tokens):,} tokens; needs {sizes.long_tokens:,}")
        self.heads: dict[str, dict[str, np.ndarray]] = {}
        self.quality: dict[str, list[tuple[float, float]]] = {}
        self.recalled: dict[tuple[Any, ...], np.ndarray] = {}

    def train(self) -> None:
        """Heads of every kind the study needs, and how well each ranks the tokens of held-out rows."""
        training = self.sizes.training
        kinds = {"trained": training, "untrained": replace(training, epochs=0)}
        if self.sizes.ablations:
            kinds |= {"not smoothed": replace(training, smoothness=0.0), "shuffled heads": training}
        rows = make_rows(self.tokenizer, BUNDLED_TEXT.read_text("utf-8"), training, training.row_tokens)
        held_out = make_rows(self.tokenizer, self.text, replace(training, rows=8, seed=99), training.row_tokens)
        tokens = np.concatenate([rows.tokens, held_out.tokens])
        self.heads = {kind: {} for kind in kinds}
        self.quality = {kind: [] for kind in kinds}
        self.smoothness: dict[str, list[float]] = {kind: [] for kind in kinds}
        with Checkpoint(self.directory, self.config) as checkpoint:
            stream = LayerStream(self.config, checkpoint, tokens, Arena(1 << 40, Ledger()))
            stream.embed()
            lessons, tests = Lessons(self.config, rows), Lessons(self.config, held_out)
            for layer in range(self.config.num_layers):
                self.tick(f"training heads, layer {layer + 1}")
                for part, each in ((stream.hidden[: training.rows], lessons), (stream.hidden[training.rows :], tests)):
                    each.restart()
                    stream.run_layer(layer, part, cache=each)
                for kind, settings in kinds.items():
                    labels = lessons.labels
                    if kind == "shuffled heads":  # each head learns what another one needs
                        labels = np.roll(labels, 1, axis=2)
                    weights = train_heads(
                        lessons.inputs,
                        labels,
                        rows.prompts,
                        settings.width,
                        settings,
                        num_layers=self.config.num_layers,
                    )
                    self.heads[kind] |= {f"{layer}.w1": weights[0], f"{layer}.w2": weights[1]}
                    self._judge(kind, weights, tests)

    def _judge(self, kind: str, weights: tuple[np.ndarray, np.ndarray], tests: Lessons) -> None:
        first, second = (weight.astype(np.float32) for weight in weights)
        for row, count in enumerate(tests.rows.prompts):
            x = tests.inputs[row, :count].astype(np.float32) @ first.T
            scores = (x / (1 + np.exp(-x))) @ second.T
            for head in range(scores.shape[1]):
                pair = scores[:, head], tests.labels[row, :count, head]
                self.quality[kind].append((spearman(*pair), overlap(*pair)))
            self.smoothness[kind].append(float(np.mean(np.diff(scores, axis=0) ** 2) / scores.var(axis=0).mean()))

    def surprise(self, prompt: Sequence[int]) -> np.ndarray:
        """Of each token how little the model expected it, in nats, having seen all before it (the full cache)."""
        found = np.zeros(len(prompt), np.float32)
        cache = self.cache("full", 0)
        tokens = np.array(prompt)
        hidden = self.decoder.hidden(tokens, cache).copy()
        for begin in range(0, len(tokens) - 1, 128):
            rows = slice(begin, min(begin + 128, len(tokens) - 1))
            logits = self.decoder.logits(hidden[rows])
            top = logits.max(axis=1)
            own = logits[np.arange(len(logits)), tokens[rows.start + 1 : rows.stop + 1]]
            found[rows.start + 1 : rows.stop + 1] = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - own
        cache.release()
        return found

    def cache(self, method: str, budget: int, prompt: Sequence[int] = (), **changes: Any) -> kv.KVCache:
        """A cache for one prompt. changes: of chunk, stable, turns."""
        arena = Arena(1 << 40, Ledger())
        if method == "full":
            return kv.build("float16", self.shape, arena, MOST_TOKENS)
        scorer: Scorer
        if method in self.heads:
            heads = self.heads[method]
            scorer = RetainingHeads(self.shape, self.rotary, self.sizes.training.width, arena, lambda: heads)
        else:
            scorer = {
                "SnapKV a chunk": lambda: WindowAttention(self.shape),
                "H2O": lambda: AccumulatedAttention(self.shape),
                "entropy": lambda: Surprise(self.surprise(prompt)),
                "recency": Newest,
                "random": lambda: Chance(0),
            }[method]()
        known = {"chunk": chunk_of(budget), "stable": int(budget * STABLE_SHARE), "turns": self.rotary}
        settings = {**known, **changes}
        allocator = Uniform([budget] * self.shape.num_layers)
        return Study(
            self.shape,
            arena,
            MOST_TOKENS,
            scorer=scorer,
            allocator=allocator,
            **settings,
        )

    def recall(self, method: str, num_tokens: int, budget: int, prompts: int, **changes: Any) -> np.ndarray:
        """Share of right answers of each prompt [prompts]: facts in real text, each asked for at the end, greedy."""
        asked = (method, num_tokens, budget, prompts, *sorted(changes))
        if asked not in self.recalled:
            self.tick(f"{method}, {budget} of {num_tokens}")
            self.recalled[asked] = np.array(
                [self._recall(method, num_tokens, budget, number, changes) for number in range(prompts)]
            )
        return self.recalled[asked]

    def _recall(self, method: str, num_tokens: int, budget: int, number: int, changes: dict[str, Any]) -> float:
        hidden = hide_facts(
            self.tokenizer,
            self.tokens,
            np.random.default_rng(FIRST_SEED + number),
            num_tokens=num_tokens,
            num_facts=FACTS,
            opening=self.config.bos_token_id or 0,
        )
        cache, begin, right = self.cache(method, budget, hidden.prompt, **changes), 0, 0
        for size in cache.begin_prompt(len(hidden.prompt), 1024):
            self.decoder.hidden(np.array(hidden.prompt[begin : begin + size]), cache)
            begin += size
        if isinstance(cache, Study):
            cache.is_asking = True
        length = cache.length
        for question, answer in hidden.questions:
            cache.begin_prompt(len(question), 1024)
            logits = self.decoder.forward(np.array(question), cache)
            said: list[int] = []
            for _ in range(ANSWER_TOKENS):
                said.append(int(logits.argmax()))
                logits = self.decoder.forward(np.array(said[-1:]), cache)
            right += is_right(self.tokenizer.decode(said), answer)
            cache.truncate(length)
        cache.release()
        return right / FACTS


def chunk_of(budget: int) -> int:
    """Tokens between two evictions, in the paper's proportion to what is kept."""
    return round(CHUNK_SHARE * budget)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of ranks."""
    return float(np.corrcoef(*(np.argsort(np.argsort(x)) for x in (one, other)))[0, 1])


def overlap(one: np.ndarray, other: np.ndarray, share: float = 0.1) -> float:
    """How much of the best tenth is in both."""
    count = max(int(share * len(one)), 1)
    top = [set(np.argsort(-x)[:count].tolist()) for x in (one, other)]
    return len(top[0] & top[1]) / count


# ---- claims --------------------------------------------------------------------------------------------------------


def quality_claim(demo: Demo) -> Claim:
    """Scores against the labels of prompts that the heads never saw."""
    means = {kind: np.mean(figures, axis=0) for kind, figures in demo.quality.items()}
    rank, top = means["trained"]
    return Claim(
        claim="scores rank the tokens of unseen prompts as the answers' queries do",
        measured="Spearman and top-10 % overlap: "
        + "; ".join(f"{kind} {one:.2f}, {other:.0%}" for kind, (one, other) in means.items())
        + "; chance 0.00, 10%",
        required="Spearman at least 0.5, overlap at least 3 times chance and above untrained heads",
        passed=bool(rank >= 0.5 and top >= 0.3 and top > means["untrained"][1]),
    )


def surplus(better: np.ndarray, worse: np.ndarray) -> tuple[float, float]:
    """How much more is answered of the same prompts, and the standard error of that over prompts."""
    difference = better - worse
    return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))


def is_more(better: np.ndarray, worse: np.ndarray) -> bool:
    """Whether it is more by over two standard errors."""
    difference, error = surplus(better, worse)
    return difference > 2 * error


def shown_surplus(better: np.ndarray, worse: np.ndarray) -> str:
    """The same in points."""
    difference, error = surplus(better, worse)
    return f"{100 * difference:+.0f} +- {100 * error:.0f} points"


def recall_claims(demo: Demo) -> list[Claim]:
    """All methods at one peak, for each share."""
    sizes, claims = demo.sizes, []
    methods = ("trained", "SnapKV a chunk", "H2O", "entropy", "recency", "random")
    full = demo.recall("full", sizes.prompt_tokens, 0, sizes.prompts)
    for share in sizes.shares:
        budget = sizes.prompt_tokens // share
        found = {name: demo.recall(name, sizes.prompt_tokens, budget, sizes.prompts) for name in methods}
        own, newest = found.pop("trained"), found["recency"]
        claims.append(
            Claim(
                claim=f"with the question last, trained scores answer more at T / {share} than the other scores",
                measured=f"right of {sizes.prompts} times {FACTS} at {sizes.prompt_tokens} tokens, b = {budget}, "
                f"c = {chunk_of(budget)}: full {full.mean():.0%}; Locret {own.mean():.0%}; "
                + "; ".join(f"{n} {each.mean():.0%} ({shown_surplus(own, each)})" for n, each in found.items()),
                required="not above the full cache, and more than each other, by 2 standard errors",
                passed=not is_more(own, full) and all(is_more(own, each) for each in found.values()),
            )
        )
        seen = {name: found[name] for name in ("H2O", "SnapKV a chunk")}
        claims.append(
            Claim(
                claim=f"at T / {share} accumulated and windowed attention answer more than the last tokens do",
                measured="; ".join(f"{n} {each.mean():.0%} ({shown_surplus(each, newest)})" for n, each in seen.items())
                + f"; recency {newest.mean():.0%}",
                required="both more, by 2 standard errors",
                passed=all(is_more(each, newest) for each in seen.values()),
            )
        )
        if share == 16:
            claims.append(
                Claim(
                    claim="at 16 times compression trained scores answer nearly as much as the full cache",
                    measured=f"{own.mean():.0%} against {full.mean():.0%}",
                    required="within 10 points",
                    passed=own.mean() >= full.mean() - 0.1,
                )
            )
    return claims


def ablation_claims(demo: Demo) -> list[Claim]:
    """What each part is for."""
    sizes = demo.sizes
    budget = sizes.prompt_tokens // 16
    own = demo.recall("trained", sizes.prompt_tokens, budget, sizes.prompts)
    shuffled = demo.recall("shuffled heads", sizes.prompt_tokens, budget, sizes.prompts)
    unsafe = demo.recall("trained", sizes.prompt_tokens, budget, sizes.prompts, stable=0)
    rough, smooth = (float(np.mean(demo.smoothness[kind])) for kind in ("not smoothed", "trained"))
    return [
        Claim(
            claim="heads trained on the labels of other heads answer less",
            measured=f"{shuffled.mean():.0%} against {own.mean():.0%} at T / 16, {shown_surplus(shuffled, own)}",
            required="less by 2 standard errors",
            passed=is_more(own, shuffled),
        ),
        Claim(
            claim="without stabilizers fewer questions are answered",
            measured=f"{unsafe.mean():.0%} with n_s = 0, {own.mean():.0%} with n_s = {int(budget * STABLE_SHARE)}, at "
            f"T / 16, {shown_surplus(unsafe, own)}",
            required="fewer by 2 standard errors",
            passed=is_more(own, unsafe),
        ),
        Claim(
            claim="the smoothness term keeps the scores of neighbours closer",
            measured=f"mean squared step over the variance of scores: {smooth:.3f} with it, {rough:.3f} without",
            required="less with it",
            passed=smooth < rough,
        ),
    ]


def causality_claim(demo: Demo) -> Claim:
    """Scores stored of the same tokens, with and without what follows them."""
    prompt = demo.tokens[:512]
    found = []
    for count in (512, 300):
        cache = demo.cache("trained", 1024, stable=0, chunk=128)
        begin = 0
        for size in cache.begin_prompt(count, 1024):
            demo.decoder.hidden(np.array(prompt[begin : begin + size]), cache)
            begin += size
        past = cache._layers[-1].past  # type: ignore[attr-defined]
        found.append(np.stack([each[:128] for each in np.split(past.scores(past.num_rows), past.offsets[1:-1])]))
        cache.release()
    same = np.array_equal(*found)
    return Claim(
        claim="a token's score does not depend on what comes after it",
        measured=f"largest difference over 128 tokens of the last layer: {np.abs(found[0] - found[1]).max():g}",
        required="0",
        passed=same,
    )


def longer_claim(demo: Demo) -> Claim:
    """A prompt twice as long as anything that the model was trained on."""
    sizes = demo.sizes
    budget, known = 256, demo.config.max_position
    packed, spread = (
        float(demo.recall("trained", sizes.long_tokens, budget, sizes.long_prompts, **changes).mean())
        for changes in ({}, {"turns": None})
    )
    full = float(demo.recall("full", sizes.long_tokens, 0, sizes.long_prompts).mean())
    return Claim(
        claim=f"prompts beyond the {known} positions that the model knows work, because units are numbered anew",
        measured=f"right of {sizes.long_prompts} times {FACTS} at {sizes.long_tokens} tokens, b = {budget}: "
        f"{packed:.0%} numbered anew, {spread:.0%} with the positions of the prompt; full cache {full:.0%}",
        required="at least a third right, and more than both others",
        passed=packed >= 1 / 3 and packed > max(spread, full),
    )


def memory_claim(sizes: Sizes, tick: Callable[[str], None]) -> Claim:
    """Bytes over the prefill, on a model with random weights and a wide cache: on the ledger, and resident above those
    before it.
    """
    config = random_model()
    shape = cache_shape(config)
    held: dict[str, list[int]] = {"Locret": [], "full cache": []}
    resident: dict[str, list[int]] = {"Locret": [], "full cache": []}
    # the shortest once more, first: what the heap and the kernels keep of it is there from then on
    for round_, num_tokens in enumerate((sizes.memory_tokens[0], *sizes.memory_tokens)):
        for method in held:
            if method == "full cache" and (num_tokens > 8192 or not round_):
                continue
            tick(f"memory, {method}, {num_tokens} tokens")
            on_ledger, in_process = prefill_growth(config, shape, method == "Locret", num_tokens)
            if round_:
                held[method].append(on_ledger)
                resident[method].append(in_process)
    own, full = resident["Locret"], resident["full cache"]

    def shown(peaks: dict[str, list[int]]) -> str:
        return "; ".join(f"{name} " + ", ".join(f"{n / 1e6:.1f}" for n in found) for name, found in peaks.items())

    return Claim(
        claim="the peak of a prefill does not grow with the prompt",
        measured=f"at {', '.join(f'{n:,}' for n in sizes.memory_tokens)} tokens (full cache up to 8,192), random "
        f"weights, b = 512, c = 256, MB on the ledger: {shown(held)}; MB of the resident set above that before: "
        f"{shown(resident)}",
        required="Locret the same on the ledger, and at most 10 % apart in the process; the full cache at least 1.8 "
        "times from 4,096 to 8,192",
        passed=len(set(held["Locret"])) == 1 and max(own) <= 1.1 * min(own) and full[1] >= 1.8 * full[0],
    )


def random_model() -> ModelConfig:
    """Two layers that are quick to run and have much to cache: 8 KiB a token."""
    demo = ModelConfig.from_directory(model_directory("demo"))
    return replace(
        demo,
        num_layers=2,
        hidden_size=128,
        intermediate_size=128,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        max_position=1 << 16,
        sliding_windows=(None, None),
        rope=RopeConfig(type="default", theta=10_000.0),
    )


def prefill_growth(config: ModelConfig, shape: kv.CacheShape, evicts: bool, num_tokens: int) -> tuple[int, int]:
    """Most bytes of a cache on the ledger during a prefill; and most resident ones, less those before it."""
    from memwall import kernels
    from memwall.formats import codec

    rng = np.random.default_rng(0)
    matrices, vectors = {}, {}
    for tensor in config.tensors():
        values = (rng.standard_normal(tensor.shape) * 0.05).astype(np.float32)
        if len(tensor.shape) == 1:
            vectors[tensor.name] = np.ones(tensor.shape, np.float32)
        else:
            matrices[tensor.name] = kernels.matrix(codec("float32").encode(values))
    if config.tie_word_embeddings:
        from memwall.models.config import EMBEDDING, HEAD

        matrices.setdefault(HEAD, matrices[EMBEDDING])
    arena = Arena(1 << 40, Ledger())
    decoder = Decoder(
        config, Weights(matrices=matrices, vectors=vectors, specs={}), arena, segment_tokens=256, exact=True
    )
    own = Arena(1 << 40, Ledger())
    cache: kv.KVCache
    if evicts:
        heads = {
            f"{layer}.{name}": (rng.standard_normal(size) * 0.05).astype(np.float16)
            for layer in range(config.num_layers)
            for name, size in (("w1", (64, 48 * 64)), ("w2", (16, 64)))
        }
        rotary = RotaryTable(config.rope, config.head_dim)
        scorer = RetainingHeads(shape, rotary, 64, own, lambda: heads)
        cache = Study(
            shape,
            own,
            num_tokens + 8,
            scorer=scorer,
            allocator=Uniform([512] * 2),
            chunk=256,
            stable=78,
            turns=rotary,
        )
    else:
        cache = kv.build("float16", shape, own, num_tokens + 8)
    tokens = rng.integers(0, config.vocab_size, num_tokens)
    decoder.hidden(tokens[:256], cache)  # buffers of the kernels are there from now on
    cache.truncate(0)
    gc.collect()  # an earlier model must not leave the process while this one is measured
    before, most, begin = resident_bytes(exact=True), 0, 0
    for size in cache.begin_prompt(num_tokens, 256):
        decoder.hidden(tokens[begin : begin + size], cache)
        begin += size
        most = max(most, resident_bytes(exact=True) - before)
    cache.release()
    decoder.release()
    return own.peak_bytes, most


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Claims of Locret."""
    sizes = QUICK if quick else FULL
    whole = 8 + 1 + 6 * len(sizes.shares) + 3 + (2 if sizes.ablations else 0) + 2 * len(sizes.memory_tokens)
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, whole), whole, what)

    memory = memory_claim(sizes, tick)  # first, while the heap is tidy
    demo = Demo(data, sizes, tick)
    demo.train()
    claims = [*recall_claims(demo), quality_claim(demo), causality_claim(demo), longer_claim(demo), memory]
    claims += ablation_claims(demo) if sizes.ablations else []
    return [*claims, not_run("an 8B shape reads 128K tokens within 24 GB", "peak below 24 GB")]


if __name__ == "__main__":
    sys.exit(main("locret", sys.modules[__name__]))
