"""The storage process and what it answers: against plain attention, against SparF in ten lines, and when it dies."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import kv
from memwall.kernels.attention import attend_float
from memwall.kv.instinfer import InstInferCache
from memwall.kv.storage_settings import FLASH, LINK, PROCESS, settings_of
from memwall.memory import Arena, Ledger

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 32, 2
SHAPE = kv.CacheShape(num_layers=LAYERS, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)


def cache_of(policy: str, shape: kv.CacheShape = SHAPE, capacity: int = 1024) -> InstInferCache:
    cache = kv.build(policy, shape, Arena(1 << 28, Ledger()), capacity)
    assert isinstance(cache, InstInferCache)
    return cache


class Feeder:
    """The same random rows to a cache and to plain arrays; worst difference between outputs."""

    def __init__(self, cache: kv.KVCache, seed: int = 0) -> None:
        self.cache, self.shape = cache, cache.shape
        self.rng = np.random.default_rng(seed)
        self.rows: list[list[list[np.ndarray]]] = [[[], []] for _ in range(self.shape.num_layers)]

    def draw(self, count: int, heads: int) -> np.ndarray:
        return self.rng.standard_normal((count, heads, self.shape.head_dim)).astype(np.float32)

    def step(self, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(outputs, queries) by layer."""
        first = self.cache.length
        positions = np.arange(first, first + count)
        outs, queries = [], []
        for layer in range(self.shape.num_layers):
            q = self.draw(count, self.shape.num_heads)
            k, v = (self.draw(count, self.shape.num_kv_heads).astype(np.float16).astype(np.float32) for _ in range(2))
            for held, new in zip(self.rows[layer], (k, v)):
                held.append(new)
            out = np.empty_like(q)
            self.cache.append(layer, k, v, positions)
            self.cache.attend(layer, q, positions, out)
            self.cache.settle(layer)
            outs.append(out)
            queries.append(q)
        return outs, queries

    def held(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = (np.concatenate(part) for part in self.rows[layer])
        return keys, values

    def cut(self, length: int) -> None:
        self.cache.truncate(length)
        for layer in self.rows:
            for which, part in enumerate(layer):
                layer[which] = [np.concatenate(part)[:length]]

    def plain(self, layer: int, q: np.ndarray) -> np.ndarray:
        keys, values = self.held(layer)
        out = np.empty_like(q)
        first, window = len(keys) - len(q), self.shape.window(layer)
        attend_float(q, keys, values, scale=self.shape.logit_scale, first_position=first, window=window, out=out)
        return out

    def error(self, count: int) -> float:
        outs, queries = self.step(count)
        return max(float(np.abs(out - self.plain(layer, q)).max()) for layer, (out, q) in enumerate(zip(outs, queries)))


def sparf(q: np.ndarray, keys: np.ndarray, values: np.ndarray, r: int, k: int) -> np.ndarray:
    """The six steps of the paper for one head: q [rep, D], keys and values [S, D]."""
    i = np.argsort(-np.abs(q).sum(axis=0), kind="stable")[:r]
    share = np.abs(q[:, i]).sum(axis=1) / np.abs(q).sum(axis=1)
    logits = q[:, i] @ keys[:, i].T / np.sqrt(q.shape[1] * share)[:, None]
    guess = np.exp(logits - logits.max(axis=1, keepdims=True))
    guess /= guess.sum(axis=1, keepdims=True)
    j = np.argsort(-guess.sum(axis=0), kind="stable")[:k]
    alpha = guess[:, j].sum(axis=1, keepdims=True)
    exact = q @ keys[j].T / np.sqrt(q.shape[1])
    weights = np.exp(exact - exact.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return alpha * (weights @ values[j]) + (1 - alpha) * values.mean(axis=0)


def test_dense_equals_plain_attention_after_every_token() -> None:
    """Waiting rows, half-filled groups, the turn from memory to pages: none may be left out."""
    feeder = Feeder(cache_of("instinfer(1)"))
    assert max(feeder.error(1) for _ in range(40)) < 2e-3
    feeder.cache.release()


@pytest.mark.parametrize("policy", ["instinfer(1)", "instinfer(1,drives=2)", "instinfer(1,r=32,k=1024,chunk_kib=8)"])
def test_prompts_segments_and_tokens(policy: str) -> None:
    feeder = Feeder(cache_of(policy))
    assert max(feeder.error(count) for count in (150, 1, 129, 1, 1, 40, 300, 1)) < 2e-3
    feeder.cache.release()


def test_wide_heads_fill_the_pages_of_the_paper() -> None:
    shape = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=128)
    layout = settings_of(kv.resolve("instinfer"), shape, 2048).layout
    assert (layout.page_bytes, layout.group, layout.span, layout.channel_pages) == (4096, 16, 512, 32)
    feeder = Feeder(cache_of("instinfer(1)", shape, 2048))
    assert max(feeder.error(count) for count in (1100, 1, 1)) < 2e-3
    report = feeder.cache.report()["drives"][0]
    assert report["pages_written"] == 2 * (1102 // 16 * 2 + 1102 // 512 * 32)
    assert report["token_pages_read"] == 2 * 2 * 2 * (1101 // 16)  # steps, heads, keys and values
    assert report["channel_pages_read"] == 0
    feeder.cache.release()


def test_sliding_windows_read_what_they_see() -> None:
    shape = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, windows=(40, None))
    feeder = Feeder(cache_of("instinfer(1)", shape))
    assert max(feeder.error(count) for count in (200, 1, 30, 1)) < 2e-3
    before = feeder.cache.report()["drives"][0]["token_pages_read"]
    feeder.error(1)
    read = feeder.cache.report()["drives"][0]["token_pages_read"] - before
    assert read == 2 * 2 * ((232 // 16) + (232 // 16 - 193 // 16))
    feeder.cache.release()


@pytest.mark.parametrize(("heads", "r", "k"), [(2, 8, 20), (4, 5, 33), (4, 32, 7), (2, 1, 1)])
def test_chosen_tokens_are_those_of_the_six_steps(heads: int, r: int, k: int) -> None:
    shape = kv.CacheShape(num_layers=1, num_heads=heads, num_kv_heads=2, head_dim=32)
    cache = cache_of(f"instinfer(0.5,r={r},k={k},chunk_kib=16)", shape)
    feeder = Feeder(cache)
    feeder.step(300)
    for _ in range(20):
        outs, queries = feeder.step(1)
        keys, values = feeder.held(0)
        q = queries[0][0].astype(np.float16).astype(np.float32).reshape(2, -1, 32)
        wanted = np.concatenate([sparf(q[h], keys[:, h], values[:, h], r, k) for h in range(2)])
        np.testing.assert_allclose(outs[0][0], wanted, atol=3e-3)
    drive = cache.report()["drives"][0]
    assert 0 < drive["channel_pages_read"] <= 20 * 2 * 2 * min(r, 8)  # tokens, heads, spans
    assert drive["token_pages_read"] <= 20 * 2 * 2 * min(k, 20)
    cache.release()


def test_without_the_mean_the_rest_is_left_out() -> None:
    shape = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32)
    with_it, without = (cache_of(f"instinfer(0.5,r=32,k=4,mean={mean})", shape) for mean in (1, 0))
    one, other = Feeder(with_it), Feeder(without)
    for feeder in (one, other):
        feeder.step(100)
    (mean,), _ = one.step(1)
    (plain,), (q,) = other.step(1)
    keys, values = other.held(0)
    for head in range(2):
        logits = keys[:, head] @ q[0, head] / np.sqrt(32)
        best = np.argsort(-logits)[:4]
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(plain[0, head], weights[best] @ values[best, head] / weights[best].sum(), atol=3e-3)
        alpha = weights[best].sum() / weights.sum()
        expected = alpha * plain[0, head] + (1 - alpha) * values[:, head].mean(axis=0)
        np.testing.assert_allclose(mean[0, head], expected, atol=3e-3)
    with_it.release()
    without.release()


def test_partial_results_merge() -> None:
    """The stats of a sparse answer say how much all of its tokens weigh, not only the chosen ones."""
    cache = cache_of("instinfer(0.5,r=32,k=8)")
    feeder = Feeder(cache)
    feeder.step(120)
    q, positions = feeder.draw(1, HEADS), np.array([119])
    out, stats = np.empty_like(q), np.empty((1, HEADS, 2), np.float32)
    cache.attend(0, q, positions, out, stats)
    keys, _ = feeder.held(0)
    for head in range(HEADS):
        logits = keys[:, head // 2] @ q[0, head] / np.sqrt(DIM)
        total = np.log(stats[0, head, 1]) + stats[0, head, 0]
        assert total == pytest.approx(np.log(np.exp(logits).sum()), abs=0.02)
    cache.release()


@pytest.mark.parametrize("length", [600, 512, 500, 130, 128, 127, 16, 7, 0])
def test_going_back_and_on(length: int) -> None:
    """Rows of pages that are no longer whole come back; what follows is as if the rest had never been."""
    feeder = Feeder(cache_of("instinfer(1,r=32,k=1024,block_kib=32)"))
    feeder.step(590)
    for _ in range(11):
        feeder.step(1)
    feeder.cut(length)
    assert feeder.cache.length == length
    assert max(feeder.error(count) for count in (1, 1, 30, 1, 140, 1)) < 2e-3
    ledger = feeder.cache.arena.ledger
    assert ledger.owned(FLASH) >= feeder.cache.settings.layout.flash_bytes(feeder.cache.length)
    drive = feeder.cache.report()["drives"][0]
    assert drive["arena_bytes"] <= ledger.owned(PROCESS)
    feeder.cache.release()
    assert ledger.total() == 0


def test_rows_come_back_as_they_were_given() -> None:
    feeder = Feeder(cache_of("instinfer(chunk_kib=16,drives=2)"))
    feeder.step(333)
    for begin, end in ((0, 333), (17, 40), (330, 333), (5, 321)):
        for layer in range(LAYERS):
            keys, values = feeder.cache.rows(layer, begin, end)
            np.testing.assert_array_equal(keys, feeder.held(layer)[0][begin:end])
            np.testing.assert_array_equal(values, feeder.held(layer)[1][begin:end])
    feeder.cache.release()


def test_bytes_over_the_link_are_those_of_the_formula() -> None:
    """Without shared keys: 3 h down and h up, in 16-bit numbers, a token and layer."""
    shape = kv.CacheShape(num_layers=3, num_heads=4, num_kv_heads=4, head_dim=32)
    cache = cache_of("instinfer(1)", shape)
    feeder = Feeder(cache)
    feeder.step(100)
    before = cache.report()["drives"][0]["link"]
    for _ in range(20):
        feeder.step(1)
    after = cache.report()["drives"][0]["link"]
    h = 4 * 32
    assert after["down_bytes"] - before["down_bytes"] == 20 * 3 * 3 * h * 2
    assert after["up_bytes"] - before["up_bytes"] == 20 * 3 * h * 2
    cache.release()


def test_writes_and_whole_blocks_erased() -> None:
    cache = cache_of("instinfer(1,block_kib=16)")
    feeder = Feeder(cache)
    feeder.step(512)
    drive = cache.report()["drives"][0]
    assert drive["pages_written"] * drive["page_bytes"] == 1.5 * drive["new_bytes"]  # keys twice
    fork = cache.fork()
    fork.release()
    drive = cache.report()["drives"][0]
    assert drive["blocks_erased"] == cache.settings.layout.blocks(512)
    assert drive["pages_written"] * drive["page_bytes"] == 2 * 1.5 * drive["new_bytes"]  # the fork's own pages
    cache.release()


def test_the_ledger_says_which_process_holds_what() -> None:
    cache = cache_of("instinfer(0.25)")
    Feeder(cache).step(700)
    tiers = {row.owner: row.tier for row in cache.arena.ledger.rows()}
    assert tiers == {LINK: "ram", PROCESS: "storage", FLASH: "disk", "runtime/storage process": "storage"}
    report = cache.report()
    rows = {row.owner: row.nbytes for row in cache.arena.ledger.rows()}
    drive = report["drives"][0]
    assert drive["arena_bytes"] <= rows[PROCESS]
    assert drive["resident_bytes"] <= rows[PROCESS] + rows["runtime/storage process"]
    cache.release()
