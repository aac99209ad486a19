"""The full-precision cache against plain attention, and its bytes against its own prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.errors import BudgetExceeded, DoesNotFit
from memwall.kernels import Program, attention_reference, int8_rows, store_int8
from memwall.memory import Arena, Ledger

SHAPE = kv.CacheShape(num_layers=2, num_heads=6, num_kv_heads=2, head_dim=20, windows=(None, 9))


def step(cache: kv.KVCache, k: np.ndarray, v: np.ndarray, q: np.ndarray, first: int) -> list[np.ndarray]:
    """One forward pass over all layers; the same numbers in each."""
    positions = np.arange(first, first + len(k))
    outs = []
    for layer in range(cache.shape.num_layers):
        cache.append(layer, k, v, positions)
        outs.append(cache.attend(layer, q, positions, np.empty_like(q)))
        cache.settle(layer)
    return outs


def held(x: np.ndarray, policy: str) -> np.ndarray:
    """What a cache of this kind makes of x."""
    if policy == "int8":
        rows = np.empty((*x.shape[:2], x.shape[2] + 2), np.int8)
        return int8_rows(store_int8(x, np.arange(len(x)), rows))
    return torch.from_numpy(x).to(getattr(torch, policy)).float().numpy()


@pytest.mark.parametrize("policy", ["float32", "float16", "bfloat16", "int8"])
def test_equals_plain_attention(policy: str) -> None:
    rng = np.random.default_rng(0)
    num_tokens = 31
    q = rng.standard_normal((num_tokens, 6, 20)).astype(np.float32)
    k, v = rng.standard_normal((2, num_tokens, 2, 20)).astype(np.float32)
    cache = kv.build(policy, SHAPE, Arena(1 << 24, Ledger()), 64)
    for begin, end in [(0, 17), (17, 18), (18, 19), (19, 25), (25, 31)]:
        outs = step(cache, k[begin:end], v[begin:end], q[begin:end], begin)
        for layer, out in enumerate(outs):
            want, _ = attention_reference.attend(
                torch.from_numpy(q[begin:end]), *(torch.from_numpy(held(x[:end], policy)) for x in (k, v)),
                scale=20**-0.5, first_position=begin, window=SHAPE.window(layer),
            )  # fmt: skip
            np.testing.assert_allclose(out, want.numpy(), atol=1e-5)
    assert cache.length == num_tokens


@pytest.mark.parametrize("policy", ["float32", "float16", "bfloat16", "int8"])
def test_bytes_are_what_was_predicted(policy: str) -> None:
    ledger = Ledger()
    cache = kv.build(policy, SHAPE, Arena(1 << 24, ledger), 400)
    for first in range(0, 400, 100):
        row = np.ones((100, 2, 20), np.float32)
        step(cache, row, row, np.ones((100, 6, 20), np.float32), first)
        predicted = kv.predict(policy, SHAPE, first + 100)
        assert {row.owner: row.nbytes for row in ledger.rows()} == predicted
        assert cache.nbytes == sum(predicted.values())
    cache.truncate(10)
    assert cache.nbytes == sum(kv.predict(policy, SHAPE, 10).values())
    cache.release()
    assert ledger.total() == 0


def test_truncated_tokens_are_forgotten() -> None:
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 12, 2, 20)).astype(np.float32)
    q = rng.standard_normal((12, 6, 20)).astype(np.float32)
    fresh = kv.build("float32", SHAPE, Arena(1 << 24, Ledger()), 64)
    used = kv.build("float32", SHAPE, Arena(1 << 24, Ledger()), 64)
    step(used, k[::-1].copy(), v[::-1].copy(), q, 0)
    used.truncate(0)
    step(used, k[:5], v[:5], q[:5], 0)
    step(used, k[6:9], v[6:9], q[6:9], 5)
    used.truncate(5)
    step(fresh, k[:5], v[:5], q[:5], 0)
    for a, b in zip(step(used, k[5:], v[5:], q[5:], 5), step(fresh, k[5:], v[5:], q[5:], 5)):
        np.testing.assert_array_equal(a, b)


def test_refusals() -> None:
    cache = kv.build("float32", SHAPE, Arena(4 * 4096, Ledger()), 60)
    row = np.ones((50, 2, 20), np.float32)
    cache.append(0, row[:20], row[:20], np.arange(20))
    with pytest.raises(BudgetExceeded, match="kv/full"):
        cache.append(0, row[:30], row[:30], np.arange(20, 50))
    with pytest.raises(DoesNotFit, match="--context 70"):
        cache.append(0, row, row, np.arange(20, 70))
    with pytest.raises(ValueError, match="next position is 20"):
        cache.append(0, row[:1], row[:1], np.arange(3, 4))
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(1)


@pytest.mark.parametrize("policy", ["float32", "float16", "bfloat16", "int8"])
def test_recorded_steps_are_the_same_to_the_bit(policy: str) -> None:
    rng = np.random.default_rng(3)
    recorded, plain = (kv.build(policy, SHAPE, Arena(1 << 24, Ledger()), 300) for _ in range(2))
    k, v = rng.standard_normal((2, 1, 2, 20)).astype(np.float32)
    q = rng.standard_normal((1, 6, 20)).astype(np.float32)
    outs = [np.empty_like(q) for _ in range(SHAPE.num_layers)]
    program = Program()
    for layer, out in enumerate(outs):
        recorded.record(program, layer, k, v, q, out)
    for token in range(290):
        for x in (k, v, q):
            x[:] = rng.standard_normal(x.shape)
        recorded.begin_recorded(np.array([token]))
        program.run()
        recorded.end_recorded()
        for got, want in zip(outs, step(plain, k, v, q, token)):
            np.testing.assert_array_equal(got, want)
        if token == 200:  # as the decoder takes back what it made
            recorded.truncate(150)
            plain.truncate(150)
            break
    assert (recorded.length, recorded.nbytes) == (plain.length, plain.nbytes)
    recorded.begin_recorded(np.array([150]))
    program.run()
    recorded.end_recorded()
    np.testing.assert_array_equal(outs[0], step(plain, k, v, q, 150)[0])


def test_a_recorded_step_beyond_the_budget_is_refused_before_it_runs() -> None:
    cache = kv.build("float16", SHAPE, Arena(4 * 4096, Ledger()), 4000)  # a page for each range
    for token in range(51):
        cache.begin_recorded(np.array([token]))
        cache.end_recorded()
    with pytest.raises(BudgetExceeded):
        cache.begin_recorded(np.array([51]))
    assert cache.length == 51
    with pytest.raises(ValueError, match="next position is 51"):
        cache.begin_recorded(np.array([52]))
