"""The parts of Locret's evidence that its verdicts hang on: the other scores, the ranking figures, the prompts."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall import kv
from memwall.cli.evidence import load_experiment
from memwall.kv.blocks import Uniform
from memwall.memory import Arena, Ledger
from memwall.systems import find_system

SHAPE = kv.CacheShape(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def locret() -> ModuleType:
    return load_experiment(find_system("locret"))


def kept_after(module: ModuleType, scorer: object, q: np.ndarray, k: np.ndarray) -> list[list[int]]:
    """Places that each head keeps of tokens read in chunks of 8, at 6 units."""
    cache = module.Study(SHAPE, Arena(1 << 24, Ledger()), 100, scorer=scorer, allocator=Uniform([6]), chunk=8, stable=0)
    v = np.broadcast_to(np.arange(len(k), dtype=np.float32)[:, None, None], k.shape).copy()
    begin = 0
    for size in cache.begin_prompt(len(k), 8):
        part, out = slice(begin, begin + size), np.empty_like(q[begin : begin + size])
        cache.append(0, k[part], v[part], np.arange(begin, begin + size))
        cache.attend(0, q[part], np.arange(begin, begin + size), out)
        cache.settle(0)
        begin += size
    values = cache._layers[0].past.rows(12)[1]
    return [values[:6, 0].astype(int).tolist(), values[6:, 0].astype(int).tolist()]


def test_ranks(locret: ModuleType) -> None:
    x = np.array([3.0, 1, 2, 5, 4, 9, 8, 7, 6, 0])
    assert locret.spearman(x, x**3) == pytest.approx(1)
    assert locret.spearman(x, -x) == pytest.approx(-1)
    assert locret.overlap(x, x) == 1
    assert locret.overlap(x, -x, 0.2) == 0


def test_recency_keeps_sinks_and_the_newest(locret: ModuleType) -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((24, heads, 8)).astype(np.float32) for heads in (4, 2))
    assert kept_after(locret, locret.Newest(), q, k) == [[0, 1, 2, 3, 22, 23]] * 2


def test_accumulated_attention_is_the_sum_over_all_queries_that_saw_a_unit(locret: ModuleType) -> None:
    """Against dense attention with the dropped units taken out, chunk by chunk."""
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((24, heads, 8)).astype(np.float16).astype(np.float32) for heads in (4, 2))
    want = []
    for head in range(2):
        held: list[int] = []
        totals = np.zeros(24)
        for begin in range(0, 24, 8):
            for row in range(begin, begin + 8):
                seen = [*held, *range(begin, row + 1)]
                for own in (2 * head, 2 * head + 1):
                    logits = k[seen, head] @ q[row, own] * 8**-0.5
                    weights = np.exp(logits - logits.max())
                    totals[seen] += weights / weights.sum()
            offered = np.array([*held, *range(begin, begin + 8)])
            held = sorted(offered[np.argsort(-totals[offered])[:6]].tolist())
        want.append(held)
    assert kept_after(locret, locret.AccumulatedAttention(SHAPE), q, k) == want


def test_window_attention_looks_at_the_last_queries(locret: ModuleType) -> None:
    """Keys that the last queries look at stay, whatever came before."""
    q, k = np.zeros((16, 4, 8), np.float32), np.zeros((16, 2, 8), np.float32)
    k[3, 0, 0] = k[5, 1, 0] = 30
    q[:, :, 0] = 3
    kept = kept_after(locret, locret.WindowAttention(SHAPE), q, k)
    assert 3 in kept[0]
    assert 5 in kept[1]


def test_a_question_stays_whole(locret: ModuleType) -> None:
    """However long it and its answer are; and it goes again without a trace."""
    cache = locret.Study(
        SHAPE, Arena(1 << 24, Ledger()), 100, scorer=locret.Newest(), allocator=Uniform([6]), chunk=8, stable=0
    )
    rng = np.random.default_rng(0)

    def read(count: int) -> None:
        begin = cache.length
        for size in cache.begin_prompt(count, 8):
            q, k = (rng.standard_normal((size, heads, 8), np.float32) for heads in (4, 2))
            cache.append(0, k, k, np.arange(begin, begin + size))
            cache.attend(0, q, np.arange(begin, begin + size), np.empty_like(q))
            cache.settle(0)
            begin += size

    read(24)
    assert cache.kept_lengths == [[6, 6]]
    cache.is_asking = True
    read(20)
    read(1)
    assert cache.kept_lengths == [[6, 6]]
    assert cache.length == 45
    assert cache._layers[0].num_tail == 21
    cache.truncate(24)
    assert cache.length == 24
    assert cache.next_position == 24


def test_more_is_more_by_two_standard_errors(locret: ModuleType) -> None:
    worse = np.zeros(16)
    better = np.tile([0.0, 0.5], 8)
    difference, error = locret.surplus(better, worse)
    assert difference == 0.25
    assert error == pytest.approx(0.25 * (16 / 15) ** 0.5 / 4)
    assert locret.is_more(better, worse)
    assert not locret.is_more(worse, better)
    assert not locret.is_more(np.array([0.25, *worse[1:]]), worse)
