"""Claims of the I/O complexity of attention: two regimes, schedules that meet them, and bounds that nothing goes under.

Words are counted by an executor that holds M words and refuses one more; closed forms are the same numbers, and are
used where blocks are too many to move one by one (small M, long sequences). Gaps are counted words by the paper's
order with constant 1.

Slopes over M are judged in d^2 <= M <= N d / 8. Up to N d itself they are flatter (both are told), because reading
inputs once is added to what falls: that is the floor, and not a failure of the schedule. Crossings are judged like for
like: plain against plain (FlashAttention's own blocks, unfused phases with tiles of sqrt(M / 3)) and best against best
(tallest row blocks, phases that keep the softmax's sums). Across the pairs they lie where constants put them, at a
quarter of d^2 and at four times it.

Caches: schedules run without placing anything, and a cache of 64-byte lines serves their touches, Belady's of M words
and LRU of twice as many (LRU of size 2 M fetches at most about twice what Belady's of M does). Tiles are planned for M
words with steps of a line. The first form of this experiment had caches that fetch a line before they overwrite it, and
failed at one of 22 pairs (three-phase above kv-outer at d 64, M 8192, 425 thousand words against 414, counted 312
against 434): three-phase writes scores to lines that it has not read, and the fetches of these are no part of the
two-level model. Now they are left out, for all schedules. Shapes have M of at most N d / 2, so that LRU, which has
twice as many words, holds no more than one of the matrices: --quick once had M = N d at N 128, d 32, where LRU puts
kv-outer above three-phase (61,056 words against 59,776, counted 59,392 against 70,144), though Belady's does not. A
search over N 128, 192 and 256, d 32, 64 and 128 and M from 1,024 words to N d found no other pair. No performance
counters are read: few virtual machines have them.

Gradients were 33.8 times the order at first, where 32 is the limit: blocks of M / 8 d keys were too small, and the
schedule takes as many keys as fit since.

Times: a tiled kernel in one thread, tiles chosen for this processor's first and second level of cache by a rule that
was written before the first measurement (half of each cache; `nested_tiles`).

A GPU's DRAM traffic beside the bound needs a GPU and its profiler. `--data` is not read: all data is made.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall.claims import Claim, Progress, alternately, main, not_run
from memwall.errors import DoesNotFit
from memwall.hardware.system import describe_system
from memwall.kernels.tiled_attention import TILE_STEP, tiled_attention
from memwall.memory.cache_policy import Lru, count_faults
from memwall.simulate.attention_gradients import execute_gradients
from memwall.simulate.attention_io_complexity import (
    SCHEDULES,
    Plan,
    Tile,
    choose,
    count_words,
    crossing,
    lower_bound,
    make_plan,
    optimality_gap,
    plans,
    words_needed,
)
from memwall.simulate.attention_levels import nested_tiles
from memwall.simulate.attention_schedules import Problem, accumulate, blocks, execute, reference, square_tiles
from memwall.simulate.attention_shape import Attention
from memwall.simulate.fast_memory import FastMemoryFull, Memory
from memwall.simulate.memory_trace import LINE_WORDS, cache_traffic, trace

TOKENS = (256, 512, 1024, 2048, 4096)
HEAD_SIZES = (16, 32, 64, 128)
POWERS = range(6, 19)
SMALL = ("three-phase", "unfused")
LARGE = ("kv-outer", "q-outer")
ALIKE = 0.1
"""Counts that differ by less are put in no order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    steps: int
    """Most blocks that one point of the grid may move to be carried out."""
    tokens: tuple[int, ...]
    fuzzed: int
    traced: tuple[tuple[int, int, int], ...]
    """Tokens, head size, words."""
    timed: tuple[tuple[int, int], ...]
    """Tokens, head size."""
    rounds: int


FULL = Sizes(
    steps=30_000, tokens=TOKENS, fuzzed=1500, rounds=5, timed=((4096, 64), (2048, 128)),
    traced=((128, 128, 4096), (256, 64, 2048), (256, 64, 8192), (256, 32, 4096)),
)  # fmt: skip
QUICK = Sizes(
    steps=4_000, tokens=(256, 512), fuzzed=150, rounds=5, timed=((2048, 64),),
    traced=((128, 64, 2048), (128, 32, 2048)),
)  # fmt: skip


