"""Lambda-shaped attention against a reference that rotates every key anew by its place in the cache."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kernels, kv
from memwall.engine import Sampling, Settings, load
from memwall.engine.quality import Evaluator
from memwall.errors import InputError
from memwall.kv.ring import RingLayout
from memwall.memory import Arena, Ledger
from memwall.models import ModelConfig, model_directory
from memwall.models.config import RopeConfig
from memwall.models.rope import rope_tables
from memwall.plan import make_plan
from memwall.plan.speed import _seen
from tests.kv.latent_models import loaded

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 128}
MODEL = loaded("llama", **SIZES)
HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 32, 300
FORMS = (
    "lambda(sinks=4,window=40)+float32",
    "lambda(sinks=4,window=40,positions=clip)+float32",
    "lambda(sinks=0,window=33)+float32",
    "lambda(sinks=0,window=7,positions=clip)+float32",
    "lambda(sinks=7,window=20,positions=clip)+float32",
    "lambda(sinks=4,window=70)+kivi(8bit,group=16,residual=16,exact=float32)",
    "lambda(sinks=3,window=100,positions=clip)+kivi(8bit,group=32,residual=64,exact=float32)",
    "lambda(sinks=1,window=40)+kivi(8bit,group=16,residual=32,exact=float32)",
)
CUTS = ([1] * TOKENS, [TOKENS], [100, 1, 1, 1, 97, 100], [3, 60, 20, 60, 60, 97], [17, 16, 16, 15, 236])


def numbers(seed: int) -> list[np.ndarray]:
    """Queries, keys and values of a stream, unrotated."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((TOKENS, heads, DIM)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def turned(x: np.ndarray, by: np.ndarray, rope: RopeConfig) -> np.ndarray:
    cos, sin = rope_tables(rope, DIM, by)
    return kernels.rope(np.ascontiguousarray(x), cos, sin)


def feed(cache: kv.KVCache, rows: list[np.ndarray], begin: int, count: int) -> np.ndarray:
    """One pass of both layers; queries come in blocks, as a decoder's do."""
    positions = np.arange(begin, begin + count)
    turns = positions + (cache.next_position - cache.length)
    q, k = (turned(x[positions].copy(), turns, MODEL.config.rope) for x in rows[:2])
    out = np.empty_like(q)
    for layer in range(2):
        cache.append(layer, k, rows[2][positions], positions)
        for first in range(0, count, 50):
            part = slice(first, min(first + 50, count))
            cache.attend(layer, q[part], positions[part], out[part])
        cache.settle(layer)
    return out


def reference(rows: list[np.ndarray], position: int, cache: Any) -> np.ndarray:
    """Attention of one query [H, D]: each key it sees is rotated anew, by its place in the cache or its distance."""
    s, (queries, keys, values) = cache.settings, rows
    seen = np.array([j for j in range(position + 1) if j < s.sinks or position - j < s.window])
    places = np.arange(len(seen)) if s.positions == "cache" else position - np.minimum(position - seen, s.window)
    own = np.array([len(seen) - 1 if s.positions == "cache" else position])
    q = turned(queries[position][None].copy(), own, MODEL.config.rope)[0]
    k = turned(keys[seen], places, MODEL.config.rope)
    rep = HEADS // KV_HEADS
    logits = np.einsum("hd,shd->hs", q, np.repeat(k, rep, axis=1)) * MODEL.shape.logit_scale
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("hs,shd->hd", weights, np.repeat(values[seen], rep, axis=1))


def build(policy: str, capacity: int = TOKENS, ledger: Ledger | None = None, cap: int = 1 << 30) -> Any:
    return kv.build(policy, MODEL.shape, Arena(cap, ledger or Ledger()), capacity, MODEL.model)


