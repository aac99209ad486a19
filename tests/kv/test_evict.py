"""Votes, pooling and selection against slow references; the wrapper with a scorer whose choice is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.errors import InputError
from memwall.kernels import attention_reference
from memwall.kernels.attention import attend_float
from memwall.kv import evict
from memwall.memory import Arena, Ledger

HEADS, KV_HEADS, DIM = 4, 2, 16
SHAPE = kv.CacheShape(num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)


def numbers(seed: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((num_tokens, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(x.astype(np.float16).astype(np.float32) for x in (q, k, v))


def dense_votes(q: np.ndarray, k: np.ndarray, num_queries: int) -> np.ndarray:
    """The paper's steps, word for word: a masked matrix, softmax over all columns, sums over rows and groups."""
    rep, length = HEADS // KV_HEADS, len(k)
    votes = np.zeros((KV_HEADS, length))
    for head in range(HEADS):
        logits = q[-num_queries:, head].astype(np.float64) @ k[:, head // rep].T.astype(np.float64) / DIM**0.5
        for row in range(num_queries):
            logits[row, length - num_queries + row + 1 :] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        votes[head // rep] += (weights / weights.sum(1, keepdims=True)).sum(0)
    return votes


@pytest.mark.parametrize(("num_tokens", "num_queries"), [(40, 40), (300, 32), (700, 5), (256, 1), (520, 300)])
def test_votes_are_those_of_the_dense_softmax(num_tokens: int, num_queries: int) -> None:
    q, k, v = numbers(0, num_tokens)
    stats, out = np.empty((num_tokens, HEADS, 2), np.float32), np.empty_like(q)
    attend_float(q, k, v, scale=DIM**-0.5, first_position=0, out=out, stats=stats)
    last = slice(num_tokens - num_queries, None)
    want = dense_votes(q, k, num_queries)
    found = evict.attention_votes(k, q[last], stats[last], DIM**-0.5)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-6)
    assert found.sum() == pytest.approx(num_queries * HEADS, rel=1e-4)
    past = num_tokens - num_queries
    some = evict.attention_votes(k.astype(np.float16), q[last], stats[last], DIM**-0.5, past)
    np.testing.assert_allclose(some, want[:, :past], rtol=2e-5, atol=1e-6)


def test_a_query_that_never_attended_has_no_vote() -> None:
    q, k, _ = numbers(0, 20)
    assert not evict.attention_votes(k, q[-4:], np.zeros((4, HEADS, 2), np.float32), 1.0).any()


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_pooling_is_torchs(kernel: int) -> None:
    votes = np.random.default_rng(0).random((3, 23)).astype(np.float32)
    there = torch.from_numpy(votes)[None]
    options = {"kernel_size": kernel, "stride": 1, "padding": kernel // 2}
    for kind, pool in (("avg", torch.nn.functional.avg_pool1d), ("max", torch.nn.functional.max_pool1d)):
        np.testing.assert_allclose(evict.pooled(votes, kernel, kind), pool(there, **options)[0].numpy(), rtol=1e-6)


def test_top_rows_in_order() -> None:
    scores = np.array([[3, 9, 1, 7, 8], [np.inf, 0, 5, np.inf, 2]], np.float32)
    np.testing.assert_array_equal(evict.top_rows(scores, 3), [[1, 3, 4], [0, 2, 3]])
    np.testing.assert_array_equal(evict.top_rows(scores, 5), [[0, 1, 2, 3, 4]] * 2)


class Fixed:
    """Keeps the tokens it was told to, other ones in each layer and head."""

    def __init__(self, places: np.ndarray) -> None:
        self.places = places

    def window(self, num_tokens: int) -> int:
        return min(8, num_tokens)

    def __call__(
        self, layer: int, keys: np.ndarray, queries: np.ndarray, stats: np.ndarray, scale: float
    ) -> np.ndarray:
        scores = np.zeros((KV_HEADS, len(keys)), np.float32)
        for head, own in enumerate(self.places[layer]):
            scores[head, own] = 1
        return scores


class FixedCache(evict.EvictingCache):
    @property
    def policy(self) -> str:
        return "fixed"


def fixed(places: np.ndarray, ledger: Ledger | None = None, inner: str = "float16") -> FixedCache:
    policy = kv.Policy("fixed", inner=kv.parse(inner))
    count = places.shape[2]
    return FixedCache(
        policy, SHAPE, Arena(1 << 24, ledger or Ledger()), 200, scorer=Fixed(places), budget=lambda n: min(count, n)
    )


def run(cache: kv.KVCache, rows: tuple[np.ndarray, ...], begin: int, end: int) -> list[np.ndarray]:
    q, k, v = (x[begin:end] for x in rows)
    outs = []
    for layer in range(2):
        positions, out = np.arange(begin, end), np.empty_like(q)
        cache.append(layer, k, v, positions)
        cache.attend(layer, q, positions, out)
        cache.settle(layer)
        outs.append(out)
    return outs


def places_of(seed: int, num_tokens: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack(
        [[np.sort(rng.choice(num_tokens, count, replace=False)) for _ in range(KV_HEADS)] for _ in range(2)]
    )


@pytest.mark.parametrize("segments", [[90], [50, 40], [30, 30, 30]])
def test_later_tokens_attend_to_each_heads_own_rows(segments: list[int]) -> None:
    """However the prompt came: with the dropped tokens masked, a dense reference says the same."""
    rows, places, ledger = numbers(1, 130), places_of(2, 90, 20), Ledger()
    cache = fixed(places, ledger)
    cache._expected = 90 if len(segments) > 1 else 0
    begin = 0
    for size in segments:
        run(cache, rows, begin, begin + size)
        begin += size
    assert cache.length == 90
    assert cache.inner.length == 20
    assert {row.owner for row in ledger.rows()} == {"kv/full"}
    q, k, v = rows
    for first, last in [(90, 91), (91, 110), (110, 111)]:
        outs = run(cache, rows, first, last)
        for layer, head in np.ndindex(2, HEADS):
            own = [*places[layer][head // 2], *range(90, last)]
            picked = [torch.from_numpy(x[own, head // 2][:, None]) for x in (k, v)]
            place = len(own) - (last - first)
            want, _ = attention_reference.attend(
                torch.from_numpy(q[first:last, head : head + 1]), *picked, scale=DIM**-0.5, first_position=place
            )
            np.testing.assert_allclose(outs[layer][:, head], want[:, 0].numpy(), atol=2e-5)


def test_a_prompt_in_segments_is_announced() -> None:
    cache = fixed(places_of(0, 90, 20))
    assert cache.begin_prompt(90, 43) == [43, 39, 8]  # the last brings all the queries that are looked at
    rows = numbers(3, 100)
    run(cache, rows, 0, 43)
    assert (cache.length, cache.inner.length, cache.rewindable(40)) == (43, 0, 40)
    other = cache.fork()
    run(cache, rows, 43, 82)
    run(cache, rows, 82, 90)
    run(other, rows, 43, 90)
    for mine, theirs in zip(run(cache, rows, 90, 100), run(other, rows, 90, 100)):
        np.testing.assert_array_equal(mine, theirs)
    assert cache.begin_prompt(90, 43) == [43, 43, 4]  # a later prompt is not pruned
    with pytest.raises(InputError, match="looks at the last 8"):
        fixed(places_of(0, 90, 20)).begin_prompt(90, 7)


def test_a_failed_pass_is_undone() -> None:
    rows, ledger = numbers(4, 120), Ledger()
    for segments in ([90], [60, 30]):
        cache = fixed(places_of(0, 90, 20), ledger)
        cache.begin_prompt(90, segments[0])
        if len(segments) > 1:
            run(cache, rows, 0, 60)
        start, end = cache.length, 90
        cache.append(0, rows[1][start:end], rows[2][start:end], np.arange(start, end))
        cache.attend(0, rows[0][start:end], np.arange(start, end), np.empty_like(rows[0][start:end]))
        cache.settle(0)
        cache.append(1, rows[1][start:end], rows[2][start:end], np.arange(start, end))
        cache.truncate(start)
        assert (cache.length, cache.inner.length) == (start, 0)
        cache.begin_prompt(90 - start, 90)
        again = fixed(places_of(0, 90, 20))
        if len(segments) > 1:
            again.begin_prompt(90, 60)
            run(again, rows, 0, 60)
        for mine, theirs in zip(run(cache, rows, start, 90), run(again, rows, start, 90)):
            np.testing.assert_array_equal(mine, theirs)
        for mine, theirs in zip(run(cache, rows, 90, 91), run(again, rows, 90, 91)):
            np.testing.assert_array_equal(mine, theirs)
        cache.release()
        assert ledger.total() == 0


def test_sliding_windows_shorter_than_the_context_are_refused() -> None:
    shape = kv.CacheShape(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, windows=(None, 64))
    with pytest.raises(InputError, match="at most 64"):
        kv.build("snapkv(0.5)", shape, Arena(1 << 20, Ledger()), 65)
    with pytest.raises(InputError, match="at most 64"):
        kv.predict("snapkv(0.5)", shape, 65, 65)
    assert kv.build("snapkv(0.5)", shape, Arena(1 << 20, Ledger()), 64).shape.windows is None
