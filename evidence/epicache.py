"""EpiCache's claims, on the bundled demo model: what episodes are for, against other ways of evicting block by block.

Dialogues are made up: sessions of four lines about one of four topics, in random order; some lines state a fact about
one of the topic's names. Every method reads the same history in the same blocks and keeps as many units on average;
questions about all facts come in random order. With `--data` a file of conversations in LoCoMo's form (JSON: `qa` with
`question` and `evidence`, `conversation` with `session_N`), matching is judged on these too.

What this does not show: episodes have three windows, so that all of them stand in the patched prompt (n = 8), and every
fact with them. With one or two of the three in it, 11 % and 42 % were right on ten other dialogues instead of 80 %:
this small model keeps what the prompt repeats, and little that is only about the same.

A finding, which is a claim that fails: budgets by the sensitivity of layers answer less than equal ones (65 % against
72 % of 120 at a tenth). The keys of this model's layers change by 0.1 to 0.6 % under a block mask, the more the deeper
they lie, so that the budgets go to the last layers; its facts are found by heads of layers 3, 4 and 5 of 8, and layer 3
is left a third of its share.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall import kv
from memwall.claims import Claim, Progress, main, not_run
from memwall.engine.loading import cache_shape
from memwall.errors import InputError
from memwall.kv.blocks import HeadAdaptive, Scorer, Units, sensitive_budgets
from memwall.kv.epicache import EPISODES, EpiCache
from memwall.kv.episodes import ENDING, WORD, HashedWords, MeanEmbedding, Utterance, find_episodes
from memwall.kv.sensitivity import layer_similarity
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.models.config import EMBEDDING
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.studies.dialogues import Dialogue, dialogue

CHUNK = 192
FIRST_SEED = 100
MEASURED = f"epicache(tokens=256,chunk={CHUNK},episodes=1)"
"""The policy whose bytes and steps are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """dialogues of about 600 tokens and 8 questions each; tokens of the histories whose memory is measured."""

    dialogues: int
    memory_tokens: tuple[int, ...]
    ablations: bool


FULL = Sizes(dialogues=15, memory_tokens=(2048, 4096, 8192, 16384), ablations=True)
QUICK = Sizes(dialogues=3, memory_tokens=(1024, 2048), ablations=False)


# ---- other scores in the same loop ---------------------------------------------------------------------------------


class UnlikeTheMean(Scorer):
    """KeyDiff: keys that are least like the head's mean key stay."""

    keeps_scores = False

    def score(self, layer: int, units: Units) -> list[np.ndarray]:
        found = []
        for head in range(len(units.past_scores)):
            keys = units.keys(head)
            directions = keys / np.linalg.norm(keys, axis=1, keepdims=True)
            mean = directions.mean(axis=0)
            found.append(-(directions @ mean) / np.linalg.norm(mean))
        return found


class Newest(Scorer):
    """Recency: the newest stay."""

    keeps_scores = False

    def score(self, layer: int, units: Units) -> list[np.ndarray]:
        return [np.arange(len(units.keys(head)), dtype=np.float32) for head in range(len(units.past_scores))]


