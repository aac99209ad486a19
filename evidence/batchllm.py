"""BatchLLM's claims: the plan against the best one there is, the bundled demo model on a batch of questions about
documents, order and memory on a virtual clock, and the fused attention by itself.

The batch: documents cut from a text, each behind one of two instructions (two levels of sharing), and questions about
each, in shuffled order. All ways run on the same engine with the same pages, `SHARE` of what the whole batch needs:
BatchLLM; first come, first served with a cache of whole pages that forgets what was used longest ago; the same without
a cache. They run in turn, and medians count. llama.cpp, with its prompt cache, runs a model of the demo's shape in a
process of its own, where `MEMWALL_PEER_PYTHON` names an interpreter that has llama-cpp-python and gguf.

Text: `--data` a UTF-8 file; the held-out text that ships with the planner (documentation of Python's standard library)
otherwise.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kernels
from memwall.claims import Claim, Progress, main, not_run
from memwall.engine import Sampling
from memwall.engine.base import Limits, Scheduler, State, Step
from memwall.engine.batchllm import BatchLLM, BatchPlan, Room, plan_alone, plan_batch
from memwall.engine.core import Engine
from memwall.engine.executor import Totals
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.offline import OfflineRun
from memwall.engine.prefix_tree import Prompts, sort_prompts
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.simulated import StepCost, simulated_engine
from memwall.kernels.attention import attend_float, attend_paged_sequences, attend_shared
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer
from memwall.peers import peer_environment
from memwall.plan.choose import held_out_text

PAGE = 16
BUDGET_TOKENS = 256
MOST_SEQUENCES = 256
"""Of the ways that bound a batch by a count: as many as the token budget allows."""
CONTEXT = 1024
SHARE = 0.3
SHARES = (0.2, 0.3, 0.4)
MIXED_GROUPS = (80, 160)
PEER_PROMPTS = 48
MANY_PAGES = 1 << 20
INSTRUCTIONS = (
    "Read the passage below with care. Answer the question that follows it in one short sentence, and use nothing but "
    "what the passage says.\n\n",
    "You are given a part of a manual. Write down what it says about the point that is named at its end, in plain "
    "words and without an example.\n\n",
)
QUESTIONS = (
    "\n\nQuestion: what is this about?",
    "\n\nQuestion: which argument comes first, and what is it for?",
    "\n\nName one thing that the reader must not do.",
    "\n\nSummary:",
    "\n\nQuestion: what is returned when nothing is found at all?",
    "\n\nWho would need this? Answer:",
    "\n\nList the names that occur in it:",
    "\n\nQuestion: is there an exception, and when is it raised?",
    "\n\nTitle:",
    "\n\nQuestion: what should one read next, if anything?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """documents, questions: of the batch; rounds: of timings; sets: random sets of prompts; seeds: of mixes in order;
    many: prompts that are clustered against the clock.
    """

    documents: int
    questions: int
    rounds: int
    sets: int
    seeds: int
    many: int
    repeats: int


FULL = Sizes(documents=40, questions=8, rounds=5, sets=300, seeds=4, many=50_000, repeats=21)
QUICK = Sizes(documents=10, questions=6, rounds=2, sets=60, seeds=2, many=50_000, repeats=9)


# ---- the plan ------------------------------------------------------------------------------------------------------


def best_one_level(prompts: Prompts) -> int:
    """The fewest tokens that groups of one level compute, by looking at every choice of nodes of the tree."""
    order, common = sort_prompts(prompts)
    lengths = prompts.lengths[order]

    @cache
    def fewest(begin: int, end: int, held: int) -> int:
        """Of prompts [begin, end) in order, whose first `held` tokens are computed already."""
        if end - begin == 1:
            return int(lengths[begin]) - held
        depth = int(common[begin + 1 : end].min())
        cuts = [begin, *(at for at in range(begin + 1, end) if common[at] == depth), end]
        parts = list(itertools.pairwise(cuts))
        stay = sum(fewest(a, b, held) for a, b in parts)
        return min(stay, depth + sum(fewest(a, b, depth) for a, b in parts))

    return fewest(0, len(prompts), 0)


def random_prompts(draw: random.Random) -> list[list[int]]:
    """Headers, texts and endings of any length, with copies and prompts that are another one's beginning."""
    heads = [[draw.randrange(999) for _ in range(draw.randint(1, 30))] for _ in range(draw.randint(1, 3))]
    texts = [[draw.randrange(999) for _ in range(draw.randint(5, 120))] for _ in range(draw.randint(1, 6))]
    prompts = []
    for _ in range(draw.randint(4, 40)):
        parts = [*draw.choice(heads), *(draw.choice(texts) if draw.random() < 0.9 else ())]
        prompts.append([*parts, *(draw.randrange(999) for _ in range(draw.choice([0, 0, 3, 20])))])
    return prompts