def drawn(shape: Attention, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v of normal numbers."""
    draw = np.random.default_rng(seed)
    sizes = ((shape.heads, shape.tokens), (shape.kv_heads, shape.num_keys), (shape.kv_heads, shape.num_keys))
    q, k, v = (draw.standard_normal((shape.batch, *size, shape.head_size), np.float32) for size in sizes)
    return q, k, v


# ---- counts --------------------------------------------------------------------------------------------------------


def steps_of(shape: Attention, plan: Plan) -> float:
    """Blocks that a plan moves, about."""
    rows, keys, size = shape.rows, shape.num_keys, shape.head_size
    if plan.softmax == "online":
        return 6 * math.ceil(rows / plan.tiles[0].rows) * math.ceil(keys / plan.tiles[0].columns)
    one, two = plan.tiles
    return 3 * (
        math.ceil(rows / one.rows) * math.ceil(keys / one.columns) * math.ceil(size / one.depth)
        + math.ceil(rows / two.rows) * math.ceil(size / two.columns) * math.ceil(keys / two.depth)
    )


def count_claims(sizes: Sizes) -> Iterator[Claim]:
    done, other, worst, refused = 0, [], 0.0, 0
    for tokens, size, power in itertools.product(sizes.tokens, HEAD_SIZES, POWERS):
        shape = Attention(tokens=tokens, head_size=size)
        inputs = None
        for name, plan in plans(shape, 2**power).items():
            if steps_of(shape, plan) > sizes.steps:
                continue
            if inputs is None:
                inputs = drawn(shape, power)
                truth = reference(shape, *inputs)
            out, memory = execute(shape, *inputs, 2**power, plan)
            worst = max(worst, float(np.abs(out - truth).max()))
            done += 1
            if memory.moved != count_words(shape, plan) or memory.peak != words_needed(shape, plan):
                other.append(f"{name} at N {tokens}, d {size}, M 2^{power}")
            if tokens == 256:
                refused += is_refused(shape, inputs, plan, memory.peak - 1)
    tried = sum(
        steps_of(shape, plan) <= sizes.steps
        for size, power in itertools.product(HEAD_SIZES, POWERS)
        for shape in [Attention(tokens=256, head_size=size)]
        for plan in plans(shape, 2**power).values()
    )
    yield Claim(
        claim="the executor counts exactly the closed forms, and computes attention, all over the grid",
        measured=f"{done} runs of {len(SCHEDULES)} schedules, N {sizes.tokens[0]} to {sizes.tokens[-1]}, d 16 to 128, "
        f"M 2^6 to 2^18; {len(other)} other counts{': ' + other[0] if other else ''}; largest error {worst:.1e} "
        "against float64",
        required="no other count, errors below 1e-5",
        passed=not other and worst < 1e-5 and done > 0,
    )
    yield Claim(
        claim="capacity is enforced to the word: with one word less than a schedule needs it is refused",
        measured=f"{refused} of {tried} refused",
        required="all",
        passed=refused == tried > 0,
    )
    shape = Attention(tokens=1024, head_size=64)
    told, passed = [], True
    for name, expected in (
        ("kv-outer", 2 * 1024 * 64 + 16 * (3 * 1024 * 64 + 4 * 1024)),
        ("q-outer", 2 * 1024 * 64 + 9 * 2 * 1024 * 64),
    ):
        _, memory = execute(shape, *drawn(shape, 0), 16384, make_plan(shape, 16384, name))
        told.append(f"{name} {memory.moved:,}")
        passed &= memory.moved == expected
    yield Claim(
        claim="N 1024, d 64, M 16384: exact counts of both loop orders",
        measured=", ".join(told),
        required="2 N d + 16 (3 N d + 4 N) = 3,342,336 and 2 N d + 9 x 2 N d = 1,310,720",
        passed=passed,
    )


def is_refused(shape: Attention, inputs: tuple[np.ndarray, np.ndarray, np.ndarray], plan: Plan, words: int) -> bool:
    """Whether a plan is refused by a memory of so many words."""
    try:
        execute(shape, *inputs, words, plan)
    except FastMemoryFull:
        return True
    return False


def slope(shape: Attention, schedule: str, least: float, most: float) -> float:
    """Of the logarithm of words over that of M, by least squares at 25 sizes."""
    points = []
    for fast_words in sorted({int(m) for m in np.geomspace(least, most, 25)}):
        try:
            points.append((fast_words, count_words(shape, make_plan(shape, fast_words, schedule))))
        except DoesNotFit:
            continue
    across, up = np.log(np.array(points, float)).T
    return float(np.polyfit(across, up, 1)[0])


def slope_claims() -> Iterator[Claim]:
    shapes = [Attention(tokens=4096, head_size=size) for size in HEAD_SIZES]
    inner = {n: [slope(s, n, s.head_size**2, s.rows * s.head_size / 8) for s in shapes] for n in LARGE}
    whole = {n: [slope(s, n, s.head_size**2, s.rows * s.head_size) for s in shapes] for n in LARGE}
    yield Claim(
        claim="from M = d^2 on the FlashAttention family's traffic falls as 1 / M",
        measured="; ".join(f"{n} {told(inner[n])} (up to N d: {told(whole[n])})" for n in LARGE)
        + ", N 4096, d 16 to 128",
        required="slopes of -1 within 0.05 up to N d / 8",
        passed=all(abs(each + 1) <= 0.05 for n in LARGE for each in inner[n]),
    )
    small = {n: [slope(s, n, 64, s.head_size**2) for s in shapes] for n in SMALL}
    yield Claim(
        claim="below M = d^2 the three phases' traffic falls as 1 / sqrt(M)",
        measured="; ".join(f"{n} {told(small[n])}" for n in SMALL) + ", M from 64 on (unfused has 4 N^2 beside it)",
        required="slopes of three-phase -0.5 within 0.05",
        passed=all(abs(each + 0.5) <= 0.05 for each in small["three-phase"]),
    )
    below = {n: [slope(s, n, 8 * s.head_size, s.head_size**2) for s in shapes[1:]] for n in LARGE}
    shape = shapes[-1]
    gain = {
        pair: count_words(shape, make_plan(shape, 1024, pair[0])) / count_words(shape, make_plan(shape, 1024, pair[1]))
        for pair in zip(LARGE, ("unfused", "three-phase"), strict=True)
    }
    yield Claim(
        claim="the family keeps falling as 1 / M below d^2, or faster, so there it loses, by d / sqrt(M) or more",
        measured="; ".join(f"{n} {told(below[n])} from 8 d on" for n in LARGE)
        + "; at d 128, M 1024 "
        + ", ".join(f"{one} moves {ratio:.1f} times what {two} does" for (one, two), ratio in gain.items()),
        required="slopes of -0.95 or less, and 4 times or more",
        passed=all(each <= -0.95 for n in LARGE for each in below[n]) and all(each >= 4 for each in gain.values()),
    )
    flat = [slope(s, "q-outer", 4 * s.rows * s.head_size, 64 * s.rows * s.head_size) for s in shapes]
    ends = [count_words(s, choose(s, s.rows * s.head_size)) / s.compulsory for s in shapes]
    yield Claim(
        claim="beyond M = N d traffic is flat, at inputs and output once",
        measured=f"slope {told(flat)} from 4 N d on; at N d {told(ends)} times the floor, at 4 N d "
        + told([count_words(s, choose(s, 4 * s.rows * s.head_size)) / s.compulsory for s in shapes]),
        required="slope 0, the floor itself from 4 N d on, at most twice it at N d",
        passed=all(abs(each) < 1e-9 for each in flat)
        and all(count_words(s, choose(s, 4 * s.rows * s.head_size)) == s.compulsory for s in shapes)
        and max(ends) <= 2,
    )
    pairs = [("kv-outer", "unfused"), ("q-outer", "three-phase"), ("q-outer", "unfused"), ("kv-outer", "three-phase")]
    at = {pair: [crossing(s, *pair) / s.head_size**2 for s in shapes] for pair in pairs}
    yield Claim(
        claim="the two families cross at about M = d^2",
        measured="; ".join(f"{one} and {two} at {told(at[one, two])} d^2" for one, two in pairs) + ", d 16 to 128",
        required="plain against plain and best against best (the first two) within a factor of two of d^2",
        passed=all(0.5 <= each <= 2 for pair in pairs[:2] for each in at[pair]),
    )


def told(figures: Sequence[float]) -> str:
    """A range, or one figure."""
    low, high = min(figures), max(figures)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def gap_claims() -> Iterator[Claim]:
    grid = [
        (Attention(tokens=n, head_size=d, causal=causal), 2**power)
        for n, d, power, causal in itertools.product(TOKENS, HEAD_SIZES, POWERS, (False, True))
    ]
    best = {point: choose(*point) for point in grid}
    gaps = {point: optimality_gap(*point, count_words(point[0], plan)) for point, plan in best.items()}
    families = {
        name: max(
            optimality_gap(shape, m, count_words(shape, make_plan(shape, m, name)))
            for shape, m in grid
            if not shape.causal and (m >= shape.head_size**2) == (name in LARGE)
        )
        for name in SCHEDULES
    }
    bound = max(count_words(point[0], plan) / lower_bound(*point) for point, plan in best.items())
    shape = Attention(tokens=4096, head_size=64)
    grows = [
        optimality_gap(shape, m, count_words(shape, make_plan(shape, m, "unfused"))) for m in (2**12, 2**14, 2**16)
    ]
    yield Claim(
        claim="the chosen schedule stays within a constant of the optimum, everywhere",
        measured=f"at most {max(gaps.values()):.2f} times the order at {len(grid)} points, causal too; each family "
        + "in its regime: " + ", ".join(f"{name} {gap:.1f}" for name, gap in families.items())
        + f"; at most {bound:.1f} times the proven bound",
        required="at most 16 times the order; of each family in its own regime too",
        passed=max(gaps.values()) <= 16 and max(families.values()) <= 16,
    )  # fmt: skip
    yield Claim(
        claim="unfused attention leaves the optimum behind as M grows",
        measured="gap " + ", ".join(f"{each:.1f}" for each in grows) + " at M 2^12, 2^14, 2^16, N 4096, d 64",
        required="at least doubled by each step, above 16 at the end",
        passed=all(two > 2 * one for one, two in itertools.pairwise(grows)) and grows[-1] > 16,
    )
    pairs = [
        (Attention(tokens=n, head_size=d, backward=True), 2**power)
        for n, d, power in itertools.product((1024, 4096), HEAD_SIZES, POWERS)
    ]
    backward = {point: optimality_gap(*point, count_words(point[0], choose(*point))) for point in pairs}
    yield Claim(
        claim="gradients move a constant times the same order",
        measured=f"at most {max(backward.values()):.1f} times it at {len(pairs)} points",
        required="at most 32: five products where the forward pass has two, and twice the arrays",
        passed=max(backward.values()) <= 32,
    )


# ---- numbers -------------------------------------------------------------------------------------------------------


def torch_claims() -> Iterator[Claim]:
    claim, required = "all schedules equal torch's scaled_dot_product_attention", "within 1e-5, gradients within 1e-4"
    try:
        import torch
    except ImportError:
        yield not_run(claim, required, "torch")
        return
    worst, runs, slopes = 0.0, 0, 0.0
    for causal, group, tokens, size in itertools.product((False, True), (1, 4), (50, 129), (16, 40)):
        shape = Attention(tokens=tokens, head_size=size, causal=causal, heads=2 * group, kv_heads=2, batch=2)
        q, k, v = (torch.from_numpy(each) for each in drawn(shape, tokens))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        truth = sdpa(q, k, v, is_causal=causal, enable_gqa=True).numpy()
        for fast_words in (400, 4000):
            extra = [square_tiles(fast_words, softmax) for softmax in ("lazy", "folded")]
            for plan in [*plans(shape, fast_words).values(), *extra]:
                out, _ = execute(shape, q.numpy(), k.numpy(), v.numpy(), fast_words, plan)
                worst, runs = max(worst, float(np.abs(out - truth).max())), runs + 1
    for causal in (False, True):
        shape = Attention(tokens=120, head_size=24, causal=causal, backward=True)
        q, k, v = (torch.from_numpy(each).requires_grad_() for each in drawn(shape, 5))
        d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).backward(d_out)
        given = [each.detach().numpy()[0, 0] for each in (q, k, v, d_out)]
        for plan in plans(shape, 1000).values():
            found, memory = execute_gradients(shape, given[0], given[1], given[2], given[3], 1000, plan)
            for mine, each in zip(found, (q, k, v), strict=True):
                assert each.grad is not None
                slopes = max(slopes, float(np.abs(mine - each.grad.numpy()[0, 0]).max()))
            assert memory.moved == count_words(shape, plan)
    yield Claim(
        claim=claim,
        measured=f"at most {worst:.1e} apart in {runs} runs (causal, shared KV heads, odd sizes); gradients "
        f"{slopes:.1e}",
        required=required,
        passed=worst < 1e-5 and slopes < 1e-4,
    )


# ---- bounds --------------------------------------------------------------------------------------------------------


def any_order(draw: random.Random, tiles: tuple[Tile, Tile]) -> object:
    """A schedule that nobody planned: tiles of scores in any order, kept for the output or written, by lot."""

    def schedule(memory: Memory, problem: Problem) -> None:
        scores = np.zeros((len(problem.q), len(problem.k)), np.float32)
        one, two = tiles
        places = list(itertools.product(blocks(0, len(problem.q), one.rows), blocks(0, len(problem.k), one.columns)))
        draw.shuffle(places)
        for rows, keys in places:
            made = memory.create((rows.stop - rows.start, keys.stop - keys.start))
            accumulate(memory, made, problem.q[rows], problem.k[keys], one.depth, turned_b=True)
            made.array[...] *= problem.scale
            memory.store(made, scores[rows, keys])
            memory.evict(made)
        for row in range(len(problem.q)):
            line = memory.load(scores[row : row + 1])
            line.array[...] = np.exp(line.array - line.array.max())
            line.array[...] /= line.array.sum()
            out = memory.create((1, problem.q.shape[1]))
            for keys in blocks(0, len(problem.k), two.depth):
                values, part = memory.load(problem.v[keys]), memory.create((1, keys.stop - keys.start))
                part.array[...] = line.array[:, keys]
                memory.multiply(out, part, values)
                memory.evict(values, part)
            memory.store(out, problem.out[row : row + 1])
            memory.evict(line, out)

    return schedule


def fuzz_claim(sizes: Sizes) -> Claim:
    draw, least, under, wrong = random.Random(7), math.inf, 0, 0
    planned = math.inf
    for number in range(sizes.fuzzed):
        shape = Attention(tokens=draw.randint(4, 48), head_size=draw.randint(2, 24))
        sides = [Tile(rows=draw.randint(1, 40), columns=draw.randint(1, 40), depth=draw.randint(1, 40)) for _ in "ab"]
        inputs = drawn(shape, number)
        name = draw.choice((*SCHEDULES, "any order"))
        if name == "any order":
            schedule = any_order(draw, (sides[0], sides[1]))
        else:
            softmax = "online" if name in LARGE else draw.choice(("folded", "lazy", "sweeps"))
            schedule = Plan(schedule=name, tiles=tuple(sides[: 1 if name in LARGE else 2]), softmax=softmax)
        out, memory = execute(shape, *inputs, 10**6, schedule)  # type: ignore[arg-type]
        wrong += float(np.abs(out - reference(shape, *inputs)).max()) > 1e-5
        ratio = memory.moved / lower_bound(shape, memory.peak)  # as if its memory were just what it needs
        least, under = min(least, ratio), under + (ratio < 1)
    for _ in range(20 * sizes.fuzzed):
        shape = Attention(
            tokens=int(2 ** draw.uniform(3, 14)), head_size=draw.randint(1, 256), causal=draw.random() < 0.5,
            heads=draw.choice((1, 4)), kv_heads=1, backward=draw.random() < 0.3,
        )  # fmt: skip
        fast_words = int(2 ** draw.uniform(2.5, 24))
        planned = min(planned, count_words(shape, choose(shape, fast_words)) / lower_bound(shape, fast_words))
    return Claim(
        claim="no schedule goes under the bound: random tiles, random orders, and the best plans of random shapes",
        measured=f"{sizes.fuzzed} runs, the least {least:.2f} times the bound, {under} under it, {wrong} wrong; "
        f"{20 * sizes.fuzzed:,} best plans, the least {planned:.2f} times",
        required="none under it",
        passed=under == 0 and wrong == 0 and planned >= 1,
    )


# ---- caches --------------------------------------------------------------------------------------------------------


def cache_claims(sizes: Sizes) -> Iterator[Claim]:
    texts, agreed, first = [], [], None
    for tokens, size, fast_words in sizes.traced:
        shape = Attention(tokens=tokens, head_size=size)
        inputs, rows = drawn(shape, 3), {}
        for name, plan in plans(shape, fast_words, step=LINE_WORDS).items():
            touched = trace(shape, *inputs, plan).touches()
            first = first or (touched.lines, fast_words // LINE_WORDS)
            rows[name] = (
                count_words(shape, plan),
                cache_traffic(touched, fast_words // LINE_WORDS, "belady").words,
                cache_traffic(touched, 2 * fast_words // LINE_WORDS, "lru").words,
            )
        for one, two in itertools.permutations(rows.values(), 2):
            if one[0] * (1 + ALIKE) < two[0]:
                agreed.append(one[1] < two[1] and one[2] < two[2])
        texts.append(
            f"N {tokens}, d {size}, M {fast_words}: "
            + ", ".join(f"{name} {' / '.join(f'{each:,}' for each in row)}" for name, row in rows.items())
        )
    yield Claim(
        claim="caches that place nothing by hand put the schedules in the order of their counts",
        measured="counted / Belady of M / LRU of 2 M words: " + "; ".join(texts),
        required=f"of two, which counts less by over {ALIKE:.0%} moves less under Belady and LRU ({len(agreed)} pairs)",
        passed=all(agreed),
    )
    claim, required = "LRU of our traces misses as often as in pycachesim", "equal"
    assert first is not None
    lines, slots = first
    try:
        from cachesim import Cache, CacheSimulator, MainMemory
    except ImportError:
        yield not_run(claim, required, "pycachesim")
        return
    memory = MainMemory()
    cache = Cache("L1", 1, slots, 64, "LRU", write_back=True, write_allocate=True)
    memory.load_to(cache)
    memory.store_from(cache)
    simulator = CacheSimulator(cache, memory)
    for line in lines:
        simulator.load(64 * line, length=1)
    mine, theirs = count_faults(Lru(slots), lines), cache.backend.MISS_count
    yield Claim(
        claim=claim, measured=f"{mine:,} and {theirs:,} of {len(lines):,}", required=required, passed=mine == theirs
    )  # fmt: skip


# ---- times ---------------------------------------------------------------------------------------------------------


def time_claim(sizes: Sizes) -> Claim:
    claim, required = (
        "a kernel's tiles from the caches' sizes are as fast as any",
        "no tile of the sweep is faster by more than 15 %",
    )
    caches = {cache.level: cache.nbytes // 4 for cache in describe_system().caches}
    if not {1, 2} <= set(caches):
        return not_run(claim, required, "a system that tells the sizes of its caches")
    texts, passed = [], True
    for tokens, size in sizes.timed:
        shape = Attention(tokens=tokens, head_size=size)
        q, k, v = (each[0, 0] for each in drawn(shape, 1))
        mine = nested_tiles(shape, caches[1], caches[2], step=TILE_STEP)
        tiles = {mine, *itertools.product((16, 64, 256, 1024), (16, 32, 64, 128, 256, 1024))}
        seconds = alternately({f"{r} x {c}": timed(q, k, v, r, c) for r, c in sorted(tiles)}, sizes.rounds)
        chosen = seconds[f"{mine[0]} x {mine[1]}"]
        best, worst = min(seconds, key=seconds.__getitem__), max(seconds, key=seconds.__getitem__)
        passed &= chosen <= 1.15 * seconds[best]
        texts.append(
            f"N {tokens}, d {size}: chosen {mine[0]} rows x {mine[1]} keys {1e3 * chosen:.1f} ms, best of {len(tiles)} "
            f"{best} {1e3 * seconds[best]:.1f} ms, worst {worst} {1e3 * seconds[worst]:.1f} ms"
        )
    return Claim(claim=claim, measured="; ".join(texts), required=required, passed=passed)


def timed(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: int, keys: int) -> Callable[[], object]:
    """A run to be timed."""
    return lambda: tiled_attention(q, k, v, row_tile=rows, key_tile=keys)


# ---- all -----------------------------------------------------------------------------------------------------------


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    sizes = QUICK if quick else FULL
    claims: list[Claim] = []
    parts = [
        ("times", lambda: [time_claim(sizes)]),
        ("counts", lambda: count_claims(sizes)),
        ("slopes", slope_claims),
        ("gaps", gap_claims),
        ("torch", torch_claims),
        ("bounds", lambda: [fuzz_claim(sizes)]),
        ("caches", lambda: cache_claims(sizes)),
    ]
    for number, (name, part) in enumerate(parts):
        if progress is not None:
            progress(number, len(parts), name)
        claims += list(part())
    claims.append(
        not_run(
            "a GPU's flash kernel moves within four times its shared memory's bound, its unfused one N^2 words",
            "measured DRAM bytes by the bound",
            "GPU and its profiler",
        )
    )
    return claims


if __name__ == "__main__":
    sys.exit(main("attention-io-complexity", sys.modules[__name__]))