class Study:
    """The demo model, reading dialogues through caches of every kind."""

    def __init__(self) -> None:
        self.directory = model_directory("demo")
        self.config = ModelConfig.from_directory(self.directory)
        self.shape = cache_shape(self.config)
        self.arena = Arena(1 << 40, Ledger())
        with Checkpoint(self.directory, self.config) as checkpoint:
            self.weights = load_weights(self.config, checkpoint, resolve(self.config, "float16"), self.arena)
        self.decoder = Decoder(self.config, self.weights, self.arena, segment_tokens=256, exact=True)
        self.tokenizer = Tokenizer.from_directory(self.directory)
        self.model = kv.CacheModel(config=self.config, weights=self.weights, directory=self.directory)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False)

    def tokens(self, told: Dialogue) -> list[int]:
        return [self.config.bos_token_id or 0, *self.encode("".join(line.line for line in told.lines))]

    def cache(self, policy: str, capacity: int = 1024, arena: Arena | None = None) -> EpiCache:
        made = kv.build(policy, self.shape, arena or Arena(1 << 40, Ledger()), capacity, self.model)
        assert isinstance(made, EpiCache)
        return made

    def random_cache(self, method: str, num_tokens: int, arena: Arena) -> kv.KVCache:
        """A cache for a history of so many random tokens."""
        if method == "EpiCache":
            return self.cache(MEASURED, num_tokens + 256, arena)
        return kv.build("float16", self.shape, arena, num_tokens + 256)

    def read_random(self, cache: kv.KVCache, tokens: np.ndarray, prompt: list[int]) -> None:
        """Reads a history block by block."""
        if isinstance(cache, EpiCache):
            cache.read(self.decoder, tokens.tolist(), prompt)
            cache.active = 0  # from here on nothing more is evicted
            return
        for part in np.split(tokens, range(CHUNK, len(tokens), CHUNK)):
            self.decoder.hidden(part, cache)

    def says(self, cache: kv.KVCache, question: str, answer: str) -> bool:
        """Whether the greedy answer is right; the cache is as it was afterwards."""
        length, said = cache.length, []
        tokens = self.encode(f"\n{question}")
        sizes = cache.begin_prompt(len(tokens), 256)
        assert sizes == [len(tokens)]
        logits = self.decoder.forward(np.array(tokens), cache)
        for _ in range(6):
            said.append(int(logits.argmax()))
            logits = self.decoder.forward(np.array(said[-1:]), cache)
        cache.truncate(length)
        return self.tokenizer.decode(said).strip().startswith(answer)

    def episodic(self, told: Dialogue, policy: str, budgets: np.ndarray | None = None) -> dict[str, list[bool]]:
        """Right answers of the matched, the best and a random episode; and whether the matched one has the fact."""
        cache = self.cache(policy)
        if budgets is not None:
            cache.allocator = HeadAdaptive(budgets)
        cache.remember(self.decoder, self.tokenizer, told.lines, opening=[self.config.bos_token_id or 0])
        assert cache.episodes is not None
        rng = np.random.default_rng(0)
        found: dict[str, list[bool]] = {"matched": [], "oracle": [], "random": [], "has the fact": []}
        for question, answer, line in told.facts:
            right = []
            for episode in range(len(cache.kept_episodes)):
                cache.recall(episode)
                right.append(self.says(cache, question, answer))
            gold = int(cache.episodes.owners[line // cache.settings.window])
            chosen = cache.match(question)
            found["matched"].append(right[chosen])
            found["oracle"].append(right[gold])
            found["random"].append(right[int(rng.integers(len(right)))])
            found["has the fact"].append(chosen == gold)
        cache.release()
        return found

    def blockwise(self, told: Dialogue, method: str, budget: int) -> list[bool]:
        """Right answers of one cache for all questions, by another score."""
        cache = self.cache(f"epicache(tokens={budget},chunk={CHUNK})")
        tokens, opening = self.tokens(told), self.encode("\nOnce more, the same again:\n")
        if method == "KVzip":  # the block repeated asks for everything in it
            cache.read(self.decoder, tokens, lambda block: [*opening, *block[: 256 - len(opening)].tolist()])
        else:
            if method != "SnapKV":
                cache.scorer = {"KeyDiff": UnlikeTheMean, "recency": Newest}[method]()
            cache.local = 0
            begin = 0
            for size in cache.begin_prompt(len(tokens), 256):
                self.decoder.hidden(np.array(tokens[begin : begin + size]), cache)
                begin += size
        cache.active = 0  # from here on nothing more is evicted
        right = [self.says(cache, question, answer) for question, answer, _ in told.facts]
        cache.release()
        return right

    def whole(self, told: Dialogue) -> list[bool]:
        """Right answers of the full cache."""
        cache = kv.build("float16", self.shape, Arena(1 << 40, Ledger()), 1024)
        for part in np.split(np.array(self.tokens(told)), range(256, len(self.tokens(told)), 256)):
            self.decoder.hidden(part, cache)
        right = [self.says(cache, question, answer) for question, answer, _ in told.facts]
        cache.release()
        return right


def share(right: Sequence[bool]) -> float:
    """Of right answers."""
    return float(np.mean(right))


# ---- claims --------------------------------------------------------------------------------------------------------


def accuracy_claims(study: Study, sizes: Sizes, tick: Callable[[str], None]) -> list[Claim]:
    """At a fifth of the history: episodes, one cache for all, and other scores."""
    found: dict[str, list[bool]] = {}
    for seed in range(sizes.dialogues):
        told = dialogue(FIRST_SEED + seed)
        budget = len(study.tokens(told)) // 5
        tick(f"dialogue {seed + 1}")
        found.setdefault("full", []).extend(study.whole(told))
        for method in ("SnapKV", "KVzip", "KeyDiff", "recency"):
            found.setdefault(method, []).extend(study.blockwise(told, method, budget))
        for episodes in (4, 1):
            policy = f"epicache(tokens={budget},episodes={episodes},chunk={CHUNK})"
            for kind, right in study.episodic(told, policy).items():
                found.setdefault(f"E = {episodes}, {kind}", []).extend(right)
    shares = {name: share(right) for name, right in found.items()}
    own, one = shares["E = 4, matched"], shares["E = 1, matched"]
    others = {name: shares[name] for name in ("SnapKV", "KVzip", "KeyDiff", "recency")}
    count = len(found["full"])
    oracle, random = shares["E = 4, oracle"], shares["E = 4, random"]
    return [
        Claim(
            claim="at 5 times compression episode caches answer nearly as the full cache, above block-wise baselines",
            measured=f"right of {count}: full {shares['full']:.0%}; EpiCache {own:.0%}; "
            + "; ".join(f"{name} {value:.0%}" for name, value in others.items()),
            required="within 10 points of full, and above every other",
            passed=own >= shares["full"] - 0.1 and own > max(others.values()),
        ),
        Claim(
            claim="four episodes answer more than one",
            measured=f"E = 4: {own:.0%}, E = 1: {one:.0%}",
            required="at least 5 points more",
            passed=own >= one + 0.05,
        ),
        Claim(
            claim="the episode of the fact answers at least what the matched one does, and that more than a random one",
            measured=f"oracle {oracle:.0%}, matched {own:.0%}, random {random:.0%}; the matched episode has the fact "
            f"for {shares['E = 4, has the fact']:.0%} of questions (a random one 25%)",
            required="oracle at least matched (one question apart), matched above random",
            passed=oracle >= own - 1.5 / count and own > random,
        ),
    ]


def budget_claims(study: Study, sizes: Sizes, tick: Callable[[str], None]) -> list[Claim]:
    """Who gets the units, at a tenth of the history."""
    tick("layer similarity")
    similarity = layer_similarity(study.directory, None, None)
    found: dict[str, list[bool]] = {"by layer head": [], "by head": [], "by layer": []}
    for seed in range(sizes.dialogues):
        told = dialogue(FIRST_SEED + seed)
        budget = len(study.tokens(told)) // 10
        tick(f"budgets, dialogue {seed + 1}")
        policy = f"epicache(tokens={budget},episodes=4,chunk={CHUNK}"
        found["by layer head"] += study.episodic(told, policy + ")")["oracle"]
        found["by head"] += study.episodic(told, policy + ",uniform=1)")["oracle"]
        budgets = sensitive_budgets(similarity, budget, 1.1)  # paper: alpha for Llama models
        found["by layer"] += study.episodic(told, policy + ")", budgets)["oracle"]
    adaptive, uniform, sensitive = (share(right) for right in found.values())
    count = len(found["by head"])
    return [
        Claim(
            claim="units shared among the heads of a layer answer at least as much as the same number for each head",
            measured=f"{adaptive:.0%} against {uniform:.0%} of {count}, at T / 10, episode of the fact",
            required="at least as much (two questions apart)",
            passed=adaptive >= uniform - 2.5 / count,
        ),
        Claim(
            claim="budgets by the sensitivity of layers answer at least as much as equal ones",
            measured=f"{sensitive:.0%} against {adaptive:.0%} of {count}, at T / 10, alpha 1.1; similarities "
            + ", ".join(f"{value:.3f}" for value in similarity),
            required="at least as much (two questions apart)",
            passed=sensitive >= adaptive - 2.5 / count,
        ),
    ]


def memory_claim(study: Study, sizes: Sizes, tick: Callable[[str], None]) -> Claim:
    """Bytes while a history is read; the words do not matter, and neither do positions."""
    held: dict[str, list[int]] = {"EpiCache": [], "full cache": []}
    resident: dict[str, list[int]] = {"EpiCache": [], "full cache": []}
    # the shortest once more, first: what the heap and the kernels keep of it is there from then on
    for round_, num_tokens in enumerate((sizes.memory_tokens[0], *sizes.memory_tokens)):
        for method in held:
            if method == "full cache" and num_tokens > sizes.memory_tokens[1]:
                continue  # two lengths show its slope
            tick(f"memory, {method}, {num_tokens} tokens")
            on_ledger, in_process = read_and_watch(study, method, num_tokens)
            if round_:
                held[method].append(on_ledger)
                resident[method].append(in_process)
    own, full = resident["EpiCache"], resident["full cache"]
    # how much is staged depends on the longest head, and that on the words: the bound is what must not grow
    shortest = sizes.memory_tokens[0]
    predicted = kv.predict(MEASURED, study.shape, shortest, CHUNK, shortest + 256)
    bound = sum(nbytes for owner, nbytes in predicted.items() if owner != EPISODES)  # none is put aside here

    def shown(peaks: dict[str, list[int]]) -> str:
        return "; ".join(f"{name} " + ", ".join(f"{n / 1e6:.1f}" for n in found) for name, found in peaks.items())

    return Claim(
        claim="the peak does not grow with the history",
        measured=f"at {', '.join(f'{n:,}' for n in sizes.memory_tokens)} tokens (full cache: the first two), M = 256, "
        f"c = {CHUNK}, patched prompt of 128, MB on the ledger: {shown(held)} (predicted for the shortest: EpiCache "
        f"{bound / 1e6:.1f}); MB of the resident set above that before: {shown(resident)}",
        required="EpiCache at most what is predicted on the ledger, and at most 1 MB apart in the process; full cache "
        "at least 1.7 times at twice the length",
        passed=max(held["EpiCache"]) <= bound and max(own) - min(own) <= 1_000_000 and full[1] >= 1.7 * full[0],
    )


def read_and_watch(study: Study, method: str, num_tokens: int) -> tuple[int, int]:
    """Highest bytes of the cache on the ledger, and of the process above what it had before, over one history."""
    rng = np.random.default_rng(num_tokens)
    tokens = rng.integers(3, study.config.vocab_size, num_tokens)
    prompt = rng.integers(3, study.config.vocab_size, 128).tolist()
    arena = Arena(1 << 40, Ledger())
    cache = study.random_cache(method, num_tokens, arena)
    before, most = resident_bytes(), [0]
    settled = cache.settle

    def settle(layer: int) -> None:
        most[0] = max(most[0], resident_bytes() - before)
        settled(layer)

    cache.settle = settle  # type: ignore[method-assign]
    study.read_random(cache, tokens, prompt)
    cache.release()
    return arena.peak_bytes, most[0]


def step_claim(study: Study, sizes: Sizes, tick: Callable[[str], None]) -> Claim:
    """Decode steps behind a short and a long history, in turn."""
    lengths = sizes.memory_tokens[:2]
    rng = np.random.default_rng(1)
    ratios = {}
    for method in ("EpiCache", "full cache"):
        tick(f"decode steps, {method}")
        caches = [study.random_cache(method, num_tokens, Arena(1 << 40, Ledger())) for num_tokens in lengths]
        for cache, num_tokens in zip(caches, lengths):
            study.read_random(cache, rng.integers(3, 4096, num_tokens), rng.integers(3, 4096, 128).tolist())
        seconds: list[list[float]] = [[], []]
        for _ in range(60):
            for cache, taken in zip(caches, seconds):
                began = time.perf_counter()
                study.decoder.forward(np.array([7]), cache)
                taken.append(time.perf_counter() - began)
                cache.truncate(cache.length - 1)
        ratios[method] = float(np.median(seconds[1]) / np.median(seconds[0]))
        for cache in caches:
            cache.release()
    return Claim(
        claim="a decode step takes as long behind a long history as behind a short one",
        measured=f"at {lengths[1]:,} over {lengths[0]:,} tokens, medians of 60 in turn: EpiCache "
        f"{ratios['EpiCache']:.2f}, full cache {ratios['full cache']:.2f}",
        required="EpiCache at most 1.1, and less than the full cache",
        passed=ratios["EpiCache"] <= 1.1 and ratios["EpiCache"] < ratios["full cache"],
    )


def switching_claim(study: Study) -> Claim:
    """Questions in turn about two episodes, and again about the last."""
    cache = study.cache(f"epicache(tokens=100,episodes=4,chunk={CHUNK})")
    told = dialogue(0)
    cache.remember(study.decoder, study.tokenizer, told.lines, opening=[0])
    size = cache.kept_episodes[0]
    moved = [cache.recall(episode) for episode in (0, 1, 1, 0)]
    held = sum(row.nbytes for row in cache.arena.ledger.rows() if row.owner == "kv/episodes")
    cache.release()
    return Claim(
        claim="a switch moves one episode's bytes, and a question about the same episode none",
        measured=f"episodes of {size:,} bytes; switches to 0, 1, 1, 0 moved {', '.join(f'{n:,}' for n in moved)}; "
        f"{held:,} bytes held on the ledger for 4",
        required="one episode each, none for the third; 4 episodes held",
        passed=moved == [size, size, 0, size] and held == 4 * math.ceil(size / 4096) * 4096,
    )


def matching_claim(study: Study, data: Path | None) -> Claim:
    """Whether the matched episode holds the evidence of a question, on real conversations."""
    claim = "questions about real conversations find the episode of their evidence far more often than by chance"
    required = "hashed words at least 1.5 times a random episode, E = 4"
    if data is None:
        return not_run(claim, required, "--data with conversations in LoCoMo's form")
    hits: dict[str, list[float]] = {"hashed words": [], "model embeddings": [], "BM25 by cluster": [], "random": []}
    for lines, questions in read_locomo(data):
        for name in ("model embeddings", "hashed words"):
            matrix = study.weights.matrices[EMBEDDING]
            encoder = HashedWords() if name == "hashed words" else MeanEmbedding(matrix, 256, study.tokenizer)
            episodes = find_episodes(lines, encoder, 4, window=4, central=8)
            for question, evidence in questions:
                gold = episodes.owners[[line // 4 for line in evidence]]
                hits[name].append(float(np.mean(gold == episodes.match(question))))
        texts = [
            "\n".join(text for text, owner in zip(episodes.windows, episodes.owners) if owner == each)
            for each in range(4)
        ]
        ranking = Bm25(texts)
        for question, evidence in questions:
            gold = episodes.owners[[line // 4 for line in evidence]]
            hits["BM25 by cluster"].append(float(np.mean(gold == ranking.best(question))))
            hits["random"].append(
                float(np.mean(np.bincount(episodes.owners, minlength=4)[gold]) / len(episodes.owners))
            )
    shares = {name: float(np.mean(found)) for name, found in hits.items()}
    return Claim(
        claim=claim,
        measured=f"{len(hits['random'])} questions: "
        + "; ".join(f"{name} {value:.0%}" for name, value in shares.items())
        + " (random weighs episodes by their size)",
        required=required,
        passed=shares["hashed words"] >= 1.5 * shares["random"],
    )


class Bm25:
    """The usual ranking of texts by the words of a question."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [self.words(text) for text in texts]
        self.mean = float(np.mean([len(words) for words in self.texts]))
        self.counts = [{word: words.count(word) for word in set(words)} for words in self.texts]

    @staticmethod
    def words(text: str) -> list[str]:
        return [ENDING.sub("", word) for word in WORD.findall(text.lower())]

    def best(self, question: str) -> int:
        scores = np.zeros(len(self.texts))
        for word in self.words(question):
            holding = sum(word in counts for counts in self.counts)
            rarity = math.log(1 + (len(self.texts) - holding + 0.5) / (holding + 0.5))
            for place, counts in enumerate(self.counts):
                count = counts.get(word, 0)
                scores[place] += rarity * count * 2.2 / (count + 0.3 + 0.9 * len(self.texts[place]) / self.mean)
        return int(scores.argmax())


def read_locomo(path: Path) -> list[tuple[list[Utterance], list[tuple[str, list[int]]]]]:
    """Of each conversation its lines, and its questions with the lines of their evidence."""
    found = []
    try:
        for each in json.loads(path.read_text(encoding="utf-8")):
            told, number = each["conversation"], 1
            lines: list[Utterance] = []
            places: dict[str, int] = {}
            while f"session_{number}" in told:
                for line in told[f"session_{number}"]:
                    places[line["dia_id"]] = len(lines)
                    lines.append(Utterance(line["text"], line["speaker"]))
                number += 1
            asked = [(qa["question"], [places[name] for name in qa["evidence"] if name in places]) for qa in each["qa"]]
            found.append((lines, [(question, evidence) for question, evidence in asked if evidence]))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--data {path}: not conversations in LoCoMo's form ({error!r})") from error
    return found


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Claims of EpiCache."""
    sizes = QUICK if quick else FULL
    whole = sizes.dialogues * (2 if sizes.ablations else 1) + len(sizes.memory_tokens) + 7
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, whole), whole, what)

    study = Study()
    claims = [memory_claim(study, sizes, tick), step_claim(study, sizes, tick), switching_claim(study)]
    claims += [matching_claim(study, data), *accuracy_claims(study, sizes, tick)]
    claims += budget_claims(study, sizes, tick) if sizes.ablations else []
    return [*claims, not_run("against the full cache at 64K tokens and an 8B shape", "less time a step, lower peak")]


if __name__ == "__main__":
    sys.exit(main("epicache", sys.modules[__name__]))