def plan_claims(sizes: Sizes) -> Iterator[Claim]:
    draw, whole, ours, best, least, checked = random.Random(1), 0, 0, 0, 1.0, 0
    sound = True
    for _ in range(sizes.sets):
        prompts = random_prompts(draw)
        rows = Prompts.of(prompts)
        plan = plan_batch(rows, least_prefix=1)
        sound &= sorted(plan.order) == list(range(len(prompts)))
        for group in plan.groups:
            prefix = max((prompts[m] for m in group.members), key=len)[: group.prefix]
            for member in group.members:
                base = group.base(len(prompts[member]))
                sound &= prefix[:base] + prompts[member][base:] == prompts[member] and base < len(prompts[member])
                checked += 1
        saved = plan.sharing.logical - plan.sharing.physical
        possible = plan.sharing.logical - best_one_level(rows)
        whole, ours, best = whole + plan.sharing.logical, ours + saved, best + possible
        least = min(least, saved / possible) if possible else least
    yield Claim(
        claim="every prompt is its group's prefix and what is its own, and answers lead back to their prompts",
        measured=f"{checked:,} prompts of {sizes.sets} random sets, copies and prompts that begin another among them",
        required="all",
        passed=sound,
    )
    yield Claim(
        claim="the gain rule saves nearly what the best choice of one level saves",
        measured=f"{ours / best:.4f} of the best over {sizes.sets} sets of 4 to 40 prompts ({ours / whole:.1%} of "
        f"their tokens saved); {least:.3f} in the worst set",
        required="at least 0.99 over all",
        passed=ours >= 0.99 * best,
    )
    yield giant_group_claim()
    yield clock_claim(sizes)


def giant_group_claim() -> Claim:
    draw = random.Random(2)
    header, texts = [1, 2, 3, 4, 5], [[draw.randrange(99, 999) for _ in range(300)] for _ in range(30)]
    prompts = [[*header, *texts[i % 30], *(draw.randrange(999) for _ in range(15))] for i in range(300)]
    sharing = plan_batch(Prompts.of(prompts)).sharing
    naive = 1 - (sharing.logical - (len(prompts) - 1) * len(header)) / sharing.logical
    return Claim(
        claim="a short header that all prompts share does not make one giant group",
        measured=f"{sharing.ratio:.1%} saved in {sharing.num_groups} groups; {naive:.1%} if the tree's first level "
        "were the groups",
        required="30 groups, one for each text; above 80 %, where the first level saves below 5 %",
        passed=sharing.num_groups == 30 and sharing.ratio > 0.8 and naive < 0.05,
    )