@pytest.mark.parametrize("policy", FORMS)
@pytest.mark.parametrize("counts", CUTS, ids=lambda counts: f"{len(counts)} passes")
def test_equals_keys_rotated_anew(policy: str, counts: list[int]) -> None:
    cache, rows = build(policy), numbers(1)
    outs = np.concatenate([feed(cache, rows, sum(counts[:i]), count) for i, count in enumerate(counts)])
    for position in {*range(0, TOKENS, 7), *range(TOKENS - 5, TOKENS)}:
        want = reference(rows, position, cache)
        np.testing.assert_allclose(outs[position], want, atol=2e-2 if "kivi" in policy else 2e-5)
    cache.release()


def test_integers_meet_what_the_ring_codes() -> None:
    rows, outs = numbers(5), []
    for queries in ("", ",queries=int8"):
        cache = build(f"lambda(sinks=4,window=70)+kivi(4bit,group=16,residual=16{queries})")
        outs.append(np.concatenate([feed(cache, rows, 0, 200), *(feed(cache, rows, i, 1) for i in range(200, TOKENS))]))
    error = np.linalg.norm(outs[1] - outs[0], axis=(1, 2)) / np.linalg.norm(outs[0], axis=(1, 2))
    assert 1e-4 < error[200:].mean() < 0.02


