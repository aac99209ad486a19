"""Address traces of schedules: lines by hand, and caches against the policies' own counts."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.memory.cache_policy import Lru, count_faults, least_faults
from memwall.simulate.attention_io_complexity import Plan, choose, make_plan
from memwall.simulate.attention_schedules import reference
from memwall.simulate.attention_shape import Attention
from memwall.simulate.fast_memory import Memory
from memwall.simulate.memory_trace import LINE_WORDS, Touches, TracedMemory, Traffic, cache_traffic, trace


def traced(shape: Attention, plan: Plan) -> Touches:
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, 1, shape.tokens, shape.head_size), np.float32) for _ in range(3))
    return trace(shape, q, k, v, plan).touches()


def test_a_product_touches_what_its_loops_touch() -> None:
    memory = TracedMemory()
    q, k = np.ones((2, 16), np.float32), np.ones((3, 32), np.float32)
    a, b, out = memory.load(q), memory.load(k[:, 16:]), memory.create((2, 3))
    memory.multiply(out, a, b, turned_b=True)
    assert out.array.tolist() == [[16] * 3] * 2
    touched = memory.touches()
    # q lies in lines 0 and 1, k in 2 to 7, of which every other one is asked for, what comes out in line 8
    assert touched.lines == [8] + [line for row in (0, 1) for key in (3, 5, 7) for line in (row, key, 8)]
    assert touched.read == [False] + [True] * 18
    assert touched.written == [True] + [False, False, True] * 6


def test_scratch_is_used_again_and_stores_in_place_touch_nothing() -> None:
    memory: Memory = TracedMemory()
    first = memory.create((4, 4))
    memory.touch(first)
    memory.evict(first)
    second = memory.create((4, 4))
    memory.touch(second, written=False)
    slow = np.zeros((4, 4), np.float32)
    held = memory.load(slow)
    memory.store(held, slow)
    assert isinstance(memory, TracedMemory)
    touched = memory.touches()
    assert (touched.lines, touched.read, touched.written) == ([0], [False], [True])
    memory.store(second, slow)
    touched = memory.touches()
    assert touched.lines == [0, 1] * (len(touched.lines) // 2)
    assert touched.read[1] is False
    assert touched.written[1] is True


def test_caches_count_as_the_policies_do() -> None:
    shape = Attention(tokens=48, head_size=16)
    touched = traced(shape, make_plan(shape, 512, "q-outer"))
    lines = touched.lines
    for cache_lines in (8, 32, 100):
        assert cache_traffic(touched, cache_lines, "lru").misses == count_faults(Lru(cache_lines), lines)
        assert cache_traffic(touched, cache_lines, "belady").misses == least_faults(lines, cache_lines)
    whole = cache_traffic(touched, 10_000, "lru")
    assert whole.misses == len(set(lines))
    assert whole.fetched == 3 * 48  # q, k and v, a line a row
    assert whole.written == len({line for line, dirty in zip(lines, touched.written, strict=True) if dirty})
    with pytest.raises(InputError, match="no cache policy"):
        cache_traffic(touched, 8, "plru")


def test_dirty_lines_are_written_back_once_they_leave() -> None:
    touched = Touches(
        lines=[0, 1, 2, 0, 1, 2],
        read=[False, True, True, True, True, True],
        written=[True, False, False, False, False, True],
    )
    found = cache_traffic(touched, 2, "lru")
    assert found == Traffic(misses=6, fetched=5, written=2)
    assert found.words == 7 * LINE_WORDS


def test_tiles_for_a_cache_keep_its_traffic_low() -> None:
    shape = Attention(tokens=128, head_size=32)
    words = 1024
    found = {
        name: cache_traffic(traced(shape, plan), words // LINE_WORDS, "belady").words
        for name, plan in (("chosen", choose(shape, words)), ("rows alone", make_plan(shape, 131, "q-outer")))
    }
    assert found["chosen"] < found["rows alone"]


def test_traced_schedules_compute_attention() -> None:
    shape = Attention(tokens=20, head_size=16, causal=True)
    draw = np.random.default_rng(1)
    q, k, v = (draw.standard_normal((1, 1, 20, 16), np.float32) for _ in range(3))
    made: list[np.ndarray] = []

    def kept(memory: Memory, problem: object) -> None:
        from memwall.simulate.attention_schedules import Problem, schedule_of

        assert isinstance(problem, Problem)
        schedule_of(choose(shape, 200))(memory, problem)
        made.append(problem.out)

    trace(shape, q, k, v, kept)
    assert np.abs(made[0] - reference(shape, q, k, v)[0, 0]).max() < 1e-5
