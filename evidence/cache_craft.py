"""Cache-Craft's claims, on the bundled demo model and, for time, on random weights of a larger model's shape.

Quality: prompts of consecutive passages of a text, each of which was computed behind other passages before; divergence
of the next-token distributions over the text that follows, from those of a full prefill, for several ways to choose
what is computed again. Facts whose sentence is cut by a chunk's border, so that the answer needs both chunks. Then a
stream of questions about a small library with Zipf's popularity, replayed with the store, with prefix caching and in
full; time with kept chunks on an emulated slow disk; and a queue on a virtual clock with a model's costs.

Text: `--data` a UTF-8 file; the held-out text that ships with the planner (documentation of Python's standard library)
otherwise.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kernels, kv
from memwall.claims import Claim, Progress, main, not_run
from memwall.compress.calibration import BUNDLED_TEXT, read_text
from memwall.engine.loading import cache_shape
from memwall.errors import InputError
from memwall.formats import codec
from memwall.kv.cache_craft import Context, CraftSettings, chunk_id, order_distance
from memwall.kv.cache_craft_fit import Trial, divergence
from memwall.kv.chunk_prefill import Outcome, prefill
from memwall.kv.chunk_prompt import ChunkPrompt
from memwall.kv.chunk_store import ChunkStore
from memwall.kv.saved import Origin
from memwall.memory import Arena, Ledger
from memwall.models import ModelConfig, model_directory
from memwall.models.decoder import Decoder
from memwall.models.weights import Weights
from memwall.plan.choose import held_out_text

NAMES = [
    "Alice",
    "Tom",
    "Maria",
    "Oscar",
    "Nina",
    "Peter",
    "Laura",
    "Victor",
    "Emma",
    "David",
    "Sarah",
    "Henry",
    "Ruth",
    "Simon",
    "Clara",
    "Martin",
    "red",
    "blue",
    "green",
    "silver",
    "tiger",
    "falcon",
    "otter",
    "badger",
    "alpha",
    "beta",
    "gamma",
    "delta",
    "sigma",
    "omega",
]
PLAIN = CraftSettings(alpha=0.0, stop=0)
SHARES = (0.1, 0.2, 0.3)
ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """windows: prompts of the quality study; fitting: those that alpha is fitted on; tries: facts across a border;
    pairs: chunks with two contexts; library, requests: chunks and questions of a stream; layers, hidden, tokens: of the
    random model and its prompt; rounds: of timings, the least of which counts, as others may use the machine. None of
    these three: no timings, since those of a model small enough to be quick are too short to be told from noise.
    """

    windows: int
    fitting: int
    shares: tuple[float, ...]
    tries: int
    pairs: int
    library: int
    requests: int
    skews: tuple[float, ...]
    layers: int = 0
    hidden: int = 0
    tokens: int = 0
    rounds: int = 0


FULL = Sizes(windows=20, fitting=12, shares=(0.0, *SHARES, 0.5, 0.7, 1.0), tries=40, pairs=120, library=30,
             requests=150, skews=(0.6, 1.0, 1.4), layers=16, hidden=2048, tokens=640, rounds=2)  # fmt: skip
QUICK = Sizes(windows=5, fitting=6, shares=(0.0, *SHARES, 1.0), tries=6, pairs=14, library=14,
              requests=24, skews=(1.0,))  # fmt: skip


class Lab(Trial):
    """The demo model with a text, and stores that last for one experiment."""

    def store(self, settings: CraftSettings = PLAIN, **options: Any) -> ChunkStore:
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        return ChunkStore(folder, self.origin, self.cache.shape, self.arena, settings, **options)

    def passage(self, rng: np.random.Generator, size: int) -> list[int]:
        begin = int(rng.integers(0, len(self.ids) - size))
        return self.ids[begin : begin + size]

    def rows(self, begin: int, end: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values of all layers, as the cache has them now."""
        found = (self.cache.rows(layer, begin, end) for layer in range(self.cache.shape.num_layers))
        return [(keys.copy(), values.copy()) for keys, values in found]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, equal values sharing the mean of their ranks."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, places, counts = np.unique(np.round(values, 9), return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[places])

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


# ---- which tokens to compute again ---------------------------------------------------------------------------------

Pick = Callable[[Context, int], np.ndarray]


def choices(deviation: dict[int, np.ndarray], rng: np.random.Generator) -> dict[str, Pick]:
    """pick(context, count) by name. deviation: of a context (by identity), each token's in the second layer."""
    return {
        "attention": lambda context, count: context.ranked(count),
        "random": lambda context, count: np.sort(rng.permutation(context.num_tokens)[:count]),
        "first tokens": lambda context, count: np.arange(count),
        "deviation of layer 1": lambda context, count: np.sort(np.argsort(-deviation[id(context)])[:count]),
    }


