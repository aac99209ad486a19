"""What InstInfer's evidence hangs on: a baseline that attends as others do, choices that are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import kv
from memwall.cli.evidence import load_experiment
from memwall.kernels.attention import attend_float
from memwall.systems import find_system

instinfer = load_experiment(find_system("instinfer"))
SHAPE = kv.CacheShape(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32)


def rows(count: int, heads: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, heads, 32), np.float32)


def test_the_baseline_fetches_all_and_attends_as_plain_rows_do() -> None:
    cache = instinfer.filled("instinfer(1,chunk_kib=16)", SHAPE, 300, instinfer.FetchCache)
    keys, values = cache.rows(0, 0, 300)
    q, k, v = rows(1, 4, 1), rows(1, 2, 2), rows(1, 2, 3)
    out, wanted, position = np.empty_like(q), np.empty_like(q), np.array([300])
    before = instinfer.crossed(cache)
    cache.append(0, k, v, position)
    cache.attend(0, q, position, out)
    cache.settle(0)
    assert instinfer.crossed(cache) - before == 2 * 2 * 32 * 2 * 301  # 300 tokens come, one goes
    attend_float(
        q, np.concatenate([keys, k]), np.concatenate([values, v]), scale=32**-0.5, first_position=300, out=wanted
    )
    np.testing.assert_allclose(out, wanted, atol=1e-3)
    cache.release()


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_choosing_by_channels_is_what_the_drive_does(share: float) -> None:
    study = instinfer.ChoosingCache(SHAPE, instinfer.by_channels(share), mean=True)
    drive = instinfer.filled(f"instinfer({share},least=1)", SHAPE, 200)
    keys, values = drive.rows(0, 0, 200)
    study.append(0, keys, values, np.arange(200))
    q, position = rows(1, 4, 7), np.array([199])
    outs = np.empty((2, 1, 4, 32), np.float32)
    for cache, out in zip((study, drive), outs):
        cache.attend(0, q, position, out)
    np.testing.assert_allclose(outs[0], outs[1], atol=4e-3)
    drive.release()


def test_heavy_hitters_add_up_attention() -> None:
    keys, q = rows(40, 2, 0), rows(40, 4, 1)
    whole, parts = instinfer.HeavyHitters(0.25), instinfer.HeavyHitters(0.25)
    whole.observe(0, q, keys)
    for begin in (0, 16, 32):
        parts.observe(0, q[begin : begin + 16], keys[: begin + 16])
    np.testing.assert_allclose(whole.votes[0], parts.votes[0], rtol=1e-4)
    assert whole.votes[0].sum() == pytest.approx(2 * 2 * 40, rel=1e-4)  # each query's attention is one
    chosen, _ = whole(0, q[-1].reshape(2, 2, 32), keys)
    for head, tokens in enumerate(chosen):
        assert len(tokens) == 10
        assert set(range(35, 40)) <= set(tokens.tolist())
        best = np.argsort(-parts.votes[0][head, :35])[:5]
        assert set(tokens.tolist()) == {*best.tolist(), *range(35, 40)}


def test_last_tokens() -> None:
    chosen, _ = instinfer.last_tokens(0.1)(0, np.empty((2, 2, 32)), np.empty((50, 2, 32)))
    assert [own.tolist() for own in chosen] == [[45, 46, 47, 48, 49]] * 2


def test_pages_are_shares_of_all() -> None:
    q, k, v = (np.stack([rows(300, heads, seed)]) for heads, seed in ((4, 0), (2, 1), (2, 2)))
    pages = instinfer.count_pages("instinfer(1,r=32,k=300)", SHAPE, (q, k, v), 2)
    assert (pages.token_share, pages.channel_share) == (1, 1)
    assert pages.dense == 2 * 2 * 2 * (299 // 16)
    assert pages.single_layout == pages.dense