def clock_claim(sizes: Sizes) -> Claim:
    rng = np.random.default_rng(3)
    texts = rng.integers(0, 30000, (sizes.many // 25, 250))
    own = rng.integers(1, 60, sizes.many)
    rows = Prompts.of(
        np.concatenate([texts[i % len(texts)], rng.integers(0, 30000, length)]) for i, length in enumerate(own)
    )
    began = time.process_time()
    plan = plan_batch(rows, np.ones(len(rows)))
    seconds = time.process_time() - began
    return Claim(
        claim="tens of thousands of prompts are planned in seconds on one core",
        measured=f"{len(rows):,} prompts, {plan.sharing.logical:,} tokens, {plan.sharing.num_groups:,} groups: "
        f"{seconds:.1f} s of processor time",
        required="below 10 s",
        passed=seconds < 10,
    )


# ---- the batch of questions on the demo model ----------------------------------------------------------------------


@dataclass(slots=True)
class Workload:
    """Prompts, how many tokens each makes, and the pages that all of them need at once."""

    prompts: list[list[int]]
    outputs: list[int]
    rows: Prompts = field(init=False)

    def __post_init__(self) -> None:
        self.rows = Prompts.of(self.prompts)

    def plan(self, *, ordered: bool = True) -> BatchPlan:
        room = Room(page_tokens=PAGE, pages=CONTEXT // PAGE, outputs=self.outputs)
        return plan_batch(self.rows, self.outputs if ordered else None, room=room)

    @property
    def need_pages(self) -> int:
        """Pages of all prefixes, counted once, and of all that is each prompt's own."""
        pages = 0
        for group in self.plan().groups:
            pages += -(-group.prefix // PAGE)
            pages += sum(-(-(len(self.prompts[m]) - group.base(len(self.prompts[m])) + self.outputs[m]) // PAGE)
                         for m in group.members)  # fmt: skip
        return pages

    def request(self, number: int) -> Request:
        sampling = Sampling(max_new_tokens=self.outputs[number], ignore_eos=True)
        return Request(prompt=tuple(self.prompts[number]), sampling=sampling)


def questions(text: str, sizes: Sizes) -> Workload:
    tokenizer, draw = Tokenizer.from_directory(DEMO_DIRECTORY), random.Random(4)
    ids = tokenizer.encode(text[: sizes.documents * 2500], add_bos=False)
    begin = [tokenizer.bos_token_id or 0]
    at, prompts, outputs = 0, [], []
    for number in range(sizes.documents):
        length = draw.randint(200, 380)
        document = ids[at : at + length] if at + length <= len(ids) else ids[:length][::-1]
        at += length
        instruction = tokenizer.encode(INSTRUCTIONS[number % 2], add_bos=False)
        for question in draw.sample(QUESTIONS, min(sizes.questions, len(QUESTIONS))):
            prompts.append([*begin, *instruction, *document, *tokenizer.encode(question, add_bos=False)])
            outputs.append(draw.choice([4, 8, 16]))
    order = draw.sample(range(len(prompts)), len(prompts))
    return Workload([prompts[i] for i in order], [outputs[i] for i in order])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run of a batch. prefix_pages: the most that were held for beginnings, used or kept."""

    seconds: float
    computed: int
    steps: int
    mean_tokens: float
    fifth: int
    prefix_pages: int
    requests: int
    preempted: int
    made: tuple[tuple[int, ...], ...] = ()


def carry_out(engine: Engine, plan: BatchPlan, load: Workload, num_pages: int) -> Outcome:
    """Runs a batch from an empty cache with so many pages."""
    engine.wanted_pages = num_pages
    engine.totals = Totals()
    made: list[list[int]] = [[] for _ in load.prompts]
    run = OfflineRun(engine, plan, load.rows.lengths.tolist(), load.request, load.outputs.__getitem__)
    peak = 0
    pool, noted = engine.pages.pool, run.statistics

    def observe(state: State, step: Step) -> None:
        nonlocal peak
        noted(state, step)
        held = [page for one in engine.running.values() for page in one.pages]
        peak = max(peak, engine.shared.held_pages + engine.pages.idle_pages + pool.num_shared(held))

    engine.observer = observe
    began = engine.clock()
    while not run.done:
        for prompt, event in run.step():
            if event.token is not None:
                made[prompt].append(event.token)
    seconds = engine.clock() - began
    engine.pages.forget(engine.pages.idle_pages)
    return Outcome(
        seconds=seconds,
        computed=engine.totals.computed_prompt_tokens,
        steps=noted.steps,
        mean_tokens=noted.mean_tokens,
        fifth=noted.percentile(0.05),
        prefix_pages=peak,
        requests=noted.peak_requests,
        preempted=sum(engine.totals.preempted.values()),
        made=tuple(map(tuple, made)),
    )


def load_demo(scheduler: Scheduler, *, keep: bool, shared: bool, weights: str = "int8") -> Serving:
    settings = ServingSettings(
        weights=weights, context_tokens=CONTEXT, token_budget=BUDGET_TOKENS, max_sequences=MOST_SEQUENCES,
        page_tokens=PAGE, swap_bytes=0, keep_prefixes=keep, shared_prefixes=shared,
    )  # fmt: skip
    return load_engine(DEMO_DIRECTORY, settings, scheduler=scheduler)


WAYS = ("BatchLLM", "recent prefixes kept", "no sharing")


def run_ways(load: Workload, rounds: int, num_pages: int, tick: Callable[[str], None]) -> dict[str, list[Outcome]]:
    """All ways in turn, `rounds` times."""
    servings = {
        WAYS[0]: load_demo(BatchLLM(), keep=False, shared=True),
        WAYS[1]: load_demo(FirstComeFirstServed(), keep=True, shared=False),
        WAYS[2]: load_demo(FirstComeFirstServed(), keep=False, shared=False),
    }
    plans = {WAYS[0]: load.plan(), WAYS[1]: plan_alone(load.rows), WAYS[2]: plan_alone(load.rows)}
    found: dict[str, list[Outcome]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            tick(f"{way}, round {number + 1}")
            found[way].append(carry_out(servings[way].engine, plans[way], load, num_pages))
    for serving in servings.values():
        serving.release()
    return found


def median_seconds(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(one.seconds for one in outcomes)


def batch_claims(data: Path | None, sizes: Sizes, tick: Callable[[str], None]) -> Iterator[Claim]:
    text = held_out_text() if data is None else data.read_text(encoding="utf-8")
    load = questions(text, sizes)
    plan, pages = load.plan(), max(int(SHARE * load.need_pages), CONTEXT // PAGE)
    sharing = plan.sharing
    ways = run_ways(load, sizes.rounds, pages, tick)
    ours, recent, alone = (ways[way][0] for way in WAYS)
    yield Claim(
        claim="one level of sharing saves nearly what all levels save",
        measured=f"{sharing.ratio:.1%} of {sharing.logical:,} tokens against {1 - sharing.tree / sharing.logical:.1%}; "
        f"{sharing.num_groups} groups of {sharing.mean_degree:.1f}, prefixes of {sharing.mean_prefix:.0f} tokens, "
        f"{sharing.mean_distinct:.0f} of each prompt's own",
        required="within 3 points",
        passed=sharing.ratio > 1 - sharing.tree / sharing.logical - 0.03,
    )
    yield Claim(
        claim="prompt tokens computed are the plan's; a cache of recent prefixes computes more where memory is short",
        measured=f"{pages} pages, {pages / load.need_pages:.0%} of the need: {ours.computed:,} computed, "
        f"{sharing.physical:,} planned; {recent.computed:,} with recent prefixes kept, {alone.computed:,} without "
        "sharing",
        required="equal to the plan in every round; above it",
        passed=all(one.computed == sharing.physical for one in ways[WAYS[0]]) and recent.computed > sharing.physical,
    )
    yield Claim(
        claim="fewer bytes are held for prefixes",
        measured=f"at the peak {ours.prefix_pages} pages of prefixes, {recent.prefix_pages} with recent ones kept",
        required="fewer",
        passed=ours.prefix_pages < recent.prefix_pages,
    )
    times = {way: median_seconds(ways[way]) for way in WAYS}
    against = {way: times[way] / times[WAYS[0]] for way in WAYS[1:]}
    yield Claim(
        claim="the batch ends sooner than with recent prefixes kept, and sooner still than without sharing",
        measured=", ".join(f"{way} {seconds:.2f} s" for way, seconds in times.items())
        + f" (medians of {sizes.rounds}); {against[WAYS[1]]:.2f} and {against[WAYS[2]]:.2f} times; "
        f"{ours.requests}, {recent.requests} and {alone.requests} requests at once at the most",
        required="at least 1.1 times the one; the other above it",
        passed=against[WAYS[1]] >= 1.1 and against[WAYS[2]] > against[WAYS[1]],
    )
    tick("the same answers")
    yield same_claim(load, pages, alike(ours, alone))
    yield equal_claim(load)
    yield peer_claim(load, times[WAYS[0]])


def alike(one: Outcome, other: Outcome) -> float:
    """Share of answers that are the same token for token."""
    return statistics.mean(a == b for a, b in zip(one.made, other.made))


def same_claim(load: Workload, pages: int, packed: float) -> Claim:
    """On float weights: the timed runs' 8-bit products round their inputs, so that sums in another order show more."""
    made = []
    for scheduler, shared, plan in (
        (BatchLLM(), True, load.plan()), (FirstComeFirstServed(), False, plan_alone(load.rows))
    ):  # fmt: skip
        serving = load_demo(scheduler, keep=False, shared=shared, weights="float32")
        made.append(carry_out(serving.engine, plan, load, pages))
        serving.release()
    same = alike(*made)
    return Claim(
        claim="what comes out is what comes out without sharing",
        measured=f"{same:.1%} of {len(load.prompts)} answers are the same token for token on float weights, "
        f"{packed:.1%} on 8-bit ones, whose inputs are rounded; sums of attention run in another order, so that a near "
        "tie may fall the other way",
        required="at least 95 % on float weights",
        passed=same >= 0.95,
    )


def equal_claim(load: Workload) -> Claim:
    """With room for everything and prefixes that end with a page, a cache of recent prefixes has nothing to forget."""
    plan, prompts = load.plan(), list(load.prompts)
    draw = random.Random(5)
    for number, group in enumerate(plan.groups):  # one level: documents that share nothing among them
        whole = group.prefix // PAGE * PAGE
        for member in group.members:
            prompts[member] = [number % 4096, *load.prompts[member][1:whole], *load.prompts[member][group.prefix :], 1]
    order = draw.sample(range(len(prompts)), len(prompts))
    level = Workload([prompts[i] for i in order], [load.outputs[i] for i in order])
    physical = level.plan().sharing.physical
    computed = []
    for pages in (MANY_PAGES, max(int(SHARE * level.need_pages), CONTEXT // PAGE)):
        limits = Limits(token_budget=BUDGET_TOKENS, max_sequences=1, page_tokens=PAGE)
        engine = simulated_engine(FirstComeFirstServed(), num_pages=pages, limits=limits, context_tokens=CONTEXT)
        computed.append(carry_out(engine, plan_alone(level.rows), level, pages).computed)
    return Claim(
        claim="with room for everything a cache of recent prefixes computes as many prompt tokens as the plan",
        measured=f"prefixes of whole pages, one request at a time so that none comes before its prefix is there: "
        f"{computed[0]:,} computed, {physical:,} planned; {computed[1]:,} with {SHARE:.0%} of the room",
        required="equal with room, more without",
        passed=computed[0] == physical < computed[1],
    )


PEER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import random_models as models
from llama_cpp import Llama, LlamaRAMCache
shape = models.Shape(name="demo", num_layers=8, hidden=256, num_heads=8, num_kv_heads=4, intermediate=704, vocab=4096,
                     head_dim=32)
work = Path(sys.argv[2])
path = models.make_gguf(shape, models.make_directory(shape, work / "demo"), work / "demo.gguf", "Q8_0")
load = json.loads(sys.stdin.read())
model = Llama(str(path), n_ctx=1024, n_batch=256, n_threads=int(sys.argv[3]), verbose=False)
took = {}
for kept in (True, False):
    cache = LlamaRAMCache(capacity_bytes=1 << 30)
    began = time.perf_counter()
    for prompt, wanted in zip(load["prompts"], load["outputs"]):
        if kept:
            try:
                state = cache[prompt]
                same = Llama.longest_token_prefix(state.input_ids.tolist(), prompt)
                if same > Llama.longest_token_prefix(model._input_ids.tolist(), prompt):
                    model.load_state(state)
            except KeyError:
                pass
        for made, _ in enumerate(model.generate(prompt, temp=0.0), 1):
            if made == wanted:
                break
        if kept:
            cache[prompt] = model.save_state()
    took["kept" if kept else "plain"] = time.perf_counter() - began
import importlib.metadata
print(json.dumps({**took, "version": importlib.metadata.version("llama-cpp-python")}))
"""


def peer_claim(load: Workload, seconds: float) -> Claim:
    claim = "the batch ends sooner than with llama-cpp-python and its prompt cache"
    required = "sooner, with 8-bit weights of the same shape and as many threads"
    python = os.environ.get("MEMWALL_PEER_PYTHON")
    models = Path(__file__).parents[1] / "benchmarks" / "random_models.py"
    if not python or not models.is_file():
        return not_run(claim, required, "MEMWALL_PEER_PYTHON, an interpreter with llama-cpp-python and gguf")
    some = min(PEER_PROMPTS, len(load.prompts))
    told = json.dumps({"prompts": load.prompts[:some], "outputs": load.outputs[:some]})
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", PEER, str(models.parent), folder, str(kernels.num_threads())]
        try:
            done = subprocess.run(
                command, input=told, capture_output=True, text=True, check=True, env=peer_environment()
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            return not_run(claim, required, f"llama-cpp-python that works: {why[:200]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    each, theirs = 1e3 * seconds / len(load.prompts), {way: 1e3 * found[way] / some for way in ("kept", "plain")}
    return Claim(
        claim=claim,
        measured=f"{each:.1f} ms a prompt; one by one with llama-cpp-python {found['version']}, over the first {some} "
        f"prompts, {theirs['kept']:.0f} ms with its cache of prompts' states and room for a GiB of them, "
        f"{theirs['plain']:.0f} ms with the last prompt's alone",
        required=required,
        passed=each < min(theirs.values()),
    )


# ---- order and memory, on a virtual clock --------------------------------------------------------------------------


VARIED, KINDS_ALONE, ALIKE = "varied", "two kinds", "alike"


def mix(seed: int, groups: int, answers: str) -> Workload:
    """Groups of six questions. answers: `varied`, their mean in a group log-uniform from 5 to 125 tokens; `two kinds`,
    half of the groups 100 to 150, the others 4 to 8; `alike`, 32. With few groups the end of the last answers, which is
    alike in any order, would be most of the steps.
    """
    draw = random.Random(seed)
    prompts, outputs = [], []
    for number in range(groups):
        prefix = [draw.randrange(999) for _ in range(draw.randint(200, 400))]
        mean, long = math.exp(draw.uniform(math.log(5), math.log(125))), number % 2
        for _ in range(6):
            prompts.append([*prefix, *(draw.randrange(999) for _ in range(draw.randint(10, 30)))])
            if answers == VARIED:
                outputs.append(max(round(mean * draw.uniform(0.8, 1.2)), 1))
            elif answers == KINDS_ALONE:
                outputs.append(draw.randint(100, 150) if long else draw.randint(4, 8))
            else:
                outputs.append(32)
    # groups come in any order, but their members together, so that nothing else differs
    firsts = draw.sample(range(groups), groups)
    order = [6 * group + member for group in firsts for member in range(6)]
    return Workload([prompts[i] for i in order], [outputs[i] for i in order])


def virtual(load: Workload, plan: BatchPlan, scheduler: Scheduler, pages: int, *, keep: bool) -> Outcome:
    limits = Limits(token_budget=BUDGET_TOKENS, max_sequences=MOST_SEQUENCES, page_tokens=PAGE)
    engine = simulated_engine(scheduler, num_pages=pages, limits=limits, context_tokens=CONTEXT, cost=StepCost())
    engine.pages.keep_prefixes = keep
    return carry_out(engine, plan, load, pages)


def order_ratios(sizes: Sizes, share: float, groups: int, answers: str) -> tuple[float, float, float]:
    """Tokens a step, their 5th percentile and time, over those of the order the groups came in; means of mixes."""
    found = []
    for seed in range(sizes.seeds):
        load = mix(seed, groups, answers)
        pages = int(share * load.need_pages)
        ours, came = (
            virtual(load, load.plan(ordered=ordered), BatchLLM(), pages, keep=False) for ordered in (True, False)
        )
        fifth = ours.fifth / max(came.fifth, 1)
        found.append((ours.mean_tokens / came.mean_tokens, fifth, ours.seconds / came.seconds))
    mean, fifth, seconds = (statistics.mean(column) for column in zip(*found))
    return mean, fifth, seconds


def told_ratios(ratios: tuple[float, float, float]) -> str:
    return "tokens a step {:.3f}, their 5th percentile {:.2f}, time {:.3f}".format(*ratios)


def order_claims(sizes: Sizes) -> Iterator[Claim]:
    """At all sizes and over the whole range of memory.

    How much is made per prompt token varies from group to group, over a range of 25. At first it was two kinds of
    groups, long answers and short ones, and nothing between. Of those, 80 groups with 30 % of the pages lose: 0.43 % of
    the time over twelve other seeds, standard error 0.10 (with 20 % a gain of 0.77, error 0.11). Memory holds some 113
    requests, so the 240 long ones, alike, come in two waves and a bit: a wave makes 100 to 150 tokens side by side
    while nobody can enter, twice 113 tokens a step for 65 steps where 256 fit, and the bit begins last and ends alone.
    How whole waves fit decides there; where answers vary there are no waves, and what the order saves is the end, at
    which a few long answers that came last would run alone. Both are told; a mix of varied ratios is the first.
    """
    cases = [(share, groups) for groups in MIXED_GROUPS for share in SHARES]

    def told(found: dict[tuple[float, int], tuple[float, float, float]]) -> str:
        return "; ".join(
            f"{groups} groups, {share:.0%} of the pages needed: {told_ratios(each)}"
            for (share, groups), each in found.items()
        )

    varied = {case: order_ratios(sizes, *case, VARIED) for case in cases}
    yield Claim(
        claim="decode-heavy groups first: fuller steps and an earlier end than in the order they came",
        measured=f"over the order they came, means of {sizes.seeds} mixes of groups whose answers are 5 to 125 tokens, "
        f"virtual clock: {told(varied)}",
        required="above 1, above 1, below 1 in all six",
        passed=all(mean > 1 and fifth > 1 and seconds < 1 for mean, fifth, seconds in varied.values()),
    )
    kinds = {case: order_ratios(sizes, *case, KINDS_ALONE) for case in cases}
    lost = sum(mean <= 1 or fifth <= 1 or seconds >= 1 for mean, fifth, seconds in kinds.values())
    yield Claim(
        claim="the same where groups are of two kinds, 100 to 150 tokens and 4 to 8, and long ones come in waves",
        measured=f"told, not judged; one of the three is not better in {lost} of six: {told(kinds)}",
        required="nothing: beyond the mix that is asked for",
        passed=None,
    )
    same = order_ratios(sizes, SHARE, MIXED_GROUPS[-1], ALIKE)
    yield Claim(
        claim="where all groups make as much per prompt token, order makes no difference",
        measured=f"with {SHARE:.0%} of the pages needed {told_ratios(same)}",
        required="tokens a step and time within 2 % of 1",
        passed=abs(same[0] - 1) < 0.02 and abs(same[2] - 1) < 0.02,
    )
    yield memory_claim()


def memory_claim() -> Claim:
    load = mix(0, 40, KINDS_ALONE)
    found = []
    for share in (0.15, 0.3, 0.6):
        pages = int(share * load.need_pages)
        found.append((pages, virtual(load, load.plan(), BatchLLM(), pages, keep=False)))
    counts = [one.requests for _, one in found]
    physical = load.plan().sharing.physical
    return Claim(
        claim="how many run together follows memory, and no answer whose length is known is ever computed twice",
        measured="; ".join(f"{pages} pages: {one.requests} at once, {one.preempted} set aside" for pages, one in found),
        required="more with more pages, none set aside, prompt tokens as planned",
        passed=counts[0] < counts[1] < counts[2]
        and not any(one.preempted for _, one in found)
        and all(one.computed == physical for _, one in found),
    )


# ---- attention -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """A shape of attention, and over how many layers it walks, so that keys come from memory as in a model."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    layers: int


SHAPES = (
    Heads(name="the demo's 8 heads of 32, 4 for keys", heads=8, kv_heads=4, dim=32, layers=8),
    Heads(name="16 heads of 64, each with keys of its own", heads=16, kv_heads=16, dim=64, layers=8),
)
MANY = 32


class Groups:
    """Groups of one-token queries over prefixes and short endings of their own."""

    def __init__(self, shape: Heads, groups: int, members: int, prefix: int, own: int, dtype: Any = np.float16) -> None:
        rng = np.random.default_rng(6)
        pages, mine = -(-prefix // PAGE), -(-own // PAGE)
        total = groups * (pages + members * mine)
        self.k, self.v = (
            rng.standard_normal((shape.layers, total * PAGE, shape.kv_heads, shape.dim)).astype(dtype) for _ in range(2)
        )
        self.q = rng.standard_normal((groups * members, shape.heads, shape.dim)).astype(np.float32)
        self.out, self.scale, self.own = np.empty_like(self.q), shape.dim**-0.5, own
        self.tables = rng.permutation(total).astype(np.int32)
        self.ends = np.array(
            [(i, 1, groups * pages + i * mine, own, own - 1) for i in range(groups * members)], np.int64
        )
        self.begins = np.array([(g * members, members, g * pages, prefix, prefix) for g in range(groups)], np.int64)
        self.pages, self.mine, self.members = pages, mine, members

    def fused(self, layer: int = 0) -> np.ndarray:
        return attend_shared(
            self.q, self.k[layer], self.v[layer], self.tables, self.ends, self.begins, page_tokens=PAGE,
            scale=self.scale, out=self.out,
        )  # fmt: skip

    def apart(self, layer: int) -> None:
        """A launch for each group."""
        for begin in self.begins:
            first, count = int(begin[0]), int(begin[1])
            ends, begins = self.ends[first : first + count].copy(), begin[None].copy()
            ends[:, 0] -= first
            begins[:, 0] = 0
            attend_shared(
                self.q[first : first + count], self.k[layer], self.v[layer], self.tables, ends, begins,
                page_tokens=PAGE, scale=self.scale, out=self.out[first : first + count],
            )  # fmt: skip

    def unshared(self, layer: int) -> None:
        """Every query walks its prefix by itself."""
        rows = [
            np.concatenate([self.tables[b[2] : b[2] + self.pages], self.tables[e[2] : e[2] + self.mine]])
            for e in self.ends
            for b in [self.begins[e[0] // self.members]]
        ]
        lengths = np.full(len(rows), self.pages * PAGE + self.own, np.int64)
        attend_paged_sequences(
            self.q, self.k[layer], self.v[layer], np.stack(rows), lengths, page_tokens=PAGE, scale=self.scale,
            out=self.out,
        )  # fmt: skip

    def error(self) -> float:
        """Largest difference from attention over prefix and own keys in a line."""
        found, worst = self.fused(), 0.0
        for row, end in enumerate(self.ends):
            begin, line = self.begins[row // self.members], []
            for place, length in ((begin[2], begin[3]), (end[2], end[3])):
                at = np.arange(length)
                line.append(self.tables[place + at // PAGE].astype(np.int64) * PAGE + at % PAGE)
            keys, out = np.concatenate(line), np.empty((1, *self.q.shape[1:]), np.float32)
            attend_float(
                self.q[row : row + 1], self.k[0][keys], self.v[0][keys], scale=self.scale,
                first_position=len(keys) - 1, out=out,
            )  # fmt: skip
            worst = max(worst, float(np.abs(out[0] - found[row]).max()))
        return worst


def layer_times(
    layers: int, repeats: int, *bodies: Callable[[int], Any], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Walks over all layers, in turn; the least of each counts, as others may use the machine."""
    times: list[list[float]] = [[] for _ in bodies]
    for number in range(repeats + 1):
        for body, taken in zip(bodies, times):
            began = clock()
            for layer in range(layers):
                body(layer)
            if number:
                taken.append(clock() - began)
    return [min(taken) for taken in times]


def attention_claims(sizes: Sizes) -> Iterator[Claim]:
    cases = [(shape, groups, members) for shape in SHAPES for groups, members in ((1, 1), (3, 2), (2, 33))]
    flat = [(replace(shape, layers=1), groups, members) for shape, groups, members in cases]
    worst = max(Groups(*case, 777, 21, np.float32).error() for case in flat)
    yield Claim(
        claim="prefix and own parts joined are attention over both",
        measured=f"largest difference {worst:.1e} over {len(cases)} cases, prefixes of 777 tokens and 21 of each one's "
        "own",
        required="below 1e-5",
        passed=worst < 1e-5,
    )
    yield growth_claim(sizes)
    told, passed = [], True
    for shape in SHAPES:
        groups = Groups(shape, 24, 4, 64, 16)
        together, apart = layer_times(shape.layers, sizes.repeats, groups.fused, groups.apart)
        passed &= together < apart
        told.append(f"{shape.name}: {apart / together:.2f} times")
    yield Claim(
        claim="one list of tasks for all groups takes less time than a launch for each",
        measured="24 groups of 4 behind 64 tokens, launches over one list: " + "; ".join(told),
        required="above 1 in both shapes",
        passed=passed,
    )
    yield on_a_gpu()


def on_a_gpu() -> Claim:
    name = "on a GPU one launch of a work list beats separate ones, most for short suffixes and many groups"
    required = "ratio above 1 in all cases, and larger with 64 groups of 16 own tokens than with 4 of 512"
    if any(importlib.util.find_spec(each) is None for each in ("torch", "triton")):
        return not_run(name, required, "torch, triton and a GPU")
    import torch

    if not torch.cuda.is_available():
        return not_run(name, required, "a GPU")
    ratios = {(count, own): gpu_ratio(torch, Groups(SHAPES[0], count, 4, 256, own)) for count, own in GPU_CASES}
    told = ", ".join(f"{count} groups, {own} own tokens {ratio:.2f}" for (count, own), ratio in ratios.items())
    most, least = ratios[GPU_CASES[-1]], ratios[GPU_CASES[0]]
    passed = min(ratios.values()) > 1 and most > least
    return Claim(claim=name, measured=f"{torch.cuda.get_device_name()}: {told}", required=required, passed=passed)


GPU_CASES = ((4, 512), (4, 16), (64, 512), (64, 16))


def gpu_ratio(torch: Any, groups: Groups) -> float:
    """How much longer a launch for each group takes than one for all; lists are made and sent before."""
    from memwall.kernels import triton_shared as gpu

    device, shared = torch.device("cuda"), groups.q.shape[1] // groups.k.shape[2]
    k, v, tables = (torch.from_numpy(each).to(device) for each in (groups.k[0], groups.v[0], groups.tables))
    q = torch.from_numpy(groups.q).to(device)

    def made(own: np.ndarray, begins: np.ndarray, rows: slice) -> Callable[[], Any]:
        own, begins = own.copy(), begins.copy()
        own[:, 0] -= rows.start
        begins[:, 0] -= rows.start
        work = gpu.work_list(own, begins, rows.stop - rows.start, shared=shared, device=device)
        return lambda: gpu.attend_shared(
            q[rows], k, v, tables, work, page_tokens=PAGE, scale=groups.scale
        )  # fmt: skip

    parts = [
        made(groups.ends[rows], begin[None], rows)
        for begin in groups.begins
        for rows in [slice(int(begin[0]), int(begin[0] + begin[1]))]
    ]
    together = made(groups.ends, groups.begins, slice(0, len(groups.q)))

    def seconds(body: Callable[[], Any]) -> float:
        body()
        torch.cuda.synchronize()
        times = []
        for _ in range(20):
            began = time.perf_counter()
            body()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return seconds(lambda: [part() for part in parts]) / seconds(together)


def growth_claim(sizes: Sizes) -> Claim:
    """Processor time on one thread: one query keeps one thread busy, and what else the machine does is not counted."""
    told, passed, threads = [], True, kernels.num_threads()
    kernels.set_num_threads(1)
    for shape in SHAPES:
        one, many = Groups(shape, 1, 1, 2000, 32), Groups(shape, 1, MANY, 2000, 32)
        first, all_of_them, each = layer_times(
            shape.layers, sizes.repeats, one.fused, many.fused, many.unshared, clock=time.process_time
        )
        passed &= all_of_them <= first * MANY / 2
        told.append(f"{shape.name}: {all_of_them / first:.1f} times ({each / first:.1f} when each walks the prefix)")
    kernels.set_num_threads(threads)
    return Claim(
        claim=f"attention of {MANY} queries behind one prefix of 2,000 tokens takes far less than {MANY} times one's",
        measured="processor time on one thread, " + "; ".join(told),
        required=f"at most {MANY // 2} times, in both shapes",
        passed=passed,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """See `memwall.claims`."""
    sizes = QUICK if quick else FULL
    whole, done = 3 * sizes.rounds + 4, 0

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, whole), whole, what)
        done += 1

    tick("plans")
    claims = list(plan_claims(sizes))
    claims += batch_claims(data, sizes, tick)
    tick("order")
    claims += order_claims(sizes)
    tick("attention")
    claims += attention_claims(sizes)
    return claims


if __name__ == "__main__":
    sys.exit(main("batchllm", sys.modules[__name__]))
