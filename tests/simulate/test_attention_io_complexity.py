"""Attention's traffic: closed forms against the executor, capacity to the word, regimes, and bounds that hold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit, InputError
from memwall.simulate.attention_gradients import execute_gradients
from memwall.simulate.attention_io_complexity import (
    SCHEDULES,
    Plan,
    Tile,
    choose,
    count_words,
    crossing,
    io_star,
    lower_bound,
    make_plan,
    optimality_gap,
    plans,
    regime,
    words_needed,
)
from memwall.simulate.attention_schedules import (
    Problem,
    execute,
    measured_gap,
    q_outer,
    reference,
    schedule_of,
    square_tiles,
)
from memwall.simulate.attention_shape import Attention
from memwall.simulate.fast_memory import FastMemory, FastMemoryFull, Memory


def arrays(shape: Attention, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    sizes = ((shape.heads, shape.tokens), (shape.kv_heads, shape.num_keys), (shape.kv_heads, shape.num_keys))
    q, k, v = (draw.standard_normal((shape.batch, *size, shape.head_size), np.float32) for size in sizes)
    return q, k, v


@st.composite
def shapes(draw: st.DrawFn) -> Attention:
    tokens, group, kv_heads = draw(st.integers(1, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    keys = draw(st.one_of(st.none(), st.integers(tokens, tokens + 9)))
    return Attention(
        tokens=tokens, head_size=draw(st.integers(1, 12)), keys=keys, causal=draw(st.booleans()),
        heads=group * kv_heads, kv_heads=kv_heads, batch=draw(st.integers(1, 2)),
    )  # fmt: skip


@st.composite
def any_plan(draw: st.DrawFn, schedules: tuple[str, ...] = SCHEDULES) -> Plan:
    """Tiles of any size, also ones that no planner would choose."""

    def tile() -> Tile:
        rows, columns, depth = (draw(st.integers(1, 24)) for _ in range(3))
        return Tile(rows=rows, columns=columns, depth=depth)

    schedule = draw(st.sampled_from(schedules))
    if schedule in ("kv-outer", "q-outer"):
        return Plan(schedule=schedule, tiles=(tile(),))
    return Plan(schedule=schedule, tiles=(tile(), tile()), softmax=draw(st.sampled_from(("folded", "lazy", "sweeps"))))


@settings(max_examples=60, deadline=None)
@given(shapes(), any_plan(), st.integers(0, 9))
def test_any_tiles_compute_attention_and_move_what_the_closed_form_says(
    shape: Attention, plan: Plan, seed: int
) -> None:
    q, k, v = arrays(shape, seed)
    needed = words_needed(shape, plan)
    out, memory = execute(shape, q, k, v, needed, plan)
    assert np.abs(out - reference(shape, q, k, v)).max() < 1e-5
    assert memory.moved == count_words(shape, plan)
    assert memory.peak == needed or (shape.causal and memory.peak < needed)
    assert memory.moved >= lower_bound(shape, memory.peak)
    with pytest.raises(FastMemoryFull):
        execute(shape, q, k, v, memory.peak - 1, plan)


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(3, 1500))
def test_planned_tiles_fit_and_the_choice_is_the_least(shape: Attention, fast_words: int) -> None:
    found = plans(shape, fast_words)
    counts = {name: count_words(shape, plan) for name, plan in found.items()}
    assert all(words_needed(shape, plan) <= fast_words for plan in found.values())
    assert count_words(shape, choose(shape, fast_words)) == min(counts.values())
    assert min(counts.values()) >= lower_bound(shape, fast_words)


@settings(max_examples=30, deadline=None)
@given(shapes(), any_plan(("kv-outer", "three-phase")), st.integers(0, 9))
def test_gradients_are_right_and_counted(shape: Attention, plan: Plan, seed: int) -> None:
    shape = replace(shape, heads=shape.group, kv_heads=1, batch=1, backward=True)
    draw = np.random.default_rng(seed)
    q, d_out = (draw.standard_normal((shape.rows, shape.head_size), np.float32) for _ in range(2))
    k, v = (draw.standard_normal((shape.num_keys, shape.head_size), np.float32) for _ in range(2))
    needed = words_needed(shape, plan)
    found, memory = execute_gradients(shape, q, k, v, d_out, needed, plan)
    for mine, truth in zip(found, gradients(shape, q, k, v, d_out), strict=True):
        assert np.abs(mine - truth).max() < 1e-4
    assert memory.moved == count_words(shape, plan)
    assert memory.peak == needed or (shape.causal and memory.peak < needed)
    assert memory.moved >= lower_bound(shape, memory.peak)
    with pytest.raises(FastMemoryFull):
        execute_gradients(shape, q, k, v, d_out, memory.peak - 1, plan)


def gradients(shape: Attention, *given: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v, d_out = (each.astype(np.float64) for each in given)
    scale = 1 / math.sqrt(shape.head_size)
    scores = scale * q @ k.T
    scores[np.arange(len(k)) >= shape.seen(np.arange(len(q)))[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    sloped = d_out @ v.T
    slopes = scale * weights * (sloped - (weights * sloped).sum(axis=1, keepdims=True))
    return slopes @ k, slopes.T @ q, weights.T @ d_out


def test_the_counts_worked_out_by_hand() -> None:
    shape, tokens, size = Attention(tokens=1024, head_size=64), 1024, 64
    plan = make_plan(shape, 16384, "kv-outer")
    assert plan.tiles[0] == Tile(rows=42, columns=64, depth=64)  # B_c = M / 4 d
    assert count_words(shape, plan) == 2 * tokens * size + tokens // 64 * (3 * tokens * size + 4 * tokens) == 3_342_336
    plan = make_plan(shape, 16384, "q-outer")
    assert plan.tiles[0].rows == 114  # of (16384 - 128) // 131 = 124, made even over the nine blocks that takes
    assert count_words(shape, plan) == 2 * tokens * size + 9 * 2 * tokens * size == 1_310_720
    plan = make_plan(shape, 768, "unfused")
    assert plan.tiles[0] == Tile(rows=16, columns=16, depth=16)
    assert count_words(shape, plan) == 4 * tokens**2 * size // 16 + 4 * tokens**2 + tokens * size == 21_037_056
    lazy = square_tiles(818, "lazy")
    assert lazy.tiles[0].rows == 16
    assert count_words(shape, lazy) == 4 * tokens**2 * size // 16 + 2 * tokens**2 + 10 * tokens + tokens * size


def test_options_scale_traffic_as_they_should() -> None:
    plain = Attention(tokens=2048, head_size=64)
    words = count_words(plain, make_plan(plain, 8192, "q-outer"))
    causal = replace(plain, causal=True)
    assert count_words(causal, make_plan(causal, 8192, "q-outer")) == pytest.approx(words / 2, rel=0.1)
    below = count_words(plain, make_plan(plain, 1024, "three-phase"))
    assert count_words(causal, make_plan(causal, 1024, "three-phase")) == pytest.approx(below / 2, rel=0.05)
    many = replace(plain, heads=8, kv_heads=8, batch=3)
    assert count_words(many, choose(many, 8192)) == 24 * count_words(plain, choose(plain, 8192))
    # rows of all heads that share keys pass with one load of them: as a sequence four times as long over those keys
    grouped = replace(plain, heads=4)
    long = Attention(tokens=8192, head_size=64, keys=2048)
    assert count_words(grouped, choose(grouped, 8192)) == count_words(long, choose(long, 8192))
    # one block of rows of four heads loads keys once where four blocks of one head load them four times
    few = Attention(tokens=16, head_size=64, keys=4096, heads=4, kv_heads=1)
    apart = replace(few, kv_heads=4)
    assert count_words(apart, choose(apart, 16384)) > 3.9 * count_words(few, choose(few, 16384))


def test_regimes_and_the_switch() -> None:
    shape = Attention(tokens=4096, head_size=128)
    assert [regime(shape, words) for words in (64, 16383, 16384, 1 << 18)] == ["small", "small", "large", "floor"]
    assert io_star(shape, 16384) == 4096**2
    assert io_star(shape, 1024) == 4096**2 * 4
    assert choose(shape, 1024).schedule == "three-phase"
    assert choose(shape, 1 << 15).schedule == "q-outer"
    for words in (3, 5, 63, 4 * 128 - 1):  # where no row of keys and values fits
        assert words_needed(shape, choose(shape, words)) <= words
    with pytest.raises(DoesNotFit, match="q-outer with heads of 128 needs 515"):
        make_plan(shape, 514, "q-outer")
    assert make_plan(shape, 515, "q-outer").tiles[0] == Tile(rows=1, columns=1, depth=128)
    assert 0.5 <= crossing(shape, "q-outer", "three-phase") / 128**2 <= 2
    assert 0.5 <= crossing(shape, "kv-outer", "unfused") / 128**2 <= 2


def test_the_gap_is_bounded_and_that_of_unfused_is_not() -> None:
    shape = Attention(tokens=4096, head_size=64)
    gaps = {
        m: {name: optimality_gap(shape, m, count_words(shape, plan)) for name, plan in plans(shape, m).items()}
        for m in (64, 4096, 16384, 65536)
    }
    assert max(min(row.values()) for row in gaps.values()) < 6
    assert gaps[65536]["unfused"] > 3 * gaps[16384]["unfused"] > 6 * gaps[4096]["unfused"] > 60
    assert count_words(shape, choose(shape, 1 << 20)) == shape.compulsory == 4 * 4096 * 64


def test_the_bound_is_not_empty() -> None:
    for size in (16, 64, 128):
        for fast_words in (64, 1024, 16384):
            shape = Attention(tokens=4096, head_size=size)
            best = count_words(shape, choose(shape, fast_words))
            assert best < 14 * lower_bound(shape, fast_words)


def test_a_schedule_of_ones_own_is_judged_by_its_gap() -> None:
    def one_row_at_a_time(memory: Memory, problem: Problem) -> None:
        plan = Plan(schedule="q-outer", tiles=(Tile(rows=1, columns=1, depth=16),))
        q_outer(memory, problem, plan)

    shape = Attention(tokens=64, head_size=16)
    gap, error = measured_gap(shape, 512, one_row_at_a_time)
    assert gap == pytest.approx((2 * 64 * 16 + 64 * 2 * 64 * 16) / max(64**2 * 16**2 / 512, 4 * 64 * 16))
    assert error < 1e-5
    best = choose(shape, 512)
    assert measured_gap(shape, 512, schedule_of(best))[0] == optimality_gap(shape, 512, count_words(shape, best))


def test_blocks_cannot_be_used_once_they_are_let_go() -> None:
    memory = FastMemory(4)
    block = memory.load(np.ones((2, 2), np.float32))
    with pytest.raises(FastMemoryFull, match="1 words more do not fit: 4 of the fast memory's 4"):
        memory.create((1, 1))
    memory.evict(block)
    with pytest.raises(AssertionError, match="let go"):
        memory.multiply(block, block, block)
    assert (memory.loaded, memory.stored, memory.held) == (4, 0, 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tokens": 0}, "tokens 0"),
        ({"keys": 0}, "keys 0"),
        ({"heads": 3, "kv_heads": 2}, "cannot share 2 KV heads"),
        ({"causal": True, "keys": 7}, "no fewer than the 8 tokens"),
    ],
)
def test_shapes_are_checked(settings: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Attention(**{"tokens": 8, "head_size": 4, **settings})


def test_memories_and_schedules_are_checked() -> None:
    shape = Attention(tokens=8, head_size=4)
    with pytest.raises(InputError, match="0 words"):
        FastMemory(0)
    with pytest.raises(DoesNotFit, match="fewer than 3"):
        choose(shape, 2)
    with pytest.raises(InputError, match="no schedule 'flash'"):
        make_plan(shape, 64, "flash")
    with pytest.raises(DoesNotFit, match="no gradients"):
        make_plan(replace(shape, backward=True), 640, "q-outer")
