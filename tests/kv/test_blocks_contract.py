"""What every policy of the table must do, in an easy and a hard setting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memwall import kv
from memwall.errors import BudgetExceeded, InputError
from memwall.kv import fitted
from memwall.kv.locret import LocretCache, head_inputs, heads_width
from memwall.memory import Arena, Ledger
from memwall.models.config import RopeConfig
from memwall.models.rope import RotaryTable

DROPPING = (
    "locret(tokens=64,chunk=32,stable=8,local=4)",
    "locret(0.3,chunk=40)+bfloat16",
    "epicache(tokens=64,chunk=32)",
    "epicache(0.4,chunk=100,uniform=1)+float32",
)
"""Settings that drop tokens: what is predicted for them is the peak, which they need not hold at the moment."""
SETTINGS = DROPPING
SHAPE = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
NUM_TOKENS = 230


@pytest.fixture(autouse=True)
def a_model_with_fitted_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What policies that learn find for the stand-in model below."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rng, width = np.random.default_rng(7), heads_width(SHAPE)
    shapes = {"w1": (width, head_inputs(SHAPE)), "w2": (SHAPE.num_kv_heads, width)}
    heads = {
        f"{layer}.{name}": rng.standard_normal(shape).astype(np.float16) / 16
        for layer in range(SHAPE.num_layers)
        for name, shape in shapes.items()
    }
    fitted.save("stand-in", LocretCache.fit_key(kv.parse("locret")), heads)


def stand_in() -> Any:
    return SimpleNamespace(
        fingerprint="stand-in",
        directory=Path("stand-in"),
        config=SimpleNamespace(max_position=4096),
        rotary=RotaryTable(RopeConfig(type="default", theta=10_000.0), SHAPE.head_dim),
    )


def feed(cache: kv.KVCache, seed: int, first: int, *counts: int) -> np.ndarray:
    """Forward passes of so many tokens each; the last layer's outputs."""
    rng = np.random.default_rng(seed)
    outs = []
    for count in counts:
        q, k, v = (rng.standard_normal((count, heads, 32)).astype(np.float32) for heads in (4, 2, 2))
        positions, out = np.arange(first, first + count), np.empty_like(q)
        for layer in range(2):
            cache.append(layer, k, v, positions)
            cache.attend(layer, q, positions, out)
            cache.settle(layer)
        outs.append(out)
        first += count
    return np.concatenate(outs)


def build(policy: str) -> tuple[kv.KVCache, Ledger]:
    ledger = Ledger()
    return kv.build(policy, SHAPE, Arena(1 << 24, ledger), NUM_TOKENS, stand_in()), ledger


@pytest.mark.parametrize("policy", SETTINGS)
def test_bytes_bits_and_policy(policy: str) -> None:
    cache, ledger = build(policy)
    assert (cache.length, cache.bits_per_value) == (0, 0)
    first = feed(cache, 0, 0, 1, 150, 1, 1, 40)
    assert cache.length == 193
    predicted = kv.predict(policy, SHAPE, 193, 0, NUM_TOKENS)
    held = {row.owner: row.nbytes for row in ledger.rows()}
    if policy in DROPPING:
        assert all(nbytes <= predicted[owner] for owner, nbytes in held.items())
    else:
        assert held == {owner: n for owner, n in predicted.items() if n}
    assert cache.nbytes == ledger.total()
    assert cache.bits_per_value == pytest.approx(8 * cache.nbytes / (2 * 2 * 2 * 32 * 193))
    assert 0 < kv.read_bytes(policy, SHAPE, 193) <= cache.nbytes
    again, _ = build(cache.policy)
    assert again.policy == cache.policy
    np.testing.assert_array_equal(feed(again, 0, 0, 1, 150, 1, 1, 40), first)
    cache.release()
    assert ledger.total() == 0


@pytest.mark.parametrize("policy", SETTINGS)
@pytest.mark.parametrize("length", [1, 40, 128, 193])
def test_a_fork_goes_its_own_way(policy: str, length: int) -> None:
    cache, ledger = build(policy)
    alone, _ = build(policy)
    for each in (cache, alone):
        feed(each, 0, 0, length)
    other = cache.fork()
    assert other.length == length
    feed(cache, 5, length, 1, 20, 1)
    np.testing.assert_array_equal(feed(other, 9, length, 1, 20, 1), feed(alone, 9, length, 1, 20, 1))
    other.release()
    cache.release()
    assert ledger.total() == 0


@pytest.mark.parametrize("policy", SETTINGS)
def test_a_refusal_changes_nothing(policy: str) -> None:
    cache, ledger = build(policy)
    feed(cache, 0, 0, 100)
    held = ledger.total()
    cache.arena.set_cap(held)
    with pytest.raises(BudgetExceeded, match="kv/"):
        feed(cache, 1, 100, 120)
    cache.truncate(100)
    assert cache.length == 100
    with pytest.raises(BudgetExceeded):
        cache.fork()
    assert ledger.total() == cache.nbytes == held
    cache.arena.set_cap(1 << 24)
    alone, _ = build(policy)
    feed(alone, 0, 0, 100)
    np.testing.assert_array_equal(feed(cache, 1, 100, 100, 1), feed(alone, 1, 100, 100, 1))


def test_shapes_are_checked() -> None:
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    for change, says in (
        ({"num_heads": 3}, "share"),
        ({"num_layers": 0}, "num_layers"),
        ({"windows": (4,)}, "windows"),
    ):
        with pytest.raises(InputError, match=says):
            kv.CacheShape(**{**sizes, **change})
    with pytest.raises(InputError, match="at least 1"):
        kv.build("float16", SHAPE, Arena(1 << 20, Ledger()), 0)


@pytest.mark.parametrize("policy", SETTINGS)
def test_the_highest_bytes_are_predicted(policy: str) -> None:
    """While a prompt is read and answered nothing is held that prediction does not name."""
    cache, _ = build(policy)
    feed(cache, 0, 0, *cache.begin_prompt(190, 64))
    feed(cache, 1, 190, *[1] * 40)
    assert cache.arena.peak_bytes <= sum(kv.predict(policy, SHAPE, NUM_TOKENS, 64, NUM_TOKENS).values())
