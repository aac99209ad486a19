"""The block driver against a slow reference that keeps lists of tokens per head; budgets, bytes, turns and refusals."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.errors import BudgetExceeded
from memwall.kernels import attention_reference, rope
from memwall.kv.blocks import (
    BlockCache,
    BudgetAllocator,
    HeadAdaptive,
    Scorer,
    Uniform,
    Units,
    best,
    sensitive_budgets,
)
from memwall.kv.ragged import block_bytes
from memwall.memory import Arena, Ledger
from memwall.models.config import RopeConfig
from memwall.models.rope import RotaryTable

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 16, 2
SHAPE = kv.CacheShape(num_layers=LAYERS, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)
YARN = RopeConfig(type="yarn", theta=10_000.0, factor=4.0, original_max_position=64, attention_factor=1.14)


class Marked(Scorer):
    """Scores lie in the first number of each value, final."""

    is_final = True

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> np.ndarray:
        return v[:, :, 0].copy()


class KeySum(Scorer):
    """Scored anew each time: the sum of a key; keeps the highest it ever had."""

    def score(self, layer: int, units: Units) -> list[np.ndarray]:
        found = []
        for head, past in enumerate(units.past_scores):
            sums = units.keys(head).sum(axis=1)
            sums[: len(past)] = np.maximum(sums[: len(past)], past)
            found.append(sums)
        return found


class Bare(BlockCache):
    policy = "bare"

    def fork(self) -> BlockCache:
        settings = {name: getattr(self, name) for name in ("scorer", "allocator", "chunk", "stable", "local", "turns")}
        other = Bare(SHAPE, self.arena, self.capacity_tokens, **settings)
        self.copy_to(other)
        return other


def cache_of(
    scorer: Scorer, allocator: BudgetAllocator, ledger: Ledger | None = None, **settings: object
) -> BlockCache:
    arena = Arena(1 << 24, ledger or Ledger())
    return Bare(SHAPE, arena, 400, scorer=scorer, allocator=allocator, **settings)  # type: ignore[arg-type]


def numbers(seed: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((num_tokens, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(x.astype(np.float16).astype(np.float32) for x in (q, k, v))  # type: ignore[return-value]


def step(cache: kv.KVCache, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    positions, out = np.arange(cache.length, cache.length + len(k)), np.empty_like(q)
    half = max(len(k) // 2, 1)  # in two blocks, as the decoder hands queries on
    for layer in range(LAYERS):
        cache.append(layer, k, v, positions)
        for rows in (slice(0, half), slice(half, len(k))):
            if rows.start < rows.stop:
                cache.attend(layer, q[rows], positions[rows], out[rows])
        cache.settle(layer)
    return out


class Slow:
    """Per head a list of (score, key, value); nothing else."""

    def __init__(self, budget: int, stable: int, *, adaptive: bool) -> None:
        self.budget, self.stable, self.adaptive = budget, stable, adaptive
        self.heads: list[list[tuple[float, np.ndarray, np.ndarray]]] = [[] for _ in range(KV_HEADS)]

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        outs = []
        for head, units in enumerate(self.heads):
            units += [(float(v[t, head, 0]), k[t, head], v[t, head]) for t in range(len(k))]
            keys, values = (torch.from_numpy(np.stack([unit[i] for unit in units])[:, None]) for i in (1, 2))
            mine = torch.from_numpy(q[:, head * 2 : head * 2 + 2])
            first = len(units) - len(k)
            outs.append(attention_reference.attend(mine, keys, values, scale=DIM**-0.5, first_position=first)[0])
        return torch.cat(outs, dim=1).numpy()

    def evict(self, stabilize: bool = True) -> None:
        ranked = []
        for head, units in enumerate(self.heads):
            safe = len(units) - (self.stable if stabilize else 0)
            ranked.append([(unit[0] if at < safe else np.inf, head, at) for at, unit in enumerate(units)])
        if self.adaptive:
            most = sorted(chain(*ranked), key=lambda each: -each[0])[: self.budget * KV_HEADS]
        else:
            most = list(chain(*(sorted(each, key=lambda one: -one[0])[: self.budget] for each in ranked)))
        for head, units in enumerate(self.heads):
            kept = sorted(at for _, own, at in most if own == head)
            self.heads[head] = [units[at] for at in kept]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("stable", [0, 5])
def test_a_stream_against_lists(adaptive: bool, stable: int) -> None:
    allocator = (HeadAdaptive if adaptive else Uniform)([20] * LAYERS)
    cache, slow = cache_of(Marked(), allocator, chunk=16, stable=stable), Slow(20, stable, adaptive=adaptive)
    waiting = 0
    for seed, count in enumerate([1, 3, 20, 1, 14, 2, 33, 1, 1, 1, 16]):
        q, k, v = numbers(seed, count)
        np.testing.assert_allclose(step(cache, q, k, v), slow.step(q, k, v), atol=2e-3)
        waiting += count
        if waiting >= 16:
            slow.evict()
            waiting = 0
        assert cache.kept_lengths[1] == [len(units) - waiting for units in slow.heads]
    assert cache.length == 93


def test_a_prompt_comes_in_chunks_and_keeps_its_end() -> None:
    cache = cache_of(Marked(), Uniform([20] * LAYERS), chunk=16, stable=6, local=7)
    slow = Slow(20, 6, adaptive=False)
    sizes = cache.begin_prompt(60, 10)
    assert sizes == [10, 6, 10, 6, 10, 6, 5, 7]
    q, k, v = numbers(0, 60)
    done = 0
    for size, folds, goes_on in zip(sizes, [0, 1, 0, 1, 0, 1, 1, 0], [1] * 6 + [0, 1]):
        part = slice(done, done + size)
        np.testing.assert_allclose(
            step(cache, q[part], k[part], v[part]), slow.step(q[part], k[part], v[part]), atol=2e-3
        )
        if folds:
            slow.evict(bool(goes_on))
        done += size
    assert cache.kept_lengths == [[20, 20]] * LAYERS
    assert (cache.length, cache._layers[0].num_tail) == (60, 7)
    assert cache.begin_prompt(3, 10) == [3]
    assert cache.begin_prompt(12, 10) == [5, 7]  # 7 wait: with 5 more the end stays apart again
    assert cache.begin_prompt(16, 10) == [9, 7]
    assert cache.begin_prompt(40, 100) == [9, 16, 8, 7]


def test_an_old_stabilizer_with_a_low_score_goes() -> None:
    """Scores kept are the true ones: what was safe once can be dropped the next time."""
    cache = cache_of(Marked(), Uniform([8] * LAYERS), chunk=8, stable=4)
    q, k, v = numbers(0, 32)
    v[:, :, 0] = 100 - np.arange(32)[:, None]  # older is better
    cache.begin_prompt(32, 8)
    kept = []
    for begin in range(0, 32, 8):
        part = slice(begin, begin + 8)
        step(cache, q[part], k[part], v[part])
        past = cache._layers[0].past
        kept.append((100 - past.rows(16)[1][:8, 0].astype(int)).tolist())
    assert kept[1] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert kept[2] == [0, 1, 2, 3, 20, 21, 22, 23]
    assert kept[3] == [0, 1, 2, 3, 20, 21, 22, 23]  # the last chunk, 24 .. 31: none is safe, all are worse


def test_scores_made_anew() -> None:
    cache = cache_of(KeySum(), HeadAdaptive([6] * LAYERS), chunk=10)
    seen = []
    for seed in range(4):
        q, k, v = numbers(seed, 10)
        step(cache, q, k, v)
        seen.append(k.sum(axis=2))
        assert cache._layers[1].past.num_rows == 12
    everything = np.sort(np.concatenate(seen).ravel())[-12:]
    np.testing.assert_allclose(np.sort(cache._layers[1].past.scores(12)), everything, rtol=1e-2)


@pytest.mark.parametrize("chunk", [64, 48])
def test_all_that_fits_is_kept_exactly(chunk: int) -> None:
    cache, plain = (
        cache_of(Marked(), Uniform([200] * LAYERS), chunk=chunk, stable=10, local=5),
        kv.build("float16", SHAPE, Arena(1 << 24, Ledger()), 400),
    )
    q, k, v = numbers(3, 150)
    begin = 0
    for size in [*cache.begin_prompt(140, 64), *[1] * 10]:
        part = slice(begin, begin + size)
        np.testing.assert_allclose(
            step(cache, q[part], k[part], v[part]), step(plain, q[part], k[part], v[part]), atol=1e-3
        )
        begin += size
    for length in (145, 120, 30, 0):
        assert cache.rewindable(length) == length
        for each in (cache, plain):
            each.truncate(length)
        np.testing.assert_allclose(step(cache, q[:1], k[:1], v[:1]), step(plain, q[:1], k[:1], v[:1]), atol=1e-3)
        for each in (cache, plain):
            each.truncate(length)


@pytest.mark.parametrize("rope_config", [RopeConfig(type="default", theta=10_000.0), YARN], ids=["plain", "yarn"])
def test_keys_turn_to_their_packed_places(rope_config: RopeConfig) -> None:
    """After evictions the keys are those of the kept tokens alone, at positions 0 .. n - 1."""
    table = RotaryTable(rope_config, DIM)
    cache = cache_of(Marked(), Uniform([12] * LAYERS), chunk=10, turns=table)
    q, k, v = numbers(0, 80)
    for begin in range(0, 80, 10):
        assert cache.next_position == min(begin, 12)
        turned, places = k[begin : begin + 10].copy(), np.arange(cache.next_position, cache.next_position + 10)
        rope(turned, *table.at(places))
        step(cache, q[begin : begin + 10], turned, v[begin : begin + 10])
    past = cache._layers[0].past
    for head in range(KV_HEADS):
        best_ones = np.sort(np.argsort(-v[:, head, 0], kind="stable")[:12])
        kept_k, kept_v = (rows[head * 12 : head * 12 + 12].astype(np.float32) for rows in past.rows(24))
        np.testing.assert_array_equal(kept_v, v[best_ones, head])
        want = k[best_ones, head : head + 1].copy()
        rope(want, *table.at(np.arange(12)))
        np.testing.assert_allclose(kept_k, want[:, 0], atol=6e-3)


def test_bytes_are_those_of_the_lengths() -> None:
    ledger = Ledger()
    cache = cache_of(Marked(), HeadAdaptive([50] * LAYERS), ledger, chunk=100)
    q, k, v = numbers(0, 103)
    v[:60, 0, 0] = 9  # one head wins
    step(cache, q[:100], k[:100], v[:100])
    step(cache, q[100:], k[100:], v[100:])
    lengths = cache.kept_lengths[0]
    assert sum(lengths) == 100
    assert lengths[0] >= 60
    want = block_bytes(SHAPE, np.dtype(np.float16), 50, 3, staged=False, has_scores=True)
    assert {row.owner: row.nbytes for row in ledger.rows()} == {owner: n for owner, n in want.items() if n}
    assert cache.nbytes == ledger.total()
    cache.release()
    assert ledger.total() == 0


def test_dropped_tokens_cannot_come_back() -> None:
    cache = cache_of(Marked(), Uniform([10] * LAYERS), chunk=16)
    q, k, v = numbers(0, 40)
    step(cache, q[:32], k[:32], v[:32])
    step(cache, q[32:], k[32:], v[32:])
    assert [cache.rewindable(n) for n in (40, 35, 32, 31, 0)] == [40, 35, 32, 0, 0]
    cache.truncate(35)
    assert cache.length == 35
    with pytest.raises(ValueError, match="dropped"):
        cache.truncate(31)
    cache.truncate(0)
    assert (cache.length, cache.next_position) == (0, 0)
    alone = cache_of(Marked(), Uniform([10] * LAYERS), chunk=16)
    np.testing.assert_array_equal(step(cache, q[:20], k[:20], v[:20]), step(alone, q[:20], k[:20], v[:20]))


@pytest.mark.parametrize("taken", [20, 33])
def test_a_refusal_leaves_the_cache_as_it_was(taken: int) -> None:
    ledger = Ledger()
    cache, alone = (cache_of(Marked(), Uniform([20] * LAYERS), each, chunk=16, stable=3) for each in (ledger, Ledger()))
    q, k, v = numbers(0, 400)
    for each in (cache, alone):
        step(each, q[:taken], k[:taken], v[:taken])
    cache.arena.set_cap(ledger.total())
    more = slice(taken, 390)
    with pytest.raises(BudgetExceeded, match="kv/"):
        step(cache, q[more], k[more], v[more])
    cache.truncate(taken)
    assert ledger.total() == cache.nbytes == cache.arena.cap_bytes
    with pytest.raises(BudgetExceeded):
        cache.fork()
    cache.arena.set_cap(1 << 24)
    other = cache.fork()
    for each in (cache, other):
        each.begin_prompt(60, 20)
    alone.begin_prompt(60, 20)
    for size in (16, 16, 16, 12):
        part = slice(alone.length, alone.length + size)
        want = step(alone, q[part], k[part], v[part])
        np.testing.assert_array_equal(step(cache, q[part], k[part], v[part]), want)
        np.testing.assert_array_equal(step(other, q[part], k[part], v[part]), want)


def test_the_best_of_equal_ones_are_the_newest() -> None:
    assert best(np.array([1.0, 3, 1, 1, 2]), 3).tolist() == [1, 3, 4]
    assert best(np.array([1.0, 2]), 3).tolist() == [0, 1]
    chosen = HeadAdaptive([2]).choose(0, [np.array([5.0, 1, 4]), np.array([0.0, 3])])
    assert [each.tolist() for each in chosen] == [[0, 1, 2], [1]]
    assert HeadAdaptive([2]).num_kept(0, [3, 2]) == 4
    assert Uniform([2]).num_kept(0, [3, 1]) == 3


def test_sensitive_layers_get_more_and_the_sum_stays() -> None:
    """By hand: similarities 0.9, 0.5, 0.7 scale to 1, 0, 0.5; weights 0, 1, 0.5; 300 units; the floor is 25."""
    budgets = sensitive_budgets(np.array([0.9, 0.5, 0.7]), 100, 1.0)
    assert budgets.tolist() == [25, 183, 92]
    assert sensitive_budgets(np.full(4, 0.3), 64, 1.1).tolist() == [64] * 4
    many = sensitive_budgets(np.random.default_rng(0).random(32), 77, 1.3)
    assert many.sum() == 77 * 32
    assert many.min() >= 19