def at_share(pick: Pick, share: float) -> Pick:
    """The same of so large a share of every chunk, whatever its score asks for."""
    return lambda context, _: pick(context, int(np.ceil(share * context.num_tokens)))


def deviations(lab: Lab, store: ChunkStore, prompt: ChunkPrompt) -> dict[int, np.ndarray]:
    """How far the second layer's keys and values of each token lie from a full prefill's, as CacheBlend chooses by."""
    lab.full(prompt)
    wanted = lab.rows(0, lab.cache.length)[1]
    lab.reused(store, prompt, 0.0)
    found, begin, by_context = lab.rows(0, lab.cache.length)[1], len(prompt.opening), {}
    for chunk in prompt.chunks:
        end = begin + len(chunk)
        apart = [np.linalg.norm((a - b)[begin:end].reshape(len(chunk), -1), axis=1) for a, b in zip(found, wanted)]
        (context,) = store.variants(chunk_id(chunk)).values()
        by_context[id(context)] = apart[0] / apart[0].mean() + apart[1] / apart[1].mean()
        begin = end
    return by_context


def repair_study(lab: Lab, sizes: Sizes, tick: Callable[[str], None]) -> dict[tuple[str, float], np.ndarray]:
    """Divergence by way of choosing and share of tokens, one number a prompt."""
    rng, found = np.random.default_rng(0), dict[tuple[str, float], list[float]]()
    places = np.linspace(0, len(lab.ids) - 2 * lab.window, sizes.windows).astype(int)
    for number, place in enumerate(places):
        tick(f"repair, prompt {number + 1}")
        chunks, question = lab.pieces(int(place))
        others = lab.pieces(int((place + len(lab.ids) // 2) % (len(lab.ids) - lab.window)))[0]
        prompt = ChunkPrompt(lab.opening, chunks, question)
        with lab.store() as store:
            lab.keep(store, chunks, others)
            truth = lab.full(prompt)
            for name, pick in choices(deviations(lab, store, prompt), rng).items():
                for share in sizes.shares:
                    if share in (0.0, 1.0) and name != "attention":
                        continue
                    mine, _ = lab.reused(store, prompt, 0.0, at_share(pick, share))
                    found.setdefault((name, share), []).append(divergence(truth, mine))
    return {key: np.array(values) for key, values in found.items()}


def repair_claims(lab: Lab, sizes: Sizes, tick: Callable[[str], None]) -> Iterator[Claim]:
    found = repair_study(lab, sizes, tick)
    mean = {key: float(values.mean()) for key, values in found.items()}
    names = list(dict.fromkeys(name for name, _ in mean))
    plain = mean["attention", 0.0]
    mended = {name: [1 - mean[name, share] / plain for share in SHARES] for name in names}
    curve = [mean["attention", share] for share in sizes.shares]
    shown = "; ".join(f"{name} " + ", ".join(f"{part:.0%}" for part in parts) for name, parts in mended.items())
    gap = np.mean([found["random", share] - found["attention", share] for share in SHARES], axis=0)
    errors = float(gap.mean() / (gap.std(ddof=1) / np.sqrt(len(gap))))
    ratio = sum(mended["attention"]) / max(sum(mended["random"]), 1e-9)
    yield Claim(
        claim="tokens that looked outside their chunk repair it better than random ones at 10, 20 and 30 %",
        measured=f"{sizes.windows} prompts; plain reuse {plain:.4f} nats; mended by 10, 20, 30 %: {shown}; "
        f"{ratio:.2f} times random's, {errors:+.1f} standard errors",
        required="more than random at each share, 1.3 times in the mean; by 2 standard errors with 20 prompts or more",
        passed=all(a > b for a, b in zip(mended["attention"], mended["random"]))
        and ratio >= 1.3
        and (errors > 2 or sizes.windows < FULL.windows),
    )
    yield Claim(
        claim="plain reuse is worst, and the error falls with every share computed, to nothing when all is",
        measured=", ".join(f"{share:.0%}: {value:.5f}" for share, value in zip(sizes.shares, curve)),
        required="falling; at most 1e-6 nats at 100 %; no way of choosing above plain reuse at any share",
        passed=all(a > b for a, b in itertools.pairwise(curve)) and curve[-1] <= 1e-6 and max(mean.values()) == plain,
    )
    ours, theirs = (sum(mended[name][:2]) for name in ("attention", "deviation of layer 1"))
    yield Claim(
        claim="at 10 and 20 % the choice from kept statistics is as good as one that computes a layer of everything "
        "first (CacheBlend's)",
        measured=f"mended in sum {ours:.2f} against {theirs:.2f}",
        required="at least level, within 0.05",
        passed=ours > theirs - 0.05,
    )


# ---- answers that need two chunks ----------------------------------------------------------------------------------


def say(lab: Lab, logits: np.ndarray) -> str:
    """The greedy answer after a prompt that the cache holds; logits (or log-probabilities) of its first token."""
    said: list[int] = []
    for _ in range(ANSWER_TOKENS):
        said.append(int(logits.argmax()))
        logits = lab.decoder.forward(np.array(said[-1:]), lab.cache)
    return lab.tokenizer.decode(said).strip()


def encode(lab: Lab, text: str) -> list[int]:
    return lab.tokenizer.encode(text, add_bos=False)


def ask(name: str) -> str:
    return f"\nWhat is the secret number of {name}? The secret number of {name} is"


def split_facts(lab: Lab, rng: np.random.Generator) -> tuple[list[list[int]], list[int], str]:
    """Four chunks at whose three borders a fact is cut after `is`; a question about one, and its answer."""
    names = rng.choice(NAMES, 3, replace=False)
    numbers = [str(number) for number in rng.integers(1000, 100_000, 3)]
    chunks = [lab.passage(rng, 90) for _ in range(4)]
    for index, (name, number) in enumerate(zip(names, numbers)):
        chunks[index] = chunks[index] + encode(lab, f"\nThe secret number of {name} is")
        chunks[index + 1] = encode(lab, f" {number}.\n") + chunks[index + 1]
    asked = int(rng.integers(3))
    return chunks, encode(lab, ask(str(names[asked]))), numbers[asked]


def border_claim(lab: Lab, sizes: Sizes, tick: Callable[[str], None]) -> Claim:
    right = dict.fromkeys(("full", "plain", "attention", "random", "first tokens"), 0)
    for attempt in range(sizes.tries):
        tick(f"facts across a border, {attempt + 1}")
        rng = np.random.default_rng(attempt)
        chunks, question, answer = split_facts(lab, rng)
        prompt = ChunkPrompt(lab.opening, chunks, question)
        others = [lab.passage(rng, 100) for _ in range(4)]
        with lab.store() as store:
            lab.keep(store, chunks, others)
            lab.cache.truncate(0)
            logits = lab.decoder.forward(np.array(prompt.tokens), lab.cache)
            right["full"] += say(lab, logits).startswith(answer)
            picks = choices({}, rng)
            for name in right.keys() - {"full"}:
                pick = at_share(picks["attention"], 0.0) if name == "plain" else at_share(picks[name], 0.15)
                mine, _ = lab.reused(store, prompt, 0.0, pick)
                right[name] += say(lab, mine[-1]).startswith(answer)
    shares = {name: count / sizes.tries for name, count in right.items()}
    lost = shares["full"] - shares["plain"]
    return Claim(
        claim="facts whose sentence a chunk's border cuts are lost by plain reuse and found again with 15 % repaired",
        measured=", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + f" of {sizes.tries}",
        required="plain loses a quarter at least; the repair wins back half of that, and more than random tokens do",
        passed=lost >= 0.25
        and shares["attention"] - shares["plain"] >= lost / 2
        and shares["attention"] > shares["random"],
    )


# ---- the score -----------------------------------------------------------------------------------------------------


def two_contexts(rng: np.random.Generator, near: list[list[int]], far: list[list[int]]) -> list[list[list[int]]]:
    """Predecessors of a chunk when it was kept, and now: drawn anew, changed a little, or in another order."""
    pool = [*near, *far]
    old = [pool[index] for index in rng.permutation(len(pool))[: int(rng.integers(0, 4))]]
    kind = int(rng.integers(3))
    if kind == 0:
        return [old, [pool[index] for index in rng.permutation(len(pool))[: int(rng.integers(0, 4))]]]
    if kind == 1:
        new = list(old)
        if new and rng.random() < 0.5:
            new.pop(int(rng.integers(len(new))))
        if rng.random() < 0.5:
            new.insert(int(rng.integers(len(new) + 1)), pool[int(rng.integers(len(pool)))])
        return [old, new]
    return [old, [old[index] for index in rng.permutation(len(old))]]


def score_claim(lab: Lab, sizes: Sizes, tick: Callable[[str], None]) -> Claim:
    rng = np.random.default_rng(1)
    scores, paper, apart = list[float](), list[float](), list[float]()
    for number in range(sizes.pairs):
        tick(f"score, pair {number + 1}")
        size, place = int(rng.integers(64, 129)), int(rng.integers(0, len(lab.ids) - 700))
        chunk = lab.ids[place + 400 : place + 400 + size]
        near = [lab.ids[place + 100 * i : place + 100 * (i + 1)] for i in range(4)]
        old, new = two_contexts(rng, near, [lab.passage(rng, 100) for _ in range(2)])
        with lab.store() as store:
            lab.reused(store, ChunkPrompt(lab.opening, [*old, chunk], [5]), 1.0)
            begin = len(lab.opening) + sum(map(len, old))
            kept = lab.rows(begin, begin + size)
            lab.full(ChunkPrompt(lab.opening, [*new, chunk], [5]))
            begin = len(lab.opening) + sum(map(len, new))
            true = lab.rows(begin, begin + size)
            (context,) = store.variants(chunk_id(chunk)).values()
        # values do not turn with the place: the same chunk in the same context has the same ones anywhere
        apart.append(float(np.mean([np.linalg.norm(a[1] - b[1]) / np.linalg.norm(b[1]) for a, b in zip(kept, true)])))
        before = [chunk_id(lab.opening), *map(chunk_id, new)]
        lengths = [0, *map(len, new)]
        scores.append(context.overhead(before, lengths, 1.0))
        order = order_distance(context.predecessors, before)
        paper.append(context.impact * (1 - context.shared(before) * (1 - order)))
    ours, theirs = rank_correlation(scores, apart), rank_correlation(paper, apart)
    return Claim(
        claim="the score of context lost (CFO) predicts how far plain reuse is from the truth",
        measured=f"rank correlation {ours:.2f} over {sizes.pairs} pairs of contexts; with beta as the paper has it "
        f"{theirs:.2f}",
        required="at least 0.5",
        passed=ours >= 0.5,
    )


# ---- a stream of questions -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Library:
    """Chunks with one fact each: token ids, whose fact, and the number."""

    chunks: list[list[int]]
    names: list[str]
    numbers: list[str]


def make_library(lab: Lab, rng: np.random.Generator, count: int) -> Library:
    names = NAMES[:count]
    numbers = [str(number) for number in rng.integers(1000, 100_000, count)]
    chunks = []
    for name, number in zip(names, numbers):
        cut, body = int(rng.integers(10, 60)), lab.passage(rng, 80)
        chunks.append([*body[:cut], *encode(lab, f"\nThe secret number of {name} is {number}.\n"), *body[cut:]])
    return Library(chunks, names, numbers)


def requests_of(rng: np.random.Generator, library: Library, count: int, skew: float) -> list[tuple[list[int], int]]:
    """(chunks in order, the one that is asked about) of each request; four chunks, popular by Zipf's law."""
    weights = 1.0 / np.arange(1, len(library.chunks) + 1) ** skew
    weights /= weights.sum()
    drawn = (rng.choice(len(library.chunks), 4, replace=False, p=weights) for _ in range(count))
    return [([int(i) for i in rng.permutation(each)], int(each[0])) for each in drawn]


@dataclass(slots=True)
class Replay:
    """What a stream took: rows (tokens times layers) of each request, answers right, CFO of chunks met before."""

    rows: list[int]
    right: int
    overheads: list[float]


def replay(
    lab: Lab,
    library: Library,
    requests: Sequence[tuple[list[int], int]],
    alpha: float,
    settings: CraftSettings = PLAIN,
    *,
    answers: bool = False,
    **options: Any,
) -> Replay:
    rows, right, overheads = list[int](), 0, list[float]()
    with lab.store(settings, **options) as store:
        for order, asked in requests:
            question = encode(lab, ask(library.names[asked]))
            prompt = ChunkPrompt(lab.opening, [library.chunks[index] for index in order], question)
            met = [bool(store.variants(chunk_id(chunk))) for chunk in prompt.chunks]
            mine, outcome = lab.reused(store, prompt, alpha)
            rows.append(outcome.rows_run)
            overheads += [part.reuse.overhead for part, before in zip(outcome.parts[1:], met) if before]
            if answers:
                right += say(lab, mine[-1]).startswith(library.numbers[asked])
    return Replay(rows, right, overheads)


def full_rows(lab: Lab, library: Library, requests: Sequence[tuple[list[int], int]]) -> tuple[list[int], list[int]]:
    """Rows of full prefills, and with a prefix cache that never forgets, for each request."""
    layers = lab.cache.shape.num_layers
    seen: set[tuple[int, ...]] = set()
    full, prefix = [], []
    for order, asked in requests:
        question = len(encode(lab, ask(library.names[asked])))
        sizes = [len(library.chunks[index]) for index in order]
        shared = 0
        for count in range(1, len(order) + 1):
            if tuple(order[:count]) in seen:
                shared = len(lab.opening) + sum(sizes[:count])
            seen.add(tuple(order[:count]))
        whole = len(lab.opening) + sum(sizes) + question
        full.append(layers * whole)
        prefix.append(layers * (whole - shared))
    return full, prefix


def fitted_to_other_text(num_prompts: int) -> float:
    """What `memwall fit demo cache-craft` finds: on the bundled calibration text, which nothing here reads."""
    with Trial(model_directory("demo"), read_text(BUNDLED_TEXT)) as trial:
        return float(trial.run(num_prompts=num_prompts)["alpha"][0])


def stream_claims(lab: Lab, sizes: Sizes, alpha: float, tick: Callable[[str], None]) -> Iterator[Claim]:
    rng = np.random.default_rng(2)
    library = make_library(lab, rng, sizes.library)
    shown, ordered, last = [], True, None
    for skew in sizes.skews:
        tick(f"stream, skew {skew}")
        requests = requests_of(np.random.default_rng(3), library, sizes.requests, skew)
        full, prefix = full_rows(lab, library, requests)
        mine = replay(lab, library, requests, alpha)
        parts = sum(prefix) / sum(full), sum(mine.rows) / sum(full)
        shown.append(f"skew {skew}: prefix cache {parts[0]:.0%}, kept chunks {parts[1]:.0%}")
        ordered = ordered and 1 > parts[0] > parts[1]
        last = parts if skew == 1.0 or last is None else last
    assert last is not None
    yield Claim(
        claim="on a stream of questions over popular chunks in any order, less is computed than with a prefix cache "
        "that never forgets, and than in full",
        measured=f"of full prefills, alpha {alpha:g}, {sizes.requests} requests of 4 chunks of {len(library.chunks)}: "
        + "; ".join(shown),
        required="full > prefix > kept chunks at every skew; at skew 1 at most 0.7 of the prefix cache's",
        passed=ordered and last[1] <= 0.7 * last[0],
    )
    yield quality_claim(lab, sizes, library, alpha, tick)
    yield from store_claims(lab, sizes, library, tick)
    yield queue_claim(lab, sizes, library, alpha, tick)


def quality_claim(lab: Lab, sizes: Sizes, library: Library, alpha: float, tick: Callable[[str], None]) -> Claim:
    tick("answers of the stream")
    requests = requests_of(np.random.default_rng(4), library, sizes.requests, 1.0)
    right = 0
    for order, asked in requests:
        prompt = ChunkPrompt(
            lab.opening, [library.chunks[i] for i in order], encode(lab, ask(library.names[asked]))
        )  # fmt: skip
        lab.cache.truncate(0)
        logits = lab.decoder.forward(np.array(prompt.tokens), lab.cache)
        right += say(lab, logits).startswith(library.numbers[asked])
    mine = replay(lab, library, requests, alpha, answers=True)
    stopped = replay(lab, library, requests, alpha, CraftSettings(alpha=0.0), answers=True)
    count = len(requests)
    saved = 1 - sum(stopped.rows) / sum(mine.rows)
    return Claim(
        claim="answers of the stream stay right, also when repair stops early for chunks the question does not look at",
        measured=f"full {right / count:.1%}, kept chunks {mine.right / count:.1%}, with early stop "
        f"{stopped.right / count:.1%} of {count}; early stop computes {saved:.0%} less",
        required="both within 2 points, or one answer, of full; early stop computes less",
        passed=min(mine.right, stopped.right) >= right - max(0.02 * count, 1) and saved > 0,
    )


def store_claims(lab: Lab, sizes: Sizes, library: Library, tick: Callable[[str], None]) -> Iterator[Claim]:
    requests = requests_of(np.random.default_rng(5), library, sizes.requests, 1.0)
    found = {}
    for most in (1, 5):
        tick(f"variants, {most}")
        found[most] = replay(lab, library, requests, 2.0, replace(PLAIN, variants=most))
    means = {most: statistics.fmean(one.overheads) for most, one in found.items()}
    yield Claim(
        claim="several contexts of a chunk lower what must be repaired",
        measured=f"mean CFO at alpha 2 of chunks met before: 1 variant {means[1]:.3f}, 5 variants {means[5]:.3f}; rows "
        f"computed {sum(found[1].rows):,} and {sum(found[5].rows):,}",
        required="lower with 5",
        passed=means[5] < means[1],
    )
    with lab.store() as store:
        lab.reused(store, ChunkPrompt(lab.opening, [library.chunks[0]], [5]), 0.0)
        size = store.disk_used_bytes
    rows, room = {}, 2 * len(library.chunks) // 3
    for by_value in (True, False):
        tick(f"eviction, {'by value' if by_value else 'by last use'}")
        one = replay(lab, library, requests, 2.0, by_value=by_value, disk_bytes=room * size)
        rows[by_value] = sum(one.rows)
    whole = sum(full_rows(lab, library, requests)[0])
    yield Claim(
        claim="letting the least valuable leave saves more than letting the least recently used leave, at equal bytes",
        measured=f"room for {room} variants, alpha 2: saved of full prefills by value {1 - rows[True] / whole:.1%}, by "
        f"last use {1 - rows[False] / whole:.1%}",
        required="more",
        passed=rows[True] < rows[False],
    )


# ---- a queue on a virtual clock ------------------------------------------------------------------------------------


def serve(
    prefill_seconds: Sequence[float], arrivals: Sequence[float], new_tokens: int, step: float
) -> tuple[float, float]:
    """(mean latency, time until all are done) of continuous batching: a waiting prompt first, then a step of all."""
    waiting, running, done = list(range(len(arrivals))), dict[int, int](), dict[int, float]()
    now = 0.0
    while waiting or running:
        if waiting and arrivals[waiting[0]] <= now:
            index = waiting.pop(0)
            now += prefill_seconds[index]
            running[index] = new_tokens
        elif running:
            now += step
            for index in list(running):
                running[index] -= 1
                if not running[index]:
                    del running[index]
                    done[index] = now
        else:
            now = arrivals[waiting[0]]
    return statistics.fmean(done[index] - arrivals[index] for index in done), now


def queue_claim(lab: Lab, sizes: Sizes, library: Library, alpha: float, tick: Callable[[str], None]) -> Claim:
    tick("queue")
    requests = requests_of(np.random.default_rng(6), library, sizes.requests, 1.0)
    mine = replay(lab, library, requests, alpha).rows
    full, prefix = full_rows(lab, library, requests)
    # seconds a row and a decode step of a 1B model on two cores (model: 100 GFLOP/s, 20 GB/s): only the order matters
    row, step, new = 2e9 / 16 / 100e9 * 16 / lab.cache.shape.num_layers, 0.05, 8
    gaps = np.random.default_rng(7).exponential(1.0, len(requests))
    arrivals = np.cumsum(gaps * (statistics.fmean(prefix) * row + new * step) * 1.05)
    latency = {
        name: serve([rows * row for rows in one], arrivals, new, step)[0]
        for name, one in (("full", full), ("prefix", prefix), ("kept", mine))
    }
    flood = {
        name: serve([rows * row for rows in one], np.zeros(len(requests)), new, step)[1]
        for name, one in (("prefix", prefix), ("kept", mine))
    }
    faster = flood["prefix"] / flood["kept"]
    return Claim(
        claim="in a queue with continuous batching (virtual clock, costs of a 1B model by formula), more requests are "
        "served and each waits less than with a prefix cache",
        measured="mean latency at the load that a prefix cache just bears: "
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in latency.items())
        + f"; throughput {faster:.2f} times the prefix cache's",
        required="kept < prefix < full; throughput at least 1.2 times",
        passed=latency["kept"] < latency["prefix"] < latency["full"] and faster >= 1.2,
    )


# ---- time ----------------------------------------------------------------------------------------------------------


class Random:
    """A model of random 4-bit weights, whose layers share theirs: time does not depend on what they say."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        base = ModelConfig.from_directory(model_directory("demo"))
        heads = sizes.hidden // 64
        self.config = config = replace(
            base, num_layers=sizes.layers, hidden_size=sizes.hidden, num_heads=heads, num_kv_heads=max(heads // 4, 1),
            head_dim=64, intermediate_size=4 * sizes.hidden, max_position=4096,
            sliding_windows=(None,) * sizes.layers,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        form, specs, matrices, vectors = codec("int4-g64"), {}, {}, {}
        shared: dict[str, Any] = {}
        for tensor in config.tensors():
            specs[tensor.name] = "int4-g64" if len(tensor.shape) == 2 else "float32"
            kind = tensor.name.split(".", 3)[-1] if ".layers." in tensor.name else tensor.name
            if len(tensor.shape) == 2:
                if kind not in shared:
                    weight = rng.standard_normal(tensor.shape, np.float32) / np.sqrt(tensor.shape[1])
                    shared[kind] = kernels.matrix(kernels.encode(form.spec, weight))
                matrices[tensor.name] = shared[kind]
            else:
                vectors[tensor.name] = np.ones(tensor.shape, np.float32)
        matrices.setdefault("lm_head.weight", matrices["model.embed_tokens.weight"])
        self.arena = Arena(1 << 40, Ledger())
        weights = Weights(matrices=matrices, vectors=vectors, specs=specs, regions=())
        self.decoder = Decoder(config, weights, self.arena, segment_tokens=sizes.tokens + 16)
        self.cache = kv.build("float16", cache_shape(config), self.arena, sizes.tokens + 16)
        self.origin = Origin(model="0" * 64, weights="int4", specs=specs)
        self.folder = folder
        count = sizes.tokens // 4
        self.chunks = [[int(t) for t in rng.integers(3, 4000, count)] for _ in range(4)]
        self.numbers = sum(int(np.prod(tensor.shape)) for tensor in config.tensors())

    def store(self, **options: Any) -> ChunkStore:
        return ChunkStore(self.folder, self.origin, self.cache.shape, self.arena, PLAIN, **options)

    def read(self, store: ChunkStore, order: str, share: float, depth: int | None = None) -> Outcome:
        self.cache.truncate(0)
        prompt = ChunkPrompt([0], [self.chunks[int(index)] for index in order], [7, 8, 9])
        choose = lambda context, _: np.arange(int(share * context.num_tokens))  # noqa: E731
        return prefill(self.decoder, self.cache, store, prompt, alpha=0.0, choose=choose, depth=depth)

    @property
    def prompt_bytes(self) -> int:
        """Of one layer's kept rows."""
        return 2 * 2 * sum(map(len, self.chunks)) * self.cache.shape.row_values


TIMES = {
    "active": (
        "time follows what is computed: nothing is computed first and overwritten later",
        "10 % in at most 0.35, 30 % in at most 0.6 of the time of 100 %",
    ),
    "overlap": ("loading while earlier layers compute hides it", "overlapped in at most 0.8 of the time"),
    "depth": (
        "with the preload depth of the formula computing does not stand still, and the first token is as early as at "
        "the best depth",
        "within 10 % of the best; standing still at most a fifth as long as at depth 1",
    ),
}


def time_claims(sizes: Sizes, tick: Callable[[str], None]) -> Iterator[Claim]:
    if not sizes.rounds:
        yield from (not_run(claim, required, needs="the whole run") for claim, required in TIMES.values())
        return
    with tempfile.TemporaryDirectory() as folder:
        tick("random model")
        model = Random(sizes, Path(folder))
        what = f"{model.numbers / 1e9:.2f}B numbers, {sizes.tokens} tokens"
        with model.store() as store:
            model.read(store, "0123", 0.0)
            yield active_claim(model, store, what, sizes, tick)
            share = 0.2
            busy = min(model.read(store, "3012", share).seconds for _ in range(sizes.rounds))
        yield from overlap_claims(model, what, share, busy, sizes, tick)


def active_claim(model: Random, store: ChunkStore, what: str, sizes: Sizes, tick: Callable[[str], None]) -> Claim:
    found: dict[float, list[float]] = {}
    for _ in range(sizes.rounds):
        for share in (0.1, 0.3, 1.0):
            tick(f"time, {share:.0%} computed")
            found.setdefault(share, []).append(model.read(store, "3012", share).seconds)
    seconds = {share: min(times) for share, times in found.items()}
    return Claim(
        claim=TIMES["active"][0],
        measured=f"{what}: " + ", ".join(f"{share:.0%}: {one:.2f} s" for share, one in seconds.items()),
        required=TIMES["active"][1],
        passed=seconds[0.1] <= 0.35 * seconds[1.0] and seconds[0.3] <= 0.6 * seconds[1.0],
    )


def overlap_claims(
    model: Random, what: str, share: float, busy: float, sizes: Sizes, tick: Callable[[str], None]
) -> Iterator[Claim]:
    """Loads through an emulated disk: as fast as computing, then half as fast."""
    layers = sizes.layers
    rate = model.prompt_bytes * layers / busy
    found: dict[str, list[float]] = {}
    with model.store(rate_bytes_per_s=rate) as store:
        for _ in range(sizes.rounds):
            for name, depth in (("overlapped", 1), ("all loaded first", layers)):
                tick(f"loading, {name}")
                found.setdefault(name, []).append(model.read(store, "3012", share, depth).seconds)
    seconds = {name: min(times) for name, times in found.items()}
    yield Claim(
        claim=TIMES["overlap"][0],
        measured=f"{what}, {share:.0%} computed, an emulated disk that takes as long as computing "
        f"({rate / 1e6:.0f} MB/s): " + ", ".join(f"{name} {one:.2f} s" for name, one in seconds.items()),
        required=TIMES["overlap"][1],
        passed=seconds["overlapped"] <= 0.8 * seconds["all loaded first"],
    )
    with model.store(rate_bytes_per_s=rate / 2) as store:
        model.read(store, "3012", share, 1)  # so that the store has measured both speeds
        formula = model.read(store, "3012", share).preload
        depths = sorted({1, max(formula // 2, 1), formula, layers})
        times: dict[int, list[float]] = {depth: [] for depth in depths}
        stood: dict[int, list[float]] = {depth: [] for depth in depths}
        for _ in range(sizes.rounds):
            for depth in depths:
                tick(f"preload depth {depth}")
                outcome = model.read(store, "3012", share, depth)
                times[depth].append(outcome.seconds)
                stood[depth].append(outcome.stall_seconds)
    least = {depth: min(each) for depth, each in times.items()}
    stalls = {depth: min(each) for depth, each in stood.items()}
    best = min(least.values())
    yield Claim(
        claim=TIMES["depth"][0],
        measured=f"disk half as fast as computing, emulated; formula {formula} of {layers} layers; seconds (of these "
        "standing still): " + ", ".join(f"{d}: {least[d]:.2f} ({stalls[d]:.2f})" for d in depths),
        required=TIMES["depth"][1],
        passed=least[formula] <= 1.1 * best and stalls[formula] <= 0.2 * stalls[1],
    )


# ---- bytes ---------------------------------------------------------------------------------------------------------


def bytes_claim(lab: Lab) -> Claim:
    rng = np.random.default_rng(8)
    chunks = [lab.passage(rng, 100) for _ in range(3)]
    shape = lab.cache.shape
    with lab.store() as store:
        lab.reused(store, ChunkPrompt(lab.opening, chunks, [5]), 0.0)
        held, want = store.disk_used_bytes, 300 * 2 * 2 * shape.num_layers * shape.row_values
    return Claim(
        claim="a kept chunk takes its float16 rows on disk and little else",
        measured=f"{held:,} bytes for {want:,} of rows ({held / want - 1:+.1%})",
        required="at most 5 % more",
        passed=want <= held <= 1.05 * want,
    )


def gpu_claim() -> Claim:
    """Attention of a fifth of a prompt's tokens against that of all of them, where there is a GPU."""
    name = "on a GPU, attention at scattered positions takes what its share of the queries takes, and is exact"
    required = "20 % of the queries in at most 0.4 of the time of all; within 1e-2 of torch's attention"
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        return not_run(name, required)
    import torch

    if not torch.cuda.is_available():
        return not_run(name, required)
    from memwall.kernels.triton_scattered import attend_scattered

    length, heads, kv_heads, dim = 8192, 32, 8, 128
    q = torch.randn(length, heads, dim, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(length, kv_heads, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    order = torch.randperm(length, device="cuda")
    shown = {}
    for share in (0.1, 0.2, 0.5, 1.0):
        chosen = order[: int(share * length)].sort().values
        some, times = q[chosen].contiguous(), []
        for _ in range(25):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = attend_scattered(some, k, v, chosen, scale=dim**-0.5)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        shown[share] = float(np.median(times[5:]))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )  # fmt: skip
    apart = float((out - want[0].transpose(0, 1)[chosen].float()).abs().max())
    return Claim(
        claim=name,
        measured=f"{torch.cuda.get_device_name()}, {length} keys: "
        + ", ".join(f"{share:.0%} {ms:.2f} ms" for share, ms in shown.items())
        + f"; apart by {apart:.1e}",
        required=required,
        passed=shown[0.2] <= 0.4 * shown[1.0] and apart < 1e-2,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges all claims."""
    sizes = QUICK if quick else FULL
    text = held_out_text() if data is None else data.read_text(encoding="utf-8")
    total, done = sizes.windows + sizes.tries + sizes.pairs + len(sizes.skews) + 9 + 9 * sizes.rounds, 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, total), total, what)

    with Lab(model_directory("demo"), text) as lab:
        if len(lab.ids) < 4 * lab.window:
            raise InputError(f"{data or 'the bundled text'}: too short; needs {4 * lab.window:,} tokens")
        claims = [*repair_claims(lab, sizes, tick), border_claim(lab, sizes, tick), score_claim(lab, sizes, tick)]
        tick("alpha")
        alpha = fitted_to_other_text(sizes.fitting)
        claims += [*stream_claims(lab, sizes, alpha, tick), bytes_claim(lab)]
    claims += time_claims(sizes, tick)
    claims.append(gpu_claim())
    return claims


if __name__ == "__main__":
    sys.exit(main("cache-craft", sys.modules[__name__]))
