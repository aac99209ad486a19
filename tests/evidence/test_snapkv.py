"""What the verdicts of SnapKV's and ThinK's evidence hang on: other ways to choose, errors, turns, bytes."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall import kv
from memwall.cli.evidence import load_experiment
from memwall.kernels.attention import attend_float
from memwall.kv import evict
from memwall.memory import Arena, Ledger
from memwall.systems import find_system

SHAPE = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def snapkv() -> ModuleType:
    return load_experiment(find_system("snapkv"))


@pytest.fixture(scope="module")
def think() -> ModuleType:
    return load_experiment(find_system("think"))


def rows(num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of one layer and the stats of all queries."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((num_tokens, heads, 16), np.float32) for heads in (4, 2, 2))
    stats = np.empty((num_tokens, 4, 2), np.float32)
    attend_float(q, k, v, scale=0.25, first_position=0, out=np.empty_like(q), stats=stats)
    return q, k, v, stats


def test_the_other_ways_keep_what_they_say(snapkv: ModuleType) -> None:
    q, k, _, stats = rows(100)
    known: dict[int, np.ndarray] = {}
    kept = {}
    for name, scorer in snapkv.scorers(20, known).items():
        last = scorer.window(100)
        kept[name] = evict.top_rows(scorer(0, k, q[-last:], stats[-last:], 0.25), 20)
    np.testing.assert_array_equal(kept["first and last"], [[*range(4), *range(84, 100)]] * 2)
    for name, last in (("SnapKV", 10), ("no pooling", 10), ("H2O", 10), ("chance", 10)):
        np.testing.assert_array_equal(kept[name][:, -last:], [range(100 - last, 100)] * 2)
    total = evict.attention_votes(k, q, stats, 0.25)
    np.testing.assert_allclose(snapkv.all_votes(k, q, stats, 0.25), total, rtol=1e-4)
    for head, own in enumerate(kept["H2O"]):
        assert set(own[:10]) == set(np.argsort(total[head, :90])[-10:])
    known[0] = total
    again = snapkv.HeavyHitters(20, known)
    assert again.window(100) == 1  # its votes are known: no query is needed
    np.testing.assert_array_equal(evict.top_rows(again(0, k, q[-1:], stats[-1:], 0.25), 20), kept["H2O"])


def test_a_prompt_replayed_leaves_what_the_model_would(snapkv: ModuleType) -> None:
    q, k, v, _ = rows(90)
    layers = [np.stack([x, x[::-1]]) for x in (q, k, v)]
    prompt = snapkv.Prompt(np.arange(90), "", 0.0, *layers, np.zeros(4), layers[0][:, :2], True)
    cache, alone = (kv.build("snapkv(tokens=40)", SHAPE, Arena(1 << 24, Ledger()), 200) for _ in range(2))
    snapkv.replay(prompt, cache)
    for layer in range(2):
        own = [x[layer] for x in layers]
        alone.append(layer, own[1], own[2], np.arange(90))
        alone.attend(layer, own[0], np.arange(90), np.empty_like(own[0]))
        alone.settle(layer)
    for layer in range(2):
        mine, theirs = (each.inner._keys[layer].rows(0, 40) for each in (cache, alone))
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(prompt.stats(0), rows(90)[3], rtol=1e-6)
    shares = snapkv.hits(
        prompt, [prompt.stats(layer) for layer in range(2)], {0: np.zeros((2, 90)), 1: np.zeros((2, 90))}, 30
    )
    assert all(0 <= share <= 1 for share in shares.values())


def test_more_is_more_by_two_standard_errors(snapkv: ModuleType) -> None:
    some, none = [True, False] * 8, [False] * 16
    difference, error = snapkv.surplus(some, none)
    assert difference == 0.5
    assert error == pytest.approx(0.5 * (16 / 15) ** 0.5 / 4)
    assert snapkv.is_more(some, none)
    assert not snapkv.is_no_less(none, some)
    one = [True, *none[1:]]
    assert not snapkv.is_more(one, none)
    assert snapkv.is_no_less(none, one)


def test_bytes_are_those_of_another_process(snapkv: ModuleType) -> None:
    shape = kv.CacheShape(num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64)
    held = snapkv.held_bytes("snapkv(tokens=512)", shape, 4096)
    assert held["ledger"] == sum(kv.predict("float16", shape, 512).values())
    assert held["peak"] > held["ledger"]
    assert abs(held["resident"] - held["ledger"]) < 2_000_000


def test_errors_of_logits(think: ModuleType) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((20, 6)), rng.standard_normal((50, 6))
    kept = np.array([0, 2, 3, 5])
    there = q[:, kept] @ k[:, kept].T
    want = np.linalg.norm(q @ k.T - there) / np.linalg.norm(q @ k.T)
    assert think.logit_error(q, k, kept) == pytest.approx(want)
    assert think.logit_error(q, k, np.arange(6)) == 0


def test_the_ways_to_choose_channels_differ(think: ModuleType) -> None:
    q, k, v, _ = rows(80)
    k = k * np.exp(np.random.default_rng(1).standard_normal((1, 2, 16))).astype(np.float32)
    chosen = {}
    for way, kind in think.WAYS.items():
        cache = kind(kv.resolve("think(0.5)"), SHAPE, Arena(1 << 24, Ledger()), 100)
        for layer in range(2):
            cache.append(layer, k, v, np.arange(80))
            cache.attend(layer, q, np.arange(80), np.empty_like(q))
            cache.settle(layer)
        chosen[way] = cache.channels[0].tolist()
    for head in range(2):
        assert chosen["key norm"][head] == sorted(np.argsort((k[:, head] ** 2).sum(0))[-8:])
        assert chosen["key L1"][head] == sorted(np.argsort(np.abs(k[:, head]).sum(0))[-8:])
    assert chosen["chance"] not in (chosen["ThinK"], chosen["key norm"])


def test_turns_are_taken_in_order(think: ModuleType) -> None:
    said: list[str] = []
    turns = think.take_turns({name: lambda name=name: said.append(name) for name in "ab"}, 3)
    assert said == ["a", "b"] * 4
    assert {name: len(values) for name, values in turns.items()} == {"a": 3, "b": 3}