@pytest.mark.parametrize("policy", FORMS)
def test_bytes_stop_growing(policy: str) -> None:
    ledger = Ledger()
    cache, rows = build(policy, capacity=10 * TOKENS, ledger=ledger), numbers(2)
    held = []
    for begin in range(0, 5 * TOKENS, TOKENS):
        # the same rows again and again: only their number matters
        feed(cache, [np.tile(x, (begin // TOKENS + 1, 1, 1)) for x in rows], begin, TOKENS)
        held.append(sum(row.nbytes for row in ledger.rows()))
        assert held[-1] == cache.nbytes == sum(kv.predict(policy, MODEL.shape, begin + TOKENS).values())
        assert cache.next_position <= cache.ring_layout.frame + cache.settings.sinks
    assert len(set(held)) == 1
    assert kv.read_bytes(policy, MODEL.shape, 5 * TOKENS) <= held[0]
    cache.release()
    assert ledger.total() == 0


@pytest.mark.parametrize("policy", FORMS)
@pytest.mark.parametrize("back", [1, 9, 16])
def test_goes_back_a_few_tokens(policy: str, back: int) -> None:
    """What follows is as if the tokens taken back had never been (coded ones were decoded on the way)."""
    cache, alone, rows = build(policy), build(policy), numbers(3)
    for each in (cache, alone):
        for begin in range(0, 200, 50):
            feed(each, rows, begin, 50)
    for begin in range(200, 200 + back):
        feed(cache, rows, begin, 1)
    assert cache.rewindable(200) == 200
    cache.truncate(200)
    got, want = (np.concatenate([feed(each, rows, 200, 40), feed(each, rows, 240, 1)]) for each in (cache, alone))
    np.testing.assert_allclose(got, want, atol=3e-2 if "kivi" in policy else 1e-6)
    assert cache.rewindable(60) == 0
    with pytest.raises(ValueError, match="dropped"):
        cache.truncate(60)
    cache.truncate(0)
    fresh = build(policy)
    np.testing.assert_allclose(feed(cache, rows, 0, 90), feed(fresh, rows, 0, 90), atol=1e-6)


def test_a_long_pass_that_breaks_off_leaves_a_cache_that_goes_on() -> None:
    cache, rows = build(FORMS[0]), numbers(4)
    feed(cache, rows, 0, 100)
    positions = np.arange(100, 200)
    turns = positions + (cache.next_position - cache.length)
    k = turned(rows[1][positions].copy(), turns, MODEL.config.rope)
    cache.append(0, k, rows[2][positions], positions)
    cache.settle(0)
    cache.truncate(100)
    assert cache.length == 100
    out = feed(cache, rows, 100, 60)
    want = reference(rows, 159, cache)  # once a window has passed nothing is missing any more
    np.testing.assert_allclose(out[-1], want, atol=2e-5)


def test_stats_are_those_of_all_parts() -> None:
    cache, rows = build(FORMS[0]), numbers(5)
    feed(cache, rows, 0, 120)
    q = turned(rows[0][120:121].copy(), np.array([cache.next_position]), MODEL.config.rope)
    k = turned(rows[1][120:121].copy(), np.array([cache.next_position]), MODEL.config.rope)
    cache.append(0, k, rows[2][120:121], np.array([120]))
    out, stats = np.empty_like(q), np.empty((1, HEADS, 2), np.float32)
    cache.attend(0, q, np.array([120]), out, stats)
    again = np.empty_like(q)
    cache.attend(0, q, np.array([120]), again)
    np.testing.assert_array_equal(out, again)
    assert np.isfinite(stats).all()
    assert (stats[..., 1] >= 1).all()


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 4), st.integers(0, 400), st.integers(0, 200))
def test_layout_covers_every_token_once(sinks: int, slots: int, laps: int, begin: int, count: int) -> None:
    layout = RingLayout(sinks, slots, slots * laps)
    begin, end = begin + sinks, begin + sinks + count
    for pieces in (layout.pieces(begin, end), ((a, b) for a, b, _ in layout.frames(begin, end))):
        tokens = list(itertools.chain.from_iterable(range(a, b) for a, b in pieces))
        assert tokens == list(range(begin, end))
    for first, stop in layout.pieces(begin, end):
        assert layout.slot(first) + stop - first <= slots
        assert layout.frame_of(first) == layout.frame_of(stop - 1)
    for token in range(begin, end):
        assert sinks <= layout.place(token, layout.frame_of(token)) < sinks + layout.frame


@pytest.mark.parametrize("policy", ["lambda(sinks=2,window=60)", "lambda(sinks=2,window=64)+kivi(4bit,residual=32)"])
def test_runs_past_the_models_positions(policy: str) -> None:
    demo = model_directory("demo")
    session = load(demo, Settings(weights="float16", kv=policy, context_tokens=3000, segment_tokens=256))
    prompt = [0, *np.random.default_rng(0).integers(3, 4000, 1500).tolist()]
    list(session.generate(prompt, Sampling(max_new_tokens=20)))
    assert session.cache.length > 1500 > ModelConfig.from_directory(demo).max_position
    assert session.cache.nbytes == sum(kv.predict(policy, session.cache.shape, 1520).values())
    session.release()


def test_plan_knows_that_no_more_is_read_and_held() -> None:
    demo = model_directory("demo")
    short, long = (make_plan(demo, kv="lambda(sinks=4,window=256)", context=context) for context in (2048, 65536))
    config = ModelConfig.from_directory(demo)
    assert _seen(config, "lambda(sinks=4,window=256)", 9000) == [260] * config.num_layers
    held = [[row.nbytes for row in plan.rows if row.owner.startswith("kv/")] for plan in (short, long)]
    assert held[0] == held[1]


def test_eval_streams_past_the_models_positions() -> None:
    evaluator = Evaluator(model_directory("demo"), "Walls of memory. " * 500, limit_tokens=1300, stream=True)
    figures = evaluator.score("float16", "lambda(sinks=4,window=128)")
    assert figures.kl_nats is None
    assert 1 < figures.perplexity < 60
    with pytest.raises(InputError, match="lambda"):
        evaluator.score("float16", "kivi")


def test_bad_settings_are_refused() -> None:
    for policy, says in (
        ("lambda(window=0)", "window"),
        ("lambda(positions=true)", "positions"),
        ("lambda(0.5)", "bare number"),
        ("lambda(sinks=4,window=253)", "256 positions"),
        ("lambda(window=200)+bfp", "ring"),
        ("lambda(window=64)+kivi(4bit,residual=64)", "residual=16|residual=32|residual"),
        ("lambda(window=64)+snapkv(0.5)", "both"),
    ):
        with pytest.raises(InputError, match=says):
            build(policy)
    shape = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32, windows=(16,))
    with pytest.raises(InputError, match="windows"):
        kv.predict("lambda(window=20)", shape, 10)
